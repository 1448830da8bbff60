"""Which strategy serves a segment, and so how tokens lie: a pure function of numbers that all ranks know.

Choice: ``auto`` takes, for every segment anew, the strategy that sends the fewest bytes among those that fit. A
strategy *fits* when

- it can serve the documents, the heads and the sliding windows (its own ``refuse``), and the segment can be cut as its
  layout wants; and
- it spreads the (query, key) pairs evenly: the rank with most pairs exceeds its share by at most ``EVEN`` times a
  rank's pairs of a segment that one document fills. So the ranks of a long window are even within ``EVEN``. Short
  documents are a small part of such work and may be less even. ``local`` need not be even: the packer decided it.

Where no strategy is even, the strategy with the fewest pairs on its fullest rank is taken. Tokens are cut once for all
layers, so the layout with the smallest sum over layers wins, and each kind of layer (full, sliding) takes the cheapest
strategy of that layout.

Cost: bytes stand for time. A ring that hides its transfers behind compute looks like an exchange that cannot. A
measurement on the machine at hand is better: set ``parallel.strategy`` by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lr2train.attention.strategies import STRATEGIES, strategy_of
from lr2train.attention.strategy import PackedSegment, SegmentWork, Strategy
from lr2train.config import UserError
from lr2train.parallel.layout import Kind

# The candidates of auto. The first of two that send alike is taken: a ring axis exists because of nodes, and
# ulysses_ring sends less between nodes.
AUTO = ("local", "ulysses_ring", "ulysses", "ring", "gather")
# Attention work that the other ranks may wait for, as a part of a rank's work of a long window. More imbalance costs
# more than it saves bytes.
EVEN = 0.02


@dataclass(frozen=True)
class Layers:
    """A model's attention layers, as far as a choice depends on them.

    Attributes:
        n_heads: of queries.
        n_kv_heads: of keys and values.
        head_size: of one head.
        sliding_windows: (sliding window or None, number of layers that have it), each window once.
        bytes_per_element: of q, k and v.
    """

    n_heads: int
    n_kv_heads: int
    head_size: int
    sliding_windows: tuple[tuple[int | None, int], ...] = ((None, 1),)
    bytes_per_element: int = 2

    def works(self, segment: PackedSegment) -> dict[SegmentWork, int]:
        """The work of each kind of layer, and the number of its layers. A sliding window that hides nothing is none."""
        plain = SegmentWork(segment, self.n_heads, self.n_kv_heads, self.head_size, self.bytes_per_element)
        works: dict[SegmentWork, int] = {}
        for sliding_window, n_layers in self.sliding_windows:
            work = replace(plain, sliding_window=segment.narrowed(sliding_window))
            works[work] = works.get(work, 0) + n_layers
        return works


@dataclass(frozen=True)
class AttentionChoice:
    """Which strategies serve a segment.

    Attributes:
        strategies: (sliding window or None, strategy name) of each kind of layer.
        layout_kind: how the tokens lie, for all layers.
        reason: why, without numbers that change from segment to segment.
        figures: those numbers.
    """

    strategies: tuple[tuple[int | None, str], ...]
    layout_kind: Kind
    reason: str
    figures: str = ""

    def strategy(self, sliding_window: int | None) -> str:
        """The strategy of the layers with this sliding window."""
        names = dict(self.strategies)
        assert sliding_window in names, f"sliding window {sliding_window} is none of the model's config: {names}"
        return names[sliding_window]

    @property
    def title(self) -> str:
        """The strategies, each once."""
        return " and ".join(dict.fromkeys(name for _, name in self.strategies))


def choose(strategy: str, layers: Layers, segment: PackedSegment) -> AttentionChoice:
    """The attention choice for one segment: the same on every rank.

    A named strategy that serves one document over the segment, but not these documents (``ring_flash_attn``), leaves
    them to auto.

    Raises:
        UserError: the named strategy cannot serve the segment; or under auto, no strategy can.
    """
    works = layers.works(segment)
    if strategy == "auto":
        return _cheapest(works, segment)
    chosen = strategy_of(strategy)
    if all(_serves(chosen, work) for work in works):
        names = tuple((work.sliding_window, strategy) for work in works)
        return AttentionChoice(names, chosen.layout_kind, f"parallel.strategy={strategy}")
    whole = replace(segment, spans=((0, segment.n_tokens),))
    for work in works if strategy == "local" else layers.works(whole):
        _refuse_work(chosen, work)
    found = _cheapest(works, segment)
    why = f"parallel.strategy={strategy} serves one span over the whole segment and leaves others to auto"
    return replace(found, reason=f"{why}: {found.reason}")


def bytes_sent(choice: AttentionChoice, layers: Layers, segment: PackedSegment) -> int:
    """Bytes that the busiest rank sends for a segment: all layers, forward and backward, no recomputation."""
    total = 0
    for work, n_layers in layers.works(segment).items():
        total += strategy_of(choice.strategy(work.sliding_window)).bytes_sent(work).total * n_layers
    return total


def ring_ranks(wanted: int, sp: int, n_heads: int, ranks_per_node: int) -> int:
    """Ranks on the ring axis of ``sp`` ranks: ``wanted`` (``parallel.ring``), for 0 as few as ulysses allows.

    Ulysses can use a number of ranks that divides the query heads and that one node holds whole.

    Raises:
        UserError: ``wanted`` does not divide ``sp``.
    """
    divisors = [n for n in range(1, sp + 1) if sp % n == 0]
    if wanted:
        if wanted not in divisors:
            remedy = f"set parallel.ring to one of {divisors}, or to 0"
            raise UserError(f"parallel.ring={wanted} does not divide parallel.sp={sp}; {remedy}")
        return wanted
    return next(ring for ring in divisors if _is_usable(sp // ring, sp, n_heads, ranks_per_node))


def _is_usable(ulysses: int, sp: int, n_heads: int, ranks_per_node: int) -> bool:
    inside_a_node = sp <= ranks_per_node or ranks_per_node % ulysses == 0 or ulysses == 1
    return n_heads % ulysses == 0 and inside_a_node


def refuse_settings(strategy: str, layers: Layers, longest_span: int, n_tokens: int, sp: int, ring: int) -> None:
    """Refuse a strategy that cannot serve a segment of ``n_tokens`` with a document of ``longest_span``.

    ``local`` is not refused here: that depends on where the documents come to lie.

    Raises:
        UserError: as ``choose``.
    """
    if strategy != "local":
        document = (0, min(longest_span, n_tokens))  # a document of no token, or of too many, is refused elsewhere
        choose(strategy, layers, PackedSegment((document,) if longest_span else (), n_tokens, sp, ring))


# ---- auto ----


def _cheapest(works: dict[SegmentWork, int], segment: PackedSegment) -> AttentionChoice:
    """The layout with the fewest bytes over all layers, and in that layout each kind of layer's cheapest strategy."""
    if segment.sp == 1:
        return _all_local(works, "parallel.sp=1")
    if all(_serves(STRATEGIES["local"], work) for work in works):
        return _all_local(works, "every attention span lies inside one sequence shard: nothing is sent")
    serving = {work: _serving(work) for work in works}
    even = {work: [one for one in strategies if _is_even(one, work)] for work, strategies in serving.items()}
    best = _least(even, works, _sent)
    reason = "nothing spreads the work evenly, and others do less" if best is None else _reason(best, even)
    best = best or _least(serving, works, _most_pairs)
    if best is None:
        _refuse_work(STRATEGIES["gather"], next(iter(works)))  # serves any heads: what stops gather stops the others
        raise AssertionError(f"no strategy serves {works}")
    names = tuple((work.sliding_window, strategy.name) for work, strategy in best.items())
    return AttentionChoice(names, next(iter(best.values())).layout_kind, reason, _figures(serving))


