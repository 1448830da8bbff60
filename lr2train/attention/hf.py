"""The door to transformers: its models, untouched, with sequence-parallel attention over packed documents.

Choice: transformers' AttentionInterface. Every model written for the interface calls one function, by the name in its
config, with the keyword arguments of ``model.forward``. So a ``SegmentAttention`` travels as a keyword argument, which
activation checkpointing captures and replays. Nothing is global, and two models may differ. No mask is built, because
transformers builds none for a name that it does not know. Cost: what a mask or a kernel option would have expressed
must be served or refused here. A sliding window is handed to the strategy, a soft cap to the kernel; attention sinks
are refused.

The strategy is chosen once for all layers of a segment (``choice.py``), and anew for each segment.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from lr2train.attention import choice, cuda
from lr2train.attention.blocks import CappedScale
from lr2train.attention.choice import Layers
from lr2train.attention.kernel import kernel_name
from lr2train.attention.segment import SegmentAttention
from lr2train.attention.strategy import PackedSegment
from lr2train.attention.tiles import Spans
from lr2train.config import ParallelConfig, UserError
from lr2train.parallel.mesh import Mesh

NAME = "lr2train"

log = logging.getLogger(__name__)

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_UNSUPPORTED = {"s_aux": "attention sinks", "position_bias": "a position bias"}


@dataclass
class ModelAttention:
    """Sequence-parallel attention of one model on this rank.

    Attributes:
        mesh: where this rank stands.
        layers: the model's attention layers.
        strategy: ``parallel.strategy``.
        announced: the choices that were logged; each is logged once.
    """

    mesh: Mesh
    layers: Layers
    strategy: str = "auto"
    announced: set[str] = field(default_factory=set)

    def segment(self, spans: Spans, n_tokens: int, jumps: Spans = ()) -> SegmentAttention:
        """The attention of a packed segment of ``n_tokens`` with these documents; every rank makes the same choice.

        ``jumps`` are of its positions, as in ``data.batch.Batch``.

        Raises:
            UserError: no strategy can serve the segment.
        """
        segment = PackedSegment(spans, n_tokens, self.mesh.sp_size, self.mesh.ring_size)
        chosen = choice.choose(self.strategy, self.layers, segment)
        if (said := f"attention strategy {chosen.title}: {chosen.reason}") not in self.announced:
            self.announced.add(said)
            log.info("%s", f"{said} ({chosen.figures})" if chosen.figures else said)
        return SegmentAttention(segment, chosen, self.mesh, jumps)


def install(model: PreTrainedModel, mesh: Mesh, strategy: str = "auto") -> ModelAttention:
    """Make ``model`` attend over packed documents, sharded over ``mesh``.

    After that, on every rank of a sequence-parallel group,

        attention = install(model, mesh).segment(spans, n_tokens)
        positions = attention.positions(device)[None]
        model(input_ids=[1, T/sp], position_ids=positions, segment_attention=attention, use_cache=False)

    runs on this rank's part (``attention.layout.shard``) of one segment of T tokens. Position ids must be given:
    transformers' own would restart on every shard. Gradients of the weights are of this shard: their sum over the group
    is the segment's gradient.

    Raises:
        UserError: the model's attention cannot be expressed here.
    """
    has_attention = any("Attention" in type(module).__name__ for module in model.modules())
    refuse_model(model.config)
    if any("sinks" in module._parameters for module in model.modules()):
        raise UserError(
            f"{type(model).__name__} has attention sinks, which no kernel here computes; choose another model "
            "(model.path)"
        )
    AttentionInterface.register(NAME, attention_forward)
    model.set_attn_implementation(NAME)
    _hand_on_segments(model)
    if model.config.get_text_config()._attn_implementation != NAME or not has_attention:
        name = type(model).__name__
        raise UserError(f"{name} does not use transformers' attention interface; choose a model (model.path) that does")
    return ModelAttention(mesh, layers_of(model.config, model.dtype.itemsize), strategy)


def layers_of(config: Any, bytes_per_element: int = 2) -> Layers:
    """The attention layers of a transformers config."""
    config = config.get_text_config()
    n_heads = config.num_attention_heads
    windows = Counter(_sliding_windows_of(config))
    return Layers(
        n_heads,
        getattr(config, "num_key_value_heads", None) or n_heads,
        getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        tuple(windows.items()),
        bytes_per_element,
    )


def ring_ranks(config: Any, parallel: ParallelConfig, ranks_per_node: int) -> int:
    """Ranks on the ring axis for a model with this transformers config. Raises UserError as ``choice.ring_ranks``."""
    return choice.ring_ranks(parallel.ring, parallel.sp, layers_of(config).n_heads, ranks_per_node)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segment_attention: SegmentAttention | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, Hq, T/sp, D], key and value [1, Hkv, T/sp, D] -> [1, T/sp, Hq, D].

    The second value is None, in the place of attention weights.
    """
    assert query.shape[0] == 1, f"batch of {query.shape[0]}: one call takes one packed segment"
    _refuse_call(module, query, key, attention_mask, dropout, kwargs)
    segment_attention = segment_attention or module.__dict__.get(_HELD)
    assert segment_attention is not None, f"{type(module).__name__} was called without segment_attention"
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T/sp, H, D] each
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap := kwargs.get("softcap"):
        scale = CappedScale(scale, softcap)
    return segment_attention(q, k, v, scale, kwargs.get("sliding_window")).unsqueeze(0), None


