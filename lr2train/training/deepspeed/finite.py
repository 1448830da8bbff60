"""Guards against numbers that are not finite: no update from such a gradient, no checkpoint of such a weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lr2train.config import UserError


class FiniteAdamW(torch.optim.AdamW):
    """AdamW that makes no update where a gradient is not finite.

    For ZeRO stage 0: every rank holds the same whole gradients, so all ranks decide alike. ZeRO's own optimizers do the
    same by themselves.

    Attributes:
        finite: whether the last call made its update.
    """

    finite = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Make the update, or none."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.finite = bool(torch.stack([torch.isfinite(one).all() for one in gradients]).all())
        return super().step(closure) if self.finite else None


def refuse_non_finite(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Refuse named tensors where one holds a number that is not finite.

    Raises:
        UserError: a tensor is not finite; the text names the first one.
    """
    bad = [name for name, tensor in tensors if tensor.is_floating_point() and not _is_finite(tensor)]
    if bad:
        raise UserError(
            f"{bad[0]} holds numbers that are not finite ({len(bad)} tensors do), so no checkpoint is written, "
            "and the checkpoint before stays; set optim.lr to a lower value under another name="
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether every element is finite. A finite sum says so without a temporary tensor; the sum of finite numbers may
    overflow.
    """
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())
