"""kill -9 at random moments of an epoch: every planned token must be read exactly once.

A process reads step after step as a training does, on a given number of data-parallel ranks, with threads ahead. It
writes the segments of each step to a journal, and a checkpoint every few steps. The process is killed repeatedly, while
it starts or reads, and is started again on another number of ranks. As in training, steps after the last checkpoint are
dropped and read again. In the end the journal must hold every step once, with the segments that an undisturbed process
on one rank reads. The tokens of each segment must be those of its documents, assembled here without the loader.

``python -m tools.crash.data`` runs the measurement. Run as a module, this file is the process that is killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lr2train.config import DataConfig
from lr2train.data.batch import WINDOWS
from lr2train.data.corpus import Corpus
from lr2train.data.feed.loader import SegmentLoader, make_loader
from lr2train.data.feed.prefetch import prefetched
from lr2train.io import read_json, write_json
from tools.bench import synthetic
from tools.bench.figures import Figure

SEGMENT_TOKENS, ORIGINAL_WINDOW_TOKENS = 4096, 512
SEGMENTS_PER_STEP, GROUP_SEGMENTS = 8, 8
_CHECKPOINT_EVERY = 5


def measure(quick: bool) -> Iterator[Figure]:
    """Read an epoch under kills and compare (quick: fewer kills, a smaller corpus)."""
    kills = 4 if quick else 20
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = synthetic.make(
            folder / "corpus", 6_000_000 if quick else 24_000_000, SEGMENT_TOKENS, ORIGINAL_WINDOW_TOKENS
        )
        undisturbed = _expected(corpus)
        killed = _disturb(folder, kills, len(undisturbed))
        lines = _journal(folder / "disturbed")
        print(f"epoch of {len(undisturbed)} steps, killed with so many in the journal: {', '.join(map(str, killed))}")
        print(f"data-parallel ranks in turn: {_runs([line['dp_size'] for line in lines])}")
        yield Figure("epoch_kills", len(killed), at_least=kills)
        steps = Counter(line["step"] for line in lines)
        yield Figure(
            "epoch_steps_missing_or_twice", sum(steps[step] != 1 for step in range(len(undisturbed))), at_most=0
        )
        wrong = sum(sorted(map(tuple, line["segments"])) != undisturbed[line["step"]] for line in lines)
        yield Figure("epoch_steps_unlike_undisturbed", wrong, at_most=0)
        yield Figure("epoch_segments_missing", _missing(corpus, lines), at_most=0)
        yield Figure("epoch_tokens_wrong", _wrong_tokens(corpus, lines), at_most=0)


def _disturb(folder: Path, kills: int, steps: int) -> list[int]:
    """Read an epoch under kills; returns the steps in the journal at each kill."""
    rng, killed = random.Random(0), list[int]()
    while len(killed) < kills:
        process = _start(folder, rng)
        assert process.stdout is not None
        if rng.random() < 0.8:  # the other processes are killed while they start
            left = steps - _checkpoint(folder / "disturbed")
            for _ in range(
                rng.randrange(max(1, left // (kills - len(killed))))
            ):  # the child continues while its lines are read
                process.stdout.readline()
        try:
            process.wait(timeout=rng.uniform(0, 0.02))
            break  # the epoch is over
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            killed.append(len(_journal(folder / "disturbed")))
    last = _start(folder, rng)
    last.communicate()
    assert last.returncode == 0
    return killed


def _start(folder: Path, rng: random.Random) -> subprocess.Popen:
    size, threads = rng.choice([1, 2, 4, 8]), rng.choice([1, 3])
    command = [
        sys.executable,
        "-m",
        "tools.crash.data_epoch",
        str(folder / "corpus"),
        str(folder / "disturbed"),
        str(size),
        str(threads),
    ]
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root})


def read_epoch(corpus_folder: Path, folder: Path, dp_size: int, threads: int) -> None:
    """Read from the last checkpoint to the end of the epoch."""
    ranks = [_loader(corpus_folder, rank, dp_size) for rank in range(dp_size)]
    done = _checkpoint(folder)
    kept = [line for line in _journal(folder) if line["step"] < done]
    folder.mkdir(exist_ok=True)
    _write_lines(folder / "journal.jsonl", kept)
    steps = range(done, ranks[0].steps_per_epoch)
    with (folder / "journal.jsonl").open("a") as journal:
        for step, segments in zip(steps, prefetched(lambda step: _read(ranks, step), steps, 2, threads), strict=True):
            journal.write(json.dumps({"step": step, "dp_size": dp_size, "segments": segments}) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
            print(step, flush=True)
            if (step + 1) % _CHECKPOINT_EVERY == 0:
                write_json(folder / "checkpoint.json", {"step": step + 1})


def _checkpoint(folder: Path) -> int:
    """Steps up to the last checkpoint."""
    return read_json(folder / "checkpoint.json")["step"] if (folder / "checkpoint.json").exists() else 0


def _loader(corpus_folder: Path, rank: int, dp_size: int) -> SegmentLoader:
    data = DataConfig(segment_tokens=SEGMENT_TOKENS, group_segments=GROUP_SEGMENTS)
    loader = make_loader(Corpus.open(corpus_folder), data, 0, rank, dp_size, SEGMENTS_PER_STEP)
    assert isinstance(loader, SegmentLoader)
    return loader


def _read(ranks: list[SegmentLoader], step: int) -> list[tuple[str, int, str]]:
    """(window, number, digest of the tokens) of all ranks' segments."""
    read = []
    for loader in ranks:
        for (window, number), batch in zip(loader.segments(step), loader.batches(step), strict=True):
            read.append((window, number, _digest(batch.tokens)))
    return read


