"""Memory of one GPU in training, item by item, in bytes.

Choice: each item is a short formula, close to what our engine and DeepSpeed 0.19 allocate. A reader can check the
formula and see which config key changes it. Cost: fragmentation of the allocator is not in the formulas; a tenth of the
GPU is kept free for it.

Symbols: N parameters, W ranks, P parameters of the largest module that is gathered at once, t = T / sp tokens of a
rank, H hidden size, F intermediate size, Hq and Hk query and key heads of Dh dimensions, V vocabulary, b bytes of a
weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from lr2train.attention.choice import ring_ranks
from lr2train.config import Algorithm, Config, HardwareConfig, SearchConfig
from lr2train.planning.counts import ModelCounts

GIB = 2**30
WEIGHT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
GRADIENT_BYTES = {"bfloat16": 4, "float16": 2, "float32": 4}  # gradients accumulate in fp32 unless the model is fp16
MASTER_BYTES, MOMENT_BYTES = 4, 8  # fp32 copy of the weights; two fp32 moments of Adam
RUNTIME_BYTES = int(1.5 * GIB)  # CUDA context, NCCL channels, cuBLAS workspace: assumed, typical of an 8-GPU A100 node
RESERVE = 0.1  # share of the GPU kept free: fragmentation, buffers that no formula knows
LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters
REUSE_DISTANCE = 10**9  # DeepSpeed's stage3_max_reuse_distance, parameters
NEAR_LAYERS = 2  # layers on the GPU at one time where what they keep lies in host memory (model.host_copies)
BUCKET_PARAMETERS = 5 * 10**8  # DeepSpeed's reduce_bucket_size


@dataclass(frozen=True)
class MemoryItem:
    """One line of the memory table.

    Attributes:
        name: of the item.
        bytes: its size.
        formula: in the symbols of this module, to be read by a person.
        on_gpu: False where the item lies in host memory.
    """

    name: str
    bytes: float
    formula: str
    on_gpu: bool = True


@dataclass(frozen=True)
class MemorySetting:
    """Settings of a config that decide memory."""

    world: int
    sp: int
    ring: int  # as configured; 0 lets heads and nodes decide
    gpus_per_node: int
    zero_stage: int
    recompute: str  # as engine.recompute; auto counts as keep_attention
    recompute_layers: int | None  # layers that are recomputed, from the first on; None: all
    tile_tokens: int | None  # tokens of a tile of the MLP; None: not tiled
    offload_inputs: bool
    chunk_tokens: int
    segment_tokens: int
    dtype: str
    live_parameters: int
    reuse_distance: int
    bucket_parameters: int
    offload_optimizer: bool
    sent_bytes: int  # of a gradient on its way between ranks
    distills: bool  # a second model, frozen

    @classmethod
    def of(cls, config: Config) -> MemorySetting:
        """Settings of a config; ``engine.deepspeed`` overrides DeepSpeed's defaults."""
        zero: dict[str, Any] = config.engine.deepspeed.get("zero_optimization") or {}
        return cls(
            world=config.hardware.gpus,
            sp=config.parallel.sp,
            ring=config.parallel.ring,
            gpus_per_node=config.hardware.gpus_per_node,
            zero_stage=config.engine.zero_stage,
            recompute=str(config.engine.recompute),
            recompute_layers=config.engine.recompute_layers,
            tile_tokens=config.engine.tile_mlp or None,
            offload_inputs=config.engine.offload_inputs,
            chunk_tokens=config.engine.loss_chunk_tokens,
            segment_tokens=config.data.segment_tokens,
            dtype=config.model.dtype,
            live_parameters=int(zero.get("stage3_max_live_parameters", LIVE_PARAMETERS)),
            reuse_distance=int(zero.get("stage3_max_reuse_distance", REUSE_DISTANCE)),
            bucket_parameters=int(zero.get("reduce_bucket_size", BUCKET_PARAMETERS)),
            sent_bytes={"float32": 4, "bfloat16": 2}[config.engine.reduce_dtype],
            distills=config.optim.distill_short > 0,
            offload_optimizer=(zero.get("offload_optimizer") or {}).get("device", "none") != "none",
        )

    @property
    def sums_apart(self) -> bool:
        """ZeRO-1 in bfloat16: gradients stay in bfloat16 too, beside their fp32 sums (DeepSpeed's BF16_Optimizer)."""
        return self.zero_stage == 1 and self.dtype == "bfloat16" and not self.offload_optimizer

    @property
    def tokens(self) -> int:
        """t: tokens of a segment on one rank."""
        return self.segment_tokens // self.sp

    @property
    def keeps_attention(self) -> bool:
        """Whether recomputed layers keep attention's output."""
        return self.recompute in ("keep_attention", "auto")

    def recomputed(self, layers: int) -> int:
        """How many of the ``layers`` decoder layers are recomputed."""
        return 0 if self.recompute == "none" else min(layers, self.recompute_layers or layers)

    def ulysses(self, heads: int) -> int:
        """Ranks that exchange the ``heads`` query heads among themselves; the ring axis takes the rest of ``sp``."""
        return self.sp // ring_ranks(self.ring, self.sp, heads, self.gpus_per_node)


