"""The report page: one file without references, built from the files that exist, with all data escaped."""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from reporting.searches import L0, SPECTRUM, L, make_search, write_jsonl

from lr2train.config import UserError
from lr2train.io import read_json, write_json
from lr2train.report import main, render, report
from lr2train.reporting import charts, inputs
from lr2train.reporting.heatmap import color_of
from lr2train.reporting.numbers import amount, context_length, duration, perplexity
from lr2train.rope.methods import METHODS
from lr2train.run import provenance

LENGTHS, DEPTHS = [512, 1024, 2048, 4096], [0.0, 0.25, 0.5, 0.75, 1.0]
EVIL = '<script>alert("x")</script>'


class _Parsed(HTMLParser):
    """Tags and references of a document; refuses a document whose tags do not close in order."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self._open: list[str] = []
        self.feed(markup)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data", "action")
        ]
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag != "meta":
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


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
def page(run) -> str:
    # The run recorded runs/… as relative paths. The directory where pytest starts may hold other runs of those names.
    with contextlib.chdir(run.parent.parent):
        return report([run]).read_text()


def test_the_page_refers_to_no_other_file(page):
    parsed = _Parsed(page)
    assert [one for one in parsed.references if not one.startswith(("#", "data:image/png;base64,"))] == []
    assert "script" not in parsed.tags
    assert "link" not in parsed.tags
    assert "iframe" not in parsed.tags
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert parsed.tags.count("svg") == 6 + 2 + 5 + 4 + 1  # needle maps, factors, search, training, base


def test_benchmarks_are_tables_with_their_best_figure(page):
    part = page[page.index('id="benchmarks"') :]
    assert "<td class=best>50.50</td>" in part and "<td>40.25</td>" in part
    assert "Averages over 11 of 13 tasks." in part


def test_a_finished_run_fills_every_section(page):
    assert 'class="missing"' not in page
    for words in (
        "0%",
        "100%",
        "512 → 4,096 tokens",
        "longrope2 trained",
        "rcd 12",
        "needles_long",
        "return sum(values)",
        "2.00e-06",
        "torch",
        "runs/factors/factors.json",
    ):
        assert words in page, words


def test_the_trained_row_comes_last_everywhere(page):
    panels = re.findall(r"<h3>([^<]*)<span>mean", page)
    assert panels[-1] == "longrope2 trained"
    assert len(panels) == 6
    assert page.count('<tr class=last><th scope="row">longrope2 trained') == 3


def test_charts_follow_the_theme(page):
    assert "#0a0b" not in page, "a placeholder colour was not replaced"
    assert "prefers-color-scheme: dark" in page
    assert "var(--s0)" in page


def test_related_runs_are_found_by_their_recorded_paths(run, monkeypatch):
    found = inputs.gather([run])
    assert [folder.name for folder in (found.search_folder, found.corpus_folder, found.base_folder)] == [
        "factors",
        "corpus",
        "base",
    ]
    monkeypatch.chdir(run.parent.parent)
    assert inputs.gather([Path("runs/first")]).search_folder == Path("runs/factors")


def test_a_named_folder_replaces_a_recorded_run(run, tmp_path):
    make_search(tmp_path / "other")
    found = inputs.gather([run, tmp_path / "other"])
    assert found.search_folder == tmp_path / "other"
    assert found.corpus_folder.name == "corpus"


def test_the_page_of_an_empty_run_names_the_verbs_to_run(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    page = report([folder], tmp_path / "out" / "page.html").read_text()
    for verb in ("prepare", "search", "train", "evaluate", "export", "generate"):
        assert f"lr2train {verb} " in page
    assert "Nothing has been recorded here yet." in page
    _Parsed(page)


def test_a_search_without_training_has_a_page(tmp_path):
    runs = tmp_path / "runs"
    make_search(runs / "factors")
    make_corpus(runs / "corpus")
    settings = {"data": {"path": "runs/corpus"}, "model": {"path": "runs/base/model"}, "search": {"top_k": 6}}
    write_json(runs / "factors" / "search.config.json", settings)
    write_json(runs / "base" / "model" / "config.json", {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3})
    with contextlib.chdir(tmp_path):
        page = report([runs / "factors"]).read_text()
    for words in (
        "512 → 4,096 tokens",
        "LlamaForCausalLM, 3 layers",
        "found in 5 generations of 24 candidates in 75 s, not trained yet",
        "Search: needle perplexity",
        "Perplexity by generation",
        "candidates were dropped before all documents were read",
        "rcd 12",
        "114 candidates",
        "needles_long",
        "lr2train train",
    ):
        assert words in page, words
    parsed = _Parsed(page)
    assert parsed.tags.count("svg") == 2 + 5


def test_the_page_of_a_text_search_calls_its_perplexity_text(tmp_path):
    make_search(tmp_path / "factors")
    search = read_json(tmp_path / "factors" / "search.json")
    write_json(
        tmp_path / "factors" / "search.json",
        search | {"settings": {"objective": "text", "top_k": 6}, "scored_documents": 12},
    )
    page = report([tmp_path / "factors"]).read_text()
    assert "all tokens of plain documents" in page
    assert "needle perplexity" not in page
    assert "over 12 documents" in page


def test_a_running_training_with_a_half_written_line_has_a_page(tmp_path):
    folder = tmp_path / "running"
    write_jsonl(folder / "metrics.jsonl", metrics(1, ("long",)))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss"')  # a line being written
    page = report([folder]).read_text()
    assert "In training, step 1 reached" in page
    assert "Loss by window" in page


def test_the_held_out_loss_stands_beside_the_training_loss(tmp_path):
    def held_out(step: int) -> dict:
        return {"heldout_loss_short": 2.5 - step / 40, "heldout_loss_long": None if step else 7.25}

    lines = [
        line | (held_out(line["step"]) if not line["step"] % 10 else {}) for line in metrics(20, ("short", "long"))
    ]
    folder = tmp_path / "measured"
    write_jsonl(folder / "metrics.jsonl", [{"step": 0, "tokens_seen": 0, **held_out(0)}, *lines])
    page = report([folder]).read_text()
    assert "step 1 → 20" in page  # of the training loss
    assert (
        "Held-out loss: short window 2.500 (step 0) to 2.000 (step 20), long window 7.250 (step 0) to not finite "
        "(step 20)." in page
    )
    assert "training and held-out loss of the run by window" in page
    assert "Points: held-out documents" in page


def test_data_is_escaped_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # another corpus may lie at runs/corpus of the checkout
    folder = make_run(tmp_path / "runs", f"a&{'b'}")
    evaluation = json.loads((folder / "evaluate.json").read_text())
    evaluation["rows"][-1]["label"] = EVIL
    write_json(folder / "evaluate.json", evaluation)
    for name in ("generate.json", "export.json", "train.provenance.jsonl", "train.config.json"):
        values = json.loads((folder / name).read_text())
        values |= {
            "text": EVIL,
            "prompt": EVIL,
            "folder": EVIL,
            "command": [EVIL],
            "commit": EVIL,
            "host": EVIL,
            "name": EVIL,
        }
        write_json(folder / name, values)
    manifest = json.loads((tmp_path / "runs" / "corpus" / "corpus.json").read_text())
    manifest["sources"][0]["name"] = manifest["fingerprint"] = EVIL
    write_json(tmp_path / "runs" / "corpus" / "corpus.json", manifest)
    page = report([folder]).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 10
    assert "a&amp;b" in page
    _Parsed(page)


def test_the_same_inputs_give_the_same_page(run, page):
    with contextlib.chdir(run.parent.parent):
        again = render(inputs.gather([run]))
    assert _without_time(again) == _without_time(page)


def _without_time(page: str) -> str:
    return re.sub(r"written \d{4}-\d\d-\d\d \d\d:\d\d\.", "", page)


def test_factors_without_a_critical_index_are_drawn():
    assert "tcd" in charts.factor_curves(METHODS["yarn"](SPECTRUM, L), None).svg()


def test_a_moving_average_keeps_lines_and_ends():
    assert charts.smooth(np.arange(9.0), 3)[1:-1] == pytest.approx(np.arange(1.0, 8.0))
    assert charts.smooth([5.0], 1) == pytest.approx([5.0])
    assert charts.smooth([2.0] * 7, 100) == pytest.approx([2.0] * 7)


def test_heat_map_text_contrasts_with_its_cell():
    assert color_of(0.0)[1] == "#fff"
    assert color_of(1.0)[1] == "#111"


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


def test_the_command_writes_a_page(run, tmp_path):
    command = [sys.executable, "-m", "lr2train.report", str(run), "--out", str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").stat().st_size > 50_000


def test_the_command_refuses_a_missing_folder_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        main([str(tmp_path / "nowhere")])
    assert refused.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("report: ")
