"""The report page: one file without references, built from the files that exist, with all data escaped."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.figure import Figure
from reporting.searches import L0, SPECTRUM, L, make_search, write_jsonl

from lr2train.config import UserError
from lr2train.evaluation.results import TaskScore, json_of
from lr2train.evaluation.tables import trained_difference
from lr2train.io import read_json, write_json
from lr2train.report import compose, main, pictures_of, report
from lr2train.reporting import canvas, charts, inputs
from lr2train.reporting.canvas import THEMED, style_sheet
from lr2train.reporting.needle_map import needle_map, text_color
from lr2train.reporting.numbers import amount, context_length, duration, percent, perplexity
from lr2train.rope.methods import METHODS
from lr2train.run import provenance

LENGTHS, DEPTHS = [512, 1024, 2048, 4096], [0.0, 0.25, 0.5, 0.75, 1.0]
VOID = ("meta", "link", "wbr")  # elements without an end
EVIL = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Content of a page; refuses a document whose tags do not close in order.

    Attributes:
        tags, references: in the order of the document.
        ids: section -> its words.
        tables: title -> rows of cells, the head first; a best figure ends with ``*``.
        pictures: descriptions of the drawings.
    """

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.pictures: list[str] = []
        self._open: list[str] = []
        self._section = self._title = self._words = ""
        self.feed(markup)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.references += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data", "action")
        ]
        if tag == "section":
            self._section = values["id"] or ""
            self.ids[self._section] = ""
        elif tag == "svg":
            assert values["role"] == "img"
            self.pictures.append(values["aria-label"] or "")
        elif tag == "tr":
            self.tables.setdefault(self._title, []).append([])
        elif tag in ("th", "td"):
            self.tables[self._title][-1].append("")
            self._words = "*" if values.get("class") == "best" else ""
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("th", "td"):
            self.tables[self._title][-1][-1] += self._words

    def handle_data(self, data: str) -> None:
        if self._section:
            self.ids[self._section] += data
        if self._open and self._open[-1] == "h3":
            self._title = data
        elif self._open and self._open[-1] in ("th", "td"):
            self.tables[self._title][-1][-1] += data

    def table(self, start: str) -> dict[str, list[str]]:
        """Name of the row -> its cells, of the table whose title starts so; the head's name is ``head``."""
        rows = next(rows for title, rows in self.tables.items() if title.startswith(start))
        return {"head" if number == 0 else row[0]: row[1:] for number, row in enumerate(rows)}


def folded(markup: str) -> str:
    """With every run of white space as one blank."""
    return " ".join(markup.split())


