"""Every strategy equals attention written out in float64, and sends the bytes that it declares.

Two and four ranks are real processes; eight are simulated one after another. Shapes are small and inputs fp32, so the
algorithm's error is measured: 1e-5 is some hundred roundings of 6e-8.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch.multiprocessing.reductions import StorageWeakRef

from lr2train.attention import gather as gather_module
from lr2train.attention import ring as ring_module
from lr2train.attention import ring_steps
from lr2train.attention.ring_steps import steps_of
from lr2train.attention.strategies import STRATEGIES
from lr2train.attention.strategy import PackedSegment, SegmentWork
from lr2train.attention.tiles import Tile
from lr2train.config import UserError
from lr2train.parallel.comm import counting
from lr2train.parallel.layout import Layout
from lr2train.parallel.mesh import Mesh, make_mesh
from tests.attention.reference import attend_explicitly, gradients_explicitly, mask_of, random_qkv, relative_error
from tools.gpu.simulation import LayerInputs, alone, simulate

T = 96  # divides into the 2 x 4 blocks of the largest ring here, and into odd ones
SPANS = {
    "short packed": tuple((start, start + 8) for start in range(0, T, 8)),
    "long whole": ((0, T),),
    "long by document": ((0, 1), (1, 3), (3, 40), (40, 41), (43, 90), (90, 95)),  # lengths 1, 2 and odd, a gap
    "in one shard": ((13, 20),),
}
HEADS = {"mha": (4, 4), "gqa": (8, 2), "mqa": (4, 1), "not a power of two": (12, 6)}
OURS = ("local", "ulysses", "ring", "gather", "ulysses_ring")


def segment_of(spans, heads, sliding_window=None, n_tokens=T, dtype=torch.float32, head_size=8) -> LayerInputs:
    q, k, v = random_qkv(n_tokens, *heads, head_size, dtype)
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    return LayerInputs(q, k, v, grad_out, spans, 0.7 / math.sqrt(head_size), sliding_window)


def expected_of(segment: LayerInputs) -> list[torch.Tensor]:
    """(out, dq, dk, dv) in float64, by an explicit mask."""
    inputs = (segment.q, segment.k, segment.v, segment.spans, segment.scale)
    out, _ = attend_explicitly(*inputs, sliding_window=segment.sliding_window)
    return [out, *gradients_explicitly(*inputs, segment.grad_out, sliding_window=segment.sliding_window)]


def check_result(result, expected, what: str, tolerance=1e-5, layout: Layout | None = None) -> None:
    """``result`` is of the whole segment, or the shard of ``layout``. Errors are relative to the largest value of the
    whole.

    For a document of one token the gradients of q and k are pure rounding, so a gradient's size is at least a tenth of
    dv's.
    """
    for name, actual, wanted in zip(("out", "dq", "dk", "dv"), result, expected, strict=True):
        size = max(wanted.abs().max(), 0.1 * expected[3].abs().max())
        mine = wanted if layout is None else layout.shard(wanted, 0)
        error = ((actual.double() - mine).abs().max() / size).item()
        assert error < tolerance, f"{name} of {what}: {error:.2e}"


def work_of(segment: LayerInputs, mesh: Mesh) -> SegmentWork:
    packed = PackedSegment(segment.spans, len(segment.q), mesh.sp_size, mesh.ring_size)
    heads = segment.q.shape[1], segment.k.shape[1], segment.q.shape[2]
    return SegmentWork(packed, *heads, segment.q.element_size(), segment.sliding_window)


def serves(name: str, work: SegmentWork) -> bool:
    try:
        STRATEGIES[name].refuse(work)
    except UserError:
        return False
    return True


def run_shard(name: str, segment: LayerInputs, mesh: Mesh):
    """This rank's (out, dq, dk, dv), its layout, and what it sent: (forward, backward)."""
    packed = work_of(segment, mesh).segment
    layout = packed.layout(STRATEGIES[name].layout_kind, mesh.sp_rank)
    leaves = [layout.shard(x, 0).clone().requires_grad_() for x in (segment.q, segment.k, segment.v)]
    with counting() as sent:
        out = STRATEGIES[name].prepare(packed, mesh, segment.sliding_window)(*leaves, segment.scale)
        forward = sum(sent.values())
    out.backward(layout.shard(segment.grad_out, 0))  # outside: the count goes with the graph
    return [out.detach(), *(x.grad for x in leaves)], layout, (forward, sum(sent.values()) - forward)


