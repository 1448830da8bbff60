"""LongBench: prompts as its page shows them, scores against restatements, and what is refused."""

import re
from collections import Counter

import published
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lr2train.config import UserError
from lr2train.evaluation import longbench
from lr2train.evaluation.longbench import class_share, f1, line_similarity

TOKENIZER = published.byte_tokenizer()
CLASSES = ["Food", "Number of something", "Date", "Other number"]
ANSWERS = {"triviaqa": ["Ann Lee", "A. Lee"], "trec": ["Date"], "lcc": ["return {x}"], "repobench-p": ["y = f(x)"]}
PROMPTS = {
    "triviaqa": "Answer the question based on the given passage. Only give me the answer and do not output any other "
    "words. The following are some examples.\n\n{ctx} 0\n\nQuestion 0?",
    "trec": "Please determine the type of the question below. Here are some examples of questions.\n\n"
    "{ctx} 0\nQuestion 0?",
    "lcc": "Please complete the code given below. \n{ctx} 0Next line of code:\n",
    "repobench-p": "Please complete the code given below. \n{ctx} 0Question 0?Next line of code:\n",
}
BUDGETS = {"triviaqa": 32, "trec": 64, "lcc": 64, "repobench-p": 64}


@pytest.fixture
def folder(tmp_path):
    for name, answers in ANSWERS.items():
        published.write_lines(
            tmp_path / f"{name}.jsonl",
            [
                {
                    "input": f"Question {number}?",
                    "context": f"{{ctx}} {number}",
                    "answers": answers,
                    "length": 9,
                    "dataset": name,
                    "language": "en",
                    "all_classes": CLASSES if name == "trec" else None,
                    "_id": f"id{number}",
                }
                for number in range(3)
            ],
        )
    return tmp_path


def task(folder, name, length=1000, limit=None):
    return longbench.tasks([f"longbench_{name}"], folder, TOKENIZER, length, limit)[0]


@pytest.mark.parametrize("name", ANSWERS)
def test_a_prompt_is_the_benchmarks_text_and_fits_with_its_budget(folder, name):
    samples = task(folder, name).samples()
    assert [one.number for one in samples] == [0, 1, 2] and samples[2].facts["id"] == "id2"
    assert TOKENIZER.decode(samples[0].request.tokens) == PROMPTS[name]
    assert samples[0].request.max_new_tokens == BUDGETS[name] and samples[0].request.stops == ()
    short = task(folder, name, BUDGETS[name] + 40, limit=1).samples()
    assert [one.request.total_tokens for one in short] == [BUDGETS[name] + 40]
    assert TOKENIZER.decode(short[0].request.tokens) == PROMPTS[name][:19] + PROMPTS[name][-20:]
    assert short[0].facts["cut_tokens"] == len(PROMPTS[name]) + 1 - 40


@pytest.mark.parametrize("name", ANSWERS)
def test_an_oracle_has_100_and_an_empty_answer_0(folder, name):
    one = task(folder, name)
    for sample in one.samples():
        assert published.said(one, sample, ANSWERS[name][-1]) == 100
        assert published.said(one, sample, "") == 0


def test_only_the_first_line_of_a_text_answer_counts_and_of_code_the_first_line_without_a_mark(folder):
    trivia, trec, lcc = (task(folder, name) for name in ("triviaqa", "trec", "lcc"))
    assert published.said(trivia, trivia.samples()[0], "\n\nann lee!\nPassage: more") == 100
    assert published.said(trivia, trivia.samples()[0], " \nann lee") == 0  # a line with a space is a line
    assert published.said(trec, trec.samples()[0], "\nDate\nFood") == 100
    assert published.said(trec, trec.samples()[0], "Date, Food\nDate") == 50
    assert published.said(lcc, lcc.samples()[0], "\n# note\n```\na // b\nreturn {x}\nelse") == 100
    assert published.said(lcc, lcc.samples()[0], "# note") == 0


WORDS = st.lists(st.sampled_from(["the", "A", "river", "Ann", "ann.", "(the)", "x-y", "an", "theatre", "Río", "9"]))


@given(WORDS.map(" ".join), WORDS.map(" ".join))
def test_f1_is_twice_the_shared_words_over_all_words(said, right):
    def words(text):
        bare = "".join(sign for sign in text.lower() if sign.isalnum() or sign.isspace())
        return Counter(word for word in bare.split() if word not in ("a", "an", "the"))

    one, two = words(said), words(right)
    shared = sum(min(one[word], two[word]) for word in one)
    assert f1(said, right) == pytest.approx(2 * shared / max(1, one.total() + two.total()))


def test_classes_that_are_part_of_the_right_one_do_not_count_but_for_the_next_after_each():
    classes = ["Other", "number", "Other number", "Date"]
    assert class_share("Date", "Date", classes) == 1
    assert class_share("Date or Other", "Date", classes) == 1 / 2
    assert class_share("date", "Date", classes) == 0
    # "Other" is removed, so "number" is passed over and stays.
    assert class_share("Other number", "Other number", classes) == 1 / 2
    assert class_share("Other number", "Other number", ["Other", "Date", "number", "Other number"]) == 1 / 2
    assert class_share("Other number", "Other number", ["Other", "Other number", "number"]) == 1


@pytest.mark.parametrize(
    ("said", "right", "percent"),
    [
        ("this is a test", "this is a test!", 97),  # as fuzzywuzzy's page
        ("fuzzy wuzzy was a bear", "wuzzy fuzzy was a bear", 91),  # as fuzzywuzzy's page
        ("abcd", "bcde", 75),
        ("abcde", "edcba", 20),  # longest common substring first: the longest common subsequence is no longer
        ("ab cd", "cd ab", 40),
        ("abcdefgh", "a", 22),  # 22.2
        ("a" * 7, "a" + "b", 22),
        ("a", "a" * 15, 12),  # 12.5 rounds to the even number
        ("", "x", 0),
        ("`x", "x", 0),
    ],
)
def test_similarity_of_lines_in_whole_percent(said, right, percent):
    assert line_similarity(said, right) == percent / 100


def test_the_published_archive_has_its_files_in_a_folder_of_their_own(folder):
    (folder / "data").mkdir()
    (folder / "lcc.jsonl").rename(folder / "data" / "lcc.jsonl")
    assert len(task(folder, "lcc").samples()) == len(task(folder, "trec").samples()) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answers": []}, "answers that is not a list of texts"),
        ({"all_classes": None}, "all_classes that is not"),
        ({"context": 1}, "context that is not a text"),
    ],
)
def test_a_record_of_another_form_is_refused(folder, change, words):
    record = {"input": "q", "context": "c", "answers": ["a"], "all_classes": ["a"]}
    published.write_lines(folder / "trec.jsonl", [record, record | change])
    with pytest.raises(UserError, match=re.escape(words) + r".*eval\.longbench"):
        task(folder, "trec").samples()


def test_what_cannot_be_asked_is_refused(folder):
    (folder / "lcc.jsonl").unlink()
    with pytest.raises(UserError, match=r"lcc\.jsonl does not exist \(eval\.longbench\)"):
        task(folder, "lcc").samples()
    with pytest.raises(UserError, match=r"longbench_trec generates 64 tokens.*eval\.lengths_tokens"):
        task(folder, "trec", 65).samples()
    with pytest.raises(UserError, match=r"eval\.longbench is null; set eval\.longbench"):
        task(None, "trec")
