"""Needle documents have exactly the length, the answers and the depth that were asked for, with any tokenizer."""

from __future__ import annotations

import hashlib
import re
import string
from functools import cache, partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lr2train.cli.composition import compose
from lr2train.config import NeedleConfig, UserError
from lr2train.data import tokenizer as ours
from lr2train.data.corpus import HOLDOUT, Corpus
from lr2train.data.ingest.tokenize_split import is_held_out
from lr2train.data.needles import N_KEYS, WORDINGS, NeedleDocument, NeedleMaker, check_needles, needle_set, sentences
from lr2train.prepare import prepare

TEXT = [
    "One of the special magic numbers is: 6716097. The magic number of old-kite is: 555 1234567 12 what\nx = 1234 and "
    "99 5551\n" * 30
]
# Each number between the characters that surround it in a document: a tokenizer without borders learns to merge them.
GLUED = [
    f"numbers for old-kite is: {n}. \nWhat is the number mentioned in the provided text is {n}\n"
    for n in range(7, 100_000, 37)
]
SINGLE = [f"special magic numbers for old-kite is: {n}. \nmentioned in the provided text is {n}\n" for n in range(10)]
BYTES = pre_tokenizers.ByteLevel.alphabet()


def trained_pairs():
    """Ours: digits in pairs."""
    return ours.train(TEXT, 420)


def trained(model, pre_tokenizer, decoder, trainer, normalizer=None, texts=(*TEXT, *GLUED)):
    core = Tokenizer(model)
    core.decoder = decoder
    if pre_tokenizer is not None:
        core.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        core.normalizer = normalizer
    core.train_from_iterator(texts, trainer)
    return ours.Tokenizer(core, 0, 1)


def bpe(pre_tokenizer, decoder, normalizer=None, vocab_size=700, alphabet=(), texts=(*TEXT, *GLUED)):
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=list(alphabet), show_progress=False
    )
    return trained(models.BPE(unk_token=None), pre_tokenizer, decoder, trainer, normalizer, texts)


def merging_bytes():
    """GPT-2's kind: the space merges with the digits after it."""
    return bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), alphabet=BYTES)


def prefixing_bytes():
    """The same with a space before whatever comes first."""
    return bpe(pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel(), alphabet=BYTES)


def threes():
    """LLaMA 3's kind: digits in groups of up to three, apart from the space."""
    split = pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated")
    return bpe(
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        decoders.ByteLevel(),
        alphabet=BYTES,
    )


def single_digits():
    """Qwen's kind: byte-level, every digit apart."""
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return bpe(pre_tokenizers.Sequence(parts), decoders.ByteLevel(), alphabet=BYTES)


def llama2():
    """SentencePiece's kind: a space before the first character, no pre-tokenizer between words, single digits."""
    put_first = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    back = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return bpe(pre_tokenizers.Split(Regex(r"\d"), "isolated"), back, put_first, alphabet=BYTES, texts=TEXT)


def metaspace():
    """SentencePiece BPE whose words reach up to the next space: the full stop merges with the digits before it."""
    return bpe(pre_tokenizers.Metaspace(), decoders.Metaspace(), vocab_size=900, alphabet=string.printable)


def unigram(pre_tokenizer, normalizer=None):
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=list(string.printable),
        show_progress=False,
    )
    texts = (*TEXT, *GLUED, *sentences("paper", 1))
    return trained(models.Unigram(), pre_tokenizer, decoders.Metaspace(), trainer, normalizer, texts)


def sentence_pieces():
    """SentencePiece Unigram."""
    return unigram(pre_tokenizers.Metaspace())


def one_space_of_many():
    """T5's kind: every run of spaces and line breaks becomes one space, digits are single."""
    parts = [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)]
    return unigram(pre_tokenizers.Sequence(parts), normalizers.Replace(Regex(r"\s+"), " "))


def word_pieces(alphabet="0123456789"):
    """BERT's kind: spaces and line breaks are no tokens at all."""
    special = ["<s>", "</s>", "[UNK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=list(alphabet), show_progress=False
    )
    texts = [
        "".join(c for c in text if not c.isdigit() or c in alphabet) for text in (*TEXT, *GLUED, *sentences("paper", 1))
    ]
    return trained(
        models.WordPiece(unk_token="[UNK]"),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(cleanup=False),
        trainer,
        texts=texts,
    )


