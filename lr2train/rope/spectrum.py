"""The frequencies of a rotary embedding and the cosine indices at which its periods stop fitting into the original window.

Choice: one small value object of three numbers, everything else computed from them in float64 on demand. Cost: a property is recomputed
at every read (microseconds); in return it can be compared, hashed and stored, and never disagrees with itself.

Symbols: d rotary dimensions of a head, D = d/2 cosine dimensions, i = 0 ... D-1 the cosine index (zero-based everywhere), b base, L0
original window. The paper mixes one-based and zero-based indices and prints twice the cosine index for its critical dimensions; ours are
cosine indices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from lr2train.config import UserError

LOWEST_CANDIDATE_PERIODS = 10  # periods inside L0 at which the search for the real critical index starts (paper, section 3.2)


@dataclass(frozen=True)
class Spectrum:
    """Original RoPE of a model.

    Attributes:
        rotary_dim: d, rotated dimensions of one head (head size x partial rotary factor); even, at least 4.
        base: b (rope_theta), above 1.
        window_tokens: L0, the original window; above 2 pi, since a shorter one holds no whole period.
        attention_factor: multiplies cos and sin in the original window; 1 but for a model that is `longrope` already. Two spectra that differ
            in nothing else are equal.

    Raises:
        UserError: a value outside these limits.
    """

    rotary_dim: int
    base: float
    window_tokens: int
    attention_factor: float = field(default=1.0, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", float(self.base))  # JSON and YAML write 10000 for 10000.0
        if self.rotary_dim < 4 or self.rotary_dim % 2:
            raise UserError(
                f"rotary dimension {self.rotary_dim} is not an even number of at least 4; "
                "choose a model.path whose heads rotate such a number"
            )
        if not 1.0 < self.base < math.inf:
            raise UserError(f"RoPE base {self.base} is not a finite number above 1; mend rope_theta in the config of model.path")
        if self.window_tokens < 7:
            raise UserError(
                f"original window of {self.window_tokens} tokens is below 7, less than one period; set model.original_window_tokens"
            )

    @property
    def n_dims(self) -> int:
        """D = d/2."""
        return self.rotary_dim // 2

    @property
    def inv_freq(self) -> np.ndarray:
        """theta_i = b^(-2i/d), radians per token, float64 [D] (paper, Eq. 1)."""
        return self.base ** (-2.0 * np.arange(self.n_dims) / self.rotary_dim)

    @property
    def period_tokens(self) -> np.ndarray:
        """T_i = 2 pi / theta_i, tokens, float64 [D]."""
        return 2.0 * math.pi / self.inv_freq

    def index_of(self, periods: float) -> float:
        """Real-valued cosine index whose period fits `periods` times into L0: d ln(L0 / (2 pi periods)) / (2 ln b); YaRN's dim(r)."""
        return self.rotary_dim * math.log(self.window_tokens / (periods * 2.0 * math.pi)) / (2.0 * math.log(self.base))

    @property
    def critical_index_real(self) -> float:
        """D log_b(L0 / 2 pi), before rounding and bounds: the index whose period is exactly L0."""
        return self.index_of(1.0)

    @property
    def critical_index(self) -> int:
        """tcd = ceil(D log_b(L0 / 2 pi)), the first index whose period exceeds L0 (paper, section 2.2).

        Kept inside 1 ... D-1: a model whose every period fits into L0 has no such index, and its slowest one is then called critical.
        """
        return self._bounded(math.ceil(self.critical_index_real))

    @property
    def lowest_critical_index(self) -> int:
        """d10 = ceil(D log_b(L0 / (2 pi 10))), kept inside 1 ... D-1: where the search for the real one starts (section 3.2)."""
        return self._bounded(math.ceil(self.index_of(LOWEST_CANDIDATE_PERIODS)))

    def _bounded(self, index: int) -> int:
        return min(max(index, 1), self.n_dims - 1)
