"""The loader is a pure function: a step gives the same batches on any ranks and threads, after any other steps.

Also: an epoch holds each segment once, labels stay in their documents, and a corpus that does not fit model or ranks is
refused.
"""

from __future__ import annotations

import os
import resource
import shutil
import threading
from collections import Counter
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from batches import labels_of, positions_of
from hypothesis import given, settings
from hypothesis import strategies as st

from lr2train.config import Config, LongAttention, LongPositions, SourceConfig, UserError
from lr2train.data.batch import IGNORE, LONG, SHORT, Batch
from lr2train.data.corpus import Corpus
from lr2train.data.feed.loader import make_loader
from lr2train.data.feed.positions import drawn_jumps
from lr2train.data.feed.prefetch import prefetched
from lr2train.data.plan.segment_table import file_of
from lr2train.data.store import allow_open_files
from lr2train.prepare import prepare


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """A corpus of a few standard library modules: L0 128, T 512."""
    made = Config(name="corpus", runs_folder=str(tmp_path_factory.mktemp("runs")))
    made.model.original_window_tokens = 128
    made.data.segment_tokens, made.data.vocab_size, made.data.holdout = 512, 400, 0.2
    made.data.sources = [
        SourceConfig(name="modules", kind="stdlib", max_bytes=60_000),
        SourceConfig(name="definitions", kind="stdlib", max_bytes=60_000, options={"unit": "definition"}),
    ]
    prepare(made)
    made.data.path = f"{made.runs_folder}/corpus"
    return made


def loaders(config: Config, size: int, segments_per_step: int = 8, seed: int = 0):
    """A loader for each rank, with the smallest groups."""
    data = replace(config.data, group_segments=size)
    return [
        make_loader(Corpus.open(config.data.path), data, seed, rank, size, segments_per_step, 128, 512)
        for rank in range(size)
    ]


def segments(loader, step: int) -> list[tuple[str, bytes]]:
    """A step's segments as (window, bytes of the tokens)."""
    return [(batch.window, batch.tokens.tobytes()) for batch in loader.batches(step)]


def same(left, right) -> bool:
    arrays = all(np.array_equal(getattr(left, name), getattr(right, name)) for name in ("tokens", "breaks"))
    return arrays and (left.spans, left.window) == (right.spans, right.window)


