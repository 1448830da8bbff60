"""What has been measured: the scores of every row of every cell, read from the run folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lr2train import io
from tools.map_rcd_verdicts import in_words
from tools.reproduce import figures
from tools.reproduce.bed import Base, Form
from tools.reproduce.figures import Estimate, Scores
from tools.reproduce.rows import ROWS, SHARED

Json = dict[str, Any]
UNTRAINED = "untrained "  # begins the key of a row of the untrained base under a method
BASE = UNTRAINED + "none"  # under its own table
LONG, MIDDLE, SHORT = "long", "middle", "short"


@dataclass
class Cell:
    """One base at one extension ratio.

    Attributes:
        planned: keys of the rows that the form runs here.
        rows: row -> seed -> scores; a seed that has not run is missing.
        untrained: row -> scores of the untrained base; its keys begin with ``UNTRAINED``.
        factors: row -> attention factor of the first seed that has run.
        base_training: steps and tokens of the base's training; empty where it has not finished.
        tokens_seen: numbers of tokens that rows were trained on; one, unless rows differ.
        searches: kind -> the search.json of each seed that has run.
        map: the cells of tools.map_rcd, where it has run.
        map_verdicts: what it says of the paper's two hypotheses, over all its attention factors.
    """

    base: Base
    ratio: int
    original_window_tokens: int
    lengths: list[int]
    planned: tuple[str, ...] = tuple(ROWS)
    rows: dict[str, dict[int, Scores]] = field(default_factory=dict)
    untrained: dict[str, Scores] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    base_training: tuple[int, ...] = ()
    tokens_seen: set[int] = field(default_factory=set)
    searches: dict[str, list[Json]] = field(default_factory=dict)
    map: list[Json] = field(default_factory=list)
    map_verdicts: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As tables name it."""
        return f"{self.base.name}, {self.ratio}x"

    def window(self, which: str) -> list[int]:
        """LONG: the target window alone; MIDDLE: the lengths between; SHORT: those in the original window."""
        if which == LONG:
            return self.lengths[-1:]
        if which == MIDDLE:
            return [length for length in self.lengths[:-1] if length > self.original_window_tokens]
        return [length for length in self.lengths if length <= self.original_window_tokens]

    def score(self, row: str, lengths: Sequence[int]) -> Estimate:
        """Mean score of a row over lengths; an untrained row has one seed."""
        return figures.estimate(figures.at(self._seeds(row), lengths))

    def difference(self, a: str, b: str, lengths: Sequence[int]) -> Estimate:
        """Score of row a minus row b, over the seeds that both have."""
        one, two = self._paired(a, b)
        return figures.difference(figures.at(one, lengths), figures.at(two, lengths))

    def text_ratio(self, row: str) -> Estimate:
        """Perplexity of plain text in the original window as percent of the base's: 100 is as good, more is worse.

        The standard error is that of the logarithm, carried over.
        """
        one, two = self._paired(row, BASE)
        length = self.window(SHORT)[-1]
        loss = figures.difference(figures.text_loss(one, length), figures.text_loss(two, length))
        ratio = 100 * float(np.exp(loss.mean))
        return figures.scaled(loss, ratio, ratio)

    def kept(self, row: str) -> Estimate:
        """Short score as percent of the base's."""
        base = self.score(BASE, self.window(SHORT)).mean
        lost = self.difference(row, BASE, self.window(SHORT))
        share = 100 / base
        return figures.scaled(lost, share, 100 + share * lost.mean)

    def _seeds(self, row: str) -> list[Scores]:
        if row in self.untrained:
            return [self.untrained[row]]
        return [scores for _, scores in sorted(self.rows.get(row, {}).items())]

    def _paired(self, a: str, b: str) -> tuple[list[Scores], list[Scores]]:
        """The same seeds of two rows; an untrained row stands beside every seed."""
        if b in self.untrained:
            seeds = self._seeds(a)
            return seeds, [self.untrained[b]] * len(seeds)
        one, two = self.rows.get(a, {}), self.rows.get(b, {})
        both = sorted(one.keys() & two.keys())
        return [one[seed] for seed in both], [two[seed] for seed in both]


def row_for(key: str, shared: bool) -> str:
    """The row that stands for a method in the table of the shared attention factor, or of its own."""
    return key + SHARED if shared and key + SHARED in ROWS else key


def read(form: Form, runs: Path) -> list[Cell]:
    """Everything that has been measured so far."""
    return [_cell(form, base, ratio, runs) for base, ratio in form.cells]


def _cell(form: Form, base: Base, ratio: int, runs: Path) -> Cell:
    name, planned = f"{base.name}_{ratio}x", form.rows_at(ratio)
    cell = Cell(base, ratio, form.original_window_tokens, form.lengths(ratio), planned)
    if (folder := runs / f"{name}_untrained" / "evaluate.json").exists():
        found = figures.scores_in(folder.parent)
        cell.untrained = {UNTRAINED + label.removesuffix(" untrained"): scores for label, scores in found.items()}
    if (file := runs / base.name / "train.json").exists():
        trained = io.read_json(file)
        cell.base_training = trained["steps"], trained["tokens_seen"]
    for key in planned:
        for seed in range(form.seeds):
            folder = runs / f"{name}_{key}_s{seed}"
            if (folder / "evaluate.json").exists():
                cell.rows.setdefault(key, {})[seed] = next(iter(figures.scores_in(folder, "trained").values()))
                factor = io.read_json(folder / "factors.json")["attention_factor"]
                cell.factors.setdefault(key, factor)
                cell.tokens_seen.add(io.read_json(folder / "train.json")["tokens_seen"])
    for kind in form.searches:
        files = [runs / f"{name}_search_{kind}_s{seed}" / "search.json" for seed in range(form.search_seeds)]
        cell.searches[kind] = [io.read_json(file) for file in files if file.exists()]
    lines = runs / f"{name}_map" / "cells.jsonl"
    if (summary := lines.parent / "summary.json").exists():
        verdicts = io.read_json(summary)["verdicts"]
        cell.map_verdicts = in_words(verdicts.get("all") or next(iter(verdicts.values()))).splitlines()[:2]
        cell.map = [json.loads(text) for text in lines.read_text().splitlines()]
    return cell


def best_index(lines: Sequence[Mapping[str, Any]], resamples: int = 1000, seed: int = 0) -> Estimate:
    """Critical index of the map's best cell: mean and standard deviation over resamples of the answers.

    In each resample the best cell over all scales and attention factors counts.
    """
    grid = [line for line in lines if line["critical_index"] is not None]
    if not grid:
        return Estimate(float("nan"), float("nan"))
    nll = np.array([line["nll"] for line in grid])  # [cells, answers]
    index = np.array([line["critical_index"] for line in grid])
    n = nll.shape[1]
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)  # [resamples, answers]
    best = index[(counts @ nll.T).argmin(axis=1)]
    return Estimate(float(best.mean()), float(best.std()))
