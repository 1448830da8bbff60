"""What a report reads: the run's own files and those of the runs that it was made from.

Choice: everything is optional. A file that is not there leaves its section out, so the same page serves a run that has just begun and one
that is done. Related runs are found by the paths that the verbs recorded, looked up from where the verbs ran and from beside the run.
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
MAKERS = ("train", "search", "prepare")  # verbs that write <verb>.config.json and <verb>.provenance.jsonl


@dataclass(frozen=True)
class Inputs:
    """Everything that the sections draw from; None, empty or missing where there is none.

    Attributes:
        folder: the run that the report is of.
        search_folder, corpus_folder, base_folder: the runs that it was made from.
        model_folder: the trained model, or the one that a search searched for.
        origins: (run, verb, config, provenance) of every verb that left them.
    """

    folder: Path
    train: Json | None = None
    config: Json = field(default_factory=dict)
    metrics: Sequence[Json] = ()
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
    origins: Sequence[tuple[Path, str, Json, Json]] = ()

    @property
    def critical_index(self) -> int | None:
        """rcd of the run's factors, where the search or the config says it; None too where the search knew no border (it then writes 0)."""
        rope = self.config.get("rope", {})
        searched = self.search is not None and (not self.config or rope.get("factors") is not None)
        return (self.search["critical_index"] if self.search and searched else rope.get("critical_index")) or None

    @property
    def has_border(self) -> bool:
        """Whether the candidates of the search have critical indices (a search of every dimension has none, and writes 0)."""
        return any(any(line["critical_indices"]) for line in self.generations)

    @property
    def search_settings(self) -> Json:
        """Of the search; empty where they were not recorded."""
        return (self.search or {}).get("settings") or self.search_config.get("search", {})

    @property
    def top_k(self) -> int:
        """How many candidates of a generation are parents of the next; a quarter of the population where the search did not say."""
        return self.search_settings.get("top_k") or max(1, len(self.generations[-1]["perplexities"]) // 4)

    @property
    def objective(self) -> str:
        """Whose perplexity the search lowered: needle | text."""
        return "text" if self.search_settings.get("objective") == "text" else "needle"


def gather(folders: Sequence[Path]) -> Inputs:
    """Read a run and its relatives.

    Args:
        folders: the run first; further ones take the place of the relatives that would be found (a search, a corpus, a base run).

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
    told = config or (searched if search == run else {})  # a search's page tells of what the search was made from
    corpus = _pick(given, "corpus.json") or _related(run, (trained or {}).get("corpus") or told.get("data", {}).get("path"), "corpus.json")
    base = _pick(given, "train.json") or _base_of(run, (trained or {}).get("base") or told.get("model", {}).get("path"))
    model = run / "model" if (run / "model").is_dir() else _related(run, told.get("model", {}).get("path"), "config.json")
    return Inputs(
        folder=run,
        train=trained,
        config=config,
        metrics=read_jsonl(run / "metrics.jsonl"),
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
        base_metrics=read_jsonl(base / "metrics.jsonl") if base else (),
        origins=_origins([run, search, corpus, base]),
    )


def _json(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


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
    return _related(run, factors and (factors if Path(factors).suffix != ".json" else str(Path(factors).parent)), "generations.jsonl")


def _base_of(run: Path, model: str | None) -> Path | None:
    base = _related(run, model and str(Path(model).parent), "train.json")
    return None if base is None or base.resolve() == run.resolve() else base


def _related(run: Path, recorded: str | None, name: str) -> Path | None:
    """The folder that a verb recorded, where it holds ``name``: from here, from the folder above ``runs``, or beside the run."""
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
        for verb in MAKERS
        if (starts := read_jsonl(folder / f"{verb}.provenance.jsonl"))
    ]
