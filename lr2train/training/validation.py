"""Held-out loss during training: the loss of both windows on documents that no training segment holds.

Every ``engine.validate_every_steps`` steps, before the first step and after the last one, the loss of fixed segments
(``data.feed.held_out``) is measured: short ones under the original RoPE table, long ones under the rescaled one.

With ``engine.validate_needles``, so is the loss of the answers of needle documents that are made from held-out text,
under the rescaled table. Text alone says little about retrieval (docs/RESULTS.md).

Choice: segments are divided over the ranks as in a step, and the loss is their summed loss over their target tokens, so
it does not depend on the ranks. Nothing of the training changes: no gradient, no random draw, no data. Cost: a forward
pass of at most ``2 * validate_segments`` segments, about a third of their training; and their tokens stay in memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from lr2train import io
from lr2train.config import Config, LongAttention, UserError
from lr2train.data.batch import LONG, SHORT, WINDOWS, Batch
from lr2train.data.corpus import Corpus
from lr2train.data.feed.held_out import HeldOutSegments, needle_batches
from lr2train.parallel import control
from lr2train.progress import say
from lr2train.rope.factors import Factors
from lr2train.training.deepspeed.engine import Engine

NEEDLES = "needles"  # beside the windows, in keys of metrics.jsonl


class HeldOut:
    """Measures the held-out loss of a run.

    Args:
        engine: of the run.
        batches: of this data-parallel rank; empty where nothing is measured.
        every_steps: optimizer steps between two measurements.
        needles: needle documents of this data-parallel rank.
    """

    def __init__(
        self, engine: Engine, batches: Sequence[Batch], every_steps: int, needles: Sequence[Batch] = ()
    ) -> None:
        self._engine, self._batches, self._every, self._needles = engine, batches, every_steps, needles

    @classmethod
    def prepare(cls, config: Config, corpus: Corpus, engine: Engine, factors: Factors) -> HeldOut:
        """Read the held-out segments, and say which window has none. A collective.

        Long ones are as long as the target window, also where training segments are shorter and positions jump. A
        curriculum trains the short window alone, so only its loss is measured.

        Raises:
            UserError: held-out documents cannot be read; on every rank.
        """
        every = config.engine.validate_every_steps
        if not every:
            return cls(engine, (), every)
        kept: list[Batch] = []
        counts = []
        for window in WINDOWS if config.data.kind == "segments" else (SHORT,):
            n_segments, found = _read(window, config, corpus, engine, factors)
            if missing := _missing(window, n_segments, corpus, engine, found):
                say("train", f"the held-out loss of the {window} window is not measured: {missing}")
                continue
            kept += found
            counts.append(f"{n_segments} {window} segment{'s' * (n_segments > 1)}")
        needles: list[Batch] = []
        if n_documents := config.engine.validate_needles:
            of_rank, length = (engine.mesh.dp_rank, engine.mesh.dp_size), factors.target_window_tokens
            control.together(
                lambda: needles.extend(needle_batches(corpus, config.data.needles, n_documents, length, *of_rank))
            )
            counts.append(f"{n_documents} needle document{'s' * (n_documents > 1)}")
        if counts:
            say("train", f"held-out loss every {every} steps, of {' and '.join(counts)}")
        return cls(engine, kept, every, needles)

    @property
    def measures(self) -> bool:
        """Whether there is something to measure."""
        return bool(self._batches or self._needles)

    @property
    def names(self) -> set[str]:
        """What is measured: windows, and ``needles``."""
        return {batch.window for batch in self._batches} | ({NEEDLES} if self._needles else set())

    def due(self, before: int, step: int, last: bool) -> bool:
        """Whether to measure after a step.

        Args:
            before: number of the trained step before; 0 at the first one.
            step: number of the step, the first is 1.
            last: it is the last step of the run.
        """
        return self.measures and (last or step // self._every > before // self._every)

    def measure(self, step: int) -> dict[str, Any]:
        """``heldout_loss_<name>`` (nats per target token; None where it is not finite) and ``heldout_tokens_<name>``
        after ``step`` steps, for each of ``names``. A collective.

        Raises:
            RuntimeError: a rank failed; the same text on every rank.
        """
        start = time.perf_counter()
        found = self._engine.measure(self._batches) if self._batches else {}
        if self._needles:
            found[NEEDLES] = self._engine.measure(self._needles)[LONG]
        seconds = time.perf_counter() - start
        losses = " and ".join(f"{one.loss:.4f} ({name})" for name, one in found.items())
        say("train", f"step {step}: held-out loss {losses}, measured in {seconds:.1f} s")
        for name, one in found.items():
            if not math.isfinite(one.loss):
                what = "needles" if name == NEEDLES else f"the {name} window"
                say("train", f"step {step}: the held-out loss of {what} is not finite; training goes on")
        return io.finite(
            {f"heldout_loss_{name}": one.loss for name, one in found.items()}
            | {f"heldout_tokens_{name}": one.n_target_tokens for name, one in found.items()}
        )


def _read(window: str, config: Config, corpus: Corpus, engine: Engine, factors: Factors) -> tuple[int, list[Batch]]:
    """How many segments a window has on all ranks, and this rank's batches. A collective.

    Raises:
        UserError: held-out documents cannot be read; on every rank.
    """
    mesh, data, mine = engine.mesh, config.data, []

    def read() -> int:
        most = config.engine.validate_segments
        n_tokens = factors.target_window_tokens if window == LONG else data.segment_tokens
        segments = HeldOutSegments(corpus, window, factors.spectrum.window_tokens, n_tokens, most)
        whole = window == LONG and data.long_attention == LongAttention.segment
        mine.extend(segments.batches(mesh.dp_rank, mesh.dp_size, whole))
        return len(segments.numbers)

    return control.together(read)[0], mine


def _missing(window: str, n_segments: int, corpus: Corpus, engine: Engine, batches: Sequence[Batch]) -> str:
    """Why a window cannot be measured; empty where it can. A collective."""
    if not n_segments:
        documents = "documents over the original window" if window == LONG else "documents"
        return (
            f"the held-out {documents} of the corpus {corpus.folder} do not fill a segment; prepare more documents, or "
            "raise data.holdout"
        )
    return next(filter(None, control.from_all(_unserved(engine, batches))), "")


def _unserved(engine: Engine, batches: Sequence[Batch]) -> str:
    """Why attention does not serve a batch, such as under ``parallel.strategy=local``; empty where it serves all."""
    try:
        for batch in batches:
            engine.attention.segment(batch.spans, len(batch.tokens))
    except UserError as error:
        return str(error)
    return ""
