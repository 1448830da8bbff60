"""Bad steps: the loss or the gradient norm is not finite, and no update is made. Too many in a row end the run.

Choice: one bad step may come from a bad document or a rare overflow, so training goes on. Several in a row mean wrong
weights or settings, and every further step would be wasted. No checkpoint is written in a row of bad steps, so the
checkpoint before the row stays.
"""

from __future__ import annotations

from lr2train.config import UserError
from lr2train.data.batch import Loader
from lr2train.parallel import control
from lr2train.progress import say
from lr2train.training.deepspeed.engine import StepStats


class BadSteps:
    """Counts the bad steps of a run.

    Args:
        most: bad steps in a row that end the run; ``engine.max_bad_steps``.
        total: bad steps of earlier starts.

    Attributes:
        in_a_row: bad steps since the last good one.
        total: bad steps of the whole run.
    """

    def __init__(self, most: int, total: int = 0) -> None:
        self.in_a_row, self.total, self._most, self._first = 0, total, most, 0

    def look(self, step: int, stats: StepStats, loader: Loader) -> None:
        """Count a step (the first is 0), and name the segments of a bad one. A collective if the step is bad.

        Raises:
            UserError: ``most`` steps in a row were bad; on every rank.
        """
        if stats.finite:
            self.in_a_row = 0
            return
        self._first = self._first if self.in_a_row else step + 1
        self.in_a_row += 1
        self.total += 1
        found = _found(step, stats, loader)
        say("train", f"step {step + 1}: {found}; no update was made ({self.in_a_row} of {self._most} in a row)")
        if self.in_a_row >= self._most:
            self.give_up(step)

    def give_up(self, step: int) -> None:
        """End the run after ``step``.

        Raises:
            UserError: always.
        """
        steps = f"{self._first}-{step + 1}" if self._first <= step else f"{step + 1}"
        raise UserError(
            f"the loss or the gradient norm of steps {steps} is not finite (engine.max_bad_steps={self._most}), "
            "no update was made in them, and the checkpoint before them stays; "
            f"set data.skip_steps=[{steps}] to skip their data, or a lower optim.lr under another name="
        )


def _found(step: int, stats: StepStats, loader: Loader) -> str:
    """A phrase that names the segments at fault; all segments of the step, if every single loss is finite."""
    names = loader.described(step)
    told = control.from_all(([names[number] for number in stats.suspects], names))
    suspects = list(dict.fromkeys(name for bad, _ in told for name in bad))
    if suspects:
        return f"the loss of segment {'; '.join(suspects)} is not finite"
    of_step = list(dict.fromkeys(name for _, all_of_rank in told for name in all_of_rank))
    return f"the gradient norm is not finite, of segments {'; '.join(of_step)}"
