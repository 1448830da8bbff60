"""Memory of one GPU in training, item by item, in bytes.

Choice: each item is a formula over a few numbers, close to what our engine and DeepSpeed 0.19 allocate, so that a reader can check it and
see which knob moves it. Cost: what an allocator loses between blocks is not in it; a tenth of the GPU is kept free for that.

Symbols: N parameters, W ranks, P parameters of the piece that is gathered, t = T / sp tokens of a rank, H hidden, F intermediate, Hq and
Hk query and key heads of Dh dimensions, V vocabulary, b bytes of a weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lr2train.attention.choice import ring_ranks
from lr2train.config import Config
from lr2train.planning.counts import ModelCounts

GIB = 2**30
WEIGHT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
GRADIENT_BYTES = {"bfloat16": 4, "float16": 2, "float32": 4}  # gradients of a step accumulate in fp32 unless the model is fp16
SENT_BYTES = {"bfloat16": 4, "float16": 2, "float32": 4}  # gradients of a bfloat16 model are reduced in fp32
MASTER_BYTES, MOMENT_BYTES = 4, 8  # fp32 copy of the weights; two fp32 moments of Adam
RUNTIME_BYTES = int(1.5 * GIB)  # CUDA context, NCCL channels, cuBLAS workspace: an assumption, typical of an A100 in an 8-GPU node
RESERVE = 0.1  # share of the GPU kept free: fragments of the allocator, buffers that we do not know
LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters
BUCKET_PARAMETERS = 5 * 10**8  # DeepSpeed's reduce_bucket_size


@dataclass(frozen=True)
class MemoryItem:
    """One line of the memory table.

    Attributes:
        name: what it is.
        bytes: how much.
        formula: how it was computed, in the symbols of this module.
        on_gpu: False: it lies in host memory.
    """

    name: str
    bytes: float
    formula: str
    on_gpu: bool = True


@dataclass(frozen=True)
class MemorySetting:
    """What of a config decides memory."""

    world: int
    sp: int
    ring: int  # as configured: 0 is chosen from the heads and the nodes
    gpus_per_node: int
    zero_stage: int
    checkpointing: bool
    chunk_tokens: int
    segment_tokens: int
    dtype: str
    live_parameters: int
    bucket_parameters: int
    offload_optimizer: bool

    @classmethod
    def of(cls, config: Config) -> MemorySetting:
        """Read it from a config, DeepSpeed's own keys included."""
        zero: dict[str, Any] = config.engine.deepspeed.get("zero_optimization", {})
        return cls(
            world=config.hardware.gpus,
            sp=config.parallel.sp,
            ring=config.parallel.ring,
            gpus_per_node=config.hardware.gpus_per_node,
            zero_stage=config.engine.zero_stage,
            checkpointing=config.engine.activation_checkpointing,
            chunk_tokens=config.engine.loss_chunk_tokens,
            segment_tokens=config.data.segment_tokens,
            dtype=config.model.dtype,
            live_parameters=int(zero.get("stage3_max_live_parameters", LIVE_PARAMETERS)),
            bucket_parameters=int(zero.get("reduce_bucket_size", BUCKET_PARAMETERS)),
            offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        )

    @property
    def tokens(self) -> int:
        """t: tokens of a segment that a rank holds."""
        return self.segment_tokens // self.sp

    def ulysses(self, heads: int) -> int:
        """Ranks of a model with ``heads`` query heads that exchange them; the ring's others do not."""
        return self.sp // ring_ranks(self.ring, self.sp, heads, self.gpus_per_node)


def shard_bytes(parameters: int, bytes_per_parameter: int, ranks: int) -> float:
    """Bytes of one rank's part of something that ``ranks`` ranks share (1: everybody holds it whole)."""
    return parameters * bytes_per_parameter / ranks


def gathered_bytes(parameters: int, largest_parameters: int, live_parameters: int, weight_bytes: int) -> float:
    """Whole weights at one time under ZeRO-3: b * min(N, max(live limit, largest piece)); DeepSpeed keeps and prefetches layers up to
    its limit.
    """
    return weight_bytes * min(parameters, max(live_parameters, largest_parameters))


def saved_inputs_bytes(layers: int, hidden: int, tokens: int, weight_bytes: int) -> float:
    """Inputs of all layers, kept for their recomputation: layers * t * H * b."""
    return layers * tokens * hidden * weight_bytes


def layer_saved_bytes(counts: ModelCounts, tokens: int, weight_bytes: int, ulysses: int) -> float:
    """What one layer keeps for its backward pass: t * (2 norms * (4 + 2b) H + b H + b A + 4 b F).

    A norm keeps its input in fp32, the normalised input and its output; the residual sum is one more H. Attention keeps q, k, v and its
    output, A = (2 Hq + 2 Hk) Dh; where U ranks exchange heads twice (before and after it) and with Hk repeated up to lcm(Hk, U).
    A gated MLP keeps gate, activation, up and product: 4 F.
    """
    key_heads = math.lcm(counts.key_heads, ulysses)
    attention = (2 * counts.heads + 2 * key_heads) * counts.head_dim * (2 if ulysses > 1 else 1)
    norms = 2 * (4 + 2 * weight_bytes) * counts.hidden
    return tokens * (norms + weight_bytes * (counts.hidden + attention + 4 * counts.intermediate))


def layer_flight_bytes(counts: ModelCounts, tokens: int, weight_bytes: int) -> float:
    """Gradients in flight in one layer's backward pass: b * t * (3 F + 2 H): product, gate and up; the gradient of the output and of its
    residual.
    """
    return weight_bytes * tokens * (3 * counts.intermediate + 2 * counts.hidden)