def make_corpus(folder: Path) -> None:
    """``runs/corpus`` with its manifest alone."""
    sources = [
        {
            "name": "stdlib",
            "kind": "stdlib",
            "documents": 495,
            "tokens": 3394929,
            "broken": 1,
            "holdout_documents": 17,
            "holdout_tokens": 163004,
        },
        {
            "name": "needles_long",
            "kind": "needles",
            "documents": 240,
            "tokens": 983040,
            "broken": 0,
            "holdout_documents": 0,
            "holdout_tokens": 0,
        },
    ]
    counts = {
        window: {
            "segments": segments,
            "planned_tokens": segments * L - 700,
            "padding_share": 0.0032,
            "sources": {
                s["name"]: {"documents": 71, "tokens": 22355, "planned_tokens": segments * L // 2} for s in sources
            },
        }
        for window, segments in (("short", 245), ("long", 610))
    }
    write_json(
        folder / "corpus.json",
        {
            "format": 1,
            "fingerprint": "54c10f65",
            "original_window_tokens": L0,
            "segment_tokens": L,
            "vocab_size": 1024,
            "sources": sources,
            "windows": counts,
            "lost_tokens": {"tail": 812},
        },
    )


def metrics(steps: int, windows: tuple[str, ...], seed: int = 0) -> list[dict]:
    """Lines as the training loop writes them."""
    rng, lines = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        loss = {
            window: (2.1 if window == "short" else 1.7) + 2.5 * math.exp(-step / 25) + rng.normal(0, 0.06)
            for window in windows
        }
        lr = 3e-4 * min(step / 10, 0.5 * (1 + math.cos(math.pi * step / steps)))
        of_loss = {
            "loss": sum(loss.values()) / len(loss),
            "loss_short": loss.get("short"),
            "loss_long": loss.get("long") if step % 5 else None,
        }
        of_work = {
            "n_target_tokens": 8000,
            "tokens_seen": step * 2 * L,
            "grad_norm": 0.6 + abs(rng.normal(0, 0.2)),
            "lr": lr,
            "window_mix": 0.7,
        }
        of_time = {
            "tokens_per_s": 3000 + rng.normal(0, 150),
            "mfu": None,
            "peak_gib": 1.4,
            "data_wait_s": 0.01,
            "step_s": 2.7,
        }
        lines.append({"step": step, **of_loss, **of_work, **of_time})
    return lines


def row(label: str, attention_factor: float, reach: float, sharp: float) -> dict:
    """A row of evaluate.json whose accuracy falls with length and with distance from the end."""
    accuracy = {
        (n, d): float(np.clip(1 / (1 + math.exp(sharp * (math.log2(n) - reach - d))), 0, 1))
        for n in LENGTHS
        for d in DEPTHS
    }
    cells = [
        {
            "length_tokens": n,
            "depth": d,
            "accuracy": round(a * 4) / 4,
            "perplexity": 1.02 + 60 * (1 - a) ** 2,
            "documents": 4,
        }
        for (n, d), a in accuracy.items()
    ]
    by_length = []
    for n in LENGTHS:
        mean = float(np.mean([cell["accuracy"] for cell in cells if cell["length_tokens"] == n]))
        by_length.append(
            {
                "length_tokens": n,
                "accuracy": mean,
                "answer_perplexity": 1.05 + 90 * (1 - mean) ** 3,
                "text_perplexity": 6.1 + 40 * (1 - mean) ** 2,
                "shares": {f"document {i}": round(4 * mean) / 4 for i in range(4)},
            }
        )
    return {"label": label, "attention_factor": attention_factor, "cells": cells, "by_length": by_length}


def make_run(runs: Path, name: str = "first") -> Path:
    """A finished run under ``runs``, with its search, corpus and base run."""
    folder = runs / name
    make_search(runs / "factors")
    made = read_json(runs / "factors" / "factors.json")
    make_corpus(runs / "corpus")
    write_jsonl(runs / "base" / "metrics.jsonl", metrics(200, ("short",), 1))
    write_json(runs / "base" / "train.json", {"steps": 200})
    write_json(folder / "factors.json", made)
    write_jsonl(folder / "metrics.jsonl", metrics(120, ("short", "long")))
    write_json(
        folder / "train.config.json",
        {
            "name": name,
            "rope": {"factors": "runs/factors/factors.json"},
            "data": {"path": "runs/corpus"},
            "model": {"path": "runs/base/model"},
        },
    )
    write_jsonl(folder / "train.provenance.jsonl", [provenance()])
    write_json(
        folder / "train.json",
        {
            "steps": 120,
            "settled": "after step 96: the held-out loss fell no more",
            "final_loss": 1.9,
            "tokens_seen": 983040,
            "seconds": 331.0,
            "world": 2,
            "peak_gib": 1.4,
            "model": f"runs/{name}/model",
            "base": "runs/base/model",
            "corpus": "runs/corpus",
        },
    )
    methods = {
        "none": (1.0, 9.2, 6),
        "pi": (1.0, 8.4, 2.5),
        "ntk": (1.0, 10.3, 3),
        "yarn": (1.21, 10.9, 3),
        "longrope2": (1.25, 11.6, 4),
    }
    rows = [
        *(row(f"{method} untrained", *values) for method, values in methods.items()),
        row("longrope2 trained", 1.25, 14.5, 4),
    ]
    write_json(
        folder / "evaluate.json",
        {
            "original_window_tokens": L0,
            "target_window_tokens": L,
            "lengths_tokens": LENGTHS,
            "rows": rows,
            "tables": [
                {
                    "title": "RULER, average",
                    "head": ["", "512", "4096"],
                    "note": "Averages over 11 of 13 tasks.",
                    "rows": [["before", 40.25, None], ["after", 50.5, 31.75]],
                },
            ],
        },
    )
    write_json(
        folder / "export.json",
        {
            "folder": f"runs/{name}/export",
            "dtype": "float32",
            "bytes": 3_400_000,
            "folders": {
                "long": {"window_tokens": 4096, "long_logit_difference": 2e-6},
                "short": {"window_tokens": 512, "short_logit_difference": 0.0},
                "two": {"window_tokens": 4096},
            },
        },
    )
    sample = {
        "prompt": "def mean(values):\n    " * 80,
        "prompt_tokens": 497,
        "new_tokens": 64,
        "text": "return sum(values) / len(values)\n",
        "window": "long",
        "switched": True,
        "seconds": 3.2,
    }
    write_json(folder / "generate.json", sample)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("work") / "runs")