def _all_local(works: dict[SegmentWork, int], reason: str) -> AttentionChoice:
    return AttentionChoice(tuple((work.sliding_window, "local") for work in works), "contiguous", reason)


def _least(
    fitting: dict[SegmentWork, list[Strategy]],
    works: dict[SegmentWork, int],
    cost: Callable[[Strategy, SegmentWork], int],
) -> dict[SegmentWork, Strategy] | None:
    """The cheapest strategy for each work under the layout with the smallest sum over layers.

    None where no layout serves all works.
    """
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


def _sent(strategy: Strategy, work: SegmentWork) -> int:
    return strategy.bytes_sent(work).total


def _most_pairs(strategy: Strategy, work: SegmentWork) -> int:
    return max(strategy.pairs(work, rank) for rank in range(work.segment.sp))


def _serving(work: SegmentWork) -> list[Strategy]:
    """The strategies of AUTO that can serve ``work``; ``ulysses_ring`` only where the mesh has both axes."""
    two_axes = 1 < work.segment.ring < work.segment.sp
    candidates = [STRATEGIES[name] for name in AUTO if two_axes or name != "ulysses_ring"]
    return [strategy for strategy in candidates if _serves(strategy, work)]


def _serves(strategy: Strategy, work: SegmentWork) -> bool:
    try:
        _refuse_work(strategy, work)
    except UserError:
        return False
    return True


def _refuse_work(strategy: Strategy, work: SegmentWork) -> None:
    """Raises UserError when the strategy cannot serve the work, or its layout cannot cut the segment."""
    strategy.refuse(work)
    work.segment.layout(strategy.layout_kind, 0)


def _is_even(strategy: Strategy, work: SegmentWork) -> bool:
    pairs = [strategy.pairs(work, rank) for rank in range(work.segment.sp)]
    n_tokens = work.segment.n_tokens
    of_a_whole_segment = work.n_heads * n_tokens * (n_tokens + 1) / 2
    return max(pairs) * work.segment.sp - sum(pairs) <= EVEN * of_a_whole_segment


def _reason(best: dict[SegmentWork, Strategy], even: dict[SegmentWork, list[Strategy]]) -> str:
    chosen = {one.name for one in best.values()}
    others = dict.fromkeys(one.name for strategies in even.values() for one in strategies if one.name not in chosen)
    return f"{', '.join(others)} would send more" if others else "nothing else fits"


def _figures(serving: dict[SegmentWork, list[Strategy]]) -> str:
    return "; ".join(_line(work, strategies) for work, strategies in serving.items())


def _line(work: SegmentWork, strategies: Sequence[Strategy]) -> str:
    sent = (f"{one.name} {one.bytes_sent(work).total / 2**20:.4g}" for one in strategies)
    window = "" if work.sliding_window is None else f", sliding window {work.sliding_window}"
    return f"MiB per rank and layer, forward and backward{window}: {', '.join(sent)}"
