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
from lr2train.model.loss import LossHead
from lr2train.rope.factors import Factors


class WindowLM(nn.Module):
    """``(tokens, labels, segment_attention, window) -> summed loss`` over a Hugging Face causal LM."""

    def __init__(self, lm: Any, factors: Factors, loss_chunk_tokens: int):
        super().__init__()
        self.lm = lm
        self.rotary = [rotary.install(lm, factors)]  # in a list, so that torch does not register the module twice
        self.loss_head = LossHead(lm.get_output_embeddings(), loss_chunk_tokens)

    def forward(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        segment_attention: SegmentAttention,
        window: str,
    ) -> torch.Tensor:
        """Summed loss of this rank's sequence shard.

        Args:
            tokens: int64 [T/sp].
            labels: int64 [T/sp]; -100 where there is no target.
            segment_attention: attention of the whole segment, on this rank.
            window: "short" | "long", which RoPE table acts.
        """
        self.rotary[0].window = window
        positions = segment_attention.positions(tokens.device)
        hidden = self.lm.base_model(
            input_ids=tokens[None], position_ids=positions[None], segment_attention=segment_attention, use_cache=False
        ).last_hidden_state
        return self.loss_head(hidden[0], labels)