def shard_bytes(parameters: int, bytes_per_parameter: int, ranks: int) -> float:
    """One rank's share of a state that is divided among ``ranks`` ranks; 1 rank holds the whole state."""
    return parameters * bytes_per_parameter / ranks


def gathered_bytes(counts: ModelCounts, live_parameters: int, weight_bytes: int, reused: int = 0) -> float:
    """Weights gathered at one time under ZeRO-3: b * min(N, max(live limit + p, P, reused)).

    DeepSpeed keeps and prefetches layers up to ``stage3_max_live_parameters``, and goes beyond by one parameter of at
    most p elements. No limit holds for the ``reused`` ones (``reused_parameters``).
    """
    one = max(counts.embedding_parameters, counts.head_parameters, counts.hidden * counts.intermediate)
    return weight_bytes * min(counts.parameters, max(live_parameters + one, counts.largest_gathered_parameters, reused))


def reused_parameters(counts: ModelCounts, distance: int, recomputed: bool) -> int:
    """Parameters of the last layers, which DeepSpeed keeps from the forward to the backward pass.

    It keeps a layer where fewer than ``distance`` parameters (``stage3_max_reuse_distance``) are used until the layer
    comes again. Those are the head's, forward and backward, and those of each later layer: forward, forward again where
    layers are recomputed, and backward.
    """
    later = (3 if recomputed else 2) * counts.layer_parameters
    layers = max(0, math.ceil((distance - 2 * counts.vocabulary * counts.hidden) / later))
    return counts.parameters if layers >= counts.layers else layers * counts.layer_parameters


def saved_inputs_bytes(layers: int, hidden: int, tokens: int, weight_bytes: int) -> float:
    """Inputs of all layers, kept for recomputation: layers * t * H * b."""
    return layers * tokens * hidden * weight_bytes


def layer_saved_bytes(
    counts: ModelCounts, tokens: int, weight_bytes: int, ulysses: int, mlp_tokens: int | None = None
) -> float:
    """Activations that one layer keeps for its backward pass: t * (2 norms * (4 + 2b) H + b A) + 4 b F m.

    A norm keeps its input in fp32, the normalised input and its output. Attention keeps q, k, v and its output:
    A = (2 Hq + 2 Hk) Dh. Under Ulysses, U ranks exchange heads: the output counts twice (before and after the
    exchange), and Hk is repeated up to lcm(Hk, U). A gated MLP keeps gate, activation, up and product:
    4 F for each of ``mlp_tokens`` m tokens (None: of all).
    """
    key_heads = math.lcm(counts.key_heads, ulysses)
    attention = ((3 if ulysses > 1 else 2) * counts.heads + 2 * key_heads) * counts.head_dim
    norms = 2 * (4 + 2 * weight_bytes) * counts.hidden
    mlp = 4 * counts.intermediate * (tokens if mlp_tokens is None else min(tokens, mlp_tokens))
    return tokens * (norms + weight_bytes * attention) + weight_bytes * mlp


def recomputed_layer_bytes(counts: ModelCounts, setting: MemorySetting) -> float:
    """What computing a layer again adds: ``layer_saved_bytes`` without what is kept anyway.

    That is attention's output b Hq Dh t under ``keep_attention``; and in an fp32 model the layer's input b H t, which
    is the first norm's input itself and no copy.
    """
    b, t = WEIGHT_BYTES[setting.dtype], setting.tokens
    output = counts.heads * counts.head_dim if setting.keeps_attention else 0
    own_input = counts.hidden if setting.dtype == "float32" else 0
    saved = layer_saved_bytes(counts, t, b, setting.ulysses(counts.heads), setting.tile_tokens)
    return saved - b * t * (output + own_input)


