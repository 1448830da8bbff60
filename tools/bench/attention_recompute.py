"""Step time and peak memory of what the backward pass computes again, on two CPU ranks under ZeRO-3.

One engine for each setting, with the same weights. A round makes one step of each engine, in turn, over one long
segment that both ranks share by a ring. A time is the median over rounds of a setting's step over ``layer``'s step of
the same round, so other load affects both. Each ratio is taken twice: by wall-clock time of the slower rank, and
by CPU time of both ranks. Memory is the most bytes of tensors that are alive at one time, above the state before the
step, of one step that is not timed. On a CPU "host memory" is the same memory, so offloading saves nothing here.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from tools.bench.figures import Figure
from tools.bench.live_bytes import LiveBytes

RANKS, VOCABULARY, TILE = 2, 256, 256
WAYS: dict[str, dict[str, Any]] = {
    "layer": {"recompute": "layer"},
    "keep_attention": {"recompute": "keep_attention"},
    "none": {"recompute": "none"},
    "layer, tile_mlp": {"recompute": "layer", "tile_mlp": TILE},
    "keep_attention, offload_inputs": {"recompute": "keep_attention", "offload_inputs": True},
}


SMALL_BUCKETS = {"zero_optimization": {"reduce_bucket_size": 200_000}}  # DeepSpeed's own, 2 GB, would hide the rest


class Size(NamedTuple):
    """Size of the segment and of the measurement."""

    n_tokens: int
    rounds: int


WHOLE, QUICK = Size(2048, 7), Size(1024, 4)

Step = tuple[float, float]
"""Seconds of one step: wall-clock time of the slower rank, CPU time of both ranks."""


def measure(quick: bool) -> Iterable[Figure]:
    """Ratios of step time and of peak memory to whole-layer recomputation."""
    from tests.ranks import run_ranks

    with tempfile.TemporaryDirectory() as folder:
        taken, peaks = run_ranks(_rank, RANKS, QUICK if quick else WHOLE, tmp_path=Path(folder), timeout_s=3600)[0]
    print(f"{'engine':<32} {'s':>8} {'of layer':>9} {'CPU, of layer':>14} {'peak MiB':>9} {'of layer':>9}")
    for way in WAYS:
        clock, cpu = (
            statistics.median(own[i] / base[i] for own, base in zip(taken[way], taken["layer"], strict=True))
            for i in (0, 1)
        )
        seconds, memory = statistics.median(own for own, _ in taken[way]), peaks[way] / peaks["layer"]
        print(f"{way:<32} {seconds:>8.2f} {clock:>9.3f} {cpu:>14.3f} {peaks[way] / 2**20:>9.1f} {memory:>9.3f}")
        name = way.replace(", ", "_")
        # The kernel is most of this step, so a kept attention saves more than noise.
        yield Figure(f"{name}_time_over_layer", clock)
        yield Figure(f"{name}_cpu_time_over_layer", cpu, at_most=0.95 if way == "keep_attention" else None)
        bound = {"none": None, "layer, tile_mlp": 0.95}.get(way, 1.3)
        yield Figure(f"{name}_memory_over_layer", memory, at_most=bound)


def _rank(rank: int, world: int, size: Size) -> tuple[dict[str, list[Step]], dict[str, int]]:
    """The steps of each round, and the peak bytes of a step, by engine."""
    from lr2train.training.deepspeed.start import start_deepspeed

    start_deepspeed(torch.device("cpu"))
    engines = {way: _engine(changes, size) for way, changes in WAYS.items()}
    segment = _segment(size)
    peaks = {way: _peak(engine, segment) for way, engine in engines.items()}
    taken: dict[str, list[Step]] = {way: [] for way in WAYS}
    for _ in range(size.rounds):
        for way, engine in engines.items():
            taken[way].append(_timed(engine, segment))
    return taken, peaks


def _engine(changes: dict[str, Any], size: Size) -> Any:
    """Four layers with the shapes of LLaMA3-8B, sixteen times narrower."""
    from lr2train.config import Config, EngineConfig, ModelConfig, OptimConfig, ParallelConfig
    from lr2train.model import load
    from lr2train.parallel.mesh import make_mesh
    from lr2train.rope.methods import METHODS
    from lr2train.rope.spectrum import Spectrum
    from lr2train.training.deepspeed.engine import Engine

    model = ModelConfig(
        architecture={
            "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 896,
            "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
            "max_position_embeddings": size.n_tokens,
        },
    )  # fmt: skip
    config = Config(
        name="bench", model=model, parallel=ParallelConfig(sp=RANKS, strategy="ring"),
        optim=OptimConfig(segments_per_step=1),
        engine=EngineConfig(loss_chunk_tokens=256, deepspeed=SMALL_BUCKETS, **changes),
    )  # fmt: skip
    factors = METHODS["none"](Spectrum(32, 10000.0, size.n_tokens), size.n_tokens)
    return Engine(config, make_mesh(RANKS), factors, load.config_of(model), torch.device("cpu"))


def _segment(size: Size) -> Any:
    from lr2train.data.batch import IGNORE, Batch

    tokens = np.random.default_rng(0).integers(0, VOCABULARY, size.n_tokens).astype(np.int32)
    return Batch(
        tokens=tokens, breaks=np.array([[size.n_tokens - 1], [IGNORE]]), spans=((0, size.n_tokens),), window="long"
    )


def _peak(engine: Any, segment: Any) -> int:
    """Bytes above the state before; also warms the engine up, whose second step is measured."""
    engine.step([segment], lr=0.0)
    with LiveBytes() as live:
        engine.step([segment], lr=0.0)
    return live.peak


def _timed(engine: Any, segment: Any) -> Step:
    dist.barrier()
    clock, cpu = time.monotonic(), time.process_time()
    engine.step([segment], lr=0.0)
    taken = torch.tensor([time.monotonic() - clock, time.process_time() - cpu], dtype=torch.float64)
    slowest, summed = taken[:1].clone(), taken[1:].clone()
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dist.all_reduce(summed)
    return slowest.item(), summed.item()
