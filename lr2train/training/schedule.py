"""The learning rate as a pure function of the step: linear warm-up, then cosine, linear or constant."""

from __future__ import annotations

import math

from lr2train.config import OptimConfig


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """The learning rate of step ``step``, counted from 0.

    Linear warm-up over ``warmup_steps``, then the schedule from ``lr`` down to ``lr * min_lr_ratio`` at
    ``total_steps``.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    return optim.lr * (optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * _shape(optim.schedule, min(done, 1.0)))


def _shape(schedule: str, done: float) -> float:
    """From 1 at ``done=0`` to 0 at ``done=1``; constant stays at 1."""
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0 - done if schedule == "linear" else 1.0