def check_on_mesh(mesh: Mesh, names, cases) -> int:
    """Every case on real ranks: values, and bytes as the docstring's formula has them. Returns how many were served."""
    n_served = 0
    for kind, heads, sliding_window in cases:
        segment = segment_of(SPANS[kind], heads, sliding_window)
        expected, work = expected_of(segment), work_of(segment, mesh)
        for name in (name for name in names if serves(name, work)):
            n_served += 1
            result, layout, sent = run_shard(name, segment, mesh)
            what = (
                f"{name}, {kind}, heads {heads}, window {sliding_window}, {mesh.sp_size} ranks, ring {mesh.ring_size}"
            )
            check_result(result, expected, what, layout=layout)
            assert sent == tuple(STRATEGIES[name].traffic(work, mesh.sp_rank)), what
            assert sent == (0, 0) or name != "local"
    return n_served


FIXED = ("short packed", "long whole", "long by document", "in one shard")
CASES = [(kind, heads, None) for kind in FIXED for heads in HEADS.values()]
CASES += [(f"random {seed}", HEADS["gqa"], None if seed % 2 else 9) for seed in range(6)]
WINDOWS = [("long whole", HEADS["gqa"], 30), ("long by document", HEADS["mha"], 5), ("long whole", HEADS["mqa"], 1)]


def random_spans(seed: int):
    """Documents with gaps, the same on every rank. Many cross no border, so empty exchanges are met too."""
    drawn = torch.randperm(T + 1, generator=torch.Generator().manual_seed(seed))[: 3 + 2 * (seed % 5)]
    pieces = list(itertools.pairwise(sorted(drawn.tolist())))
    return tuple(piece for i, piece in enumerate(pieces) if (seed + i) % 3) or (pieces[0],)


SPANS |= {f"random {seed}": random_spans(seed) for seed in range(6)}


def check_next_block_is_in_flight(mesh: Mesh) -> None:
    """While the ring computes with the block of step t, that of step t + 1 has been asked for; in the backward too."""
    order = []

    def log(module, name, patch):
        original = getattr(module, name)

        def logged(*args, **kwargs):
            order.append((name, kwargs.get("tag")))
            return original(*args, **kwargs)

        patch.setattr(module, name, logged)

    segment = segment_of(SPANS["long whole"], HEADS["gqa"])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("transfer", "forward_block", "backward_block"):
            log(ring_module, name, patch)
        run_shard("ring", segment, mesh)
    n_steps = mesh.sp_size
    steps = [[("transfer", 2 * t), ("forward_block", None)] for t in range(1, n_steps)]
    expected = [*itertools.chain(*steps), ("forward_block", None)]
    assert order[: 2 * n_steps - 1] == expected
    keys = [what for what in order[2 * n_steps - 1 :] if what[1] is None or what[1] % 2 == 0]  # odd tags: gradients
    assert keys == [(name.replace("forward", "backward"), tag) for name, tag in expected]