def layer_flight_bytes(counts: ModelCounts, tokens: int, weight_bytes: int, mlp_tokens: int | None = None) -> float:
    """What a layer's backward pass adds to what the layer keeps: the larger of two moments.

    In the MLP b (2 F m + H t): the gradients of product, gate and up for each of ``mlp_tokens`` m tokens (None: of all
    t), less the product itself, which is free by then; and the gradient of the layer's output. With tiles, the gradient
    of the MLP's input b H t and ``tile_gradient_bytes`` on top. In a norm (2 b + 16) H t, four of them fp32 gradients;
    the MLP's 4 b F m are free.
    """
    b, hidden, width = weight_bytes, counts.hidden * tokens, counts.intermediate * min(tokens, mlp_tokens or tokens)
    mlp = b * (2 * width + hidden)
    if mlp_tokens is not None:
        mlp += b * hidden + tile_gradient_bytes(counts, b)
    return max(mlp, (2 * b + 16) * hidden - 4 * b * width)


def kept_attention_bytes(counts: ModelCounts, tokens: int, weight_bytes: int) -> float:
    """Attention's output and log-sum-exp of one layer, kept for recomputation: t * Hq * (Dh * b + 4)."""
    return tokens * counts.heads * (counts.head_dim * weight_bytes + 4)


def tile_gradient_bytes(counts: ModelCounts, weight_bytes: int) -> float:
    """Gradients of one MLP's weights while tiles are added: 3 H F (4 + b). fp32, and in the end the model's dtype."""
    return 3 * counts.hidden * counts.intermediate * (4 + weight_bytes)


def loss_bytes(hidden: int, vocabulary: int, chunk_tokens: int, tokens: int, weight_bytes: int) -> float:
    """Peak of the chunked cross-entropy: chunk * V * (8 + b) + 4 V H + t H (3 b + 4).

    The chunk's logits exist in fp32, as probabilities, and as their gradient in the model's dtype (fp32: on a CPU,
    where the backward pass makes the logits again, the gradient before and after its scaling). The head's gradient is
    in fp32. Beside them are the gradient of the hidden states, and what the last norm keeps: its input in fp32, the
    normalised input and its output.
    """
    chunk = min(chunk_tokens, tokens)
    return chunk * vocabulary * (8 + weight_bytes) + 4 * vocabulary * hidden + tokens * hidden * (3 * weight_bytes + 4)


def distilled_loss_bytes(counts: ModelCounts, setting: MemorySetting) -> float:
    """Peak of a distilled loss: as ``loss_bytes``, but chunk * V * (8 + b / 2) for the logits, and the original model's
    head b V H (under ZeRO-3, where it is gathered for the loss) and hidden states b t H.

    Of half a chunk, logits and probabilities of both models exist in fp32, and the gradient in the model's dtype.
    """
    weight, tokens = WEIGHT_BYTES[setting.dtype], setting.tokens
    head = counts.vocabulary * counts.hidden if setting.zero_stage == 3 else 0
    less = min(setting.chunk_tokens, tokens) * counts.vocabulary * weight / 2
    plain = loss_bytes(counts.hidden, counts.vocabulary, setting.chunk_tokens, tokens, weight)
    return plain - less + weight * (head + tokens * counts.hidden)


def bucket_bytes(bucket_parameters: int, sent_bytes: int) -> float:
    """DeepSpeed's reduction bucket under ZeRO-3: one buffer, in the dtype in which gradients are sent."""
    return float(bucket_parameters * sent_bytes)


def reduction_bytes(counts: ModelCounts, setting: MemorySetting) -> tuple[float, float]:
    """What ZeRO-1 and ZeRO-2 need to reduce gradients over the ranks: (the bucket, which stays, and its gradients
    joined, for the time of a reduction).

    The bucket has B parameters in the model's dtype. Joined, min(N, B) gradients exist in that dtype, and in the dtype
    in which they are sent, where that is another. ZeRO-1 in bfloat16 has no bucket: it reduces its sums of gradients
    where they lie. Without ZeRO the joined gradients alone. ZeRO-3 has ``bucket_bytes``.
    """
    weight, bucket = WEIGHT_BYTES[setting.dtype], setting.bucket_parameters
    if setting.zero_stage == 3 or setting.sums_apart:
        return 0.0, 0.0
    joined = min(counts.parameters, bucket) * (weight + (setting.sent_bytes if setting.sent_bytes != weight else 0))
    return float(bucket * weight if setting.zero_stage else 0), float(joined)


