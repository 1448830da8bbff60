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
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lr2train.config import UserError
from lr2train.rope import hf as rope_hf
from lr2train.rope.factors import Factors
from lr2train.rope.spectrum import Spectrum

WINDOWS = ("short", "long")


class RopeTable(NamedTuple):
    """One window's RoPE.

    Attributes:
        inv_freq: fp32 [D], radians per token.
        attention_factor: multiplies cos and sin.
    """

    inv_freq: torch.Tensor
    attention_factor: float

    def to(self, device: torch.device) -> RopeTable:
        """The same on a device."""
        return self._replace(inv_freq=self.inv_freq.to(device))


class WindowRotary(nn.Module):
    """cos and sin of ``position * inv_freq[window]``, times the window's attention factor (paper, Eq. 1 and Figure 10).

    Attributes:
        window: "short" or "long"; the table that the next forward uses.
        tables: both, by window.
    """

    def __init__(self, short_inv_freq: torch.Tensor, short_attention_factor: float, factors: Factors):
        super().__init__()
        self.tables = {"short": RopeTable(short_inv_freq, short_attention_factor)}
        self.use(factors)
        self.window = "short"

    def use(self, factors: Factors) -> None:
        """Put other factors into the long table; the short one stays the model's own."""
        self.tables["long"] = long_table(factors)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin of shape [B, T, rotary_dim] in x's dtype, for position_ids [B, T]; angles are always computed in fp32."""
        table = self.tables[self.window]
        if table.inv_freq.device != x.device:
            table = self.tables[self.window] = table.to(x.device)
        half = position_ids[..., None].float() * table.inv_freq
        angles = torch.cat((half, half), dim=-1)
        return (angles.cos() * table.attention_factor).to(x.dtype), (angles.sin() * table.attention_factor).to(x.dtype)


def long_table(factors: Factors) -> RopeTable:
    """The long window of some factors, on the CPU; equal to transformers' ``longrope`` bit for bit."""
    return RopeTable(_inv_freq(factors.spectrum, factors.rescale), factors.attention_factor)


def _inv_freq(spectrum: Spectrum, rescale: Sequence[float]) -> torch.Tensor:
    """``1 / (lambda_i * b^(2i/d))`` in fp32, in transformers' order of operations."""
    exponent = torch.arange(0, spectrum.rotary_dim, 2, dtype=torch.int64).float() / spectrum.rotary_dim
    return 1.0 / (torch.tensor(rescale, dtype=torch.float32) * spectrum.base**exponent)


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