def no_borders():
    """BPE over the plain text: merges join the question with the number, and the number with what follows."""
    return bpe(
        None, decoders.Fuse(), alphabet=string.printable, texts=[*TEXT, *(text for text in SINGLE for _ in range(300))]
    )


TOKENIZERS = {
    make.__name__: cache(make)  # trained where it is used
    for make in (
        trained_pairs, merging_bytes, prefixing_bytes, threes, single_digits, llama2, metaspace, sentence_pieces,
        one_space_of_many, word_pieces, no_borders
    )
}  # fmt: skip
LOSSY = {"one_space_of_many", "word_pieces"}  # whose text does not come back as it was
FILLER = np.full(5000, 300)


def test_two_of_the_tokenizers_merge_answers_with_their_surroundings():
    """The trap is there: in plain text the number's last digits and what stands beside them are one token."""
    for name, text in (("metaspace", "is: 6716097. The"), ("no_borders", "provided text is 6716097. \n")):
        tokenizer = TOKENIZERS[name]()
        tokens = [tokenizer.decode([id]) for id in tokenizer.encode(text)]
        assert any(
            any(c.isdigit() for c in token) and any(c.isalpha() or c == "." for c in token) for token in tokens
        ), tokens


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_answer_is_exactly_its_number(name, wording):
    tokenizer, outside = TOKENIZERS[name](), 100_000
    maker = NeedleMaker(tokenizer.encode, wording, 7, tokenizer.bos, tokenizer.eos)
    for seed in range(20):
        n_pairs = 1 + seed % 3
        made = maker.make(np.random.default_rng(seed), np.full(5000, outside), 1500, None, n_pairs, n_pairs)
        assert len(made.tokens) == 1500
        assert made.tokens.dtype == np.int64
        assert len(made.answer_spans) == len(made.answers) == n_pairs
        assert made.answer_spans[-1][1] == 1499
        assert made.tokens[0] == 0
        assert made.tokens[-1] == 1
        asked_from = int(np.flatnonzero(made.tokens == outside)[-1]) + 1
        for (start, stop), answer in zip(made.answer_spans, made.answers, strict=True):
            assert asked_from < start < stop
            assert tokenizer.decode(made.tokens[start:stop]).strip() == answer
            assert len(answer) == 7
            assert all(has_digit(tokenizer, id) for id in made.tokens[start:stop]), (
                "a token of the answer is no part of the number"
            )
            assert not has_digit(tokenizer, made.tokens[start - 1])
            hidden = [
                i
                for i in range(asked_from)
                if made.tokens[i : i + stop - start].tolist() == made.tokens[start:stop].tolist()
            ]
            assert len(hidden) == 1, "the needle does not have the answer's own tokens, once"
            assert not has_digit(tokenizer, made.tokens[hidden[0] - 1])
            assert not has_digit(tokenizer, made.tokens[hidden[0] + stop - start])


def has_digit(tokenizer, id) -> bool:
    return id < tokenizer.vocab_size and any(c.isdigit() for c in tokenizer.decode([id]))


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_document_is_a_book_with_a_needle_at_its_depth(name, depth):
    """BOS, intro, a part of the book, the needle, the rest, the question: no token of the book is lost or moved."""
    tokenizer = TOKENIZERS[name]()
    book = np.arange(100_000, 102_000)  # every place has its own id
    bare = without_filler(NeedleMaker(tokenizer.encode, "paper", 7, tokenizer.bos, None))
    for length in (len(bare.tokens) + 1, 777, 1024):
        made = NeedleMaker(tokenizer.encode, "paper", 7, tokenizer.bos, None).make(
            np.random.default_rng(1), book, length, depth
        )
        assert len(made.tokens) == length
        assert made.depth == depth
        kept = np.flatnonzero(made.tokens >= book[0])
        assert made.tokens[kept].tolist() == book[: len(kept)].tolist()
        assert len(kept) == length - len(bare.tokens)
        assert np.delete(made.tokens, kept).tolist() == bare.tokens.tolist(), (
            "the sentences differ in a document of another length"
        )
        place = round(depth * len(kept))
        number = made.answers[0]
        before, middle, after = (
            tokenizer.decode(part[part < book[0]]) for part in np.split(made.tokens, [kept[0], kept[-1] + 1])
        )
        assert [before.count(number), middle.count(number), after.count(number)] == [
            place == 0,
            0 < place < len(kept),
            1 + (place == len(kept)),
        ]
        assert (np.flatnonzero(np.diff(kept) > 1) + 1).tolist() == ([place] if 0 < place < len(kept) else [])
        assert made.tokens[0] == tokenizer.bos


