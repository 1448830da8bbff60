"""A causal LM whose forward pass takes the window: the module that the training engine wraps.

Choice: the Hugging Face model stays untouched inside. Three parts around it are replaced: the rotary module (two
tables), the attention function (sequence parallel, document spans) and the head (chunked loss instead of logits).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lr2train.attention.segment import SegmentAttention
from lr2train.model import rotary
from lr2train.model.distill import DistillHead, Original
from lr2train.model.head import form_of
from lr2train.model.loss import LossHead
from lr2train.model.router import router_loss_of
from lr2train.rope.factors import Factors

MODULE_PREFIX = "lm."  # of the Hugging Face model's names inside WindowLM


class WindowLM(nn.Module):
    """``(tokens, labels, targets, segment_attention, window) -> losses`` over a Hugging Face causal LM.

    Attributes:
        router_loss: the load-balancing loss of the experts; None where the config asks for none.
        distills: whether short segments are distilled.
    """

    def __init__(
        self,
        lm: Any,
        factors: Factors,
        loss_chunk_tokens: int,
        original: Original | None = None,
        distill_weight: float = 0.0,
    ):
        """Args: ``original`` is what short segments are distilled from, with ``distill_weight``; None: nothing is."""
        super().__init__()
        self.lm = lm
        self.rotary = [rotary.install(lm, factors)]  # in a list, so that torch does not register the module twice
        self.router_loss = router_loss_of(lm)
        self.distills, self._original = original is not None, [original]  # in a list: not divided, not saved
        head = lm.get_output_embeddings(), loss_chunk_tokens, form_of(lm)
        self.loss_head = DistillHead(*head, distill_weight) if self.distills else LossHead(*head)

    def forward(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        targets: torch.Tensor,
        segment_attention: SegmentAttention,
        window: str,
    ) -> torch.Tensor:
        """The losses of this rank's sequence shard [2], in fp32: the sum over its target tokens in nats, and its part
        of the segment's load-balancing loss before the coefficient (0 where there is none).

        A short segment that is distilled in training has four: in the first one the divergence is added with its
        weight; the last two are the loss and the divergence alone.

        Args:
            tokens: int64 [T/sp].
            labels: int64 [T/sp]; -100 where there is no target.
            targets: int64 [n]: the places of this shard with a target, in ascending order.
            segment_attention: attention of the whole segment, on this rank.
            window: "short" | "long", which RoPE table acts.
        """
        self.rotary[0].window = window
        teacher = self._original[0] if self.training and window == "short" else None
        # Before the model's own pass: what the original model needs for its pass is free again by then.
        original = teacher and teacher.hidden(tokens, segment_attention)
        positions = segment_attention.positions(tokens.device)
        recorded = {} if self.router_loss is None else {"output_router_logits": True}
        out = self.lm.base_model(
            input_ids=tokens[None],
            position_ids=positions[None],
            segment_attention=segment_attention,
            use_cache=False,
            **recorded,
        )
        hidden = out.last_hidden_state[0]
        total, *alone = self._losses(hidden, labels, targets, original)
        if self.router_loss is None:
            return torch.stack([total, torch.zeros_like(total), *alone])
        return torch.stack([total, self.router_loss(out.router_logits, segment_attention).to(total.dtype), *alone])

    def _losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor, original: torch.Tensor | None
    ) -> Sequence[torch.Tensor]:
        """The summed loss; and what ``DistillHead`` adds where there are hidden states of the original model."""
        if original is None:
            return [self.loss_head(hidden, labels, targets)]
        teacher = self._original[0]
        assert teacher is not None
        with teacher.head() as head:
            return self.loss_head(hidden, labels, targets, original, head).unbind()
