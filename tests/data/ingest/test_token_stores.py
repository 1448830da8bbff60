"""Stage 1: the same stores for any number of workers, limits and kills; a change that makes other tokens is refused."""

from __future__ import annotations

import gzip
import json
import os
import re
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from ranks import forking

from lr2train.cli.door import main
from lr2train.config import Config, DecontaminateConfig, SourceConfig, UserError
from lr2train.data import tokenizer
from lr2train.data.corpus import Corpus, source_store
from lr2train.data.ingest import tokenize_split
from lr2train.data.ingest.records import InputSplit
from lr2train.data.ingest.sources import SourceLimits
from lr2train.data.ingest.split_scheduler import SplitScheduler
from lr2train.data.ingest.tokenize_split import SplitTask
from lr2train.prepare import prepare

FILES = (".bin", ".idx", ".lengths.npy", ".targets.npy", ".hashes.npy", ".origins.txt")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Nine .jsonl files of forty documents of random words, and a tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abdeiklmnorstu"), rng.integers(2, 8))) for _ in range(200)]
    for number in range(9):
        lines = [json.dumps({"text": " ".join(rng.choice(words, rng.integers(5, 200))), "id": i}) for i in range(40)]
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer.train([" ".join(words)], 400).save(folder / "tokenizer")
    return folder


def config(texts: Path, runs: Path, source: dict | None = None, **data) -> Config:
    made = Config(name="corpus", runs_folder=str(runs))
    made.model.original_window_tokens = 128
    made.data.segment_tokens, made.data.tokenizer, made.data.holdout = 512, str(texts / "tokenizer"), 0.2
    made.data.workers, made.data.shard_bytes = 1, 9000
    made.data.sources = [SourceConfig(name="web", path=str(texts), **(source or {}))]
    for key, value in data.items():
        setattr(made.data, key, value)
    return made


def contents(runs: Path, source: str = "web") -> dict[str, bytes]:
    """The bytes of all files of the source's stores, without their manifests."""
    folder = runs / "corpus" / "store" / source
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name.endswith(FILES)}


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("whole")
    prepare(config(texts, runs))
    return runs


def test_the_token_shards_of_a_source_are_one_sequence_of_documents(whole, texts):
    corpus = Corpus.open(whole / "corpus")
    (train,), (held,) = corpus.stores("train"), corpus.stores("holdout")
    assert len(train.shards) == len(held.shards) > 9
    lines = [line for file in sorted(texts.glob("*.jsonl")) for line in file.read_text().splitlines()]
    read = [json.loads(line)["text"] for line in lines]
    by_text = {corpus.tokenizer.decode(one[1:-1]): one for one in [*train, *held]}
    assert len(train) + len(held) == len(by_text) == len(read) == 360
    assert set(by_text) == set(read)
    order = [read.index(corpus.tokenizer.decode(one[1:-1])) for one in train]
    assert order == sorted(order)
    assert (train.lengths == [len(one) for one in train]).all()
    assert train.origins == [train.origin(i) for i in range(len(train))]
    assert all(np.array_equal(train.read(i, 1, 5), train[i][1:5]) for i in range(0, len(train), 7))
    assert len({bytes(row) for row in train.hashes}) == len(train)
    with pytest.raises(IndexError):
        train.locate(len(train))


def test_an_origin_leads_to_its_line(whole, texts):
    (train,) = Corpus.open(whole / "corpus").stores()
    for document in range(0, len(train), 11):
        name, _, place = train.origin(document).partition("@")
        with (texts / name).open("rb") as file:
            file.seek(int(place))
            text = json.loads(file.readline())["text"]
        assert Corpus.open(whole / "corpus").tokenizer.decode(train[document][1:-1]) == text


def test_the_stores_do_not_depend_on_the_number_of_workers(whole, texts, tmp_path):
    prepare(config(texts, tmp_path, workers=3))
    assert contents(tmp_path) == contents(whole)
    assert Corpus.open(tmp_path / "corpus").fingerprint == Corpus.open(whole / "corpus").fingerprint


