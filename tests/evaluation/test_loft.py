"""LOFT: a prompt as its example shows it, the choice of the corpus, recall against a restatement, what is refused."""

import published
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lr2train.config import UserError
from lr2train.evaluation import loft
from lr2train.evaluation.loft import listed_ids, recalls

TOKENIZER = published.byte_tokenizer()
CORPUS = [
    {"pid": f"doc{number}", "title_text": title, "passage_text": f" Text {number}. ", "metadata": {}}
    for number, title in enumerate([" One ", "", "childhood abuse law", "{Four}"])
]


def query(number, *pids):
    pairs = [[pid, 1] for pid in pids]
    return {"qid": f"q{number}", "query_text": f" who {number} ", "metadata": {"qrels": pairs}, "answers": pairs}


def fill(folder, short, size="32k", corpus=CORPUS, tests=None):
    place = folder / short / size
    published.write_lines(place / "corpus.jsonl", corpus)
    published.write_lines(place / "few_shot_queries.jsonl", [query(7, "doc3", "doc1"), query(8, "doc0")])
    published.write_lines(place / "test_queries.jsonl", tests or [query(1, "doc2"), query(2, "doc1", "doc3")])
    return place


def task(folder, short, length=40_000, limit=None):
    return loft.tasks([f"loft_{short}"], folder, TOKENIZER, length, limit)[0]


NQ = """\
You will be given a list of documents. You need to read carefully and understand all of them. Then you will be given \
a query, and your goal is to find all documents from the list that can help answer the query. Print out the ID and \
TITLE of each document.

Your final answer should be a list of IDs, in the following format:
Final Answer: [id1, id2, ...]
If there is only one ID, it should be in the format:
Final Answer: [id1]

If there is no perfect answer output the closest one. Do not give an empty final answer.

ID: 0 | TITLE: One | CONTENT: Text 0. | END ID: 0
ID: 1 | TITLE: None | CONTENT: Text 1. | END ID: 1
ID: 2 | TITLE:  law | CONTENT: Text 2. | END ID: 2
ID: 3 | TITLE: {Four} | CONTENT: Text 3. | END ID: 3
====== Example 1 ======
Which document is most relevant to answer the query? Print out the TITLE and ID of the document. Then format the IDs \
into a list.
If there is no perfect answer output the closest one. Do not give an empty final answer.
query: who 7
The following documents can help answer the query:
TITLE: {Four} | ID: 3
TITLE: None | ID: 1
Final Answer: ['3', '1']
====== Example 2 ======
Which document is most relevant to answer the query? Print out the TITLE and ID of the document. Then format the IDs \
into a list.
If there is no perfect answer output the closest one. Do not give an empty final answer.
query: who 8
The following documents can help answer the query:
TITLE: One | ID: 0
Final Answer: ['0']
====== Now let's start! ======
Which document is most relevant to answer the query? Print out the TITLE and ID of the document. Then format the IDs \
into a list.
If there is no perfect answer output the closest one. Do not give an empty final answer.
query: who 1
The following documents can help answer the query:
"""


def test_a_prompt_is_the_published_form(tmp_path):
    fill(tmp_path, "nq")
    first, second = task(tmp_path, "nq").samples()
    assert TOKENIZER.decode(first.request.tokens) == NQ
    assert first.answers == ("2",) and second.answers == ("1", "3")
    assert first.facts == {"qid": "q1", "corpus": "32k", "documents": 4}


def test_data_sets_without_titles_repeat_the_text(tmp_path):
    fill(tmp_path, "quora")
    text = TOKENIZER.decode(task(tmp_path, "quora", limit=1).samples()[0].request.tokens)
    assert "\nID: 3 | CONTENT: Text 3. | END ID: 3\n" in text
    assert "given query:\nCONTENT: Text 3. | ID: 3\nCONTENT: Text 1. | ID: 1\nFinal Answer: ['3', '1']\n" in text


@pytest.mark.parametrize("name", loft.NAMES)
def test_an_oracle_has_100_and_an_empty_answer_0(tmp_path, name):
    short = name.removeprefix("loft_")
    needs_two = short == "hotpotqa"
    fill(tmp_path, short, tests=[query(1, "doc2", "doc0") if needs_two else query(1, "doc2")])
    one = task(tmp_path, short)
    (sample,) = one.samples()
    assert one.measures[0] == ("mrecall@2" if needs_two else "recall@1")
    assert published.said(one, sample, f"TITLE: x | ID: 2\nFinal Answer: {list(sample.answers)}\n") == 100
    assert published.said(one, sample, "Final Answer: ['3']") == published.said(one, sample, "") == 0
    assert published.said(one, sample, f"Final Answer: {[*sample.answers, '4']}") == 0, "no document has this number"


