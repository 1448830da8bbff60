"""One rank's decoder layer and chunked loss on one GPU: TFLOP/s, and the share of the GPU's bf16 peak.

The layer is transformers' own, with our attention, and is recomputed in the backward pass as the engine does. A
model's step is ``layers`` such layers, then the last norm and the loss. A single GPU cannot show exchanges between
ranks, ZeRO's gathers and the optimizer; they are left out.

FLOPs follow ``model.flops``: recomputation (the layer's forward pass, scores in the kernel's backward pass, logits in
the loss's) is time and no work.
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
from lr2train.model.flops import BACKWARD, attention_flops, linear_flops
from lr2train.model.loss import LossHead
from lr2train.parallel.mesh import Mesh
from tools.gpu.one_rank import one_rank
from tools.gpu.slice import SliceSetting, slice_pairs
from tools.gpu.timing import Flops, Pass, Timing, time_in_turn

LAYER, KEPT, LOSS, PRODUCT = (
    "layer, recomputed",
    "layer, nothing recomputed",
    "last norm and loss",
    "one matrix product",
)


@dataclass(frozen=True)
class LayerStep:
    """Timings of one strategy, and a model's step composed of them."""

    strategy: str
    n_tokens: int
    layers: int
    timings: dict[str, Timing]

    @property
    def failed(self) -> bool:
        """Whether any timing failed."""
        return any(timing.error is not None for timing in self.timings.values())

    @property
    def seconds(self) -> float:
        """Forward and backward pass of all layers, last norm and loss; nan where a timing failed."""
        return self.layers * self.timings[LAYER].median_s + self.timings[LOSS].median_s

    @property
    def tflops_per_s(self) -> float:
        """TFLOP/s of the step; recomputation is time and no work."""
        return (self.layers * self.timings[LAYER].flops.total + self.timings[LOSS].flops.total) / self.seconds / 1e12

    @property
    def recomputed(self) -> float:
        """Share of a layer's time spent on recomputation."""
        return 1 - self.timings[KEPT].over(self.timings[LAYER])


def matrix_flops(weights: int, rows: int) -> Flops:
    """``rows`` tokens through linear layers of ``weights`` parameters."""
    return Flops(linear_flops(weights, rows), linear_flops(weights, rows, BACKWARD))


def layer_flops(setting: SliceSetting, strategy: str, weights: int) -> Flops:
    """A layer with ``weights`` parameters in its linear layers, and attention. Nothing is counted twice."""
    linear = matrix_flops(weights, setting.n_tokens // setting.sp)
    pairs, size = slice_pairs(setting, strategy), setting.model.head_size
    return Flops(
        linear.forward + attention_flops(pairs, size), linear.backward + attention_flops(pairs, size, BACKWARD)
    )


def time_layer(setting: SliceSetting, strategy: str, chunk_tokens: int) -> LayerStep:
    """Time one layer of the rank under ``strategy``, and the loss in chunks of ``chunk_tokens``.

    Raises:
        torch.OutOfMemoryError: layer or loss do not fit into memory.
    """
    with one_rank(setting.rank, setting.sp) as mesh:
        lm, attention = _build(setting, strategy, mesh)
        passes = [
            *_layer_passes(setting, strategy, lm, attention),
            _loss_pass(setting, lm, chunk_tokens),
            _product_pass(setting),
        ]
        timings = time_in_turn(passes, setting.device, setting.rounds, setting.warm_ups)
    return LayerStep(strategy, setting.n_tokens, setting.model.layers, timings)


def _build(setting: SliceSetting, strategy: str, mesh: Mesh) -> tuple[Any, SegmentAttention]:
    """A Llama of one layer with drawn weights, and its segment's attention, as the engine makes them; the layer is
    recomputed.
    """
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


def _hidden(setting: SliceSetting) -> Tensor:
    rows = setting.n_tokens // setting.sp
    return torch.randn(1, rows, setting.model.hidden, device=setting.device, dtype=setting.dtype)


def _layer_passes(setting: SliceSetting, strategy: str, lm: Any, attention: SegmentAttention) -> Iterator[Pass]:
    """The layer as the engine has it, and with all its activations kept. Positions turn all layers alike and are made
    before.
    """
    hidden, grad = _hidden(setting).requires_grad_(), _hidden(setting)
    layer = lm.base_model.layers[0]
    positions = torch.arange(hidden.shape[1], device=setting.device)[None]
    angles = lm.base_model.rotary_emb(hidden.detach(), positions)
    flops = layer_flops(setting, strategy, sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2))
    for name, recompute in ((LAYER, True), (KEPT, False)):

        def forward(recompute: bool = recompute) -> list[Tensor]:
            layer.gradient_checkpointing = recompute
            return [
                layer(
                    hidden,
                    position_embeddings=angles,
                    position_ids=positions,
                    use_cache=False,
                    segment_attention=attention,
                )
            ]

        yield Pass(name, forward, (hidden, *layer.parameters()), flops, [grad])


def _loss_pass(setting: SliceSetting, lm: Any, chunk_tokens: int) -> Pass:
    """Last norm and loss, with a target at every position."""
    hidden, norm = _hidden(setting).requires_grad_(), lm.base_model.norm
    head: nn.Linear = lm.get_output_embeddings()
    loss_head = LossHead(head, chunk_tokens)
    labels = torch.randint(setting.model.vocabulary, (hidden.shape[1],), device=setting.device)
    flops = matrix_flops(head.weight.numel(), hidden.shape[1])
    return Pass(LOSS, lambda: [loss_head(norm(hidden)[0], labels)], (hidden, norm.weight, head.weight), flops)


def _product_pass(setting: SliceSetting) -> Pass:
    """The layer's largest matrix product alone: the upper limit of torch on this GPU."""
    hidden = _hidden(setting)[0].requires_grad_()
    weight = torch.randn(
        setting.model.intermediate, setting.model.hidden, device=setting.device, dtype=setting.dtype, requires_grad=True
    )
    grad = torch.randn(len(hidden), len(weight), device=setting.device, dtype=setting.dtype)
    return Pass(
        PRODUCT, lambda: [F.linear(hidden, weight)], (hidden, weight), matrix_flops(weight.numel(), len(hidden)), [grad]
    )
