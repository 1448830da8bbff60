"""Tiles and blocks: trimming keeps every pair, masks stay small, and what a block makes for a kernel is made once."""

from itertools import product

import torch

from lr2train.attention import cuda
from lr2train.attention.blocks import Block, Rows
from lr2train.attention.kernel import attend_block
from lr2train.attention.tiles import Tile, diagonal
from tests.attention.reference import random_qkv

PACKED = ((0, 1), (3, 35), (35, 67), (70, 95))  # length 1, gaps, two equal neighbours


def test_trimming_keeps_every_pair():
    """What is cut off a tile was seen by nobody; what is left is seen by all."""
    for n_queries, n_keys, gap, window in product((1, 4, 7), (1, 5, 9), (0, 7, 12), (1, 3, 8, 15)):
        if gap == 0 and n_keys < n_queries:
            continue
        tile = Tile(0, n_queries, 0, n_keys, gap)
        ahead = torch.arange(n_queries)[:, None] + tile.lead - torch.arange(n_keys)
        seen = (ahead >= 0) & (ahead < window)
        trimmed = tile.trimmed(window)
        if trimmed is None:
            assert not seen.any()
            continue
        left = seen[trimmed.q_start : trimmed.q_stop, trimmed.k_start : trimmed.k_stop]
        assert left.sum() == seen.sum() == trimmed.pairs(window)
        assert left.any(0).all()
        assert left.any(1).all()


def test_a_sliding_window_needs_memory_for_its_bands_only():
    """Masks are at most (band) x (band + window), whatever the length."""
    block = Block(diagonal(((0, 4096),)), 32)
    attend_block(*random_qkv(4096, 1, 1, 8), 1.0, block)
    masks = {round_.band.added(torch.float32) for round_ in block.cpu_rounds if round_.band is not None}
    assert 0 < len(masks) <= 2, "the first band has its edge, all others share a mask"
    assert max(mask.numel() for mask in masks) <= 256 * (256 + 32)
    assert all(tile.n_queries * tile.n_keys <= 256 * (256 + 32) for round_ in block.cpu_rounds for tile in round_.tiles)


def test_a_block_makes_its_rounds_rows_and_cumulative_lengths_once():
    """All layers of a segment and the backward share them, and an evaluation's must serve training too."""
    device, block = torch.device("cpu"), Block(diagonal(PACKED))
    assert block.cuda_rounds is block.cuda_rounds
    assert block.cpu_rounds is block.cpu_rounds
    (round_,) = block.cuda_rounds
    with torch.inference_mode():
        assert not round_.once(cuda.varlen_of, device).cu_q.is_inference()
        assert not round_.once(cuda.varlen_of, device).no_dropout[0].is_inference()
        assert not round_.queries.on(device).is_inference()
    assert round_.once(cuda.varlen_of, device) is round_.once(cuda.varlen_of, device)
    assert round_.queries.on(device) is round_.queries.on(device)


def test_rows_that_adjoin_are_a_slice():
    """Which selects without a copy."""
    device = torch.device("cpu")
    assert Rows(((0, 3), (3, 9))).on(device) == slice(0, 9)
    assert Rows(()).on(device) == slice(0, 0)
    assert Rows(((0, 3), (4, 6))).on(device).tolist() == [0, 1, 2, 4, 5]
    assert [len(Rows(ranges)) for ranges in ((), ((0, 3), (4, 6)))] == [0, 5]
    assert Rows(((0, 3), (3, 9))).covers(9)
    assert not any(Rows(ranges).covers(9) for ranges in (((0, 3), (4, 9)), ((0, 8),), ((1, 9),), ()))
