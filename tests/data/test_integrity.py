"""A flipped bit or a lost byte in any file of a corpus is found before use; an unchanged file is read once."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from lr2train.config import Config, SourceConfig, UserError
from lr2train.data.corpus import Corpus
from lr2train.data.integrity import write_checksums
from lr2train.data.store import StoreWriter, sealed
from lr2train.inspect import inspect
from lr2train.prepare import prepare

STORE = "store/web/train-00000"
KINDS = [
    *(
        f"{STORE}{suffix}"
        for suffix in (".bin", ".idx", ".lengths.npy", ".targets.npy", ".hashes.npy", ".origins.txt", ".json")
    ),
    "store/web/holdout-00000.bin",
    "store/web/train.usable.npy",
    "store/web/source.json",
    "corpus.json",
    "checksums.json",
    "tokenizer/tokenizer.json",
    "segments.long.npy",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    (runs / "texts").mkdir()
    for number in range(12):
        (runs / "texts" / f"{number}.txt").write_text(
            f"this is the text of number {number % 9}, and it is long enough " * 30
        )
    prepare(config(runs))
    return runs


def config(runs: Path) -> Config:
    made = Config(name="corpus", runs_folder=str(runs))
    made.model.original_window_tokens = 128
    made.data.segment_tokens, made.data.vocab_size, made.data.holdout, made.data.deduplicate = 256, 380, 0.3, "corpus"
    made.data.sources = [SourceConfig(name="web", path=str(runs / "texts"))]
    return made


def copied(whole: Path, folder: Path) -> Path:
    """A copy that keeps the files' times."""
    return Path(shutil.copytree(whole / "corpus", folder / "corpus", copy_function=shutil.copy2))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("seen", [False, True], ids=["new", "verified before"])
@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_is_found(whole, tmp_path, name, seen):
    corpus = copied(whole, tmp_path)
    if seen:
        Corpus.open(corpus).verify()
    flipped(corpus / name)
    with pytest.raises(UserError, match=r"damaged|unusable|not valid JSON"):
        Corpus.open(corpus).verify()


@pytest.mark.parametrize("name", [name for name in KINDS if not name.endswith((".json", "targets.npy"))])
def test_a_cut_file_is_found_by_its_size_alone(whole, tmp_path, name):
    corpus = copied(whole, tmp_path)
    (corpus / name).write_bytes((corpus / name).read_bytes()[:-1])
    with pytest.raises(UserError, match="bytes where"):
        Corpus.open(corpus).verify(full=False)
    (corpus / name).unlink()
    with pytest.raises(UserError, match="is missing"):
        Corpus.open(corpus).verify(full=False)


def test_a_file_that_passed_is_not_read_again(whole, tmp_path):
    corpus = copied(whole, tmp_path)
    (corpus / "verified.json").unlink(missing_ok=True)
    assert Corpus.open(corpus).verify() > 1000
    assert Corpus.open(corpus).verify() == 0
    (corpus / "verified.json").write_text("{")
    assert Corpus.open(corpus).verify() > 1000, "a damaged memory costs only the reading"


def test_a_copy_is_read_anew_although_times_and_memory_travel_with_it(whole, tmp_path):
    Corpus.open(whole / "corpus").verify()
    corpus = copied(whole, tmp_path)
    times = (corpus / f"{STORE}.bin").stat()
    flipped(corpus / f"{STORE}.bin")
    os.utime(corpus / f"{STORE}.bin", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match=r"train-00000\.bin does not have the checksum"):
        Corpus.open(corpus).verify()


@pytest.mark.parametrize(
    "name",
    [
        "segments.long.npy",
        "segments.short.npy",
        "plan.txt",
        "plan.json",
        "store/web/train.usable.npy",
        "checksums.json",
    ],
)
def test_a_missing_file_outside_the_stores_is_made_again(whole, tmp_path, name):
    corpus = copied(whole, tmp_path)
    before = (corpus / name).read_bytes()
    (corpus / name).unlink()
    made = config(whole)
    made.runs_folder = str(tmp_path)
    prepare(made)
    Corpus.open(corpus).verify()
    assert (corpus / name).read_bytes() == before


