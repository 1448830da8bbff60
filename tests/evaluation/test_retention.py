"""Retention: the paper's own Table 4, as cells and as the tables of an evaluation, and properties of shares."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lr2train.evaluation import retention, tables
from lr2train.evaluation.results import TaskScore

TASKS = ("MMLU", "MMLU-Pro", "HellaSwag", "TruthfulQA", "GSM8K")
PAPER = {  # Table 4 (b)
    "LLaMA3-8B": (66.62, 35.87, 82.08, 44.04, 54.05),
    "YaRN": (62.25, 31.88, 81.25, 42.61, 42.45),
    "LongRoPE2": (65.01, 34.61, 81.69, 46.17, 50.80),
}
SCORES = {model: dict(zip(TASKS, row, strict=True)) for model, row in PAPER.items()}


def test_the_averages_of_the_paper_come_out():
    found = {(one.model, one.task): one for one in retention.cells(SCORES)}
    averages = [round(found[model, retention.AVERAGE].score, 1) for model in PAPER]
    assert averages == [56.5, 52.1, 55.7]
    assert found["LongRoPE2", "average"].share == pytest.approx(100 * 55.656 / 56.532)
    assert found["LongRoPE2", "TruthfulQA"].share == pytest.approx(100 * 46.17 / 44.04)
    assert {found["LLaMA3-8B", task].share for task in (*TASKS, "average")} == {100.0}


def test_the_tables_have_a_line_a_model_and_a_figure_a_cell():
    found = [
        TaskScore(model, task, 0, {"acc": score}, 10, 0, 1.0)
        for model in PAPER
        for task, score in SCORES[model].items()
    ]
    scores, shares = (table.text().splitlines() for table in tables.all_tables(found, list(PAPER)))
    assert scores[0] == "Short tasks, percent" and scores[1].split() == ["average", *TASKS]
    assert scores[2].split() == ["LLaMA3-8B", "56.53", "66.62", "35.87", "82.08", "44.04", "54.05"]
    assert shares[0] == "Short tasks, percent of the score of LLaMA3-8B"
    assert shares[4].split()[:3] == ["LongRoPE2", "98.45", "97.58"]


def test_a_metric_that_is_no_percentage_has_a_table_of_its_own():
    found = [TaskScore("base", "MMLU", 0, {"acc": 66.0}, 10, 0, 1.0)]
    found += [TaskScore("base", "wmt", 0, {"bleu": 31.5}, 10, 0, 1.0, percent=False)]
    percentages, others = (table.text().splitlines() for table in tables.all_tables(found, ["base"]))
    assert percentages[1].split() == ["average", "MMLU"] and percentages[2].split() == ["base", "66.00", "66.00"]
    assert others[1].split() == ["task", "metric", "score"] and others[2].split() == ["base", "wmt", "bleu", "31.50"]


def test_a_missing_score_leaves_its_cells_and_the_average_empty():
    partly = {"base": SCORES["LLaMA3-8B"], "other": {"MMLU": 60.0, "extra": 10.0}, "zero": {"extra": 0.0}}
    found = retention.cells(partly)
    cell = {(one.model, one.task): one for one in found}
    assert math.isnan(cell["other", "average"].score) and cell["other", "MMLU"].share == pytest.approx(90.063, abs=1e-3)
    assert math.isnan(cell["other", "extra"].share), "the base has no such score"
    assert math.isnan(cell["other", "GSM8K"].score) and math.isnan(cell["other", "GSM8K"].share)
    zero = retention.cells({"base": {"MMLU": 0.0}, "other": {"MMLU": 5.0}})
    assert all(math.isnan(one.share) for one in zero)


def test_no_model_is_no_table():
    assert retention.cells({}) == []


scores = st.floats(0.5, 100)


@given(st.lists(st.lists(scores, min_size=3, max_size=3), min_size=1, max_size=4), st.floats(0.1, 0.9))
def test_shares_follow_the_scores(table, factor):
    found = retention.cells(
        {str(number): dict(zip("abc", row, strict=True)) for number, row in enumerate(table)}
        | {"scaled": {task: factor * score for task, score in zip("abc", table[0], strict=True)}}
    )
    assert [one.share for one in found if one.model == "scaled"] == pytest.approx([100 * factor] * 4)
    for one in found:
        assert one.share == pytest.approx(100 * one.score / next(b.score for b in found if b.task == one.task))
