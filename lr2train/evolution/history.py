"""The report of a search: a line a generation (generations.jsonl), the progress, and the result (search.json)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lr2train.config import SearchConfig
from lr2train.evolution.final import Confidence, Scored, as_json
from lr2train.evolution.fitness import Fitness
from lr2train.evolution.genome import ALL, Candidate
from lr2train.evolution.loop import Generation
from lr2train.ranks import rank


@dataclass
class History:
    """The generations so far.

    Attributes:
        settings: of the search.
        fitness: counts the evaluations.
        file: generations.jsonl; written anew at each start, as a resumed search replays its generations from the
            journal.
        lines: contents of the file.
    """

    settings: SearchConfig
    fitness: Fitness
    file: Path
    lines: list[dict[str, Any]] = field(default_factory=list)

    def add(self, generation: Generation) -> str:
        """Write the generation's line; returns a sentence for the log."""
        self.lines.append(_line(generation, self.fitness))
        if rank() == 0:
            with self.file.open("w" if len(self.lines) == 1 else "a") as file:
                file.write(json.dumps(self.lines[-1]) + "\n")
        return (
            f"generation {generation.index}/{self.settings.generations}: "
            f"{self.settings.objective} perplexity {generation.best.perplexity:.4f}, "
            f"{described(generation.best.candidate)}, {self.fitness.document_forwards} document-forwards"
        )

    @property
    def note(self) -> str:
        """The current stage, for the progress bar."""
        done, settings = len(self.lines), self.settings
        following = "final" if done > settings.generations else f"generation {done}/{settings.generations}"
        if not self.lines:
            return following
        index = self.lines[-1]["best"]["critical_index"]
        return f"{following}, perplexity {self.lines[-1]['best_perplexity']:.4f}" + (
            "" if index == ALL else f", rcd {index}"
        )

    @property
    def figures(self) -> dict[str, Any]:
        """The newest generation's figures, for the dashboards."""
        line = self.lines[-1]
        best = line["best"]
        return {
            "search/best_perplexity": line["best_perplexity"],
            "search/critical_index": None if best["critical_index"] == ALL else best["critical_index"],
            "search/attention_factor": best["attention_factor"],
            "search/document_forwards": line["document_forwards"],
            "search/candidates": line["candidates"],
        }

    @property
    def expected_evaluations(self) -> int:
        """Evaluations of the whole search."""
        return max(self.settings.most_forwards, self.fitness.computed)

    def result(self, finalists: Sequence[Scored], confidence: Confidence | None) -> dict[str, Any]:
        """The contents of search.json; ``finalists`` are best first, ``confidence`` is None of one finalist."""
        best = finalists[0]
        return {
            "perplexity": best.perplexity,
            "scored_documents": best.documents,
            **_plain(best.candidate),
            "confidence": as_json(confidence),
            "candidates": self.lines[-1]["candidates"],
            "document_forwards": self.fitness.document_forwards,
            "evaluations": self.fitness.computed,
            "finalists": [
                {"perplexity": one.perplexity, "documents": one.documents, **_plain(one.candidate)} for one in finalists
            ],
            "settings": asdict(self.settings),
        }

    def brief(self) -> list[dict[str, Any]]:
        """Each generation's best candidate and the evaluations until then, for factors.json."""
        return [
            {key: line[key] for key in ("generation", "best_perplexity", "best", "document_forwards")}
            for line in self.lines
        ]


def described(candidate: Candidate) -> str:
    """A candidate in a few words."""
    where = "all factors" if candidate.critical_index == ALL else f"rcd {candidate.critical_index}, tail"
    return f"{where} {candidate.tail[0]:g} … {candidate.tail[-1]:g}, attention factor {candidate.attention_factor:g}"


def _plain(candidate: Candidate) -> dict[str, Any]:
    return {**asdict(candidate), "tail": list(candidate.tail)}


def _line(generation: Generation, fitness: Fitness) -> dict[str, Any]:
    return {
        "generation": generation.index,
        "best_perplexity": generation.best.perplexity,
        "best": _plain(generation.best.candidate),
        "perplexities": [one.perplexity for one in generation.population],
        "critical_indices": [one.candidate.critical_index for one in generation.population],
        "attention_factors": [one.candidate.attention_factor for one in generation.population],
        "candidates": generation.evaluated,
        "document_forwards": fitness.document_forwards,
    }
