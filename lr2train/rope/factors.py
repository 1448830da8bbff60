"""The rescale factors of a long window: what a method computes, a search finds, a training run uses and an export writes.

Choice: one frozen value object with its own JSON form, which carries the spectrum it was made for, so that factors cannot silently meet
another model. It holds what is physically needed and refuses only what no rotary table can be built from. Order and bounds of the factors
(non-decreasing, in [s, 2s]) are promises of the search and of single methods, not of this class: published sets break them and have to be
read as they are.

The short window of our own training is always the model's own: all ones and attention factor 1 for plain RoPE. `short_rescale` and
`short_attention_factor` exist for published sets that do otherwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lr2train.config import UserError
from lr2train.io import write_json
from lr2train.rope.spectrum import Spectrum

NOTES = "search"  # key of factors.json under which a search says where the factors come from


@dataclass(frozen=True)
class Factors:
    """Frequencies theta_i / lambda_i of the long window, and its temperature.

    Attributes:
        rescale: lambda_i, D numbers (any sequence is taken, a tuple of floats is kept); positive and finite.
        attention_factor: multiplies cos and sin of the long window, so it scales attention logits by its square; positive and finite.
        spectrum: of the original model, with the original window L0.
        target_window_tokens: L >= L0.
        method: name of the rule that made them (a name of METHODS, or what a search calls itself).
        short_rescale: of the window up to L0; None stands for all ones.
        short_attention_factor: of the window up to L0.

    Raises:
        UserError: wrong length, a number that is not positive and finite, L below L0.
    """

    rescale: tuple[float, ...]
    attention_factor: float
    spectrum: Spectrum
    target_window_tokens: int
    method: str
    short_rescale: tuple[float, ...] | None = None
    short_attention_factor: float = 1.0

    def __post_init__(self) -> None:
        extension_ratio(self.spectrum, self.target_window_tokens)
        object.__setattr__(self, "rescale", _checked_table("rescale", self.rescale, self.spectrum))
        object.__setattr__(self, "attention_factor", _checked_factor("attention_factor", self.attention_factor))
        object.__setattr__(self, "short_attention_factor", _checked_factor("short_attention_factor", self.short_attention_factor))
        if self.short_rescale is not None:
            short = _checked_table("short_rescale", self.short_rescale, self.spectrum)
            # one spelling of the original RoPE, so that == works
            object.__setattr__(self, "short_rescale", None if set(short) == {1.0} else short)

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
        """The frequencies up to L0: the original ones, unless a published set says otherwise; float64 [D]."""
        return self.spectrum.inv_freq if self.short_rescale is None else self.spectrum.inv_freq / np.asarray(self.short_rescale)

    def to_json(self) -> dict[str, Any]:
        """A plain dict; floats survive json.dumps and json.loads exactly. What was added later stands in it where it is not its default."""
        data: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        if self.spectrum.attention_factor == 1.0:
            del data["spectrum"]["attention_factor"]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Factors:
        """The inverse of `to_json`. The notes that a search keeps beside the factors (key `search`) are passed over.

        Raises:
            UserError: a key is missing, unknown, or has another shape.
        """
        unknown = [key for key in data if key not in cls.__dataclass_fields__ and key != NOTES]
        if unknown:
            raise UserError(
                f"the factors given by rope.factors hold {unknown[0]}={data[unknown[0]]!r}, which is no key of factors; "
                "set rope.factors to a factors.json that a search of this version wrote"
            )
        try:
            given = {key: value for key, value in data.items() if key != NOTES}
            return cls(**{**given, "spectrum": Spectrum(**data["spectrum"])})
        except UserError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the factors given by rope.factors are not in the form that a search writes ({error!r}); "
                "write them again or set rope.method"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write JSON atomically: whoever reads sees the old file or the new one, never half of one."""
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Factors:
        """Read what `save` wrote. Raises UserError when the file is missing, no JSON, or not factors."""
        return cls.from_json(read_factors_json(Path(path)))


def extension_ratio(spectrum: Spectrum, target_tokens: int) -> float:
    """s = L / L0. Raises UserError when L is below L0."""
    refuse_target(target_tokens, spectrum.window_tokens)
    return target_tokens / spectrum.window_tokens


def refuse_target(target_tokens: int, original_window_tokens: int) -> None:
    """Raises UserError when L is below L0: there is nothing to extend."""
    if target_tokens < original_window_tokens:
        raise UserError(
            f"rope.target_window_tokens={target_tokens} is below the original window of {original_window_tokens} tokens; "
            "set rope.target_window_tokens to at least that, or correct model.original_window_tokens"
        )


def longrope_attention_factor(scale: float, window_tokens: int) -> float:
    """sqrt(1 + ln s / ln L0), 1 for s <= 1: LongRoPE's, and what runtimes use for both windows when a `longrope` config names none."""
    return math.sqrt(1.0 + math.log(scale) / math.log(window_tokens)) if scale > 1.0 else 1.0


def read_factors_json(path: Path) -> dict[str, Any]:
    """The dict in a JSON file that rope.factors leads to. Raises UserError when there is none."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"rope.factors: {path} does not exist; run the search that writes it, or set rope.factors=null and rope.method"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"rope.factors: {path} cannot be read as JSON ({error}); set rope.factors to a factors.json or a model folder"
        ) from error
    if not isinstance(data, dict):
        raise UserError(
            f"rope.factors: {path} holds a {type(data).__name__} "
            "in the place of a dict; set rope.factors to a factors.json or a model folder"
        )
    return data


def _checked_table(name: str, numbers: Sequence[float], spectrum: Spectrum) -> tuple[float, ...]:
    table = tuple(float(x) for x in numbers)
    if len(table) != spectrum.n_dims:
        raise UserError(
            f"{name} has {len(table)} numbers, but a rotary dimension of {spectrum.rotary_dim} needs {spectrum.n_dims}; "
            "give rope.factors of this model"
        )
    bad = [i for i, x in enumerate(table) if not 0.0 < x < math.inf]
    if bad:
        raise UserError(
            f"{name}[{bad[0]}]={table[bad[0]]} is not a positive finite number; mend rope.factors, rope.tail or rope.options.rescale"
        )
    return table


def _checked_factor(name: str, value: float) -> float:
    if not 0.0 < value < math.inf:
        raise UserError(
            f"{name}={value} is not a positive finite number; set rope.attention_factor to one such as 1.2, or mend rope.factors"
        )
    return float(value)
