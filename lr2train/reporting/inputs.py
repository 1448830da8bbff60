"""ReportInputs of a report: files of the run, and of the search, corpus and base run that it was made from.

Choice: every file is optional. A missing file leaves its section out, so one page serves running and finished runs.
Related runs are found by the paths that the verbs recorded. A relative path is tried from the working directory, from
the folder above ``runs`` and beside the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lr2train.config import UserError
from lr2train.io import read_json
from lr2train.rope.factors import Factors
from lr2train.training.metrics import read_jsonl

Json = dict[str, Any]
HELD_OUT = ("heldout_loss_short", "heldout_loss_long")  # keys of metrics.jsonl
RECORDING_VERBS = ("train", "search", "prepare")  # they write <verb>.config.json and <verb>.provenance.jsonl


@dataclass(frozen=True)
class ReportInputs:
    """Contents of all files; None or empty where a file is missing.

    Attributes:
        folder: the run that the report is about.
        metrics: a line for each step.
        held_out: the lines, also of step 0, that have a held-out loss.
        search_folder, corpus_folder, base_folder: runs that it was made from.
        model_folder: the trained model, or the model of a search.
        origins: (run, verb, config, provenance) of every verb that recorded its config.
    """

    folder: Path
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
    base_folder: Path | None = None
    base_metrics: Sequence[Json] = ()
    base_held_out: Sequence[Json] = ()
    origins: Sequence[tuple[Path, str, Json, Json]] = ()

    @property
    def needles(self) -> Json | None:
        """The evaluation where needles were measured, at the lengths that every model was asked about."""
        if not self.evaluation or not self.evaluation["rows"]:
            return None
        shared = set.intersection(
            *({one["length_tokens"] for one in row["by_length"]} for row in self.evaluation["rows"])
        )
        return {**self.evaluation, "lengths_tokens": sorted(shared)} if shared else None

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
    def top_k(self) -> int:
        """Parents of a generation; a quarter of the population where the search did not record them."""
        return self.search_settings.get("top_k") or max(1, len(self.generations[-1]["perplexities"]) // 4)

    @property
    def objective(self) -> str:
        """Perplexity that the search lowered: needle | text."""
        return "text" if self.search_settings.get("objective") == "text" else "needle"


def gather(folders: Sequence[Path]) -> ReportInputs:
    """Read a run and its related runs.

    Args:
        folders: the run first. Each further folder (a search, corpus or base run) replaces the related run of its kind.

    Raises:
        UserError: a folder is missing, or one of its files is damaged.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; name the run folder that a verb wrote, such as runs/first")
    run, given = folders[0], folders[1:]
    config, trained = _json(run / "train.config.json") or {}, _json(run / "train.json")
    search = _pick(given, "generations.jsonl") or _search_of(run, config)
    searched = (_json(search / "search.config.json") or {}) if search else {}
    recorded = config or (searched if search == run else {})  # for a search: its own config
    trained_on = (trained or {}).get("corpus") or recorded.get("data", {}).get("path")
    corpus = _pick(given, "corpus.json") or _related(run, trained_on, "corpus.json")
    model_path = recorded.get("model", {}).get("path")
    base = _pick(given, "train.json") or _base_of(run, (trained or {}).get("base") or model_path)
    lines, base_lines = (_lines(folder) for folder in (run, base))
    model = run / "model" if (run / "model").is_dir() else _related(run, model_path, "config.json")
    return ReportInputs(
        folder=run,
        train=trained,
        config=config,
        metrics=[line for line in lines if line.get("step")],
        held_out=_measured(lines),
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
        base_folder=base,
        base_metrics=[line for line in base_lines if line.get("step")],
        base_held_out=_measured(base_lines),
        origins=_origins([run, search, corpus, base]),
    )


def _json(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _lines(run: Path | None) -> list[Json]:
    return read_jsonl(run / "metrics.jsonl") if run else []


def _measured(lines: Sequence[Json]) -> list[Json]:
    return [line for line in lines if any(key in line for key in HELD_OUT)]


def _factors(run: Path, search: Path | None) -> Factors | None:
    for folder in (run, search):
        if folder is not None and (folder / "factors.json").is_file():
            return Factors.load(folder / "factors.json")
    return None


def _pick(given: Sequence[Path], name: str) -> Path | None:
    return next((folder for folder in given if (folder / name).is_file()), None)


def _search_of(run: Path, config: Json) -> Path | None:
    if (run / "generations.jsonl").is_file():
        return run
    factors = config.get("rope", {}).get("factors")
    return _related(
        run,
        factors and (factors if Path(factors).suffix != ".json" else str(Path(factors).parent)),
        "generations.jsonl",
    )


def _base_of(run: Path, model: str | None) -> Path | None:
    base = _related(run, model and str(Path(model).parent), "train.json")
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
