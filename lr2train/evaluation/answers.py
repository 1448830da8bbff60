"""The answers of one model: every request is answered once, on one of the ranks, and kept in a journal.

Choice: an answer is known by a key of the model and the request. So a command that was killed, another suite with the
same questions, and a task that is graded anew find their answers in the journal. A request that failed is told and not
kept: the next start tries again. Ranks work in rounds: each answers one batch, then all exchange their answers. Cost: a
round takes as long as its longest batch; batches of a round have similar lengths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lr2train import io, journals, progress, ranks
from lr2train.config import UserError
from lr2train.evaluation.request import Answer, Generate, Request
from lr2train.evaluation.window_model import WindowModel
from lr2train.model.decode import Lockstep
from lr2train.parallel import control

LOCKSTEP = Lockstep(lambda mine: max(control.from_all(mine)))
"""Of all ranks of the job."""


class Answers:
    """Asks a model, and remembers.

    Args:
        model: makes the model when the first request is not in the journal; every rank then calls it.
        identity: of the model: everything that decides an answer beside the request, as plain JSON values.
        file: the journal.
        longest: tokens of the longest text that the model is asked about.
        log: takes one line about a request that failed.

    Attributes:
        recovered: number of answers in the journal at the start.
        computed: number of answers that were computed since.
    """

    def __init__(
        self,
        model: Callable[[], WindowModel],
        identity: Mapping[str, Any],
        file: Path,
        longest: int,
        log: Callable[[str], None] = lambda line: None,
    ):
        self._make_model, self._model = model, None
        self._identity, self._file = io.fingerprint(dict(identity)), file
        self._longest, self._log = longest, log
        entries, self.damaged = control.from_rank_0(
            journals.read(file, ("key", "answer")) if ranks.rank() == 0 else ([], 0)
        )
        self._known = {entry["key"]: _answer(entry["answer"]) for entry in entries}
        self.recovered, self.computed = len(self._known), 0
        self._expected = self._done = 0

    def expect(self, total_tokens: int) -> None:
        """Tell how many tokens all requests to come have, so that progress shows the time left for all of them."""
        self._expected += total_tokens

    def ask(self, requests: Sequence[Request], label: str) -> list[Answer]:
        """The answers to ``requests``, in order, on every rank; ``label`` names the work on the progress bar.

        A request that fails has an answer with ``error``; the others go on. Where ranks divide the model, a failure
        ends the job.

        Raises:
            UserError: the journal cannot be written.
        """
        keys = [self._key(request) for request in requests]
        failed = {
            key: Answer("long", error=f"{request.total_tokens} tokens are beyond the window of {self._longest}")
            for key, request in zip(keys, requests, strict=True)
            if request.total_tokens > self._longest
        }
        wanted = {key: request for key, request in zip(keys, requests, strict=True) if key not in failed}
        missing = {key: request for key, request in wanted.items() if key not in self._known}
        if missing:
            failed |= self._compute(missing, sum(one.total_tokens for one in wanted.values()), label)
        self._done += sum(one.total_tokens for one in requests)
        return [self._known[key] if key in self._known else failed[key] for key in keys]

    def _key(self, request: Request) -> str:
        how = (
            (request.max_new_tokens, request.stops, request.enough) if isinstance(request, Generate) else request.spans
        )
        parts = repr((self._identity, type(request).__name__, how)).encode()
        return hashlib.sha256(parts + request.tokens.astype("<i8").tobytes()).hexdigest()[:20]

    def _compute(self, missing: Mapping[str, Request], total_tokens: int, label: str) -> dict[str, Answer]:
        """Answer all; returns the failed ones."""
        model = self.model
        keys, requests = list(missing), list(missing.values())
        failed: dict[str, Answer] = {}
        done = self._done + total_tokens - sum(one.total_tokens for one in requests)
        total_tokens = max(self._expected, self._done + total_tokens)
        with progress.meter(label, done, "tokens") as tick:
            for batches in _rounds(model.batches(requests), requests):
                mine = batches[min(ranks.rank(), len(batches) - 1)]
                kept = ranks.rank() < len(batches)  # in lockstep the others answer too, and drop what they said
                answers = control.from_all(self._answered([requests[number] for number in mine], kept))
                # a rank without a batch of its own has said nothing that is kept
                said = {
                    keys[n]: one
                    for batch, some in zip(batches, answers, strict=False)
                    for n, one in zip(batch, some, strict=True)
                }
                self._take(said, failed)
                done += sum(requests[number].total_tokens for batch in batches for number in batch)
                tick(done, total_tokens, f"{len(failed)} failed" if failed else "")
        return failed

    @property
    def model(self) -> WindowModel:
        """The model; made when it is first needed."""
        if self._model is None:
            self._model = self._make_model()
        return self._model

    def _answered(self, requests: list[Request], kept: bool) -> list[Answer]:
        if self.model.lockstep is not None:
            return self.model.answer(requests)  # an error ends the job: the others wait for this rank's weights
        if not kept:
            return []
        try:
            return self.model.answer(requests)
        except (UserError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
        # Outside the handler: inside, the error's traceback would hold the memory of the batch that failed.
        if len(requests) > 1:  # each alone, so that the others do not fail with it
            return [answer for request in requests for answer in self._answered([request], True)]
        return [Answer(self.model.subject.window(requests[0].total_tokens), error=reason)]

    def _take(self, said: Mapping[str, Answer], failed: dict[str, Answer]) -> None:
        """Remember the answers of a round, on every rank, and write them down on rank 0."""
        good = {key: answer for key, answer in said.items() if answer.error is None}
        bad = {key: answer for key, answer in said.items() if answer.error is not None}
        if bad and not failed:
            self._log(f"a sample failed and the rest goes on: {next(iter(bad.values())).error}")
        failed |= bad
        self._known |= good
        self.computed += len(good)
        entries = [{"key": key, "answer": asdict(answer)} for key, answer in good.items()]
        control.together(lambda: journals.append(self._file, entries) if ranks.rank() == 0 and entries else None)


def _rounds(batches: Sequence[list[int]], requests: Sequence[Request]) -> list[list[list[int]]]:
    """Batches of one kind and of similar length for all ranks, one each."""
    by_kind: dict[type, list[list[int]]] = {}
    for batch in batches:
        by_kind.setdefault(type(requests[batch[0]]), []).append(batch)
    world = ranks.world()
    rounds = []
    for same in by_kind.values():
        same.sort(key=lambda batch: -requests[batch[0]].total_tokens)
        rounds += [same[first : first + world] for first in range(0, len(same), world)]
    return rounds


def _answer(noted: Mapping[str, Any]) -> Answer:
    return replace(Answer(**noted), nlls=tuple(noted["nlls"]), right=tuple(noted["right"]))
