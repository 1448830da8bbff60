"""gigatoken is used only where its ids are those of Hugging Face's tokenizers."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from lr2train.config import DecontaminateConfig, SourceConfig, UserError
from lr2train.data import tokenizer
from lr2train.data.ingest import tokenizer_backend
from lr2train.data.ingest.sources import SourceLimits, list_input
from lr2train.data.ingest.tokenize_split import SplitTask, SplitTokenizer, TokenizeSettings

TEXTS = [
    "the quick brown fox jumps over the lazy dog\n" * 20,
    "def naïve(x):\n    return x + 1  # ✓ <s>\n" * 20,
    "plain words " * 30,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer that both backends read: gigatoken does not know the rule for pairs of digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = tmp_path_factory.mktemp("tokenizer")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    core.save(str(made / "tokenizer.json"))
    return made


def test_gigatoken_gives_the_same_ids(folder):
    known = tokenizer.load(str(folder))
    fast = tokenizer_backend.Encoder(known, "gigatoken")
    for ours, theirs in zip(known.encode_batch(TEXTS), fast.encode(TEXTS), strict=True):
        assert np.array_equal(ours, theirs)


def broken_ids(monkeypatch, after: int):
    """gigatoken with a wrong id in every text after the first ``after``."""
    import gigatoken

    real, calls = gigatoken.Tokenizer.from_json, [0]

    class Wrong:
        def __init__(self, core):
            self.core = core

        def encode(self, text):
            calls[0] += 1
            ids = self.core.encode(text)
            return ids if calls[0] <= after else np.append(ids, 7)

    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", lambda data: Wrong(real(data)))


def test_a_backend_that_differs_is_replaced_or_refused(folder, monkeypatch):
    broken_ids(monkeypatch, 0)
    known, said = tokenizer.load(str(folder)), []
    assert tokenizer_backend.choose_backend(known, "auto", said.append) == "hf"
    assert len(said) == 1
    assert "gigatoken gives other ids than tokenizers for ''" in said[0]
    with pytest.raises(UserError, match=r"data\.tokenizer_backend=gigatoken cannot be used: gigatoken gives other ids"):
        tokenizer_backend.choose_backend(known, "gigatoken", said.append)


def test_a_panic_of_the_backend_is_a_disagreement(folder, monkeypatch):
    class Panic(BaseException):
        """A panic of Rust arrives as a BaseException."""

    class Panicking:
        def encode(self, text):
            raise Panic("index out of bounds")

    monkeypatch.setattr("gigatoken.Tokenizer.from_json", lambda data: Panicking())
    said: list[str] = []
    assert tokenizer_backend.choose_backend(tokenizer.load(str(folder)), "auto", said.append) == "hf"
    assert "gigatoken failed (index out of bounds)" in said[0]


def test_a_missing_backend_is_replaced_with_a_message(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    said: list[str] = []
    assert tokenizer_backend.choose_backend(tokenizer.load(str(folder)), "auto", said.append) == "hf"
    assert "gigatoken is not installed" in said[0]
    assert tokenizer_backend.choose_backend(tokenizer.load(str(folder)), "hf", said.append) == "hf"
    assert len(said) == 1


def test_a_long_document_is_compared_beyond_its_beginning(folder, monkeypatch):
    """A fast tokenizer may cut long texts, so its ids may differ late in a document."""
    known = tokenizer.load(str(folder))
    encoder = tokenizer_backend.Encoder(known, "gigatoken")
    text = "a few words " * 9000
    assert [len(ids) for ids in encoder.encode([text])] == [len(known.encode(text))]
    encoder.begin_split()
    monkeypatch.setattr(encoder, "_fast", lambda texts: [known.encode(one[:50_000]) for one in texts])
    with pytest.raises(tokenizer_backend.Disagreement):
        encoder.encode([text])


def test_a_split_with_differing_ids_is_tokenised_again(folder, tmp_path, monkeypatch):
    """The probes agree; a document of the split does not."""
    lines = "".join(json.dumps({"text": f"{text}{i}"}) + "\n" for i in range(40) for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines)
    source = SourceConfig(name="web", path=str(tmp_path / "a.jsonl"))
    (shard,) = list_input(source, 1 << 30).splits
    made = {}
    for backend, strict in (("hf", False), ("gigatoken", False), ("gigatoken", True)):
        if backend == "gigatoken":
            broken_ids(monkeypatch, 40)  # after the probes, within the split
        runs = tmp_path / f"{backend}-{strict}"
        tokenize = SplitTokenizer(TokenizeSettings(runs, folder, backend, strict, 0.0, 128, DecontaminateConfig()))
        task = SplitTask(source, shard, 0, "f", SourceLimits())
        if strict:
            with pytest.raises(UserError, match="gigatoken gives other ids"):
                tokenize(task, lambda done: None)
        else:
            made[backend] = tokenize(task, lambda done: None)
        monkeypatch.undo()
    assert made["hf"]["files"] == made["gigatoken"]["files"]
    assert "gigatoken gives other ids" in made["gigatoken"]["fallback"]
    assert made["hf"]["fallback"] == ""