@pytest.fixture(scope="module")
def page(run) -> Path:
    # The run recorded runs/… as relative paths. The directory where pytest starts may hold other runs of those names.
    with contextlib.chdir(run.parent.parent):
        return report([run])


@pytest.fixture(scope="module")
def parsed(page) -> Page:
    return Page(page.read_text())


def shown(folders: list[Path]) -> str:
    """The page about folders, as markup with single blanks."""
    return folded(compose(folders).page)


# ---- one run ----


def test_the_page_refers_to_no_other_file(page, parsed):
    assert [one for one in parsed.references if not one.startswith(("#", "data:image/png;base64,"))] == []
    assert not {"script", "link", "iframe", "img"} & {*parsed.tags}
    markup = page.read_text()
    assert not re.search(r"url\((?!#)", markup)
    assert "@import" not in markup
    anchors = {one[1:] for one in parsed.references if one.startswith("#") and one[1:] in parsed.ids}
    assert anchors == {*parsed.ids}, "a section without a link in the navigation"


def test_every_drawing_is_described_and_written(page, parsed):
    beside = pictures_of(page)
    names = {file.stem for file in beside.glob("*.png")}
    assert len(parsed.pictures) == len(names) == 6 + 3 + 4 + 4 + 1  # needle maps, factors, search, training, base
    assert all(len(one) > 30 for one in parsed.pictures) and len({*parsed.pictures}) == len(parsed.pictures)
    assert names == {*read_json(page.parent / "report.json")["pictures"]}
    for name in names:
        rows = [*csv.DictReader((beside / f"{name}.csv").read_text().splitlines())]
        assert rows and all(None not in row.values() and None not in row for row in rows), name


def test_the_comparison_shows_the_numbers_of_the_evaluation(page, parsed):
    evaluation = read_json(page.parent / "evaluate.json")
    for key, title, show, better in (
        ("accuracy", "Needle accuracy", percent, max),
        ("answer_perplexity", "Answer perplexity", perplexity, min),
        ("text_perplexity", "Text perplexity", perplexity, min),
    ):
        table = parsed.table(title)
        assert table["head"] == [f"{length:,}" for length in LENGTHS]
        assert [*table][1:] == [row["label"] for row in evaluation["rows"]], "the trained row comes last"
        best = [better(row["by_length"][i][key] for row in evaluation["rows"]) for i in range(len(LENGTHS))]
        for row in evaluation["rows"]:
            values = [one[key] for one in row["by_length"]]
            expected = [show(value) + "*" * (value == top) for value, top in zip(values, best, strict=True)]
            assert table[row["label"]] == expected
        written = [*csv.reader((pictures_of(page) / f"{key}.csv").read_text().splitlines())]
        assert [float(x) for x in written[1][1:]] == [one[key] for one in evaluation["rows"][0]["by_length"]]
    trained = evaluation["rows"][-1]
    assert f"; {trained['attention_factor']:.4g} for longrope2." in page.read_text()


