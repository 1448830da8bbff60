"""One rank's decoder layer and chunked loss on one GPU: TFLOP/s, and the share of the GPU's bf16 peak.

The layer is transformers' own, with our attention, and is recomputed in the backward pass as the engine does. A
model's step is ``layers`` such layers, then the last norm and the loss. A single GPU cannot show exchanges between
ranks, ZeRO's gathers and the optimizer; they are left out.

FLOPs follow ``model.flops``: recomputation (the layer's forward pass, scores in the kernel's backward pass, logits in
the loss's) is time and no work.

A layer's time is held against a count (``Counted``). The rates of the count are measured in the same run: the largest
matrix product, the plain kernel over the same pairs, and a product of two tensors in memory. With the layer recomputed,

    counted = 4 F_linear / r_product + (2 t_forward + t_backward) of the plain kernel + 4 B / r_memory

F_linear: FLOPs of the linear layers, forward (they run forward twice and backward, which is twice a forward). B: bytes
that norms, residuals, RoPE and SwiGLU move forward, as transformers computes them. So a GPU that reaches less than its
data sheet fails no check, and overhead of ours does. A share of the peak of 55 % would ask more: 245 of an A100's 312
TFLOP/s from every kernel at 128k, as attention is 70 % of the work and is computed 4.5 times where 3 count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lr2train.attention.hf import install
from lr2train.attention.kernel import kernel_name
from lr2train.attention.segment import SegmentAttention
from lr2train.model.flops import BACKWARD, attention_flops, linear_flops
from lr2train.model.loss import LossHead
from lr2train.parallel.mesh import Mesh
from tools.gpu.one_rank import one_rank
from tools.gpu.slice import SliceSetting, plain_pass, slice_pairs
from tools.gpu.timing import Flops, Pass, Timing, time_in_turn

LAYER, KEPT, LOSS, PRODUCT, ATTENTION, MEMORY = (
    "layer, recomputed",
    "layer, nothing recomputed",
    "last norm and loss",
    "one matrix product",
    "plain attention of the layer",
    "one product in memory (TB/s)",
)


@dataclass(frozen=True)
class Counted:
    """Seconds that a layer takes by count; see the module's docstring."""

    linear_s: float
    attention_s: float
    memory_s: float

    @property
    def total_s(self) -> float:
        """All three."""
        return self.linear_s + self.attention_s + self.memory_s

    def described(self) -> str:
        """The derivation, for the output."""
        parts = ("linear layers", self.linear_s), ("attention", self.attention_s), ("norms and the like", self.memory_s)
        return (
            " + ".join(f"{name} {1e3 * seconds:.4g} ms" for name, seconds in parts) + f" = {1e3 * self.total_s:.4g} ms"
        )


def moved_bytes(setting: SliceSetting) -> float:
    """B: a norm reads and writes its H numbers in fp32 seven times and in the dtype four times; a residual moves three
    numbers; RoPE nine for each number of q and k; SwiGLU five for each of its F.
    """
    model, b = setting.model, setting.dtype.itemsize
    rows = setting.n_tokens // setting.sp
    rotated = (model.heads + model.kv_heads) * model.head_size
    norms, residuals = 2 * (28 + 4 * b) * model.hidden, 2 * 3 * b * model.hidden
    return rows * (norms + residuals + 9 * b * rotated + 5 * b * model.intermediate)


@dataclass(frozen=True)
class LayerStep:
    """Timings of one strategy, and a model's step composed of them."""

    strategy: str
    n_tokens: int
    layers: int
    timings: dict[str, Timing]
    linear_flops: float  # of the layer's linear layers, forward
    moved_bytes: float  # B

    @property
    def counted(self) -> Counted:
        """The layer's time by count; nan where a timing failed."""
        product, attention, memory = (self.timings[name] for name in (PRODUCT, ATTENTION, MEMORY))
        return Counted(
            4 * self.linear_flops * product.median_s / product.flops.total,
            attention.with_forwards(2.0),
            4 * self.moved_bytes * memory.median_s / memory.flops.total,
        )

    @property
    def over_counted(self) -> float:
        """The layer's time over the count."""
        return self.timings[LAYER].median_s / self.counted.total_s

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
            replace(plain_pass(setting, strategy, kernel_name(setting.device)[0]), name=ATTENTION),
            _memory_pass(setting),
        ]
        timings = time_in_turn(passes, setting.device, setting.rounds, setting.warm_ups)
    linear = linear_flops(_linear_weights(lm), setting.n_tokens // setting.sp)
    return LayerStep(strategy, setting.n_tokens, setting.model.layers, timings, linear, moved_bytes(setting))


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
    flops = layer_flops(setting, strategy, _linear_weights(lm))
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


def _linear_weights(lm: Any) -> int:
    return sum(weight.numel() for weight in lm.base_model.layers[0].parameters() if weight.dim() == 2)


def _memory_pass(setting: SliceSetting) -> Pass:
    """x * 2 over the layer's widest activation; its FLOPs are bytes here."""
    rows = setting.n_tokens // setting.sp
    x = torch.randn(rows, setting.model.intermediate, device=setting.device, dtype=setting.dtype, requires_grad=True)
    moved = 2.0 * x.numel() * x.element_size()
    return Pass(MEMORY, lambda: [x * 2], (x,), Flops(moved, moved), [torch.ones_like(x)])


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
