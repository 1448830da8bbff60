"""How many tokens does training need? Needle scores at the target window against the long tokens of a training.

    python -m tools.training_cost --runs runs/reproduce --out runs/training_cost [--rope rope=pi] [--seconds 540]

Each cell is a run of ``lr2train train`` with a learning-rate schedule of its own: a kind of long segments, a number of
steps, a seed. ``--runs`` is the folder in which ``bash launch/reproduce.sh quick`` has left the test bed's corpus, its
first base model and that base's factors. A finished cell stands in ``cells.jsonl`` and is not run again. After
``--seconds`` no further cell begins, and the same command goes on.

    full       segments of the target window, positions 0, 1, 2 …
    settle     the same, ended by the rule of ``optim.settle_validations`` over needles; ``--steps`` is the limit
    skip       segments of a quarter of it whose positions jump: as many segments a step, a quarter of the tokens
    still      the same segments without the jumps: what do the jumps do?
    skip_wide  ``skip`` with as many tokens a step as ``full``

All cells answer the same held-out documents, whose needles and chains lie at random depths. An answer is right where
greedy decoding produces it after the right answers before it.

Choice: a curve of finished runs, not of the checkpoints of one run, because the end of a schedule is part of a
training. Cost: the steps of all runs add up. The first table has standard errors over seeds. The second one compares
kinds at equal steps, at equal long tokens within 1 %, and ``settle`` with every row of ``full``, document by document;
its standard errors are over documents, after the mean over the seeds that both have.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lr2train.cli.door import EXIT_BAD_INPUT
from lr2train.config import UserError

EXPERIMENT, CORPUS, MODEL = "bed", "corpus_8x", "base_a/model"  # of the reproduction
FACTORS = "base_a_8x_search_yarn_head_s0/factors.json"
TARGET_TOKENS, PART = 2048, 4  # a segment of ``skip`` is this part of the target window
KINDS = {
    "full": (TARGET_TOKENS, 2),  # tokens of a segment, segments a step; half of the segments are long
    "settle": (TARGET_TOKENS, 2),
    "skip": (TARGET_TOKENS // PART, 2),
    "still": (TARGET_TOKENS // PART, 2),
    "skip_wide": (TARGET_TOKENS // PART, 2 * PART),
}
SETTLE = ("optim.settle_validations=3", "engine.validate_every_steps=10", "engine.validate_needles=8")
DOCUMENTS, QUESTIONS, CHAINS, NEEDLES = 40, 8, 4, 24
PRELOAD = ["lr2train.train", "transformers.models.llama.modeling_llama", "deepspeed.runtime.zero.stage3"]
Json = dict[str, Any]


class Cell(NamedTuple):
    """One training, or with ``steps`` 0 the model that it begins with."""

    rope: str  # overrides; empty: the searched factors
    kind: str
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Of the run."""
        return f"{self.rope.replace('rope=', '').replace(' ', '_') or 'searched'}_{self.kind}_{self.steps}_{self.seed}"


def main() -> None:
    """Run the cells that are missing, and print the table."""
    given = _arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    start, journal = time.monotonic(), given.out / "cells.jsonl"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    for cell in _cells(given):
        if cell in map(_cell_of, _read(journal)):
            continue
        if time.monotonic() - start > given.seconds:
            print("time is up; the same command goes on")
            break
        # A process each: DeepSpeed starts once in a process.
        process = context.Process(target=_run_or_refuse, args=(given, cell))
        process.start()
        process.join()
        if process.exitcode == EXIT_BAD_INPUT:
            raise SystemExit(EXIT_BAD_INPUT)
        if process.exitcode:
            raise SystemExit(f"{cell.name} ended with {process.exitcode}; its output is above")
    print(table(_read(journal)), comparisons(_read(journal)), sep="\n\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the reproduction's runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--rope", default="", help="overrides of the RoPE scaling; empty: the searched factors")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--steps", default="0,8,15,30,60,120,240", help="0: the untrained model")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--train", default="", help="further overrides of every training")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further cell after this time")
    return parser.parse_args()


def _cells(given: argparse.Namespace) -> list[Cell]:
    """One seed after another, so that a whole curve is there early. The untrained model is one cell."""
    steps, seeds = ([int(one) for one in listed.split(",")] for listed in (given.steps, given.seeds))
    trained = [Cell(given.rope, kind, n, seed) for seed in seeds for n in steps if n for kind in given.kinds.split(",")]
    return [Cell(given.rope, "full", 0, 0)] * (0 in steps) + trained


def _cell_of(line: Json) -> Cell:
    return Cell(*(line[field] for field in Cell._fields))


