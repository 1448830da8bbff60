"""The door to transformers: its models, untouched, with sequence-parallel attention over spans.

Choice: transformers' AttentionInterface. Every model written for it calls one function by the name that its config holds, with what it
computed and the keyword arguments of ``model.forward``; so ``spans`` travel as a keyword argument, which activation checkpointing captures
and replays, and each attention module carries the mesh and strategy that it runs under, so nothing is global and two models may differ. No
mask is built, because transformers builds none for a name that it does not know. Cost: what a mask or a kernel option would have expressed
must be served or refused here, aloud: a sliding window is handed to the strategy, soft-capped scores and attention sinks are refused.

Which strategy serves a segment is decided once for all its layers (``choice.py``) and anew for each segment; whoever shards the segment
asks ``layout`` first, and the layers then come to the same answer from the same numbers.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from lr2train.attention import choice
from lr2train.attention.choice import Layers, Plan
from lr2train.attention.strategies import STRATEGIES
from lr2train.attention.strategy import layout_of
from lr2train.attention.tiles import Spans, check_spans
from lr2train.config import ParallelConfig, UserError
from lr2train.parallel.layout import Layout
from lr2train.parallel.mesh import Mesh

NAME = "lr2train"

log = logging.getLogger(__name__)

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_UNSUPPORTED = {"softcap": "soft-capped attention", "s_aux": "attention sinks", "position_bias": "a position bias"}


@dataclass
class SequenceAttention:
    """What an attention module needs to serve its shard: its ranks, its strategy, and which choices were already announced."""

    mesh: Mesh
    layers: Layers
    strategy: str = "auto"
    announced: set[str] = field(default_factory=set)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, window_tokens: int | None = None) -> Tensor:
        """q [T/sp, Hq, D], k and v [T/sp, Hkv, D], spans of the whole segment -> [T/sp, Hq, D], this rank's part of the plan's layout."""
        plan = self.plan(spans, q.shape[0] * self.mesh.sp_size)
        window_tokens = choice.narrowed(window_tokens, max((stop - start for start, stop in spans), default=0))
        return STRATEGIES[plan.name(window_tokens)].attend(q, k, v, spans, scale, self.mesh, window_tokens)

    def plan(self, spans: Spans, n_tokens: int) -> Plan:
        """Which strategies serve a segment of ``n_tokens``; the same on every rank. Raises UserError when none can."""
        check_spans(spans, n_tokens)
        plan = choice.plan(self.strategy, self.layers, spans, n_tokens, self.mesh.sp_size, self.mesh.ring_size)
        if (said := f"attention strategy {plan.title}: {plan.reason}") not in self.announced:
            self.announced.add(said)
            log.info("%s", f"{said} ({plan.figures})" if plan.figures else said)
        return plan

    def layout(self, spans: Spans, n_tokens: int) -> Layout:
        """Which tokens of a segment this rank has to be handed. Raises UserError as ``plan``."""
        return layout_of(self.plan(spans, n_tokens).layout_kind, spans, n_tokens, self.mesh)


def install(model: PreTrainedModel, mesh: Mesh, strategy: str = "auto") -> SequenceAttention:
    """Make ``model`` attend over spans, sharded over ``mesh``.

    After it, on every rank of a sequence-parallel group,

        layout = install(model, mesh).layout(spans, n_tokens)
        model(input_ids=[1, T/sp], position_ids=[1, T/sp], spans=((start, stop), …), use_cache=False)

    runs on this rank's part (``layout.shard``) of one segment of T tokens; ``spans`` are the same on all ranks, None is one causal span
    over everything. Position ids must be given (transformers' own would restart on every shard). Gradients of the weights are this shard's:
    their sum over the group is the segment's. Raises UserError for a model whose attention this cannot express.
    """
    modules = [module for module in model.modules() if "Attention" in type(module).__name__]
    refuse_model(model.config)
    AttentionInterface.register(NAME, attention_forward)
    model.set_attn_implementation(NAME)
    if model.config.get_text_config()._attn_implementation != NAME or not modules:
        raise UserError(f"{type(model).__name__} does not use transformers' attention interface; choose a model (model.path) that does")
    attention = SequenceAttention(mesh, layers_of(model.config, model.dtype.itemsize), strategy)
    for module in modules:
        module.sequence_attention = attention  # type: ignore[assignment]
    return attention


def layers_of(config: Any, bytes_per_element: int = 2) -> Layers:
    """The attention layers of a transformers config."""
    config = config.get_text_config()
    n_heads = config.num_attention_heads
    windows = Counter(_windows_of(config))
    return Layers(
        n_heads,
        getattr(config, "num_key_value_heads", None) or n_heads,
        getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        tuple(windows.items()),
        bytes_per_element,
    )


def ring_ranks(config: Any, parallel: ParallelConfig, ranks_per_node: int) -> int:
    """Ranks on the ring axis of the mesh of a model with this transformers config. Raises UserError as ``choice.ring_ranks``."""
    return choice.ring_ranks(parallel.ring, parallel.sp, layers_of(config).n_heads, ranks_per_node)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    spans: Spans | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, Hq, T/sp, D], key and value [1, Hkv, T/sp, D] -> ([1, T/sp, Hq, D], no weights)."""
    attention = getattr(module, "sequence_attention", None)
    assert attention is not None, f"{type(module).__name__} was not there when attention.hf.install ran; install after the model is whole"
    assert query.shape[0] == 1, f"batch of {query.shape[0]}: one call takes one packed segment (its documents are spans of it)"
    if spans is None:
        spans = ((0, query.shape[2] * attention.mesh.sp_size),)
    _refuse_call(module, query, key, attention_mask, dropout, kwargs)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(q, k, v, spans, scale, kwargs.get("sliding_window")).unsqueeze(0), None


def refuse_config(config: Any, parallel: ParallelConfig, segment_tokens: int, longest_span: int, ranks_per_node: int) -> None:
    """Refuse a transformers config that cannot be trained under ``parallel``; needs no weights and no ranks.

    Args:
        config: of the model.
        parallel: how many ranks share a segment, and how.
        segment_tokens: of a segment.
        longest_span: tokens of the longest span to come.
        ranks_per_node: ranks of the job that one machine holds.

    Raises:
        UserError: names what the model has and what to change.
    """
    refuse_model(config)
    layers = layers_of(config)
    ring = choice.ring_ranks(parallel.ring, parallel.sp, layers.n_heads, ranks_per_node)
    choice.refuse(parallel.strategy, layers, longest_span, segment_tokens, parallel.sp, ring)
    for window_tokens, n_layers in layers.windows:
        if choice.narrowed(window_tokens, longest_span) is not None:
            log.info(
                "%d layers of %s attend to %d tokens back and no further, in spans of up to %d; set model.overrides.sliding_window=null "
                "if they may attend to everything",
                n_layers, config.model_type, window_tokens, longest_span,
            )  # fmt: skip


def refuse_model(config: Any) -> None:
    """Refuse a transformers config whose attention no strategy computes.

    Raises:
        UserError: names what the model has.
    """
    config = config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if others:
        raise UserError(
            f"{config.model_type} has layers of type {', '.join(sorted(others))}, which are not attention over whole spans; "
            "choose another model (model.path)"
        )
    value_dim, query_dim = getattr(config, "v_head_dim", None), getattr(config, "qk_head_dim", None)
    if value_dim != query_dim:
        raise UserError(
            f"{config.model_type} has value heads of {value_dim} and query heads of {query_dim} dims (latent attention), and kernels here want "
            "them alike; choose another model (model.path)"
        )
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is not None:
        raise UserError(
            f"{config.model_type} caps attention scores (attn_logit_softcapping={softcap}), which no kernel here computes; "
            "choose another model (model.path)"
        )


def _windows_of(config: Any) -> list[int | None]:
    """The sliding window of each layer, None where it has none: by the types of its layers, where the family tells them apart."""
    window_tokens = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window_tokens if one == "sliding_attention" else None for one in types]


def _refuse_call(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, options: dict[str, Any]) -> None:
    """Raise UserError for a call whose answer would not be the model's own. What it looks at is the same on all ranks."""
    if dropout > 0:
        raise UserError(f"attention_dropout={dropout} is not supported in training; set attention_dropout to 0 in the model's config")
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise UserError(f"{type(module).__name__} is not causal; choose a causal decoder (model.path)")
    if key.shape[2] != query.shape[2]:
        raise UserError(
            f"{query.shape[2]} queries over {key.shape[2]} keys: neither cross attention nor a key cache is served; pass use_cache=False"
        )
    if mask is not None:
        raise UserError("an attention mask would be ignored; tell documents apart by spans instead")
    for option, meaning in _UNSUPPORTED.items():
        if options.get(option) is not None:
            raise UserError(
                f"{type(module).__name__} wants {meaning} ({option}), which no kernel here computes; choose another model (model.path)"
            )
