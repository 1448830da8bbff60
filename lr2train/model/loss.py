"""Cross-entropy of a linear head, over chunks of positions.

Choice: the logits of a 128k segment (67 GB in fp32 for LLaMA3) never exist whole. Forward and backward pass walk the
target positions in chunks and compute the logits of each chunk anew. Cost: one more product with the head in the
backward pass, a few percent of a step.

The result is a *sum* over target tokens. The caller divides by the target tokens of the whole global batch; a mean of
means would weigh tokens unequally.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lr2train.model.head import PLAIN, LogitForm

IGNORE = -100


class LossHead(nn.Module):
    """Sum of ``-log softmax(z)[label]`` over positions whose label is not -100, for logits z that follow from ``h W^T``
    by the model's ``LogitForm``; logits and sums are in fp32 at least.

    It holds the same weight Parameter as the model's head. Under ZeRO-3 a module's own parameters are gathered once a
    forward or backward pass.
    """

    def __init__(self, head: nn.Linear, chunk_tokens: int, form: LogitForm = PLAIN):
        super().__init__()
        assert head.bias is None, "a head with a bias is refused when the model is loaded"
        self.weight = head.weight
        self.chunk_tokens = chunk_tokens
        self.form = form

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """The summed negative log-likelihood in nats, a scalar in fp32 (fp64 for fp64).

        Args:
            hidden: [T, H].
            labels: int64 [T].
            targets: int64 [n], the positions with a target, in ascending order. None looks for them in ``labels``: the
                host then waits for the device.
        """
        rows = (labels != IGNORE).nonzero().flatten() if targets is None else targets
        return _ChunkedCrossEntropy.apply(hidden, self.weight, labels, rows, self.chunk_tokens, self.form)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the logits of a chunk of positions at a time, in the forward pass and again in the backward pass; keeps
    none.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        targets: torch.Tensor,
        chunk_tokens: int,
        form: LogitForm,
    ) -> torch.Tensor:
        """hidden [T, H], weight [V, H], labels [T], targets [n] -> scalar, as ``LossHead.forward``."""
        ctx.save_for_backward(hidden, weight, labels, targets)
        ctx.chunk_tokens, ctx.form = chunk_tokens, form
        total = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
        for rows in _chunks(targets, chunk_tokens):
            logits = form.logits(F.linear(hidden[rows], weight).to(total.dtype))
            total += F.cross_entropy(logits, labels[rows], reduction="sum")
        return total

    @staticmethod
    def backward(ctx, grad_total: torch.Tensor):
        """Gradients of hidden [T, H] and weight [V, H] in their dtypes: (softmax - one-hot) through form and head."""
        hidden, weight, labels, targets = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        # Summed in fp32: in bf16 the small terms of thousands of chunks would be lost.
        grad_weight = torch.zeros(weight.shape, dtype=_wide(hidden), device=weight.device)
        for rows in _chunks(targets, ctx.chunk_tokens):
            logits = ctx.form.logits(F.linear(hidden[rows], weight).to(grad_weight.dtype))  # [chunk, V]
            grad = torch.softmax(logits, dim=-1)
            grad[torch.arange(len(rows), device=rows.device), labels[rows]] -= 1.0
            grad = (ctx.form.to_products(grad, logits) * grad_total).to(hidden.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += grad.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _wide(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of logits and sums: fp32, or fp64 for fp64."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _chunks(targets: torch.Tensor, chunk_tokens: int) -> tuple[torch.Tensor, ...]:
    """The positions with a target, in chunks; positions without a target cost nothing."""
    return targets.split(chunk_tokens) if len(targets) else ()
