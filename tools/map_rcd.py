"""Map needle perplexity over the critical index rcd and the scale of the tail, before any training: the paper's hypothesis, measured.

    python -m tools.map_rcd --model runs/base/model --corpus runs/corpus --target 4096 --window 512 --attention-factor 1.0 1.15 1.3

A cell is LongRoPE2-shaped factors with a constant tail of ``scale * L / L0`` from rcd on; the measure is the perplexity of the answers of
needle documents, as in a search (same documents for the same number and seed). YaRN, NTK and PI stand beside, at the same attention factor.
Finished cells stand in ``<out>/cells.jsonl`` and are not computed again: the same command goes on where a killed one stopped.

Two hypotheses are tested with a paired bootstrap over the documents: rcd < tcd beats tcd, scale > 1 beats scale 1. Each in two ways, as
the best of many cells looks better than it is: over all pairs of cells that differ in nothing else, and best against best, where the best
cells are chosen on the documents of a resample and judged on those that it left out.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lr2train import io, run
from lr2train.cli.composition import compose
from lr2train.cli.door import EXIT_BAD_INPUT
from lr2train.config import Config, UserError, to_dict
from lr2train.data.corpus import Corpus
from lr2train.data.needles import NeedleDocument, needle_set
from lr2train.model import load, rotary
from lr2train.model.score import score
from lr2train.rope.factors import Factors
from lr2train.rope.methods import METHODS
from lr2train.rope.spectrum import Spectrum

BESIDE = ("yarn", "ntk", "pi")
RESAMPLES = 10_000
SURE = 0.975  # share of resamples from which on a hypothesis is said to hold; 1 - SURE and less: its opposite
Json = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One set of factors; a rule of ``BESIDE`` has neither critical index nor scale."""

    method: str
    attention_factor: float
    critical_index: int | None = None
    scale: float | None = None  # of the tail, in multiples of s = L / L0

    def factors(self, spectrum: Spectrum, target_tokens: int) -> Factors:
        """What the model is given."""
        if self.scale is None:
            return replace(METHODS[self.method](spectrum, target_tokens), attention_factor=self.attention_factor)
        assert self.critical_index is not None
        return METHODS[self.method](
            spectrum,
            target_tokens,
            critical_index=self.critical_index,
            tail=self.scale * target_tokens / spectrum.window_tokens,
            attention_factor=self.attention_factor,
        )


class Meter:
    """A loaded model and the needle documents; measures cells."""

    def __init__(self, config: Config, documents: Sequence[NeedleDocument]) -> None:
        torch.set_num_threads(1)
        self._spectrum, self._target = spectrum_of(config), config.rope.target_window_tokens
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = load.load_whole(load.folder_of(config.model), config.model.dtype, device, config.model.overrides)
        self._rotary = rotary.install(self._model, METHODS["none"](self._spectrum, self._target))
        self._documents = documents

    def measure(self, cell: Cell) -> Json:
        """The line of cells.jsonl."""
        start = time.monotonic()
        self._rotary.use(cell.factors(self._spectrum, self._target))
        scores = [score(self._model, self._rotary, "long", one.tokens, one.answer_spans) for one in self._documents]
        nll = [one.nll if math.isfinite(one.nll) else 1e9 for one in scores]  # a model that breaks is as bad as can be
        of_model = {"nll": nll, "exact": [one.exact for one in scores]}
        perplexity = math.exp(min(sum(nll) / sum(one.n_tokens for one in scores), 700.0))
        return {**asdict(cell), "perplexity": perplexity, **of_model, "seconds": round(time.monotonic() - start, 2)}


_of_process: list[Meter] = []  # of a worker process: it loads the model once


def _start_worker(config: Config, documents: Sequence[NeedleDocument]) -> None:
    _of_process[:] = [Meter(config, documents)]


def _measure(cell: Cell) -> Json:
    return _of_process[0].measure(cell)


def spectrum_of(config: Config) -> Spectrum:
    """Of the original model."""
    return load.spectrum_of(load.config_of(config.model), config.model)


