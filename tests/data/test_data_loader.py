"""The loader is a function: the same step gives the same batches, whatever was asked before and on however many ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lr2train.config import Config, LongAttention, SourceConfig, UserError
from lr2train.data.batch import IGNORE, LONG, SHORT
from lr2train.data.corpus import Corpus
from lr2train.data.loader import make_loader
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
    return [make_loader(config.data, seed, rank, size, segments_per_step, 128, 512) for rank in range(size)]


def segments(loader, step: int) -> list[tuple[str, bytes]]:
    """A step's segments as (window, what makes each unlike the others)."""
    return [(batch.window, batch.tokens.tobytes()) for batch in loader.batches(step)]


def same(left, right) -> bool:
    arrays = all(np.array_equal(getattr(left, name), getattr(right, name)) for name in ("tokens", "labels", "positions"))
    return arrays and (left.spans, left.window, left.n_target_tokens) == (right.spans, right.window, right.n_target_tokens)


def test_a_step_does_not_depend_on_the_steps_before(config):
    (walked,), (jumped,) = loaders(config, 1), loaders(config, 1)
    history = [walked.batches(step) for step in range(12)]
    for step in (11, 3, 7):
        assert all(same(a, b) for a, b in zip(history[step], jumped.batches(step), strict=True))
    assert walked.fingerprint == jumped.fingerprint


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_share_the_window_of_every_micro_step(config, size):
    ranks = loaders(config, size)
    windows = [[[batch.window for batch in rank.batches(step)] for rank in ranks] for step in range(10)]
    assert all(of_rank == step[0] for step in windows for of_rank in step)
    assert {window for step in windows for window in step[0]} == {SHORT, LONG}


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_an_epoch_covers_every_segment_on_any_number_of_ranks(config, size):
    ranks = loaders(config, size)
    micro_steps = sum(-(-ranks[0].n_segments(window) // size) for window in (SHORT, LONG))
    seen = [[segment for step in range(rank.steps_per_epoch) for segment in segments(rank, step)][:micro_steps] for rank in ranks]
    times = Counter(segment for of_rank in seen for segment in of_rank)
    for window in (SHORT, LONG):
        assert sum(tag == window for tag, _ in times) == ranks[0].n_segments(window)
        assert sum(count - 1 for (tag, _), count in times.items() if tag == window) < size


def test_the_order_of_a_window_does_not_depend_on_the_number_of_ranks(config):
    def order(size: int, window: str) -> list[bytes]:
        ranks = loaders(config, size)
        steps = ([segments(rank, step) for rank in ranks] for step in range(30))
        return [one for step in steps for micro_step in zip(*step, strict=True) for tag, one in micro_step if tag == window]

    for window in (SHORT, LONG):
        one, four = order(1, window), order(4, window)
        n = min(len(one), len(four))  # more than an epoch of it
        assert n > loaders(config, 1)[0].n_segments(window)
        assert one[:n] == four[:n]


def test_windows_are_spread_evenly_and_epochs_differ(config):
    (loader,) = loaders(config, 1)
    n_short, n_long = loader.n_segments(SHORT), loader.n_segments(LONG)
    tags = [tag for step in range(6 * loader.steps_per_epoch) for tag, _ in segments(loader, step)]
    share = n_long / (n_short + n_long)
    assert max(abs(tags[:n].count(LONG) - n * share) for n in range(1, len(tags))) <= 0.5 + 1e-9
    order = [one for step in range(3 * loader.steps_per_epoch) for tag, one in segments(loader, step) if tag == LONG]
    assert sorted(order[:n_long]) == sorted(order[n_long : 2 * n_long])
    assert order[:n_long] != order[n_long : 2 * n_long]
    (other,) = loaders(config, 1, seed=1)
    assert order != [one for step in range(3 * loader.steps_per_epoch) for tag, one in segments(other, step) if tag == LONG]


@pytest.mark.parametrize("attention", list(LongAttention))
def test_labels_never_cross_documents(config, attention):
    config.data.long_attention = attention
    (loader,) = loaders(config, 1)
    bos, eos = 0, 1
    for batch in (batch for step in range(6) for batch in loader.batches(step)):
        inside = np.concatenate([np.arange(start, stop) for start, stop in batch.spans])
        tokens, labels = batch.tokens[inside], batch.labels[inside]
        assert (labels[tokens == eos] == IGNORE).all()
        assert not (labels == bos).any()
        assert (labels[tokens != eos] >= 0).all()
        outside = np.setdiff1d(np.arange(512), inside)
        assert (batch.labels[outside] == IGNORE).all()
        restarts = batch.window == SHORT or attention is LongAttention.document
        assert all((batch.positions[start] == 0) for start, _ in batch.spans)
        assert batch.positions.max() < 512
        assert restarts or batch.spans == ((0, 512),)


def test_a_loader_that_does_not_fit_the_model_is_refused(config):
    for words, arguments in (
        ("is not divisible by the 3 data-parallel ranks", (0, 0, 3, 8, 128, 512)),
        ("model.original_window_tokens=256, but the corpus", (0, 0, 1, 8, 256, 512)),
        ("exceeds rope.target_window_tokens=500", (0, 0, 1, 8, 128, 500)),
    ):
        with pytest.raises(UserError, match=words):
            make_loader(config.data, *arguments)


def test_a_corpus_that_is_not_there_or_damaged_is_refused(config, tmp_path):
    with pytest.raises(UserError, match="run prepare"):
        Corpus.open(tmp_path)
    corpus = Corpus.open(config.data.path)
    (tmp_path / "segments.npz").write_bytes((corpus.folder / "segments.npz").read_bytes()[:-30])
    with pytest.raises(UserError, match="is unusable"):
        Corpus(tmp_path, corpus.manifest).pieces(SHORT)
