"""Updates and checkpoints hold finite numbers alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lr2train.config import UserError


class FiniteAdamW(torch.optim.AdamW):
    """AdamW that makes no update where a gradient is not finite. For ZeRO stage 0, where every rank holds the same whole gradients.

    Attributes:
        finite: whether the last call made its update.
    """

    finite = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update, or none."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.finite = bool(torch.stack([torch.isfinite(one).all() for one in gradients]).all())
        return super().step(closure) if self.finite else None


def refuse_non_finite(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    bad = [name for name, tensor in tensors if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]
    if bad:
        raise UserError(
            f"{bad[0]} holds numbers that are not finite ({len(bad)} tensors do), so no checkpoint is written and the one before stays; "
            "set optim.lr to a lower value under another name="
        )
