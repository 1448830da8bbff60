"""RoPE with two tables: ``WindowRotary`` takes the place of a Hugging Face model's rotary module.

Choice: a tag ("short" or "long") selects the table, never a length; rows that decode together may have a tag each.
"short" is the model's own table, bit for bit; "long" has the rescaled frequencies theta_i / lambda_i (paper, Eq. 8).
The expression and its precision are transformers' own. transformers' ``longrope`` selects by the largest position
instead: the ranks of one sequence then disagree, and position restarts of packed documents flip the table. Cost: the
caller of the model has to name the window.

The tables are plain attributes and no buffers, so a cast of the module to bfloat16 leaves them in float32. At 128k
positions a bfloat16 frequency is noise.
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
    """The RoPE of one window.

    Attributes:
        inv_freq: fp32 [D], radians per token.
        attention_factor: multiplies cos and sin.
    """

    inv_freq: torch.Tensor
    attention_factor: float

    def to(self, device: torch.device) -> RopeTable:
        """The table on a device."""
        return self._replace(inv_freq=self.inv_freq.to(device))


class WindowRotary(nn.Module):
    """cos and sin of ``position * inv_freq``, times the attention factor, for the selected window (paper, Eq. 5 and 8).

    Attributes:
        window: "short" | "long", the table of the next forward pass; or one for each row of the batch.
        tables: window -> table.
        keeps_fp32: cos and sin stay in fp32, whatever x's dtype (OLMo).
    """

    def __init__(
        self, short_inv_freq: torch.Tensor, short_attention_factor: float, factors: Factors, keeps_fp32: bool = False
    ):
        super().__init__()
        self.keeps_fp32 = keeps_fp32
        self.tables = {"short": RopeTable(short_inv_freq, short_attention_factor)}
        self.use(factors)
        self.window: Any = "short"

    def use(self, factors: Factors) -> None:
        """Replace the long table by the table of other factors; the short table stays the model's own."""
        self.tables["long"] = long_table(factors)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each [B, T, rotary_dim] in x's dtype, for position_ids [B, T]; angles are computed in fp32."""
        inv_freq, attention_factor = self._selected(x.device)
        half = position_ids[..., None].float() * inv_freq  # [B, T, D]
        angles = torch.cat((half, half), dim=-1)  # [B, T, 2D]: dimensions i and i + D of a head turn together
        dtype = torch.float32 if self.keeps_fp32 else x.dtype
        return (angles.cos() * attention_factor).to(dtype), (angles.sin() * attention_factor).to(dtype)

    def _selected(self, device: torch.device) -> tuple[torch.Tensor, float | torch.Tensor]:
        """inv_freq and attention factor of the window; of a window for each row, [B, 1, D] and [B, 1, 1]."""
        if isinstance(self.window, str):
            return self._on(self.window, device)
        tables = [self._on(window, device) for window in self.window]
        factors = torch.tensor([table.attention_factor for table in tables], dtype=torch.float32, device=device)
        return torch.stack([table.inv_freq for table in tables])[:, None], factors[:, None, None]

    def _on(self, window: str, device: torch.device) -> RopeTable:
        if self.tables[window].inv_freq.device != device:
            self.tables[window] = self.tables[window].to(device)
        return self.tables[window]


def long_table(factors: Factors) -> RopeTable:
    """The long window's table on the CPU; equal to transformers' ``longrope`` bit for bit."""
    return RopeTable(_inv_freq(factors.spectrum, factors.rescale), factors.attention_factor)


def _inv_freq(spectrum: Spectrum, rescale: Sequence[float]) -> torch.Tensor:
    """``1 / (lambda_i * b^(2i/d))`` in fp32, in transformers' order of operations."""
    exponent = torch.arange(0, spectrum.rotary_dim, 2, dtype=torch.int64).float() / spectrum.rotary_dim
    return 1.0 / (torch.tensor(rescale, dtype=torch.float32) * spectrum.base**exponent)


def install(model: Any, factors: Factors) -> WindowRotary:
    """Put a ``WindowRotary`` in the place of the model's rotary module.

    Args:
        model: a Hugging Face causal LM.
        factors: of the long window; the short window stays the model's own.

    Raises:
        UserError: the model has no standard ``rotary_emb``, or its table and the factors differ in size.
    """
    base = model.base_model
    own = getattr(base, "rotary_emb", None)
    # attention_scaling marks transformers' standard module; GPT-J and others rotate in a way of their own.
    if own is None or not hasattr(own, "attention_scaling"):
        raise UserError(
            f"{type(model).__name__} has no standard rotary_emb on its base model; set model.path to a RoPE model of "
            "the standard interface"
        )
    fresh = _fresh(own, model.config)
    _refuse_another_layout(fresh, model)
    inv_freq, attention_factor = _own_table(fresh, model.config)
    if len(inv_freq) != len(factors.rescale):
        raise UserError(
            f"the factors have {len(factors.rescale)} entries, the model rotates {len(inv_freq)} pairs; "
            "set rope.factors to factors of this model"
        )
    base.rotary_emb = WindowRotary(inv_freq, attention_factor, factors, _keeps_fp32(fresh))
    return base.rotary_emb


@torch.no_grad()
def _refuse_another_layout(fresh: Any, model: Any) -> None:
    """Refuse a module whose table is no two alike halves: pairs side by side (Cohere), or each pair once (gpt-oss)."""
    cos, _ = fresh(torch.zeros(1, 2, 1), torch.tensor([[1, 2]]))
    first, second = cos.chunk(2, dim=-1)
    if not torch.equal(first, second):
        raise UserError(
            f"{type(model).__name__} has a RoPE table that is not two alike halves, and the rescaled table is; set "
            "model.path to a model with such a table"
        )


def keeps_fp32(model: Any) -> bool:
    """Whether the model's own rotary module returns cos and sin in fp32, whatever the model's dtype.

    Args:
        model: a Hugging Face causal LM on any device, the meta device too, with its own rotary module.
    """
    return _keeps_fp32(_fresh(model.base_model.rotary_emb, model.config))


def _fresh(own: nn.Module, config: Any) -> Any:
    """The module built anew in fp32 on the CPU: the model's may have been built in another dtype or divided over
    ranks.
    """
    default_dtype = torch.get_default_dtype()  # model code may compute its table in this dtype
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            make: Any = type(own)
            return make(copy.deepcopy(config))
    finally:
        torch.set_default_dtype(default_dtype)


@torch.no_grad()
def _keeps_fp32(fresh: Any) -> bool:
    x, positions = torch.zeros(1, 1, 1, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int64)
    return fresh(x, positions)[0].dtype == torch.float32


def _own_table(fresh: Any, config: Any) -> tuple[torch.Tensor, float]:
    """inv_freq [D] and attention factor of the model's own short window.

    A ``longrope`` module starts with its short table. Its attention factor serves both windows in transformers; a
    config with ``short_mscale`` names the short window's own.
    """
    published = rope_hf.factors_of(config.to_dict())
    return fresh.inv_freq, float(published.short_attention_factor if published else fresh.attention_scaling)
