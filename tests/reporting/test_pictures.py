"""Pictures of a search: candidates, scales, files; one drawing serves the page as SVG and the folder as PNG."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reporting.searches import SPECTRUM, L, history, line, make_search

from lr2train.config import UserError
from lr2train.report import compose
from lr2train.reporting import canvas, charts, search_charts
from lr2train.reporting.axes import loss_of, perplexity_label, perplexity_ticks
from lr2train.reporting.pictures import write_search_pictures
from lr2train.reporting.population import HOPELESS, candidates, winner
from lr2train.rope.methods import METHODS

ALL = ["fitness", "rcd", "temperature", "documents", "factors", "periods", "cosines"]
OF_FACTORS = ("factors", "periods", "cosines")


def lines(generations, racing: bool = True) -> list[dict]:
    return [line(index, ranked, racing) for index, ranked in enumerate(generations)]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


# ---- candidates ----


@pytest.mark.parametrize("seed", range(4))
def test_every_candidate_is_counted_once(seed):
    generations = history(seed=seed)
    true = {
        one.number: (index, one) for index, ranked in reversed([*enumerate(generations)]) for one in ranked
    }  # the generation in which it first occurs
    found = candidates(lines(generations))
    assert len(found) == len(true) == 24 + 5 * 18
    assert sum(found.perplexity == HOPELESS) == sum(math.isinf(one.perplexity) for _, one in true.values()) > 1
    for name in ("critical_index", "attention_factor"):
        assert sorted(getattr(found, name)) == sorted(getattr(one, name) for _, one in true.values())
    assert sorted(found.generation) == sorted(index for index, _ in true.values())
    assert 0 < sum(~found.complete) == sum(one.documents < 10 for _, one in true.values())


def test_without_racing_every_candidate_is_complete():
    assert candidates(lines(history(), racing=False)).complete.all()


def test_a_dropped_candidate_is_never_the_winner():
    made = lines(history())
    made[-1]["perplexities"][-1] = 1.0001
    assert made[-1]["documents"][-1] == 2
    assert winner(made)[1] == made[-1]["best_perplexity"]


def test_a_finished_search_names_its_winner():
    made = lines(history())
    last = made[-1]
    named = next(i for i, index in enumerate(last["critical_indices"]) if index != last["critical_indices"][0])
    search = {
        "critical_index": last["critical_indices"][named],
        "attention_factor": last["attention_factors"][named],
        "perplexity": 1.5,
    }
    assert winner(made, search) == (search["attention_factor"], last["perplexities"][named], search["critical_index"])


# ---- the axis of perplexities ----


@pytest.mark.parametrize("best", [1.0, 1.0000001, 1.003, 1.19, 1.3, 40.0, HOPELESS])
@pytest.mark.parametrize("factor", [1.00001, 1.5, 1e3, 1e9])
def test_an_axis_has_few_distinct_ticks_within_its_range(best, factor):
    low, high = loss_of([best, min(best * factor, 2 * HOPELESS)])
    ticks = perplexity_ticks(low, high)
    assert 3 <= len(ticks) <= 7
    assert all(low * 0.999999 <= math.log(tick) <= high * 1.000001 for tick in ticks)
    if high > 1.01 * low and best > 1.000001:
        assert len({perplexity_label(math.log(tick)) for tick in ticks}) == len(ticks)


# ---- pictures ----


def names(files: list[Path]) -> list[str]:
    """Names of the pictures, each of which has its numbers beside."""
    assert [file.suffix for file in files] == [".png", ".csv"] * (len(files) // 2)
    return [file.stem for file in files[::2]]


def test_a_finished_search_has_every_picture(tmp_path):
    made = make_search(tmp_path / "s")
    files = write_search_pictures(tmp_path / "s")
    assert names(files) == ALL
    assert sorted((tmp_path / "s" / "pictures").iterdir()) == sorted(files), "a temporary file was left"
    for file in files[::2]:
        seen = pixels(file)
        assert min(seen.shape[:2]) >= 600
        assert (seen[0, 0] == 255).all()
        assert (seen > 240).all(-1).mean() > 0.5 or file.stem == "rcd"
    rows = [*csv.DictReader((tmp_path / "s" / "pictures" / "fitness.csv").read_text().splitlines())]
    assert [float(row["best"]) for row in rows] == [ranked[0].perplexity for ranked in made]
    points = [*csv.DictReader((tmp_path / "s" / "pictures" / "temperature.csv").read_text().splitlines())]
    assert len(points) == 24 + 5 * 18
    assert sum(row["complete"] == "False" for row in points) > 0


def test_a_search_of_all_dimensions_shows_no_rcd(tmp_path):
    make_search(tmp_path / "s", all_dims=True)
    assert names(write_search_pictures(tmp_path / "s")) == [name for name in ALL if name != "rcd"]
    made = METHODS["longrope"](SPECTRUM, L)
    for draw in (charts.factor_curves, charts.periods):
        marks = re.findall(r">(\w+(?: = \w+)*) \d+</text>", draw({"mine": made}, None).svg())
        assert "tcd" in marks
        assert not any("rcd" in mark for mark in marks)
        assert "rcd = tcd" in re.findall(r">(\w+(?: = \w+)*) \d+</text>", draw({"mine": made}, 16).svg())
    page = " ".join(compose([tmp_path / "s"]).page.split())
    assert "Over all dimensions the factors lie" in page
    assert "rcd 0" not in page
    assert "critical index 0" not in page


def test_a_running_search_has_every_picture_but_the_factors(tmp_path):
    make_search(tmp_path / "s", finished=False, n_generations=0)
    for name in ("generations.jsonl", "journal.jsonl"):
        with (tmp_path / "s" / name).open("a") as file:
            file.write('{"generation": 1, "best')  # a line being written
    assert names(write_search_pictures(tmp_path / "s")) == [name for name in ALL if name not in OF_FACTORS]
    page = " ".join(compose([tmp_path / "s"]).page.split())
    assert "In search, generation 0 reached" in page
    assert "the search still runs" in page


@pytest.mark.parametrize(("perplexity", "fixed"), [(math.inf, False), (math.nan, False), (1.0, True), (1e300, True)])
def test_hopeless_perfect_and_narrow_searches_can_be_drawn(tmp_path, perplexity, fixed):
    generations = history(n_generations=1, population=4, top_k=2)
    made = lines(generations)
    for one in made:
        one["perplexities"] = [perplexity] * len(one["perplexities"])
        one["best_perplexity"] = perplexity
        if fixed:
            one["attention_factors"] = [1.0] * len(one["attention_factors"])
    for chart in (
        search_charts.search_progress({"s": made}, "needle"),
        search_charts.attention_factors(made, None, "needle"),
        search_charts.critical_indices(made, None, None),
    ):
        assert "<svg" in chart.svg()
        assert chart.write(tmp_path / "one")[0].stat().st_size > 1000


def test_the_legend_names_dropped_candidates_under_racing_alone():
    for racing in (True, False):
        made = lines(history(racing=racing), racing)
        for chart in (
            search_charts.search_progress({"s": made}, "needle"),
            search_charts.attention_factors(made, None, "needle"),
        ):
            assert ("dropped early" in chart.svg()) == racing


def test_the_axis_names_the_objective():
    made = lines(history())
    assert "text perplexity" in search_charts.search_progress({"s": made}, "text").svg()
    assert "needle perplexity" in search_charts.attention_factors(made, None, "needle").svg()


def test_a_failed_write_leaves_the_former_picture(tmp_path, monkeypatch):
    make_search(tmp_path / "s")
    before = {file: file.read_bytes() for file in write_search_pictures(tmp_path / "s")}

    def cut(self, file, **_):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(canvas.Figure, "savefig", cut)
    with pytest.raises(OSError, match="No space"):
        write_search_pictures(tmp_path / "s")
    assert {file: file.read_bytes() for file in before} == before


def test_a_folder_without_a_search_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no generations\.jsonl"):
        write_search_pictures(tmp_path)
    with pytest.raises(UserError, match="nowhere is no folder"):
        write_search_pictures(tmp_path / "nowhere")


def test_svg_takes_the_page_s_colours_and_png_the_light_theme(tmp_path):
    chart = search_charts.search_progress({"s": lines(history())}, "needle")
    svg, png = chart.svg(), chart.write(tmp_path / "a")[0]
    assert "#0a0b" not in svg, "a placeholder colour was not replaced"
    assert "var(--s1)" in svg
    assert not set(re.findall(r"#[0-9a-f]{6}", svg)), "a colour that knows no theme"
    assert (pixels(png) == [0xD5, 0x5E, 0x00]).all(-1).sum() > 500  # --s1 of the light theme
