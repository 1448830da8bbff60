"""Tokenizing: MB of text per CPU second from a .jsonl file to finished stores, beside ``datasets.map``.

Each side runs in its own process with single-threaded libraries. Speed counts CPU seconds (user and system, children
included), which other load disturbs little. Sides are interleaved, and medians compared. Our sides include reading,
checking, hashing, writing and checksums; ``datasets.map`` includes reading and its cache file. All sides must produce
the same ids.

LR2TRAIN_BENCH_TEXT names a folder of .txt files, which are repeated. LR2TRAIN_BENCH_TOKENIZER names a tokenizer.json.
The defaults are Python's standard library and a BPE of 8192 entries trained on it.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent

SIDES = ("map", "hf", "gigatoken")
WHOLE_BYTES, QUICK_BYTES = 24_000_000, 6_000_000
DOCUMENT_CHARACTERS = (500, 3000, 12_000, 60_000)  # in turn: web pages, articles, chapters
ROUNDS = 3


def measure(quick: bool) -> Iterable[Any]:
    """MB per CPU second of each side (quick: less text, one round)."""
    from tools.bench.figures import Figure

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = write_text(folder, QUICK_BYTES if quick else WHOLE_BYTES)
        rounds = [{side: _run(side, folder, size) for side in SIDES} for _ in range(1 if quick else ROUNDS)]
    speed = {side: statistics.median(one[side]["mb_per_cpu_s"] for one in rounds) for side in SIDES}
    ids = {one[side]["ids"] for one in rounds for side in SIDES}
    print(
        f"{size / 1e6:.1f} MB of text in {rounds[0]['hf']['documents']} documents, {rounds[0]['hf']['tokens']} "
        f"tokens, {len(rounds)} rounds"
    )
    for side in SIDES:
        walls = ", ".join(f"{one[side]['wall_s']:.1f}" for one in rounds)
        print(f"{side:<10}{speed[side]:>10.2f} MB per CPU second; wall {walls} s")
    yield Figure("distinct_ids_of_the_sides", len(ids), at_most=1)
    yield from (Figure(f"{side}_mb_per_core_s", speed[side]) for side in SIDES)
    yield Figure("hf_over_map", speed["hf"] / speed["map"])
    yield Figure("gigatoken_over_map", speed["gigatoken"] / speed["map"], at_least=3.0)


def write_text(folder: Path, size: int) -> int:
    """Write ``documents.jsonl`` and ``tokenizer.json``; returns the bytes of text."""
    texts = list(_texts(os.environ.get("LR2TRAIN_BENCH_TEXT")))
    given = os.environ.get("LR2TRAIN_BENCH_TOKENIZER")
    if given:
        (folder / "tokenizer.json").write_bytes(Path(given).read_bytes())
    else:
        _train([text[:100_000] for text in texts]).save(str(folder / "tokenizer.json"))
    written = 0
    with (folder / "documents.jsonl").open("w") as file:
        for text in _documents(texts):
            if written >= size:
                break
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
    return written


def _train(texts: list[str]) -> Any:
    """A byte-level BPE with GPT-2's word splitting; gigatoken does not know lr2train's own rule for digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=8192, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return core


def _texts(path: str | None) -> Iterator[str]:
    from lr2train.config import SourceConfig
    from lr2train.data.ingest import sources
    from lr2train.data.ingest.records import ReadCounts

    source = SourceConfig(name="text", kind="folder" if path else "stdlib", path=path)
    yield from (document.text for document in sources.read_source(source, ReadCounts()))


def _documents(texts: list[str]) -> Iterator[str]:
    """Texts cut into documents, repeated without end."""
    number = 0
    while True:
        for text in texts:
            start = 0
            while start < len(text):
                length = DOCUMENT_CHARACTERS[number % len(DOCUMENT_CHARACTERS)]
                if text[start : start + length].strip():
                    yield text[start : start + length]
                start, number = start + length, number + 1


def _run(side: str, folder: Path, size: int) -> dict[str, Any]:
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tools.bench.data_tokenize", side, str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr}")
    result = json.loads(done.stdout.splitlines()[-1])
    return {**result, "mb_per_cpu_s": size / 1e6 / result["cpu_s"]}


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _map_side(folder: Path) -> tuple[float, float, Iterator[Any]]:
    """The usual way: a fast tokenizer of transformers in a batched map with one process."""
    from datasets import load_dataset
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    before, started = _cpu_s(), time.monotonic()
    data = load_dataset(
        "json",
        data_files=str(folder / "documents.jsonl"),
        split="train",
        cache_dir=str(folder / f"cache-{os.getpid()}"),
    )
    made = data.map(
        lambda rows: {"ids": tokenizer(rows["text"], add_special_tokens=False)["input_ids"]},
        batched=True,
        remove_columns=["text"],
    )
    return _cpu_s() - before, time.monotonic() - started, iter(made.with_format("numpy")["ids"])


def _our_side(folder: Path, backend: str) -> tuple[float, float, Iterator[Any]]:
    from lr2train.config import DecontaminateConfig, SourceConfig
    from lr2train.data.ingest import sources
    from lr2train.data.ingest.sources import SourceLimits
    from lr2train.data.ingest.tokenize_split import SplitTask, SplitTokenizer, TokenizeSettings
    from lr2train.data.store import SourceStore
    from lr2train.data.tokenizer import load

    source = SourceConfig(name="text", kind="folder", path=str(folder / "documents.jsonl"))
    home = folder / f"{backend}-{os.getpid()}"
    settings = TokenizeSettings(home, folder / "tokenizer.json", backend, True, 0.0, 4096, DecontaminateConfig())
    borders = load(str(folder / "tokenizer.json")).n_borders
    before, started = _cpu_s(), time.monotonic()
    tokenize = SplitTokenizer(settings)
    splits = sources.list_input(source, 8 << 20).splits
    for number, split in enumerate(splits):
        tokenize(SplitTask(source, split, number, "bench", SourceLimits()), lambda done: None)
    used, wall = _cpu_s() - before, time.monotonic() - started
    store = SourceStore([home / "store" / "text" / f"train-{number:05d}" for number in range(len(splits))])
    return used, wall, (store[document][borders - 1 : -1] for document in range(len(store)))


def _side(side: str, folder: Path) -> None:
    import numpy as np

    used, wall, documents = _map_side(folder) if side == "map" else _our_side(folder, side)
    digest, n, tokens = hashlib.sha256(), 0, 0
    for ids in documents:
        digest.update(np.asarray(ids, dtype=np.int64).tobytes() + b"|")
        n, tokens = n + 1, tokens + len(ids)
    print(json.dumps({"cpu_s": used, "wall_s": wall, "documents": n, "tokens": tokens, "ids": digest.hexdigest()}))


if __name__ == "__main__":
    _side(sys.argv[1], Path(sys.argv[2]))