def compose_config(given: argparse.Namespace) -> Config:
    """An experiment's settings with the model, corpus and windows of the command line."""
    window = "null" if given.window is None else given.window
    return compose(
        "search",
        [
            "name=map_rcd",
            f"experiment={given.experiment}",
            f"model.path='{given.model}'",
            f"data.path='{given.corpus}'",
            f"model.original_window_tokens={window}",
            f"rope.target_window_tokens={given.target}",
            "rope.factors=null",
            f"search.documents={given.documents}",
            f"search.seed={given.seed}",
            *(f"search.{key}={value}" for key in ("questions", "distractors") if (value := getattr(given, key)) is not None),
        ],
    )


def documents_of(config: Config) -> list[NeedleDocument]:
    """The documents of a search with the same settings."""
    corpus, knobs = Corpus.open(config.data.path), config.search
    corpus.refuse_other_tokenizer(load.config_of(config.model).vocab_size, load.folder_of(config.model))
    rng, length = run.stream(knobs.seed, "search", "needles"), config.rope.target_window_tokens
    how = {"questions": knobs.questions, "distractors": knobs.distractors}
    return needle_set(corpus, config.data.needles, knobs.documents, length, [knobs.depth], rng, **how)


def cells_of(given: argparse.Namespace, spectrum: Spectrum) -> list[Cell]:
    """All cells, one attention factor after another.

    Raises:
        UserError: a critical index that the model has not.
    """
    indices = given.indices or range(spectrum.lowest_critical_index, min(spectrum.critical_index + 2, spectrum.n_dims - 1) + 1)
    for index in indices:
        if not 1 <= index < spectrum.n_dims:
            raise UserError(f"--indices {index} is outside 1 … {spectrum.n_dims - 1}, the cosine indices of this model; give others")
    cells = []
    for factor in given.attention_factor:
        cells += [Cell(method, factor) for method in BESIDE]
        cells += [Cell("longrope2", factor, index, scale) for index in indices for scale in given.scales]
    return list(dict.fromkeys(cells))


def settings_of(config: Config, documents: Sequence[NeedleDocument], spectrum: Spectrum) -> Json:
    """What finished cells belong to."""
    return {
        "model": load.folder_fingerprint(load.folder_of(config.model)),
        "corpus": Corpus.open(config.data.path).fingerprint,
        "spectrum": asdict(spectrum),
        "target_window_tokens": config.rope.target_window_tokens,
        "documents": len(documents),
        "questions": config.search.questions,
        "distractors": config.search.distractors,
        "depth": config.search.depth,
        "seed": config.search.seed,
        "needles": to_dict(config)["data"]["needles"],
        "answer_tokens": [one.n_answer_tokens for one in documents],
    }


def finished_cells(out: Path, settings: Json) -> dict[Cell, Json]:
    """The cells that an earlier call left; a line that a kill cut short is cut off the file, so that the next append joins nothing.

    Raises:
        UserError: they were measured with another model, other documents or other windows.
    """
    if (out / "settings.json").exists():
        found = io.read_json(out / "settings.json")
        changed = [key for key, value in settings.items() if found.get(key) != value]
        if changed:
            raise UserError(f"--out {out} holds cells of other settings ({', '.join(changed)}); choose another --out, or remove the folder")
    io.write_json(out / "settings.json", settings)
    file = out / "cells.jsonl"
    text = file.read_text() if file.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    lines = [json.loads(line) for line in whole.splitlines()]
    names = Cell.__dataclass_fields__
    return {Cell(**{name: line[name] for name in names}): line for line in lines}


def measured(cells: Sequence[Cell], config: Config, documents: Sequence[NeedleDocument], processes: int) -> Iterator[Json]:
    """The cells' lines as they become ready."""
    if processes <= 1:
        meter = Meter(config, documents)
        yield from map(meter.measure, cells)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (config, documents)) as pool:
        waiting = [pool.submit(_measure, cell) for cell in cells]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def fill(
    cells: Sequence[Cell], done: dict[Cell, Json], config: Config, documents: Sequence[NeedleDocument], given: argparse.Namespace
) -> None:
    """Measure what is missing, into ``done`` and onto the end of cells.jsonl."""
    missing = [cell for cell in cells if cell not in done]
    names = Cell.__dataclass_fields__
    with (given.out / "cells.jsonl").open("a") as file:
        lines = measured(missing, config, documents, given.processes) if missing else iter(())
        for line in run.progress(lines, len(cells), "map_rcd", len(cells) - len(missing)):
            file.write(json.dumps(line) + "\n")
            file.flush()
            done[Cell(**{name: line[name] for name in names})] = line


