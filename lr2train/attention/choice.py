"""Which strategy serves a segment, and with it who holds which of its tokens: a pure function of numbers that all ranks know.

Choice: ``auto`` takes, for every segment anew, what sends the fewest bytes among the strategies that fit. A strategy *fits* when

- it can serve the spans, the heads and the sliding windows (its own ``refuse``), and the segment can be cut as its layout wants; and
- it spreads the pairs of tokens evenly: the busiest rank has no more than its share and ``EVEN`` of what a rank has of a segment that is one
  span. So the ranks of a long window are even within ``EVEN``, and documents, which are a small part of such work, may be less so.
  ``local`` is not asked: what it can serve it serves, as evenly as the packer has made it.

Where nothing is even, what leaves the busiest rank the least work is taken. Tokens are cut once for all layers, so the layout with the
smallest sum over layers wins, and each kind of layer (full, sliding) takes the cheapest strategy of that layout.

Cost: bytes stand for time. A ring that hides what it sends behind its work, or an exchange that cannot, look alike here; who has measured
better sets ``parallel.strategy``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from lr2train.attention.strategies import STRATEGIES
from lr2train.attention.strategy import Strategy, Work
from lr2train.attention.tiles import Spans
from lr2train.config import UserError
from lr2train.parallel.layout import Kind, Layout

# What auto chooses from; of two that send alike, the first: a ring axis is there because of nodes, between which it sends less.
AUTO = ("local", "ulysses_ring", "ulysses", "ring", "gather")
EVEN = 0.02  # what the others wait for the busiest rank, over a rank's work of a long window: that much attention costs more than it sends


@dataclass(frozen=True)
class Layers:
    """A model's attention layers, as far as a choice depends on them.

    Attributes:
        n_heads: of queries.
        n_kv_heads: of keys and values.
        head_size: of one head.
        windows: (sliding window or None, number of layers that have it), each window once.
        bytes_per_element: of q, k and v.
    """

    n_heads: int
    n_kv_heads: int
    head_size: int
    windows: tuple[tuple[int | None, int], ...] = ((None, 1),)
    bytes_per_element: int = 2

    def works(self, spans: Spans, n_tokens: int, sp: int, ring: int) -> dict[Work, int]:
        """How many layers have each piece of work. A sliding window as long as the longest span is none."""
        longest = max((stop - start for start, stop in spans), default=0)
        plain = Work(spans, n_tokens, self.n_heads, self.n_kv_heads, self.head_size, self.bytes_per_element, sp, ring)
        works: dict[Work, int] = {}
        for window_tokens, n_layers in self.windows:
            work = replace(plain, window_tokens=narrowed(window_tokens, longest))
            works[work] = works.get(work, 0) + n_layers
        return works


@dataclass(frozen=True)
class Plan:
    """How a segment is served.

    Attributes:
        names: (sliding window or None, strategy) of each kind of layer.
        layout_kind: how its tokens lie, for all of them.
        reason: why, without numbers that change from segment to segment.
        figures: those numbers.
    """

    names: tuple[tuple[int | None, str], ...]
    layout_kind: Kind
    reason: str
    figures: str = ""

    def name(self, window_tokens: int | None) -> str:
        """The strategy of the layers with this sliding window."""
        names = dict(self.names)
        assert window_tokens in names, f"a layer slides over {window_tokens} tokens, which the model's config does not say: {names}"
        return names[window_tokens]

    @property
    def title(self) -> str:
        """Its strategies, each once."""
        return " and ".join(dict.fromkeys(name for _, name in self.names))


def narrowed(window_tokens: int | None, longest_span: int) -> int | None:
    """The sliding window where it narrows anything, else None."""
    return None if window_tokens is None or window_tokens >= longest_span else window_tokens


@lru_cache(maxsize=256)
def plan(strategy: str, layers: Layers, spans: Spans, n_tokens: int, sp: int, ring: int = 1) -> Plan:
    """The plan of one segment of ``n_tokens`` over ``sp`` ranks, ``ring`` of them on the ring axis: the same on every rank.

    A strategy by name that serves a segment of one span, but not these spans (``ring_flash_attn``), leaves them to auto.

    Raises:
        UserError: ``strategy`` cannot serve the segment, or it is auto and none can.
    """
    works = layers.works(spans, n_tokens, sp, ring)
    if strategy == "auto":
        return _cheapest(works, sp, ring)
    chosen = STRATEGIES[strategy]
    if all(_serves(chosen, work) for work in works):
        names = tuple((work.window_tokens, strategy) for work in works)
        return Plan(names, chosen.layout_kind, f"parallel.strategy={strategy}")
    whole = layers.works(((0, n_tokens),), n_tokens, sp, ring)
    for work in works if strategy == "local" else whole:
        _refuse(chosen, work)
    found = _cheapest(works, sp, ring)
    return replace(
        found, reason=f"parallel.strategy={strategy} serves one span over the whole segment and leaves others to auto: {found.reason}"
    )


def bytes_sent(plan: Plan, layers: Layers, spans: Spans, n_tokens: int, sp: int, ring: int = 1) -> int:
    """What the busiest rank sends for a segment under ``plan``: all layers, forward and backward, no recomputation."""
    works = layers.works(spans, n_tokens, sp, ring)
    return sum(STRATEGIES[plan.name(work.window_tokens)].bytes_sent(work).total * n_layers for work, n_layers in works.items())


def ring_ranks(wanted: int, sp: int, n_heads: int, ranks_per_node: int) -> int:
    """Ranks on the ring axis of ``sp`` ranks: ``wanted`` (``parallel.ring``), or for 0 the fewest that leave ulysses what it can use.

    Ulysses can use a number of ranks that divides the query heads and that one node holds whole.

    Raises:
        UserError: ``wanted`` does not divide ``sp``.
    """
    divisors = [n for n in range(1, sp + 1) if sp % n == 0]
    if wanted:
        if wanted not in divisors:
            raise UserError(f"parallel.ring={wanted} does not divide parallel.sp={sp}; set parallel.ring to one of {divisors}, or to 0")
        return wanted
    return next(ring for ring in divisors if n_heads % (sp // ring) == 0 and _inside_a_node(sp // ring, sp, ranks_per_node))


def _inside_a_node(ulysses: int, sp: int, ranks_per_node: int) -> bool:
    return sp <= ranks_per_node or ranks_per_node % ulysses == 0 or ulysses == 1


def refuse(strategy: str, layers: Layers, longest_span: int, n_tokens: int, sp: int, ring: int) -> None:
    """Refuse what cannot serve a segment of ``n_tokens`` with a span of ``longest_span``. ``local`` is judged by the spans when they come.

    Raises:
        UserError: as ``plan``.
    """
    if strategy != "local":
        plan(strategy, layers, ((0, longest_span),), n_tokens, sp, ring)


def _cheapest(works: dict[Work, int], sp: int, ring: int) -> Plan:
    """The layout with the fewest bytes over all layers, and in it each kind of layer's cheapest strategy."""
    if sp == 1:
        return _all_local(works, "parallel.sp=1")
    if all(_serves(STRATEGIES["local"], work) for work in works):
        return _all_local(works, "every span lies inside one shard: nothing is sent")
    serving = {work: _serving(work) for work in works}
    even = {work: [one for one in strategies if _is_even(one, work)] for work, strategies in serving.items()}
    best = _least(even, works, _sent)
    reason = "nothing spreads the work evenly, and others do less" if best is None else _reason(best, even)
    best = best or _least(serving, works, _of_the_busiest)
    if best is None:
        _refuse(STRATEGIES["gather"], next(iter(works)))  # serves any heads and spans: what stops it stops the others
        raise AssertionError(f"no strategy serves {works}")
    names = tuple((work.window_tokens, strategy.name) for work, strategy in best.items())
    return Plan(names, next(iter(best.values())).layout_kind, reason, _figures(serving))


