"""tools.reproduce: the plan, the driver that goes on after a kill, the statistics, tables of recorded results."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import tiny

from lr2train.cli.composition import compose
from lr2train.config import UserError
from lr2train.io import write_json
from lr2train.model import load
from lr2train.rope.methods import METHODS, build
from tools.reproduce import figures, paper, tables, write
from tools.reproduce.__main__ import arguments, reproduce
from tools.reproduce.bed import FORMS, Base, Form
from tools.reproduce.claims import MISSING, OPPOSITE, REPRODUCED, UNDECIDED, Claim, judge, sentence
from tools.reproduce.figures import Estimate
from tools.reproduce.results import Cell, best_index, read
from tools.reproduce.rows import ROWS, SEARCHES
from tools.reproduce.steps import Step, steps_of
from tools.reproduce.work import Driver, Journal, kind_of

BASE = Base("base", "tiny_base")
FORM = Form("quick", "runs", "tiny_4k", 64, ((BASE, 4),), ("yarn", "longrope2"), ("needle",), 2, 1)


# ---- the plan ----


@pytest.mark.parametrize("form", FORMS.values(), ids=str)
def test_every_step_stands_after_those_that_it_reads_and_its_result_has_a_place_of_its_own(form, tmp_path):
    steps = steps_of(form, tmp_path)
    seen: set[str] = set()
    for step in steps:
        assert {*step.after, *([step.search] if step.search else [])} <= seen, step.name
        assert step.name not in seen
        seen.add(step.name)
    assert len({step.result(tmp_path) for step in steps}) == len(steps)


def test_every_row_of_a_table_differs_in_its_own_settings_alone(tmp_path):
    form = Form("all", "runs", "tiny_4k", 64, ((BASE, 4),), tuple(ROWS), tuple(SEARCHES), 1, 1)
    trained = [step for step in steps_of(form, tmp_path) if step.verb == "train" and step.search]
    own = ("name=", "rope", "data.long_attention", "optim.distill_short")
    common = [{one for one in step.overrides if not one.startswith(own)} for step in trained]
    assert len(trained) == len(ROWS)
    assert all(one == common[0] for one in common)
    assert any(one.startswith("seed=") for one in common[0])


@pytest.mark.parametrize("row", ["yarn_rcd_shared", "document"])
def test_the_overrides_of_a_row_compose(row, tmp_path):
    form = Form("one", "runs", "tiny_4k", 64, ((BASE, 4),), (row,), ("needle",), 1, 1)
    steps = {step.name: step for step in steps_of(form, tmp_path)}
    write_json(tmp_path / "base_4x_search_needle_s0" / "search.json", {"critical_index": 5, "attention_factor": 1.25})
    config = compose("train", steps[f"base_4x_{row}_s0"].arguments(tmp_path))
    assert (config.rope.target_window_tokens, config.data.segment_tokens) == (256, 256)
    if row == "yarn_rcd_shared":
        assert (config.rope.critical_index, config.rope.attention_factor, config.rope.factors) == (5, 1.25, None)


@pytest.mark.parametrize("short", ["rescaled", "factor"])
def test_one_table_is_read_in_both_windows(short, tmp_path):
    write_json(tmp_path / "base" / "config.json", {"model_type": "llama", **tiny.ARCHITECTURE})
    expected = METHODS["yarn"](tiny.SPECTRUM, tiny.L)
    expected.save(tmp_path / "factors.json")
    places = (f"model.path={tmp_path}/base", f"rope.factors={tmp_path}/factors.json", "name=row")
    step = Step("row", "train", tuple(tiny.arguments(tmp_path, *places)), short=short)
    config = compose("train", step.arguments(tmp_path))
    found = build(config.rope, load.spectrum_of(load.config_of(config.model), config.model))
    assert found.rescale == expected.rescale
    assert found.short_attention_factor == found.attention_factor == pytest.approx(expected.attention_factor)
    assert found.short_rescale == (expected.rescale if short == "rescaled" else None)


# ---- the driver ----


def _steps() -> list[Step]:
    """A chain of three, a step that fails, one that waits for it, and one that stands alone."""
    chain = [Step(f"c{i}", "train", (f"c{i}",), (f"c{i - 1}",) if i else ()) for i in range(3)]
    return [
        *chain,
        Step("bad", "train", ("bad",)),
        Step("lost", "train", ("lost",), ("bad",)),
        Step("x", "train", ("x",)),
    ]


def _job(runs: Path, arguments: list[str], wait: bool) -> None:
    name = arguments[0]
    with (runs / "starts").open("a") as file:
        file.write(f"{name}\n")
    if name == "bad":
        os._exit(3)
    if name == "c1" and wait:
        signal.pause()
    write_json(runs / name / "train.json", {})


def _driver(runs: Path, wait: bool) -> Driver:
    context = multiprocessing.get_context("fork")
    return Driver(_steps(), runs, 2, lambda verb, given, log: context.Process(target=_job, args=(runs, given, wait)))


def test_a_killed_driver_goes_on_and_a_failed_step_costs_only_those_that_need_it(tmp_path):
    if not (child := os.fork()):
        os.setsid()
        _driver(tmp_path, wait=True).run()
        os._exit(0)
    until = time.monotonic() + 30
    while "c1" not in (starts := (tmp_path / "starts").read_text() if (tmp_path / "starts").exists() else ""):
        assert time.monotonic() < until, starts
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    outcome = _driver(tmp_path, wait=False).run()
    assert outcome.done == {"c0", "c1", "c2", "x"}
    assert set(outcome.failed) == {"bad", "lost"}
    assert "exit code 3" in outcome.failed["bad"]
    assert outcome.failed["lost"] == "waits for bad"
    starts = (tmp_path / "starts").read_text().split()
    assert starts.count("c0") == 1  # finished before the kill
    assert starts.count("c1") == 2
    assert "lost" not in starts


def test_a_step_that_another_driver_works_on_is_not_started(tmp_path):
    import fcntl

    one = _driver(tmp_path, wait=False)
    with (tmp_path / "logs" / "c0.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not one._start(_steps()[0])
    assert one._start(_steps()[0])
    one._running["c0"].process.join()


def test_a_step_with_other_arguments_is_not_finished(tmp_path):
    journal, step = Journal(tmp_path / "done.jsonl"), Step("c0", "train", ("lr=1",))
    write_json(tmp_path / "c0" / "train.json", {})
    journal.add(step, ["lr=1"], 1.0)
    (tmp_path / "done.jsonl").open("a").write('{"step": "c1", "ver')  # cut short by a kill
    again = Journal(tmp_path / "done.jsonl")
    again.read()
    assert again.has(step, tmp_path)
    assert not again.has(Step("c0", "train", ("lr=2",)), tmp_path)


def test_the_time_of_a_step_is_that_of_its_own_kind_and_ratio(tmp_path):
    journal = Journal(tmp_path / "done.jsonl")
    for name, verb, seconds in (
        ("base_a", "train", 300.0),
        ("base_a_8x_yarn_s0", "train", 14.0),
        ("base_b_8x_yarn_s0", "train", 16.0),
        ("base_a_16x_yarn_s0", "train", 40.0),
        ("base_a_8x_yarn_s0_scores", "evaluate", 20.0),
    ):
        journal.add(Step(name, verb, ()), [], seconds)
    found = {kind: journal.seconds_of(kind) for kind in (("train", ""), ("train", "8x"), ("train", "16x"))}
    assert found == {("train", ""): 300.0, ("train", "8x"): 15.0, ("train", "16x"): 40.0}
    assert journal.seconds_of(kind_of("base_a_8x_map", "map_rcd")) is None


def test_beyond_the_smallest_ratio_only_the_far_rows_run(tmp_path):
    cells = ((BASE, 4), (BASE, 8))
    form = Form("two", "runs", "tiny_4k", 64, cells, ("yarn", "text"), ("needle", "text"), 1, 1, far_rows=("yarn",))
    names = {step.name for step in steps_of(form, tmp_path)}
    assert {"base_4x_text_s0", "base_8x_yarn_s0", "base_4x_map"} <= names
    assert not {"base_8x_text_s0", "base_8x_search_text_s0", "base_8x_map"} & names


# ---- the statistics ----


def test_with_one_seed_the_error_is_that_of_the_documents():
    scores = np.random.default_rng(0).uniform(0, 100, (1, 17))
    found = figures.estimate({("needle", 64): scores})
    assert found.mean == pytest.approx(scores.mean())
    assert found.se == pytest.approx(scipy.stats.sem(scores[0]))
    assert np.isnan(found.spread)


def test_tasks_count_alike_however_many_documents_they_have():
    rng = np.random.default_rng(1)
    one, two = rng.uniform(0, 100, (1, 5)), rng.uniform(0, 100, (1, 50))
    found = figures.estimate({("needle", 64): one, ("mk", 64): two})
    assert found.mean == pytest.approx((one.mean() + two.mean()) / 2)
    assert found.se == pytest.approx(np.hypot(scipy.stats.sem(one[0]), scipy.stats.sem(two[0])) / 2)


def test_seeds_that_differ_by_a_shift_alone():
    scores = np.array([[50.0] * 8, [60.0] * 8, [40.0] * 8])
    found = figures.estimate({("needle", 64): scores})
    assert found.se == pytest.approx(scipy.stats.sem([50, 60, 40]))
    assert found.spread == pytest.approx(10.0)


def test_the_error_is_that_of_two_crossed_samples():
    """Over many draws the mean squared error estimate equals the variance of the mean, known and observed."""
    rng, draws, seeds, documents = np.random.default_rng(2), 3000, 3, 12
    of_seed, of_document, of_both = 4.0, 9.0, 6.0
    all_scores = (
        rng.normal(0, of_seed, (draws, seeds, 1))
        + rng.normal(0, of_document, (draws, 1, documents))
        + rng.normal(0, of_both, (draws, seeds, documents))
    )
    found = [figures.estimate({("needle", 64): scores}) for scores in all_scores]
    true = of_seed**2 / seeds + of_document**2 / documents + of_both**2 / (seeds * documents)
    assert np.var([one.mean for one in found]) == pytest.approx(true, rel=0.08)
    assert np.mean([one.se**2 for one in found]) == pytest.approx(true, rel=0.08)


def test_few_degrees_of_freedom_widen_the_bound_as_students_t_does():
    """Of many draws without a difference, 4.6 % are called one: as many as lie outside two errors of a normal."""
    two_sided = 2 * scipy.stats.norm.sf(2.0)
    for degrees in (2, 5, 40):
        bound = float(scipy.stats.t.isf(two_sided / 2, degrees))
        assert [Estimate(k * bound, 1.0, degrees=degrees).sign for k in (0.99, 1.01, -1.01)] == ["~", ">", "<"]
    rng, draws = np.random.default_rng(3), 4000
    shifts = rng.normal(0, 5, (draws, 3, 1)) + np.zeros((draws, 3, 4))  # seeds differ, documents do not
    found = [figures.estimate({("needle", 64): one}) for one in shifts]
    assert [one.degrees for one in found] == pytest.approx([2.0] * draws)
    assert np.mean([one.sign != "~" for one in found]) == pytest.approx(two_sided, abs=0.012)
    assert figures.pooled(found[:1] * 4).degrees == pytest.approx(8.0)
    assert figures.estimate({("needle", 64): rng.uniform(0, 100, (1, 17))}).degrees == pytest.approx(16)


def test_seeds_alone_have_one_degree_of_freedom_less_than_there_are():
    """The residual, which the seeds' part contains, does not take more of them away."""
    rng = np.random.default_rng(4)
    of_seeds = 5 * rng.normal(size=(3, 1)) + 10 * rng.normal(size=(3, 60))
    assert figures.estimate({("needle", 64): of_seeds}).degrees >= 2


