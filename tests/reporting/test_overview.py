"""The pictures of README.md: what they show of a run, both themes, and refusals that lead on."""

import re
from pathlib import Path

import pytest
import tiny
from PIL import ImageColor

from lr2train.config import UserError
from lr2train.reporting import overview
from lr2train.reporting.canvas import night, paper
from lr2train.reporting.inputs import ReportInputs
from lr2train.reporting.mix import segments
from lr2train.rope import METHODS


def row(label: str, accuracy: float) -> dict:
    cells = [{"length_tokens": length, "depth": 0.5, "accuracy": accuracy} for length in (tiny.L0, tiny.L)]
    return {"label": label, "cells": cells}


@pytest.fixture(scope="module")
def run(world: Path) -> ReportInputs:
    rows = [row("none untrained", 0.25), row("yarn untrained", 0.5), row("longrope2 trained", 0.75)]
    windows = {"original_window_tokens": tiny.L0, "target_window_tokens": tiny.L}
    factors = METHODS["yarn"](tiny.SPECTRUM, tiny.L)
    return ReportInputs(
        world, "world", evaluation={"rows": rows, **windows}, factors=factors, corpus_folder=world / "corpus"
    )


@pytest.fixture(scope="module")
def files(run, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pictures")
    return {path.name: path.read_text() for path in overview.write(overview.overview(run), folder)}


def test_each_picture_is_written_for_both_themes(files):
    assert sorted(files) == ["needles-dark.svg", "needles-light.svg", "pipeline-dark.svg", "pipeline-light.svg"]
    colors = {name: {one.lower() for one in re.findall(r"#\w{6}\b", svg)} for name, svg in files.items()}
    for name in ("needles", "pipeline"):
        assert {paper().ink, paper().muted} <= colors[f"{name}-light.svg"]
        assert {night().ink, night().muted} <= colors[f"{name}-dark.svg"]
        assert night().ink not in colors[f"{name}-light.svg"]
        assert paper().ink not in colors[f"{name}-dark.svg"]


def test_text_is_readable_on_both_backgrounds():
    def luminance(color: str) -> float:
        parts = [part / 255 for part in ImageColor.getrgb(color)]
        return sum(
            weight * (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
            for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True)
        )

    for look, background in ((paper(), "#ffffff"), (night(), "#0d1117")):  # GitHub's pages
        for color in (look.ink, look.muted, *look.series[:2]):
            dark, light = sorted((luminance(color), luminance(background)))
            assert (light + 0.05) / (dark + 0.05) > 3.5, (color, background)


def test_the_pictures_show_the_run_before_and_after(run, files):
    text = re.findall(r"<text[^>]*>([^<]+)", files["needles-light.svg"])
    assert [one for one in text if "mean" in one] == [
        "before: window 64, mean 25%",
        "after: LongRoPE2 to 256, mean 75%",
    ]
    text = re.findall(r"<text[^>]*>([^<]+)", files["pipeline-light.svg"])
    assert {"prepare", "search", "train", "short: up to 64 tokens", "256 tokens each"} <= set(text)
    bars = len(re.findall(r'<path d="[^"]*" clip-path', files["pipeline-light.svg"]))
    spans = sum(len(one) for window in ("short", "long") for one in segments(run.corpus_folder, window, overview.SHOWN))
    assert spans <= bars <= spans + 10, "a bar for each document of a segment, and for each typical document"


def test_the_same_run_gives_the_same_bytes(run, files, tmp_path):
    again = {path.name: path.read_text() for path in overview.write(overview.overview(run), tmp_path)}
    assert again == files


def test_a_run_that_was_not_evaluated_is_refused_with_the_command():
    with pytest.raises(UserError, match="`lr2train evaluate run=first`"):
        overview.overview(ReportInputs(Path("runs/first"), "first"))
