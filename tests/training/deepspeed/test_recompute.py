"""What the backward pass computes again changes neither losses nor gradients by a bit: real ZeRO-3, every strategy."""

import contextlib
from collections import Counter
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from training.deepspeed.test_engine import (
    ARCHITECTURE,
    EMPTY_SHARD,
    L0,
    WITHIN,
    captured_gradients,
    config_for,
    factors,
    segment,
)

from lr2train.attention.cpu import CpuKernel
from lr2train.config import ModelConfig
from lr2train.model import load
from lr2train.parallel.comm import counting
from lr2train.parallel.mesh import make_mesh
from lr2train.training.deepspeed.engine import Engine
from lr2train.training.deepspeed.start import start_deepspeed

SIZE = {name: value for name, value in ARCHITECTURE.items() if name != "model_type"} | {"initializer_range": 0.2}
SLIDING = {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
MODELS = {
    "llama": ARCHITECTURE,
    "mistral": {"model_type": "mistral", **SIZE, "sliding_window": 11},
    "qwen3": {"model_type": "qwen3", **SIZE, **SLIDING},  # norms of q and k; two kinds of layers
    "mixtral": {"model_type": "mixtral", **SIZE, **EXPERTS, "tie_word_embeddings": False, "sliding_window": None},
    "stablelm": {"model_type": "stablelm", **SIZE, "partial_rotary_factor": 1.0},  # hands no keyword arguments on
}
# Strategy -> segments of its step: short and packed, long, one shard of padding. See test_engine.segment.
STRATEGIES = {
    "local": [WITHIN, WITHIN], "ulysses": [1, EMPTY_SHARD], "ring": [2, 3], "gather": [EMPTY_SHARD, 5],
    "ulysses_ring": [1, 2],
}  # fmt: skip


def every_way(rank: int, world: int, model: str, ways: dict[str, dict], strategies: list[str]):
    """Way -> strategy -> (loss, gradients, kernel calls forward, bytes sent) of a step of the real engine."""
    start_deepspeed(torch.device("cpu"))
    return {way: steps(rank, world, model, changes, strategies) for way, changes in ways.items()}


def steps(rank: int, world: int, model: str, changes: dict, strategies: list[str]):
    assert MODELS[model]["max_position_embeddings"] == L0
    config, mesh = config_for(world, 2, world), make_mesh(world, ring=min(2, world))
    config = replace(
        config, engine=replace(config.engine, **changes), model=ModelConfig(architecture=dict(MODELS[model]))
    )
    engine = Engine(config, mesh, factors(), load.config_of(config.model), torch.device("cpu"))
    gradients, found = captured_gradients(engine), {}
    for strategy in strategies:
        engine.attention.strategy = strategy
        with kernel_calls() as calls, counting() as sent:
            loss = engine.step([segment(i) for i in STRATEGIES[strategy]], lr=0.0).loss
        whole = {name: gradient.numpy() for name, gradient in gradients.items()} if rank == 0 else None
        found[strategy] = loss, whole, calls["forward"], sent.total()
    dist.barrier()
    engine._engine.destroy()
    return found


def kernel_calls():
    """A context that counts the kernel's forward calls."""
    calls: Counter[str] = Counter()
    own = CpuKernel.forward

    def counted(*given):
        calls["forward"] += 1
        return own(*given)

    return counting_in(mock.patch.object(CpuKernel, "forward", counted), calls)


@contextlib.contextmanager
def counting_in(patch, counter: Counter):
    """``counter``, while ``patch`` acts."""
    with patch:
        yield counter


def check_alike(found: dict, way: str, other: str) -> None:
    assert found[way].keys() == found[other].keys()
    for strategy in found[way]:
        (loss, gradients, *_), (other_loss, other_gradients, *_) = found[way][strategy], found[other][strategy]
        assert loss == other_loss, f"{strategy}: {way}, {other}"
        assert gradients.keys() == other_gradients.keys()
        for name, gradient in gradients.items():
            assert np.array_equal(gradient, other_gradients[name]), f"{strategy} {name}: {way}, {other}"
        assert any(np.abs(gradient).max() > 0 for gradient in gradients.values())


def of_all_ranks(results: list[dict], way: str, strategy: str) -> tuple[int, int]:
    """Kernel calls forward, and bytes sent."""
    calls, sent = zip(*(found[way][strategy][2:] for found in results), strict=True)
    return sum(calls), sum(sent)


WAYS = {name: {"recompute": name} for name in ("none", "keep_attention", "layer")}
CASES = [
    ("llama", 2, list(STRATEGIES)),
    ("qwen3", 2, ["ulysses", "ring"]),
    ("llama", 4, ["ulysses_ring"]),
    *((model, 2, ["ring"]) for model in ("mistral", "mixtral", "stablelm")),
    *(pytest.param(*one, list(STRATEGIES), marks=pytest.mark.slow) for one in (("qwen3", 2), ("llama", 4))),
]


@pytest.mark.parametrize(("model", "world", "strategies"), CASES)
def test_gradients_are_the_same_bits_and_attention_runs_once(model, world, strategies, tmp_path):
    results = run_ranks(every_way, world, model, WAYS, strategies, tmp_path=tmp_path, timeout_s=240)
    for other in ("keep_attention", "layer"):
        check_alike(results[0], "none", other)
    for strategy in strategies:
        calls, sent = of_all_ranks(results, "none", strategy)
        kept_calls, kept_sent = of_all_ranks(results, "keep_attention", strategy)
        layer_calls, layer_sent = of_all_ranks(results, "layer", strategy)
        assert 0 < calls == kept_calls == layer_calls / 2, strategy
        if strategy in ("ring", "gather"):
            assert 0 < sent == kept_sent < layer_sent, strategy
        else:
            assert sent <= kept_sent <= layer_sent, strategy


def test_what_lies_in_host_memory_comes_back_the_same_bits(tmp_path):
    ways = {
        "keep_attention": {"recompute": "keep_attention"},
        "keep_attention, host": {"recompute": "keep_attention", "offload_inputs": True},
        "layer, host": {"recompute": "layer", "offload_inputs": True},
        "one of two layers, host": {"recompute": "layer", "recompute_layers": 1, "offload_inputs": True},
    }
    found = run_ranks(every_way, 2, "llama", ways, ["ring"], tmp_path=tmp_path, timeout_s=240)[0]
    for way in ways:
        check_alike(found, "keep_attention", way)
    kept, again, half = (found[way]["ring"][2] for way in list(ways)[1:])
    assert 2 * half == kept + again  # kernel calls


KEEP_NOTHING = {  # gather before each module, release after it
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}  # fmt: skip
TILED = {"tile_mlp": 10}  # 32 tokens of a rank in four tiles, the last of two


def gathers_of_tiles(rank: int, world: int):
    """(gradients, gradients with tiles, gathers of MLP weights in the step with tiles) of every recompute and stage."""
    start_deepspeed(torch.device("cpu"))
    found = {}
    for stage, way in ((3, "none"), (3, "keep_attention"), (2, "none")):
        changes = {"recompute": way, "zero_stage": stage, "deepspeed": KEEP_NOTHING if stage == 3 else {}}
        whole = steps(rank, world, "llama", changes, ["ulysses"])
        with gathered_weights() as gathers:
            tiled = steps(rank, world, "llama", changes | TILED | {"offload_inputs": way != "none"}, ["ulysses"])
        found[stage, way] = {"whole": whole, "tiled": tiled}, max(gathers.values(), default=0)
    return found


def gathered_weights():
    """A context that counts, for each matrix of an MLP, how often ZeRO-3 gathers it."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    gathers: Counter[int] = Counter()
    name = "_PartitionedParameterCoordinator__all_gather_params"
    own = getattr(Coordinator, name)

    def counted(self, params, forward):
        gathers.update(p.ds_id for p in params if tuple(p.ds_shape) in {(48, 32), (32, 48)})
        return own(self, params, forward)

    return counting_in(mock.patch.object(Coordinator, name, counted), gathers)


def test_tiles_give_the_same_step_under_zero_and_gather_once_a_pass(tmp_path):
    for (stage, way), (found, gathers) in run_ranks(gathers_of_tiles, 2, tmp_path=tmp_path, timeout_s=240)[0].items():
        (loss, wanted, *_), (own_loss, own, *_) = found["whole"]["ulysses"], found["tiled"]["ulysses"]
        assert own_loss == pytest.approx(loss, rel=1e-6)
        assert own.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert np.abs(own[name] - gradient).max() <= 2e-6 * np.abs(gradient).max(), f"{stage} {way} {name}"
        # Two micro-batches, each with a pass forward and one back; DeepSpeed keeps what the recomputed pass gathered.
        assert gathers == (4 if stage == 3 else 0), f"{stage} {way}"