@pytest.mark.parametrize(
    "name", [f"{STORE}.bin", "store/web/source.json", "segments.long.npy", "corpus.json", "tokenizer/tokenizer.json"]
)
def test_following_the_sentence_about_damage_gives_the_corpus_as_it_was(whole, tmp_path, name):
    """The sentence says which files to remove before prepare runs again."""
    for part in ("texts", "corpus"):
        shutil.copytree(whole / part, tmp_path / part, copy_function=shutil.copy2)
    corpus = tmp_path / "corpus"
    before = {
        str(file.relative_to(corpus)): file.read_bytes()
        for file in corpus.rglob("*")
        if file.name.endswith((".bin", ".idx", ".npy"))
    }
    made = config(whole)
    made.runs_folder = str(tmp_path)
    flipped(corpus / name)
    with pytest.raises(UserError, match=r"(damaged|unusable|not valid JSON).*remove"):
        prepare(made)
    for file in corpus.glob(f"{STORE}.*") if name.startswith(STORE) else [corpus / name, corpus / "corpus.json"]:
        file.unlink(missing_ok=True)
    prepare(made)
    Corpus.open(corpus).verify()
    assert before == {
        str(file.relative_to(corpus)): file.read_bytes()
        for file in corpus.rglob("*")
        if file.name.endswith((".bin", ".idx", ".npy"))
    }


def test_files_that_a_full_disk_left_are_no_part_of_the_corpus_and_are_removed(whole, tmp_path):
    for part in ("texts", "corpus"):
        shutil.copytree(whole / part, tmp_path / part, copy_function=shutil.copy2)
    corpus = tmp_path / "corpus"
    left = [corpus / "tokenizer" / ".tokenizer.json.123.tmp", corpus / "store" / "web" / ".train-00001.bin.123.tmp"]
    left += [corpus / ".plan.txt.123.tmp", corpus / "store" / "web" / ".train.usable.npy.123.tmp"]
    for path in left:
        path.write_text("{")
    Corpus.open(corpus).verify()
    write_checksums(corpus)
    assert not [name for name in sealed(corpus / "checksums.json")["files"] if name.endswith(".tmp")]
    made = config(whole)
    made.runs_folder = str(tmp_path)
    prepare(made)
    assert not any(path.exists() for path in left)
    Corpus.open(corpus).verify()


def denied(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize(
    "where",
    ["numpy.fromfile", "numpy.load", "lr2train.data.integrity.sha256_of", "pathlib.Path.is_file", "pathlib.Path.stat"],
)
def test_a_file_without_read_permission_is_not_called_damaged(whole, tmp_path, monkeypatch, where):
    """Its remedy must not be to remove the file."""
    corpus = Corpus.open(copied(whole, tmp_path))
    (corpus.folder / "verified.json").unlink(missing_ok=True)

    def look() -> None:
        opened = Corpus.open(corpus.folder)
        opened.verify()
        opened.segment_table("long")
        opened.stores()[0].lengths.sum()
        opened.stores()[0].shards[0].flat[:1].sum()

    look()
    (corpus.folder / "verified.json").unlink(missing_ok=True)
    monkeypatch.setattr(where, denied)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\); make it") as refused:
        look()
    monkeypatch.undo()
    assert "remove" not in str(refused.value)
    assert str(corpus.folder) in str(refused.value)


def test_a_store_that_cannot_be_written_names_its_file_and_leaves_nothing(tmp_path, monkeypatch):
    def write() -> None:
        with StoreWriter(tmp_path / "train-00000", 400, {"fingerprint": "f"}) as writer:
            writer.add([1, 2, 3])
            monkeypatch.setattr("os.replace", full)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device") as refused:
        write()
    monkeypatch.undo()
    assert (refused.value.errno, refused.value.filename) == (errno.ENOSPC, str(tmp_path / "train-00000.bin"))
    assert not list(tmp_path.iterdir())


def test_inspect_finds_damage(whole, tmp_path):
    corpus = copied(whole, tmp_path)
    flipped(corpus / f"{STORE}.bin")
    looking = Config(name="any")
    looking.data.path = str(corpus)
    with pytest.raises(UserError, match=r"damaged: .*train-00000\.bin"):
        inspect(looking)
