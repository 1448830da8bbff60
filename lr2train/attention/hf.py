"""The door to transformers: its models, untouched, with sequence-parallel attention over spans.

Choice: transformers' AttentionInterface. Every model written for it calls one function by the name that its config holds, with what it
computed and the keyword arguments of ``model.forward``; so ``spans`` travel as a keyword argument, which activation checkpointing captures
and replays, and each attention module carries the mesh and strategy that it runs under, so nothing is global and two models may differ. No
mask is built, because transformers builds none for a name that it does not know. Cost: what a mask or a kernel option would have expressed
must be refused here, aloud.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from lr2train.attention.kernel import Spans
from lr2train.attention.local import crosses_shards, local
from lr2train.attention.ulysses import refuse_heads, ulysses
from lr2train.config import UserError
from lr2train.parallel.mesh import Mesh

NAME = "lr2train"
STRATEGIES = {"local": local, "ulysses": ulysses}

log = logging.getLogger(__name__)

_LAYER_TYPES = {"full_attention", "sliding_attention"}  # sliding is refused at the call, where its window is too short
_UNSUPPORTED = {"softcap": "soft-capped attention", "s_aux": "attention sinks", "position_bias": "a position bias"}


@dataclass
class SequenceAttention:
    """What an attention module needs to serve its shard: its ranks, its strategy, and which choices were already announced."""

    mesh: Mesh
    strategy: str = "auto"
    announced: set[str] = field(default_factory=set)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> Tensor:
        """q [T/sp, Hq, D], k and v [T/sp, Hkv, D], spans of the whole segment -> [T/sp, Hq, D]."""
        name, reason = choose(self.strategy, spans, q.shape[0], self.mesh)
        if reason not in self.announced:
            self.announced.add(reason)
            log.info("attention strategy %s: %s", name, reason)
        return STRATEGIES[name](q, k, v, spans, scale, self.mesh)


def install(model: PreTrainedModel, mesh: Mesh, strategy: str = "auto") -> None:
    """Make ``model`` attend over spans, sharded over ``mesh``.

    After it, on every rank of a sequence-parallel group,

        model(input_ids=[1, T/sp], position_ids=[1, T/sp], spans=((start, stop), …), use_cache=False)

    runs on contiguous shards of one segment of T tokens; ``spans`` are the same on all ranks, None is one causal span over everything.
    Position ids must be given (transformers' own would restart on every shard). Gradients of the weights are this shard's: their sum over
    the group is the segment's. Raises UserError for a model whose attention this cannot express, and for heads that ``mesh`` cannot share.
    """
    modules = [module for module in model.modules() if "Attention" in type(module).__name__]
    refuse_config(model.config, mesh.sp_size, strategy)
    AttentionInterface.register(NAME, attention_forward)
    model.set_attn_implementation(NAME)
    if model.config.get_text_config()._attn_implementation != NAME or not modules:
        raise UserError(f"{type(model).__name__} does not use transformers' attention interface; choose a model (model.path) that does")
    attention = SequenceAttention(mesh, strategy)
    for module in modules:
        module.sequence_attention = attention  # type: ignore[assignment]


def choose(strategy: str, spans: Spans, shard_tokens: int, mesh: Mesh) -> tuple[str, str]:
    """(name, reason) of the strategy that serves these spans in shards of ``shard_tokens``: ``strategy`` itself unless that is auto."""
    if strategy != "auto":
        return strategy, f"parallel.strategy={strategy}"
    if mesh.sp_size == 1:
        return "local", "parallel.sp=1"
    if crosses_shards(spans, shard_tokens) is None:
        return "local", "every span lies inside one shard: nothing is sent"
    return "ulysses", f"spans cross shard borders: heads are exchanged among {mesh.sp_size} ranks"


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
    _refuse_call(module, query, key, attention_mask, dropout, spans, kwargs)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(q, k, v, spans, scale).unsqueeze(0), None


def refuse_config(config: Any, sp_size: int, strategy: str, longest_span: int = 0) -> None:
    """Refuse a transformers config whose attention this cannot express; needs no weights.

    Args:
        config: of the model.
        sp_size: ranks that share a segment.
        strategy: auto | ulysses | local.
        longest_span: tokens of the longest span to come; a sliding window shorter than it is refused. 0: each call looks for itself.

    Raises:
        UserError: names what the model has and what to change.
    """
    config = config.get_text_config()
    if getattr(config, "use_sliding_window", True):
        _refuse_sliding_window(getattr(config, "sliding_window", None), ((0, longest_span),))
    if strategy not in ("auto", *STRATEGIES):
        raise UserError(f"parallel.strategy={strategy} is unknown; set parallel.strategy to one of {['auto', *STRATEGIES]}")
    if strategy != "local":
        refuse_heads(config.num_attention_heads, sp_size)
    others = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if others:
        raise UserError(
            f"{config.model_type} has layers of type {', '.join(sorted(others))}, which are not attention over whole spans; "
            "choose another model (model.path)"
        )
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is not None:
        raise UserError(
            f"{config.model_type} caps attention scores (attn_logit_softcapping={softcap}), which no kernel here computes; "
            "choose another model (model.path)"
        )


def _refuse_call(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, spans: Spans, options: dict[str, Any]
) -> None:
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
    _refuse_sliding_window(options.get("sliding_window"), spans)


def _refuse_sliding_window(window_tokens: int | None, spans: Spans) -> None:
    longest = max((stop - start for start, stop in spans), default=0)
    if window_tokens is not None and window_tokens < longest:
        raise UserError(
            f"sliding_window={window_tokens} of the model is shorter than a span of {longest} tokens, which would be attended to whole; "
            "set model.overrides.sliding_window=null if the model may attend to everything"
        )
