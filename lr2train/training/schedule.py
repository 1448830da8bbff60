"""The learning rate as a pure function of the step: warm-up, then cosine, linear or constant."""

from __future__ import annotations

import math

from lr2train.config import OptimConfig


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Learning rate of step ``step`` (zero-based): linear warm-up over ``warmup_steps``, then the schedule down to ``min_lr_ratio`` at ``total_steps``."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    return optim.lr * (optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * _shape(optim.schedule, min(done, 1.0)))


def _shape(schedule: str, done: float) -> float:
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0 - done if schedule == "linear" else 1.0
