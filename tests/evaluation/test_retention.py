"""Retention: the paper's own Table 4, and properties of shares."""

import csv
import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lr2train.evaluation import retention

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


def test_the_text_has_a_line_a_model_and_a_figure_a_cell():
    scores, shares = (part.splitlines() for part in retention.text(retention.cells(SCORES)).split("\n\n"))
    assert scores[0].split() == ["score,", "percent", "average", *TASKS]
    assert scores[1].split() == ["LLaMA3-8B", "56.53", "66.62", "35.87", "82.08", "44.04", "54.05"]
    assert shares[0].startswith("share of LLaMA3-8B, percent") and shares[3].split()[0] == "LongRoPE2"
    assert shares[3].split()[1:3] == ["98.45", "97.58"]
    assert len({len(line) for line in scores}) == 1 == len({len(line) for line in shares})


def test_rows_and_json_say_the_same():
    found = retention.cells(SCORES)
    file = io.StringIO()
    writer = csv.DictWriter(file, ["model", "task", "score", "share_of_base"])
    writer.writeheader()
    writer.writerows(retention.rows(found))
    read = list(csv.DictReader(io.StringIO(file.getvalue())))
    plain = json.loads(json.dumps(retention.to_json(found), allow_nan=False))
    assert plain["base"] == "LLaMA3-8B" and list(plain["models"]) == list(PAPER)
    for row in read:
        cell = plain["models"][row["model"]][row["task"]]
        assert row["score"] == f"{cell['score']:.2f}" and row["share_of_base"] == f"{cell['share_of_base']:.2f}"


def test_a_missing_score_leaves_its_cells_and_the_average_empty():
    partly = {"base": SCORES["LLaMA3-8B"], "other": {"MMLU": 60.0, "extra": 10.0}, "zero": {"extra": 0.0}}
    found = retention.cells(partly)
    cell = {(one.model, one.task): one for one in found}
    assert math.isnan(cell["other", "average"].score) and cell["other", "MMLU"].share == pytest.approx(90.063, abs=1e-3)
    assert math.isnan(cell["other", "extra"].share), "the base has no such score"
    assert retention.to_json(found)["models"]["other"]["GSM8K"] == {"score": None, "share_of_base": None}
    assert {"model": "other", "task": "GSM8K", "score": "", "share_of_base": ""} in retention.rows(found)
    assert "-" in retention.text(found).splitlines()[2]
    zero = retention.cells({"base": {"MMLU": 0.0}, "other": {"MMLU": 5.0}})
    assert all(math.isnan(one.share) for one in zero)


def test_no_model_is_no_table():
    assert retention.cells({}) == [] and retention.text([]) == "" and retention.to_json([])["base"] is None


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
