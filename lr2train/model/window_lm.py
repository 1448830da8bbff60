"""A causal LM that is told its window: the module that the training engine wraps.

Choice: the Hugging Face model stays untouched inside. Three things around it are swapped: its rotary module (two
tables), its attention function (sequence parallel, packed documents) and its head (chunked loss in the place of
logits).
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
        self.rotary = [rotary.install(lm, factors)]  # in a list: a sub-module of lm, no second child of this module
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
            segment_attention: of the whole segment, on this rank.
            window: "short" | "long", which RoPE table acts.
        """
        self.rotary[0].window = window
        positions = segment_attention.positions(tokens.device)
        hidden = self.lm.base_model(
            input_ids=tokens[None], position_ids=positions[None], segment_attention=segment_attention, use_cache=False
        ).last_hidden_state
        return self.loss_head(hidden[0], labels)