def test_cells_with_the_same_documents_err_together():
    rng = np.random.default_rng(3)
    common = rng.normal(size=200)
    one, two = (
        {("needle", length): (length * common + 64 * rng.normal(size=200))[None] for length in (64, 128)}
        for _ in range(2)
    )
    mean = figures.estimate({key: (one[key] + two[key]) / 2 for key in one})  # document by document
    together = figures.pooled([figures.estimate(one), figures.estimate(two)])
    assert together.mean == pytest.approx(mean.mean)
    assert together.se == pytest.approx(mean.se)
    other = {(task, 10 * length): scores for (task, length), scores in two.items()}  # documents of other lengths
    apart = figures.pooled([figures.estimate(one), figures.estimate(other)])
    assert apart.se < 0.85 * together.se
    opposed = figures.pooled([figures.estimate(one), figures.estimate({key: -x for key, x in two.items()})])
    assert opposed.se == pytest.approx(apart.se)  # a negative covariance does not shrink the error
    longer = figures.pooled([figures.estimate(one), figures.estimate({**two, ("needle", 256): two["needle", 64]})])
    assert together.se > longer.se > apart.se  # two strata of three are common


def test_a_difference_is_called_one_only_outside_two_standard_errors():
    assert [Estimate(mean, 1.0).sign for mean in (2.1, -2.1, 1.9, float("nan"))] == [">", "<", "~", "~"]
    found = figures.pooled([Estimate(10, 3), Estimate(20, 4)])
    assert (found.mean, found.se) == (15, 2.5)


