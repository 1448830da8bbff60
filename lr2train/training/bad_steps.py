"""Steps whose loss or gradient norm is not finite: no update was made in them, they are counted and named, and too many
in a row end the run.

Choice: one such step may be a bad document or a rare overflow, so training goes on. Several in a row mean that the
weights or the settings are at fault, and every further step would be wasted. No checkpoint is written while they last,
so the ones before stay.
"""

from __future__ import annotations

from lr2train.config import UserError
from lr2train.data.batch import Loader
from lr2train.parallel import control
from lr2train.progress import say
from lr2train.training.deepspeed.engine import StepStats


class BadSteps:
    """Counts them.

    Args:
        most: how many in a row end the run; ``engine.max_bad_steps``.
        total: in the run so far.

    Attributes:
        in_a_row: that have just been.
        total: in the whole run.
    """

    def __init__(self, most: int, total: int = 0) -> None:
        self.in_a_row, self.total, self._most, self._first = 0, total, most, 0

    def look(self, step: int, stats: StepStats, loader: Loader) -> None:
        """Count a step (the first is 0) and say what was in it. A collective where the step is bad.

        Raises:
            UserError: as many in a row as may be; on every rank.
        """
        if stats.finite:
            self.in_a_row = 0
            return
        self._first = self._first if self.in_a_row else step + 1
        self.in_a_row += 1
        self.total += 1
        say("train", f"step {step + 1}: {_found(step, stats, loader)}; no update was made ({self.in_a_row} of {self._most} in a row)")
        if self.in_a_row >= self._most:
            self.give_up(step)

    def give_up(self, step: int) -> None:
        """End the run after ``step``.

        Raises:
            UserError: always.
        """
        steps = f"{self._first}-{step + 1}" if self._first <= step else f"{step + 1}"
        raise UserError(
            f"the loss or the gradient norm of steps {steps} is not finite (engine.max_bad_steps={self._most}), no update was made in them, and the "
            f"checkpoint before them stays; set data.skip_steps=[{steps}] to pass over their data, or a lower optim.lr under another name="
        )


def _found(step: int, stats: StepStats, loader: Loader) -> str:
    """What is not finite, and the segments that it comes from: those of the whole step where no single loss shows it."""
    names = loader.described(step)
    told = control.from_all(([names[number] for number in stats.suspects], names))
    suspects = list(dict.fromkeys(name for bad, _ in told for name in bad))
    if suspects:
        return f"the loss of segment {'; '.join(suspects)} is not finite"
    of_step = list(dict.fromkeys(name for _, all_of_rank in told for name in all_of_rank))
    return f"the gradient norm is not finite, of segments {'; '.join(of_step)}"
