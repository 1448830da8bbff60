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
        total = torch.zeros((), dtype=wide(hidden), device=hidden.device)
        for rows in chunks(targets, chunk_tokens):
            total += F.cross_entropy(logits_of(hidden[rows], weight, form), labels[rows], reduction="sum")
        return total

    @staticmethod
    def backward(ctx, grad_total: torch.Tensor):
        """Gradients of hidden [T, H] and weight [V, H] in their dtypes: (softmax - one-hot) through form and head."""
        hidden, weight, labels, targets = ctx.saved_tensors
        gradients = Gradients(hidden, weight)
        for rows in chunks(targets, ctx.chunk_tokens):
            _again(gradients, rows, labels[rows], ctx.form, grad_total)
        return gradients.of_hidden, gradients.of_weight.to(weight.dtype), None, None, None, None


def _again(gradients: Gradients, rows: torch.Tensor, labels: torch.Tensor, form: LogitForm, scale: torch.Tensor):
    """Add the gradients of one chunk. A function, so that its logits are free when the next ones are made."""
    logits = logits_of(gradients.hidden[rows], gradients.weight, form)
    grad = _of_products(torch.softmax(logits, dim=-1), logits, labels, form)
    gradients.add(rows, grad * scale)


class Gradients:
    """The gradients of hidden states [T, H] and of a head's weight [V, H], summed over chunks of positions.

    Attributes:
        of_hidden: in the dtype of ``hidden``.
        of_weight: fp32 at least; in bf16 the small terms of thousands of chunks would be lost.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor):
        self.hidden, self.weight = hidden, weight
        self.of_hidden = torch.zeros_like(hidden)
        self.of_weight = torch.zeros(weight.shape, dtype=wide(hidden), device=weight.device)

    def add(self, rows: torch.Tensor, grad: torch.Tensor) -> None:
        """Add a chunk: ``grad`` [n, V] is the gradient of its products with the weight, at the positions ``rows``."""
        grad = grad.to(self.hidden.dtype)
        self.of_hidden[rows] = grad @ self.weight
        self.of_weight += grad.T @ self.hidden[rows]

    def scaled(self, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both, times a scalar, in the dtypes of what they are gradients of. In place: serves once."""
        # As a matrix, so that fp32 is the common dtype: a scalar would be rounded to the dtype of the gradient first.
        torch.mul(self.of_hidden, scale.reshape(1, 1), out=self.of_hidden)
        return self.of_hidden, self.of_weight.mul_(scale).to(self.weight.dtype)


class OnePass(torch.autograd.Function):
    """A scalar loss of (hidden, weight, …) whose forward pass leaves its ``Gradients`` in ``ctx.gradients``."""

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: torch.Tensor, *_: torch.Tensor):  # type: ignore[override]
        """The gradients of the forward pass, times grad_total; a NaN there makes them NaN. Runs once: in place."""
        assert ctx.gradients is not None, (
            "the gradients of the loss were scaled in place: a graph has one backward pass"
        )
        gradients, ctx.gradients = ctx.gradients, None
        return *gradients.scaled(grad_total), *([None] * (len(ctx.needs_input_grad) - 2))


class _OnePassCrossEntropy(OnePass):
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
        total = torch.zeros((), dtype=wide(hidden), device=hidden.device)
        ctx.gradients = Gradients(hidden, weight)
        for rows in chunks(targets, chunk_tokens):
            total += _with_gradients(ctx.gradients, rows, labels[rows], form)
        return total


def _with_gradients(gradients: Gradients, rows: torch.Tensor, labels: torch.Tensor, form: LogitForm) -> torch.Tensor:
    """Add the gradients of one chunk; returns its loss. A function, so that its logits are free when the next ones are
    made.
    """
    logits = logits_of(gradients.hidden[rows], gradients.weight, form)
    log_p = F.log_softmax(logits, dim=-1)
    loss = F.nll_loss(log_p, labels, reduction="sum")
    grad = _of_products(log_p.exp_(), logits, labels, form).to(gradients.hidden.dtype)
    del logits, log_p  # before the products with the head
    gradients.add(rows, grad)
    return loss


def _of_products(p: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, form: LogitForm) -> torch.Tensor:
    """The gradient of the summed loss by the products [chunk, V]: (softmax - one-hot) through the form. p is
    overwritten.
    """
    p[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    return form.to_products(p, logits)


def logits_of(hidden: torch.Tensor, weight: torch.Tensor, form: LogitForm) -> torch.Tensor:
    """Logits [n, V] of hidden states [n, H], in fp32 at least."""
    return form.logits(F.linear(hidden, weight).to(wide(hidden)))


def wide(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of logits and sums: fp32, or fp64 for fp64."""
    return torch.promote_types(hidden.dtype, torch.float32)


def chunks(targets: torch.Tensor, chunk_tokens: int) -> tuple[torch.Tensor, ...]:
    """The positions with a target, in chunks; positions without a target cost nothing."""
    return targets.split(chunk_tokens) if len(targets) else ()