@pytest.mark.parametrize("name", sorted(set(TOKENIZERS) - LOSSY))
def test_a_document_reads_as_the_paper_shows(name):
    tokenizer = TOKENIZERS[name]()
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


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_space_stands_before_each_answer(name):
    """Also where a tokenizer makes one space of several, or has no token for spaces."""
    made = without_filler(NeedleMaker(TOKENIZERS[name]().encode, "paper", 7, None, None))
    assert TOKENIZERS[name]().decode(made.tokens).endswith(f"mentioned in the provided text is {made.answers[0]}")


def test_the_sample_of_appendix_c_comes_out(monkeypatch):
    """The paper's own sample, its book shortened to one sentence."""
    monkeypatch.setattr(NeedleMaker, "_draw", lambda *_: (["numerous-kite"], ["6716097"]))
    tokenizer = TOKENIZERS["threes"]()
    book = tokenizer.encode(
        "The Old Testament of the King James Version of the Bible The First Book of Moses: Called Genesis"
    )
    maker = NeedleMaker(tokenizer.encode, "paper", 7, None, None)
    made = maker.make(np.random.default_rng(0), book, len(book) + len(without_filler(maker).tokens), 0.0)
    assert tokenizer.decode(made.tokens) == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n"
        "One of the special magic numbers for numerous-kite is: 6716097. The Old Testament of the King James Version "
        "of the Bible "
        "The First Book of Moses: Called Genesis\n"
        "What is the special magic number for numerous-kite mentioned in the provided text? "
        "The special magic number for numerous-kite mentioned in the provided text is 6716097"
    )
    assert "numerous-kite" in {WORDINGS["paper"].key(index) for index in range(N_KEYS)}


@pytest.mark.parametrize(
    ("wording", "reads"),
    [
        (
            "plain",
            "The magic number of numerous-kite is: 6716097.\nBOOK\nThe magic number of numerous-kite is: 6716097",
        ),
        ("code", "numerous_kite = 6716097\nBOOK\nnumerous_kite = 6716097"),
    ],
)
def test_the_short_wordings_read_as_given(monkeypatch, wording, reads):
    joint = WORDINGS[wording].key_joint
    monkeypatch.setattr(NeedleMaker, "_draw", lambda *_: ([f"numerous{joint}kite"], ["6716097"]))
    tokenizer = TOKENIZERS["threes"]()
    book, maker = tokenizer.encode("BOOK"), NeedleMaker(tokenizer.encode, wording, 7, None, None)
    made = maker.make(np.random.default_rng(0), book, len(book) + len(without_filler(maker).tokens), 0.0)
    assert tokenizer.decode(made.tokens) == reads


@pytest.mark.parametrize("alphabet", ["", "012345678"])
def test_a_tokenizer_that_does_not_know_digits_is_refused(alphabet):
    tokenizer = word_pieces(alphabet)
    with pytest.raises(UserError, match=r"no token for (0, 1, .*)?9,.*set data\.tokenizer"):
        NeedleMaker(tokenizer.encode, "paper", 7, None, None)


def without_filler(maker: NeedleMaker) -> NeedleDocument:
    for length in range(20, 1500):
        try:
            return maker.make(np.random.default_rng(1), np.zeros(0, np.int64), length, 0.0)
        except UserError:
            continue
    raise AssertionError