def test_the_needle_maps_hold_every_cell(page):
    for row in read_json(page.parent / "evaluate.json")["rows"]:
        svg = needle_map([row]).svg()
        texts = re.findall(r">([^<>]+)</text>", svg)
        assert Counter(text for text in texts if text.isdigit() and int(text) <= 100) == Counter(
            f"{100 * cell['accuracy']:.0f}" for cell in row["cells"]
        )
        file = pictures_of(page) / f"needles_{row['label'].replace(' ', '_')}.csv"
        cells = [*csv.DictReader(file.read_text().splitlines())]
        assert [float(cell["accuracy"]) for cell in cells] == [cell["accuracy"] for cell in row["cells"]]


def test_benchmarks_are_tables_with_their_best_figure(parsed):
    assert parsed.table("RULER, average") == {
        "head": ["512", "4096"],
        "before": ["40.25", "–"],
        "after": ["50.50*", "31.75"],
    }
    assert "Averages over 11 of 13 tasks." in parsed.ids["benchmarks"]


def test_a_finished_run_fills_every_section(parsed, page):
    assert "missing" not in parsed.ids
    made = "comparison needles benchmarks factors search training corpus sample export provenance"
    assert [*parsed.ids] == made.split()
    for section, words in (
        ("factors", "Rotary dimension 64, base 10000"),
        ("search", "the winner has rcd 12"),
        ("training", "Step 120, 983,040 tokens seen, 70% of the segments long"),
        ("corpus", "needles_long"),
        ("sample", "return sum(values)"),
        ("export", "2.00e-06 in the long window"),
        ("export", "4,096 tokens; not compared"),
        ("provenance", "torch"),
        ("provenance", "runs/factors/factors.json"),
    ):
        assert words in folded(parsed.ids[section]), words
    assert "<h1>512 → 4,096 tokens</h1>" in page.read_text()
    assert "ended early after step 96: the held-out loss fell no more" in page.read_text()
    sources = parsed.table("Sources")
    assert sources["stdlib"] == ["495", "3,394,929", "17", "501,760 (22×)", "1,249,280 (56×)", "1"]


def test_charts_follow_the_theme(page):
    markup = page.read_text()
    assert "#0a0b" not in markup, "a placeholder colour was not replaced"
    assert "prefers-color-scheme: dark" in markup
    assert "var(--s0)" in markup


def test_texts_contrast_with_their_background_in_both_themes():
    light, dark = style_sheet().split("prefers-color-scheme: dark")
    for theme in (light, dark):
        colors = dict(reversed(re.findall(r"--(\w+): (#\w{6})", theme)))
        for ground in ("paper", "card"):
            for name in ("ink", "muted", "accent", "good"):
                assert contrast(colors[name], colors[ground]) >= 4.5, (name, ground)
            for number in range(6):
                assert contrast(colors[f"s{number}"], colors[ground]) >= 3, (number, ground)
    for share in np.linspace(0, 1, 21):
        red, green, blue, _ = colormaps["cividis"](share)
        cell = "#" + "".join(f"{round(255 * part):02x}" for part in (red, green, blue))
        assert contrast(text_color(red, green, blue), cell) >= 3.5, share


def contrast(first: str, second: str) -> float:
    """WCAG 2.2: ratio of the relative luminances."""
    lights = []
    for color in (first, second):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_related_runs_are_found_by_their_recorded_paths(run, monkeypatch):
    found = inputs.gather(run)
    assert found.base is not None
    assert [folder.name for folder in (found.search_folder, found.corpus_folder, found.base.folder)] == [
        "factors",
        "corpus",
        "base",
    ]
    monkeypatch.chdir(run.parent.parent)
    assert inputs.gather(Path("runs/first")).search_folder == Path("runs/factors")


