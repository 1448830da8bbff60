"""Layouts cut a segment and put it together again, for all ranks in one process."""

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lr2train.config import UserError
from lr2train.parallel.layout import Layout

KINDS = ("contiguous", "zigzag")
SIZES = (1, 2, 4, 8)


def all_ranks(kind: str, length: int, size: int) -> list[Layout]:
    return [Layout(kind, length, rank, size) for rank in range(size)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_has_exactly_one_owner(kind, size):
    indices = torch.cat([layout.indices for layout in all_ranks(kind, 48, size)])
    assert indices.dtype == torch.int64
    assert indices.sort().values.tolist() == list(range(48))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gather_undoes_shard(kind, size, dim):
    x = torch.randn(16, 32, 16)
    ranks = all_ranks(kind, x.shape[dim], size)
    shards = [layout.shard(x, dim) for layout in ranks]
    assert all(shard.shape[dim] == x.shape[dim] // size for shard in shards)
    for layout in ranks:
        assert torch.equal(layout.gather(shards, dim), x)


@pytest.mark.parametrize(("size", "inner"), [(1, 1), (4, 1), (4, 2), (4, 4), (8, 2), (8, 4), (6, 3)])
def test_a_nested_zigzag_is_a_zigzag_cut_contiguously(size, inner):
    """The inner ranks of one ring rank hold, end to end, what a zigzag of size / inner ranks gives to one."""
    x = torch.arange(96)
    nested = [Layout("zigzag_nested", 96, rank, size, inner) for rank in range(size)]
    shards = [layout.shard(x, 0) for layout in nested]
    for ring_rank in range(size // inner):
        together = torch.cat(shards[ring_rank * inner : (ring_rank + 1) * inner])
        assert torch.equal(together, Layout("zigzag", 96, ring_rank, size // inner).indices)
    assert all(torch.equal(layout.gather(shards, 0), x) for layout in nested)
    assert {len(shard) for shard in shards} == {96 // size}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_indices(kind):
    for layout in all_ranks(kind, 48, 4):
        assert torch.cat([torch.arange(start, stop) for start, stop in layout.blocks]).equal(layout.indices)
    assert Layout("zigzag", 16, 3, 4).blocks == ((6, 10),), "the middle blocks adjoin"


@given(size=st.sampled_from(SIZES), kind=st.sampled_from(KINDS), multiple=st.integers(1, 5))
@settings(max_examples=30)
def test_shard_is_indexing_by_indices(size, kind, multiple):
    x = torch.arange(2 * size * multiple) * 10
    for layout in all_ranks(kind, len(x), size):
        assert torch.equal(layout.shard(x, 0), x[layout.indices])


def test_contiguous_shards_are_views_in_order():
    x = torch.arange(8)
    assert [layout.shard(x, 0).tolist() for layout in all_ranks("contiguous", 8, 4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert Layout("contiguous", 8, 1, 4).shard(x, 0).data_ptr() == x[2:].data_ptr()


def test_zigzag_gives_every_rank_the_same_causal_work():
    """Query i of a causal segment meets i + 1 keys."""
    assert Layout("zigzag", 16, 1, 4).indices.tolist() == [2, 3, 12, 13]
    assert len({int((layout.indices + 1).sum()) for layout in all_ranks("zigzag", 64, 8)}) == 1


# ---- zigzag by document ----


@st.composite
def packed(draw):
    """(documents with gaps, tokens, ranks of a ring, inner ranks). Some documents are short beside the segment."""
    size, inner = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.sampled_from([1, 2, 3]))
    length = 2 * size * inner * draw(st.integers(1, 60))
    borders = sorted(draw(st.sets(st.integers(0, length), max_size=20)))
    return tuple(pair for pair in pairwise(borders) if draw(st.booleans())), length, size, inner


@given(packed())
@settings(max_examples=150)
def test_any_documents_are_dealt_to_shards_of_one_size_and_put_together_again(case):
    spans, length, size, inner = case
    x = torch.arange(length)
    layouts = [Layout("zigzag", length, rank, size, spans=spans) for rank in range(size)]
    shards = [layout.shard(x, 0) for layout in layouts]
    assert {len(shard) for shard in shards} == {length // size}
    assert torch.equal(layouts[-1].gather(shards, 0), x)
    assert all(torch.equal(shard, shard.sort().values) for shard in shards)
    nested = [Layout("zigzag_nested", length, rank, size * inner, inner, spans) for rank in range(size * inner)]
    assert torch.equal(torch.cat([layout.indices for layout in nested]), torch.cat(shards))
    assert torch.equal(nested[0].gather([layout.shard(x, 0) for layout in nested], 0), x)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 64])
def test_one_document_or_none_is_the_plain_zigzag(size):
    n = 5
    blocks = torch.arange(2 * size * n).view(2 * size, n)
    for rank in range(size):
        expected = torch.cat([blocks[rank], blocks[2 * size - 1 - rank]])
        for spans in ((), ((0, 2 * size * n),)):
            assert torch.equal(Layout("zigzag", 2 * size * n, rank, size, spans=spans).indices, expected)


def pairs_by_rank(spans, length: int, size: int) -> torch.Tensor:
    """(query, key) pairs of each rank, counted token by token."""
    seen = torch.zeros(length, dtype=torch.int64)
    for start, stop in spans:
        seen[start:stop] = torch.arange(1, stop - start + 1)
    return torch.stack([seen[Layout("zigzag", length, rank, size, spans=spans).indices].sum() for rank in range(size)])


@pytest.mark.parametrize("size", [2, 8, 16, 64])
@pytest.mark.parametrize("seed", range(4))
def test_long_documents_are_spread_evenly(size, seed):
    """Within 2 %. One zigzag over the segment could leave the busiest rank half as much again as the mean."""
    length = 131072
    lengths = 8192 + torch.randint(24576, (20,), generator=torch.Generator().manual_seed(seed))
    borders = [0, *(border for border in accumulate(lengths.tolist()) if border < length)]
    for ends in (borders, [*borders, length]):  # the last part is padding, or a document
        spans = tuple(pairwise(ends))
        pairs = pairs_by_rank(spans, length, size)
        assert pairs.max() < 1.02 * pairs.double().mean()


def test_short_documents_are_cut_no_finer_than_the_long_ones_demand():
    """300 documents of 437 tokens are one run. Between long ones, neighbouring short ones and padding are one run."""
    length, size = 131072, 64
    short = tuple((start, start + 437) for start in range(0, length - 437, 437))
    assert {len(Layout("zigzag", length, rank, size, spans=short).blocks) for rank in range(size - 1)} == {2}
    mixed = ((0, 50000), *(span for span in short if 50000 <= span[0] < 100000), (110000, 131072))
    assert {len(Layout("zigzag", length, rank, size, spans=mixed).blocks) for rank in range(1, size - 1)} == {6}
    pairs = pairs_by_rank(mixed, length, size)
    of_a_whole_segment = length**2 / 2 / size
    assert pairs.max() - pairs.double().mean() < 0.01 * of_a_whole_segment


def test_documents_that_a_plain_zigzag_spreads_evenly_are_not_cut():
    aligned = tuple((start, start + 8) for start in range(0, 128, 8))
    first, last = (Layout("zigzag", 128, rank, 8, spans=aligned).blocks for rank in (0, 7))
    assert (first, last) == (((0, 8), (120, 128)), ((56, 72),))


@pytest.mark.parametrize(
    ("kind", "length", "size", "text"),
    [
        ("zigzag", 131000, 8, r"=131000 .* 2\*sp=16; set data.segment_tokens to 131008 or parallel.sp to 5"),
        ("contiguous", 4098, 4, r"=4098 .* sp=4; set data.segment_tokens to 4100 or parallel.sp to 3"),
    ],
)
def test_a_segment_that_does_not_divide_is_refused_with_the_remedy(kind, length, size, text):
    with pytest.raises(UserError, match=text):
        Layout(kind, length, 0, size)
