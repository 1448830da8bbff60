"""A model under evaluation: a folder, factors, and the RoPE table that serves a length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lr2train.model import load, rotary
from lr2train.model.decode import window_of
from lr2train.model.score import Score, score
from lr2train.rope.factors import Factors


@dataclass(frozen=True)
class Subject:
    """One row of the comparison.

    Attributes:
        label: its name in tables and pictures.
        folder: of the model.
        factors: of the long window.
        switches: True: the original table up to L0 and the factors beyond (LongRoPE2). False: the factors at every
            length, as most methods are published.
        overrides: ``model.overrides``, for a base model.
    """

    label: str
    folder: Path
    factors: Factors
    switches: bool
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def window(self, length_tokens: int) -> str:
        """The table for a document of this length: "short" | "long"."""
        return window_of(length_tokens, self.factors.spectrum.window_tokens) if self.switches else "long"

    def score(
        self, model: Any, table: rotary.WindowRotary, tokens: np.ndarray, spans: Sequence[tuple[int, int]]
    ) -> Score:
        """Score the ``spans`` of one document under the table for its length; ``model`` and ``table`` are from
        ``open_model``.
        """
        return score(model, table, self.window(len(tokens)), tokens, spans)

    def score_text(self, model: Any, table: rotary.WindowRotary, tokens: np.ndarray) -> Score:
        """Score every token of a plain text but the first, which has no context."""
        return self.score(model, table, tokens, [(1, len(tokens))])


def open_model(subject: Subject, dtype: str, device: str) -> tuple[Any, rotary.WindowRotary]:
    """The subject's model with its factors installed, and the rotary module."""
    model = load.load_whole(subject.folder, dtype, device, subject.overrides)
    return model, rotary.install(model, subject.factors)