def _digest(tokens: np.ndarray) -> str:
    return hashlib.blake2b(tokens.astype(np.int32).tobytes(), digest_size=8).hexdigest()


def _write_lines(path: Path, lines: list[dict]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(temporary, path)


def _journal(folder: Path) -> list[dict]:
    """Complete lines of the journal; a kill may cut the last line."""
    path = folder / "journal.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if path.exists()
        else []
    )


def _expected(corpus: Corpus) -> list[list[tuple[str, int, str]]]:
    loader = _loader(corpus.folder, 0, 1)
    return [sorted(_read([loader], step)) for step in range(loader.steps_per_epoch)]


def _missing(corpus: Corpus, lines: list[dict]) -> int:
    """Planned segments that no step held, plus repetitions beyond those that fill the groups at an epoch's end."""
    seen = Counter((window, number) for line in lines for window, number, _ in line["segments"])
    wrong = 0
    for window in WINDOWS:
        times = [seen[window, number] for number in range(corpus.segment_table(window).n_segments)]
        borrowed = sum(times) - len(times)
        wrong += times.count(0) + max(0, borrowed - 2 * SEGMENTS_PER_STEP)
    return wrong


def _wrong_tokens(corpus: Corpus, lines: list[dict]) -> int:
    """Segments whose tokens are not their documents'."""
    stores, tables, wrong = corpus.stores(), {window: corpus.segment_table(window) for window in WINDOWS}, 0
    for window, number, digest in {tuple(segment) for line in lines for segment in line["segments"]}:
        table, tokens = tables[window], np.full(SEGMENT_TOKENS, corpus.tokenizer.eos, np.int32)
        for row in table.spans_of(number):
            document = stores[int(table.source[row])][int(table.document[row])]
            part = document[int(table.start[row]) : int(table.stop[row])]
            tokens[int(table.offset[row]) : int(table.offset[row]) + len(part)] = part
        wrong += _digest(tokens) != digest
    return wrong


def _runs(values: list[int]) -> str:
    """Values, without repetitions in a row."""
    return ", ".join(str(value) for number, value in enumerate(values) if number == 0 or value != values[number - 1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("dp_size", type=int)
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    read_epoch(arguments.corpus, arguments.folder, arguments.dp_size, arguments.threads)