def test_the_map_s_best_index_and_how_sure_it_is():
    lines = [{"critical_index": index, "nll": [loss] * 4} for index, loss in ((8, 2.0), (9, 1.0), (10, 3.0))]
    assert best_index([*lines, {"critical_index": None, "nll": [0.0] * 4}]) == Estimate(9.0, 0.0)
    split = [{"critical_index": 8, "nll": [0.0, 9.0]}, {"critical_index": 10, "nll": [9.0, 0.0]}]
    found = best_index(split, resamples=4000)
    assert found.mean == pytest.approx(8.5, abs=0.1)  # a tie takes the first: 8 in three of four resamples
    assert found.se == pytest.approx(np.sqrt(0.75), abs=0.05)


# ---- the paper ----


def test_the_paper_s_figures_agree_with_its_text():
    assert paper.kept("longrope2", 0) == pytest.approx(98.45, abs=0.01)  # recomputed from Table 4; the text says 98.6
    assert paper.kept("longrope2", 1) == pytest.approx(97.6, abs=0.05)
    assert paper.kept("yarn", 1) == pytest.approx(100 - 15.2, abs=0.3)
    assert paper.kept("ntk", 1) == pytest.approx(100 - 9.3, abs=0.1)
    assert Claim("2", "longrope2", "yarn").printed(0) == pytest.approx(82.03 - 49.39)
    middle = Claim("2", "longrope2", "yarn", "middle")
    assert middle.printed(0) == pytest.approx((92.31 + 90.49 + 85.62 - 84.67 - 68.80 - 62.51) / 3)
    assert Claim("4", "longrope2", "yarn_one_table", "short").printed(1) == pytest.approx(12.53, abs=0.01)
    # Table 7 has three benchmarks, and a mean over Table 4's five does not stand beside it.
    three = Claim("7", "longrope2", "longrope2_one_table", "short").printed(0)
    assert three == pytest.approx(100 * (65.01 + 34.61 + 50.80 - 64.57 - 33.83 - 48.37) / (66.62 + 35.87 + 54.05))
    assert paper.kept("longrope2_one_table", 0) is None