def _hand_on_segments(model: PreTrainedModel) -> None:
    """Give every attention module the segment of its decoder layer: the layers of some families (StableLM, Nemotron)
    do not hand keyword arguments on.

    By hooks of the layer; and inside activation checkpointing, which runs the layer again without its hooks.
    """
    for layer in getattr(model.base_model, "layers", ()):
        users = [module for module in layer.modules() if "Attention" in type(module).__name__]
        if _HELD not in layer.__dict__:
            layer.__dict__[_HELD] = None  # marks a layer that has its hooks
            layer.register_forward_pre_hook(partial(_hold_in_layer, users), with_kwargs=True)
            layer.register_forward_hook(partial(_let_go, users), always_call=True)


_HELD = "_lr2train_segment"


def _hold_in_layer(users: list[nn.Module], layer: nn.Module, _: Any, given: dict[str, Any]) -> None:
    own = layer.__dict__.get("_gradient_checkpointing_func")
    if own is not None and not isinstance(own, _Checkpointing):
        layer.__dict__["_gradient_checkpointing_func"] = _Checkpointing(own, users)
    _hold(users, given.get("segment_attention"))


@dataclass(frozen=True)
class _Checkpointing:
    """Activation checkpointing of a layer whose attention modules hold the segment whenever the layer is run."""

    own: Callable[..., Any]
    users: list[nn.Module]

    def __call__(self, layer_forward: Any, *inputs: Any) -> Any:
        """As ``torch.utils.checkpoint``; ``layer_forward`` is a partial with the layer's keyword arguments."""
        segment = getattr(layer_forward, "keywords", {}).get("segment_attention")

        def forward(*inputs: Any) -> Any:
            _hold(self.users, segment)
            try:
                return layer_forward(*inputs)
            finally:
                _let_go(self.users)

        return self.own(forward, *inputs)


def _hold(users: list[nn.Module], segment: SegmentAttention | None) -> None:
    for module in users:
        module.__dict__[_HELD] = segment


def _let_go(users: list[nn.Module], *_: Any) -> None:
    for module in users:
        module.__dict__.pop(_HELD, None)


def refuse_config(
    config: Any,
    parallel: ParallelConfig,
    segment_tokens: int,
    longest_span: int,
    ranks_per_node: int,
) -> None:
    """Refuse a transformers config that cannot be trained under ``parallel``. Needs no weights and no ranks.

    Args:
        config: of the model.
        parallel: how many ranks share a segment, and how.
        segment_tokens: tokens of a segment.
        longest_span: tokens of the longest document to come.
        ranks_per_node: ranks of the job that one machine holds.

    Raises:
        UserError: the model's attention cannot be expressed, or no strategy serves its segments; the text names what to
            change.
    """
    refuse_model(config)
    layers = layers_of(config)
    ring = choice.ring_ranks(parallel.ring, parallel.sp, layers.n_heads, ranks_per_node)
    choice.refuse_settings(parallel.strategy, layers, longest_span, segment_tokens, parallel.sp, ring)


