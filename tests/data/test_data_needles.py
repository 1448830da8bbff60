"""Needle documents: exact length, exact answers, whatever the tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lr2train.config import NeedleConfig, UserError
from lr2train.data import tokenizer as ours
from lr2train.data.needles import N_KEYS, WORDINGS, NeedleDocument, NeedleMaker, check_needles

TEXT = ["One of the special magic numbers is: 6716097. The magic number of old-kite is: 555 1234567 12 what\nx = 1234 and 99 5551\n" * 30]


def trained_pairs():
    return ours.train(TEXT, 420)


def trained(pre_tokenizer, decoder, normalizer=None):
    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer, core.decoder = pre_tokenizer, decoder
    if normalizer is not None:
        core.normalizer = normalizer
    special = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([*TEXT, *map(str, range(1000))], special)
    return ours.Tokenizer(core, 0, 1)


def merging_bytes():
    """GPT-2's kind: the space merges with the digits after it."""
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())


def threes():
    """LLaMA 3's kind: digits in groups of up to three, apart from the space."""
    split = pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated")
    return trained(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)]), decoders.ByteLevel())


def metaspace():
    """SentencePiece's kind: a space is put before whatever comes first; no pre-tokenizer keeps words apart."""
    put_first = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    back = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return trained(pre_tokenizers.Split(Regex(r"\d"), "isolated"), back, put_first)


TOKENIZERS = {make.__name__: make() for make in (trained_pairs, merging_bytes, threes, metaspace)}
FILLER = np.full(5000, 300)


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_answers_are_the_numbers_and_nothing_else(name, wording):
    tokenizer = TOKENIZERS[name]
    maker = NeedleMaker(tokenizer.encode, wording, 7, tokenizer.bos, tokenizer.eos)
    for seed in range(20):
        n_pairs = 1 + seed % 3
        made = maker.make(np.random.default_rng(seed), FILLER, 1500, None, n_pairs, n_pairs)
        assert len(made.tokens) == 1500
        assert made.tokens.dtype == np.int64
        assert len(made.answer_spans) == len(made.answers) == n_pairs
        assert made.answer_spans[-1][1] == 1499
        assert made.tokens[0] == 0
        assert made.tokens[-1] == 1
        for (start, stop), answer in zip(made.answer_spans, made.answers, strict=True):
            assert tokenizer.decode(made.tokens[start:stop]).strip() == answer
            assert len(answer) == 7
            needle = made.tokens[start:stop].tolist()
            assert any(made.tokens[i : i + stop - start].tolist() == needle for i in range(made.answer_spans[0][0] - 20)), (
                "not the needle's own tokens"
            )


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_document_reads_as_the_paper_shows(name):
    tokenizer = TOKENIZERS[name]
    made = without_filler(NeedleMaker(tokenizer.encode, "paper", 7, None, None))
    text = tokenizer.decode(made.tokens)
    key = text.split("mentioned")[0].rsplit("for ", 1)[1].strip()
    (number,) = made.answers
    assert text.strip() == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
        f"One of the special magic numbers for {key} is: {number}. \n"
        f"What is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is {number}"
    )


def without_filler(maker: NeedleMaker) -> NeedleDocument:
    for length in range(20, 1500):
        try:
            return maker.make(np.random.default_rng(1), np.zeros(0, np.int64), length, 0.0)
        except UserError:
            continue
    raise AssertionError


@given(st.integers(200, 400), st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_needle_stands_where_it_was_asked_for(length, depth, seed):
    tokenizer = TOKENIZERS["trained_pairs"]
    filler = np.arange(1000, 1000 + length)  # each place has its own id
    made = NeedleMaker(tokenizer.encode, "code", 5, 0, None).make(np.random.default_rng(seed), filler, length, depth, 3, 2)
    kept = made.tokens[made.tokens >= 1000]
    assert kept.tolist() == filler[: len(kept)].tolist()
    assert made.depth == depth
    start, stop = made.answer_spans[0]
    answer = made.tokens[start:stop].tolist()
    first = next(i for i in range(length) if made.tokens[i : i + len(answer)].tolist() == answer)
    before = int((made.tokens[:first] >= 1000).sum())
    assert abs(before - depth * len(kept)) <= 0.5


@pytest.mark.parametrize(("pairs", "questions"), [(1, 1), (4, 2), (7, 7), (2, 1)])
def test_the_promised_pairs_fit_for_every_draw(pairs, questions):
    tokenizer = TOKENIZERS["threes"]
    maker = NeedleMaker(tokenizer.encode, "plain", 7, 0, None)
    for length in range(30, 400, 7):
        fit = min(pairs, maker.most_pairs(length, questions))
        for seed in range(3 if fit else 0):
            maker.make(np.random.default_rng(seed), FILLER, length, None, fit, min(fit, questions))
    assert maker.most_pairs(20) == 0
    assert maker.most_pairs(4000) > 20


def test_what_cannot_be_made_is_refused():
    encode, rng = TOKENIZERS["threes"].encode, np.random.default_rng(0)
    for words, arguments in (
        ("too short", {"length_tokens": 20}),
        ("and has 9;", {"filler": FILLER[:9]}),
        ("at most one a pair", {"n_pairs": 1, "n_questions": 2}),
        ("depth=-0.1 is not between 0 and 1", {"depth": -0.1}),
        ("depth=1.5", {"depth": 1.5}),
    ):
        with pytest.raises(UserError, match=words):
            NeedleMaker(encode, "paper", 7, None, None).make(rng, **{"filler": FILLER, "length_tokens": 600, **arguments})
    for words, wording, digits in (("wording=prose", "prose", 7), ("digits=0", "paper", 0), ("digits=19", "paper", 19)):
        with pytest.raises(UserError, match=words):
            NeedleMaker(encode, wording, digits, None, None)
    with pytest.raises(UserError, match="no token"):
        NeedleMaker(lambda text: np.zeros(0, np.int64), "paper", 7, None, None).make(rng, FILLER, 600)


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_pairs", 0), ("max_pairs", N_KEYS + 1), ("max_questions", 0), ("distractors", -1), ("distractors", N_KEYS), ("at_start", 1.1)],
)
def test_knobs_out_of_their_limits_are_named(key, value):
    check_needles(NeedleConfig())
    with pytest.raises(UserError, match=rf"data\.needles\.{key}={value} is not between"):
        check_needles(NeedleConfig(**{key: value}))


def test_keys_are_distinct():
    assert len({WORDINGS["code"].key(index) for index in range(N_KEYS)}) == N_KEYS == 1600