# ---- recorded results ----

LENGTHS = [64, 128, 256]


def _record(folder: Path, label: str, scores: dict[int, list[float]]) -> None:
    """What `evaluate` leaves of one model: one needle task and one document of plain text a length."""
    known = json.loads((folder / "evaluate.json").read_text())["scores"] if (folder / "evaluate.json").exists() else []
    made = [
        {"model": label, "task": task, "length_tokens": length, "measures": {name: 0.0}}
        for task, name in (("needles", "exact"), ("text", "nats"))
        for length in LENGTHS
    ]
    write_json(folder / "evaluate.json", {"scores": [*known, *made]})
    lines = [
        {"length_tokens": length, "number": number, "exact": score}
        for length, each in scores.items()
        for number, score in enumerate(each)
    ]
    texts = [{"length_tokens": length, "number": 0, "nats": 2.0} for length in LENGTHS]
    place = folder / "evaluation" / label.replace(" ", "_")
    place.mkdir(parents=True)
    for name, every in (("needles", lines), ("text", texts)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in every))


def _copy_row(runs: Path, row: str, new: str) -> None:
    """Record a further row with the scores of a known one."""
    for seed in (0, 1):
        shutil.copytree(runs / f"base_4x_{row}_s{seed}", runs / f"base_4x_{new}_s{seed}")


