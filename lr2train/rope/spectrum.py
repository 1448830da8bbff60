"""The frequencies of a rotary embedding, and the critical indices at which its periods no longer fit into the original
window.

Symbols: d rotary dimensions of a head; D = d/2 cosine dimensions; i = 0 ... D-1 the cosine index, zero-based; b the
base; L0 the original window in tokens; theta_i = b^(-2i/d) (paper, Eq. 5). The paper mixes one-based and zero-based
indices, and prints critical dimensions as twice the cosine index. Here every index is a zero-based cosine index.

Choice: one frozen value object of three numbers; all else is computed from these in float64 on demand. So a spectrum
can be compared, hashed and stored. Cost: a property is computed again at each read (microseconds).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from lr2train.config import UserError

# the search for the real critical index starts where ten periods fit into L0 (paper, Section 3.2)
LOWEST_CANDIDATE_PERIODS = 10


@dataclass(frozen=True)
class Spectrum:
    """The original RoPE of a model.

    Attributes:
        rotary_dim: d, rotated dimensions of one head (head size x partial rotary factor); even, at least 4.
        base: b (rope_theta), above 1.
        window_tokens: L0, the original window; at least 7: the shortest period is 2 pi tokens.
        attention_factor: multiplies cos and sin in the original window; 1, unless the model is of type `longrope`
            already. Comparison ignores the attention factor.

    Raises:
        UserError: a value is outside these limits.
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
                "set model.path to a model whose heads rotate such a number"
            )
        if not 1.0 < self.base < math.inf:
            raise UserError(
                f"RoPE base {self.base} is not a finite number above 1; correct rope_theta in the config of model.path"
            )
        if self.window_tokens < 7:
            raise UserError(
                f"original window of {self.window_tokens} tokens is below 7, less than one period; set "
                "model.original_window_tokens"
            )

    @property
    def n_dims(self) -> int:
        """D = d/2."""
        return self.rotary_dim // 2

    @property
    def inv_freq(self) -> np.ndarray:
        """theta_i = b^(-2i/d), radians per token, float64 [D] (paper, Eq. 5)."""
        return self.base ** (-2.0 * np.arange(self.n_dims) / self.rotary_dim)

    @property
    def period_tokens(self) -> np.ndarray:
        """T_i = 2 pi / theta_i, tokens, float64 [D] (paper, Eq. 6)."""
        return 2.0 * math.pi / self.inv_freq

    def index_of(self, periods: float) -> float:
        """Real-valued cosine index whose period fits `periods` times into L0: d ln(L0 / (2 pi periods)) / (2 ln b).

        YaRN calls it dim(r) (Peng et al. 2023).
        """
        return self.rotary_dim * math.log(self.window_tokens / (periods * 2.0 * math.pi)) / (2.0 * math.log(self.base))

    @property
    def critical_index_real(self) -> float:
        """D log_b(L0 / 2 pi), not rounded: the period of this index is exactly L0."""
        return self.index_of(1.0)

    @property
    def critical_index(self) -> int:
        """tcd = ceil(D log_b(L0 / 2 pi)), the first index whose period exceeds L0 (paper, Section 2.2, Eq. 7).

        Clipped to 1 ... D-1. Where every period fits into L0, the slowest index counts as critical.
        """
        return self._bounded(math.ceil(self.critical_index_real))

    @property
    def lowest_critical_index(self) -> int:
        """d10 = ceil(D log_b(L0 / (2 pi 10))), clipped to 1 ... D-1: the lowest candidate of the search (paper, Section
        3.2).
        """
        return self._bounded(math.ceil(self.index_of(LOWEST_CANDIDATE_PERIODS)))

    def _bounded(self, index: int) -> int:
        return min(max(index, 1), self.n_dims - 1)