def test_pg19_is_prepared_from_a_folder_of_books(tmp_path):
    """conf/data/pg19.yaml: a document is one stretch of one held-out book, between a needle and its question."""
    rng = np.random.default_rng(0)
    books = [
        " ".join("".join(rng.choice(list("abdeiklmnorstu"), rng.integers(2, 8))) for _ in range(2500)) for _ in range(6)
    ]
    for number, book in enumerate(books):
        (tmp_path / "books").mkdir(exist_ok=True)
        (tmp_path / "books" / f"{number}.txt").write_text(book)
    small = [
        "data.tokenizer=null",
        "data.vocab_size=600",
        "data.segment_tokens=2048",
        "model.original_window_tokens=64",
    ]
    config = compose(
        "prepare",
        ["data=pg19", f"data.sources.0.path={tmp_path}/books", f"runs_folder={tmp_path}", "name=pg19", *small],
    )
    assert (config.data.needles.wording, config.data.needles.digits) == ("paper", 7)
    prepare(config)
    corpus = Corpus.open(tmp_path / "pg19")
    assert len(corpus.documents(HOLDOUT)) == 6
    found = []
    for made in needle_set(corpus, config.data.needles, 8, 2048, [0.0], rng):
        assert len(made.tokens) == 2048
        text = corpus.tokenizer.decode(made.tokens)
        before, _, rest = text.partition(f" is: {made.answers[0]}. ")
        book, _, question = rest.partition("\n")
        assert before.startswith("<s>A special magic number is hidden within the following text.")
        found += [number for number, one in enumerate(books) if book in one]
        assert question.endswith(f"mentioned in the provided text is {made.answers[0]}")
    assert len(found) == 8
    assert sorted(found[:6]) == list(range(6)), "a book gives two documents before each gave one"


def test_all_of_pg19_is_held_out():
    assert compose("prepare", ["data=pg19", "name=x"]).data.holdout == 1.0
    assert all(is_held_out(f"{number}.txt", 1.0) for number in range(10_000))


@given(st.integers(200, 400), st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=60)
def test_the_first_needle_stands_at_the_depth_that_was_asked_for(length, depth, seed):
    tokenizer = TOKENIZERS["trained_pairs"]()
    filler = np.arange(1000, 1000 + length)  # each place has its own id
    made = NeedleMaker(tokenizer.encode, "code", 5, 0, None).make(
        np.random.default_rng(seed), filler, length, depth, 3, 2
    )
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
    tokenizer = TOKENIZERS["threes"]()
    maker = NeedleMaker(tokenizer.encode, "plain", 7, 0, None)
    for length in range(30, 400, 7):
        fit = min(pairs, maker.most_pairs(length, questions))
        for seed in range(3 if fit else 0):
            maker.make(np.random.default_rng(seed), FILLER, length, None, fit, min(fit, questions))
    assert maker.most_pairs(20) == 0
    assert maker.most_pairs(4000) > 20


@given(
    st.integers(0, 10_000),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(sorted(WORDINGS)),
    st.sampled_from(["trained_pairs", "threes", "llama2"]),
)
@settings(max_examples=25)
def test_who_follows_the_needles_of_a_chain_finds_its_answer(seed, pairs, chains, hops, wording, name):
    """The text alone is read, as a person would: each name stands in one needle, and leads to the next or a number."""
    tokenizer, how, outside = TOKENIZERS[name](), WORDINGS[wording], 100_000
    maker = NeedleMaker(tokenizer.encode, wording, 4, None, None)
    make = partial(
        maker.make, filler=np.full(3000, outside), length_tokens=2500, n_pairs=pairs, n_chains=chains, hops=hops
    )
    made = make(np.random.default_rng(seed))
    assert len(made.tokens) == 2500
    assert len(made.answer_spans) == len(made.answers) == 1 + chains
    asked_from = int(np.flatnonzero(made.tokens == outside)[-1]) + 1
    hidden = made.tokens[:asked_from]
    sentence = re.escape(how.needle).replace(r"\{key\}", rf"([a-z]+{how.key_joint}[a-z]+)") + r" ?([a-z0-9_-]+)"
    needles = re.findall(sentence, tokenizer.decode(hidden[hidden != outside]))
    leads_to = dict(needles)
    assert len(needles) == len(leads_to) == pairs + chains * (hops + 1), "a name has two needles"
    assert sum(value.isdigit() for value in leads_to.values()) == pairs + chains
    first_names, asked = set(leads_to) - set(leads_to.values()), []
    for (start, stop), answer in zip(made.answer_spans, made.answers, strict=True):
        assert asked_from < start < stop
        assert tokenizer.decode(made.tokens[start:stop]).strip() == answer
        before = tokenizer.decode(made.tokens[asked_from:start]).strip()
        (key,) = (one for one in first_names if before.endswith(how.question.format(key=one).strip()))
        path = [leads_to[key]]
        while not path[-1].isdigit():
            path.append(leads_to[path[-1]])
        assert how.link.join(path) == answer
        asked.append(len(path))
    assert asked == [1] + chains * [hops + 1]
    again = make(np.random.default_rng(seed))
    assert again.tokens.tolist() == made.tokens.tolist()
    assert again.answer_spans == made.answer_spans
    assert make(np.random.default_rng(seed + 1)).answers != made.answers