@pytest.fixture
def recorded(tmp_path):
    """YaRN at 40 and LongRoPE2 at 70 at the target window, in two seeds; the base at 100 inside its window."""
    inside = {64: [100.0] * 10}
    _record(tmp_path / "base_4x_untrained", "none untrained", {**inside, 128: [0.0] * 10, 256: [0.0] * 10})
    for row, right in (("yarn", 4), ("longrope2", 7)):
        for seed in (0, 1):
            folder = tmp_path / f"base_4x_{row}_s{seed}"
            at = [100.0] * right + [0.0] * (10 - right)
            kept = {64: [100.0] * 9 + [0.0]}
            _record(folder, f"{row} trained", {**kept, 128: at, 256: at})
            write_json(folder / "factors.json", {"attention_factor": 1.2})
            write_json(folder / "train.json", {"tokens_seen": 4096})
    found = {"critical_index": 5, "attention_factor": 1.2, "perplexity": 1.5, "document_forwards": 28, "seconds": 30.2}
    write_json(tmp_path / "base_4x_search_needle_s0" / "search.json", found)
    return tmp_path


def test_verdicts_come_from_the_figures(recorded):
    (cell,) = read(FORM, recorded)
    found = judge(Claim("2", "longrope2", "yarn"), [cell])
    # three of ten documents differ by 100
    assert found.pooled.mean == pytest.approx(30.0)
    assert found.pooled.se == pytest.approx(scipy.stats.sem([100.0] * 3 + [0.0] * 7))
    assert (found.word, found.pooled.degrees) == (UNDECIDED, pytest.approx(9))
    assert judge(Claim("2", "longrope2", "ntk"), [cell]).word == MISSING
    assert judge(Claim("2", "longrope2", "yarn", "middle"), [cell]).pooled.mean == pytest.approx(30.0)
    assert [cell.window(one) for one in ("short", "middle", "long")] == [[64], [128], [256]]
    assert cell.kept("longrope2").mean == pytest.approx(90.0)
    assert cell.text_ratio("yarn").mean == pytest.approx(100.0)
    assert "+30.0 ± 15.3 points (paper: +32.6 on LLaMA3-8B, +19.4 on Phi3-mini)" in sentence(found)


def test_rows_that_answer_alike_are_told_as_such_and_short_scores_of_a_table_have_the_same_benchmarks(recorded):
    _copy_row(recorded, "yarn", "yarn_rcd")
    form = replace(FORM, rows=("yarn", "yarn_rcd", "longrope2"))
    (cell,) = read(form, recorded)
    found = judge(Claim("5", "yarn_rcd", "yarn"), [cell])
    assert (found.word, found.alike) == (UNDECIDED, True)
    assert sentence(found).endswith("undecided, as both rows answer alike.")
    assert not judge(Claim("2", "longrope2", "yarn"), [cell]).alike
    sheets = {sheet.name: sheet for sheet in tables.row_sheets([cell])}
    kept = {name: sheets[name].rows[-1][-2:] for name in ("table_2_4x", "table_5_4x")}  # LongRoPE2 stands last
    assert kept == {"table_2_4x": ["98.45", "97.59"], "table_5_4x": ["96.09", "96.57"]}


def test_of_two_bases_with_equal_tokens_the_first_one_is_compared_with_the_undertrained():
    lines = [{"critical_index": index, "nll": [float(index != 8)] * 4} for index in (6, 7, 8)]
    few = [{**line, "nll": [float(line["critical_index"] != 6)] * 4} for line in lines]
    other = [{**line, "nll": [float(line["critical_index"] != 7)] * 4} for line in lines]
    bases = (BASE, lines), (Base("other", "tiny_base"), other), (Base("quarter", "tiny_base", (), 0.25), few)
    cells = [Cell(base, 4, 64, LENGTHS, map=found) for base, found in bases]
    factors = {cell.base.name: METHODS["none"](tiny.SPECTRUM, tiny.L) for cell in cells}
    said = write._order_of_indices(cells, factors)
    assert "From 0.25 to 1 times the tokens, at 4x, the best index grows (+2.0 ± 0.0)." in said
    assert [one.endswith("It is the last one of the map.") for one in said[:3]] == [True, False, False]