def test_a_named_search_replaces_a_recorded_one(run, tmp_path):
    make_search(tmp_path / "other")
    (found,) = inputs.gather_all([run, tmp_path / "other"])
    assert found.search_folder == tmp_path / "other"
    assert found.corpus_folder.name == "corpus"


def test_the_page_of_an_empty_run_names_the_verbs_to_run(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    page = shown([folder])
    for verb in ("prepare", "search", "train", "evaluate", "export", "generate"):
        assert f"lr2train {verb} " in page
    assert "Nothing has been recorded here yet." in page
    assert [*Page(page).ids] == ["missing"]


def test_a_search_without_training_has_a_page(tmp_path):
    runs = tmp_path / "runs"
    make_search(runs / "factors")
    make_corpus(runs / "corpus")
    settings = {"data": {"path": "runs/corpus"}, "model": {"path": "runs/base/model"}, "search": {"top_k": 6}}
    write_json(runs / "factors" / "search.config.json", settings)
    write_json(runs / "base" / "model" / "config.json", {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3})
    with contextlib.chdir(tmp_path):
        page = shown([runs / "factors"])
    for words in (
        "512 → 4,096 tokens",
        "LlamaForCausalLM, 3 layers",
        "found in 5 generations of 24 candidates in 75 s, not trained yet",
        "Search: needle perplexity",
        "better than the runner-up with a chance of 97% (24 documents)",
        "Perplexity by generation",
        "of 114 candidates were dropped before all documents were read",
        "rcd 12",
        "needles_long",
        "lr2train train",
    ):
        assert words in page, words
    assert len(Page(page).pictures) == 3 + 4


def test_the_page_of_a_text_search_calls_its_perplexity_text(tmp_path):
    make_search(tmp_path / "factors")
    search = read_json(tmp_path / "factors" / "search.json")
    write_json(
        tmp_path / "factors" / "search.json",
        search | {"settings": {"objective": "text", "top_k": 6}, "scored_documents": 12},
    )
    page = shown([tmp_path / "factors"])
    assert "all tokens of plain documents" in page
    assert "needle perplexity" not in page
    assert "over 12 documents" in page


def test_a_running_training_with_a_half_written_line_has_a_page(tmp_path):
    folder = tmp_path / "running"
    write_jsonl(folder / "metrics.jsonl", metrics(1, ("long",)))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss"')  # a line being written
    page = shown([folder])
    assert "In training, step 1 reached" in page
    assert "Loss by window" in page


def test_the_held_out_loss_stands_beside_the_training_loss(tmp_path):
    def held_out(step: int) -> dict:
        text = {"heldout_loss_short": 2.5 - step / 40, "heldout_loss_long": None if step else 7.25}
        return text | {"heldout_loss_needles": 1.5 - step / 20}

    lines = [
        line | (held_out(line["step"]) if not line["step"] % 10 else {}) for line in metrics(20, ("short", "long"))
    ]
    folder = tmp_path / "measured"
    write_jsonl(folder / "metrics.jsonl", [{"step": 0, "tokens_seen": 0, **held_out(0)}, *lines])
    page = folded(report([folder]).read_text())
    assert "step 1 → 20" in page  # of the training loss
    assert (
        "Held-out loss: short window 2.500 (step 0) to 2.000 (step 20), long window 7.250 (step 0) to not finite "
        "(step 20), needles 1.500 (step 0) to 0.500 (step 20)." in page
    )
    assert "needles, held out" in page
    assert "Points: held-out documents" in page
    rows = [*csv.DictReader((folder / "report_files" / "loss.csv").read_text().splitlines())]
    assert [row["step"] for row in rows] == [str(step) for step in range(21)]
    assert [row["heldout_loss_short"] for row in rows if row["heldout_loss_short"]] == ["2.5", "2.25", "2.0"]
    assert [row["heldout_loss_needles"] for row in rows if row["heldout_loss_needles"]] == ["1.5", "1.0", "0.5"]
    write_jsonl(tmp_path / "again" / "metrics.jsonl", lines)
    both = shown([folder, tmp_path / "again"])
    assert "again, needles" in both and "again, short, held out" not in both  # fewer curves of several runs
    assert "Points: held-out needle documents." in both
    assert [float(row["loss_short"]) for row in rows[1:]] == [line["loss_short"] for line in lines]


def test_needles_that_nobody_answered_are_dashes(run, tmp_path):
    evaluation = read_json(run / "evaluate.json")
    first = evaluation["rows"][0]
    first["by_length"][-1] |= {"accuracy": None, "answer_perplexity": None}
    for cell in first["cells"]:
        cell["accuracy"] = None if cell["length_tokens"] == LENGTHS[-1] else cell["accuracy"]
    write_json(tmp_path / "run" / "evaluate.json", evaluation)
    page = Page(compose([tmp_path / "run"]).page)
    assert page.table("Needle accuracy")["none untrained"][3] == "–"
    assert page.table("Answer perplexity")["none untrained"][3] == "–"


def test_data_is_escaped_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # another corpus may lie at runs/corpus of the checkout
    folder = make_run(tmp_path / "runs", f"a&{'b'}")
    evaluation = json.loads((folder / "evaluate.json").read_text())
    evaluation["rows"][-1]["label"] = EVIL
    write_json(folder / "evaluate.json", evaluation)
    for name in ("generate.json", "export.json", "train.provenance.jsonl", "train.config.json"):
        values = json.loads((folder / name).read_text())
        values |= dict.fromkeys(("text", "prompt", "folder", "command", "commit", "host", "name"), EVIL)
        write_json(folder / name, values | {"command": [EVIL]})
    manifest = json.loads((tmp_path / "runs" / "corpus" / "corpus.json").read_text())
    manifest["sources"][0]["name"] = manifest["fingerprint"] = EVIL
    write_json(tmp_path / "runs" / "corpus" / "corpus.json", manifest)
    page = compose([folder]).page
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 10
    assert "a&amp;b" in page
    assert "script" not in Page(page).tags


def test_the_same_inputs_give_the_same_page(run, page):
    with contextlib.chdir(run.parent.parent):
        again = compose([run]).page
    assert _without_time(again) == _without_time(page.read_text())


def _without_time(page: str) -> str:
    return re.sub(r"written \d{4}-\d\d-\d\d \d\d:\d\d\.", "", page)


def test_the_wheel_takes_the_template_and_the_style_sheet():
    packaged = (Path(__file__).parent.parent / "setup.py").read_text()
    data = [file.name for file in Path(canvas.__file__).parent.iterdir() if file.suffix not in (".py", "")]
    assert sorted(data) == ["page.html.j2", "style.css"]
    assert all(f'"{name}"' in packaged for name in data)


# ---- several runs ----


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[Path]:
    """Two runs whose untrained model is the same, and whose trained models and learning rates differ."""
    runs = tmp_path_factory.mktemp("pair") / "runs"
    folders = [make_run(runs, "first"), make_run(runs, "second")]
    for number, folder in enumerate(folders):
        evaluation = read_json(folder / "evaluate.json")
        labels = [row["label"] for row in evaluation["rows"]]
        models = dict.fromkeys(labels[:-1], "same") | {labels[-1]: f"own {number}"}
        scores = [
            TaskScore(label, "niah_single_1", length, {"recall": 90.0 - 10 * number - length / 1000}, 4, 0, 0.1)
            for label in (labels[0], labels[-1])
            for length in (512, 4096)
        ]
        write_json(folder / "evaluate.json", {**evaluation, "models": models, "scores": json_of(scores)})
        config = read_json(folder / "train.config.json")
        write_json(folder / "train.config.json", {**config, "optim": {"lr": 1e-4 * (number + 1), "betas": [0.9, 0.95]}})
    return folders


@pytest.fixture(scope="module")
def compared(pair) -> Path:
    return report(pair)


def test_a_comparison_shows_both_runs_in_the_same_tables(pair, compared):
    page = Page(compared.read_text())
    assert re.search(r"<p class=.lead.>At 4096 tokens first: longrope2 trained finds", compared.read_text())
    assert compared == pair[0] / "comparison.html" and not (pair[0] / "report.html").exists()
    trained = [f"{folder.name}: longrope2 trained" for folder in pair]
    labels = [f"{method} untrained" for method in ("none", "pi", "ntk", "yarn", "longrope2")]
    assert [*page.table("Needle accuracy")][1:] == [*labels, *trained], "the untrained models stand once"
    ruler = page.table("RULER, average")
    assert ruler[trained[0]][:2] == ["89.49*", "85.90*"]
    assert ruler[trained[1]][:2] == ["79.49", "75.90"]
    assert page.table("RULER by task, first: longrope2 trained")["512"][0] == "89.49"
    assert [*page.table("Training")][1:] == ["first", "second"]
    assert page.table("Settings that differ") == {
        "head": ["first", "second"], "optim.lr": ["0.0001", "0.0002"],
    }  # fmt: skip


def test_a_comparison_prints_a_figure_a_cell(pair):
    accuracy, answers, texts, difference = compose(pair).text.split("\n\n")
    trained = [f"{folder.name}: longrope2 trained" for folder in pair]
    assert [line.split("  ")[0] for line in accuracy.splitlines()[-3:-1]] == trained
    assert all(table.splitlines()[1].split()[-2:] == ["2048", "4096"] for table in (accuracy, answers, texts))
    assert re.match(rf"At 4096 tokens {trained[0]} finds \d+% and {trained[1]} \d+%: \+0\.0 points", difference)


def test_the_difference_of_two_trained_models_is_over_the_documents_that_both_answered():
    def row(label: str, shares: dict[str, float]) -> dict:
        return {"label": label, "by_length": [{"length_tokens": 64, "shares": shares}]}

    ours = row("longrope2 trained", {"a": 1.0, "b": 0.75, "c": 0.5, "d": 1.0})
    theirs = row("yarn trained", {"d": 1.0, "c": 0.25, "b": 0.25, "a": 0.75, "e": 0.0})
    words = (
        "At 64 tokens longrope2 trained finds 81% and yarn trained 56%: +25.0 points, with a standard error of 10.2 "
        "over the same 4 documents"
    )
    # of the differences 0.25, 0.5, 0.25, 0: deviation 0.2041, divided by sqrt(4)
    assert trained_difference([row("yarn untrained", {"a": 0.0}), ours, theirs]) == words
    assert trained_difference([ours]) == trained_difference([]) == ""
    for without_common_length in ([], [{"length_tokens": 128, "shares": {"a": 1.0, "b": 1.0}}]):
        assert trained_difference([ours, {"label": "yarn trained", "by_length": without_common_length}]) == ""
    earlier = {"label": "yarn trained", "by_length": [{"length_tokens": 64, "accuracy": 0.5}]}
    for other in (row("yarn trained", {"x": 1.0, "y": 1.0}), earlier):
        assert trained_difference([ours, other]).startswith(
            "longrope2 trained and yarn trained have not answered the same"
        )


def test_a_comparison_draws_a_curve_for_each_run(pair, compared):
    beside = pictures_of(compared)
    for name, column, values in (
        ("loss", "run", {"first", "second"}),
        ("factors", "method", {"first", "second", "PI"}),
    ):
        rows = csv.DictReader((beside / f"{name}.csv").read_text().splitlines())
        assert values <= {row[column] for row in rows}
    lines = {folder.name: (metrics(20, ("short", "long")), ()) for folder in pair}
    words = re.findall(r">([^<>]+)</text>", charts.loss_by_window(lines).svg())
    assert {"first, long", "first, short", "second, long", "second, short"} <= {*words}


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [tmp_path / one / "run" for one in ("a", "b")]
    for folder in folders:
        write_jsonl(folder / "metrics.jsonl", metrics(5, ("short", "long")))
    page = Page(compose(folders).page)
    assert [*page.table("Training")][1:] == [str(folder) for folder in folders]


def test_a_folder_named_twice_is_refused(run):
    with pytest.raises(UserError, match="names a folder twice"):
        compose([run, run.parent / "." / run.name])


# ---- parts ----


def test_factors_without_a_critical_index_are_drawn():
    assert "tcd" in charts.factor_curves({"yarn": METHODS["yarn"](SPECTRUM, L)}, None).svg()


def test_the_drawn_factors_and_periods_are_those_of_the_methods():
    made = METHODS["yarn"](SPECTRUM, L)
    _, columns = charts.factor_curves({"mine": made}, None).draw(Figure(), THEMED)
    own = [i for i, name in enumerate(columns["method"]) if name == "mine"]
    assert [columns["rescale_factor"][i] for i in own] == list(made.rescale)
    assert [columns["period_tokens"][i] for i in own] == pytest.approx(2 * math.pi / made.inv_freq)
    _, seen = charts.cosines(made, 12).draw(Figure(), THEMED)
    assert seen["periods_in_window"] == pytest.approx(L0 * SPECTRUM.inv_freq / (2 * math.pi))
    assert (
        seen["periods_in_window"][SPECTRUM.critical_index] < 1 < seen["periods_in_window"][SPECTRUM.critical_index - 1]
    )


def test_a_moving_average_keeps_lines_and_ends():
    assert charts.smooth(np.arange(9.0), 3)[1:-1] == pytest.approx(np.arange(1.0, 8.0))
    assert charts.smooth([5.0], 1) == pytest.approx([5.0])
    assert charts.smooth([2.0] * 7, 100) == pytest.approx([2.0] * 7)


def test_a_long_training_keeps_the_page_small(tmp_path):
    lines = metrics(20_000, ("short", "long"))
    drawn = charts.loss_by_window({"long": (lines, ())})
    assert len(drawn.svg()) < 250_000
    drawn.write(tmp_path / "loss")
    assert len((tmp_path / "loss.csv").read_text().splitlines()) == 20_001


def test_numbers_are_short():
    assert [context_length(n) for n in (512, 1024, 131072, 1000)] == ["512", "1k", "128k", "1000"]
    assert [amount(n) for n in (12, 1_500_000, 2e9)] == ["12", "1.5M", "2B"]
    assert amount(983_040, 3) == "983k"
    assert [perplexity(p) for p in (1.00421, 1.5, 25.51, 12_345.0)] == ["1.0042", "1.500", "25.5", "1.2e+04"]
    assert perplexity(None) == perplexity(math.inf) == "not finite"
    assert [duration(s) for s in (59, 750, 5400)] == ["59 s", "12.5 min", "1.5 h"]


def test_a_missing_folder_and_a_damaged_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere is no folder"):
        report([tmp_path / "nowhere"])
    (tmp_path / "evaluate.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluate\.json.*not valid JSON"):
        report([tmp_path])


def test_the_command_writes_a_page(tmp_path):
    write_jsonl(tmp_path / "run" / "metrics.jsonl", metrics(5, ("short", "long")))
    page = tmp_path / "out" / "page.html"
    command = [sys.executable, "-m", "lr2train.report", str(tmp_path / "run"), "--out", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert Page(page.read_text()).pictures
    assert (tmp_path / "out" / "page_files" / "loss.png").stat().st_size > 10_000


def test_the_command_refuses_a_missing_folder_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        main([str(tmp_path / "nowhere")])
    assert refused.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("report: ")