def search_bytes(counts: ModelCounts, tokens: int, weight_bytes: int, search: SearchConfig, ranks: int) -> float:
    """Weights and activations of the search for one document of t tokens on one GPU.

    Weights: b N; with ``search.shard`` a share of them, and gathered layers as in training. Forward pass alone:
    t * (b (2 H + 4 F) + 4 H), with ``search.chunk_tokens`` for a chunk of tokens, and keys and values of all layers.
    With a backward pass: angles, cos and sin in fp32, what the layers keep, and the gradients inside one layer. With
    ``search.chunk_tokens``, where the backward pass computes layers again: the inputs of all layers, and one whole
    layer.
    """
    b, weights = weight_bytes, float(weight_bytes * counts.parameters)
    if search.shard:
        weights = weights / ranks + gathered_bytes(counts, LIVE_PARAMETERS, b)
    if search.algorithm != Algorithm.gradient:
        chunk = min(search.chunk_tokens or tokens, tokens)
        cached = 2 * counts.layers * counts.key_heads * counts.head_dim * tokens if search.chunk_tokens else 0
        return weights + b * cached + chunk * (b * (2 * counts.hidden + 4 * counts.intermediate) + 4 * counts.hidden)
    saved = frozen_saved_bytes(counts, tokens, b)
    flight = layer_flight_bytes(counts, tokens, b) + b * counts.intermediate * tokens  # no product was kept
    always = weights + flight + 12 * counts.head_dim * tokens
    if not search.chunk_tokens:
        return always + counts.layers * saved
    return always + saved_inputs_bytes(counts.layers, counts.hidden, tokens, b) + saved


def frozen_saved_bytes(counts: ModelCounts, tokens: int, weight_bytes: int) -> float:
    """Activations that one layer of frozen weights keeps: t * (8 H + b ((4 Hq + 4 Hk) Dh + 3 F)).

    A product with a frozen weight keeps nothing. A norm keeps its input in fp32. RoPE, whose table has slopes, keeps q
    and k twice (the second time with halves exchanged). Attention keeps rotated q and k, v and its output. A gated MLP
    keeps gate, activation and up.
    """
    attention = 4 * (counts.heads + counts.key_heads) * counts.head_dim
    return tokens * (8 * counts.hidden + weight_bytes * (attention + 3 * counts.intermediate))


def checkpoint_bytes(parameters: int, weight_bytes: int) -> float:
    """One checkpoint on disk: N * (b + 12)."""
    return parameters * (weight_bytes + MASTER_BYTES + MOMENT_BYTES)


def training_items(counts: ModelCounts, setting: MemorySetting) -> list[MemoryItem]:
    """Peak memory of one GPU in training, as items."""
    return [
        *_states(counts, setting),
        *_original(counts, setting),
        *_gathered(counts, setting),
        *_activations(counts, setting),
        *_fixed(setting),
    ]


def choose_recompute(counts: ModelCounts, setting: MemorySetting, gpu_gib: float) -> tuple[str, str]:
    """What ``engine.recompute=auto`` stands for on a GPU of ``gpu_gib``: keep_attention where it fits, else layer.

    Returns:
        The value, and the reason in words.
    """
    items = training_items(counts, replace(setting, recompute="keep_attention"))
    needed, limit = gpu_bytes(items) / GIB, (1 - RESERVE) * gpu_gib
    attention = (
        setting.recomputed(counts.layers)
        * kept_attention_bytes(counts, setting.tokens, WEIGHT_BYTES[setting.dtype])
        / GIB
    )
    told = f"with attention's outputs of {attention:.2f} GiB training would take {needed:.1f} of {limit:.1f} GiB"
    return ("keep_attention" if needed <= limit else "layer"), told


def fewest_recomputed_layers(counts: ModelCounts, setting: MemorySetting, gpu_gib: float) -> int | None:
    """The fewest layers that have to be recomputed on a GPU of ``gpu_gib``; 0 for none, None where nothing fits."""
    for layers in range(counts.layers + 1):
        changed = {"recompute_layers": layers} if layers else {"recompute": "none"}
        if gpu_bytes(training_items(counts, replace(setting, **changed))) <= (1 - RESERVE) * gpu_gib * GIB:
            return layers
    return None