def test_the_opposite_is_told(recorded):
    for row, wrong, right in (("yarn", "0.0", "100.0"), ("longrope2", "100.0", "0.0")):
        for seed in (0, 1):
            file = recorded / f"base_4x_{row}_s{seed}" / "evaluation" / f"{row}_trained" / "needles.jsonl"
            file.write_text(file.read_text().replace(f'"exact": {wrong}', f'"exact": {right}'))
    cells = read(FORM, recorded)
    found = judge(Claim("2", "longrope2", "yarn"), cells)
    assert (found.word, found.pooled.mean) == (OPPOSITE, pytest.approx(-100.0))
    assert judge(Claim("2", "yarn", "longrope2"), cells).word == REPRODUCED
    assert not found.saturated, "one row at each end of the scale"


def test_the_document_and_the_page_show_the_same_tables(recorded):
    sections = write.sections_of(FORM, recorded, {"base_4x_ntk_s0": "exit code 1"}, (9, 12), 7200.0)
    document, page, terminal = write.markdown(FORM, sections), write.html(FORM, sections), write.text(sections)
    assert document.startswith(write.MARK)
    row = next(line for line in document.splitlines() if line.startswith("| YaRN (2 seeds)"))
    assert "| 1.200 | 90.0 ± 0.0 | 40.0 ± 0.0 | 40.0 ± 0.0 | ~ -30.0 ± 15.3 | 90.0 ± 0.0 |" in row
    assert row.endswith("| 49.39 | 39.37 | 92.14 | 85.06 |")
    assert "| needle | base, 4x | 5 | 1.200 | 1.500 | 28 | 30 |" in document
    for made in (document, page, terminal):
        assert "9 of 12 steps are finished, which took 2.0 hours in one process" in made
        assert "base_4x_ntk_s0 failed" in made
        assert "A row is trained on 4,096 tokens." in made
        assert "rows lie between 40.0 and 70.0 at the target window" in made
    assert page.count("<table") == sum(len(section.sheets) for section in sections)
    assert "<svg" in page


def test_an_unfinished_run_writes_beside_its_page_and_leaves_the_document_alone(tmp_path, capsys):
    document = tmp_path / "document.md"
    document.write_text("whole")
    given = ["quick", "--runs", str(tmp_path), "--jobs", "0", "--document", str(document)]
    assert reproduce(arguments(given)) == 0
    assert "0 of 122 steps" in capsys.readouterr().out
    assert document.read_text() == "whole"
    assert "`bash launch/reproduce.sh quick` writes it anew" in (tmp_path / "REPRODUCTION.md").read_text()


def test_a_finished_run_writes_the_document(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.reproduce.__main__.steps_of", lambda *_: [])  # all of no steps are done
    document = tmp_path / "document.md"
    assert reproduce(arguments(["quick", "--runs", str(tmp_path), "--jobs", "0", "--document", str(document)])) == 0
    assert document.read_text() == (tmp_path / "REPRODUCTION.md").read_text()


def test_a_ratio_shows_its_planned_rows_and_no_table_twice():
    scores = {0: {"needle": {64: np.array([50.0, 60.0])}}}
    planned = ("ntk", "yarn", "longrope2", "yarn_head", "distill")
    ran = (*planned[:-1], "text")
    cell = Cell(BASE, 4, 64, [64], planned, dict.fromkeys(ran, scores), factors=dict.fromkeys(ran, 1.0))
    sheets = {sheet.title: [row[0] for row in sheet.rows] for sheet in tables.row_sheets([cell])}
    assert len(sheets) == 2  # Tables 5 to 10 would repeat rows of Table 2
    assert list(sheets.values()) == [
        [ROWS[key].label for key in planned[:3]],
        [ROWS[key].label for key in ("yarn_head", "distill", "longrope2")],
    ]


def test_a_search_that_has_not_finished_is_named(tmp_path):
    step = Step("row", "train", ("rope.critical_index={rcd}",), search="search")
    with pytest.raises(UserError, match=r"search\.json"):
        step.arguments(tmp_path)
    assert tables.NOT_RUN == "not run"
