"""A causal LM whose forward pass takes the window: the module that the training engine wraps.

Choice: the Hugging Face model stays untouched inside. Three parts around it are replaced: the rotary module (two
tables), the attention function (sequence parallel, document spans) and the head (chunked loss instead of logits).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lr2train.attention.segment import SegmentAttention
from lr2train.model import rotary
from lr2train.model.head import form_of
from lr2train.model.loss import LossHead
from lr2train.model.router import router_loss_of
from lr2train.rope.factors import Factors

MODULE_PREFIX = "lm."  # of the Hugging Face model's names inside WindowLM


class WindowLM(nn.Module):
    """``(tokens, labels, targets, segment_attention, window) -> losses`` over a Hugging Face causal LM.

    Attributes:
        router_loss: the load-balancing loss of the experts; None where the config asks for none.
    """

    def __init__(self, lm: Any, factors: Factors, loss_chunk_tokens: int):
        super().__init__()
        self.lm = lm
        self.rotary = [rotary.install(lm, factors)]  # in a list, so that torch does not register the module twice
        self.router_loss = router_loss_of(lm)
        self.loss_head = LossHead(lm.get_output_embeddings(), loss_chunk_tokens, form_of(lm))

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

        Args:
            tokens: int64 [T/sp].
            labels: int64 [T/sp]; -100 where there is no target.
            targets: int64 [n]: the places of this shard with a target, in ascending order.
            segment_attention: attention of the whole segment, on this rank.
            window: "short" | "long", which RoPE table acts.
        """
        self.rotary[0].window = window
        positions = segment_attention.positions(tokens.device)
        recorded = {} if self.router_loss is None else {"output_router_logits": True}
        out = self.lm.base_model(
            input_ids=tokens[None],
            position_ids=positions[None],
            segment_attention=segment_attention,
            use_cache=False,
            **recorded,
        )
        total = self.loss_head(out.last_hidden_state[0], labels, targets)
        if self.router_loss is None:
            return torch.stack([total, torch.zeros_like(total)])
        return torch.stack([total, self.router_loss(out.router_logits, segment_attention).to(total.dtype)])
