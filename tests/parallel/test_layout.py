"""Layouts cut a segment and put it together again, for all ranks in one process."""

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
@settings(max_examples=30, deadline=None)
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


@pytest.mark.parametrize(
    ("kind", "length", "size", "text"),
    [
        ("zigzag", 131000, 8, r"segment_tokens=131000 is not divisible by 2\*sp=16; set data.segment_tokens to 131008 or parallel.sp to 5"),
        ("contiguous", 4098, 4, r"segment_tokens=4098 is not divisible by sp=4; set data.segment_tokens to 4100 or parallel.sp to 3"),
    ],
)
def test_a_segment_that_does_not_divide_is_refused_with_the_remedy(kind, length, size, text):
    with pytest.raises(UserError, match=text):
        Layout(kind, length, 0, size)