@dataclass(frozen=True)
class Losses:
    """Mean loss of an answer token, of each cell on each resample of the documents and on the documents that the resample left out.

    Attributes:
        resampled, left_out: float64 [resamples, cells]; left_out is nan where nothing was left out.
        column: of a cell.
    """

    resampled: np.ndarray
    left_out: np.ndarray
    column: dict[Cell, int]


def resample(lines: dict[Cell, Json], answer_tokens: Sequence[int], seed: int, n_resamples: int = RESAMPLES) -> Losses:
    """Draw as many documents as there are, with replacement; every cell sees the same draws, so differences are paired."""
    tokens = np.array(answer_tokens, dtype=float)
    nll = np.array([line["nll"] for line in lines.values()]).T  # [documents, cells]
    rng = run.stream(seed, "map_rcd", "bootstrap")
    counts = rng.multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), size=n_resamples).astype(float)
    unused = (counts == 0).astype(float)
    with np.errstate(invalid="ignore"):
        return Losses(
            counts @ nll / (counts @ tokens)[:, None],
            unused @ nll / (unused @ tokens)[:, None],
            {cell: column for column, cell in enumerate(lines)},
        )


def judge(losses: Losses, better: Sequence[Cell], worse: Sequence[Cell], lines: dict[Cell, Json]) -> Json | None:
    """How far ``better`` beats ``worse``, two groups of cells; None where a group is empty.

    Returns:
        pairs, pairs_won: of cells that differ in nothing but what tells the groups apart.
        difference, low, high: of the mean loss (nats per answer token) over all pairs, worse - better, with the 95 % interval.
        sure: share of resamples with a positive difference.
        best_sure: the same of best against best, judged on the documents left out; a tie counts half.
    """
    if not better or not worse:
        return None
    pairs = [(a, b) for a in better for b in worse if _match(a, b)]
    a, b = ([losses.column[pair[side]] for pair in pairs] for side in (0, 1))
    differences = (losses.resampled[:, b] - losses.resampled[:, a]).mean(axis=1)
    low, high = np.percentile(differences, (2.5, 97.5))
    won = [_loss(lines[two]) > _loss(lines[one]) for one, two in pairs]
    best = [min(group, key=lambda cell: _loss(lines[cell])) for group in (better, worse)]
    return {
        "pairs": len(pairs),
        "pairs_won": sum(won),
        "difference": float(np.mean([_loss(lines[two]) - _loss(lines[one]) for one, two in pairs])),
        "low": float(low),
        "high": float(high),
        "sure": float(np.mean(differences > 0)),
        "best_better": asdict(best[0]) | {"perplexity": lines[best[0]]["perplexity"]},
        "best_worse": asdict(best[1]) | {"perplexity": lines[best[1]]["perplexity"]},
        "best_sure": _best_against_best(losses, better, worse),
    }


def by_value(losses: Losses, lines: dict[Cell, Json], key: str, reference: float) -> dict[str, Json]:
    """Every critical index against tcd, or every scale against 1, over all pairs: {value: difference, low, high, sure} as in ``judge``."""
    values = sorted({getattr(cell, key) for cell in lines} - {reference})
    found = {}
    for value in values:
        groups = [[cell for cell in lines if getattr(cell, key) == one] for one in (value, reference)]
        if one := judge(losses, groups[0], groups[1], lines):
            found[f"{value:g}"] = {name: one[name] for name in ("difference", "low", "high", "sure")}
    return found


def _match(a: Cell, b: Cell) -> bool:
    """The groups differ in the index or in the scale, so two cells are a pair when the other one and the attention factor agree."""
    return a.attention_factor == b.attention_factor and (a.scale == b.scale) != (a.critical_index == b.critical_index)


def _loss(line: Json) -> float:
    return math.log(line["perplexity"])


