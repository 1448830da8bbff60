"""The frequencies of a rotary embedding, and the critical indices at which its periods no longer fit into the original
window.

Symbols: d rotary dimensions of a head; D = d/2 cosine dimensions; i = 0 ... D-1 the cosine index, zero-based; b the
base; L0 the original window in tokens; theta_i = b^(-2i/d) (paper, Eq. 5). The paper mixes one-based and zero-based
indices, and prints critical dimensions as twice the cosine index. Here every index is a zero-based cosine index.

A model may be extended already: its own table then rescales theta_i by own factors (llama3, YaRN, linear, a short table
of ``longrope``). Periods inside L0 are periods of this own table, because the model was trained with it.

Choice: one frozen value object of a few numbers; all else is computed from these in float64 on demand. So a spectrum
can be compared, hashed and stored. Cost: a property is computed again at each read (microseconds).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lr2train.config import StartFrom, UserError

# the search for the real critical index starts where ten periods fit into L0 (paper, Section 3.2)
LOWEST_CANDIDATE_PERIODS = 10
LEAST_WINDOW = 7  # tokens; the shortest period is 2 pi


@dataclass(frozen=True)
class Spectrum:
    """The original RoPE of a model.

    Attributes:
        rotary_dim: d, rotated dimensions of one head (head size x partial rotary factor); even, at least 4.
        base: b (rope_theta), above 1.
        window_tokens: L0, the original window; at least 7: the shortest period is 2 pi tokens.
        attention_factor: multiplies cos and sin in the original window; 1, unless the model is of type `longrope` or
            `yarn` already. Comparison ignores the attention factor.
        own_rescale: the model's own factors up to L0, D positive finite numbers: its own frequencies are theta_i /
            own_rescale_i. None: all are 1. Any sequence is taken and kept as a tuple.

    Raises:
        UserError: a value is outside these limits.
    """

    rotary_dim: int
    base: float
    window_tokens: int
    attention_factor: float = field(default=1.0, compare=False)
    own_rescale: tuple[float, ...] | None = None

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
        if self.window_tokens < LEAST_WINDOW:
            raise UserError(
                f"original window of {self.window_tokens} tokens is below {LEAST_WINDOW}, less than one period; set "
                "model.original_window_tokens"
            )
        checked_factor("the own attention factor", self.attention_factor)
        if self.own_rescale is not None:
            own = checked_table("the model's own table", self.own_rescale, self.n_dims)
            # One form for plain RoPE, so that equal spectra compare equal.
            object.__setattr__(self, "own_rescale", None if set(own) == {1.0} else own)

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

    @property
    def own_factors(self) -> np.ndarray:
        """The model's own factors up to L0, float64 [D]; 1 for plain RoPE."""
        return np.ones(self.n_dims) if self.own_rescale is None else np.asarray(self.own_rescale)

    @property
    def own_inv_freq(self) -> np.ndarray:
        """Frequencies of the model's own table up to L0, radians per token, float64 [D]."""
        return self.inv_freq / self.own_factors

    @property
    def own_period_tokens(self) -> np.ndarray:
        """Periods of the model's own table, tokens, float64 [D]."""
        return self.period_tokens * self.own_factors

    @property
    def unscaled(self) -> Spectrum:
        """Plain RoPE over the window whose angles the model's own table covers in its slowest dimension.

        The own table turns theta_i / own_i x L0 radians in L0 tokens. Plain RoPE turns as far in L0 / own_i tokens. So
        factors of at least L / (L0 / own_i) keep the slow angles of L tokens inside the trained ones, whether they act
        on the plain or on the own frequencies.
        """
        window = max(round(self.window_tokens / float(self.own_factors[-1])), LEAST_WINDOW)
        return Spectrum(self.rotary_dim, self.base, min(window, self.window_tokens))

    def start(self, start_from: str) -> Spectrum:
        """The spectrum on which methods and searches act (``rope.start_from``); itself for a model with plain RoPE."""
        return self if start_from == StartFrom.own or self.own_rescale is None else self.unscaled

    def index_of(self, periods: float) -> float:
        """Real-valued cosine index whose period fits `periods` times into L0: d ln(L0 / (2 pi periods)) / (2 ln b).

        YaRN calls it dim(r) (Peng et al. 2023). For a table of the model's own the logarithms of its periods are
        interpolated; beyond both ends they go on as in plain RoPE.
        """
        if self.own_rescale is None:
            window = self.window_tokens / (periods * 2.0 * math.pi)
            return self.rotary_dim * math.log(window) / (2.0 * math.log(self.base))
        wanted, slope = math.log(self.window_tokens / periods), 2.0 * math.log(self.base) / self.rotary_dim
        own = np.maximum.accumulate(np.log(self.own_period_tokens))  # published short tables need not be in order
        outside = min(wanted - own[0], 0.0) + max(wanted - own[-1], 0.0)
        return float(np.interp(wanted, own, np.arange(self.n_dims)) + outside / slope)

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


def checked_table(name: str, numbers: Sequence[float], n_dims: int) -> tuple[float, ...]:
    """The numbers as a tuple of floats.

    Raises:
        UserError: there are not ``n_dims`` numbers, or one is not positive and finite.
    """
    table = tuple(float(x) for x in numbers)
    if len(table) != n_dims:
        raise UserError(
            f"{name} has {len(table)} numbers, but a rotary dimension of {2 * n_dims} needs {n_dims}; "
            "set rope.factors to factors of this model"
        )
    bad = [i for i, x in enumerate(table) if not 0.0 < x < math.inf]
    if bad:
        raise UserError(
            f"{name}[{bad[0]}]={table[bad[0]]} is not a positive finite number; correct rope.factors, rope.tail or "
            "rope.options.rescale"
        )
    return table


def checked_factor(name: str, value: float) -> float:
    """An attention factor. Raises UserError unless the value is positive and finite."""
    if not 0.0 < value < math.inf:
        raise UserError(
            f"{name}={value} is not a positive finite number; set rope.attention_factor to a number such as 1.2, or "
            "correct rope.factors"
        )
    return float(value)