def with_recompute(config: Config, counts: ModelCounts) -> tuple[Config, str]:
    """The config with what engine.recompute=auto stands for, and a sentence on it."""
    told, gpu_gib = f"engine.recompute={config.engine.recompute}", config.hardware.gpu_memory_gib
    if config.engine.recompute == "auto":
        chosen, why = choose_recompute(counts, MemorySetting.of(config), gpu_gib)
        config = replace(config, engine=replace(config.engine, recompute=chosen))
        told = f"engine.recompute=auto takes {chosen}: {why}"
    setting = MemorySetting.of(config)
    fewest = fewest_recomputed_layers(counts, setting, gpu_gib)
    if fewest is not None and fewest < setting.recomputed(counts.layers):
        key = f"engine.recompute_layers={fewest}" if fewest else "engine.recompute=none"
        told += f"; {key} would fit too, and recompute less"
    return config, told


def gpu_bytes(items: Iterable[MemoryItem]) -> float:
    """The sum of the items that lie on the GPU."""
    return sum(item.bytes for item in items if item.on_gpu)


def host_gib_per_node(items: Iterable[MemoryItem], hardware: HardwareConfig) -> float:
    """Host memory of one node for the items that do not lie on the GPU, GiB."""
    of_a_rank = sum(item.bytes for item in items if not item.on_gpu) / GIB
    return of_a_rank * min(hardware.gpus, hardware.gpus_per_node)


def _states(counts: ModelCounts, s: MemorySetting) -> list[MemoryItem]:
    n, world, weight, gradient = counts.parameters, s.world, WEIGHT_BYTES[s.dtype], GRADIENT_BYTES[s.dtype]
    if s.offload_optimizer and s.zero_stage == 3:
        gradient *= 2  # the sums of a step, and what the optimizer on the host reads
    # ZeRO-1 divides optimizer states, ZeRO-2 gradients too, ZeRO-3 weights too
    per_weights, per_gradients, per_optimizer = (world if s.zero_stage >= stage else 1 for stage in (3, 2, 1))

    def formula(size: int, ranks: int) -> str:
        return f"{size} B · N / {ranks} ranks" if ranks > 1 else f"{size} B · N"

    # without ZeRO the weights themselves are in fp32
    optimizer, master = (MASTER_BYTES + MOMENT_BYTES, "fp32 weights and ") if s.zero_stage else (MOMENT_BYTES, "")
    apart = [MemoryItem("gradients, bfloat16", shard_bytes(n, weight, 1), formula(weight, 1))] if s.sums_apart else []
    return [
        MemoryItem(f"weights, {s.dtype}", shard_bytes(n, weight, per_weights), formula(weight, per_weights)),
        MemoryItem(
            "gradients",
            shard_bytes(n, gradient, per_gradients),
            formula(gradient, per_gradients),
            not s.offload_optimizer,
        ),
        MemoryItem(
            f"{master}Adam's moments",
            shard_bytes(n, optimizer, per_optimizer),
            formula(optimizer, per_optimizer),
            not s.offload_optimizer,
        ),
        *apart,
    ]


def _original(counts: ModelCounts, s: MemorySetting) -> list[MemoryItem]:
    """The frozen model of short-window distillation."""
    if not s.distills:
        return []
    weight, ranks = WEIGHT_BYTES[s.dtype], s.world if s.zero_stage == 3 else 1
    how = f"{weight} B · N / {ranks} ranks" if ranks > 1 else f"{weight} B · N"
    return [MemoryItem("the original model, frozen", shard_bytes(counts.parameters, weight, ranks), how)]


def _gathered(counts: ModelCounts, s: MemorySetting) -> list[MemoryItem]:
    if s.zero_stage < 3 or s.world == 1:  # one rank holds all weights already
        return []
    weight = WEIGHT_BYTES[s.dtype]
    reused = reused_parameters(counts, s.reuse_distance, s.recomputed(counts.layers) > 0)
    size = gathered_bytes(counts, s.live_parameters, weight, reused)
    limit = f"{s.live_parameters / 1e6:.4g}M + one parameter"
    if size > gathered_bytes(counts, s.live_parameters, weight):
        limit = f"{reused / 1e6:.4g}M that are used again soon"
    return [MemoryItem("gathered weights", size, f"{weight} B · min(N, {limit})")]