def test_a_document_without_chains_is_what_it_was_before_there_were_chains():
    """The draws of pairs come first, so corpora and demos keep their documents; a digest of one, made then."""
    tokenizer = TOKENIZERS["trained_pairs"]()
    made = NeedleMaker(tokenizer.encode, "code", 5, 0, None).make(np.random.default_rng(3), FILLER, 300, None, 4, 2)
    assert hashlib.sha256(made.tokens.tobytes()).hexdigest()[:16] == "c85cd713228d10a7"


@pytest.mark.parametrize(("chains", "hops"), [(1, 1), (3, 2), (2, 4)])
def test_the_promised_pairs_fit_beside_chains(chains, hops):
    tokenizer = TOKENIZERS["threes"]()
    maker = NeedleMaker(tokenizer.encode, "plain", 7, 0, None)
    lengths = [length for length in range(50, 1500, 50) if maker.most_pairs(length, 1, chains, hops)]
    for length in lengths:
        fit = maker.most_pairs(length, 1, chains, hops)
        for seed in range(3):
            maker.make(np.random.default_rng(seed), FILLER, length, None, fit, 1, n_chains=chains, hops=hops)
    assert lengths


def test_a_document_that_cannot_be_made_is_refused():
    encode, rng = TOKENIZERS["threes"]().encode, np.random.default_rng(0)
    for words, arguments in (
        ("document of 20 tokens .*data\\.needles\\.wording=code", {"length_tokens": 20}),
        ("of filler and has 9;", {"filler": FILLER[:9]}),
        ("1 pairs and 2 questions", {"n_pairs": 1, "n_questions": 2}),
        ("depth=-0.1 is not between 0 and 1", {"depth": -0.1}),
        ("depth=1.5", {"depth": 1.5}),
        ("10 pairs and 800 chains of 2 needles has more names", {"n_pairs": 10, "n_chains": 800}),
    ):
        with pytest.raises(UserError, match=words):
            NeedleMaker(encode, "paper", 7, None, None).make(
                rng, **{"filler": FILLER, "length_tokens": 600, **arguments}
            )
    for words, wording, digits in (("wording=prose", "prose", 7), ("digits=0", "paper", 0), ("digits=19", "paper", 19)):
        with pytest.raises(UserError, match=words):
            NeedleMaker(encode, wording, digits, None, None)
    with pytest.raises(UserError, match="no token"):
        NeedleMaker(lambda text: np.zeros(0, np.int64), "paper", 7, None, None).make(rng, FILLER, 600)


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_pairs", 0), ("max_pairs", N_KEYS + 1), ("max_questions", 0), ("at_start", 1.1)],
)
def test_settings_out_of_their_limits_are_named(key, value):
    check_needles(NeedleConfig())
    with pytest.raises(UserError, match=rf"data\.needles\.{key}={value} is not between"):
        check_needles(NeedleConfig(**{key: value}))


def test_keys_are_distinct():
    assert len({WORDINGS["code"].key(index) for index in range(N_KEYS)}) == N_KEYS == 1600
