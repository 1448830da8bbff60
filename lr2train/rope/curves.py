"""Curves over the cosine index: ramps, and factors from a ramp. Methods and the tables of published models share them.

Symbols are those of ``spectrum``; a ramp is float64 [D], 0: the frequency is kept, 1: divided by the scale.
"""

from __future__ import annotations

import math

import numpy as np

from lr2train.config import UserError
from lr2train.rope.spectrum import Spectrum


def yarn_ramp(spectrum: Spectrum, beta_fast: float = 32.0, beta_slow: float = 1.0, whole: bool = True) -> np.ndarray:
    """YaRN's ramp clip((i - low) / (high - low), 0, 1). ``yarn_range`` gives low and high."""
    if not 0.0 < beta_slow < beta_fast:
        raise UserError(
            f"rope.options.beta_slow={beta_slow} is not below rope.options.beta_fast={beta_fast}; set it below (YaRN "
            "uses 1 and 32)"
        )
    return ramp_between(spectrum, *yarn_range(spectrum, beta_fast, beta_slow, whole))


def yarn_range(
    spectrum: Spectrum, beta_fast: float = 32.0, beta_slow: float = 1.0, whole: bool = True
) -> tuple[float, float]:
    """(low, high) = max(floor(dim(beta_fast)), 0), min(ceil(dim(beta_slow)), d - 1), with dim(r) =
    ``Spectrum.index_of(r)``.

    The bound is d - 1, not D - 1, as in YaRN's own code.

    Args:
        whole: whether both ends are rounded outwards to whole indices (``truncate`` in transformers).
    """
    low, high = spectrum.index_of(beta_fast), spectrum.index_of(beta_slow)
    if whole:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, spectrum.rotary_dim - 1)


def ramp_between(spectrum: Spectrum, low: float, high: float) -> np.ndarray:
    """0 up to the index ``low``, 1 from ``high`` on, linear between."""
    width = high - low or 0.001  # as in YaRN's own code: an empty ramp becomes a step above `low`
    return np.clip((np.arange(spectrum.n_dims) - low) / width, 0.0, 1.0)


def ramp_to(spectrum: Spectrum, high: int, beta_fast: float = 32.0) -> np.ndarray:
    """YaRN's ramp with its end at the index ``high``, so that s is reached there (YaRN-rcd; paper, Section 4.3)."""
    low = min(max(math.floor(spectrum.index_of(beta_fast)), 0), high - 1)
    return ramp_between(spectrum, low, high)


def llama3_ramp(spectrum: Spectrum, low_freq_factor: float, high_freq_factor: float) -> np.ndarray:
    """Meta's ramp: 0 with more than ``high_freq_factor`` periods inside L0, 1 with fewer than ``low_freq_factor``."""
    n_periods = spectrum.window_tokens / spectrum.own_period_tokens  # inside L0
    kept = np.clip((n_periods - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return 1.0 - kept


def frequency_linear(ramp: np.ndarray, scale: float) -> np.ndarray:
    """Factors 1 / ((1 - ramp) + ramp / s): frequencies are linear between theta and theta / s (YaRN, llama3)."""
    return 1.0 / ((1.0 - ramp) + ramp / scale)


def lambda_linear(ramp: np.ndarray, scale: float) -> np.ndarray:
    """Factors (1 - ramp) + s ramp: linear between 1 and s (LongRoPE v1's initial population)."""
    return (1.0 - ramp) + scale * ramp
