"""What the search searches: a critical index, the tail of rescale factors from it on, and the long window's attention factor.

Choice: a candidate holds only what is free; everything left of the critical index follows from it by the NTK rule (METHOD:
``lambda_rcd^(i/rcd)``). Values lie on a grid, so that equal candidates are equal. Paper, Algorithms 1 and 2; what they leave open is a
knob of ``SearchConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lr2train.config import SearchConfig, UserError
from lr2train.rope.factors import Factors
from lr2train.rope.methods import METHODS
from lr2train.rope.spectrum import Spectrum

ATTENTION_GRID = 0.005


@dataclass(frozen=True)
class Candidate:
    """A point of the search space."""

    critical_index: int  # rcd, zero-based cosine index
    tail: tuple[float, ...]  # lambda_i for i >= rcd, non-decreasing
    attention_factor: float

    @property
    def key(self) -> str:
        """Equal for equal candidates; what the journal files evaluations under."""
        return f"{self.critical_index}|{self.attention_factor!r}|{','.join(map(repr, self.tail))}"


@dataclass(frozen=True)
class Space:
    """The bounds within which candidates are drawn and mutated.

    Args:
        spectrum: of the original model.
        target_tokens: L.
        knobs: probabilities, bounds (in multiples of s = L / L0) and grid.
        attention_factor: the fixed value where the knobs do not search it.
    """

    spectrum: Spectrum
    target_tokens: int
    knobs: SearchConfig
    attention_factor: float

    def __post_init__(self) -> None:
        fixed = self.knobs.critical_index
        if fixed is not None and not 1 <= fixed < self.spectrum.n_dims:
            raise UserError(
                f"search.critical_index={fixed} is outside 1 … {self.spectrum.n_dims - 1}; set it inside, or leave it empty to search it"
            )
        self._refuse_bounds("tail")
        self._refuse_bounds("attention_factor")
        if not self.knobs.mutation_step > 0:
            raise UserError(
                f"search.mutation_step={self.knobs.mutation_step} is not positive; set it to a step of the factors such as 0.01"
            )
        if not 1 <= self.knobs.top_k < self.knobs.population:
            raise UserError(
                f"search.top_k={self.knobs.top_k} is outside 1 … {self.knobs.population - 1}, which leaves no parent or no room for "
                f"children; set search.top_k to {max(1, self.knobs.population // 4)}, or raise search.population"
            )

    def _refuse_bounds(self, name: str) -> None:
        low, high = getattr(self.knobs, f"{name}_low"), getattr(self.knobs, f"{name}_high")
        if not 0 < low <= high:
            raise UserError(
                f"search.{name}_low={low} is not between 0 and search.{name}_high={high}; set 0 < search.{name}_low <= search.{name}_high"
            )

    @property
    def scale(self) -> float:
        """s = L / L0."""
        return self.target_tokens / self.spectrum.window_tokens

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest tail factor."""
        return self.knobs.tail_low * self.scale, self.knobs.tail_high * self.scale

    @property
    def critical_indices(self) -> range:
        """d10 … tcd (paper, Algorithm 1, line 3), or the fixed one."""
        fixed = self.knobs.critical_index
        if fixed is not None:
            return range(fixed, fixed + 1)
        return range(self.spectrum.lowest_critical_index, self.spectrum.critical_index + 1)

    def factors(self, candidate: Candidate) -> Factors:
        """The candidate as factors that a model can use."""
        return METHODS["longrope2"](
            self.spectrum,
            self.target_tokens,
            critical_index=candidate.critical_index,
            tail=candidate.tail,
            attention_factor=candidate.attention_factor,
        )

    def initial(self, rng: np.random.Generator) -> list[Candidate]:
        """Algorithm 1: one member a critical index with a constant tail drawn from the bounds; then mutations of them until there are P."""
        indices = np.array(self.critical_indices)
        if len(indices) > self.knobs.population:
            indices = indices[np.linspace(0, len(indices) - 1, self.knobs.population).round().astype(int)]
        members = [self._constant(int(index), rng) for index in indices]
        return self.fill(members, members, self.knobs.population, rng)

    def _constant(self, critical_index: int, rng: np.random.Generator) -> Candidate:
        value = self._on_grid(rng.uniform(*self.bounds))
        return Candidate(critical_index, (value,) * (self.spectrum.n_dims - critical_index), self._draw_attention_factor(rng))

    def _draw_attention_factor(self, rng: np.random.Generator) -> float:
        if not self.knobs.search_attention_factor:
            return self.attention_factor
        return self._attention_on_grid(rng.uniform(self.knobs.attention_factor_low, self.knobs.attention_factor_high))

    def fill(
        self, members: list[Candidate], parents: list[Candidate], size: int, rng: np.random.Generator, seen: frozenset[str] = frozenset()
    ) -> list[Candidate]:
        """Append children of ``parents`` in turn until there are ``size`` distinct members; a child in ``seen`` is not taken.

        In a space too small for them it gives up after 20 attempts a member.
        """
        out, keys = list(members), {member.key for member in members} | seen
        for attempt in range(20 * size):
            if len(out) >= size:
                break
            child = self.mutate(parents[attempt % len(parents)], rng, parents)
            if child.key not in keys:
                keys.add(child.key)
                out.append(child)
        return out

    def mutate(self, parent: Candidate, rng: np.random.Generator, mates: list[Candidate]) -> Candidate:
        """Algorithm 2, lines 4-8: each tail entry moves with probability p, under the bounds and the non-decreasing order."""
        child = parent
        if rng.random() < self.knobs.crossover:
            mate = mates[rng.integers(len(mates))]
            child = replace(self._with_critical_index(child, mate.critical_index), attention_factor=mate.attention_factor)
        if rng.random() < self.knobs.move_critical_index:
            indices = self.critical_indices
            moved = child.critical_index + int(rng.choice([-2, -1, 1, 2]))
            child = self._with_critical_index(child, min(max(moved, indices[0]), indices[-1]))
        return replace(
            child, tail=self._mutate_tail(child.tail, rng), attention_factor=self._mutate_attention_factor(child.attention_factor, rng)
        )

    def _with_critical_index(self, candidate: Candidate, critical_index: int) -> Candidate:
        """Move the border; a longer tail repeats its first entry, a shorter one loses it."""
        moved = candidate.critical_index - critical_index
        tail = (candidate.tail[0],) * moved + candidate.tail if moved > 0 else candidate.tail[-moved:]
        return replace(candidate, critical_index=critical_index, tail=tail)

    def _mutate_tail(self, tail: tuple[float, ...], rng: np.random.Generator) -> tuple[float, ...]:
        """A moved entry keeps its place and pushes its neighbours: entries before it are lowered to it, entries after it raised to it."""
        low, high = self.bounds
        values = np.array(tail)
        for i in np.flatnonzero(rng.random(len(values)) < self.knobs.mutation_probability):
            values[i] = self._on_grid(rng.normal(values[i], self.knobs.mutation_spread * (high - low)))
            values[:i] = np.minimum(values[:i], values[i])
            values[i:] = np.maximum(values[i:], values[i])
        return tuple(map(float, values))

    def _mutate_attention_factor(self, value: float, rng: np.random.Generator) -> float:
        if not self.knobs.search_attention_factor or rng.random() >= self.knobs.mutation_probability:
            return value
        low, high = self.knobs.attention_factor_low, self.knobs.attention_factor_high
        return self._attention_on_grid(rng.normal(value, self.knobs.mutation_spread * (high - low)))

    def _on_grid(self, value: float) -> float:
        return _nearest(value, self.knobs.mutation_step, *self.bounds)

    def _attention_on_grid(self, value: float) -> float:
        return _nearest(value, ATTENTION_GRID, self.knobs.attention_factor_low, self.knobs.attention_factor_high)


def _nearest(value: float, step: float, low: float, high: float) -> float:
    """The multiple of ``step`` nearest to the value, or the bound that it would cross."""
    return float(min(max(round(round(value / step) * step, 10), low), high))
