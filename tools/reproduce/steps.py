"""The steps of the reproduction as data: each is one command that a user could type, with the steps that it waits for.

Choice: a step is a verb with its overrides; nothing of the method is written a second time here. Values that only an
earlier step finds (the critical index, the attention factor, the rescaled table) stand as ``{rcd}``, ``{attention}`` in
the overrides and are filled in when the step starts. Cost: the commands of later steps cannot be printed whole before
their search has finished.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lr2train import io
from lr2train.cli.composition import compose
from lr2train.model import load
from lr2train.rope.factors import Factors
from lr2train.rope.methods import build
from tools.reproduce.bed import Base, Form
from tools.reproduce.rows import ROWS, SEARCHES, Row

RESULT = {"prepare": "prepare.json", "train": "train.json", "search": "search.json", "evaluate": "evaluate.json"}
SCORES = "_scores"  # ends the name of the evaluation of a row
MAP = "map_rcd"  # no verb: python -m tools.map_rcd


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of the step; also of its run folder, but for the evaluation of a row, which writes into the row's folder.
        verb: a verb of lr2train, or ``map_rcd``.
        overrides: ``key=value``, with ``{rcd}`` and ``{attention}`` for what ``search`` finds; arguments of map_rcd.
        after: names of the steps whose results this one reads.
        search: the step that finds ``{rcd}`` and ``{attention}``.
        short: the table of the short window: "own" (the model's), "rescaled" (the long window's, as in training without
            mixed windows) or "factor" (the model's, with the long window's attention factor).
    """

    name: str
    verb: str
    overrides: tuple[str, ...]
    after: tuple[str, ...] = ()
    search: str | None = None
    short: str = "own"

    def result(self, runs: Path) -> Path:
        """The file that the command writes when it has finished."""
        return runs / self.name.removesuffix(SCORES) / RESULT.get(self.verb, "summary.json")

    def arguments(self, runs: Path) -> list[str]:
        """The arguments with all values filled in.

        Raises:
            UserError: the search has not finished, or the overrides do not name a model that exists.
        """
        found = {}
        if self.search is not None:
            result = io.read_json(runs / self.search / "search.json")
            found = {"rcd": str(result["critical_index"]), "attention": repr(result["attention_factor"])}
        filled = [_filled(one, found) for one in self.overrides]
        return filled if self.short == "own" else [*filled, *_one_table(filled, self.short)]

    def command(self, runs: Path) -> str:
        """The command as one types it; the unfilled one where a search has not finished."""
        ready = self.search is None or (runs / self.search / "search.json").exists()
        words = self.arguments(runs) if ready else list(self.overrides)
        start = ["python", "-m", "tools.map_rcd"] if self.verb == MAP else ["lr2train", self.verb]
        return shlex.join([*start, *words])


def _filled(text: str, found: dict[str, str]) -> str:
    for name, value in found.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def _one_table(overrides: Sequence[str], short: str) -> list[str]:
    """Overrides that make the long window's table, or its attention factor, the model's own one in the short window.

    The short window is always the table that the base's config.json names. So the config names another one. The long
    window has to come from a file of factors, because a method would act on that other table.
    """
    factors = factors_of(overrides)
    table = factors.rescale if short == "rescaled" else (1.0,) * len(factors.rescale)
    numbers = f"[{','.join(f'{one:.17g}' for one in table)}]"
    parameters = {
        "rope_type": "longrope",
        "rope_theta": factors.spectrum.base,
        "factor": factors.scale,
        "original_max_position_embeddings": factors.spectrum.window_tokens,
        "attention_factor": factors.attention_factor,
        "short_factor": numbers,
        "long_factor": numbers,
    }
    words = ", ".join(f"{key}: {value}" for key, value in parameters.items())
    return [f"model.overrides.rope_parameters={{{words}}}"]


def factors_of(overrides: Sequence[str]) -> Factors:
    """The factors that a training with these overrides uses."""
    config = compose("train", list(overrides))
    return build(config.rope, load.spectrum_of(load.config_of(config.model), config.model))


def steps_of(form: Form, runs: Path) -> list[Step]:
    """All steps of a form. Every step stands after those that it reads, and all rows of a seed before the next seed."""
    made = [*_of_bases(form, runs)]
    for seed in range(form.seeds):
        made += [step for cell in form.cells for step in _of_seed(form, *cell, seed, runs)]
    made += [step for cell in form.cells for step in _of_hypothesis(form, *cell, runs)]
    return list({step.name: step for step in made}.values())