def _activations(counts: ModelCounts, s: MemorySetting) -> list[MemoryItem]:
    """What the layers keep, and the highest peak above that: inside a layer, or in the loss."""
    weight, t, recomputed = WEIGHT_BYTES[s.dtype], s.tokens, s.recomputed(counts.layers)
    saved = layer_saved_bytes(counts, t, weight, s.ulysses(counts.heads), s.tile_tokens)
    flight = layer_flight_bytes(counts, t, weight, s.tile_tokens)
    loss = loss_bytes(counts.hidden, counts.vocabulary, s.chunk_tokens, t, weight)
    if s.distills:
        loss = max(loss, distilled_loss_bytes(counts, s))
    items, whole = _kept_for_recomputation(counts, s), counts.layers - recomputed
    if whole:
        how = f"{whole} layers · {t:,} tokens · {saved / t / 1e3:.0f} kB"
        items.append(MemoryItem(f"saved activations of {whole} layers", whole * saved, how))
    peak, name, how = flight, "gradients inside one layer", "b · t · (2 F + H)"
    if not whole:  # else the layers that are kept whole are done, and free, before a layer is recomputed
        peak, name = recomputed_layer_bytes(counts, s) + flight, "one recomputed layer"
        how = "t · (norms, attention, MLP, and their gradients)"
    if s.tile_tokens:
        how += f", the MLP for {min(s.tile_tokens, t):,} tokens, (4 + {weight}) B · 3 H F summed over tiles"
    bucket, joined = reduction_bytes(counts, s)
    if s.zero_stage:  # without ZeRO all gradients are joined at the end
        # joined when a weight of the MLP has its gradient: those of gate and up are not made yet, or the rest is free
        after = 2 * weight * counts.intermediate * min(t, s.tile_tokens or t)
        peak += bucket + max(0.0, joined - after)
        how += f", and {(bucket + joined) / GIB:.2f} GiB of gradients on their way" if bucket else ""
    # In fp32 the loss is computed again in the backward pass (on a CPU), where the bucket exists.
    at_loss = loss + (bucket if s.dtype == "float32" else 0)
    if at_loss > peak:
        name, how = "the loss chunk", f"{min(s.chunk_tokens, t):,} · V logits in three forms, the head's fp32 gradient"
    if max(peak, at_loss) < bucket + joined:
        name, how = "the reduction of gradients", "4 B · min(N, bucket)"
    figures = f"max(layer {peak / GIB:.2f}, loss {at_loss / GIB:.2f}) GiB: {how}"
    return [*items, MemoryItem(f"peak: {name}", max(peak, at_loss, bucket + joined), figures)]


def _kept_for_recomputation(counts: ModelCounts, s: MemorySetting) -> list[MemoryItem]:
    weight, t, layers = WEIGHT_BYTES[s.dtype], s.tokens, s.recomputed(counts.layers)
    if not layers:
        return []
    inputs = saved_inputs_bytes(layers, counts.hidden, t, weight)
    of_layers = f"{layers} layers · {t:,} tokens"
    items = [MemoryItem("saved layer inputs", inputs, f"{of_layers} · {weight} H B", not s.offload_inputs)]
    if s.keeps_attention:
        attention = layers * kept_attention_bytes(counts, t, weight)
        how = f"{of_layers} · Hq ({weight} Dh + 4) B"
        items.append(MemoryItem("kept outputs of attention", attention, how, not s.offload_inputs))
    if s.offload_inputs:
        near = min(NEAR_LAYERS, layers)
        moving = near * sum(item.bytes for item in items) / layers
        items.append(MemoryItem("layers on their way to and from the host", moving, f"{near} layers of the above"))
    return items


def _fixed(s: MemorySetting) -> list[MemoryItem]:
    bucket = MemoryItem(
        "reduction buckets",
        bucket_bytes(s.bucket_parameters, s.sent_bytes),
        f"{s.sent_bytes} B · {s.bucket_parameters / 1e6:.3g}M (reduce_bucket_size)",
    )
    return [
        *([bucket] if s.zero_stage == 3 else []),
        MemoryItem("CUDA, NCCL, cuBLAS", RUNTIME_BYTES, "assumed"),
    ]
