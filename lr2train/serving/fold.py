"""The attention factor as part of the weights: rotated rows of W_q and W_k times the factor, and rotary factor 1.

The factor ``a`` multiplies cos and sin of q and of k. So a table that is fixed for all positions gives the same logits
with factor 1, where the rotated rows of W_q and W_k and their biases are multiplied by ``a``. Where a norm follows the
projection (Qwen3, OLMo2), the norm would undo that, so the norm's weights take the factor; Gemma's norms multiply by 1
+ weight, and the sum takes the factor. Rows that partial rotary leaves alone are left alone. So are sliding layers with
a RoPE of their own, which has no factor of ours.

Choice: the rows follow from the names and shapes of the model's attention modules. Then one module of each kind is run
with random weights, unfolded and folded; a family of another structure is refused and never folded wrongly. A layer
that does not rotate (NoPE) shows in the same run, and is not folded. Cost: one attention module in fp32 in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from lr2train.config import UserError
from lr2train.model import config_json
from lr2train.rope import hf as rope_hf

_Q_NORMS = ("q_norm", "q_layernorm", "query_layernorm")
_K_NORMS = ("k_norm", "k_layernorm", "key_layernorm")
_FUSED = ("qkv_proj", "query_key_value")
_PROBED_FACTOR = 1.5  # far from 1: a row that is folded wrongly shows
_PROBED_TOKENS = 5
_TOLERANCE = 1e-4  # relative, fp32; a wrong row is off by more than a hundred times this


class Rows(NamedTuple):
    """What of a parameter takes the attention factor.

    Attributes:
        mask: bool, of a shape that broadcasts to the parameter.
        offset: the model multiplies by ``offset + parameter``.
    """

    mask: torch.Tensor
    offset: float = 0.0


def rotated_rows(twin: Any, rotary_dim: int) -> dict[str, Rows]:
    """The rows that take the attention factor, by parameter name.

    Args:
        twin: the model, on the meta device.
        rotary_dim: how many dimensions of a head are rotated; the first ones.

    Raises:
        UserError: the model's attention is of a structure that cannot be folded exactly.
    """
    rows: dict[str, Rows] = {}
    probed: dict[Any, bool] = {}
    for prefix, module in twin.named_modules():
        if not any(isinstance(getattr(module, name, None), nn.Linear) for name in ("q_proj", *_FUSED)):
            continue
        if not _is_global(module, twin):
            continue
        found = _rows_of(module, twin, rotary_dim)
        if (kind := _kind(module)) not in probed:
            probed[kind] = _rotates(module, found, rotary_dim, twin)
        if probed[kind]:
            rows |= {f"{prefix}.{name}": mask for name, mask in found.items()}
    if not rows:
        raise _no_fold(twin, "has no attention with q_proj, qkv_proj or query_key_value")
    return rows


def folded(tensor: torch.Tensor, rows: Rows, factor: float) -> torch.Tensor:
    """The tensor with ``factor`` times these rows, in fp32 (an fp64 tensor: in fp64); nothing is rounded yet."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    scaled = (wide + rows.offset) * factor - rows.offset if rows.offset else wide * factor
    return torch.where(rows.mask, scaled, wide)


def _is_global(module: Any, twin: Any) -> bool:
    """Whether an attention module rotates by the table of the global layers."""
    if not hasattr(getattr(twin.base_model, "rotary_emb", None), f"{rope_hf.GLOBAL}_attention_scaling"):
        return True  # one RoPE for all layers
    return twin.config.get_text_config().layer_types[module.layer_idx] == rope_hf.GLOBAL


def _kind(module: nn.Module) -> Any:
    """What distinguishes attention modules of one model: their class, and every plain setting but their number."""
    plain = (bool, int, float, str, type(None))
    settings = {name: value for name, value in vars(module).items() if isinstance(value, plain) and name != "layer_idx"}
    return type(module), tuple(sorted(settings.items(), key=lambda item: item[0]))