def _best_against_best(losses: Losses, better: Sequence[Cell], worse: Sequence[Cell]) -> float | None:
    rows = np.flatnonzero(np.isfinite(losses.left_out).all(axis=1))
    if not len(rows):
        return None
    chosen = []
    for group in (better, worse):
        columns = np.array([losses.column[cell] for cell in group])
        best = columns[losses.resampled[np.ix_(rows, columns)].argmin(axis=1)]
        chosen.append(losses.left_out[rows, best])
    return float(np.mean((chosen[0] < chosen[1]) + 0.5 * (chosen[0] == chosen[1])))


def verdicts(lines: dict[Cell, Json], answer_tokens: Sequence[int], critical_index: int, seed: int) -> dict[str, Json]:
    """Both hypotheses, and every critical index and scale by itself, for each attention factor and for all of them together."""
    grid = {cell: line for cell, line in lines.items() if cell.scale is not None}
    if not grid:
        return {}
    losses = resample(grid, answer_tokens, seed)
    factors = sorted({cell.attention_factor for cell in grid})
    groups = {f"{factor:g}": [cell for cell in grid if cell.attention_factor == factor] for factor in factors}
    if len(factors) > 1:
        groups["all"] = list(grid)
    found = {}
    for name, cells in groups.items():
        here = {cell: grid[cell] for cell in cells}
        below, at = ([cell for cell in cells if _sign(cell.critical_index, critical_index) == sign] for sign in (-1, 0))
        above_1, at_1 = ([cell for cell in cells if _sign(cell.scale, 1) == sign] for sign in (1, 0))
        found[name] = {
            "rcd < tcd beats tcd": judge(losses, below, at, here),
            "scale > 1 beats scale 1": judge(losses, above_1, at_1, here),
            "rcd against tcd": by_value(losses, here, "critical_index", critical_index),
            "scale against 1": by_value(losses, here, "scale", 1.0),
        }
    return found


def _sign(value: float | None, reference: float) -> int:
    assert value is not None
    return (value > reference) - (value < reference)


def in_words(verdict: Json) -> str:
    """The verdicts of one attention factor, a line each."""
    lines = [_hypothesis(name, verdict[name]) for name in ("rcd < tcd beats tcd", "scale > 1 beats scale 1")]
    for name in ("rcd against tcd", "scale against 1"):
        each = (f"{value} {one['difference']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]" for value, one in verdict[name].items())
        lines.append(f"{name}, mean loss lower by (nats, 95 %): " + ", ".join(each))
    return "\n".join(f"  {line}" for line in lines)


def _hypothesis(name: str, found: Json | None) -> str:
    if found is None:
        return f"{name}: no cells to compare"
    words = f"{name}: {_decided(found['sure'])} over all pairs ({found['pairs_won']} of {found['pairs']} won, mean loss lower by "
    words += f"{found['difference']:+.4f} nats, 95 % in [{found['low']:+.4f}, {found['high']:+.4f}], {found['sure']:.1%} of resamples)"
    one, two = found["best_better"], found["best_worse"]
    words += f"; best {one['perplexity']:.4f} ({_place(one)}) against {two['perplexity']:.4f} ({_place(two)})"
    if found["best_sure"] is not None:
        words += f", {_decided(found['best_sure'])} on unseen documents ({found['best_sure']:.1%} of resamples)"
    return words


def _decided(share: float) -> str:
    return "holds" if share >= SURE else "the opposite holds" if share <= 1 - SURE else "undecided"


def _place(cell: Json) -> str:
    return f"rcd {cell['critical_index']}, {cell['scale']:g} s, attention factor {cell['attention_factor']:g}"


def table(lines: dict[Cell, Json], factor: float, spectrum: Spectrum) -> str:
    """Perplexities of one attention factor: rcd down, scale across, then the rules beside."""
    cells = {cell: line for cell, line in lines.items() if cell.attention_factor == factor}
    indices = sorted({cell.critical_index for cell in cells if cell.critical_index is not None})
    scales = sorted({cell.scale for cell in cells if cell.scale is not None})
    names = {spectrum.critical_index: "tcd", spectrum.lowest_critical_index: "d10"}
    rows = [f"attention factor {factor:g}", "  rcd     " + "".join(f"{f'{scale:g} s':>11}" for scale in scales)]
    for index in indices:
        row = [cells.get(Cell("longrope2", factor, index, scale)) for scale in scales]
        rows.append(f"  {index:>3} {names.get(index, ''):<4}" + "".join(f"{_shown(one):>11}" for one in row))
    beside = [f"{method} {_shown(cells.get(Cell(method, factor)))}" for method in BESIDE]
    return "\n".join([*rows, "  " + ", ".join(beside)])


