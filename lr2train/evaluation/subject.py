"""What is evaluated: a model folder with factors, and which of its RoPE tables serves a length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lr2train.model import load, rotary
from lr2train.model.decode import window_of
from lr2train.rope.factors import Factors


@dataclass(frozen=True)
class Subject:
    """One row of the comparison.

    Attributes:
        label: how tables and pictures name it.
        folder: the model.
        factors: of the long window.
        switches: True: the original table up to L0, the factors beyond (LongRoPE2). False: the factors at every length, as the method was
            published.
        overrides: ``model.overrides``, for a base model.
    """

    label: str
    folder: Path
    factors: Factors
    switches: bool
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def window(self, length_tokens: int) -> str:
        """The table for a document of this length."""
        return window_of(length_tokens, self.factors.spectrum.window_tokens) if self.switches else "long"


def open_model(subject: Subject, dtype: str, device: str) -> tuple[Any, rotary.WindowRotary]:
    """The subject's model with its factors installed."""
    model = load.load_whole(subject.folder, dtype, device, subject.overrides)
    return model, rotary.install(model, subject.factors)