# ---- a cell, in a process of its own ----


def _run_or_refuse(given: argparse.Namespace, cell: Cell) -> None:
    """Train and score a cell; wrong input is one sentence."""
    try:
        _run_cell(given, cell)
    except UserError as error:
        print(f"training_cost: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


def _run_cell(given: argparse.Namespace, cell: Cell) -> None:
    """Train and score; the line goes into the journal."""
    import torch

    torch.set_num_threads(1)
    seconds = _trained(given, cell) if cell.steps else 0.0
    folder = given.out / cell.name
    found = _scored(given, cell, folder / "model" if cell.steps else given.runs / MODEL)
    lines = _read(folder / "metrics.jsonl")
    segment_tokens, segments_per_step = KINDS[cell.kind]
    n_long = sum(line["window_mix"] * segments_per_step for line in lines if "window_mix" in line)
    line = cell._asdict() | found | {
        "ended": lines[-1]["step"] if lines else 0, "long_tokens": round(n_long * segment_tokens),
        "train_s": round(seconds, 1),
        "heldout_loss_long": lines[-1]["heldout_loss_long"] if lines else None,
    }  # fmt: skip
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    with (given.out / "cells.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def _trained(given: argparse.Namespace, cell: Cell) -> float:
    """Train the cell's run; returns its seconds."""
    from lr2train.cli.composition import compose
    from lr2train.data.feed import loader
    from lr2train.train import train

    if cell.kind == "still":
        loader.drawn_jumps = lambda *_: ()
    segment_tokens, segments_per_step = KINDS[cell.kind]
    whole = segment_tokens == TARGET_TOKENS
    corpus = given.runs / CORPUS if whole else _rows(given)
    begun = time.monotonic()
    train(
        compose(
            "train",
            [
                *_model(given, cell), f"name={cell.name}", f"data.path={corpus}", f"seed={cell.seed}", "threads=1",
                f"data.segment_tokens={segment_tokens}", f"optim.segments_per_step={segments_per_step}",
                f"data.long_positions={'full' if whole else 'skip'}", f"optim.steps={cell.steps}",
                f"optim.warmup_steps={max(1, cell.steps // 10)}", "parallel.sp=1", "logger=jsonl",
                "engine.checkpoint_every_steps=100", "engine.validate_segments=2", "engine.validate_every_steps=1000",
                *(SETTLE if cell.kind == "settle" else ()), *given.train.split(),
            ],
        )
    )  # fmt: skip
    return time.monotonic() - begun


def _model(given: argparse.Namespace, cell: Cell) -> list[str]:
    factors = "null" if cell.rope else given.runs / FACTORS
    model = f"model.path={given.runs / MODEL}"
    return [
        f"experiment={EXPERIMENT}",
        f"runs_folder={given.out}",
        model,
        *cell.rope.split(),
        f"rope.factors={factors}",
    ]


def _rows(given: argparse.Namespace) -> Path:
    """The corpus of ``skip``: the same sources in shorter segments, with needle documents as long as a segment."""
    from lr2train.cli.composition import compose
    from lr2train.prepare import prepare

    folder = given.out / "corpus_rows"
    options = {
        "lengths_tokens": [TARGET_TOKENS // PART], "count": 140 * PART, "max_pairs": 60 // PART,
        "questions": 40 // PART, "chains": 8 // PART,
    }  # fmt: skip
    if not (folder / "corpus.json").exists():
        prepare(
            compose(
                "prepare",
                [
                    f"experiment={EXPERIMENT}", f"runs_folder={given.out}", f"name={folder.name}", "data.workers=1",
                    f"model.path={given.runs / MODEL}", f"data.tokenizer={given.runs / CORPUS}/tokenizer",
                    f"data.segment_tokens={TARGET_TOKENS // PART}",
                    *(f"data.sources.needles_long.options.{key}={value}" for key, value in options.items()),
                ],
            )
        )  # fmt: skip
    return folder


def _scored(given: argparse.Namespace, cell: Cell, model_folder: Path) -> Json:
    """Share of right answers, and the perplexity of answer tokens, under the cell's factors."""
    from lr2train.cli.composition import compose
    from lr2train.data.corpus import Corpus
    from lr2train.data.needles import NeedleMaker
    from lr2train.data.store import HOLDOUT
    from lr2train.model import load, rotary
    from lr2train.model.score import score
    from lr2train.rope.methods import build
    from lr2train.run import stream

    corpus = Corpus.open(given.runs / CORPUS)
    config = compose("train", [*_model(given, cell), "name=x", f"data.path={given.runs / CORPUS}"])
    factors = build(config.rope, load.spectrum_of(load.config_of(config.model), config.model))
    model = load.load_whole(model_folder)
    table, needles, rng = rotary.install(model, factors), config.data.needles, stream(0, "training cost")
    maker = NeedleMaker(corpus.tokenizer.encode, needles.wording, needles.digits, corpus.tokenizer.bos, None)
    right, losses = [], []  # of each document: the share of right answers, and nats per answer token
    for filler in corpus.text(HOLDOUT).draw_apart(rng, DOCUMENTS, TARGET_TOKENS):
        one = maker.make(rng, filler, TARGET_TOKENS, None, NEEDLES, QUESTIONS, CHAINS)
        found = score(model, table, "long", one.tokens, one.answer_spans)
        hits = zip(found.right, one.answer_spans, strict=True)
        right.append(statistics.fmean(n == stop - start for n, (start, stop) in hits))
        losses.append(found.nll / found.n_tokens)
    return {
        "accuracy": statistics.fmean(right), "answer_nll": statistics.fmean(losses), "right": right, "losses": losses,
    }  # fmt: skip


# ---- the table ----


def _read(file: Path) -> list[Json]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(cells: Sequence[Json]) -> str:
    """A line for each kind and number of steps: mean and standard error over the seeds."""
    head = ("rope", "kind", "steps", "ended after", "seeds", "long tokens", "accuracy", "answer loss")
    head = (*head, "held-out long loss", "seconds")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for key in dict.fromkeys((one["rope"], one["kind"], one["steps"]) for one in cells):
        group = [one for one in cells if (one["rope"], one["kind"], one["steps"]) == key]
        spreads = [_spread([one[name] for one in group]) for name in ("accuracy", "answer_nll", "heldout_loss_long")]
        tokens, seconds = (statistics.fmean(one[name] for one in group) for name in ("long_tokens", "train_s"))
        ended = ", ".join(map(str, sorted({one["ended"] for one in group})))
        shown = (key[0] or "searched", *key[1:], ended, len(group), f"{tokens:,.0f}", *spreads, f"{seconds:.0f}")
        lines.append("| " + " | ".join(map(str, shown)) + " |")
    return "\n".join(lines)


def comparisons(cells: Sequence[Json]) -> str:
    """A line for each two kinds that ``_comparable`` names, over the same documents."""
    rows: dict[tuple[str, str, int], dict[int, Json]] = {}
    for one in cells:
        rows.setdefault((one["rope"], one["kind"], one["steps"]), {})[one["seed"]] = one
    lines = [
        "| rope | first | second | seeds | long tokens: first / second | accuracy: first - second | "
        "answer loss: first - second |",
        "|---" * 7 + "|",
    ]
    for (first, a), (second, b) in itertools.combinations(rows.items(), 2):
        seeds = sorted(a.keys() & b.keys())
        tokens = [statistics.fmean(x[seed]["long_tokens"] for seed in seeds) for x in (a, b) if seeds]
        if first[0] != second[0] or not seeds or not _comparable(first[1:], second[1:], tokens):
            continue
        differences = [_over_documents(a, b, seeds, key) for key in ("right", "losses")]
        names = (f"{kind}, {steps} steps" for _, kind, steps in (first, second))
        share = f"{tokens[0] / tokens[1]:.2f}" if tokens[1] else "-"
        lines.append("| " + " | ".join([first[0] or "searched", *names, str(len(seeds)), share, *differences]) + " |")
    return "\n".join(lines)


def _comparable(first: tuple[str, int], second: tuple[str, int], tokens: Sequence[float]) -> bool:
    """Whether a difference of two rows (kind, steps) with these long tokens says something.

    A run that ends itself has no equal in steps or tokens; it is measured against every fixed schedule.
    """
    kinds = {first[0], second[0]}
    if "settle" in kinds:
        return kinds == {"settle", "full"} and min(tokens) > 0
    return len(kinds) == 2 and (first[1] == second[1] or math.isclose(*tokens, rel_tol=0.01))


def _over_documents(a: dict[int, Json], b: dict[int, Json], seeds: Sequence[int], key: str) -> str:
    of_seeds = [[x - y for x, y in zip(a[seed][key], b[seed][key], strict=True)] for seed in seeds]
    return _spread([statistics.fmean(of_document) for of_document in zip(*of_seeds, strict=True)])


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    error = f" ± {statistics.stdev(known) / math.sqrt(len(known)):.3f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.3f}{error}" if known else "-"


if __name__ == "__main__":
    main()
