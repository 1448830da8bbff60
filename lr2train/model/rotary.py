"""RoPE with two tables: ``WindowRotary`` takes the place of a Hugging Face model's rotary module.

Choice: a tag ("short" or "long") selects the table, never a length; rows that decode together may have a tag each.
"short" is the model's own table, bit for bit; "long" has the rescaled frequencies theta_i / lambda_i (paper, Eq. 8).
The expression and its precision are transformers' own. transformers' ``longrope`` selects by the largest position
instead: the ranks of one sequence then disagree, and position restarts of packed documents flip the table. Cost: the
caller of the model has to name the window.

The short table is read from the module that transformers builds for the base's own config, whatever its type. Where
each layer type has a RoPE (Gemma 3, OLMo 3), the tag selects the table of the global layers; sliding layers keep
theirs.

The tables are plain attributes and no buffers, so a cast of the module to bfloat16 leaves them in float32. At 128k
positions a bfloat16 frequency is noise.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
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
        attention_factor: multiplies cos and sin; a tensor where its derivative is wanted (``slopes``).
    """

    inv_freq: torch.Tensor
    attention_factor: float | torch.Tensor

    def to(self, device: torch.device) -> RopeTable:
        """The table on a device."""
        return self._replace(inv_freq=self.inv_freq.to(device))


class RotaryForm(NamedTuple):
    """How a model wants cos and sin.

    Attributes:
        keeps_fp32: they stay in fp32, whatever x's dtype (OLMo).
        layout: of the D angles in the last dimension. "halves": all, then all again; "pairs": each one twice (Cohere);
            "once": D numbers.
    """

    keeps_fp32: bool = False
    layout: str = "halves"


class WindowRotary(nn.Module):
    """cos and sin of ``position * inv_freq``, times the attention factor, for the selected window (paper, Eq. 5 and 8).

    Attributes:
        window: "short" | "long", the table of the next forward pass; or one for each row of the batch.
        tables: window -> table.
        fixed: layer type -> table, for layers that are the same in both windows.
        form: of cos and sin.
    """

    def __init__(
        self,
        short: RopeTable,
        factors: Factors,
        form: RotaryForm,
        fixed: Mapping[str, RopeTable] | None = None,
    ):
        super().__init__()
        self.form = form
        self.tables, self.fixed = {"short": short}, dict(fixed or {})
        self.use(factors)
        self.window: Any = "short"

    def use(self, factors: Factors) -> None:
        """Replace the long table by the table of other factors; the short table stays the model's own."""
        self.tables["long"] = long_table(factors)

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each [B, T, rotary_dim] in x's dtype, for position_ids [B, T]; angles are computed in fp32.

        ``layer_type`` is given by models with a RoPE for each layer type.
        """
        inv_freq, attention_factor = self._selected(layer_type, x.device)
        angles = laid_out(position_ids[..., None].float() * inv_freq, self.form.layout)
        dtype = torch.float32 if self.form.keeps_fp32 else x.dtype
        return (angles.cos() * attention_factor).to(dtype), (angles.sin() * attention_factor).to(dtype)

    def _selected(self, layer_type: str | None, device: torch.device) -> tuple[torch.Tensor, float | torch.Tensor]:
        """inv_freq and attention factor of a layer; where each row has a window, [B, 1, D] and [B, 1, 1]."""
        if layer_type in self.fixed:
            return _on(self.fixed, layer_type, device)
        if isinstance(self.window, str):
            return _on(self.tables, self.window, device)
        tables = [_on(self.tables, window, device) for window in self.window]
        factors = torch.tensor([table.attention_factor for table in tables], dtype=torch.float32, device=device)
        return torch.stack([table.inv_freq for table in tables])[:, None], factors[:, None, None]


def _on(tables: dict[str, RopeTable], name: str, device: torch.device) -> RopeTable:
    """The table of a name; it is moved to the device once."""
    if tables[name].inv_freq.device != device:
        tables[name] = tables[name].to(device)
    return tables[name]


def laid_out(half: torch.Tensor, layout: str) -> torch.Tensor:
    """The D angles [B, T, D] in a model's layout."""
    if layout == "halves":  # dimensions i and i + D of a head turn together
        return torch.cat((half, half), dim=-1)
    return torch.repeat_interleave(half, 2, dim=-1) if layout == "pairs" else half


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
    own = _Own.of(model)
    if len(own.short.inv_freq) != len(factors.rescale):
        raise UserError(
            f"the factors have {len(factors.rescale)} entries, the model rotates {len(own.short.inv_freq)} pairs; "
            "set rope.factors to factors of this model"
        )
    model.base_model.rotary_emb = WindowRotary(own.short, factors, own.form, own.fixed)
    return model.base_model.rotary_emb


