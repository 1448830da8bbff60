"""Short-window distillation: in short segments, the original model's distribution is a second target.

    loss = sum of CE over all targets + weight * sum of KL(p || q) over the targets of short segments

p is the distribution of the frozen original model over the vocabulary, under its original RoPE; q is that of the model
in training. The idea is LongReD's (arXiv 2502.07365): a model that learns long texts drifts away from the original on
short ones. LongReD pulls hidden states of some layers; here the whole distribution is compared, which is what short
tasks read, and which needs no choice of layers.

Choice: the original model is a second model in memory, divided over the ranks as the first one is, and runs on each
short segment again. Figures that were stored beforehand would need the top of the distribution alone, and a store for
each corpus. Logits exist for a chunk of positions at a time. Gradients are made in the forward pass, where the logits
of both models exist, so none is computed twice. Cost: a forward pass of the original model over short segments, and one
more product with a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lr2train.attention.segment import SegmentAttention
from lr2train.model import rotary
from lr2train.model.head import PLAIN, LogitForm
from lr2train.model.loss import Gradients, LossHead, OnePass, chunks, logits_of, wide
from lr2train.model.weights import Gather
from lr2train.rope.factors import Factors


class Original:
    """The frozen model that a training starts from, under its original RoPE.

    Args:
        lm: a Hugging Face causal LM in eval mode without gradients, with our attention installed.
        factors: of the training; the short window's table is the model's own, whatever they are.
        gather: makes divided parameters whole.
    """

    def __init__(self, lm: Any, factors: Factors, gather: Gather):
        self._lm, self._gather = lm, gather
        rotary.install(lm, factors).window = "short"

    @torch.no_grad()
    def hidden(self, tokens: Tensor, segment_attention: SegmentAttention) -> Tensor:
        """The final hidden states [T/sp, H] of a sequence shard of tokens, int64 [T/sp]. A collective."""
        out = self._lm.base_model(
            input_ids=tokens[None],
            position_ids=segment_attention.positions(tokens.device)[None],
            segment_attention=segment_attention,
            use_cache=False,
        )
        return out.last_hidden_state[0]

    @contextlib.contextmanager
    def head(self) -> Iterator[Tensor]:
        """The weight of the head [V, H], whole inside the block. A collective."""
        weight = self._lm.get_output_embeddings().weight
        with self._gather([weight]):
            yield weight


class DistillHead(LossHead):
    """The loss of both targets. Without hidden states of the original model it is a ``LossHead``.

    One module serves both windows: under ZeRO-3, DeepSpeed prefetches by the order of modules, which has to stay.

    Args:
        head: of the model in training.
        chunk_tokens: as for ``LossHead``. Distillation takes half as many positions at a time, because the logits of
            two models exist.
        form: of the logits of both models.
        weight: of the divergence.
    """

    def __init__(self, head: nn.Linear, chunk_tokens: int, form: LogitForm = PLAIN, weight: float = 1.0):
        super().__init__(head, chunk_tokens, form)
        self.divergence_weight = weight

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        targets: Tensor | None = None,
        original: Tensor | None = None,
        head: Tensor | None = None,
    ) -> Tensor:
        """The loss as ``LossHead.forward`` returns it; or, where ``original`` is given, both losses [3] in that dtype:
        ``loss + weight * divergence``, which alone has a gradient, loss, and divergence; summed over targets, in nats.

        Args:
            hidden: [T, H], of the model in training.
            labels: int64 [T].
            targets: int64 [n], the positions with a target.
            original: [T, H], hidden states of the original model.
            head: [V, H], the original model's.
        """
        if original is None:
            return super().forward(hidden, labels, targets)
        chunk = max(1, self.chunk_tokens // 2)
        both = _ChunkedDistillation.apply(
            hidden, self.weight, labels, targets, original, head, chunk, self.form, self.divergence_weight
        )
        return torch.stack(both)


class _ChunkedDistillation(OnePass):
    """Computes losses and gradients of a chunk of positions at a time, all in the forward pass.

    The gradient of the logits is ``(q - one-hot) + weight * (q - p)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        targets: Tensor,
        original: Tensor,
        head: Tensor,
        chunk_tokens: int,
        form: LogitForm,
        divergence_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments as ``DistillHead.forward``; returns total, loss and divergence."""
        loss, divergence = (torch.zeros((), dtype=wide(hidden), device=hidden.device) for _ in range(2))
        ctx.gradients = Gradients(hidden, weight)
        for rows in chunks(targets, chunk_tokens):
            own, apart = _of_chunk(ctx.gradients, rows, labels[rows], original[rows], head, form, divergence_weight)
            loss += own
            divergence += apart
        ctx.mark_non_differentiable(loss, divergence)
        return loss + divergence_weight * divergence, loss, divergence


def _of_chunk(
    gradients: Gradients,
    rows: Tensor,
    labels: Tensor,
    original: Tensor,
    head: Tensor,
    form: LogitForm,
    divergence_weight: float,
) -> tuple[Tensor, Tensor]:
    """Add the gradients of one chunk; returns its loss and its divergence. A function, so that its logits are free when
    the next ones are made.
    """
    logits = logits_of(gradients.hidden[rows], gradients.weight, form)  # [chunk, V]
    log_q = logits.log_softmax(-1)
    log_p = logits_of(original, head, form).log_softmax(-1)
    p = log_p.exp()
    here = torch.arange(len(rows), device=rows.device), labels
    loss, divergence = -log_q[here].sum(), log_p.sub_(log_q).mul_(p).sum()
    grad = log_q.exp_().mul_(1 + divergence_weight).sub_(p, alpha=divergence_weight)
    grad[here] -= 1.0
    grad = form.to_products(grad, logits).to(gradients.hidden.dtype)
    del logits, log_q, log_p, p  # before the products with the head
    gradients.add(rows, grad)
    return loss, divergence