def _rows_of(module: Any, model: Any, rotary_dim: int) -> dict[str, Rows]:
    """The rotated rows of one attention module, by the parameter's name inside the module."""
    config = model.config.get_text_config()
    n_heads = config.num_attention_heads
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    head_dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None) or config.hidden_size // n_heads
    rotated = torch.arange(head_dim) < rotary_dim
    if hasattr(module, "query_key_value"):  # head by head q, k, v, as GPT-NeoX has them
        return _of_linear(
            "query_key_value", module, torch.cat([rotated, rotated, rotated & False]).repeat(n_heads), model
        )
    if hasattr(module, "qkv_proj"):  # all q, all k, all v, as Phi-3 has them
        q_k, v = rotated.repeat(n_heads + n_kv_heads), (rotated & False).repeat(n_kv_heads)
        return _of_linear("qkv_proj", module, torch.cat([q_k, v]), model)
    sides = (("q_proj", _Q_NORMS, n_heads), ("k_proj", _K_NORMS, n_kv_heads))
    rows: dict[str, Rows] = {}
    for projection, norms, heads in sides:
        norm = next((name for name in norms if isinstance(getattr(module, name, None), nn.Module)), None)
        if norm is None or not list(getattr(module, norm).parameters()):
            rows |= _of_linear(projection, module, rotated.repeat(heads), model)
        else:
            rows |= _of_norm(norm, module, rotated, model)
    return rows


def _of_linear(name: str, module: Any, rows: torch.Tensor, model: Any) -> dict[str, Rows]:
    linear = getattr(module, name, None)
    if not isinstance(linear, nn.Linear) or linear.out_features != len(rows):
        raise _no_fold(model, f"has a {name} that does not hold {len(rows)} rows, one for each dimension of each head")
    bias = {} if linear.bias is None else {f"{name}.bias": Rows(rows)}
    return {f"{name}.weight": Rows(rows[:, None]), **bias}


def _of_norm(name: str, module: Any, rotated: torch.Tensor, model: Any) -> dict[str, Rows]:
    """A norm over one head, over a whole projection, or one norm for each head."""
    rows = {}
    for inner, parameter in getattr(module, name).named_parameters():
        if parameter.numel() % len(rotated):
            raise _no_fold(
                model, f"has a {name} of {parameter.numel()} numbers, no multiple of a head's {len(rotated)}"
            )
        mask = rotated.repeat(parameter.numel() // len(rotated)).view(parameter.shape)
        rows[f"{name}.{inner}"] = Rows(mask, _offset(getattr(module, name), parameter.numel()))
    return rows


@torch.no_grad()
def _offset(norm: nn.Module, width: int) -> float:
    """1 for a norm that multiplies by 1 + weight: its output is not 0 where its parameters are."""
    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    for parameter in probe.parameters():
        parameter.zero_()
    try:
        return float(bool(probe(torch.arange(1.0, width + 1.0)[None]).any()))
    except (TypeError, RuntimeError):  # norms of another shape, one for each head
        return 0.0


@torch.no_grad()
def _rotates(module: nn.Module, rows: Mapping[str, Rows], rotary_dim: int, model: Any) -> bool:
    """Run the module with random weights; False where rotation changes nothing.

    Raises:
        UserError: the folded module computes something else than the unfolded one under a scaled rotation.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe: Any = copy.deepcopy(module).to_empty(device="cpu").float().eval()
        for parameter in probe.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0)
        x = torch.randn(1, _PROBED_TOKENS, model.config.get_text_config().hidden_size)
        half = torch.rand(1, _PROBED_TOKENS, rotary_dim // 2) * 6
    angles = torch.cat((half, half), -1)

    def attend(factor: float) -> torch.Tensor:
        turned = (angles.cos() * factor, angles.sin() * factor)
        return probe(hidden_states=x, position_embeddings=turned, attention_mask=None)[0]

    try:
        plain, scaled = attend(1.0), attend(_PROBED_FACTOR)
        own = dict(probe.named_parameters())
        for name, which in rows.items():
            own[name].copy_(folded(own[name], which, _PROBED_FACTOR))
        error = (attend(1.0) - scaled).abs().max() / scaled.abs().max()
    except (TypeError, AttributeError, ValueError, RuntimeError, IndexError, KeyError) as failure:
        raise _no_fold(model, f"has an attention that cannot be run alone ({config_json.brief(failure)})") from failure
    if torch.equal(plain, scaled):
        return False
    if not error < _TOLERANCE:
        raise _no_fold(model, f"computes other numbers with the factor in its weights (relative error {error:.1e})")
    return True


def _no_fold(model: Any, why: str) -> UserError:
    return UserError(
        f"the attention factor cannot be put into the weights, because {type(model).__name__} {why}; set "
        "export.runtime=transformers to export without the folder long/"
    )
