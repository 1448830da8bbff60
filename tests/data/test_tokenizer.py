"""The trained tokenizer's promises, and reading a tokenizer that came from elsewhere."""

from __future__ import annotations

import json
import multiprocessing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from lr2train.config import SourceConfig, UserError
from lr2train.data import tokenizer as ours
from lr2train.data.ingest.corpus_tokenizer import TrainingText, train_tokenizer
from lr2train.data.ingest.sources import list_input

TEXTS = ["the quick brown fox jumps over the lazy dog, 12 times\n" * 20, "def naïve(x):\n    return x + 1  # ✓\n" * 20]


@pytest.fixture(scope="module")
def trained():
    return ours.train(TEXTS, 400)


def test_every_digit_pair_is_one_token(trained):
    for pair in ours.DIGIT_PAIRS:
        assert len(trained.encode(pair)) == 1
    assert len(trained.encode("x=6716097")) == len(trained.encode("x=")) + 4
    assert [trained.decode([id]) for id in trained.encode("6716097")] == ["67", "16", "09", "7"]


@pytest.mark.parametrize("text", [*TEXTS, " leading", "tabs\t and\r\n", "日本語 ✓ 123", "<s> is text only by name"])
def test_decode_inverts_encode(trained, text):
    assert trained.decode(trained.encode(text)) == text


def test_a_saved_folder_loads_here_and_in_transformers(trained, tmp_path):
    from transformers import AutoTokenizer

    trained.save(tmp_path)
    again, theirs = ours.load(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert (again.bos, again.eos) == (trained.bos, trained.eos) == (0, 1)
    assert again.fingerprint == trained.fingerprint
    assert theirs(TEXTS[1])["input_ids"] == [0, *trained.encode(TEXTS[1])] == [0, *again.encode_batch([TEXTS[1]])[0]]
    assert (theirs.bos_token, theirs.eos_token, len(theirs)) == ("<s>", "</s>", trained.vocab_size)


def test_bos_and_eos_come_from_the_config_else_from_known_names(trained, tmp_path):
    trained.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": None, "eos_token": {"content": "</s>"}}))
    without_bos = ours.load(str(tmp_path))
    assert (without_bos.bos, without_bos.eos, without_bos.n_borders) == (None, 1, 1)
    assert without_bos.bound(np.array([7, 8])).tolist() == [7, 8, 1]
    config.unlink()
    bare = ours.load(str(tmp_path / "tokenizer.json"))
    assert bare.bound([7]).tolist() == [0, 7, 1]


def test_bos_and_eos_are_found_in_the_map_of_special_tokens(trained, tmp_path):
    trained.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}),
    )
    again = ours.load(str(tmp_path))
    assert (again.bos, again.eos) == (0, 1)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]"])
def test_a_broken_tokenizer_config_is_named(trained, tmp_path, content):
    trained.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.tokenizer: .*tokenizer_config\.json"):
        ours.load(str(tmp_path))


def test_unusable_tokenizers_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        ours.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is no tokenizer\.json"):
        ours.load(str(tmp_path))
    with pytest.raises(UserError, match="vocab_size=300"):
        ours.train(TEXTS, 300)


def trained_plainly(texts: list[str], vocab_size: int) -> dict:
    """The merges without bounds on pieces and words: a byte-level BPE as in the library's own documentation."""
    core = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(tokenizers.Regex(r"\d{1,1}"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 100,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return json.loads(core.to_str())["model"]


words = st.sampled_from([*"abc.,-'é日1 \n\t\r\u00a0\u2003\x1c", "the", "don't", "12", "  ", "\n\n", "…", "🙂"])


@given(st.lists(st.lists(words, max_size=40).map("".join), min_size=1, max_size=6), st.integers(1, 20))
@settings(max_examples=60)
def test_training_on_pieces_gives_the_merges_of_whole_texts(texts, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "_PIECE", piece)
        assert all("".join(ours._pieces(text)) == text for text in texts)
        model = json.loads(ours.train(texts, 380).to_json())["model"]
    plain = trained_plainly(texts, 380)
    assert model["merges"][: len(plain["merges"])] == plain["merges"]
    assert list(model["vocab"].items())[: len(plain["vocab"])] == list(plain["vocab"].items())


def test_real_text_is_cut_into_pieces_that_end_before_white_space(monkeypatch):
    monkeypatch.setattr(ours, "_PIECE", 1000)
    text = Path(json.__file__).read_text() + Path(pytest.__file__).read_text()
    pieces = list(ours._pieces(text))
    assert len(pieces) > 5
    assert all(piece[0] in " \n" and before[-1] not in " \n" for before, piece in pairwise(pieces))


def test_very_long_words_are_learned_from_in_parts():
    """Such as a genome: the time of training grows with the square of a word's length."""
    trained = ours.train(["acgt" * 50_000, " " * 100_000, "." * 100_000, "\n" * 100_000], 1000)
    longest = max(len(token) for token in json.loads(trained.to_json())["model"]["vocab"])
    assert 100 < longest <= ours._LONGEST_WORD
    assert trained.decode(trained.encode("acgt" * 1000)) == "acgt" * 1000


def test_training_in_another_process_gives_the_same_tokenizer(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    source = SourceConfig(name="web", path=str(tmp_path / "a.txt"))
    text = TrainingText([(source, list_input(source, 1 << 20).splits)], 10_000, "code", 400)
    train_tokenizer(text, tmp_path / "here")
    monkeypatch.setattr("lr2train.data.ingest.corpus_tokenizer._LITTLE", 0)
    train_tokenizer(text, tmp_path / "apart")
    assert (tmp_path / "here" / "tokenizer.json").read_bytes() == (tmp_path / "apart" / "tokenizer.json").read_bytes()
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(UserError, match=r"data\.sources\.web .* has no document"):
        train_tokenizer(text, tmp_path / "apart")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("multiprocessing.connection.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(text, tmp_path / "apart")
    assert not multiprocessing.active_children(), "Ctrl-C ends it at once"


def test_saving_a_read_folder_copies_no_half_written_file(trained, tmp_path):
    trained.save(tmp_path / "theirs")
    (tmp_path / "theirs" / ".tokenizer.json.1234.tmp").write_text("{")
    ours.load(str(tmp_path / "theirs")).save(tmp_path / "ours")
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
