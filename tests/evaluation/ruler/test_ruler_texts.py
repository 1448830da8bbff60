"""Texts of RULER: whole prompts as literal strings, and files of questions in all their forms."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import world

from lr2train.config import UserError
from lr2train.evaluation.ruler import frequencies, niah, questions, spec, variables

GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def test_the_tasks_and_their_parameters_are_rulers():
    assert spec.NAMES == (
        "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
        "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
    )  # fmt: skip
    how = {name: (n.haystack, n.key, n.value, n.keys, n.values, n.queries) for name, n in spec.NIAH.items()}
    assert how == {
        "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
        "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
        "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
        "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
        "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
        "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
        "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
        "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
    }
    assert [spec.NEW_TOKENS[name] for name in spec.NAMES] == [128] * 8 + [30, 120, 50, 32, 32]


def test_a_needle_prompt_with_one_answer():
    context = niah.in_sentences(
        ["One.", "Two.", "Three.", "Four."],
        [spec.NEEDLE.format(kind="numbers", key="wet-bar", value="1234567")],
        [50],
    )
    assert niah.question(spec.NIAH["niah_single_2"], context, ["wet-bar"], 1) == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\nOne. Two. One of the special magic numbers for wet-bar is: 1234567. Three. Four.\n"
        "What is the special magic number for wet-bar mentioned in the provided text? The special magic number for "
        "wet-bar mentioned in the provided text is"
    )
    assert niah.question(spec.NIAH["niah_multikey_3"], "x", ["k"], 1).startswith("A special magic uuid is hidden")


def test_a_needle_prompt_with_four_answers():
    how = spec.NIAH["niah_multiquery"]
    assert niah.question(how, "text", ["a", "b", "c", "d"], 4) == (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\ntext\nWhat are all the special magic numbers for a, b, c, and d mentioned in "
        "the provided text? The special magic numbers for a, b, c, and d mentioned in the provided text are"
    )
    assert "for a mentioned in the provided text are" in niah.question(spec.NIAH["niah_multivalue"], "", ["a"], 4)


def test_needles_at_the_ends_leave_their_spaces():
    assert niah.in_sentences(["A.", "B."], ["N1", "N2", "N3"], [0, 3, 100]) == " N1  N2 A. B. N3 "


def test_a_prompt_of_variable_tracking():
    assignments = variables.chain(["AAAAA", "BBBBB", "CCCCC"], "12345")
    context = variables.in_noise(assignments, [0, 1, 2], 4)
    assert context == (
        f"VAR AAAAA = 12345\n{GRASS}\nVAR BBBBB = VAR AAAAA \n{GRASS}\nVAR CCCCC = VAR BBBBB \n{GRASS}\n{GRASS}"
    )
    assert variables.question(context, "12345") == (
        f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
        "Question: Find all variables that are assigned the value 12345 in the text above. Answer: According to the "
        "chain(s) of variable assignment in the text above, 5 variables are assigned the value 12345, they are: "
    )
    shown = variables.example(np.random.default_rng(0), 6)
    assert shown.startswith("Memorize and track the chain(s)")
    assert shown.endswith("\n\n")
    names = shown.split("they are: ")[1]
    assert names.startswith(" ")  # RULER has two spaces here
    assert [len(name) for name in names.split()] == [3] * 5
    assert shown.count(GRASS) == 6


def test_the_worked_example_has_at_most_500_tokens(tmp_path):
    (task,) = world.build(tmp_path, names=["vt"])
    text = task._draft(4096, 0).prompt(20).text
    shown = text[: text.rindex("Memorize and track")]
    assert shown.count("Memorize and track") == 1
    before_answer = shown[: shown.index("they are: ") + 10]
    line = len(task.tokenizer.encode_plain("\n" + GRASS))
    assert 500 - 2 * line < len(task.tokenizer.encode_plain(before_answer)) < 500 + line  # its names vary


def test_a_prompt_of_common_words():
    assert frequencies.cwe_question(["cat", "ad hoc", "cat"]) == (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
        "that appear most often.\n1. cat 2. ad hoc 3. cat\nQuestion: What are the 10 most common words in the above "
        "list? Answer: The top 10 words that appear most often in the list are:"
    )
    shown = frequencies.example(["cat", "dog"], ["dog", "cat"])
    assert shown == frequencies.cwe_question(["cat", "dog"]) + " 1. dog 2. cat\n"


def test_a_prompt_of_frequent_words():
    assert frequencies.fwe_question(["abcdef", "...", "qrstuv"]) == (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. abcdef ... qrstuv\nQuestion: Do not provide any explanation. Please ignore the dots "
        "'....'. What are the three most frequently appeared words in the above coded text? Answer: According to the "
        "coded text above, the three most frequently appeared words are:"
    )


def test_a_prompt_of_questions():
    rule = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    assert questions.qa_question(["First.", "Second\nline."], "Who?") == (
        f"{rule}\n\nThe following are given documents.\n\nDocument 1:\nFirst.\n\nDocument 2:\nSecond\nline.\n\n"
        f"{rule}\n\nQuestion: Who? Answer:"
    )


def test_the_documents_of_the_article_come_first_and_all_documents_repeat(tmp_path):
    read = questions.read_squad(world.write_questions(tmp_path)[0])
    assert len(read.documents) == 30
    asked = read.questions[7]
    assert len(asked.near) == 4
    draft = questions.QuestionDraft(read, asked, lambda name: np.random.default_rng([1, len(name)]))

    def numbers(size: int) -> list[int]:
        text = draft.prompt(size).text
        parts = text.split("documents.\n\n")[1].split("\n\nAnswer the question")[0].split("\n\n")
        return [read.documents.index(part.split(":\n", 1)[1]) for part in parts]

    assert numbers(0) == list(asked.documents)
    article = {*asked.documents, *asked.near}
    near = sum(read.lengths[document] for document in asked.near)
    assert set(numbers(near)) == article
    assert len(numbers(near)) == 5
    assert article < set(numbers(near + 2000))
    everything = numbers(sum(read.lengths) + 3000)
    assert set(everything) == set(range(30))
    assert len(everything) > 30
    for size in range(0, 9000, 700):  # what is left of the size is shorter than every document that could still come
        chosen = numbers(size)
        left = size - sum(read.lengths[document] for document in chosen) + read.lengths[asked.documents[0]]
        assert left >= 0
        assert all(read.lengths[other] > left for other in set(range(30)) - set(chosen))


def test_the_forms_of_both_sets_are_read_alike(tmp_path):
    squad, hotpotqa = world.write_questions(tmp_path)
    rows = [
        {"title": a["title"], "context": p["context"], "question": q["question"],
         "answers": {"text": [one["text"] for one in q["answers"]], "answer_start": []}}
        for a in world.squad_articles() for p in a["paragraphs"] for q in p["qas"]
    ]  # fmt: skip
    (tmp_path / "squad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, other = questions.read_squad(squad), questions.read_squad(tmp_path / "squad.jsonl")
    assert (one.questions, one.documents) == (other.questions, other.documents)
    assert len(one.questions) == 30  # without those that have no answer
    assert len(one.questions[0].answers) == 2  # repeated answers count once
    rows = [
        {**row, "context": {"title": [t for t, _ in row["context"]], "sentences": [s for _, s in row["context"]]}}
        for row in world.hotpotqa_rows()
    ]
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, other = questions.read_hotpotqa(hotpotqa), questions.read_hotpotqa(folder)
    assert (one.questions, one.documents) == (other.questions, other.documents)
    parquet = tmp_path / "published"
    parquet.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), parquet / "validation-00000-of-00001.parquet")
    from_parquet = questions.read_hotpotqa(parquet)
    assert (one.questions, one.documents) == (from_parquet.questions, from_parquet.documents)
    assert one.documents[one.questions[0].documents[0]].startswith("Title ")


@pytest.mark.parametrize("content", [
    "", "{", "[1]", "{}", '{"data": []}', '{"data": [{"paragraphs": [{"context": "x", "qas": [{}]}]}]}', "null", "5",
    '{"data": [{"paragraphs": [{"context": 5, "qas": [{"question": "q", "answers": [{"text": "a"}]}]}]}]}',
    '{"data": [{"paragraphs": [{"context": "x", "qas": [{"question": "q", "answers": [{"text": 5}]}]}]}]}',
    '[{"question": "q", "answer": "a", "context": []}]',
    '[{"question": "q", "answer": null, "context": [["t", ["s"]]]}]',
    '[{"question": 7, "answer": "a", "context": [["t", ["s"]]]}]', '[{"question": "q", "answer": "a", "context": "t"}]',
])  # fmt: skip
@pytest.mark.parametrize(
    ("read", "key"), [(questions.read_squad, "eval.squad"), (questions.read_hotpotqa, "eval.hotpotqa")]
)
def test_a_malformed_file_is_one_sentence_with_its_key(tmp_path, content, read, key):
    file = tmp_path / "file.json"
    file.write_text(content)
    with pytest.raises(UserError, match=rf"^{key}=.*set {key} to ") as refused:
        read(file)
    assert "\n" not in str(refused.value)


def test_a_missing_file_and_an_unclear_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"eval\.squad=.*does not exist"):
        questions.read_squad(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"eval\.hotpotqa=.*cannot be read as a data set"):
        questions.read_hotpotqa(tmp_path)
    with pytest.raises(UserError, match=r"eval\.squad=rajpurkar/squad_v2 would be downloaded"):
        questions.read_squad("rajpurkar/squad_v2")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"eval\.squad"):
        questions.read_squad(tmp_path / "bytes.json")