@pytest.mark.parametrize(
    "limits",
    [
        {"max_documents": 100},
        {"max_bytes": 60_000},
        {"max_tokens": 20_000},
        {"max_documents": 90, "max_tokens": 100_000},
    ],
)
def test_limits_mean_the_same_for_any_number_of_workers_and_splits(texts, tmp_path, limits):
    found = []
    for workers, shard_bytes in ((1, 9000), (1, 1 << 30), (2, 5000)):
        runs = tmp_path / f"{workers}-{shard_bytes}"
        prepare(config(texts, runs, limits, workers=workers, shard_bytes=shard_bytes))
        (store,) = Corpus.open(runs / "corpus").stores()
        found.append((store.origins, [one.tolist() for one in store]))
    assert found[0] == found[1] == found[2]


def test_another_limit_keeps_the_finished_token_shards(whole, texts, tmp_path):
    made = config(texts, tmp_path, {"max_tokens": 20_000})
    prepare(made)
    store = tmp_path / "corpus" / "store" / "web"
    before = {file.name: file.stat().st_ino for file in store.glob("train-*.bin")}
    prepare(config(texts, tmp_path))
    assert contents(tmp_path) == contents(whole)
    kept = [name for name, inode in before.items() if (store / name).stat().st_ino == inode]
    assert len(kept) >= len(before) - 1
    assert run_config(tmp_path)["data"]["sources"][0]["max_tokens"] is None, "what is noted is what was run last"
    finished = {file.name: file.stat().st_ino for file in store.glob("train-*.bin")}
    prepare(made)
    assert Corpus.open(tmp_path / "corpus").documents().lengths.sum() < 20_000 + 5000
    lost = [name for name, inode in finished.items() if (store / name).stat().st_ino != inode]
    assert len(lost) == 1, "a lower limit makes one shard anew and takes none away"
    prepare(config(texts, tmp_path))
    assert contents(tmp_path) == contents(whole)


def run_config(runs: Path) -> dict:
    return json.loads((runs / "corpus" / "prepare.config.json").read_text())


shards_of_documents = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=6),
    min_size=1,
    max_size=6,
)
some = st.one_of(st.none(), st.integers(1, 60))


def shard_result(documents: list[tuple[int, int]], limits: SourceLimits) -> dict:
    """The manifest's counts after one split is read document by document; a document is (bytes, tokens)."""
    n, size, tokens, limited = 0, 0, 0, False
    for of_text, of_tokens in documents:
        if n == limits.documents or (limits.text_bytes is not None and size + of_text > limits.text_bytes):
            limited = True
            break
        n, size, tokens = n + 1, size + of_text, tokens + of_tokens
        if limits.tokens is not None and tokens >= limits.tokens:
            limited = True
            break
    given = {"documents": limits.documents, "text_bytes": limits.text_bytes, "tokens": limits.tokens}
    return {"read_documents": n, "text_bytes": size, "read_tokens": tokens, "limited": limited, "limits": given}


@given(shards_of_documents, some, some, some, st.integers(1, 4), st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_the_scheduler_ends_where_one_reader_would(documents, n, size, tokens, workers, random):
    limits = SourceLimits(n, size, tokens)
    tasks = [SplitTask(SourceConfig(name="a"), InputSplit(str(i), ()), i, "f", limits) for i in range(len(documents))]
    scheduler, busy = SplitScheduler(tasks, {}), []
    while True:
        while len(busy) < workers and (task := scheduler.next_task()) is not None:
            busy.append(task)
        if not busy:
            break
        task = busy.pop(random.randrange(len(busy)))
        scheduler.add_result(task, shard_result(documents[task.number], task.limits))
    assert scheduler.complete
    expected = shard_result([one for shard in documents for one in shard], limits)
    for key in ("read_documents", "text_bytes", "read_tokens"):
        assert sum(made[key] for made in scheduler.counted) == expected[key]


def run_verb(arguments: list[str]) -> None:
    sys.dont_write_bytecode = True  # a limit on file sizes would cut it
    sys.argv = ["prepare", *arguments]
    main("prepare", prepare)


def killed(at: int, arguments: list[str]) -> None:
    """The verb, in a process that kills itself before it renames its file number ``at``."""
    replace, left = os.replace, [at]

    def killing(source, target):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = killing
    run_verb(arguments)


def limited(stderr: Path, arguments: list[str]) -> None:
    """The verb, in a process whose files end at 12 kB."""
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))
    run_verb(arguments)


