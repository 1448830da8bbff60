"""The rescale factors of a long window: made by a method or a search, used by a training run, written by an export.

Choice: one frozen value object with a JSON form of its own. It carries the spectrum that it was made for, so factors of
another model are recognised. Only tables that cannot be built are refused. Order and bounds (non-decreasing, in [s,
2s]) are promises of the search and of single methods: published factors break them and have to be read as they are.

The short window is always the model's own, and a part of the spectrum. For plain RoPE its factors are 1 and its
attention factor is 1. Rescale factors always divide the unscaled frequencies theta_i, also where the model is extended
already.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lr2train.config import UserError
from lr2train.io import write_json
from lr2train.rope.spectrum import Spectrum, checked_factor, checked_table

NOTES = "search"  # key of factors.json that holds the provenance of searched factors
_SHORT = ("short_rescale", "short_attention_factor")  # keys of factors.json for the spectrum's own table


@dataclass(frozen=True)
class Factors:
    """Rescale factors lambda_i of the long window, and its attention factor.

    Attributes:
        rescale: lambda_i, D positive finite numbers; the frequencies are theta_i / lambda_i. Any sequence is taken and
            kept as a tuple.
        attention_factor: multiplies cos and sin of the long window, so it scales attention logits by its square;
            positive and finite.
        spectrum: of the original model, with the original window L0.
        target_window_tokens: L >= L0.
        method: a name of METHODS.

    Raises:
        UserError: a table has the wrong length, a number is not positive and finite, or L is below L0.
    """

    rescale: tuple[float, ...]
    attention_factor: float
    spectrum: Spectrum
    target_window_tokens: int
    method: str

    def __post_init__(self) -> None:
        extension_ratio(self.spectrum, self.target_window_tokens)
        object.__setattr__(self, "rescale", checked_table("rescale", self.rescale, self.spectrum.n_dims))
        object.__setattr__(self, "attention_factor", checked_factor("attention_factor", self.attention_factor))

    @property
    def short_rescale(self) -> tuple[float, ...] | None:
        """Factors of the window up to L0, D numbers: the model's own. None: all are 1."""
        return self.spectrum.own_rescale

    @property
    def short_attention_factor(self) -> float:
        """Of the window up to L0: the model's own."""
        return self.spectrum.attention_factor

    @property
    def scale(self) -> float:
        """s = L / L0."""
        return extension_ratio(self.spectrum, self.target_window_tokens)

    @property
    def inv_freq(self) -> np.ndarray:
        """theta_i / lambda_i of the long window, radians per token, float64 [D] (paper, Eq. 8)."""
        return self.spectrum.inv_freq / np.asarray(self.rescale)

    @property
    def short_inv_freq(self) -> np.ndarray:
        """Frequencies of the window up to L0, radians per token, float64 [D]."""
        return self.spectrum.own_inv_freq

    def to_json(self) -> dict[str, Any]:
        """A plain dict; json.dumps and json.loads keep every float exactly."""
        data: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        # The keys and their order are those of earlier releases: files and fingerprints stay as they were.
        del data["spectrum"]["own_rescale"]
        if self.spectrum.attention_factor == 1.0:
            del data["spectrum"]["attention_factor"]
        own = self.short_rescale
        return data | {_SHORT[0]: None if own is None else list(own), _SHORT[1]: self.short_attention_factor}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Factors:
        """The inverse of `to_json`. The provenance that a search writes (key `search`) is ignored.

        Raises:
            UserError: a key is missing, unknown, or has another shape.
        """
        unknown = [key for key in data if key not in cls.__dataclass_fields__ and key not in (NOTES, *_SHORT)]
        if unknown:
            raise UserError(
                f"the factors given by rope.factors hold {unknown[0]}={data[unknown[0]]!r}, which is no key of "
                "factors; "
                "set rope.factors to a factors.json that a search of this version wrote"
            )
        try:
            given = {key: value for key, value in data.items() if key not in (NOTES, *_SHORT)}
            own = {"own_rescale": data.get(_SHORT[0]), "attention_factor": data.get(_SHORT[1], 1.0)}
            return cls(**{**given, "spectrum": Spectrum(**{**own, **data["spectrum"]})})
        except UserError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the factors given by rope.factors do not have the form that a search writes ({error!r}); "
                "set rope.factors to a factors.json of a search, or set rope.factors=null and rope.method"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write JSON atomically: a reader sees the old file or the new file, never a part."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Factors:
        """Read a file that `save` wrote. Raises UserError when it is missing, is no JSON, or holds no factors."""
        return cls.from_json(read_factors_json(Path(path)))


def extension_ratio(spectrum: Spectrum, target_tokens: int) -> float:
    """s = L / L0. Raises UserError when L is below L0."""
    refuse_target(target_tokens, spectrum.window_tokens)
    return target_tokens / spectrum.window_tokens


def refuse_target(target_tokens: int, original_window_tokens: int) -> None:
    """Raises UserError when L is below L0."""
    if target_tokens < original_window_tokens:
        raise UserError(
            f"rope.target_window_tokens={target_tokens} is below the original window of {original_window_tokens} "
            "tokens; "
            f"set rope.target_window_tokens to {original_window_tokens} or more, or correct "
            "model.original_window_tokens"
        )


def longrope_attention_factor(scale: float, window_tokens: int) -> float:
    """sqrt(1 + ln s / ln L0), 1 for s <= 1 (LongRoPE, arXiv 2402.13753).

    Runtimes use this attention factor for both windows where a `longrope` config names none.
    """
    return math.sqrt(1.0 + math.log(scale) / math.log(window_tokens)) if scale > 1.0 else 1.0


def read_factors_json(path: Path) -> dict[str, Any]:
    """The object in the JSON file that rope.factors leads to. Raises UserError when there is none."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"rope.factors: {path} does not exist; run the search that writes it, or set rope.factors=null and "
            "rope.method"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"rope.factors: {path} cannot be read as JSON ({error}); set rope.factors to a factors.json or a model "
            "folder"
        ) from error
    if not isinstance(data, dict):
        raise UserError(
            f"rope.factors: {path} holds a {type(data).__name__} and no object; set rope.factors to a factors.json or "
            "a model folder"
        )
    return data
