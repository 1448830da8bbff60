"""Needle perplexity of candidates: exp(mean negative log-likelihood over the answer tokens of all documents) (paper, Section 3.2).

Choice: documents and candidates are independent, so their pairs are dealt to the ranks in turn, in blocks; each block's results are shared
and appended to the journal before the next begins. What stands in the journal is never computed again. Logits are computed at answer
positions only, so memory does not grow with the vocabulary times the window.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lr2train.data.needles import NeedleDocument
from lr2train.evolution.genome import Candidate, Space
from lr2train.model.rotary import WindowRotary
from lr2train.model.score import score, use_factors

BLOCK = 8  # pairs a rank works through between two journal entries


class NeedleFitness:
    """Callable on candidates; returns their perplexities, the same on every rank.

    Attributes:
        recovered: (candidate, document) pairs that the journal held at the start.
        document_forwards: pairs asked for so far, in this process or the one before it that was killed.
    """

    def __init__(self, model: Any, rotary: WindowRotary, space: Space, documents: Sequence[NeedleDocument], journal: Path):
        self._model, self._rotary, self._space, self._documents = model, rotary, space, documents
        self._journal = journal
        entries = _from_rank_0(_read_journal(journal) if _rank() == 0 else None)
        self._known: dict[tuple[str, int], float] = {(entry["candidate"], entry["document"]): entry["nll"] for entry in entries}
        self.recovered = len(self._known)
        self.document_forwards = 0

    def __call__(self, candidates: Sequence[Candidate]) -> list[float]:
        wanted = [(c, d) for c in candidates for d in range(len(self._documents)) if (c.key, d) not in self._known]
        size = BLOCK * _world()
        for first in range(0, len(wanted), size):
            self._evaluate_block(wanted[first : first + size])
        self.document_forwards += len(candidates) * len(self._documents)
        return [self._perplexity(candidate) for candidate in candidates]

    def _evaluate_block(self, block: list[tuple[Candidate, int]]) -> None:
        mine = [self._evaluate(candidate, document) for candidate, document in block[_rank() :: _world()]]
        entries = [entry for part in _from_all(mine) for entry in part]
        for entry in entries:
            self._known[entry["candidate"], entry["document"]] = entry["nll"]
        if _rank() == 0:
            with self._journal.open("a") as file:
                file.write("".join(json.dumps(entry) + "\n" for entry in entries))

    def _evaluate(self, candidate: Candidate, document: int) -> dict[str, Any]:
        start = time.perf_counter()
        needle = self._documents[document]
        use_factors(self._rotary, self._space.factors(candidate))
        scored = score(self._model, self._rotary, "long", needle.tokens, needle.answer_spans)
        seconds = round(time.perf_counter() - start, 4)
        return {"candidate": candidate.key, "document": document, "nll": scored.nll, "seconds": seconds, "rank": _rank()}

    def _perplexity(self, candidate: Candidate) -> float:
        """Capped where exp would overflow; a candidate that breaks the model (nan) is as bad as can be, not unordered."""
        total = math.fsum(self._known[candidate.key, d] for d in range(len(self._documents)))
        mean = total / sum(document.n_answer_tokens for document in self._documents)
        return math.inf if math.isnan(mean) else math.exp(min(mean, 700.0))


def _read_journal(journal: Path) -> list[dict[str, Any]]:
    """The entries up to the first that a kill cut short; the file is cut there too, so that the next append joins nothing."""
    lines = journal.read_text(errors="replace").splitlines(keepends=True) if journal.exists() else []
    entries = []
    for line in lines:
        if (entry := _parsed(line)) is None:
            break
        entries.append(entry)
    if len(entries) < len(lines):
        scratch = journal.with_name(f".{journal.name}.tmp")
        scratch.write_text("".join(lines[: len(entries)]))
        scratch.replace(journal)
    return entries


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line) if line.endswith("\n") else None
    except json.JSONDecodeError:
        return None


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _from_all(mine: Any) -> list[Any]:
    """Every rank's object, in rank order, on every rank."""
    if _world() == 1:
        return [mine]
    parts: list[Any] = [None] * _world()
    dist.all_gather_object(parts, mine)
    return parts


def _from_rank_0(value: Any) -> Any:
    if _world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