def form_of(model: Any) -> RotaryForm:
    """How the model's own rotary module returns cos and sin.

    Args:
        model: a Hugging Face causal LM on any device, the meta device too, with its own rotary module.

    Raises:
        UserError: as ``install``.
    """
    return _Own.of(model).form


def short_table(model: Any) -> RopeTable:
    """The model's own table up to L0, of its global layers; as transformers computes it. Arguments as ``form_of``."""
    return _Own.of(model).short


class _Own(NamedTuple):
    """What the model's own rotary module says."""

    short: RopeTable
    fixed: dict[str, RopeTable]
    form: RotaryForm

    @classmethod
    def of(cls, model: Any) -> _Own:
        """Of a Hugging Face causal LM on any device, the meta device too.

        Raises:
            UserError: the model has no standard ``rotary_emb``, or it computes something else.
        """
        name, module = type(model).__name__, getattr(model.base_model, "rotary_emb", None)
        nested = hasattr(module, f"{rope_hf.GLOBAL}_attention_scaling")
        # attention_scaling marks transformers' standard module; GPT-J and others rotate in a way of their own.
        if module is None or not (nested or hasattr(module, "attention_scaling")):
            raise UserError(
                f"{name} has no standard rotary_emb on its base model; set model.path to a RoPE model of the standard "
                "interface"
            )
        config = model.config.get_text_config()
        fresh, layer_type = _fresh(type(module), config), rope_hf.GLOBAL if nested else None
        short = _table(fresh, layer_type)
        published, alike = rope_hf.factors_of(values := config.to_dict()), short
        if published and rope_hf.own_config(values) is values:
            # transformers has one attention factor for both windows, but for PhiMoE; ``short_mscale`` names the short
            # window's own
            short = short._replace(attention_factor=float(published.short_attention_factor))
        form = _form(fresh, (alike, short), layer_type, name)
        others = [one for one in fresh.layer_types if one != layer_type] if nested else []
        return cls(short, {one: _table(fresh, one) for one in others}, form)


def _prefix(layer_type: str | None) -> str:
    """Of the names in a rotary module with tables by layer type."""
    return "" if layer_type is None else f"{layer_type}_"


def _table(fresh: Any, layer_type: str | None) -> RopeTable:
    """inv_freq [D] and attention factor of a module as it was built: ``longrope`` starts with its short table, and
    ``dynamic`` with plain RoPE.
    """
    prefix = _prefix(layer_type)
    return RopeTable(getattr(fresh, f"{prefix}inv_freq"), float(getattr(fresh, f"{prefix}attention_scaling")))


def _fresh(kind: type[nn.Module], config: Any) -> Any:
    """The module of the short window, built anew in fp32 on the CPU: the model's may have been built in another dtype
    or divided over ranks.
    """
    default_dtype = torch.get_default_dtype()  # model code may compute its table in this dtype
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            make: Any = kind
            return make(_short_config(config))
    finally:
        torch.set_default_dtype(default_dtype)


def _short_config(config: Any) -> Any:
    """A copy of the config; of a config of ours, the base's own RoPE keys."""
    values = config.to_dict()
    if rope_hf.own_config(values) is values:
        return copy.deepcopy(config)
    return type(config).from_dict(rope_hf.own_config(values))


@torch.no_grad()
def _form(fresh: Any, tables: Sequence[RopeTable], layer_type: str | None, name: str) -> RotaryForm:
    """Run the module once and recognise what comes out: one of these tables, which differ in their attention factor.

    Raises:
        UserError: the module computes something else than cos and sin of ``position * inv_freq``.
    """
    named = {} if layer_type is None else {"layer_type": layer_type}
    positions = torch.tensor([[0, 3]])
    found = fresh(torch.zeros(1, 2, 1, dtype=torch.float32), positions, **named)[0]
    for layout, table in itertools.product(("halves", "pairs", "once"), tables):
        wanted = laid_out(positions[..., None].float() * table.inv_freq, layout).cos() * table.attention_factor
        if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-6, atol=1e-6):
            keeps = fresh(torch.zeros(1, 2, 1, dtype=torch.bfloat16), positions, **named)[0].dtype == torch.float32
            return RotaryForm(keeps, layout)
    raise UserError(
        f"{name} computes its RoPE in a way that is not known here ({type(fresh).__name__}); set "
        "model.path to a model with the standard RoPE"
    )