def in_a_process(body: Callable[..., None], *given: object) -> int | None:
    """The exit code."""
    process = forking().Process(target=body, args=given)
    process.start()
    process.join(60)
    return process.exitcode


def command(texts: Path, runs: Path, *more: str) -> list[str]:
    return [
        f"data.sources=[{{name: web, path: {texts}}}]", f"data.tokenizer={texts / 'tokenizer'}", "data.holdout=0.2",
        "data.segment_tokens=512", "model.original_window_tokens=128", "data.workers=1", "data.shard_bytes=9000",
        f"runs_folder={runs}", "name=corpus", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("at", [3, 19, 60, 111])
def test_a_killed_job_goes_on_with_its_finished_token_shards(whole, texts, tmp_path, at):
    assert in_a_process(killed, at, command(texts, tmp_path)) == -signal.SIGKILL
    store = tmp_path / "corpus" / "store" / "web"
    before = {file.name: file.stat().st_mtime_ns for file in store.glob("train-*.json")}
    prepare(config(texts, tmp_path))
    assert contents(tmp_path) == contents(whole)
    assert before == {name: (store / name).stat().st_mtime_ns for name in before}, "a finished shard was made again"
    assert not list(store.glob(".*.tmp"))


def test_a_change_that_makes_other_tokens_is_refused_with_its_key(texts, tmp_path):
    theirs = tmp_path / "texts"
    theirs.mkdir()
    for file in texts.glob("?.jsonl"):
        (theirs / file.name).write_bytes(file.read_bytes())
    (theirs / "tokenizer").symlink_to(texts / "tokenizer")
    prepare(config(theirs, tmp_path))
    with pytest.raises(UserError, match=r"data\.sources\.web: .*change of data\.holdout; choose another name="):
        prepare(config(theirs, tmp_path, holdout=0.5))
    with pytest.raises(UserError, match=r"change of data\.shard_bytes"):
        prepare(config(theirs, tmp_path, shard_bytes=5000))
    with pytest.raises(UserError, match=r"change of data\.sources\.web\.text_column"):
        prepare(config(theirs, tmp_path, {"text_column": "id"}))
    (theirs / "3.jsonl").write_bytes((theirs / "3.jsonl").read_bytes() + b"\n")
    with pytest.raises(UserError, match="the source's files;"):
        prepare(config(theirs, tmp_path))
    (theirs / "3.jsonl").write_bytes((texts / "3.jsonl").read_bytes())
    tokenizer.train(["another text"], 380).save(tmp_path / "other")
    with pytest.raises(UserError, match=r"data\.tokenizer=.*other\b"):
        prepare(config(theirs, tmp_path, tokenizer=str(tmp_path / "other")))
    assert Corpus.open(tmp_path / "corpus").tokenizer.vocab_size == 400, "the refused one did not replace it"


def test_too_many_broken_records_stop_the_job_and_leave_examples(texts, tmp_path):
    theirs = tmp_path / "texts"
    theirs.mkdir()
    (theirs / "a.jsonl").write_text(
        '{"text": "good enough to be read, and long"}\n' * 90 + "{\n" * 8 + '{"author": "A"}\n' * 2,
    )
    (theirs / "tokenizer").symlink_to(texts / "tokenizer")
    with pytest.raises(
        UserError,
        match=r"10 of 100 records .*\(8 invalid JSON, 2 missing column; a.* has author\).* max_broken_share of 0\.05",
    ):
        prepare(config(theirs, tmp_path))
    rejects = tmp_path / "corpus" / "store" / "web" / "rejects.jsonl"
    examples = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert {(one["reason"], one["beginning"]) for one in examples} == {
        ("invalid JSON", "{\n"),
        ("missing column", '{"author": "A"}\n'),
    }
    made = prepare(config(theirs, tmp_path, {"max_broken_share": 0.1}))
    assert made["sources"][0]["broken_by_reason"] == {"invalid JSON": 8, "missing column": 2}
    assert len((tmp_path / "corpus" / "rejects.jsonl").read_text().splitlines()) == len(examples)


def lines_of(n: int, size: int = 40) -> str:
    return "".join(json.dumps({"text": f"line {number} ".ljust(size, "x")}) + "\n" for number in range(n))


def mostly_good(tmp_path: Path, texts: Path) -> Path:
    """Forty files of a hundred good lines."""
    theirs = tmp_path / "texts"
    theirs.mkdir()
    (theirs / "tokenizer").symlink_to(texts / "tokenizer")
    for number in range(40):
        (theirs / f"{number:02d}.jsonl").write_text(lines_of(100))
    return theirs


def cut_gzip(folder: Path) -> None:
    whole = gzip.compress(lines_of(2000).encode())
    (folder / "b.jsonl.gz").write_bytes(whole[: len(whole) * 2 // 3])


def another_schema(folder: Path) -> None:
    parquet.write_table(
        pa.table({"body": [f"row {number} " + "x" * 40 for number in range(2000)]}),
        folder / "b.parquet",
    )


def one_long_line(folder: Path) -> None:
    (folder / "b.jsonl").write_text(lines_of(1, 400_000))


def many_other_records(folder: Path) -> None:
    (folder / "b.jsonl").write_text('{"body": ""}\n' * 400)


def half_of_the_files(folder: Path) -> None:
    for number in range(40):
        (folder / f"b{number}.jsonl.gz").write_bytes(b"\x1f")


@pytest.mark.parametrize(
    ("damage", "what", "why"),
    [
        (cut_gzip, "bytes of text", "1 unreadable file in b.jsonl.gz"),
        (another_schema, "records", "2000 missing column; b.parquet has body"),
        (one_long_line, "bytes of text", "1 too large"),
        (many_other_records, "records", "400 missing column"),
        (half_of_the_files, "files", "40 unreadable file in b0.jsonl.gz"),
    ],
)
def test_too_much_loss_in_records_files_or_bytes_stops_the_job(texts, tmp_path, damage, what, why):
    """One record, or one small compressed file, may be much of the text."""
    theirs = mostly_good(tmp_path, texts)
    damage(theirs)
    with pytest.raises(
        UserError,
        match=rf"\d+ of \d+ {what} are lost \({why}.*more than its max_broken_share of 0\.05",
    ) as refused:
        prepare(config(theirs, tmp_path, {"max_document_bytes": 100_000}))
    named = re.search(r"set data\.sources\.web\.max_broken_share=([\d.]+) to go on", str(refused.value))
    share = float(named[1]) if named else 0.9  # before a source's end nobody knows how much it will be
    made = prepare(config(theirs, tmp_path, {"max_document_bytes": 100_000, "max_broken_share": share}))
    assert made["sources"][0]["documents"] > 2000
    assert made["sources"][0]["broken"]


def test_a_small_loss_is_reported_and_the_job_goes_on(texts, tmp_path, capsys):
    theirs = mostly_good(tmp_path, texts)
    (theirs / "gone.jsonl").symlink_to("/gone/gone.jsonl")
    (theirs / "notes.md").write_text("notes")
    with (theirs / "00.jsonl").open("a") as file:
        file.write("{\n" * 20)
    prepare(config(theirs, tmp_path))
    said = capsys.readouterr()
    saved = json.loads((tmp_path / "corpus" / "prepare.json").read_text())
    web = saved["not_read"]["web"]
    assert (web["unread"]["files"], web["unread"]["reasons"]) == (1, {"link to nothing": 1})
    assert (web["passed_over"]["kinds"][".md"], saved["sources"][0]["lost_bytes"]) == ({"files": 1, "bytes": 5}, 40)
    for text in (said.out, said.err, (tmp_path / "corpus" / "log.txt").read_text()):
        assert "web: about 1 files with" in text
        assert "1 link to nothing, such as gone.jsonl" in text
        assert re.search(r"passing over 3 files of other kinds with \d+ bytes \(2 \.json, 1 \.md\)", text)
    assert "broken records: 20 with 40 bytes" in said.out
    assert "20 broken records skipped (40 bytes: 20 invalid JSON)" in said.err


def test_unread_and_damaged_files_add_up(texts, tmp_path):
    """Each of the two kinds alone is within max_broken_share."""
    theirs = mostly_good(tmp_path, texts)
    for number in range(2):
        (theirs / f"gone{number}.jsonl").symlink_to("/gone/gone.jsonl")
    (theirs / "b.jsonl.gz").write_bytes(b"\x1f")
    with pytest.raises(
        UserError,
        match=r"about 3 of 43 files are lost \(1 unreadable file, 2 link to nothing in b\.jsonl\.gz\)",
    ):
        prepare(config(theirs, tmp_path))


def test_touched_and_moved_files_are_compared_by_contents_once(texts, tmp_path, monkeypatch):
    theirs, stamps = tmp_path / "texts", (texts / "3.jsonl").stat()
    shutil.copytree(texts, theirs)
    first = prepare(config(theirs, tmp_path))
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "corpus" / "store" / "web").glob("*-0*")}
    os.utime(theirs / "3.jsonl", ns=(0, 0))
    read = []
    contents = tokenize_split.contents_digest
    monkeypatch.setattr(
        tokenize_split,
        "contents_digest",
        lambda task, *more: read.append(task.split.name) or contents(task, *more),
    )
    monkeypatch.setattr(tokenizer.Tokenizer, "encode_batch", None)
    touched = prepare(config(theirs, tmp_path))
    assert len(set(read)) == len(read) > 1
    assert all(name.startswith("3.jsonl") for name in read)
    assert touched["fingerprint"] == first["fingerprint"]
    read.clear()
    prepare(config(theirs, tmp_path))
    assert not read, "they were compared once"
    moved = tmp_path / "moved"
    theirs.rename(moved)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("moved")
    for path in ("moved", "./link/../moved", str(moved)):
        assert prepare(config(Path(path), tmp_path))["fingerprint"] == first["fingerprint"]
    assert before == {file: file.stat().st_mtime_ns for file in before}
    assert run_config(tmp_path)["data"]["sources"][0]["path"] == str(moved)
    data = (moved / "3.jsonl").read_bytes()
    (moved / "3.jsonl").write_bytes(data.replace(b"a", b"b", 1))
    assert (moved / "3.jsonl").stat().st_size == stamps.st_size
    with pytest.raises(UserError, match=r"sources\.web: .* 3\.jsonl\S* has changed .*; choose another name="):
        prepare(config(moved, tmp_path))
    (moved / "3.jsonl").write_bytes(data)
    assert prepare(config(moved, tmp_path))["fingerprint"] == first["fingerprint"]


def test_text_beyond_a_limit_is_not_compared(texts, tmp_path):
    theirs = tmp_path / "texts"
    shutil.copytree(texts, theirs)
    first = prepare(config(theirs, tmp_path, {"max_tokens": 20_000}))
    for file in theirs.glob("*.jsonl"):
        os.utime(file, ns=(0, 0))
    (theirs / "8.jsonl").write_bytes((theirs / "8.jsonl").read_bytes().replace(b"a", b"b"))
    assert prepare(config(theirs, tmp_path, {"max_tokens": 20_000}))["fingerprint"] == first["fingerprint"]


def test_copies_of_a_text_make_the_same_corpus(whole, texts, tmp_path):
    """Such as on another machine, where the files have other times and locations."""
    shutil.copytree(texts, tmp_path / "copy", copy_function=shutil.copyfile)
    prepare(config(tmp_path / "copy", tmp_path))
    assert Corpus.open(tmp_path / "corpus").fingerprint == Corpus.open(whole / "corpus").fingerprint


def test_a_trained_tokenizer_is_kept_where_its_text_was_only_touched(texts, tmp_path):
    theirs = tmp_path / "texts"
    shutil.copytree(texts, theirs)
    first = prepare(config(theirs, tmp_path, tokenizer=None, vocab_size=400))
    for file in theirs.glob("*.jsonl"):
        os.utime(file, ns=(0, 0))
    assert prepare(config(theirs, tmp_path, tokenizer=None, vocab_size=400))["fingerprint"] == first["fingerprint"]


def test_a_manifest_appears_after_the_disk_holds_its_files(texts, tmp_path, monkeypatch):
    """So a power cut at any point leaves no manifest without its files."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noted(handle: int) -> None:
        events.append(("flushed", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def renamed(source, target) -> None:
        events.append(("named", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", renamed)
    prepare(config(texts, tmp_path))
    monkeypatch.undo()
    store = tmp_path / "corpus" / "store" / "web"
    manifests = sorted(store.glob("*-0*.json"))
    assert len(manifests) > 20
    for manifest in manifests:
        named = events.index(("named", str(manifest)))
        for suffix in json.loads(manifest.read_text())["files"]:
            data = manifest.with_suffix(suffix)
            assert events.index(("named", str(data))) < events.index(("flushed", str(data))) < named
        assert ("flushed", str(store)) in events[:named]
    last = events.index(("named", str(store / "source.json")))
    assert all(events.index(("named", str(manifest))) < last for manifest in manifests)
    assert len(events) < 4 * len(manifests) * len(FILES)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_limit_on_file_sizes_names_the_file_and_breaks_nothing(whole, texts, tmp_path, workers):
    arguments = [
        one if not one.startswith("data.workers") else f"data.workers={workers}"
        for one in command(texts, tmp_path, "data.shard_bytes=60000")
    ]
    assert in_a_process(limited, tmp_path / "stderr", arguments)
    said = (tmp_path / "stderr").read_text()
    store_file = r"store/web/\w+-\d+\."
    assert re.search(rf"(File too large.*{store_file}|{store_file}.*File too large)", said), said
    prepare(config(texts, tmp_path, shard_bytes=60_000))
    assert Corpus.open(tmp_path / "corpus").verify() > 0
    assert not list((tmp_path / "corpus").rglob(".*.tmp"))


MEGATRON_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}


class MegatronIndexedDataset:
    """Reads a store as Megatron-LM does (megatron/core/datasets/indexed_dataset.py, _IndexReader).

    Written anew from the published layout.
    """

    def __init__(self, prefix: Path) -> None:
        with Path(f"{prefix}.idx").open("rb") as stream:
            assert stream.read(9) == b"MMIDIDX\x00\x00"
            assert struct.unpack("<Q", stream.read(8)) == (1,)
            self.dtype = MEGATRON_DTYPES[struct.unpack("<B", stream.read(1))[0]]
            (n,) = struct.unpack("<Q", stream.read(8))
            (m,) = struct.unpack("<Q", stream.read(8))
            offset = stream.tell()
        buffer = Path(f"{prefix}.idx").read_bytes()
        self.lengths = np.frombuffer(buffer, np.int32, n, offset)
        self.pointers = np.frombuffer(buffer, np.int64, n, offset + self.lengths.nbytes)
        self.documents = np.frombuffer(buffer, np.int64, m, offset + self.lengths.nbytes + self.pointers.nbytes)
        assert self.lengths.shape[0] == n == self.documents[-1]
        self.data = Path(f"{prefix}.bin").read_bytes()

    def __getitem__(self, sequence: int) -> np.ndarray:
        return np.frombuffer(self.data, self.dtype, self.lengths[sequence], self.pointers[sequence])


def test_megatrons_reader_reads_every_token_shard(whole):
    store = source_store(whole / "corpus", "web")
    for shard in store.shards:
        theirs = MegatronIndexedDataset(shard.prefix)
        assert theirs.dtype == np.uint16
        assert len(theirs.lengths) == len(shard)
        assert all(np.array_equal(theirs[i], shard[i]) for i in range(len(shard)))
        assert [stop - start for start, stop in pairwise(theirs.documents)] == [1] * len(shard)


def test_documents_that_share_text_with_an_evaluation_set_are_left_out(texts, tmp_path):
    theirs = tmp_path / "texts"
    theirs.mkdir()
    question = "How many apples does Anna have, if she buys seven and gives two of them away?"
    filler = " ".join(f"word{i}" for i in range(40))
    rows = [filler, f"{filler}. {question.upper()} {filler}", f"{filler} apples and nothing of it", f"so: {question}"]
    (theirs / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (theirs / "tokenizer").symlink_to(texts / "tokenizer")
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": question, "choices": ["five", "seven"]}) + "\n")
    decontaminate = DecontaminateConfig(files=[str(tmp_path / "eval.jsonl")])
    made = prepare(config(theirs, tmp_path, decontaminate=decontaminate, holdout=0.0, segment_tokens=128))["sources"][0]
    assert (made["documents"], made["contaminated"]) == (2, 2)
    assert made["contaminated_examples"][0] == {
        "origin": f"a.jsonl@{len(json.dumps({'text': rows[0]})) + 1}",
        "words": "how many apples does anna have if she buys seven and gives two",
    }