def loss_bytes(hidden: int, vocabulary: int, chunk_tokens: int, tokens: int, weight_bytes: int) -> float:
    """Peak of the chunked cross-entropy: chunk * V * (b + 8) + V * H * (4 + b) + b * t * H.

    The chunk's logits exist in the model's type, in fp32 and as probabilities; the head's gradient in fp32 and, at the end, in the
    model's type.
    """
    chunk = min(chunk_tokens, tokens)
    return chunk * vocabulary * (weight_bytes + 8) + vocabulary * hidden * (4 + weight_bytes) + weight_bytes * tokens * hidden


def bucket_bytes(bucket_parameters: int, weight_bytes: int, sent_bytes: int) -> float:
    """DeepSpeed's reduction buckets: one being filled and one being reduced at ``w`` bytes, and the copy that is sent at ``c`` bytes where it differs."""
    return bucket_parameters * (2.0 * weight_bytes + (sent_bytes if sent_bytes != weight_bytes else 0))


def scoring_bytes(counts: ModelCounts, tokens: int, weight_bytes: int) -> float:
    """One forward pass over a whole document on one GPU, as the search does it: b N + t * (b (2 H + 4 F) + 4 H)."""
    return weight_bytes * counts.parameters + tokens * (weight_bytes * (2 * counts.hidden + 4 * counts.intermediate) + 4 * counts.hidden)


def checkpoint_bytes(parameters: int, weight_bytes: int) -> float:
    """One checkpoint on disk: N * (b + 12)."""
    return parameters * (weight_bytes + MASTER_BYTES + MOMENT_BYTES)


def training_items(counts: ModelCounts, setting: MemorySetting) -> list[MemoryItem]:
    """Everything that training holds at its fullest moment, for one GPU."""
    return [*_states(counts, setting), *_gathered(counts, setting), *_activations(counts, setting), *_fixed(setting)]


def _states(counts: ModelCounts, s: MemorySetting) -> list[MemoryItem]:
    n, world, weight, gradient = counts.parameters, s.world, WEIGHT_BYTES[s.dtype], GRADIENT_BYTES[s.dtype]
    per_weights, per_gradients, per_optimizer = (world if s.zero_stage >= stage else 1 for stage in (3, 2, 1))

    def formula(size: int, ranks: int) -> str:
        return f"{size} B · N / {ranks} ranks" if ranks > 1 else f"{size} B · N"

    optimizer = MASTER_BYTES + MOMENT_BYTES
    return [
        MemoryItem(f"weights, {s.dtype}", shard_bytes(n, weight, per_weights), formula(weight, per_weights)),
        MemoryItem("gradients", shard_bytes(n, gradient, per_gradients), formula(gradient, per_gradients), not s.offload_optimizer),
        MemoryItem(
            "fp32 weights and Adam's moments",
            shard_bytes(n, optimizer, per_optimizer),
            formula(optimizer, per_optimizer),
            not s.offload_optimizer,
        ),
    ]


def _gathered(counts: ModelCounts, s: MemorySetting) -> list[MemoryItem]:
    weight, largest = WEIGHT_BYTES[s.dtype], counts.largest_gathered_parameters
    whole = [MemoryItem("gradients of the piece being reduced", weight * largest, f"{weight} B · {largest / 1e6:.3g}M")]
    if s.zero_stage == 3:
        size = gathered_bytes(counts.parameters, largest, s.live_parameters, weight)
        whole.insert(
            0, MemoryItem("gathered weights", size, f"{weight} B · min(N, {max(s.live_parameters, largest) / 1e6:.4g}M live parameters)")
        )
    return whole


def _activations(counts: ModelCounts, s: MemorySetting) -> list[MemoryItem]:
    weight, t = WEIGHT_BYTES[s.dtype], s.tokens
    saved = layer_saved_bytes(counts, t, weight, s.ulysses(counts.heads))
    flight = layer_flight_bytes(counts, t, weight)
    loss = loss_bytes(counts.hidden, counts.vocabulary, s.chunk_tokens, t, weight)
    if s.checkpointing:
        kept = MemoryItem(
            "saved layer inputs",
            saved_inputs_bytes(counts.layers, counts.hidden, t, weight),
            f"{counts.layers} layers · {t:,} tokens · {weight} H B",
        )
        peak, name, how = saved + flight, "one recomputed layer", "t · (norms, attention, MLP and their gradients)"
    else:
        kept = MemoryItem(
            "saved activations of all layers", counts.layers * saved, f"{counts.layers} layers · {t:,} tokens · {saved / t / 1e3:.0f} kB"
        )
        peak, name, how = flight, "gradients inside one layer", "b · t · (3 F + 2 H)"
    if loss > peak:
        name, how = "the loss chunk", f"{min(s.chunk_tokens, t):,} · V logits in three forms, the head's fp32 gradient"
    return [kept, MemoryItem(f"peak: {name}", max(peak, loss), f"max(layer {peak / GIB:.2f}, loss {loss / GIB:.2f}) GiB: {how}")]


def _fixed(s: MemorySetting) -> list[MemoryItem]:
    weight = WEIGHT_BYTES[s.dtype]
    return [
        MemoryItem(
            "reduction buckets",
            bucket_bytes(s.bucket_parameters, weight, SENT_BYTES[s.dtype]),
            f"(2 · {weight} B, sent as {SENT_BYTES[s.dtype]} B) · {s.bucket_parameters / 1e6:.3g}M (reduce_bucket_size)",
        ),
        MemoryItem("CUDA, NCCL, cuBLAS", RUNTIME_BYTES, "assumed"),
    ]