def test_gather_has_two_groups_of_heads_in_memory(monkeypatch):
    """On the last of 4 ranks, forward and backward: one group is computed with, as it arrived, and one is in flight."""
    held, used = [], []

    class Arrived:
        def wait(self) -> None: ...

    def exchange(x, sent, into, received, group):
        into.fill_(0.5)
        held.append(StorageWeakRef(into.untyped_storage()))
        assert sum(not one.expired() for one in held) <= 2
        return Arrived()

    def noting(block):
        def computed(q, k, v, *rest):
            alive = {one.cdata for one in held if not one.expired()}
            used.append({x.untyped_storage()._cdata for x in (k, v)} <= alive)
            return block(q, k, v, *rest)

        return computed

    for name in ("forward_block", "backward_block"):
        monkeypatch.setattr(gather_module, name, noting(getattr(gather_module, name)))
    monkeypatch.setattr(gather_module, "exchange_rows", exchange)
    q, k, v = random_qkv(24, 8, 8, 8)
    attention = gather_module.gather(PackedSegment(((0, T),), T, 4), Mesh(world=4, sp_size=4, sp_rank=3))
    arrivals = gather_module._Arrivals(8, k, v, attention)
    out, lse = gather_module.forward_rank(q, 8, attention.exchange, 0.3, arrivals.fetch)
    held.clear()
    arrivals = gather_module._Arrivals(8, k, v, attention)
    queries = gather_module.Queries(q, out, lse, torch.ones_like(q))
    gather_module.backward_rank(queries, k, v, attention.exchange, 0.3, arrivals.fetch, lambda group, grads: None)
    assert used == [True] * 8, "four groups forward and four backward, none of them copied"


def check_all(rank: int, world: int, meshes) -> list[int]:
    """(sp, ring, cases) of each mesh; every strategy serves what it should: all but local take every kind of span."""
    check_next_block_is_in_flight(make_mesh(world))
    served = []
    for sp, ring, cases in meshes:
        names = OURS if ring == 1 else ("ulysses_ring",)
        served.append(check_on_mesh(make_mesh(sp, ring=ring), names, cases))
    return served


def test_on_2_ranks(tmp_path):
    n_cases = len(CASES + WINDOWS)
    meshes = [(2, 1, CASES + WINDOWS), (2, 2, CASES + WINDOWS)]
    whole, two_rings = run_ranks(check_all, 2, meshes, tmp_path=tmp_path)[0]
    assert whole >= 4 * n_cases + 8, "all but local serve everything, and local the short and those of one shard"
    assert two_rings == n_cases