def _of_bases(form: Form, runs: Path) -> Iterator[Step]:
    """The corpora, all with the tokenizer of the first one, and the base models."""
    first = form.corpus(form.ratios[0])
    for ratio in form.ratios:
        name, same = form.corpus(ratio), (f"data.tokenizer={runs / first / 'tokenizer'}",)
        words = (*form.settings(ratio, runs, None), *(() if name == first else same), f"name={name}")
        yield Step(name, "prepare", words, () if name == first else (first,))
    for base in form.bases:
        words = (f"experiment={base.experiment}", f"runs_folder={runs}", f"data.path={runs / first}", *base.overrides)
        yield Step(base.name, "train", (*words, f"name={base.name}"), (first,))


def _of_seed(form: Form, base: Base, ratio: int, seed: int, runs: Path) -> Iterator[Step]:
    """All rows of one base, extension ratio and seed."""
    if base.tokens != 1:
        return
    yield _search(form, base, ratio, "needle", seed, runs)
    if seed == 0:
        yield _untrained(form, base, ratio, runs)
    for row in (ROWS[key] for key in form.rows_at(ratio)):
        if row.factors:
            yield _search(form, base, ratio, row.factors, seed, runs)
        yield from _of_row(form, base, ratio, row, seed, runs)


def _of_hypothesis(form: Form, base: Base, ratio: int, runs: Path) -> Iterator[Step]:
    """Searches of the critical index, and its map at the smallest ratio."""
    if ratio == form.ratios[0]:
        yield _map(form, base, ratio, runs)
    yield from (_search(form, base, ratio, "needle", seed, runs) for seed in range(form.search_seeds))


def _search(form: Form, base: Base, ratio: int, kind: str, seed: int, runs: Path) -> Step:
    number = seed % form.search_seeds
    name = f"{base.name}_{ratio}x_search_{kind}_s{number}"
    words = (*form.settings(ratio, runs, base), *form.search, *SEARCHES[kind](ratio, form))
    return Step(name, "search", (*words, f"search.seed={number}", f"name={name}"), (form.corpus(ratio), base.name))


def _untrained(form: Form, base: Base, ratio: int, runs: Path) -> Step:
    """The base under the methods that need no search, and under the factors of the first search."""
    name, needle = f"{base.name}_{ratio}x_untrained", _search(form, base, ratio, "needle", 0, runs).name
    methods = ("eval.methods=[none,pi,ntk,yarn]", f"rope.factors={runs / needle / 'factors.json'}", f"name={name}")
    return Step(name, "evaluate", (*_evaluation(form, base, ratio, runs), *methods), (needle,))


def _evaluation(form: Form, base: Base, ratio: int, runs: Path) -> tuple[str, ...]:
    """The same documents for every row."""
    lengths = ",".join(map(str, form.lengths(ratio)))
    return (*form.settings(ratio, runs, base), *form.evaluation, f"eval.lengths_tokens=[{lengths}]", "eval.seed=0")


def _of_row(form: Form, base: Base, ratio: int, row: Row, seed: int, runs: Path) -> Iterator[Step]:
    cell = f"{base.name}_{ratio}x"
    name, needle = f"{cell}_{row.key}_s{seed}", _search(form, base, ratio, "needle", seed, runs).name
    own = f"{cell}_{row.like}_s{seed}" if row.like else needle
    if row.factors:
        own = _search(form, base, ratio, row.factors, seed, runs).name
    rope = f"rope.factors={runs / own / 'factors.json' if row.like or row.factors else 'null'}"
    words = (*form.settings(ratio, runs, base), *form.training, rope, *row.overrides, f"seed={seed}", f"name={name}")
    yield Step(name, "train", words, tuple(dict.fromkeys((own, needle))), needle, row.short)
    alone = ("eval.methods=[]", "eval.untrained=false", f"run={name}")
    yield Step(f"{name}{SCORES}", "evaluate", (*_evaluation(form, base, ratio, runs), *alone), (name,))


def _map(form: Form, base: Base, ratio: int, runs: Path) -> Step:
    name = f"{base.name}_{ratio}x_map"
    target = str(form.original_window_tokens * ratio)
    words = ("--model", str(runs / base.name / "model"), "--corpus", str(runs / form.corpus(ratio)), "--target", target)
    where = ("--window", str(form.original_window_tokens), "--experiment", form.experiment, "--out", str(runs / name))
    return Step(name, MAP, (*words, *where, *form.map_rcd), (form.corpus(ratio), base.name))
