"""RoPE with two tables, chosen by a tag and never by a length.

Choice: the rotary module of a Hugging Face model is swapped for ``WindowRotary``, which computes the same expression in the same precision.
"short" is the model's own table, bit for bit; "long" is the table of the rescaled frequencies. transformers' own ``longrope`` reads the
largest position instead, which disagrees between the ranks of one sequence and flips on packed restarts. Cost: whoever calls the model
names the window.

The tables are plain attributes, not buffers: nothing that casts a module to bfloat16 can touch them, and at 128k a bfloat16 frequency is
noise.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lr2train.config import UserError
from lr2train.rope import hf as rope_hf
from lr2train.rope.factors import Factors

WINDOWS = ("short", "long")


class WindowRotary(nn.Module):
    """cos and sin of ``position * inv_freq[window]``, times the window's attention factor (paper, Eq. 1 and Figure 10).

    Attributes:
        window: "short" or "long"; the table that the next forward uses.
    """

    def __init__(self, short_inv_freq: torch.Tensor, short_attention_factor: float, factors: Factors):
        super().__init__()
        self.tables = {"short": (short_inv_freq, short_attention_factor), "long": (long_inv_freq(factors), factors.attention_factor)}
        self.window = "short"

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin of shape [B, T, rotary_dim] in x's dtype, for position_ids [B, T]; angles are always computed in fp32."""
        inv_freq, attention_factor = self.tables[self.window]
        if inv_freq.device != x.device:
            inv_freq = inv_freq.to(x.device)
            self.tables[self.window] = (inv_freq, attention_factor)
        half = position_ids[..., None].float() * inv_freq
        angles = torch.cat((half, half), dim=-1)
        return (angles.cos() * attention_factor).to(x.dtype), (angles.sin() * attention_factor).to(x.dtype)


def long_inv_freq(factors: Factors) -> torch.Tensor:
    """``1 / (lambda_i * b^(2i/d))`` in fp32, in transformers' order of operations for ``longrope``: equal to its table bit for bit."""
    rotary_dim, base = factors.spectrum.rotary_dim, factors.spectrum.base
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    return 1.0 / (torch.tensor(factors.rescale, dtype=torch.float32) * base**exponent)


def install(model: Any, factors: Factors) -> WindowRotary:
    """Swap the rotary module of a Hugging Face causal LM. The factors decide the long window; the short one stays the model's own.

    Raises:
        UserError: the model has no standard ``rotary_emb``, or its table has another size than the factors.
    """
    base = model.base_model
    own = getattr(base, "rotary_emb", None)
    if own is None or not hasattr(own, "attention_scaling"):
        raise UserError(
            f"{type(model).__name__} has no standard rotary_emb on its base model; set model.path to a RoPE model of the standard interface"
        )
    inv_freq, attention_factor = _own_table(own, model.config)
    if len(inv_freq) != len(factors.rescale):
        raise UserError(
            f"the factors have {len(factors.rescale)} entries, the model rotates {len(inv_freq)} pairs; "
            "set rope.factors to factors of this model"
        )
    base.rotary_emb = WindowRotary(inv_freq, attention_factor, factors)
    return base.rotary_emb


def _own_table(own: nn.Module, config: Any) -> tuple[torch.Tensor, float]:
    """inv_freq [D] and attention factor of the model's own short window, whatever dtype, device or partition its module was first built in.

    A `longrope` module starts with its short table. Its attention factor is the long window's too in transformers; the config may name the
    short window's own (ours does: 1).
    """
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            fresh: Any = type(own)(copy.deepcopy(config))
    finally:
        torch.set_default_dtype(default_dtype)
    published = rope_hf.factors_of(config.to_dict())
    return fresh.inv_freq, float(published.short_attention_factor if published else fresh.attention_scaling)
