"""The search space: rescale factors within bounds, and the attention factor of the long window.

Source: paper, Section 3.2, Algorithms 1 and 2.

``longrope2``: a critical index rcd and the tail, the factors lambda_i of i >= rcd. The factors below follow by the NTK
rule, lambda_i = lambda_rcd^(i / rcd), or by YaRN's blend of frequencies (``search.head``). ``longrope``: every factor
is free, as in LongRoPE v1 (arXiv 2402.13753); under the needle fitness this is the paper's ablation "all dimensions".

A model that is extended already has a table of its own. By default the factors of a candidate act on top of this
table: bounds are multiples of s = L / L0, and the critical index counts periods of the own table. With
``rope.start_from=plain`` the factors act on the unscaled frequencies, and L0 is the smaller window whose angles the own
table covers (``Spectrum.unscaled``). So the tail has the same bounds in both, and factors below the critical index
differ.

Choice: a candidate holds only free values, on a grid. So equal candidates compare equal and are never evaluated twice.
The paper leaves step size, crossover and mutation of rcd open; these are keys of ``SearchConfig``. Cost: values between
two grid points cannot be found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lr2train.config import Head, Operators, SearchConfig, StartFrom, UserError
from lr2train.rope.curves import frequency_linear, ramp_to
from lr2train.rope.factors import Factors, longrope_attention_factor
from lr2train.rope.methods import METHODS
from lr2train.rope.spectrum import Spectrum

ATTENTION_GRID = 0.005  # step of the attention factor
_CURVES = 8  # NTK curves from which the authors' search starts
_LAST_RISE = 4.0  # by how much the authors' last factor may exceed its neighbour
ALL = 0  # stands for the critical index where every factor is free: the tail is the whole table


@dataclass(frozen=True)
class Candidate:
    """A point of the search space.

    Attributes:
        critical_index: rcd, zero-based cosine index; ``ALL`` where every factor is free.
        tail: lambda_i for i >= rcd, D - rcd numbers, non-decreasing.
        attention_factor: of the long window.
    """

    critical_index: int
    tail: tuple[float, ...]
    attention_factor: float

    @cached_property
    def key(self) -> str:
        """Identifies the candidate in the journal: equal candidates have equal keys."""
        return f"{self.critical_index}|{self.attention_factor!r}|{','.join(map(repr, self.tail))}"


@dataclass(frozen=True)
class Space:
    """The bounds within which candidates are drawn and mutated.

    Args:
        spectrum: of the original model.
        target_tokens: L.
        settings: probabilities, bounds (in multiples of s = L / L0) and grid.
        start_from: ``rope.start_from``.

    Raises:
        UserError: the settings contradict each other or leave nothing to search.
    """

    spectrum: Spectrum
    target_tokens: int
    settings: SearchConfig
    start_from: str = StartFrom.own

    def __post_init__(self) -> None:
        fixed = self.settings.critical_index
        if fixed is not None and self.all_dims:
            raise UserError(
                f"search.critical_index={fixed} has no meaning where search.space=longrope sets every factor free; "
                "unset search.critical_index"
            )
        if fixed is not None and not 1 <= fixed < self.spectrum.n_dims:
            raise UserError(
                f"search.critical_index={fixed} is outside 1 … {self.spectrum.n_dims - 1}; "
                "set search.critical_index inside, or to null to search it"
            )
        if self.authors and (self.all_dims or fixed is None):
            raise UserError(
                "search.operators=authors needs one critical index of search.space=longrope2; set "
                f"search.critical_index to {self.start.critical_index} (tcd) or another index"
            )
        self._refuse_bounds("tail")
        self._refuse_bounds("attention_factor")
        if self.authors and self._highest(0) < self.bounds[0]:
            raise UserError(
                f"{self.spectrum.n_dims - self.critical_indices[0]} strictly increasing factors in steps of "
                f"search.mutation_step={self.settings.mutation_step} do not fit between {self.bounds[0]:g} and "
                f"{self.bounds[1]:g}; raise search.tail_high"
            )
        for name, example in (("mutation_step", 0.01), ("mutation_spread", 0.25)):
            if not 1e-6 <= getattr(self.settings, name) < math.inf:
                raise UserError(
                    f"search.{name}={getattr(self.settings, name)} is not a finite number of 1e-6 or more; "
                    f"set search.{name} to a number such as {example}"
                )
        if self.settings.algorithm != "gradient" and not 1 <= self.settings.top_k < self.settings.population:
            raise UserError(
                f"search.top_k={self.settings.top_k} is outside 1 … {self.settings.population - 1}, "
                "which leaves no parent or no room for "
                f"children; set search.top_k to {max(1, self.settings.population // 4)}, or raise search.population"
            )

    def _refuse_bounds(self, name: str) -> None:
        low, high = getattr(self.settings, f"{name}_low"), getattr(self.settings, f"{name}_high")
        if not 0 < low <= high < math.inf:
            raise UserError(
                f"search.{name}_low={low} and search.{name}_high={high} are no range; "
                f"set search.{name}_high above search.{name}_low, and both above 0"
            )

    @cached_property
    def start(self) -> Spectrum:
        """The spectrum on which the factors of a candidate act."""
        return self.spectrum.start(self.start_from)

    @property
    def scale(self) -> float:
        """s = L / L0, with L0 of the start."""
        return self.target_tokens / self.start.window_tokens

    @property
    def all_dims(self) -> bool:
        """Whether every factor is free, not only the tail."""
        return self.settings.space == "longrope"

    @property
    def authors(self) -> bool:
        """Whether candidates are drawn and varied as in the authors' public search."""
        return self.settings.operators == Operators.authors

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest free factor.

        Where every factor is free the lowest is 1: fast dimensions may keep their frequencies.
        """
        return 1.0 if self.all_dims else self.settings.tail_low * self.scale, self.settings.tail_high * self.scale

    @property
    def critical_indices(self) -> range:
        """d10 … tcd (paper, Algorithm 1, line 3), or the fixed one."""
        fixed = ALL if self.all_dims else self.settings.critical_index
        if fixed is not None:
            return range(fixed, fixed + 1)
        return range(self.start.lowest_critical_index, self.start.critical_index + 1)

    @property
    def spread_indices(self) -> list[int]:
        """The critical indices, or ``search.population`` of them, spread evenly."""
        indices = np.array(self.critical_indices)
        n = min(self.settings.population, len(indices))
        return indices[np.linspace(0, len(indices) - 1, n).round().astype(int)].tolist()

    def factors(self, candidate: Candidate) -> Factors:
        """The candidate as rescale factors of all D dimensions, of the model's unscaled frequencies."""
        if candidate.critical_index == ALL:
            made = METHODS["longrope"](self.start, self.target_tokens, rescale=candidate.tail)
        else:
            made = METHODS["longrope2"](
                self.start,
                self.target_tokens,
                critical_index=candidate.critical_index,
                tail=candidate.tail,
                head=self.settings.head,
            )
        return replace(made, spectrum=self.spectrum, attention_factor=candidate.attention_factor)

    def head_slopes(self, candidate: Candidate) -> np.ndarray:
        """d log lambda_i / d log lambda_rcd of the factors below the critical index, float64 [rcd]."""
        index, first = candidate.critical_index, candidate.tail[0]
        if index == ALL or self.settings.head == Head.ntk:
            return np.arange(index) / max(index, 1)
        ramp = ramp_to(self.start, index)
        return (frequency_linear(ramp, first) * ramp / first)[:index]

    def initial(self, rng: np.random.Generator) -> list[Candidate]:
        """The initial population of P = ``search.population`` members (Algorithm 1).

        Each critical index gets one member, whose tail is constant and drawn from the bounds; mutations of these
        members fill the rest. Where every factor is free, LongRoPE v1's start takes the place of these members: PI,
        NTK-aware and the lambda-linear YaRN curve. The authors' search starts with 2 P members from eight NTK curves
        ``scale^(i / rcd)``, with scales from the lower bound to the upper one.
        """
        if self.authors:
            return self.fill(curves := self._curves(), curves, 2 * self.settings.population, rng)
        if self.all_dims:
            curves = (tuple(map(self.on_grid, curve)) for curve in self.curves()[: self.settings.population])
            members = [Candidate(ALL, curve, self._draw_attention_factor(rng)) for curve in curves]
        else:
            members = [self._constant(index, rng) for index in self.spread_indices]
        return self.fill(members, members, self.settings.population, rng)

    def _curves(self) -> list[Candidate]:
        index, curves = self.critical_indices[0], {}
        for scale in np.linspace(*self.bounds, _CURVES):
            tail = scale ** (np.arange(index, self.spectrum.n_dims) / index)
            one = Candidate(index, self._increasing(np.minimum(tail, self.bounds[1])), self.attention_factor_at(0.5))
            curves[one.key] = one
        return list(curves.values())

    def curves(self) -> list[np.ndarray]:
        """The factors from which LongRoPE v1's search starts, each float64 [D] on top of the start's own table."""
        made = (METHODS[name](self.start, self.target_tokens).rescale for name in ("pi", "ntk_aware", "longrope"))
        return [np.array(rescale) / self.start.own_factors for rescale in made]

    def _constant(self, critical_index: int, rng: np.random.Generator) -> Candidate:
        value = self.on_grid(rng.uniform(*self.bounds))
        return Candidate(
            critical_index, (value,) * (self.spectrum.n_dims - critical_index), self._draw_attention_factor(rng)
        )

    def _draw_attention_factor(self, rng: np.random.Generator) -> float:
        return self.attention_factor_at(rng.uniform())

    def fill(
        self,
        members: list[Candidate],
        parents: list[Candidate],
        size: int,
        rng: np.random.Generator,
        seen: frozenset[str] = frozenset(),
    ) -> list[Candidate]:
        """``size`` distinct candidates: ``members``, then children of ``parents`` in turn. Keys in ``seen`` are left
        out.

        In a small space fewer candidates come out: it gives up after 20 attempts a member.
        """
        out, keys = list(members), {member.key for member in members} | seen
        for attempt in range(20 * size):
            if len(out) >= size:
                break
            parent = parents[attempt % len(parents)]
            if self.authors and attempt % 2:  # as many crossovers as mutations
                child = self._cross(parent, parents[rng.integers(len(parents))], rng)
            else:
                child = self.mutate(parent, rng, parents)
            if child.key not in keys:
                keys.add(child.key)
                out.append(child)
        return out

    def mutate(self, parent: Candidate, rng: np.random.Generator, mates: list[Candidate]) -> Candidate:
        """A child of ``parent`` (Algorithm 2, lines 4-8).

        Each tail entry moves with probability p = ``search.mutation_probability``, inside the bounds and in
        non-decreasing order.
        """
        # The order of the draws is fixed: a seed stands for one search.
        child = parent
        if rng.random() < self.settings.crossover:
            child = self._cross(child, mates[rng.integers(len(mates))], rng)
        if rng.random() < self.settings.move_critical_index and not self.all_dims:
            indices = self.critical_indices
            moved = child.critical_index + int(rng.choice([-2, -1, 1, 2]))
            child = self._with_critical_index(child, min(max(moved, indices[0]), indices[-1]))
        return replace(
            child,
            tail=self._mutate_tail(child.tail, rng),
            attention_factor=self._mutate_attention_factor(child.attention_factor, rng),
        )

    def _cross(self, a: Candidate, b: Candidate, rng: np.random.Generator) -> Candidate:
        """Each value comes from either parent, tail entries one by one.

        The tail is sorted, not clipped into order: clipping would favour one of the parents.
        """
        first, second = (a, b) if rng.random() < 0.5 else (b, a)
        other = self._with_critical_index(second, first.critical_index)  # tails of equal length
        tail = np.where(rng.random(len(first.tail)) < 0.5, first.tail, other.tail)
        return replace(
            first,
            tail=self._increasing(np.sort(tail)) if self.authors else tuple(np.sort(tail).tolist()),
            attention_factor=(first if rng.random() < 0.5 else second).attention_factor,
        )

    def _with_critical_index(self, candidate: Candidate, critical_index: int) -> Candidate:
        """The candidate with another critical index.

        A longer tail repeats its first entry, a shorter tail loses its first entries.
        """
        moved = candidate.critical_index - critical_index  # > 0: the tail grows
        tail = (candidate.tail[0],) * moved + candidate.tail if moved > 0 else candidate.tail[-moved:]
        return replace(candidate, critical_index=critical_index, tail=tail)

    def _mutate_tail(self, tail: tuple[float, ...], rng: np.random.Generator) -> tuple[float, ...]:
        """Move entries of the tail and keep the order.

        Entries before a moved entry are lowered to it, and entries after it are raised to it.
        """
        low, high = self.bounds
        values = np.array(tail)
        for i in np.flatnonzero(rng.random(len(values)) < self.settings.mutation_probability):
            moved = rng.normal(values[i], self.settings.mutation_spread * (high - low))
            free = self.authors and 0 < i == len(values) - 1  # the authors' last entry may leave the bounds
            values[i] = min(max(moved, low), values[i - 1] + _LAST_RISE) if free else self.on_grid(moved)
            values[:i] = np.minimum(values[:i], values[i])
            values[i:] = np.maximum(values[i:], values[i])
        return self._increasing(values) if self.authors else tuple(map(float, values))

    def _increasing(self, values: np.ndarray) -> tuple[float, ...]:
        """A non-decreasing tail made strictly increasing on the grid, as the authors' is.

        All entries lie in the bounds but the last one, which may exceed its neighbour by ``_LAST_RISE``.
        """
        step, made = self.settings.mutation_step, []
        for i, value in enumerate(values.tolist()):
            least = made[-1] + step if made else self.bounds[0]
            most = self._highest(i) if i < len(values) - 1 or not made else made[-1] + _LAST_RISE
            made.append(_nearest(min(max(value, least), most), step, 0.0, math.inf))
        return tuple(made)

    def _highest(self, place: int) -> float:
        """The highest value of a tail's entry that leaves room for the entries after it, but for the last one."""
        after = self.spectrum.n_dims - self.critical_indices[0] - 2 - place
        return self.bounds[1] - max(0, after) * self.settings.mutation_step

    def _mutate_attention_factor(self, value: float, rng: np.random.Generator) -> float:
        if not self.settings.search_attention_factor or rng.random() >= self.settings.mutation_probability:
            return value
        low, high = self.settings.attention_factor_low, self.settings.attention_factor_high
        return self._attention_on_grid(rng.normal(value, self.settings.mutation_spread * (high - low)))

    def on_grid(self, value: float) -> float:
        """The nearest allowed factor."""
        return _nearest(value, self.settings.mutation_step, *self.bounds)

    def attention_factor_at(self, share: float) -> float:
        """The attention factor at a share 0 … 1 of its range.

        Where it is not searched: ``search.attention_factor``, or the model's own if that is larger.
        """
        if not self.settings.search_attention_factor:
            default = longrope_attention_factor(self.scale, self.start.window_tokens)
            wanted = self.settings.attention_factor
            return max(default if wanted is None else wanted, self.spectrum.attention_factor)
        low, high = self.settings.attention_factor_low, self.settings.attention_factor_high
        return self._attention_on_grid(low + share * (high - low))

    def _attention_on_grid(self, value: float) -> float:
        return _nearest(value, ATTENTION_GRID, self.settings.attention_factor_low, self.settings.attention_factor_high)


def _nearest(value: float, step: float, low: float, high: float) -> float:
    """The nearest multiple of ``step``, clipped to the bounds, which need not lie on the grid."""
    return float(min(max(round(round(value / step) * step, 10), low), high))