def _all_local(works: dict[Work, int], reason: str) -> Plan:
    return Plan(tuple((work.window_tokens, "local") for work in works), "contiguous", reason)


def _least(
    fitting: dict[Work, list[Strategy]], works: dict[Work, int], cost: Callable[[Strategy, Work], int]
) -> dict[Work, Strategy] | None:
    """The cheapest strategy for each work, all of one layout: that with the smallest sum over layers. None where no layout serves all."""
    best, least = None, None
    for kind in dict.fromkeys(one.layout_kind for strategies in fitting.values() for one in strategies):
        alike = {work: [one for one in strategies if one.layout_kind == kind] for work, strategies in fitting.items()}
        if not all(alike.values()):
            continue
        chosen = {work: min(strategies, key=lambda one: cost(one, work)) for work, strategies in alike.items()}
        total = sum(cost(one, work) * works[work] for work, one in chosen.items())
        if least is None or total < least:
            best, least = chosen, total
    return best


def _sent(strategy: Strategy, work: Work) -> int:
    return strategy.bytes_sent(work).total


def _of_the_busiest(strategy: Strategy, work: Work) -> int:
    return max(strategy.pairs(work, rank) for rank in range(work.sp))


def _serving(work: Work) -> list[Strategy]:
    """Those of AUTO that can serve ``work``; ``ulysses_ring`` where its mesh has both axes."""
    two_axes = 1 < work.ring < work.sp
    return [STRATEGIES[name] for name in AUTO if (two_axes or name != "ulysses_ring") and _serves(STRATEGIES[name], work)]


def _serves(strategy: Strategy, work: Work) -> bool:
    try:
        _refuse(strategy, work)
    except UserError:
        return False
    return True


def _refuse(strategy: Strategy, work: Work) -> None:
    strategy.refuse(work)
    Layout(strategy.layout_kind, work.n_tokens, 0, work.sp, work.ulysses if strategy.layout_kind == "zigzag_nested" else 1)


def _is_even(strategy: Strategy, work: Work) -> bool:
    pairs = [strategy.pairs(work, rank) for rank in range(work.sp)]
    of_a_whole_segment = work.n_heads * work.n_tokens * (work.n_tokens + 1) / 2
    return max(pairs) * work.sp - sum(pairs) <= EVEN * of_a_whole_segment


def _reason(best: dict[Work, Strategy], even: dict[Work, list[Strategy]]) -> str:
    chosen = {one.name for one in best.values()}
    others = dict.fromkeys(one.name for strategies in even.values() for one in strategies if one.name not in chosen)
    return f"{', '.join(others)} would send more" if others else "nothing else fits"


def _figures(serving: dict[Work, list[Strategy]]) -> str:
    return "; ".join(_line(work, strategies) for work, strategies in serving.items())


def _line(work: Work, strategies: Sequence[Strategy]) -> str:
    sent = (f"{one.name} {one.bytes_sent(work).total / 2**20:.4g}" for one in strategies)
    window = "" if work.window_tokens is None else f", sliding window {work.window_tokens}"
    return f"MiB a rank and layer, forward and backward{window}: {', '.join(sent)}"
