"""Needle perplexity of candidates: exp(mean negative log-likelihood over the answer tokens of all documents) (paper, Section 3.2).

Choice: documents and candidates are independent, so their pairs are dealt to the ranks in turn, in blocks; each block's results are shared and appended to
the journal before the next begins. What stands in the journal is never computed again. Logits are computed at answer positions only, so memory does not
grow with the vocabulary times the window.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lr2train import run
from lr2train.data.needles import NeedleDocument
from lr2train.evolution.genome import Candidate, Space
from lr2train.model.rotary import WindowRotary
from lr2train.model.score import score, use_factors

BLOCK = 8  # pairs a rank works through between two journal entries


class NeedleFitness:
    """Callable on candidates; returns their perplexities, the same on every rank."""

    def __init__(self, model: Any, rotary: WindowRotary, space: Space, documents: Sequence[NeedleDocument], journal: Path):
        self._model, self._rotary, self._space, self._documents = model, rotary, space, documents
        self._journal = journal
        self._known: dict[tuple[str, int], float] = {}
        self._read_journal()
        self.document_forwards = len(self._known)
        self.seconds = 0.0  # of this rank's own forward passes

    def _read_journal(self) -> None:
        """Rank 0 reads, every rank gets the entries."""
        entries: list[tuple[str, int, float]] = []
        if run.rank() == 0 and self._journal.exists():
            for line in self._journal.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    break  # a kill cut the last line short
                entries.append((entry["candidate"], entry["document"], entry["nll"]))
            self._rewrite(entries)
        self._known = {(key, document): nll for key, document, nll in _from_rank_0(entries)}

    def _rewrite(self, entries: list[tuple[str, int, float]]) -> None:
        """Drop a half-written last line, so that the next append does not join it."""
        text = self._journal.read_text()
        complete = text[: text.rfind("\n") + 1]
        if len(complete) != len(text):
            self._journal.write_text(complete)

    def __call__(self, candidates: Sequence[Candidate]) -> list[float]:
        wanted = [(c, d) for c in candidates for d in range(len(self._documents)) if (c.key, d) not in self._known]
        size = BLOCK * _world()
        for first in range(0, len(wanted), size):
            self._evaluate_block(wanted[first : first + size])
        return [self._perplexity(candidate) for candidate in candidates]

    def _evaluate_block(self, block: list[tuple[Candidate, int]]) -> None:
        mine = [self._evaluate(candidate, document) for candidate, document in block[_rank() :: _world()]]
        entries = [entry for part in _from_all(mine) for entry in part]
        for entry in entries:
            self._known[entry["candidate"], entry["document"]] = entry["nll"]
        self.document_forwards += len(entries)
        if _rank() == 0:
            with self._journal.open("a") as file:
                file.write("".join(json.dumps(entry) + "\n" for entry in entries))

    def _evaluate(self, candidate: Candidate, document: int) -> dict[str, Any]:
        start = time.perf_counter()
        needle = self._documents[document]
        use_factors(self._rotary, self._space.factors(candidate))
        scored = score(self._model, self._rotary, "long", needle.tokens, needle.answer_spans)
        seconds = time.perf_counter() - start
        self.seconds += seconds
        return {"candidate": candidate.key, "document": document, "nll": scored.nll, "seconds": round(seconds, 4), "rank": _rank()}

    def _perplexity(self, candidate: Candidate) -> float:
        total = math.fsum(self._known[candidate.key, d] for d in range(len(self._documents)))
        return math.exp(min(total / sum(document.n_answer_tokens for document in self._documents), 700.0))


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
