"""Inputs of a report: files of each run, and of the search, corpus and base run that it was made from.

Choice: every file is optional. A missing file leaves its section out, so one page serves running and finished runs.
Related runs are found by the paths that the verbs recorded. A relative path is tried from the working directory, from
the folder above ``runs`` and beside the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lr2train.config import UserError
from lr2train.io import read_json
from lr2train.rope.factors import Factors
from lr2train.training.metrics import read_jsonl

Json = dict[str, Any]
HELD_OUT = {  # key of metrics.jsonl -> the documents that it is measured on
    "heldout_loss_short": "short window",
    "heldout_loss_long": "long window",
    "heldout_loss_needles": "needles",  # only with engine.validate_needles
}
RECORDING_VERBS = ("train", "search", "prepare")  # they write <verb>.config.json and <verb>.provenance.jsonl


@dataclass(frozen=True)
class BaseRun:
    """The run that made the base model: its lines of every step, and those with a held-out loss."""

    folder: Path
    metrics: Sequence[Json]
    held_out: Sequence[Json]


@dataclass(frozen=True)
class ReportInputs:
    """Contents of a run's files; None or empty where a file is missing.

    Attributes:
        folder, name: of the run; names differ within a report.
        metrics, held_out: a line for each step; the lines, also of step 0, that have a held-out loss.
        search_folder, corpus_folder, base: runs that it was made from.
        model_folder, model: the trained model, or the model of a search, and its config.json.
        origins: (run, verb, config, provenance) of every verb that recorded its config.
    """

    folder: Path
    name: str
    train: Json | None = None
    config: Json = field(default_factory=dict)
    metrics: Sequence[Json] = ()
    held_out: Sequence[Json] = ()
    evaluation: Json | None = None
    factors: Factors | None = None
    export: Json | None = None
    sample: Json | None = None
    model_folder: Path | None = None
    model: Json | None = None
    search_folder: Path | None = None
    search: Json | None = None
    search_config: Json = field(default_factory=dict)
    generations: Sequence[Json] = ()
    journal: Sequence[Json] = ()
    corpus_folder: Path | None = None
    corpus: Json | None = None
    corpus_config: Json = field(default_factory=dict)
    base: BaseRun | None = None
    origins: Sequence[tuple[Path, str, Json, Json]] = ()

    @property
    def critical_index(self) -> int | None:
        """rcd of the run's factors, from the search or the config; None where every dimension was searched."""
        rope = self.config.get("rope", {})
        searched = self.search is not None and (not self.config or rope.get("factors") is not None)
        return (self.search["critical_index"] if self.search and searched else rope.get("critical_index")) or None

    @property
    def has_border(self) -> bool:
        """Whether candidates have critical indices; a search of every dimension writes 0 for each."""
        return any(any(line["critical_indices"]) for line in self.generations)

    @property
    def search_settings(self) -> Json:
        """The ``search`` group of the search's config; empty where it was not recorded."""
        return (self.search or {}).get("settings") or self.search_config.get("search", {})

    @property
    def objective(self) -> str:
        """Perplexity that the search lowered: needle | text."""
        return "text" if self.search_settings.get("objective") == "text" else "needle"