def tell_windows(config: Any, longest_span: int) -> None:
    """Log the sliding windows below the longest span: a person may have meant another model."""
    for sliding_window, n_layers in layers_of(config).sliding_windows:
        if sliding_window is not None and sliding_window < longest_span:
            log.info(
                "%d layers of %s attend to %d tokens back and no further, in spans of up to %d; "
                "set model.overrides.sliding_window=null if they may attend to everything",
                n_layers, config.model_type, sliding_window, longest_span,
            )  # fmt: skip


def refuse_jumps(config: Any, reach_tokens: int) -> None:
    """Refuse jumping positions for a model with sliding windows below ``reach_tokens``.

    A layer's window counts tokens, so over a jump the layer would see distances that it never sees in use.

    Raises:
        UserError: a layer has such a window.
    """
    shortest = min((window for window, _ in layers_of(config).sliding_windows if window is not None), default=None)
    if shortest is not None and shortest < reach_tokens:
        raise UserError(
            f"layers of {config.model_type} attend to {shortest} tokens back, and under data.long_positions=skip they "
            f"would see distances up to {reach_tokens}; set data.long_positions to full"
        )


def refuse_device(config: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a model that the attention kernel of this rank's device does not compute. Needs no weights.

    Raises:
        UserError: the kernel has not this dtype, not the model's head size, or no cap of scores.
    """
    name, _ = kernel_name(device)
    if device.type != "cuda":
        return
    config, layers = config.get_text_config(), layers_of(config)
    cuda.KERNELS[name].check(torch.empty(0, layers.n_heads, layers.head_size, dtype=dtype, device="meta"))
    if dtype in cuda.WIDE:
        log.info(
            "attention in %s on CUDA is computed by its definition, for small models; bfloat16 is for large ones",
            str(dtype).removeprefix("torch."),
        )
    elif name == "torch_varlen" and getattr(config, "attn_logit_softcapping", None):
        raise UserError(
            f"{config.model_type} caps attention scores, which torch's own flash attention does not; install flash-attn"
        )


def refuse_model(config: Any) -> None:
    """Refuse a transformers config whose attention no strategy computes.

    Raises:
        UserError: the model has other layers or latent attention; the text names them.
    """
    config = config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if others:
        raise UserError(
            f"{config.model_type} has layers of type {', '.join(sorted(others))}, "
            "which are not attention over whole spans; choose another model (model.path)"
        )
    value_dim, query_dim = getattr(config, "v_head_dim", None), getattr(config, "qk_head_dim", None)
    if value_dim != query_dim:
        raise UserError(
            f"{config.model_type} has value heads of {value_dim} and query heads of {query_dim} dims "
            "(latent attention), and kernels here want them alike; choose another model (model.path)"
        )


def _sliding_windows_of(config: Any) -> list[int | None]:
    """The sliding window of each layer, None for full attention. Some families name the type of each layer."""
    sliding_window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [sliding_window if one == "sliding_attention" else None for one in types]


def _refuse_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    dropout: float,
    options: dict[str, Any],
) -> None:
    """Raise UserError for a call whose result would not be the model's own, on all ranks alike."""
    name = type(module).__name__
    if dropout > 0:
        remedy = "set attention_dropout to 0 in the model's config"
        raise UserError(f"attention_dropout={dropout} is not supported in training; {remedy}")
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise UserError(f"{name} is not causal; choose a causal decoder (model.path)")
    if key.shape[2] != query.shape[2]:
        found = f"{query.shape[2]} queries over {key.shape[2]} keys"
        raise UserError(f"{found}: neither cross attention nor a key cache is served; pass use_cache=False")
    if mask is not None:
        raise UserError("an attention mask would be ignored; tell documents apart by spans instead")
    for option, meaning in _UNSUPPORTED.items():
        if options.get(option) is not None:
            remedy = "choose another model (model.path)"
            raise UserError(f"{name} wants {meaning} ({option}), which no kernel here computes; {remedy}")
