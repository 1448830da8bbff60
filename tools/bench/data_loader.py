"""Loader throughput beside a plain ``np.memmap`` over the same files; memory growth; waiting of ranks.

The plain side reads 131,072 tokens at a random place of a mapped file, without documents, positions and windows. Both
sides alternate, a few segments at a time. A figure is the median over rounds of the loader's throughput over the plain
side's. Warm sides are timed by the CPU time of their thread, which other load disturbs less; cold sides by wall clock.

A batch of the loader holds ids as stored; labels and positions are made on the device. Plain sides make:

``warm_long``           int64 tokens and next tokens, as nanoGPT's and Megatron's readers do; files in the page cache
``warm_tokens_alone``   int64 tokens alone
``warm_short``          int64 tokens and next tokens of as many pieces as the loader's short segment has documents
``cold_copy``           a copy, two bytes a token; files are dropped from the page cache before every round
``warm_copy``           a copy of cached files; no bound: the copy takes 20 us, and finding documents takes time
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lr2train.config import DataConfig
from lr2train.data.batch import LONG, SHORT
from lr2train.data.corpus import Corpus
from lr2train.data.feed.loader import SegmentLoader, make_loader
from lr2train.data.feed.order import Order, Schedule, part
from tools.bench import synthetic
from tools.bench.figures import Figure

SEGMENT_TOKENS = 131072
_AT_LEAST = 0.8
_DP_SIZE = 8


def measure(quick: bool) -> Iterator[Figure]:
    """Throughput, memory, waiting."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = synthetic.make(Path(folder), 60_000_000 if quick else 600_000_000, SEGMENT_TOKENS)
        files = sorted(Path(folder).rglob("*.bin"))
        print(f"corpus: {sum(file.stat().st_size for file in files) / 2**30:.2f} GiB of tokens in {len(files)} files")
        yield from _throughput(corpus, files, rounds=11 if quick else 31)
        yield from _memory(corpus)
        yield from _waiting(corpus)


def _loader(corpus: Corpus) -> SegmentLoader:
    loader = make_loader(Corpus.open(corpus.folder), DataConfig(), 0, 0, 1, _DP_SIZE)
    assert isinstance(loader, SegmentLoader)
    return loader


def _throughput(corpus: Corpus, files: list[Path], rounds: int) -> Iterator[Figure]:
    rng = np.random.default_rng(0)
    for file in files:
        file.read_bytes()  # into the page cache
    took = _alternating(_warm_sides(corpus, rng), rounds, 24)
    for name, times in took.items():
        print(f"{name}: {np.median(times) * 1e6:.0f} us a segment, warm")
    yield Figure("loader_over_memmap_warm_long", _ratio(took["plain_long"], took["loader_long"]), at_least=_AT_LEAST)
    yield Figure("loader_over_memmap_warm_short", _ratio(took["plain_short"], took["loader_short"]), at_least=_AT_LEAST)
    yield Figure(
        "loader_over_memmap_warm_tokens_alone", _ratio(took["plain_tokens"], took["loader_long"]), at_least=_AT_LEAST
    )
    yield Figure("loader_over_memmap_warm_copy", _ratio(took["plain_copy"], took["loader_long"]))
    yield from _cold(corpus, files, rounds, rng)


def _warm_sides(corpus: Corpus, rng: np.random.Generator) -> dict[str, Callable[[], object]]:
    """Each side has its own mappings: the first reader of a page pays more."""
    loader, lengths = _loader(corpus), _lengths(corpus, rng)
    pair, tokens, copied, short = (PlainReader(_files(corpus, source), rng) for source in (LONG, LONG, LONG, SHORT))
    n_long, n_short = loader.n_segments(LONG), loader.n_segments(SHORT)
    return {
        "loader_long": lambda: loader.load([(LONG, int(rng.integers(n_long)))]),
        "plain_long": lambda: pair.pair([SEGMENT_TOKENS]),
        "plain_tokens": lambda: tokens.tokens(SEGMENT_TOKENS),
        "plain_copy": lambda: copied.copied(SEGMENT_TOKENS),
        "loader_short": lambda: loader.load([(SHORT, int(rng.integers(n_short)))]),
        "plain_short": lambda: short.pair(next(lengths)),
    }


def _cold(corpus: Corpus, files: list[Path], rounds: int, rng: np.random.Generator) -> Iterator[Figure]:
    """A step's segments. Both sides reopen the files after the cache was dropped: mapped pages would stay."""
    took: dict[str, list[float]] = {"loader": [], "plain": []}
    for _ in range(rounds):
        for name, open_side in (("loader", _open_loader), ("plain", _open_plain)):
            gc.collect()
            _drop(files)
            took[name].append(_seconds_each(open_side(corpus, rng), 2, time.perf_counter) / _DP_SIZE)
    for name, times in took.items():
        print(f"{name}: {np.median(times) * 1e6:.0f} us a segment, cold")
    yield Figure("loader_over_memmap_cold_copy", _ratio(took["plain"], took["loader"]), at_least=_AT_LEAST)