def gather_all(folders: Sequence[Path]) -> list[ReportInputs]:
    """Read the runs of a report.

    Args:
        folders: the runs to compare. A corpus, or a search beside a run that is none, is no run to compare but replaces
            the recorded one of every run.

    Raises:
        UserError: a folder is missing, named twice, or one of its files is damaged.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; name the run folder that a verb wrote, such as runs/first")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"{' '.join(map(str, folders))} names a folder twice; name each run once")
    of_search = (folders[0] / "generations.jsonl").is_file()
    related = [
        folder
        for folder in folders[1:]
        if (folder / "corpus.json").is_file() or ((folder / "generations.jsonl").is_file() and not of_search)
    ]
    runs = [gather(folder, related) for folder in folders if folder not in related]
    names = [run.name for run in runs]
    return [replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs]


def gather(run: Path, given: Sequence[Path] = ()) -> ReportInputs:
    """Read one run and its related runs; those of ``given`` replace the recorded ones.

    Raises:
        UserError: the run is no folder, or a file is damaged.
    """
    if not run.is_dir():
        raise UserError(f"{run} is no folder; name the run folder that a verb wrote, such as runs/first")
    config, trained = _json(run / "train.config.json") or {}, _json(run / "train.json")
    search = _pick(given, "generations.jsonl") or _search_of(run, config)
    searched = (_json(search / "search.config.json") or {}) if search else {}
    recorded = config or (searched if search == run else {})  # for a search: its own config
    trained_on = (trained or {}).get("corpus") or recorded.get("data", {}).get("path")
    corpus = _pick([*given, run], "corpus.json") or _related(run, trained_on, "corpus.json")
    model_path = recorded.get("model", {}).get("path")
    base = _base_of(run, (trained or {}).get("base") or model_path)
    model = run / "model" if (run / "model").is_dir() else _related(run, model_path, "config.json")
    return ReportInputs(
        folder=run,
        name=run.resolve().name,
        train=trained,
        config=config,
        **_lines(run),
        evaluation=_json(run / "evaluate.json"),
        factors=_factors(run, search),
        export=_json(run / "export.json"),
        sample=_json(run / "generate.json"),
        model_folder=model,
        model=_json(model / "config.json") if model else None,
        search_folder=search,
        search=_json(search / "search.json") if search else None,
        search_config=searched,
        generations=read_jsonl(search / "generations.jsonl") if search else (),
        journal=read_jsonl(search / "journal.jsonl") if search else (),
        corpus_folder=corpus,
        corpus=_json(corpus / "corpus.json") if corpus else None,
        corpus_config=(_json(corpus / "prepare.config.json") or {}) if corpus else {},
        base=BaseRun(base, **_lines(base)) if base else None,
        origins=_origins([run, search, corpus, base]),
    )


def _json(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _lines(run: Path) -> dict[str, list[Json]]:
    lines = read_jsonl(run / "metrics.jsonl")
    measured = [line for line in lines if any(key in line for key in HELD_OUT)]
    return {"metrics": [line for line in lines if line.get("step")], "held_out": measured}


def _factors(run: Path, search: Path | None) -> Factors | None:
    files = [folder / "factors.json" for folder in (run, search) if folder is not None]
    return next((Factors.load(file) for file in files if file.is_file()), None)


def _pick(given: Sequence[Path], name: str) -> Path | None:
    return next((folder for folder in given if (folder / name).is_file()), None)


def _search_of(run: Path, config: Json) -> Path | None:
    if (run / "generations.jsonl").is_file():
        return run
    factors = config.get("rope", {}).get("factors")
    folder = factors and (str(Path(factors).parent) if Path(factors).suffix == ".json" else factors)
    return _related(run, folder, "generations.jsonl")


def _base_of(run: Path, model: str | None) -> Path | None:
    base = _related(run, model and str(Path(model).parent), "metrics.jsonl")
    return None if base is None or base.resolve() == run.resolve() else base


def _related(run: Path, recorded: str | None, name: str) -> Path | None:
    """The recorded folder that holds ``name``: from here, from the folder above ``runs``, or beside the run."""
    if not recorded:
        return None
    path = Path(recorded)
    candidates = (path, run.resolve().parent.parent / path, run.resolve().parent / path.name)
    return next((folder for folder in candidates if (folder / name).is_file()), None)


def _origins(folders: Sequence[Path | None]) -> list[tuple[Path, str, Json, Json]]:
    distinct = {folder.resolve(): folder for folder in folders if folder is not None}
    return [
        (folder, verb, _json(folder / f"{verb}.config.json") or {}, starts[-1])
        for folder in distinct.values()
        for verb in RECORDING_VERBS
        if (starts := read_jsonl(folder / f"{verb}.provenance.jsonl"))
    ]
