"""A model under evaluation: a folder, its windows, and the RoPE table that serves a length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lr2train.config import UserError
from lr2train.model import load, rotary
from lr2train.model.decode import window_of
from lr2train.rope import hf as rope_hf
from lr2train.rope.factors import Factors


@dataclass(frozen=True)
class Subject:
    """One row of the comparison.

    Attributes:
        label: its name in tables and pictures.
        folder: of the model.
        factors: of the long window. None: the model's own RoPE at every length, whatever its type, untouched.
        switches: True: the original table up to L0 and the factors beyond (LongRoPE2). False: the factors at every
            length, as most methods are published.
        target_window_tokens: the longest text that it is asked about.
        overrides: ``model.overrides``, for a base model.
        dtype: of the weights, where they serve as they were published; None: ``model.dtype`` alone decides.
    """

    label: str
    folder: Path
    factors: Factors | None
    switches: bool
    target_window_tokens: int
    overrides: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None

    @property
    def original_window_tokens(self) -> int:
        """L0; the target window where the model has one window alone."""
        return self.factors.spectrum.window_tokens if self.factors else self.target_window_tokens

    @property
    def attention_factor(self) -> float:
        """Of the long window; 1 where the model's own RoPE serves."""
        return self.factors.attention_factor if self.factors else 1.0

    def window(self, total_tokens: int) -> str:
        """The table for a text of this length, prompt and generated tokens together: "short" | "long"."""
        return window_of(total_tokens, self.original_window_tokens) if self.switches else "long"

    def identity(self, dtype: str) -> dict[str, Any]:
        """Everything about the model that decides what it says, as plain JSON values."""
        return {
            "model": load.folder_fingerprint(self.folder),
            "dtype": dtype,
            "overrides": dict(self.overrides),
            "factors": self.factors.to_json() if self.factors else None,
            "switches": self.switches,
        }


def with_factors(label: str, folder: Path, factors: Factors, switches: bool, overrides: Mapping[str, Any]) -> Subject:
    """A model under factors of ours."""
    return Subject(label, folder, factors, switches, factors.target_window_tokens, overrides)


def as_published(label: str, folder: Path, overrides: Mapping[str, Any]) -> Subject:
    """A model folder as its owner published it.

    A ``longrope`` config gives both tables, and the length selects one, as in transformers. Every other RoPE is left as
    it is: its window is ``max_position_embeddings``.

    Raises:
        UserError: the config cannot be read, or names no window.
    """
    config = load.plain_config(load.config_of(load.ModelConfig(path=str(folder), overrides=dict(overrides))))
    dtype = config.get("dtype") if config.get("dtype") in load.DTYPES else None
    if factors := rope_hf.factors_of(config):
        return replace(with_factors(label, folder, factors, True, overrides), dtype=dtype)
    window = config.get("max_position_embeddings")
    if not isinstance(window, int):
        raise UserError(
            f"{folder / 'config.json'} has no max_position_embeddings, so the longest text of this model is not known; "
            "set it there, or leave this model out of run"
        )
    return Subject(label, folder, None, False, window, overrides, dtype)


def install(subject: Subject, model: Any) -> Any:
    """The rotary module of a loaded model, with the subject's factors in it; its ``window`` selects the table."""
    return rotary.install(model, subject.factors) if subject.factors else SimpleNamespace(window="long")
