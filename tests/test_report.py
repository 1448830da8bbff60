"""report: a page from whatever is there, complete in itself, safe against its data. The run in the fixture is written with the verbs' own functions."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lr2train.config import SearchConfig, UserError
from lr2train.evolution.genome import Space
from lr2train.evolution.loop import evolve
from lr2train.report import render, report
from lr2train.reporting import charts, inputs
from lr2train.reporting.heatmap import color_of, short_count
from lr2train.rope.methods import METHODS
from lr2train.rope.spectrum import Spectrum
from lr2train.run import provenance, write_json
from lr2train.search import _line

LENGTHS, DEPTHS, L0, L = [512, 1024, 2048, 4096], [0.0, 0.25, 0.5, 0.75, 1.0], 512, 4096
SPECTRUM = Spectrum(64, 10000.0, L0)
EVIL = '<script>alert("x")</script>'


class _Parsed(HTMLParser):
    """Open tags and their attributes; refuses a document whose tags do not close in order."""

    VOID = {"meta", "br", "img", "path", "rect", "use", "line"}

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self._open: list[str] = []
        self.feed(markup)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data", "action")]
        if tag not in ("meta",):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta",):
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def _jsonl(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _fitness(candidates):
    """A smooth bowl: best at rcd 12, a tail of 1.6 s and an attention factor of 1.25."""
    return [
        1.4 + 8 * (one.attention_factor - 1.25) ** 2 * 40 + 0.15 * abs(one.critical_index - 12) + float(np.mean((np.array(one.tail) / 8 - 1.6) ** 2)) * 4
        for one in candidates
    ]


def make_search(folder: Path) -> dict:
    """runs/factors: the real evolution over a synthetic fitness."""
    space = Space(SPECTRUM, L, SearchConfig(population=24, top_k=6, generations=12), 1.0)
    generations = list(evolve(space, _fitness, 0))
    forwards = SimpleNamespace(document_forwards=0)
    lines = []
    for generation in generations:
        forwards.document_forwards = generation.evaluated * 6
        lines.append(_line(generation, forwards))  # type: ignore[arg-type]
    best = generations[-1].best
    _jsonl(folder / "generations.jsonl", lines)
    _jsonl(folder / "journal.jsonl", [{"candidate": best.candidate.key, "document": d, "nll": 3.1, "seconds": 0.11, "rank": d % 2} for d in range(6)])
    write_json(folder / "search.json", {"perplexity": best.perplexity, "critical_index": best.candidate.critical_index, "attention_factor": best.candidate.attention_factor})
    write_json(folder / "factors.json", space.factors(best.candidate).to_json())
    return space.factors(best.candidate).to_json()


def make_corpus(folder: Path) -> None:
    """runs/corpus: the manifest alone."""
    sources = [
        {"name": "stdlib", "kind": "stdlib", "documents": 495, "tokens": 3394929, "broken": 1, "holdout_documents": 17, "holdout_tokens": 163004},
        {"name": "needles_long", "kind": "needles", "documents": 240, "tokens": 983040, "broken": 0, "holdout_documents": 0, "holdout_tokens": 0},
    ]
    counts = {
        window: {
            "segments": segments,
            "planned_tokens": segments * L - 700,
            "padding_share": 0.0032,
            "sources": {s["name"]: {"documents": 71, "tokens": 22355, "planned_tokens": segments * L // 2} for s in sources},
        }
        for window, segments in (("short", 245), ("long", 610))
    }
    write_json(
        folder / "corpus.json",
        {"format": 1, "fingerprint": "54c10f65", "original_window_tokens": L0, "segment_tokens": L, "vocab_size": 1024, "sources": sources, "windows": counts, "lost_tokens": {"tail": 812}},
    )


def metrics(steps: int, windows: tuple[str, ...], seed: int = 0) -> list[dict]:
    """Lines as the training loop writes them."""
    rng, lines = np.random.default_rng(seed), []
    for step in range(1, steps + 1):
        loss = {window: (2.1 if window == "short" else 1.7) + 2.5 * math.exp(-step / 25) + rng.normal(0, 0.06) for window in windows}
        lines.append(
            {
                "step": step, "loss": sum(loss.values()) / len(loss), "loss_short": loss.get("short"), "loss_long": loss.get("long") if step % 5 else None,
                "n_target_tokens": 8000, "tokens_seen": step * 2 * L, "grad_norm": 0.6 + abs(rng.normal(0, 0.2)), "lr": 3e-4 * min(step / 10, 0.5 * (1 + math.cos(math.pi * step / steps))),
                "tokens_per_s": 3000 + rng.normal(0, 150), "mfu": None, "window_mix": 0.7, "peak_gib": 1.4, "data_wait_s": 0.01, "step_s": 2.7,
            }
        )  # fmt: skip
    return lines


def row(label: str, attention_factor: float, reach: float, sharp: float) -> dict:
    """A row of evaluate.json whose accuracy falls with length and with distance from the end."""
    accuracy = {(n, d): float(np.clip(1 / (1 + math.exp(sharp * (math.log2(n) - reach - d))), 0, 1)) for n in LENGTHS for d in DEPTHS}
    cells = [{"length_tokens": n, "depth": d, "accuracy": round(a * 4) / 4, "perplexity": 1.02 + 60 * (1 - a) ** 2, "documents": 4} for (n, d), a in accuracy.items()]
    by_length = []
    for n in LENGTHS:
        mean = float(np.mean([cell["accuracy"] for cell in cells if cell["length_tokens"] == n]))
        by_length.append({"length_tokens": n, "accuracy": mean, "answer_perplexity": 1.05 + 90 * (1 - mean) ** 3, "text_perplexity": 6.1 + 40 * (1 - mean) ** 2})
    return {"label": label, "attention_factor": attention_factor, "cells": cells, "by_length": by_length}


def make_run(runs: Path, name: str = "first") -> Path:
    """A finished run with all its relatives under ``runs``."""
    folder, made = runs / name, make_search(runs / "factors")
    make_corpus(runs / "corpus")
    _jsonl(runs / "base" / "metrics.jsonl", metrics(200, ("short",), 1))
    write_json(runs / "base" / "train.json", {"steps": 200})
    write_json(folder / "factors.json", made)
    _jsonl(folder / "metrics.jsonl", metrics(120, ("short", "long")))
    write_json(folder / "train.config.json", {"name": name, "rope": {"factors": "runs/factors/factors.json"}, "data": {"path": "runs/corpus"}, "model": {"path": "runs/base/model"}})
    write_json(folder / "train.provenance.json", provenance())
    write_json(
        folder / "train.json",
        {"steps": 120, "final_loss": 1.9, "tokens_seen": 983040, "seconds": 331.0, "world": 2, "peak_gib": 1.4, "model": f"runs/{name}/model", "base": "runs/base/model", "corpus": "runs/corpus"},
    )
    rows = [
        row("none untrained", 1.0, 9.2, 6), row("pi untrained", 1.0, 8.4, 2.5), row("ntk untrained", 1.0, 10.3, 3), row("yarn untrained", 1.21, 10.9, 3),
        row("longrope2 untrained", 1.25, 11.6, 4), row("longrope2 trained", 1.25, 14.5, 4),
    ]  # fmt: skip
    write_json(folder / "evaluate.json", {"original_window_tokens": L0, "target_window_tokens": L, "lengths_tokens": LENGTHS, "rows": rows})
    write_json(folder / "export.json", {"folder": f"runs/{name}/export", "dtype": "float32", "bytes": 3_400_000, "short_logit_difference": 0.4, "long_logit_difference": 2e-6})
    sample = {"prompt": "def mean(values):\n    " * 80, "prompt_tokens": 497, "new_tokens": 64, "text": "return sum(values) / len(values)\n", "window": "long", "switched": True, "seconds": 3.2}
    write_json(folder / "generate.json", sample)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("work") / "runs")


@pytest.fixture(scope="module")
def page(run) -> str:
    return report([run]).read_text()