def _open_loader(corpus: Corpus, rng: np.random.Generator) -> Callable[[], object]:
    opened = _loader(corpus)
    n = opened.n_segments(LONG)
    return lambda: opened.load([(LONG, int(segment)) for segment in rng.integers(n, size=_DP_SIZE)])


def _open_plain(corpus: Corpus, rng: np.random.Generator) -> Callable[[], object]:
    opened = PlainReader(_files(corpus, LONG), rng)
    return lambda: [opened.copied(SEGMENT_TOKENS) for _ in range(_DP_SIZE)]


class PlainReader:
    """Reads at random places of mapped files."""

    def __init__(self, files: list[Path], rng: np.random.Generator) -> None:
        self._mapped, self._rng = [np.memmap(file, np.uint16, "r") for file in files], rng

    def _view(self, n: int) -> np.ndarray:
        tokens = self._mapped[int(self._rng.integers(len(self._mapped)))]
        at = int(self._rng.integers(len(tokens) - n))
        return tokens[at : at + n]

    def copied(self, n: int) -> np.ndarray:
        return self._view(n).copy()

    def tokens(self, n: int) -> np.ndarray:
        return self._view(n).astype(np.int64)

    def pair(self, lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and next tokens of pieces of these lengths."""
        if len(lengths) == 1:
            view = self._view(lengths[0] + 1)
            return view[:-1].astype(np.int64), view[1:].astype(np.int64)
        tokens, following, at = np.zeros(SEGMENT_TOKENS, np.int64), np.zeros(SEGMENT_TOKENS, np.int64), 0
        for n in lengths:
            view = self._view(n + 1)
            tokens[at : at + n], following[at : at + n] = view[:-1], view[1:]
            at += n
        return tokens, following


def _lengths(corpus: Corpus, rng: np.random.Generator) -> Iterator[list[int]]:
    """Lengths of the pieces of random short segments."""
    table = corpus.segment_table(SHORT)
    while True:
        rows = table.spans_of(int(rng.integers(table.n_segments)))
        yield (table.stop[rows.start : rows.stop] - table.start[rows.start : rows.stop]).tolist()


def _files(corpus: Corpus, source: str) -> list[Path]:
    """A source's token files."""
    return sorted((corpus.folder / "store" / source).glob("train-*.bin"))


def _drop(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _alternating(sides: dict[str, Callable[[], object]], rounds: int, n: int) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, read in sides.items():
            took[name].append(_seconds_each(read, n, time.thread_time))
    return {name: times[1:] for name, times in took.items()}  # the first round maps the pages


def _seconds_each(read: Callable[[], object], n: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(n):
        read()
    return (clock() - start) / n


def _ratio(plain: list[float], ours: list[float]) -> float:
    """Median over rounds of the loader's throughput over the plain side's."""
    return float(np.median(np.array(plain) / np.array(ours)))


def _memory(corpus: Corpus) -> Iterator[Figure]:
    """Growth of anonymous memory between the first tenth and the end of an epoch."""
    loader = _loader(corpus)
    grown, steps = [], loader.steps_per_epoch
    for step in range(steps):
        loader.batches(step)
        grown.append(_anonymous_mib())
    early = float(np.median(grown[steps // 10 : steps // 5]))
    print(
        f"anonymous memory: {early:.1f} MiB after a tenth of an epoch of {steps} steps, {grown[-1]:.1f} MiB at its end"
    )
    yield Figure("anonymous_memory_growth_mib", float(np.median(grown[-steps // 10 :])) - early, at_most=8.0)


def _anonymous_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def _waiting(corpus: Corpus) -> Iterator[Figure]:
    """Share of attention time that ranks wait for the costliest segment of a micro-batch, in random order and in ours.

    Segments are short, or long with a document mask.
    """
    for window in (SHORT, LONG):
        table = corpus.segment_table(window)
        lengths = table.stop.astype(np.float64) - table.start
        costs = np.bincount(table.segment, weights=lengths**2)
        n = len(costs) // _DP_SIZE
        order = Order(Schedule({SHORT: 0, LONG: 0, window: len(costs)}, _DP_SIZE), {window: costs}, 0)
        ours = np.stack([part(order.group(group)[1], rank, _DP_SIZE) for group in range(n) for rank in range(_DP_SIZE)])
        plain = np.random.default_rng(0).permutation(len(costs))[: n * _DP_SIZE]
        yield Figure(f"attention_wait_{window}_plain_order", _waited(costs[plain].reshape(-1, _DP_SIZE)))
        yield Figure(f"attention_wait_{window}", _waited(costs[ours].reshape(-1, _DP_SIZE)), at_most=0.1)


def _waited(micro_batches: np.ndarray) -> float:
    return float(1 - micro_batches.mean() / micro_batches.max(axis=1).mean())