@pytest.mark.parametrize(("length", "corpus"), [(32_000, "32k"), (127_999, "32k"), (131_072, "128k"), (2**21, "1m")])
@pytest.mark.parametrize("inner", ["", "retrieval", "data/retrieval"])
def test_the_largest_corpus_whose_length_fits_is_taken(tmp_path, length, corpus, inner):
    for size in loft.LENGTHS:
        fill(tmp_path / inner, "fever", size)
    assert task(tmp_path, "fever", length).samples()[0].facts["corpus"] == corpus


def test_a_question_that_is_too_long_is_left_out_with_the_reason_and_nothing_is_cut(tmp_path):
    long = query(2, "doc1") | {"query_text": "w" * 33_000}
    fill(tmp_path, "scifact", tests=[query(1, "doc2"), long, query(3, "doc1")])
    first, out, last = task(tmp_path, "scifact", 33_000).samples()
    assert (out.task, out.number) == ("loft_scifact", 1)
    assert out.left_out.startswith("prompt and answer need 3") and out.left_out.endswith("and have 33000")
    assert out.request.total_tokens > 33_000, "nothing is cut"
    assert all(sample.left_out is None and sample.request.total_tokens <= 33_000 for sample in (first, last))


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Final Answer: ['12', 7]", ["12", "7"]),
        ("TITLE: x | ID: 3\n**Final Answer:** `[3]`\n[4]", ["3"]),
        ("[5]\nFinal Answer: [6]", ["5"]),  # the first line with brackets
        ("Final Answer: [id1, id2]", []),
        ("see ] and [\n[1]", []),
        ("Final Answer: [1], [2]", ["[1]", "[2]"]),
        ("Final Answer: ['the devil's sleep']", ["the devil's sleep"]),
        ("Final Answer: 3", []),
        ("Final Answer: [3", []),
        ("[" * 5000 + "]" * 5000, []),
        ("['\\d']", ["\\d"]),
    ],
)
def test_the_listed_ids(text, ids):
    assert listed_ids(text) == ids


IDS = st.lists(st.sampled_from("0123456"), max_size=7)


@given(IDS.filter(bool).map(lambda ids: list(dict.fromkeys(ids))), IDS)
def test_recall_counts_right_ids_among_the_first(right, said):
    found = recalls(right, said)
    for k in (1, 2, 3, 5):
        hits = sum(one in said[:k] for one in right)
        assert found[f"recall@{k}"] == hits / len(right)
        assert found[f"mrecall@{k}"] == (hits == len(right) or hits == k)
    assert found["capped_recall@1"] == (said[:1] != [] and said[0] in right)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (query(1, "doc9"), "names the document doc9, which corpus.jsonl does not have"),
        (query(1), "has no answers that is a list of"),
        (query(1, "doc1") | {"answers": ["doc1"]}, "has no answers that is a list of"),
        (query(1, "doc1") | {"metadata": {}}, "has no metadata.qrels that is a list of"),
        (query(1, "doc1") | {"query_text": " "}, "has an empty query_text"),
        ({"qid": "1"}, "has no field query_text"),
    ],
)
def test_a_record_of_another_form_is_refused(tmp_path, record, words):
    fill(tmp_path, "nq", tests=[query(1, "doc1"), record])
    with pytest.raises(UserError, match=f"test_queries.jsonl, record 2, {words}.*eval.loft.*download.sh"):
        task(tmp_path, "nq").samples()


def test_examples_cite_the_answers_where_nothing_is_judged(tmp_path):
    place = fill(tmp_path, "nq")
    published.write_lines(place / "few_shot_queries.jsonl", [query(7, "doc3") | {"metadata": {}}])
    text = TOKENIZER.decode(task(tmp_path, "nq").samples()[0].request.tokens)
    assert "TITLE: {Four} | ID: 3\nFinal Answer: ['3']\n====== Now" in text


def test_what_cannot_be_asked_is_refused(tmp_path):
    fill(tmp_path, "nq", "128k")
    (tmp_path / "quora").mkdir()
    with pytest.raises(UserError, match=r"made for 128000 tokens.*is 40000; set eval\.lengths_tokens to at least"):
        task(tmp_path, "nq").samples()
    with pytest.raises(UserError, match=r"has no folder fever \(eval\.loft\)"):
        task(tmp_path, "fever").samples()
    with pytest.raises(UserError, match="has no folder 32k, 128k or 1m"):
        task(tmp_path, "quora").samples()
    (tmp_path / "nq" / "128k" / "few_shot_queries.jsonl").unlink()
    with pytest.raises(UserError, match=r"few_shot_queries\.jsonl does not exist \(eval\.loft\)"):
        task(tmp_path, "nq", 131_072).samples()
    with pytest.raises(UserError, match=r"eval\.loft is null; set eval\.loft"):
        task(None, "nq")