def test_a_step_does_not_depend_on_the_steps_before(config):
    (walked,), (jumped,) = loaders(config, 1), loaders(config, 1)
    history = [walked.batches(step) for step in range(12)]
    for step in (11, 3, 7):
        assert all(same(a, b) for a, b in zip(history[step], jumped.batches(step), strict=True))
    assert walked.fingerprint == jumped.fingerprint


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_share_the_window_of_each_micro_batch(config, size):
    ranks = loaders(config, size)
    windows = [[[batch.window for batch in rank.batches(step)] for rank in ranks] for step in range(10)]
    assert all(of_rank == step[0] for step in windows for of_rank in step)
    assert {window for step in windows for window in step[0]} == {SHORT, LONG}


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_an_epoch_holds_each_segment_on_any_number_of_ranks(config, size):
    ranks = loaders(config, size)
    groups = sum(-(-ranks[0].n_segments(window) // size) for window in (SHORT, LONG))
    seen = [
        [segment for step in range(rank.steps_per_epoch) for segment in rank.segments(step)][:groups] for rank in ranks
    ]
    times = Counter(segment for of_rank in seen for segment in of_rank)
    for window in (SHORT, LONG):
        assert {number for tag, number in times if tag == window} == set(range(ranks[0].n_segments(window)))
        assert sum(count - 1 for (tag, _), count in times.items() if tag == window) < size


@pytest.mark.parametrize("group", [4, 8])
def test_a_step_holds_the_same_segments_on_any_number_of_ranks_that_divides_a_group(config, group):
    data = replace(config.data, group_segments=group)

    def step_of(size: int, step: int) -> list[tuple[str, bytes]]:
        ranks = [make_loader(Corpus.open(config.data.path), data, 0, rank, size, 16, 128, 512) for rank in range(size)]
        return sorted(one for rank in ranks for one in segments(rank, step))

    for step in (0, 3, 17):
        assert len(step_of(1, step)) == 16
        assert all(step_of(size, step) == step_of(1, step) for size in (2, 4, group))


def test_a_run_that_goes_on_with_other_ranks_repeats_and_skips_nothing(config):
    """Four ranks, then one, then two, inside an epoch: together they see the segments that one rank would have seen."""
    data = replace(config.data, group_segments=4)

    def walk(size: int, steps: range) -> Counter:
        ranks = [make_loader(Corpus.open(config.data.path), data, 0, rank, size, 8, 128, 512) for rank in range(size)]
        return Counter(one for rank in ranks for step in steps for one in rank.segments(step))

    assert walk(4, range(5)) + walk(1, range(5, 7)) + walk(2, range(7, 20)) == walk(1, range(20))


@given(st.integers(0, 40), st.integers(0, 5), st.integers(1, 4))
@settings(max_examples=15)
def test_prefetching_changes_no_batch(config, first, ahead, threads):
    (loader,) = loaders(config, 1)
    steps = range(first, first + 6)
    made = list(prefetched(loader.batches, steps, ahead, threads))
    assert all(
        same(a, b)
        for step, batches in zip(steps, made, strict=True)
        for a, b in zip(batches, loader.batches(step), strict=True)
    )


def test_windows_are_spread_evenly_and_each_epoch_has_its_own_order(config):
    (loader,) = loaders(config, 1)
    n_short, n_long = loader.n_segments(SHORT), loader.n_segments(LONG)
    tags = [tag for step in range(6 * loader.steps_per_epoch) for tag, _ in loader.segments(step)]
    share = n_long / (n_short + n_long)
    assert max(abs(tags[:n].count(LONG) - n * share) for n in range(1, len(tags))) <= 0.5 + 1e-9
    order = [one for step in range(3 * loader.steps_per_epoch) for tag, one in loader.segments(step) if tag == LONG]
    assert sorted(order[:n_long]) == sorted(order[n_long : 2 * n_long])
    assert order[:n_long] != order[n_long : 2 * n_long]
    (other,) = loaders(config, 1, seed=1)
    assert order != [
        one for step in range(3 * loader.steps_per_epoch) for tag, one in other.segments(step) if tag == LONG
    ]


@pytest.mark.parametrize("attention", list(LongAttention))
def test_labels_never_cross_documents(config, attention):
    loader = make_loader(
        Corpus.open(config.data.path), replace(config.data, long_attention=attention), 0, 0, 1, 8, 128, 512
    )
    bos, eos = 0, 1
    for batch in (batch for step in range(6) for batch in loader.batches(step)):
        inside = np.concatenate([np.arange(start, stop) for start, stop in batch.spans])
        tokens, labels, positions = batch.tokens[inside], labels_of(batch)[inside], positions_of(batch)
        assert (labels[tokens == eos] == IGNORE).all()
        assert not (labels == bos).any()
        assert (labels[tokens != eos] >= 0).all()
        outside = np.setdiff1d(np.arange(512), inside)
        assert (labels_of(batch)[outside] == IGNORE).all()
        restarts = batch.window == SHORT or attention is LongAttention.document
        assert all((positions[start] == 0) for start, _ in batch.spans)
        assert positions.max() < 512
        assert restarts or batch.spans == ((0, 512),)


# ---- positions that jump ----


def skipping(config: Config, size: int = 1, attention=LongAttention.segment):
    """A loader for each rank, whose long segments of 512 tokens reach over 2048."""
    data = replace(config.data, group_segments=size, long_attention=attention, long_positions=LongPositions.skip)
    return [make_loader(Corpus.open(config.data.path), data, 0, rank, size, 8, 128, 2048) for rank in range(size)]


@given(st.integers(2, 300), st.integers(0, 200), st.integers(0, 99))
def test_positions_of_a_span_jump_once_and_stay_below_the_target_window(n_tokens, room, seed):
    spans = ((3, 3 + n_tokens), (3 + n_tokens, 5 + n_tokens), (5 + n_tokens, 6 + n_tokens))
    reach = n_tokens + room
    jumps = drawn_jumps(spans, reach, np.random.default_rng(seed))
    batch = Batch(np.zeros(spans[-1][1], np.int32), np.zeros((2, 0), np.int64), spans, LONG, jumps)
    for (start, stop), (place, tokens) in zip(spans, jumps, strict=False):
        steps = np.diff(positions_of(batch)[start:stop])
        assert start < place < stop
        assert (np.delete(steps, place - 1 - start) == 1).all()
        assert steps[place - 1 - start] == 1 + tokens
    assert len(jumps) == 2  # no place for one in a span of one token
    assert [positions_of(batch)[start] for start, _ in spans] == [0, 0, 0]
    assert positions_of(batch).max() < reach


def test_every_distance_of_the_target_window_is_met_and_those_in_the_middle_equally_often():
    n, reach, rng, seen = 16, 96, np.random.default_rng(0), np.zeros(96)
    earlier, later = np.tril_indices(n, -1)[::-1]
    for (place, tokens), times in Counter(drawn_jumps(((0, n),), reach, rng)[0] for _ in range(40_000)).items():
        across = (earlier < place) & (place <= later)
        np.add.at(seen, (later - earlier + tokens)[across], times)
    assert (seen[1:] > 0).all()
    middle = seen[n : reach - n + 1]
    assert np.abs(middle / middle.mean() - 1).max() < 0.06  # 5 standard errors of a distance
    assert seen[reach - n + 1 :].max() < middle.mean()


def test_jumps_depend_on_seed_and_step_alone_and_short_segments_have_none(config):
    (walked,), pair = skipping(config), skipping(config, size=2)
    steps = [walked.batches(step) for step in range(6)]
    assert [batch.jumps for batch in skipping(config)[0].batches(5)] == [batch.jumps for batch in steps[5]]
    data = replace(config.data, group_segments=2, long_positions=LongPositions.skip)
    alone = make_loader(Corpus.open(config.data.path), data, 0, 0, 1, 8, 128, 2048)
    for step in range(3):
        of_ranks = {(one.tokens.tobytes(), one.jumps) for rank in pair for one in rank.batches(step)}
        assert of_ranks == {(one.tokens.tobytes(), one.jumps) for one in alone.batches(step)}
    long = [batch for step in steps for batch in step if batch.window == LONG]
    assert len({batch.jumps for batch in long}) == len(long) > 4
    assert max(positions_of(batch).max() for batch in long) > 1024
    assert all(batch.jumps == () for step in steps for batch in step if batch.window == SHORT)
    (full,) = loaders(config, 1)
    assert all(batch.jumps == () for batch in full.batches(0))
    assert full.fingerprint != walked.fingerprint


def test_under_a_document_mask_each_document_has_its_jump(config):
    (loader,) = skipping(config, attention=LongAttention.document)
    for batch in (batch for step in range(4) for batch in loader.batches(step) if batch.window == LONG):
        assert len(batch.jumps) == sum(stop - start > 1 for start, stop in batch.spans)


def test_segments_of_the_target_window_leave_no_room_to_jump(config):
    data = replace(config.data, long_positions=LongPositions.skip)
    with pytest.raises(UserError, match=r"below rope\.target_window_tokens=512, .*set data\.long_positions to full"):
        make_loader(Corpus.open(config.data.path), data, 0, 0, 1, 8, 128, 512)


def test_a_loader_that_does_not_fit_the_model_is_refused(config):
    for words, arguments in (
        (r"optim\.segments_per_step=8 .*3 data-parallel ranks", (0, 0, 3, 8, 128, 512)),
        (r"model\.original_window_tokens=256.*set model\.original_window_tokens=128", (0, 0, 1, 8, 256, 512)),
        (r"data\.segment_tokens=512 .*rope\.target_window_tokens=500", (0, 0, 1, 8, 128, 500)),
    ):
        with pytest.raises(UserError, match=words):
            make_loader(Corpus.open(config.data.path), config.data, *arguments)


@pytest.mark.parametrize(
    ("group", "size", "words"),
    [
        (3, 1, r"data\.group_segments=3 .*optim\.segments_per_step=8; set data\.group_segments to one of 1, 2, 4, 8"),
        (3, 2, r"set data\.group_segments to one of 2, 4, 8"),
        (2, 4, r"4 data-parallel ranks .*data\.group_segments=2.*start with 1, 2 of them"),
    ],
)
def test_a_group_that_does_not_fit_is_refused_with_the_sizes_that_do(config, group, size, words):
    with pytest.raises(UserError, match=words):
        make_loader(Corpus.open(config.data.path), replace(config.data, group_segments=group), 0, 0, size, 8, 128, 512)


def test_a_window_with_fewer_segments_than_a_group_is_logged(config, capsys):
    (loader,) = loaders(config, 1)
    assert capsys.readouterr().err == ""
    few = loader.n_segments(LONG)
    segments_per_step = 4 * (few + 1)
    make_loader(
        Corpus.open(config.data.path),
        replace(config.data, group_segments=few + 1),
        0,
        0,
        1,
        segments_per_step,
        128,
        512,
    )
    assert f"only {few} long segments for groups of {few + 1}" in capsys.readouterr().err


def test_a_missing_or_damaged_corpus_is_refused(config, tmp_path):
    with pytest.raises(UserError, match="run prepare"):
        Corpus.open(tmp_path)
    copy = tmp_path / "corpus"
    shutil.copytree(config.data.path, copy)
    table = file_of(copy, LONG)
    table.write_bytes(table.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"segments\.long\.npy .*prepare again"):
        make_loader(Corpus.open(copy), config.data, 0, 0, 1, 8, 128, 512)


def test_a_loader_opens_nothing_that_its_corpus_has_open(config, monkeypatch):
    """A start of train opens the corpus once: its manifest, its tokenizer and its sources are not read again."""
    corpus = Corpus.open(config.data.path)
    assert corpus.tokenizer.eos == 1 and corpus.stores()

    def refuse(*_):
        raise AssertionError("read again")

    for name in ("read_json", "sealed", "tokenizers.load"):
        monkeypatch.setattr(f"lr2train.data.corpus.{name}", refuse)
    assert len(make_loader(corpus, config.data, 0, 0, 1, 8, 128, 512).batches(0)) == 8


def test_a_low_limit_of_open_files_is_raised_as_far_as_the_system_allows(config):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # two segment tables and two stores take six
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 3, hard))
    try:
        assert len(make_loader(Corpus.open(config.data.path), config.data, 0, 0, 1, 8, 128, 512).batches(0)) == 8
        if hard != resource.RLIM_INFINITY:
            with pytest.raises(
                UserError, match=rf"{10**12} token shards.* {3 * 10**12 + 256} open files.* {hard}; .*data\.shard_bytes"
            ):
                allow_open_files(10**12)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_all_token_shards_can_be_opened_without_a_loader(config):
    """A search or an evaluation reads the documents of all stores."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 1, hard))
    try:
        documents = Corpus.open(config.data.path).documents()
        assert all(len(documents[index]) for index in range(len(documents)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_exception_on_a_thread_is_raised_at_its_step_and_ends_the_threads():
    def make(step: int) -> int:
        if step == 3:
            raise ValueError("step 3 is damaged")
        return step

    before, seen = threading.active_count(), []
    with pytest.raises(ValueError, match="step 3 is damaged"):
        seen.extend(prefetched(make, count(), 2, 2))
    assert threading.active_count() == before
    batches = prefetched(make, range(3), 1, 1)
    assert next(batches) == 0
    batches.close()
    assert threading.active_count() == before


def test_no_more_steps_are_made_ahead_than_asked_for():
    begun = []
    batches = prefetched(lambda step: begun.append(step) or step, range(100), 3, 1)
    for step in range(10):
        assert next(batches) == step
        assert len(begun) <= step + 1 + 3
    batches.close()
    assert len(begun) <= 13
