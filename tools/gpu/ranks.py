"""Real ranks, one for each GPU: strategies, one optimizer step, and its memory beside the estimate.

    torchrun --nproc-per-node 8 -m tools.gpu.check --only ranks

  strategies  ulysses, ring, gather, ulysses_ring and local, forward and backward, beside attention written out in
              float64. Segments: one long document, documents inside and across sequence shards, a sliding window.
              float32 within 1e-5 of the largest value; bfloat16 within the limits of ``parity``.
  step        One optimizer step of the engine under ZeRO-3 (a long and a packed short segment, sp = all ranks and half
              of them): loss and gradient norm beside transformers in float64, document by document.
  memory      The peak of a step in bfloat16 beside ``planning.memory``, on CUDA alone.

Every figure is the worst of all ranks, so all ranks end with the same exit status. The same code runs on gloo and CPUs
with small sizes; tests do that. Cost: a wrong rank is not named here; its own error is in its output.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lr2train.attention.strategies import STRATEGIES
from lr2train.attention.strategy import PackedSegment, SegmentWork
from lr2train.attention.tiles import Spans
from lr2train.config import Config, EngineConfig, HardwareConfig, ModelConfig, OptimConfig, ParallelConfig, UserError
from lr2train.data.batch import IGNORE, Batch
from lr2train.model import load
from lr2train.parallel.mesh import Mesh, make_mesh
from lr2train.planning import memory
from lr2train.planning.counts import counts_of
from lr2train.rope.methods import METHODS
from lr2train.rope.spectrum import Spectrum
from lr2train.training.deepspeed.engine import Engine
from lr2train.training.deepspeed.start import start_deepspeed
from tools.bench.figures import Figure
from tools.gpu.parity import LIMITS, ParityCase, draw, error_ratio, written_out
from tools.gpu.simulation import LayerInputs

FLOAT32_LIMIT = 1e-5  # some hundred roundings
LOSS_LIMIT, NORM_LIMIT = 1e-5, 1e-4
MEMORY_OVER_PLAN = 1.10

TINY = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}  # fmt: skip
LARGER = TINY | {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip
RELEASE_ALL = {"stage3_param_persistence_threshold": 0}  # every parameter is gathered and released


def check_ranks(device: torch.device) -> list[Figure]:
    """All checks of this module. A collective: every rank of the open process group calls it."""
    start_deepspeed(device)
    return [*_strategies(device), *_steps(device), *_memory(device)]


def _worst(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of all ranks; nan where any rank has nan."""
    found = torch.tensor([math.inf if math.isnan(value) else value for value in values], device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [math.nan if math.isinf(value) else value for value in found.tolist()]


# ---- strategies ----


class _Case(NamedTuple):
    name: str
    spans: Spans
    sliding_window: int | None = None


def _strategies(device: torch.device) -> Iterator[Figure]:
    world = dist.get_world_size()
    n_tokens = world * (256 if device.type == "cuda" else 16)
    meshes = {name: make_mesh(world) for name in ("local", "ulysses", "ring", "gather")}
    if world % 2 == 0 and world > 2:
        meshes["ulysses_ring"] = make_mesh(world, ring=2)
    for (name, mesh), dtype in itertools.product(meshes.items(), (torch.float32, torch.bfloat16)):
        errors = [
            _strategy_errors(name, mesh, case, dtype, n_tokens, device)
            for case in _cases(n_tokens, world)
            if _serves(name, mesh, case, n_tokens)
        ]
        ratio, relative = (max(column) for column in zip(*errors, strict=True))
        ratio, relative = _worst([ratio, relative], device)
        title = f"ranks_{name}_{str(dtype).removeprefix('torch.')}"
        yield Figure(f"{title}_error_over_limit", ratio, at_most=1.0)
        if dtype == torch.float32:
            yield Figure(f"{title}_error", relative, at_most=FLOAT32_LIMIT)


def _cases(n_tokens: int, world: int) -> Iterator[_Case]:
    shard = n_tokens // max(2, world)
    yield _Case("long", ((0, n_tokens),))
    yield _Case("short packed", tuple((start, start + shard // 2) for start in range(0, n_tokens, shard // 2)))
    borders = [0, 1, shard - 3, shard + shard // 2 + 1, n_tokens - 2]
    crossing = tuple(itertools.pairwise(borders))
    yield _Case("crossing", crossing)
    yield _Case("crossing under a window", crossing, shard // 3)


def _heads(world: int) -> tuple[int, int]:
    return math.lcm(8, world), 2


def _serves(name: str, mesh: Mesh, case: _Case, n_tokens: int) -> bool:
    segment = PackedSegment(case.spans, n_tokens, mesh.sp_size, mesh.ring_size)
    try:
        STRATEGIES[name].refuse(SegmentWork(segment, *_heads(mesh.sp_size), 64, 4, case.sliding_window))
    except UserError:
        return False
    return True


def _strategy_errors(
    name: str, mesh: Mesh, case: _Case, dtype: torch.dtype, n_tokens: int, device: torch.device
) -> tuple[float, float]:
    """(largest error over its limit, largest error over the largest value) of this rank's sequence shard."""
    inputs = draw(ParityCase(_heads(mesh.sp_size), 64, dtype, case.spans, n_tokens, case.sliding_window), device)
    segment = PackedSegment(case.spans, n_tokens, mesh.sp_size, mesh.ring_size)
    layout = segment.layout(STRATEGIES[name].layout_kind, mesh.sp_rank)
    ours = _shard_of(name, inputs, segment, mesh)
    ratios, relatives = [], []
    exact, plain = (_tensors(inputs, of) for of in (torch.float64, dtype))
    for (tensor, limit), found, true, rough in zip(LIMITS.items(), ours, exact, plain, strict=True):
        size = max(true.abs().max().item(), 0.1 * exact[3].abs().max().item())
        mine, rough = layout.shard(true, 0), layout.shard(rough, 0)
        floor = torch.finfo(dtype).eps * size  # of a shard with small values alone
        ratios.append(error_ratio(found, mine, rough, rough, floor) / limit)
        relatives.append((found.double() - mine).abs().max().item() / size)
        assert tensor in LIMITS
    return max(ratios), max(relatives)


def _shard_of(name: str, inputs: LayerInputs, segment: PackedSegment, mesh: Mesh) -> list[Tensor]:
    """This rank's out, dq, dk, dv."""
    layout = segment.layout(STRATEGIES[name].layout_kind, mesh.sp_rank)
    leaves = [layout.shard(x, 0).clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = STRATEGIES[name].prepare(segment, mesh, inputs.sliding_window)(*leaves, inputs.scale)
    out.backward(layout.shard(inputs.grad_out, 0))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _tensors(inputs: LayerInputs, dtype: torch.dtype) -> list[Tensor]:
    answer = written_out(inputs, dtype)
    return [answer.out, *answer.grads]


# ---- one optimizer step ----


def _steps(device: torch.device) -> Iterator[Figure]:
    world = dist.get_world_size()
    for sp in sorted({world, max(1, world // 2)}):
        config = _config(TINY, "float32", sp, 64, device)
        engine, mesh = _engine(config, sp, device)
        windows = ["long"] * mesh.dp_size + ["short"] * mesh.dp_size  # a micro-batch has one window on every rank
        batches = [_batch(64, number, window) for number, window in enumerate(windows)]
        stats = engine.step(batches[mesh.dp_rank :: mesh.dp_size], lr=1e-3)
        loss, norm = _plain_step(config, batches)
        engine._engine.destroy()
        found = stats.loss, math.nan if stats.grad_norm is None else stats.grad_norm
        errors = [abs(one - true) / abs(true) for one, true in zip(found, (loss, norm), strict=True)]
        worst_loss, worst_norm = _worst(errors, device)
        yield Figure(f"ranks_step_sp{sp}_loss_error", worst_loss, at_most=LOSS_LIMIT)
        yield Figure(f"ranks_step_sp{sp}_grad_norm_error", worst_norm, at_most=NORM_LIMIT)


def _config(architecture: dict[str, Any], dtype: str, sp: int, n_tokens: int, device: torch.device) -> Config:
    """Two micro-batches for each data-parallel rank: a long segment and a short one."""
    world = dist.get_world_size()
    config = Config(
        name="gpu_check", seed=3, model=ModelConfig(architecture=architecture, dtype=dtype),
        parallel=ParallelConfig(sp=sp), optim=OptimConfig(segments_per_step=2 * world // sp, clip=0.0),
        engine=EngineConfig(
            loss_chunk_tokens=max(10, n_tokens // sp // 4),
            deepspeed={"zero_optimization": RELEASE_ALL | {"reduce_bucket_size": 10_000_000}},
        ),
        hardware=HardwareConfig(gpus=world, gpus_per_node=world),
    )  # fmt: skip
    config.data.segment_tokens = n_tokens
    return config


def _engine(config: Config, sp: int, device: torch.device) -> tuple[Engine, Mesh]:
    mesh, hf_config = make_mesh(sp), load.config_of(config.model)
    base = hf_config.rope_parameters["rope_theta"]
    factors = METHODS["none"](
        Spectrum(hf_config.head_dim, base, config.data.segment_tokens), config.data.segment_tokens
    )
    return Engine(config, mesh, factors, hf_config, device), mesh


def _batch(n_tokens: int, seed: int, window: str) -> Batch:
    """One long document, or packed short ones that end in padding."""
    tokens = np.random.default_rng(seed).integers(0, TINY["vocab_size"], n_tokens).astype(np.int32)
    if window == "long":
        return Batch(tokens, np.array([[n_tokens - 1], [IGNORE]]), ((0, n_tokens),), "long")
    parts = [n_tokens * share // 16 for share in (0, 3, 4, 8, 15)]
    ends = np.array([stop - 1 for stop in parts[1:]] + list(range(parts[-1], n_tokens)))
    breaks = np.stack([ends, np.full(len(ends), IGNORE)])
    return Batch(tokens, breaks, tuple(itertools.pairwise(parts)), "short")


def _plain_step(config: Config, batches: Sequence[Batch]) -> tuple[float, float]:
    """(loss, gradient norm) of transformers in float64, each document alone: no mask, and no code of ours."""
    from transformers import AutoModelForCausalLM

    hf_config = load.config_of(config.model)
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager", dtype=torch.float64)
    state = {name: stored() for name, stored in load.scratch_weights(hf_config, config.seed).items()}
    model.load_state_dict(state)
    total, n_targets = torch.zeros((), dtype=torch.float64), 0
    documents = [one.tokens[start:stop] for one in batches for start, stop in one.spans]
    for tokens in (torch.from_numpy(document).long() for document in documents):
        logits = model(input_ids=tokens[None]).logits[0, :-1]
        total = total + F.cross_entropy(logits, tokens[1:], reduction="sum")
        n_targets += len(tokens) - 1
    (total / n_targets).backward()
    norm = math.sqrt(sum(weight.grad.square().sum().item() for weight in model.parameters() if weight.grad is not None))
    return total.item() / n_targets, norm


# ---- memory ----


def _memory(device: torch.device) -> Iterator[Figure]:
    """The peak that torch's allocator counted over two steps, over the estimate without CUDA's own share."""
    cuda, sp = device.type == "cuda", dist.get_world_size()
    architecture, n_tokens = (LARGER, 16384 * sp) if cuda else (TINY, 64)
    config = _config(architecture, "bfloat16", sp, n_tokens, device)
    engine, _ = _engine(config, sp, device)
    batches = [_batch(n_tokens, 0, "long"), _batch(n_tokens, 1, "short")]
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    losses = [engine.step(batches, lr=1e-3).loss for _ in range(2)]
    engine._engine.destroy()
    planned = sum(one.bytes for one in memory.training_items(_counts(config), memory.MemorySetting.of(config)))
    planned -= memory.RUNTIME_BYTES
    yield Figure("ranks_memory_planned_gib", planned / memory.GIB)
    yield Figure("ranks_bfloat16_loss_falls", losses[1] / losses[0], at_most=1.0)
    if cuda:
        measured = _worst([torch.cuda.max_memory_allocated(device)], device)[0]
        yield Figure("ranks_memory_measured_gib", measured / memory.GIB)
        yield Figure("ranks_memory_over_plan", measured / planned, at_most=MEMORY_OVER_PLAN)


def _counts(config: Config) -> Any:
    return counts_of(load.config_of(config.model), config.model)
