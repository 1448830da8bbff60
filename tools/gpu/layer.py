"""A whole decoder layer of one rank on one GPU, and its share of the head: TFLOP/s, and the share of the GPU's bf16 peak.

The layer is transformers' own, with our attention in it and recomputed in the backward as the engine has it; the loss is our chunked one.
A step of the model is ``layers`` of it, then the last norm and the loss once; its speed follows from the two. Left out are what a single
GPU cannot show: exchanges, ZeRO's gathers and the optimizer.

FLOPs are the mathematics: 2 for a weight and token and 4 D for a causal pair and head, forward; twice that backward. What is computed again
(the layer's forward, scores in the kernel's backward, logits in the loss's) counts as time and not as work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lr2train.attention.hf import install
from lr2train.attention.segment import SegmentAttention
from lr2train.model.loss import LossHead
from lr2train.parallel.mesh import Mesh
from tools.gpu.one_rank import one_rank
from tools.gpu.slice import Setting, attention_flops, slice_pairs
from tools.gpu.timing import Flops, Lane, Pass, race

LAYER, KEPT, LOSS, PRODUCT = "layer, recomputed", "layer, nothing recomputed", "last norm and loss", "one matrix product"


@dataclass(frozen=True)
class Step:
    """What was measured with one strategy, and a whole model's step put together from it."""

    strategy: str
    n_tokens: int
    layers: int
    lanes: dict[str, Lane]

    @property
    def failed(self) -> bool:
        """Whether any of it did not run."""
        return any(lane.error is not None for lane in self.lanes.values())

    @property
    def seconds(self) -> float:
        """Forward and backward of all layers, the last norm and the loss; nan where one failed."""
        return self.layers * self.lanes[LAYER].median_s + self.lanes[LOSS].median_s

    @property
    def tflops_per_s(self) -> float:
        """Of a layer with its share of the loss; recomputation is time and no work."""
        return (self.layers * self.lanes[LAYER].flops.total + self.lanes[LOSS].flops.total) / self.seconds / 1e12

    @property
    def recomputed(self) -> float:
        """The share of a layer's time that goes into recomputing it."""
        return 1 - self.lanes[KEPT].over(self.lanes[LAYER])


def matmul_flops(weights: int, rows: int) -> Flops:
    """``rows`` tokens through ``weights`` parameters of linear layers: 2 each forward, 4 backward."""
    return Flops(2.0 * weights * rows, 4.0 * weights * rows)


def layer_flops(setting: Setting, strategy: str, weights: int) -> Flops:
    """A layer with ``weights`` parameters in its linear maps: those, and attention counted as forward and twice forward."""
    linear = matmul_flops(weights, setting.n_tokens // setting.sp)
    attention = attention_flops(slice_pairs(setting, strategy), setting.model.head_size).forward
    return Flops(linear.forward + attention, linear.backward + 2 * attention)


def race_layer(setting: Setting, strategy: str, chunk_tokens: int) -> Step:
    """Time a layer of ``setting``'s rank under ``strategy``, and the loss in chunks of ``chunk_tokens``.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    with one_rank(setting.rank, setting.sp) as mesh:
        lm, attention = _build(setting, strategy, mesh)
        passes = [*_layer_passes(setting, strategy, lm, attention), _loss_pass(setting, lm, chunk_tokens), _product_pass(setting)]
        lanes = race(passes, setting.device, setting.rounds, setting.warm_ups)
    return Step(strategy, setting.n_tokens, setting.model.layers, lanes)


def _build(setting: Setting, strategy: str, mesh: Mesh) -> tuple[Any, SegmentAttention]:
    """A Llama of one layer with drawn weights, and its segment's attention, as the engine makes them; the layer is recomputed."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    model = setting.model
    config = LlamaConfig(
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=1,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_size,
        vocab_size=model.vocabulary,
        max_position_embeddings=setting.n_tokens,
    )
    with setting.device:
        lm = AutoModelForCausalLM.from_config(config, dtype=setting.dtype)
    attention = install(lm, mesh, strategy)
    lm.activation_checkpointing_enable({"use_reentrant": False})
    return lm.train(), attention.segment(setting.spans, setting.n_tokens)


def _hidden(setting: Setting) -> Tensor:
    rows = setting.n_tokens // setting.sp
    return torch.randn(1, rows, setting.model.hidden, device=setting.device, dtype=setting.dtype)


def _layer_passes(setting: Setting, strategy: str, lm: Any, attention: SegmentAttention) -> Iterator[Pass]:
    """The layer as the engine has it, and with all its activations kept. Positions turn all layers alike and are made before."""
    hidden, grad = _hidden(setting).requires_grad_(), _hidden(setting)
    layer = lm.base_model.layers[0]
    positions = torch.arange(hidden.shape[1], device=setting.device)[None]
    angles = lm.base_model.rotary_emb(hidden.detach(), positions)
    flops = layer_flops(setting, strategy, sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2))
    for name, recompute in ((LAYER, True), (KEPT, False)):

        def forward(recompute: bool = recompute) -> list[Tensor]:
            layer.gradient_checkpointing = recompute
            return [layer(hidden, position_embeddings=angles, position_ids=positions, use_cache=False, segment_attention=attention)]

        yield Pass(name, forward, (hidden, *layer.parameters()), flops, [grad])


def _loss_pass(setting: Setting, lm: Any, chunk_tokens: int) -> Pass:
    """Every position has a target."""
    hidden, norm = _hidden(setting).requires_grad_(), lm.base_model.norm
    head: nn.Linear = lm.get_output_embeddings()
    loss_head = LossHead(head, chunk_tokens)
    labels = torch.randint(setting.model.vocabulary, (hidden.shape[1],), device=setting.device)
    flops = matmul_flops(head.weight.numel(), hidden.shape[1])
    return Pass(LOSS, lambda: [loss_head(norm(hidden)[0], labels)], (hidden, norm.weight, head.weight), flops)


def _product_pass(setting: Setting) -> Pass:
    """The layer's largest matrix product alone: what torch reaches on this GPU at best."""
    hidden = _hidden(setting)[0].requires_grad_()
    weight = torch.randn(setting.model.intermediate, setting.model.hidden, device=setting.device, dtype=setting.dtype, requires_grad=True)
    grad = torch.randn(len(hidden), len(weight), device=setting.device, dtype=setting.dtype)
    return Pass(PRODUCT, lambda: [F.linear(hidden, weight)], (hidden, weight), matmul_flops(weight.numel(), len(hidden)), [grad])
