"""Imbalance of attention over ranks: (query, key) pairs of the rank with most pairs over the mean, minus 1.

- One document over the segment, and long segments of packed documents: bounded for every strategy but ``gather``.
- Short segments: documents of realistic lengths (``data_plan``), packed as ``prepare`` packs them, aligned to sequence
  shards. Under ``local`` each rank attends within its own documents, so the packer decides the balance. The figure is
  given for single segments and for the sum over a step of 64 segments. Ranks wait for each other in each micro-batch,
  so the first figure decides the step time.
- Layout and ring schedule are computed for each segment: their time is bounded for many documents on many ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from statistics import mean

import numpy as np

from lr2train.attention.ring import RING
from lr2train.attention.ring_steps import steps_of
from lr2train.attention.strategies import STRATEGIES
from lr2train.attention.strategy import PackedSegment, SegmentWork
from lr2train.attention.tiles import Spans
from lr2train.data.plan.packing import pack_long, pack_short, whole_documents
from lr2train.data.plan.segment_table import SegmentTable
from tools.bench.data_plan import lengths_of
from tools.bench.figures import Figure

T, ORIGINAL, SEGMENTS_PER_STEP, AT_MOST, PLANNING_S = 131072, 8192, 64, 0.02, 0.2
SIZES = (8, 16, 64)
HEADS = {8: (32, 8, 128), 16: (32, 8, 128), 64: (64, 64, 128)}  # as many heads as ranks, so that all strategies serve
RINGS = {8: 2, 16: 2, 64: 8}


def measure(quick: bool) -> Iterator[Figure]:
    """Imbalance by strategy and ranks (quick: fewer documents)."""
    lengths = np.random.default_rng(0).permutation(
        np.concatenate(list(lengths_of(20_000 if quick else 200_000).values()))
    )
    for sp in SIZES:
        for name in ("ulysses", "ring", "ulysses_ring", "gather"):
            yield Figure(
                f"imbalance_one_document_{sp}_ranks_{name}", _imbalance(name, ((0, T),), sp), at_most=_bound(name)
            )
    yield from _short(lengths[lengths <= ORIGINAL])
    yield from _long_documents(lengths[lengths > ORIGINAL])
    yield Figure("planning_300_documents_64_ranks_ring_s", _planning_s(64, 300), at_most=PLANNING_S)


def _short(lengths: np.ndarray) -> Iterator[Figure]:
    for sp in (8, 16):  # a sequence shard must hold the longest document
        rows = _pairs("local", pack_short(_documents(lengths), T, sp, np.random.default_rng(0)), sp)
        yield Figure(
            f"imbalance_short_{sp}_ranks_local_mean_of_segments", mean(max(row) / mean(row) - 1 for row in rows)
        )
        step = np.sum(rows, axis=0)
        yield Figure(f"imbalance_short_{sp}_ranks_local_sum_of_a_step", float(step.max() / step.mean() - 1))


def _long_documents(lengths: np.ndarray) -> Iterator[Figure]:
    table = pack_long(_documents(lengths), T)
    for sp in SIZES:
        for name in ("ulysses", "ring", "ulysses_ring", "gather"):
            found = mean(max(row) / mean(row) - 1 for row in _pairs(name, table, sp))
            yield Figure(f"imbalance_long_documents_{sp}_ranks_{name}_mean_of_segments", found, at_most=_bound(name))


def _bound(name: str) -> float | None:
    return None if name == "gather" else AT_MOST  # uneven by design: see its docstring


def _planning_s(sp: int, n_documents: int) -> float:
    """CPU seconds for a ring over random documents: pairs and bytes of all ranks, and the schedule of one rank."""
    borders = np.sort(np.random.default_rng(0).choice(np.arange(1, T), n_documents - 1, replace=False)).tolist()
    spans = tuple(pairwise([0, *borders, T]))
    work = SegmentWork(PackedSegment(spans, T, sp), *HEADS[64])
    start = time.process_time()  # of this process alone: how busy the machine is must not count
    RING.imbalance(work)
    RING.bytes_sent(work)
    steps_of(work.segment, sp // 2)
    return time.process_time() - start


def _documents(lengths: np.ndarray):
    return whole_documents(np.zeros(len(lengths)), np.arange(len(lengths)), lengths)


def _pairs(name: str, table: SegmentTable, sp: int) -> list[list[int]]:
    """Pairs by segment and rank, of segments from all over the table (long documents lead it); the last may be half
    empty: it is left out.
    """
    segments = np.linspace(0, table.n_segments - 2, SEGMENTS_PER_STEP).astype(int).tolist()
    return [
        [STRATEGIES[name].pairs(_work(_spans(table, segment), sp), rank) for rank in range(sp)] for segment in segments
    ]


def _spans(table: SegmentTable, segment: int) -> Spans:
    rows = table.spans_of(segment)
    return tuple((int(table.offset[i]), int(table.offset[i] + table.stop[i] - table.start[i])) for i in rows)


def _imbalance(name: str, spans: Spans, sp: int) -> float:
    return STRATEGIES[name].imbalance(_work(spans, sp))


def _work(spans: Spans, sp: int) -> SegmentWork:
    return SegmentWork(PackedSegment(spans, T, sp, RINGS[sp]), *HEADS[sp])
