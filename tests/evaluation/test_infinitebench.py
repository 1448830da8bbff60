"""InfiniteBench: prompts as its page shows them, scores against restatements, and what is refused."""

import re

import published
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lr2train.config import UserError
from lr2train.evaluation import infinitebench
from lr2train.evaluation.infinitebench import chooses, names_value

TOKENIZER = published.byte_tokenizer()
VALUE = "5e6b7b90-710d-4953-9b18-3e96b2cadbf2"
OPTIONS = ["Snowfield", "Walking {Georgie}", "The Mauras", "Light housework"]
KV = {
    "id": 0,
    "context": f'JSON data:\n{{"a": "b", "k": "{VALUE}"}}',
    "input": '\nKey: "k"\nThe value associated with the specified key is: ',
    "answer": [VALUE],
    "options": [],
}
MC = {"id": 0, "context": "A {book}.", "input": "Who?", "answer": [OPTIONS[1]], "options": OPTIONS}
FILES = {"kv": "kv_retrieval.jsonl", "mc": "longbook_choice_eng.jsonl"}
PROMPTS = {
    "kv": "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
    f'{{"a": "b", "k": "{VALUE}"}}\n\n\nKey: "k"\nThe value associated with the specified key is: ',
    "mc": "Read the book and answer the question.\n\nA {book}.\n\nQuestion: Who?\nA. Snowfield\nB. Walking {Georgie}\n"
    "C. The Mauras\nD. Light housework\n\nThe letter of the correct answer is",
}
BUDGETS = {"kv": 50, "mc": 40}


def task(folder, name, records, length=1000, limit=None):
    published.write_lines(folder / FILES[name], records)
    return infinitebench.tasks([f"infinitebench_{name}"], folder, TOKENIZER, length, limit)[0]


@pytest.mark.parametrize("name", FILES)
def test_a_prompt_is_the_benchmarks_text_and_fits_with_its_budget(tmp_path, name):
    records = [{"kv": KV, "mc": MC}[name]] * 3
    samples = task(tmp_path, name, records).samples()
    assert len(samples) == 3
    assert TOKENIZER.decode(samples[0].request.tokens) == PROMPTS[name]
    assert samples[0].request.max_new_tokens == BUDGETS[name] and samples[0].facts["cut_tokens"] == 0
    short = task(tmp_path, name, records, BUDGETS[name] + 60, limit=2).samples()
    assert [one.request.total_tokens for one in short] == [BUDGETS[name] + 60] * 2
    assert TOKENIZER.decode(short[0].request.tokens) == PROMPTS[name][:29] + PROMPTS[name][-30:]


@pytest.mark.parametrize(("name", "record", "oracle"), [("kv", KV, VALUE), ("mc", MC, "B"), ("mc", MC, OPTIONS[1])])
def test_an_oracle_has_100_and_an_empty_answer_0(tmp_path, name, record, oracle):
    one = task(tmp_path, name, [record])
    (sample,) = one.samples()
    assert published.said(one, sample, oracle) == 100
    assert published.said(one, sample, "") == published.said(one, sample, " \n") == 0


def test_all_forms_of_an_answer_are_read(tmp_path):
    assert task(tmp_path, "kv", [KV | {"answer": VALUE}]).samples()[0].answers == (VALUE,)
    for answer in (OPTIONS[1], [OPTIONS[1]], [OPTIONS[1], "B"]):
        assert task(tmp_path, "mc", [MC | {"answer": answer}]).samples()[0].answers == (OPTIONS[1], "B")


PIECES = [VALUE, VALUE[:-1], VALUE + "x", " ", "\n", ":", '"', "'", ".", ",", "?", "!", "{", "}", "-", "(", "key"]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_a_value_counts_where_white_space_or_a_mark_is_on_both_sides(text):
    edge = r"""[\s:"'.,?!{}]"""
    expected = re.search(rf"(?:^|{edge}){re.escape(VALUE)}(?:{edge}|$)", text) is not None
    assert names_value(text, (VALUE,)) == expected


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (" B. because", True),
        ("BC", True),  # the first letter decides
        ("C", False),
        ("Boats", True),  # so does that of a word
        ("Walking {Georgie}", True),
        ("The answer is: B", True),
        ("The answer is B", True),
        ("The answer is:B", False),  # one character is passed over
        ("the answer is C, not B", False),
        ("My answer:\nB", True),
        ("The answer is", False),
        ("the correct option is B", True),
        ("The answer is D. The option is B", False),  # "answer is" is looked for first
        ("So the option is D, hence the answer is: B", True),
        ("It must be B!", True),
        ("It must be D or B", False),
        ("it is AB", False),  # a part of "ABCD" that is no letter
        ("I do not know", False),
        ("it is (B)", False),
        ("'B'", True),
        ("the answer: Walking {Georgie}", False),  # braces become spaces, so the text is another one
    ],
)
def test_the_choice_of_an_option(said, right):
    assert chooses(said, (OPTIONS[1], "B")) == right


@pytest.mark.parametrize(
    ("name", "record", "words"),
    [
        ("kv", KV | {"answer": ["a", "b"]}, "record 2, has 2 answers instead of 1"),
        ("mc", MC | {"answer": ["nobody"]}, "record 2, has an answer that is none of its options"),
        ("mc", MC | {"answer": ["x", "E"]}, "record 2, has an answer that is none of its options"),
        ("mc", MC | {"options": OPTIONS[:3]}, "record 2, has 3 options instead of 4"),
        ("mc", {"context": "", "input": "", "answer": ""}, "record 2, has no field options"),
        ("kv", {"context": "", "input": ""}, "record 2, has no field answer"),
    ],
)
def test_a_record_of_another_form_is_refused(tmp_path, name, record, words):
    good = {"kv": KV, "mc": MC}[name]
    with pytest.raises(UserError, match=f"{words}.*eval.infinitebench"):
        task(tmp_path, name, [good, record]).samples()


def test_what_cannot_be_asked_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"infinitebench_kv generates 50 tokens.*eval\.lengths_tokens"):
        task(tmp_path, "kv", [KV], 51).samples()
    with pytest.raises(UserError, match=r"longbook_choice_eng\.jsonl does not exist \(eval\.infinitebench\)"):
        infinitebench.tasks(["infinitebench_mc"], tmp_path, TOKENIZER, 1000, None)[0].samples()
    with pytest.raises(UserError, match=r"eval\.infinitebench=/nowhere is not a folder"):
        infinitebench.tasks(["infinitebench_mc"], "/nowhere", TOKENIZER, 1000, None)
