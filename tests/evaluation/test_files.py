"""Files of benchmarks: what a wrong one is told, and what the cut in the middle keeps."""

import json

import published
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lr2train.config import UserError
from lr2train.evaluation.files import TEXT, TEXT_OR_TEXTS, TEXTS, Source, cut_middle, fitted

SOURCE = Source("eval.some", "SomeBench", "fetch it")
FIELDS = {"a": TEXT, "b": TEXTS, "c": TEXT_OR_TEXTS}
GOOD = {"a": "x", "b": ["y"], "c": "z"}
TOKENIZER = published.byte_tokenizer()


def test_records_are_the_first_lines_that_are_not_empty(tmp_path):
    lines = [json.dumps(GOOD | {"a": str(number)}) for number in range(5)]
    (tmp_path / "x.jsonl").write_text("\n" + "\n \n".join(lines))
    assert [one["a"] for one in SOURCE.records(tmp_path / "x.jsonl", FIELDS, 3)] == ["0", "1", "2"]
    assert len(SOURCE.records(tmp_path / "x.jsonl", FIELDS)) == 5
    assert SOURCE.records(tmp_path / "x.jsonl", FIELDS)[4]["c"] == "z"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"{}{", "record 1, is not valid JSON"),
        (b"[1]", "record 1, is no JSON object"),
        (b"\xff\xfe", "no UTF-8 text"),
        (json.dumps({"a": "x", "b": ["y"]}).encode(), "record 1, has no field c"),
        (b"\n" + json.dumps(GOOD | {"a": 3}).encode(), "record 2, has a field a that is not a text"),
        (json.dumps(GOOD | {"b": []}).encode(), "has a field b that is not a list of texts"),
        (json.dumps(GOOD | {"b": ["x", None]}).encode(), "has a field b that is not a list of texts"),
        (json.dumps(GOOD | {"c": {}}).encode(), "has a field c that is not a text or a list of texts"),
    ],
)
def test_a_wrong_file_is_one_sentence_with_its_name_and_the_remedy(tmp_path, content, words):
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        SOURCE.records(path, FIELDS)
    assert words in str(error.value) and str(path) in str(error.value) and str(error.value).endswith("; fetch it")


@pytest.mark.parametrize("folder", [None, "nowhere"])
def test_a_missing_folder_names_its_key(folder):
    with pytest.raises(UserError, match=r"eval\.some.*fetch it"):
        SOURCE.folder(folder)


@given(st.text(st.characters(codec="ascii"), max_size=200), st.integers(3, 120), st.booleans())
def test_a_cut_prompt_is_the_first_and_the_last_half(text, most, apart):
    found = cut_middle(TOKENIZER, text, most, halves_apart=apart)
    half = most // 2
    if len(text) + 1 <= most:  # <s>
        assert TOKENIZER.decode(found.tokens) == text and found.cut_tokens == 0
    else:
        assert TOKENIZER.decode(found.tokens) == text[: half - 1] + text[len(text) - half :]
        assert found.cut_tokens == len(text) + 1 - 2 * half
    assert found.tokens[0] == TOKENIZER.hf.bos_token_id and len(found.tokens) <= most


@given(st.text(st.sampled_from("aé日😀"), min_size=1, max_size=60), st.integers(16, 60), st.booleans())
def test_a_prompt_never_exceeds_its_room_where_the_cut_makes_more_tokens(text, most, apart):
    """A cut character becomes U+FFFD, once or twice, each of three bytes."""
    whole, found = TOKENIZER.encode(text), cut_middle(TOKENIZER, text, most, halves_apart=apart)
    assert len(found.tokens) <= most
    if found.cut_tokens:
        half = (len(whole) - found.cut_tokens) // 2
        assert most // 2 - 3 <= half <= most // 2, "each side gives up no more than the bytes of a cut character"
        assert found.tokens[: half - 3].tolist() == whole[: half - 3].tolist()
        assert found.tokens[3 - half :].tolist() == whole[3 - half :].tolist()


def test_both_benchmarks_decode_the_halves_in_their_own_way():
    """<s>ab and the first byte of a character, the last two bytes of another and yz."""
    together, apart = (cut_middle(TOKENIZER, "ab日日yz", 8, halves_apart=how) for how in (False, True))
    assert TOKENIZER.decode(together.tokens) == "ab日yz" and together.cut_tokens == 3
    assert TOKENIZER.decode(apart.tokens) == "ab\ufffdyz" and apart.cut_tokens == 5


def test_a_length_without_room_for_a_prompt_is_refused():
    with pytest.raises(UserError, match=r"x generates 40 tokens.* in 41 tokens; set eval\.lengths_tokens"):
        fitted(TOKENIZER, "abc", 41, 40, "x", halves_apart=True)
    assert len(fitted(TOKENIZER, "abc", 42, 40, "x", halves_apart=True).tokens) == 2
    assert len(fitted(TOKENIZER, "abc", 44, 40, "x", halves_apart=True).tokens) == 4
