"""The trained tokenizer's promises, and reading one that came from elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lr2train.config import UserError
from lr2train.data import tokenizer as ours

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


def test_the_folder_loads_here_and_in_transformers(trained, tmp_path):
    from transformers import AutoTokenizer

    trained.save(tmp_path)
    again, theirs = ours.load(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert (again.bos, again.eos, again.fingerprint) == (trained.bos, trained.eos, trained.fingerprint) == (0, 1, trained.fingerprint)
    assert theirs(TEXTS[1])["input_ids"] == [0, *trained.encode(TEXTS[1])] == [0, *again.encode_batch([TEXTS[1]])[0]]
    assert (theirs.bos_token, theirs.eos_token, len(theirs)) == ("<s>", "</s>", trained.vocab_size)


def test_borders_come_from_the_config_else_from_known_names(trained, tmp_path):
    trained.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": None, "eos_token": {"content": "</s>"}}))
    without_bos = ours.load(str(tmp_path))
    assert (without_bos.bos, without_bos.eos, without_bos.n_borders) == (None, 1, 1)
    assert without_bos.bound(np.array([7, 8])).tolist() == [7, 8, 1]
    config.unlink()
    bare = ours.load(str(tmp_path / "tokenizer.json"))
    assert bare.bound([7]).tolist() == [0, 7, 1]


def test_borders_are_found_in_the_map_of_special_tokens(trained, tmp_path):
    trained.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
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
