"""What the backward pass computes again changes neither losses nor gradients by a bit: real ZeRO-3, every strategy."""

from collections import Counter
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from training.deepspeed.test_engine import (
    ARCHITECTURE, EMPTY_SHARD, L0, WITHIN, captured_gradients, config_for, factors, segment
)  # fmt: skip

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
    assert L0 == MODELS[model]["max_position_embeddings"]
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

    class Context:
        def __enter__(self):
            self.patch = mock.patch.object(CpuKernel, "forward", counted)
            self.patch.start()
            return calls

        def __exit__(self, *_):
            self.patch.stop()

    return Context()


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
CASES = [*((model, 2, list(STRATEGIES)) for model in ("llama", "qwen3")), ("llama", 4, list(STRATEGIES)),
         *((model, 2, ["ulysses", "ring"]) for model in ("mistral", "mixtral", "stablelm"))]  # fmt: skip


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
