"""The end of a training whose held-out loss has settled (``optim.settle_validations``): of needles where they are
measured (``engine.validate_needles``), else of the long window's text.

Rule: the run has settled where the best of its last n measurements is less than ``optim.settle_nats`` below the best
of all earlier ones. The first one that counts stands at or after the end of the warm-up (``optim.warmup_steps``): a
loss that rises in the warm-up would seem settled until it is back. Then the learning rate falls linearly from its
present value to ``optim.min_lr_ratio`` of the peak, over a quarter of the steps done, and the run ends there. So a
fifth of the run is decay, as in Hägele et al. (2024), "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
Durations".

Choice: a bound in nats, not in standard errors. All measurements read the same segments, so their difference has a
small error, and a bound in errors would never see the slow gain of a schedule as settled. Cost: the bound is one's own
choice. The measured losses stand in ``train.settling.json``, so a resumed run settles at the same step.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lr2train import io, ranks
from lr2train.config import Config
from lr2train.data.batch import LONG
from lr2train.parallel import control
from lr2train.progress import say
from lr2train.training.schedule import learning_rate
from lr2train.training.validation import NEEDLES

FILE = "train.settling.json"
DECAY = 0.25  # steps of the decay, as a share of the steps before


class Settling:
    """The measurements of a run, and what follows from them; the same on every rank.

    Args:
        config: ``optim.settle_validations`` 0: the run never settles.
        total_steps: where the run ends if it does not settle.
        losses: step -> held-out loss, nats per target token, in the order of steps.
        file: where the losses are kept, by rank 0; None: nowhere.

    Attributes:
        measured: what the loss is of, "needles" or "long".
        step: the step after which the run has settled; None: it has not.
    """

    def __init__(
        self, config: Config, total_steps: int, losses: Mapping[int, float] | None = None, file: Path | None = None
    ) -> None:
        self._optim, self._total, self._file = config.optim, total_steps, file
        self.measured = NEEDLES if config.engine.validate_needles else LONG
        self._losses = dict(losses or {})
        self.step = self._found()

    @classmethod
    def resume(cls, config: Config, total_steps: int, folder: Path, done: int) -> Settling:
        """Of a run that goes on after ``done`` steps; later measurements are dropped. A collective."""
        if not config.optim.settle_validations:
            return cls(config, total_steps)
        file = folder / FILE
        kept = dict(io.read_json(file)) if ranks.rank() == 0 and done and file.exists() else {}
        kept = {int(step): loss for step, loss in control.from_rank_0(kept).items() if int(step) <= done}
        return cls(config, total_steps, {step: math.inf if one is None else one for step, one in kept.items()}, file)

    def note(self, step: int, figures: Mapping[str, Any]) -> None:
        """Take what was measured after ``step`` steps, in the keys of metrics.jsonl."""
        key = f"heldout_loss_{self.measured}"
        if not self._optim.settle_validations or self.step is not None or key not in figures:
            return
        loss = figures[key]
        self._losses[step] = math.inf if loss is None else loss  # None: not finite
        if self._file is not None and ranks.rank() == 0:
            io.write_json(self._file, io.finite(self._losses))
        self.step = self._found()
        if self.step is not None and self.end > step:
            say("train", f"step {step}: {self.reason}; the learning rate decays until the end after step {self.end}")

    def _found(self) -> int | None:
        """The first step after which the rule holds."""
        n, steps = self._optim.settle_validations, list(self._losses)
        steps = steps[bisect_left(steps, self._optim.warmup_steps) :]
        losses = [self._losses[step] for step in steps]
        for last in range(n + 1, len(losses) + 1) if n else ():
            if not min(losses[: last - n]) - min(losses[last - n : last]) >= self._optim.settle_nats:
                return steps[last - 1]
        return None

    @property
    def reason(self) -> str:
        """Why the run has settled; empty where it has not."""
        if self.step is None:
            return ""
        n, of = self._optim.settle_validations, "needles" if self.measured == NEEDLES else "the long window"
        if not any(math.isfinite(loss) for loss in list(self._losses.values())[-n:]):
            return f"the held-out loss of {of} was not finite in {n} measurements"
        return f"the held-out loss of {of} fell by less than {self._optim.settle_nats} nats in {n} measurements"

    @property
    def end(self) -> int:
        """The step to train to, skipped steps included."""
        return self._total if self.step is None else min(self._total, self.step + self._decay_steps)

    @property
    def _decay_steps(self) -> int:
        assert self.step is not None
        return math.ceil(DECAY * self.step)

    def is_last(self, step: int, steps: Sequence[int]) -> bool:
        """Whether ``step`` is the last of ``steps`` before the end; both count from 0, ``steps`` ascend."""
        return step >= steps[bisect_left(steps, self.end) - 1]

    def learning_rate(self, step: int) -> float:
        """The learning rate of step ``step``, counted from 0."""
        if self.step is None or step < self.step:
            return learning_rate(step, self._total, self._optim)
        begin, least = learning_rate(self.step, self._total, self._optim), self._optim.lr * self._optim.min_lr_ratio
        return least + max(0.0, begin - least) * (1 - (step - self.step) / self._decay_steps)
