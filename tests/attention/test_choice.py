"""The attention choice: which strategy auto takes, and what a named strategy serves or refuses.

The choice is pure, so one process checks it for any documents, heads and ranks, against the strategies' declarations.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lr2train.attention import choice
from lr2train.attention.choice import AUTO, EVEN, AttentionChoice, Layers, bytes_sent, ring_ranks
from lr2train.attention.strategies import STRATEGIES
from lr2train.attention.strategy import PackedSegment, SegmentWork, Strategy
from lr2train.config import StrategyName, UserError

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "ATTENTION.md"
LLAMA3_8B, PHI3_MINI, MQA = Layers(32, 8, 128), Layers(32, 32, 96), Layers(32, 1, 128)
L = 131072
LONG = ((0, L),)
SHORT = tuple((start, start + 8192) for start in range(0, L, 8192))
CROSSING = ((0, 5000), *((start, start + 8192) for start in range(5000, L - 8192, 8192)))


def serves(strategy: Strategy, work: SegmentWork) -> bool:
    """The rule of the docstring of ``choice``, written once more."""
    if strategy.name == "ulysses_ring" and not 1 < work.segment.ring < work.segment.sp:
        return False
    try:
        strategy.refuse(work)
        work.segment.layout(strategy.layout_kind, 0)
    except UserError:
        return False
    return True


def plan(strategy: str, layers: Layers, spans, n_tokens: int, sp: int, ring: int = 1) -> AttentionChoice:
    return choice.choose(strategy, layers, PackedSegment(spans, n_tokens, sp, ring))


def work_of(layers: Layers, spans, n_tokens: int, sp: int, ring: int) -> SegmentWork:
    """Of the first kind of layer."""
    return next(iter(layers.works(PackedSegment(spans, n_tokens, sp, ring))))


def busiest(strategy: Strategy, work: SegmentWork) -> int:
    return max(strategy.pairs(work, rank) for rank in range(work.segment.sp))


def fits(strategy: Strategy, work: SegmentWork) -> bool:
    if not serves(strategy, work):
        return False
    if strategy.name == "local":
        return True
    n_tokens, sp = work.segment.n_tokens, work.segment.sp
    mean = sum(strategy.pairs(work, rank) for rank in range(sp)) / sp
    return strategy.imbalance(work) * mean <= EVEN * work.n_heads * n_tokens * (n_tokens + 1) / 2 / sp + 1e-9


@st.composite
def segments(draw):
    """(spans, tokens, ranks, ring): spans with gaps and padding, of any lengths."""
    sp = draw(st.sampled_from((2, 3, 4, 8)))
    n_tokens = 2 * sp * draw(st.integers(1, 12))
    borders = sorted(draw(st.sets(st.integers(0, n_tokens), min_size=2, max_size=9)))
    spans = tuple(pair for pair in pairwise(borders) if draw(st.booleans())) or ((borders[0], borders[-1]),)
    return spans, n_tokens, sp, draw(st.sampled_from([ring for ring in range(1, sp + 1) if sp % ring == 0]))


@given(segment=segments(), heads=st.sampled_from(((8, 8), (8, 2), (8, 1), (12, 4), (6, 3))))
@settings(max_examples=200)
def test_auto_never_sends_more_than_the_best_that_fits(segment, heads):
    spans, n_tokens, sp, ring = segment
    layers = Layers(*heads, 16)
    packed = PackedSegment(spans, n_tokens, sp, ring)
    work = SegmentWork(packed, *heads, 16)
    chosen = choice.choose("auto", layers, packed)
    sent = bytes_sent(chosen, layers, packed)
    assert sent == STRATEGIES[chosen.title].bytes_sent(work).total
    fitting = [name for name in AUTO if fits(STRATEGIES[name], work)]
    if fitting:
        assert chosen.title in fitting
        assert sent <= min(STRATEGIES[name].bytes_sent(work).total for name in fitting)
    else:
        most = {name: busiest(STRATEGIES[name], work) for name in AUTO if serves(STRATEGIES[name], work)}
        assert most[chosen.title] == min(most.values())


@pytest.mark.parametrize(
    ("layers", "spans", "sp", "ring", "name"),
    [
        (LLAMA3_8B, LONG, 1, 1, "local"),
        (LLAMA3_8B, SHORT, 8, 1, "local"),
        (LLAMA3_8B, LONG, 8, 1, "ulysses"),
        (PHI3_MINI, LONG, 8, 1, "ulysses"),
        (LLAMA3_8B, CROSSING, 8, 1, "gather"),
        (MQA, LONG, 8, 1, "ring"),
        (LLAMA3_8B, LONG, 16, 2, "ulysses_ring"),  # ulysses sends as much, but more of it between the two nodes
        (PHI3_MINI, LONG, 16, 2, "ulysses"),
        (LLAMA3_8B, LONG, 64, 2, "ulysses_ring"),
        (Layers(7, 7, 128), LONG, 8, 8, "ring"),
    ],
)
def test_auto_at_128k_takes(layers, spans, sp, ring, name):
    assert plan("auto", layers, spans, L, sp, ring).title == name


def test_a_long_window_is_spread_evenly_whatever_auto_takes():
    for layers in (LLAMA3_8B, PHI3_MINI, MQA):
        for sp, ring in ((2, 1), (8, 1), (16, 2), (64, 8), (64, 64)):
            chosen = STRATEGIES[plan("auto", layers, LONG, L, sp, ring).title]
            work = work_of(layers, LONG, L, sp, ring)
            assert chosen.imbalance(work) < 0.02, (chosen.name, layers, sp, ring)


@pytest.mark.parametrize(
    ("layers", "sp", "ring"),
    [(LLAMA3_8B, 16, 2), (LLAMA3_8B, 64, 8), (Layers(28, 4, 128), 8, 2), (MQA, 8, 1)],
)
def test_packed_long_documents_are_spread_evenly_whatever_auto_takes(layers, sp, ring):
    for spans in (
        ((0, 40000), (40000, L - 9000), (L - 9000, L)),
        ((0, 60000), (60001, 70000), (70000, 120000)),
        ((9000, 109001),),
    ):
        chosen = STRATEGIES[plan("auto", layers, spans, L, sp, ring).title]
        work = work_of(layers, spans, L, sp, ring)
        assert chosen.imbalance(work) < 0.02, (chosen.name, spans)


def test_where_nothing_is_even_the_busiest_rank_has_as_little_as_can_be():
    """Four heads of few tokens on three ranks: gather sends least, and leaves the last rank most of the work."""
    layers, spans = Layers(4, 4, 16), ((0, 5), (5, 12))
    work = work_of(layers, spans, 12, 3, 3)
    assert not any(fits(STRATEGIES[name], work) for name in AUTO)
    chosen = plan("auto", layers, spans, 12, 3, 3)
    assert (chosen.title, chosen.reason) == ("ring", "nothing spreads the work evenly, and others do less")
    assert busiest(STRATEGIES["ring"], work) < busiest(STRATEGIES["gather"], work)
    assert STRATEGIES["ring"].bytes_sent(work) > STRATEGIES["gather"].bytes_sent(work)


def test_the_reason_names_what_would_send_more_and_does_not_change_with_the_numbers():
    first, second = (plan("auto", LLAMA3_8B, ((0, n),), L, 8) for n in (L, L - 7))
    assert first.reason == second.reason == "ring would send more"
    assert first.figures.startswith("MiB per rank and layer, forward and backward: ulysses 560")
    assert plan("auto", LLAMA3_8B, SHORT, L, 8).reason.startswith("every attention span lies inside one")


def test_each_kind_of_layer_gets_its_cheapest_strategy_under_one_layout():
    """Layers that slide over few tokens need few of the rank before. They share the layout of the full layers."""
    mixed = Layers(32, 8, 128, ((None, 16), (1024, 16)))
    packed = PackedSegment(LONG, L, 8)
    chosen = choice.choose("auto", mixed, packed)
    assert chosen.layout_kind == "contiguous"
    assert dict(chosen.strategies) == {None: "ulysses", 1024: "gather"}
    assert bytes_sent(chosen, mixed, packed) < bytes_sent(choice.choose("ulysses", mixed, packed), mixed, packed)


def test_a_sliding_window_as_long_as_the_longest_span_is_none():
    assert plan("auto", Layers(4, 4, 8, ((16, 2),)), ((0, 16), (16, 32)), 32, 2).strategies == ((None, "local"),)
    assert plan("auto", Layers(4, 4, 8, ((15, 2),)), ((0, 16), (16, 32)), 32, 2).strategies == ((15, "local"),)


def test_a_strategy_by_name_serves_everything_or_is_refused():
    assert plan("ulysses", LLAMA3_8B, SHORT, L, 8).title == "ulysses"
    with pytest.raises(UserError, match="parallel.strategy=local"):
        plan("local", LLAMA3_8B, LONG, L, 8)
    with pytest.raises(UserError, match="num_attention_heads=32 .* parallel.sp=64"):
        plan("ulysses", LLAMA3_8B, LONG, L, 64)
    with pytest.raises(UserError, match="segment_tokens=24"):
        plan("ring", LLAMA3_8B, ((0, 24),), 24, 8)


def test_a_strategy_by_name_leaves_spans_that_it_does_not_know_to_auto(monkeypatch):
    """As ring_flash_attn, which needs CUDA. Here a ring refuses packed documents in its place."""

    def refuse(work: SegmentWork) -> None:
        if work.segment.spans != ((0, work.segment.n_tokens),):
            raise UserError("one span over the segment")

    monkeypatch.setitem(STRATEGIES, "choosy", replace(STRATEGIES["ring"], name="choosy", refuse=refuse))
    assert plan("choosy", LLAMA3_8B, LONG, L, 8).title == "choosy"
    left = plan("choosy", LLAMA3_8B, SHORT, L, 8)
    assert (left.title, left.layout_kind) == ("local", "contiguous")
    assert left.reason.startswith("parallel.strategy=choosy serves one span")
    assert left.reason.endswith(plan("auto", LLAMA3_8B, SHORT, L, 8).reason)


def test_auto_refuses_a_segment_that_no_strategy_can_cut():
    with pytest.raises(UserError, match=r"segment_tokens=20 .*set data.segment_tokens to 24"):
        plan("auto", Layers(7, 7, 16), ((0, 20),), 20, 8, 8)


def test_local_is_not_refused_before_the_documents_are_known():
    choice.refuse_settings("local", LLAMA3_8B, L, L, 8, 1)
    choice.refuse_settings("auto", LLAMA3_8B, L, L, 64, 2)
    with pytest.raises(UserError, match="num_attention_heads=32"):
        choice.refuse_settings("ulysses", LLAMA3_8B, L, L, 64, 2)


@pytest.mark.parametrize(
    ("sp", "heads", "per_node", "ring"),
    [
        (1, 32, 8, 1),
        (8, 32, 8, 1),
        (8, 32, 1, 8),
        (16, 32, 8, 2),
        (64, 32, 64, 2),
        (64, 32, 8, 8),
        (8, 12, 8, 2),
        (8, 7, 8, 8),
        (6, 32, 8, 3),
    ],
)
def test_the_ring_axis_takes_what_heads_and_nodes_leave(sp, heads, per_node, ring):
    assert ring_ranks(0, sp, heads, per_node) == ring


def test_the_ring_axis_can_be_set():
    assert ring_ranks(4, 8, 32, 8) == 4
    with pytest.raises(UserError, match=r"parallel.ring=3 .*=8; set parallel.ring to one of \[1, 2, 4, 8\]"):
        ring_ranks(3, 8, 32, 8)


def test_the_documented_bytes_are_the_formulas_and_auto_takes_the_bold_one():
    """In docs/ATTENTION.md a table row is a model and segment, its ranks, and the MiB of each strategy."""
    lines = DOCUMENT.read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith(("| LLaMA3-8B", "| Phi3-mini"))]
    assert len(rows) == 18
    spans_of = {"long": LONG, "aligned 8k": SHORT, "crossing 8k": (*CROSSING, (CROSSING[-1][1], L))}
    for title, ranks, *cells in rows:
        model, segment = title.split(", ")
        layers, spans, sp = {"LLaMA3-8B": LLAMA3_8B, "Phi3-mini": PHI3_MINI}[model], spans_of[segment], int(ranks)
        ring = ring_ranks(0, sp, layers.n_heads, 8)
        work = work_of(layers, spans, L, sp, ring)
        for name, cell in zip(("local", "ulysses", "ring", "gather", "ulysses_ring"), cells, strict=True):
            if cell != "–":
                assert cell.strip("*") == f"{STRATEGIES[name].bytes_sent(work).total / 2**20:.4g}", (title, ranks, name)
            taken = plan("auto", layers, spans, L, sp, ring).title
            assert cell.startswith("**") == (taken == name), (title, ranks, name)


def test_every_strategy_can_be_configured():
    assert {one.value for one in StrategyName if one is not StrategyName.auto} == set(STRATEGIES)
