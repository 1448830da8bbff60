"""Grades beside a second statement of RULER's metric, early ends, and tables beside published ones."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lr2train.evaluation.ruler import NAMES, grading, tables

letters = st.text(
    alphabet=st.sampled_from(list("aAbB 1,.\n\t\x00\x1f") + ["é", "Σ", "σ", "ς", "İ", "K", "ß"]), max_size=9
)
answers = st.lists(letters.filter(str.strip), min_size=1, max_size=5, unique=True)


def metric_all(predictions, references):
    """RULER's string_match_all over a set, before its rounding."""
    shares = [
        sum(reference.lower() in prediction.lower() for reference in of_one) / len(of_one)
        for prediction, of_one in zip(predictions, references, strict=True)
    ]
    return sum(shares) / len(shares) * 100


def metric_part(predictions, references):
    """RULER's string_match_part over a set, before its rounding."""
    best = [
        max(float(reference.lower() in prediction.lower()) for reference in of_one)
        for prediction, of_one in zip(predictions, references, strict=True)
    ]
    return sum(best) / len(best) * 100


def shown(prediction: str) -> str:
    """RULER's processing of a prediction."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


@given(pairs=st.lists(st.tuples(st.lists(letters, max_size=6).map("".join), answers), min_size=1, max_size=4))
def test_the_mean_of_the_grades_is_rulers_metric(pairs):
    predictions, references = [shown(one) for one, _ in pairs], [wanted for _, wanted in pairs]
    for grade, metric in ((grading.string_match_all, metric_all), (grading.string_match_part, metric_part)):
        mean = sum(grade(prediction, wanted) for prediction, wanted in pairs) / len(pairs)
        assert mean == pytest.approx(metric(predictions, references))


def test_grades_of_plain_answers():
    assert grading.string_match_all(" 12, 34.", ["12", "34"]) == 100
    assert grading.string_match_all("12", ["12", "34", "56", "78"]) == 25
    assert grading.string_match_part("it is THE BRONCOS", ["Denver Broncos", "the Broncos"]) == 100
    assert grading.string_match_part("Carolina", ["Denver Broncos", "the Broncos"]) == 0
    assert grading.cleaned(" a\tb\x00 \n") == "a\nb"


@given(wanted=answers, data=st.data())
@example(wanted=["b", "ab"], data=None)
def test_an_early_end_never_changes_a_grade(wanted, data):
    pieces = st.one_of(st.sampled_from(wanted), st.sampled_from([one.upper() for one in wanted]), letters)
    text = "".join(data.draw(st.lists(pieces, max_size=7))) if data else "xabx"
    for enough, grade in (
        (grading.enough_for_all(wanted), grading.string_match_all),
        (grading.enough_for_part(wanted), grading.string_match_part),
    ):
        for end in range(len(text)):
            if enough and all(one.lower() in text[:end].lower() for one in enough):
                assert grade(text[:end], wanted) == grade(text, wanted)
                break


def test_what_is_enough():
    assert grading.enough_for_all(["12", "34"]) == ("12", "34")
    assert grading.enough_for_part(["Denver Broncos", "Broncos"]) == ("Broncos",)
    assert grading.enough_for_part(["Ανδρέας", "Andreas"]) == ("Andreas",)
    assert grading.enough_for_part(["ΟΔΟΣ"]) == ()
    assert grading.enough_for_all(["a\tb"]) == ()


# LongRoPE2, Table 9 (LLaMA3-8B-128k): scores of the 13 tasks and their printed average.
PAPER = {
    65536: ([100, 100, 100, 98, 98, 95, 95.75, 99.75, 98.6, 33.6, 80.33, 62, 52], 85.62),
    131072: ([100, 100, 99, 96, 91, 94, 96.5, 97, 92.6, 9, 85.33, 56, 50], 82.03),
}


def paper_scores():
    return {
        (name, length): float(score)
        for length, (row, _) in PAPER.items()
        for name, score in zip(NAMES, row, strict=True)
    }


def test_averages_are_the_printed_ones():
    scores = paper_scores()
    for length, (_, printed) in PAPER.items():
        assert tables.average(scores, length) == pytest.approx(printed, abs=0.005)
    assert tables.effective_length(scores) == 65536
    assert tables.effective_length(scores, threshold=99) is None
    with pytest.raises(ValueError, match="4096"):
        tables.average(scores, 4096)


def test_the_table_by_task_has_lengths_as_rows_and_tasks_as_columns():
    table = tables.by_task(paper_scores())
    assert table.head == ("length", *NAMES, "average")
    assert [row[0] for row in table.rows] == [65536, 131072]
    assert table.rows[1][8 + 1] == 92.6  # vt
    assert table.note == ""
    assert table.rows[1][:4] == (131072, 100.0, 100.0, 99.0) and round(table.rows[1][-1], 2) == 82.03


def test_the_table_by_length_compares_models_and_says_what_is_missing():
    ours = paper_scores()
    fewer = {key: 50.0 for key in ours if key[1] < 100_000 and key[0] != "qa_1"}
    table = tables.by_length({"longrope2": ours, "yarn": fewer})
    assert table.head == ("", "65536", "131072", "effective length")
    assert table.rows[1] == ("yarn", 50.0, None, None)
    assert table.rows[0][-1] == 65536
    assert table.note == "Averages over 12 of 13 tasks, without qa_1: yarn at 65536."