def _shown(line: Json | None) -> str:
    if line is None:
        return "-"
    value = line["perplexity"]
    return f"{value:.4f}" if value < 10 else f"{value:.2f}" if value < 1000 else f"{value:.1e}"


def make_map(given: argparse.Namespace) -> Json:
    """Measure, judge, draw; returns what summary.json holds.

    Raises:
        UserError: bad input.
    """
    from lr2train.reporting.rcd_map import rcd_map  # matplotlib: not in every worker

    config = compose_config(given)
    spectrum, documents = spectrum_of(config), documents_of(config)
    cells, settings = cells_of(given, spectrum), settings_of(config, documents, spectrum)
    done = finished_cells(given.out, settings)
    knobs = config.search
    of = f"{len(documents)} documents with {knobs.questions} of {knobs.questions + knobs.distractors} needles asked for"
    run.say("map_rcd", f"{len(cells)} cells of {of}, {sum(cell in done for cell in cells)} finished before")
    fill(cells, done, config, documents, given)
    lines = {cell: done[cell] for cell in cells}
    found = verdicts(lines, settings["answer_tokens"], spectrum.critical_index, given.seed)
    pictures = []
    for factor in given.attention_factor:
        print(table(lines, factor, spectrum), *([in_words(found[f"{factor:g}"])] if found else []), "", sep="\n")
        chart = rcd_map([line for cell, line in lines.items() if cell.attention_factor == factor], spectrum)
        title = f"Needle perplexity over rcd and the tail's scale, attention factor {factor:g}"
        pictures.append(chart.png(given.out / f"map_{factor:g}.png", title))
    if "all" in found:
        print("all attention factors", in_words(found["all"]), "", sep="\n")
    summary = {"verdicts": found, "cells": len(cells), "documents": len(documents), "pictures": pictures, "resamples": RESAMPLES}
    io.write_json(given.out / "summary.json", summary)
    print(*(f"picture: {picture}" for picture in pictures), sep="\n")
    return summary


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.map_rcd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the pretrained model, such as runs/base/model")
    parser.add_argument("--corpus", type=Path, required=True, help="folder that prepare wrote; its held-out text hides the needles")
    parser.add_argument("--target", type=int, required=True, metavar="TOKENS", help="L, the window to extend to; documents are this long")
    parser.add_argument("--window", type=int, metavar="TOKENS", help="L0, the original window (default: what the model's config states)")
    parser.add_argument("--documents", type=int, default=20, metavar="N", help="needle documents a cell (default: 20)")
    parser.add_argument("--questions", type=int, metavar="N", help="needles asked for in each document (default: the experiment's)")
    parser.add_argument("--distractors", type=int, metavar="N", help="needles beside them (default: the experiment's)")
    parser.add_argument(
        "--attention-factor",
        type=float,
        nargs="+",
        default=[1.2],
        metavar="X",
        help="of the long window, it scales attention logits by its square; one map each (default: 1.2)",
    )
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=[0.8, 1.0, 1.25, 1.6, 2.0],
        metavar="X",
        help="of the tail, in multiples of s = L / L0 (default: 0.8 1.0 1.25 1.6 2.0)",
    )
    parser.add_argument("--indices", type=int, nargs="+", metavar="I", help="critical indices, zero-based (default: d10 … tcd + 2)")
    parser.add_argument("--experiment", default="tiny_4k", metavar="NAME", help="whose needle settings are used (default: tiny_4k)")
    parser.add_argument("--seed", type=int, default=0, help="of the documents and of the bootstrap (default: 0)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that share the cells, a thread each (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/map_rcd"), help="folder of the results (default: runs/map_rcd)")
    return parser.parse_args(words)


def main() -> int:
    """Exit codes: 0 done, 2 the input was wrong (one sentence on stderr)."""
    try:
        make_map(arguments())
    except UserError as error:
        print(f"map_rcd: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
