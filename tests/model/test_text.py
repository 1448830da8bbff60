"""The text of tokens that come one by one, against decoding all of them at once."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lr2train.model.text import Text, special_stops

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
N_PAIRS = 40


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte, some pairs of bytes, and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(first + other for first, other in zip(alphabet[:N_PAIRS], alphabet[9:], strict=False))]
    core = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")


def words_tokenizer() -> PreTrainedTokenizerFast:
    """Words that carry a space before them, which the first word of a text loses; and single bytes."""
    words = ["\u2581a", "\u2581ab", "b", "c\u2581", "\u2581", ".", "\u00e9", "\u6570", "\u2581n't"]
    vocabulary = [("<unk>", 0.0), *((word, -1.0) for word in words), *((f"<0x{n:02X}>", -2.0) for n in range(256))]
    core = Tokenizer(models.Unigram(vocabulary, 0, byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")


TOKENIZERS = {"bytes": bytes_tokenizer(), "words": words_tokenizer()}
texts = st.text(st.sampled_from("ab .\u00e9\u6570\U0001f642\n"), max_size=30)


def tokens_of(name: str, text: str) -> list[int]:
    """A text byte by byte."""
    tokenizer, alphabet = TOKENIZERS[name], sorted(pre_tokenizers.ByteLevel.alphabet())
    if name == "words":
        return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]
    shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [alphabet.index(char) for piece, _ in shown for char in piece]


def said(name: str, tokens: list[int], stops=()) -> tuple[Text, list[str]]:
    """The text after all tokens, and what was certain after each."""
    text, certain = Text(TOKENIZERS[name], stops), []
    for end in range(1, len(tokens) + 1):
        text.take(tokens[:end])
        certain.append(text.certain)
        if text.stopped:
            break
    return text, certain


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150)
@given(text=texts)
def test_a_text_that_comes_byte_by_byte_is_shown_in_whole_characters(name, text):
    found, certain = said(name, tokens_of(name, text))
    assert found.so_far == found.whole(tokens_of(name, text)) == text
    assert all(text.startswith(part) for part in certain)


@settings(max_examples=300)
@given(tokens=st.lists(st.integers(0, 256 + N_PAIRS + 1), max_size=40))
def test_any_tokens_of_bytes_are_shown_as_they_are_decoded_at_once(tokens):
    """Broken characters and special tokens too; the last character may still be open."""
    found, certain = said("bytes", tokens)
    whole = TOKENIZERS["bytes"].decode(tokens, skip_special_tokens=True)
    assert whole.startswith(found.so_far) and not whole[len(found.so_far) :].strip(UNKNOWN)
    assert len(whole) - len(found.so_far) <= 6  # three tokens of two bytes
    assert all(whole.startswith(part) for part in certain)


@settings(max_examples=300)
@given(tokens=st.lists(st.integers(1, 9) | st.sampled_from([266, 267]), max_size=25))
def test_words_keep_the_spaces_between_them(tokens):
    found, _ = said("words", tokens)
    assert found.so_far == TOKENIZERS["words"].decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300)
@example(text="aa.", stops=["a."])
@given(text=texts, stops=st.lists(st.text(st.sampled_from("ab .\u00e9"), min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_its_first_stop_string(name, text, stops):
    tokens = tokens_of(name, text)
    found, certain = said(name, tokens, stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]  # where a stop string is first complete
    read = text[: min(ends)] if ends else text
    wanted = min([read.find(stop) for stop in stops if stop in read], default=len(text))
    assert found.stopped == bool(ends)
    assert found.whole(tokens[: len(certain)]) == text[:wanted]
    assert all(text[:wanted].startswith(part) for part in certain), "nothing of a stop string is shown"
    assert [len(part) for part in certain] == sorted(len(part) for part in certain)


def test_several_tokens_may_come_at_once():
    text = Text(TOKENIZERS["bytes"], ["stop"])
    tokens = tokens_of("bytes", "a text with a stop in its middle")
    text.take(tokens)
    assert text.stopped and text.certain == text.whole(tokens) == "a text with a "


def test_only_the_last_tokens_are_decoded():
    lengths, tokenizer = [], TOKENIZERS["bytes"]

    class Counting:
        def decode(self, tokens, **how):
            lengths.append(len(tokens))
            return tokenizer.decode(tokens, **how)

    text = Text(Counting(), ["never"])
    tokens = tokens_of("bytes", "a long text with \u6570\U0001f642 " * 20)
    for end in range(1, len(tokens) + 1):
        text.take(tokens[:end])
    assert max(lengths) <= 8


def test_special_tokens_among_the_stop_strings():
    tokenizer = TOKENIZERS["bytes"]
    assert special_stops(tokenizer, ["<pad>", "ab", "<end>"]) == {tokenizer.pad_token_id, tokenizer.eos_token_id}
