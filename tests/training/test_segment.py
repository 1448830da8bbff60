"""Tokens, labels and positions that are made on the device equal the batch's own."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from batches import batch_of_labels, labels_of, positions_of
from hypothesis import given, settings
from hypothesis import strategies as st

from lr2train.attention.segment import document_positions
from lr2train.data.batch import IGNORE, LONG, SHORT, Batch
from lr2train.parallel.layout import Layout
from lr2train.training.segment import shard_of, tensors_of

CPU = torch.device("cpu")


@st.composite
def batches(draw) -> tuple[Batch, np.ndarray, np.ndarray]:
    """A batch, and its labels and positions written down one by one."""
    n_tokens, seed = draw(st.integers(1, 60)), draw(st.integers(0, 99))
    rng, dtype = np.random.default_rng(seed), draw(st.sampled_from([np.uint16, np.int32]))
    tokens = rng.integers(0, np.iinfo(np.uint16).max + 1, n_tokens).astype(dtype)
    drawn = st.sets(st.integers(0, n_tokens), min_size=2, max_size=8) if n_tokens > 1 else st.just({0, 1})
    borders = sorted(draw(drawn))
    spans = tuple((start, stop) for start, stop in pairwise(borders) if draw(st.booleans()))
    jumps = tuple((draw(st.integers(*span[:1], span[1] - 1)), draw(st.integers(0, 9))) for span in spans)
    labels, positions = [], []
    for place in range(n_tokens):
        span = next(((start, stop) for start, stop in spans if start <= place < stop), None)
        skipped = sum(tokens for at, tokens in jumps if span and span[0] <= at <= place)
        positions.append(place - span[0] + skipped if span else 0)
        inside = span is not None and place + 1 < span[1] and draw(st.integers(0, 4)) > 0
        cut = span is not None and place + 1 == span[1] and draw(st.booleans())  # the document goes on elsewhere
        labels.append(int(tokens[place + 1]) if inside else int(rng.integers(70_000)) if cut else IGNORE)
    written = np.array(labels), np.array(positions)
    return batch_of_labels(tokens, written[0], spans, SHORT, jumps), *written


@given(batches())
@settings(max_examples=200)
def test_labels_and_positions_are_those_written_down(case):
    batch, labels, positions = case
    assert np.array_equal(labels_of(batch), labels)
    assert np.array_equal(positions_of(batch), positions)
    assert batch.n_target_tokens == np.count_nonzero(labels != IGNORE)
    made = (*tensors_of(batch, CPU), document_positions(batch.spans, len(batch.tokens), CPU, batch.jumps))
    for tensor, expected in zip(made, (batch.tokens, labels, positions), strict=True):
        assert tensor.dtype == torch.int64
        assert tensor.tolist() == expected.tolist()


@given(batches(), st.sampled_from([("contiguous", 1), ("contiguous", 3), ("zigzag", 2), ("zigzag", 3)]))
def test_targets_are_the_places_of_the_shard_that_have_a_label(case, cut):
    batch, (kind, size) = case[0], cut
    unit = size if kind == "contiguous" else 2 * size
    batch = batch_of_labels(*(np.resize(x, -(-len(x) // unit) * unit) for x in (batch.tokens, case[1])), (), SHORT)
    for rank in range(size):
        layout = Layout(kind, len(batch.tokens), rank, size, spans=batch.spans if kind == "zigzag" else ())
        tokens, labels, targets = shard_of(batch, layout, CPU)
        assert tokens.tolist() == batch.tokens[layout.indices.numpy()].tolist()
        assert labels.tolist() == labels_of(batch)[layout.indices.numpy()].tolist()
        assert targets.tolist() == (labels != IGNORE).nonzero().flatten().tolist()


def test_the_last_place_never_wraps_around_to_the_first_token():
    """Also where the last label happens to be the token that stands first."""
    tokens = np.array([7, 8, 9], np.uint16)
    for last in (IGNORE, 7, 11):
        batch = batch_of_labels(tokens, np.array([8, 9, last]), ((0, 3),), LONG)
        assert labels_of(batch).tolist() == tensors_of(batch, CPU).labels.tolist() == [8, 9, last]


def test_ids_beyond_the_stores_dtypes_are_a_programming_error():
    with pytest.raises(AssertionError):
        Batch(np.zeros(3, np.int64), np.zeros((2, 0), np.int64), ((0, 3),), LONG)