# Two pairs of ranks compute what two ranks compute alone.
@pytest.mark.parametrize("of_pairs", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_on_4_ranks(of_pairs, tmp_path):
    """Two pairs take every case number ``of_pairs``."""
    every, some = CASES + WINDOWS, CASES[::of_pairs] + WINDOWS
    meshes = [(4, 1, every), (4, 2, every), (2, 1, some)]
    whole, mixed, pairs = run_ranks(check_all, 4, meshes, tmp_path=tmp_path)[0]
    assert whole >= 4 * len(every) + 8
    assert mixed == len(every)
    assert pairs >= 4 * len(some)


def test_one_rank_without_torch_distributed():
    assert check_on_mesh(Mesh(), OURS, CASES + WINDOWS) == len(OURS) * len(CASES + WINDOWS)


# ---- 8 ranks, one after another ----


@st.composite
def spans_of(draw, n_tokens=T):
    """Any spans of a row: borders are drawn, and each piece between them is a span or a gap."""
    borders = sorted(draw(st.sets(st.integers(0, n_tokens), min_size=2, max_size=14)))
    pieces = list(itertools.pairwise(borders))
    kept = draw(st.lists(st.booleans(), min_size=len(pieces), max_size=len(pieces)))
    return tuple(piece for piece, keep in zip(pieces, kept, strict=True) if keep) or (pieces[0],)


@given(
    spans=spans_of(),
    heads=st.sampled_from([(8, 8), (8, 2), (8, 1), (24, 6)]),
    sliding_window=st.none() | st.integers(1, 40),
    name=st.sampled_from(["ulysses", "ring", "gather", "ulysses_ring"]),
    sp=st.sampled_from([2, 4, 8]),
)
@settings(max_examples=120)
def test_any_spans_on_up_to_8_simulated_ranks(spans, heads, sliding_window, name, sp):
    """fp64: what is left is the algorithm."""
    if name == "ring" and sp == 8:
        sp = 6  # 12 blocks of 8: rings need not be powers of two
    segment = segment_of(spans, heads, sliding_window, dtype=torch.float64)
    check_result(simulate(name, segment, sp, rings=2), expected_of(segment), f"{name} on {sp}", tolerance=1e-12)


@pytest.mark.parametrize("kind", FIXED)
@pytest.mark.parametrize("name", ["ring", "gather", "ulysses", "ulysses_ring"])
def test_8_simulated_ranks(name, kind):
    spans = tuple((4 * start // 3, 4 * stop // 3) for start, stop in SPANS[kind] if 4 * start // 3 < 4 * stop // 3)
    segment = segment_of(spans, (8, 2), n_tokens=128)
    check_result(simulate(name, segment, 8, rings=4), expected_of(segment), f"{name} on 8")


@pytest.mark.parametrize("name", ["ring", "gather", "ulysses", "ulysses_ring"])
def test_error_does_not_grow_with_the_ranks(name):
    """bf16 against float64, root mean square over all of out, dq, dk, dv: at most 1.5 times that of one rank."""
    segment = segment_of(((0, 100), (100, 512)), (8, 4), n_tokens=512, dtype=torch.bfloat16, head_size=32)
    expected = expected_of(segment)

    def errors(result):
        pairs = zip(result, expected, strict=True)
        return [((a.double() - b).pow(2).mean() / b.pow(2).mean()).sqrt() for a, b in pairs]

    one = errors(alone(segment))
    for sp in (2, 4, 8):
        for of_many, of_one in zip(errors(simulate(name, segment, sp, rings=2)), one, strict=True):
            assert of_many < 1.5 * of_one


# ---- what strategies declare ----


@pytest.mark.parametrize("kind", SPANS)
@pytest.mark.parametrize("sliding_window", [None, 11])
def test_pairs_of_all_ranks_are_those_of_the_segment(kind, sliding_window):
    spans = SPANS[kind]
    distance = torch.arange(T)[:, None] - torch.arange(T)
    one_head = sum(int((distance[: stop - start, : stop - start] >= 0).sum()) for start, stop in spans)
    if sliding_window is not None:
        one_head = sum(min(i + 1, sliding_window) for start, stop in spans for i in range(stop - start))
    for name in OURS:
        for sp, ring in ((1, 1), (2, 1), (4, 1), (4, 2), (6, 3)):
            work = SegmentWork(PackedSegment(spans, T, sp, ring), 12, 6, 8, sliding_window=sliding_window)
            if serves(name, work):
                assert sum(STRATEGIES[name].pairs(work, rank) for rank in range(sp)) == 12 * one_head


@given(spans=spans_of(), sliding_window=st.none() | st.integers(1, 40), size=st.sampled_from([1, 2, 3, 6, 8]))
@settings(max_examples=60)
def test_the_ring_takes_the_rows_that_are_seen_and_no_other(spans, sliding_window, size):
    """The ring's declarations and its steps, against the mask over all tokens."""
    mask = mask_of(spans, T, sliding_window=sliding_window)
    shards = [Layout("zigzag", T, rank, size, spans=spans).indices for rank in range(size)]
    packed = PackedSegment(spans, T, size)
    need = ring_steps.needs(packed, sliding_window)
    work = SegmentWork(packed, 1, 1, 8, sliding_window=sliding_window)
    for rank, mine in enumerate(shards):
        steps = steps_of(packed, rank, sliding_window)
        for t, step in enumerate(steps[1:], 1):
            theirs = shards[(rank + t) % size]
            seen = mask[mine][:, theirs].any(0).nonzero().flatten().tolist()
            assert [row for start, stop in step.take.ranges for row in range(start, stop)] == seen
            assert step.take == steps_of(packed, (rank + t) % size, sliding_window)[t].give
            assert need[rank, (rank + t) % size] == len(seen)
        pairs = sum(step.block.pairs for step in steps)
        assert pairs == STRATEGIES["ring"].pairs(work, rank) == int(mask[mine].sum())


TRIPLES = tuple((start, start + 3) for start in range(702, 741, 3))
MIXED = ((0, 300), (300, 304), (304, 311), (311, 700), *TRIPLES, (760, 1020))


@pytest.mark.parametrize("sliding_window", [None, 50])
@pytest.mark.parametrize("name", ["ring", "ulysses_ring"])
def test_short_documents_between_long_ones(name, sliding_window):
    """In a segment of 1024 tokens documents under 11 are dealt together with what surrounds them."""
    segment = segment_of(MIXED, (2, 1), sliding_window, n_tokens=1024, dtype=torch.float64)
    check_result(simulate(name, segment, 8, rings=4), expected_of(segment), f"{name} on 8", tolerance=1e-12)


def test_a_step_of_the_ring_is_half_a_shard_by_a_shard():
    """In one tile: half the keys of a rank before for all queries, or all keys of a rank after for half the queries."""
    shard = 8192 // 8
    for rank in range(8):
        own, *steps = steps_of(PackedSegment(((0, 8192),), 8192, 8), rank)
        assert own.block.tiles == (Tile(0, shard, 0, shard, 0),)
        for t, step in enumerate(steps, 1):
            (tile,) = step.block.tiles
            owner = (rank + t) % 8
            queries, take = ((0, shard), (0, shard // 2)) if owner < rank else ((shard // 2, shard), (0, shard))
            assert (step.queries.ranges, step.take.ranges) == ((queries,), (take,))
            assert tile.gap == tile.n_queries, "full: no masked pair"
            assert tile.pairs() == shard * shard // 2


def test_ring_and_ulysses_are_even_and_gather_says_that_it_is_not():
    work, nested = (SegmentWork(PackedSegment(((0, 8192),), 8192, 8, ring), 32, 8, 128) for ring in (1, 4))
    assert STRATEGIES["ring"].imbalance(work) < 0.02
    assert STRATEGIES["ulysses"].imbalance(work) == 0
    assert STRATEGIES["ulysses_ring"].imbalance(nested) < 0.02
    assert 0.8 < STRATEGIES["gather"].imbalance(work) < 1


def test_the_figures_in_the_docstrings():
    """LLaMA3-8B, 128k, 8 ranks, bf16."""
    work = SegmentWork(PackedSegment(((0, 131072),), 131072, 8), 32, 8, 128)
    mib = {
        name: [x / 2**20 for x in STRATEGIES[name].bytes_sent(work)]
        for name in ("local", "ulysses", "ring", "gather")
        if serves(name, work)
    }
    assert mib == {"ulysses": [280, 280], "ring": [448, 672], "gather": [448, 448]}


def test_what_cannot_be_served_is_refused_with_the_remedy():
    work, uneven = (SegmentWork(PackedSegment(((0, n),), n, 8), 12, 4, 8) for n in (96, 100))
    for name, sentence in {
        "ulysses": r"num_attention_heads=12 .* parallel.sp=8 .*set parallel.strategy to auto",
        "ring": r"segment_tokens=100 .* 16 blocks .*strategy=ring .* parallel.sp=8; set parallel.strategy to auto",
        "gather": r"segment_tokens=100 .* parallel.sp=8; set data.segment_tokens to 104",
        "local": r"tokens 0:96 .* 8 shards of 12 tokens",
    }.items():
        with pytest.raises(UserError, match=sentence):
            STRATEGIES[name].refuse(uneven if "=100" in sentence else work)


def test_a_wrong_answer_is_seen():
    """The reference at another scale is not within the tolerance."""
    segment = segment_of(SPANS["long whole"], HEADS["gqa"])
    out, *_ = simulate("ring", segment, 4)
    wrong, _ = attend_explicitly(segment.q, segment.k, segment.v, segment.spans, segment.scale * 1.001)
    assert relative_error(out, wrong) > 1e-5
