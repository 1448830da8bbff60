"""Cross-entropy of a linear head, over chunks of positions.

Choice: the logits of a 128k segment (67 GB in fp32 for LLaMA3) never exist whole. The target positions are walked in
chunks. On CUDA the forward pass takes the gradients of each chunk from its logits at once (Liger and others do so), for
a scale of 1. The backward pass multiplies them with the scale that arrives: gradients are linear in it. Cost: the
gradients of the hidden states [T, H] and of the weight (fp32 [V, H]) are held from forward to backward; the loss is the
end of the forward pass, so the peak of memory does not move. Gradients of the hidden states are rounded once more.

Elsewhere the backward pass computes the logits of each chunk anew. Cost: a fourth product with the head beside three.
On CPU the results of earlier versions stay, bit for bit.

The result is a *sum* over target tokens. The caller divides by the target tokens of the whole global batch; a mean of
means would weigh tokens unequally.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lr2train.model.head import PLAIN, LogitForm

IGNORE = -100


class LossHead(nn.Module):
    """Sum of ``-log softmax(z)[label]`` over positions whose label is not -100, for logits z that follow from ``h W^T``
    by the model's ``LogitForm``; logits and sums are in fp32 at least.

    It holds the same weight Parameter as the model's head. Under ZeRO-3 a module's own parameters are gathered once a
    forward or backward pass.
    """

    def __init__(self, head: nn.Linear, chunk_tokens: int, form: LogitForm = PLAIN, one_pass: bool | None = None):
        """``one_pass``: whether the forward pass computes the gradients; None: on CUDA."""
        super().__init__()
        assert head.bias is None, "a head with a bias is refused when the model is loaded"
        self.weight = head.weight
        self.chunk_tokens = chunk_tokens
        self.form = form
        self.one_pass = one_pass

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """The summed negative log-likelihood in nats, a scalar in fp32 (fp64 for fp64).

        Args:
            hidden: [T, H].
            labels: int64 [T].
            targets: int64 [n], the positions with a target, in ascending order. None looks for them in ``labels``: the
                host then waits for the device.
        """
        rows = (labels != IGNORE).nonzero().flatten() if targets is None else targets
        one_pass = hidden.is_cuda if self.one_pass is None else self.one_pass
        function = _OnePassCrossEntropy if one_pass and torch.is_grad_enabled() else _ChunkedCrossEntropy
        return function.apply(hidden, self.weight, labels, rows, self.chunk_tokens, self.form)


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
            grad = _of_products(torch.softmax(logits, dim=-1), logits, labels[rows], ctx.form)
            grad = (grad * grad_total).to(hidden.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += grad.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


class _OnePassCrossEntropy(torch.autograd.Function):
    """Computes the logits of a chunk once, in the forward pass, and the gradients with them."""

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
        total = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=total.dtype, device=weight.device)
        for rows in _chunks(targets, chunk_tokens):
            logits = form.logits(F.linear(hidden[rows], weight).to(total.dtype))  # [chunk, V]
            log_p = F.log_softmax(logits, dim=-1)
            total += F.nll_loss(log_p, labels[rows], reduction="sum")
            grad = _of_products(log_p.exp_(), logits, labels[rows], form).to(hidden.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += grad.T @ hidden[rows]
        ctx.gradients, ctx.weight_dtype = (grad_hidden, grad_weight), weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: torch.Tensor):  # type: ignore[override]
        """The gradients of the forward pass, times grad_total; a NaN there makes them NaN. Runs once: in place."""
        assert ctx.gradients is not None, (
            "the gradients of the loss were scaled in place: a graph has one backward pass"
        )
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        # As a matrix, so that fp32 is the common dtype: a scalar would be rounded to the dtype of grad_hidden first.
        torch.mul(grad_hidden, grad_total.reshape(1, 1), out=grad_hidden)
        return grad_hidden, grad_weight.mul_(grad_total).to(ctx.weight_dtype), None, None, None, None


def _of_products(p: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, form: LogitForm) -> torch.Tensor:
    """The gradient of the summed loss by the products [chunk, V]: (softmax - one-hot) through the form. p is
    overwritten.
    """
    p[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    return form.to_products(p, logits)


def _wide(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of logits and sums: fp32, or fp64 for fp64."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _chunks(targets: torch.Tensor, chunk_tokens: int) -> tuple[torch.Tensor, ...]:
    """The positions with a target, in chunks; positions without a target cost nothing."""
    return targets.split(chunk_tokens) if len(targets) else ()
