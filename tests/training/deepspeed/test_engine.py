"""The engine against one plain process: equal losses and gradients for all ranks, sequence parallelism and
accumulation.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from batches import batch_of_labels, labels_of, positions_of
from ranks import run_ranks

from lr2train.config import Config, EngineConfig, ModelConfig, OptimConfig, ParallelConfig
from lr2train.data.batch import Batch

T, VOCAB, L0, L = 64, 96, 32, 64
ARCHITECTURE = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": L0,
    "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}  # fmt: skip
SHORT_SPANS = ((0, 13), (13, 32), (32, 50), (50, 60))
WITHIN = 6  # the segment whose documents lie inside the sequence shards of two and of four ranks
WITHIN_SPANS = ((0, 13), (13, 16), (16, 32), (32, 48), (48, 60))
EMPTY_SHARD = 8  # the segment with a second half of padding: with sp=2 a rank has neither attention nor targets
# Below a threshold ZeRO-3 keeps parameters whole. Zero: every parameter is gathered and released, as in a large model.
RELEASE_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
CASES = [(1, 1, 1), (1, 1, 2), (2, 1, 1), (2, 1, 2), (2, 2, 1), (2, 2, 2)]  # world, sp, accumulation


def segment(index: int) -> Batch:
    """Segments with unlike numbers of targets: short ones (packed, padded) and long ones in turn. Positions of long
    ones from number 3 on jump.
    """
    rng = np.random.default_rng(index)
    tokens = rng.integers(0, VOCAB, T).astype(np.int32)
    labels = np.append(tokens[1:], -100)
    if index % 2:
        return batch_of_labels(tokens, labels, ((0, T),), "long", ((5 * index % T, 50 + index),) if index > 1 else ())
    spans = {EMPTY_SHARD: SHORT_SPANS[:2], WITHIN: WITHIN_SPANS}.get(index, SHORT_SPANS)
    for _, stop in spans:
        labels[stop - 1] = -100
    labels[spans[-1][1] :] = -100
    labels[: 3 * index] = -100
    return batch_of_labels(tokens, labels, spans, "short")


def config_for(sp: int, accumulation: int, world: int) -> Config:
    return Config(
        name="parity", seed=3, model=ModelConfig(architecture=ARCHITECTURE), parallel=ParallelConfig(sp=sp),
        optim=OptimConfig(segments_per_step=accumulation * world // sp, clip=0.0),
        engine=EngineConfig(loss_chunk_tokens=10, deepspeed=RELEASE_ALL),
    )  # fmt: skip


def factors():
    from lr2train.rope.methods import METHODS
    from lr2train.rope.spectrum import Spectrum

    return METHODS["longrope2"](Spectrum(8, 100.0, L0), L, critical_index=2, tail=[2.0, 2.4], attention_factor=1.1)


def steps(rank: int, world: int, cases: list[tuple[int, int, int]], segments: list[list[int]]):
    """Losses and gradients of one optimizer step of the real engine, for each case."""
    return [
        one_step(rank, world, sp, accumulation, used)
        for (_, sp, accumulation), used in zip(cases, segments, strict=True)
    ]


def one_step(
    rank: int, world: int, sp: int, accumulation: int, segments: list[int], engine_changes=None, model_changes=None
):
    import torch.distributed as dist

    from lr2train.model import load
    from lr2train.parallel.mesh import make_mesh
    from lr2train.training.deepspeed.engine import Engine
    from lr2train.training.deepspeed.start import start_deepspeed

    start_deepspeed(torch.device("cpu"))
    config, mesh = config_for(sp, accumulation, world), make_mesh(sp)
    config = replace(
        config,
        engine=replace(config.engine, **(engine_changes or {})),
        model=replace(config.model, **(model_changes or {})),
    )
    engine = Engine(config, mesh, factors(), load.config_of(config.model), torch.device("cpu"))
    gradients = captured_gradients(engine)
    mine = segments[mesh.dp_rank :: mesh.dp_size]
    stats = engine.step([segment(i) for i in mine], lr=1e-3)
    dist.barrier()
    engine._engine.destroy()
    return stats, {name: gradient.numpy() for name, gradient in gradients.items()} if rank == 0 else None


def captured_gradients(engine) -> dict[str, torch.Tensor]:
    """Filled by every step with its whole gradients, before they are applied."""
    gradients: dict[str, torch.Tensor] = {}
    update = engine._engine.step

    def capture() -> None:
        if engine._engine.is_gradient_accumulation_boundary():
            gradients.update(engine.named_gradients())
        update()

    engine._engine.step = capture
    return gradients


def plain_step(segments: list[int]):
    """The reference: plain transformers in fp64 with an explicit mask and full logits, no code of ours but the
    tokens.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from lr2train.model import load

    names = load.scratch_weights(load.config_of(ModelConfig(architecture=ARCHITECTURE)), 3)
    state = {name: read() for name, read in names.items()}
    long_rope = {
        "rope_type": "longrope", "rope_theta": 100.0, "factor": 2.0, "original_max_position_embeddings": L0,
        "attention_factor": 1.1, "short_factor": [1.0] * 4, "long_factor": list(factors().rescale),
    }  # fmt: skip
    models = {}
    for window, extra in (("short", {}), ("long", {"rope_parameters": long_rope, "max_position_embeddings": L})):
        hf_config = AutoConfig.for_model(**{**ARCHITECTURE, **extra})
        models[window] = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager", dtype=torch.float64)
        models[window].load_state_dict(state)
    total, n_targets = {"short": 0.0, "long": 0.0}, {"short": 0, "long": 0}
    for index in segments:
        batch = segment(index)
        mask = torch.full((T, T), -math.inf, dtype=torch.float64)
        for start, stop in (*batch.spans, *((t, t + 1) for t in range(batch.spans[-1][1], T))):
            mask[start:stop, start:stop] = torch.triu(
                torch.full((stop - start, stop - start), -math.inf, dtype=torch.float64), 1
            )
        logits = models[batch.window](
            input_ids=torch.from_numpy(batch.tokens).long()[None],
            position_ids=torch.from_numpy(positions_of(batch)).long()[None],
            attention_mask=mask[None, None],
            use_cache=False,
        ).logits[0]
        total[batch.window] += torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(labels_of(batch)).long(), reduction="sum", ignore_index=-100
        )
        n_targets[batch.window] += batch.n_target_tokens
    loss = (total["short"] + total["long"]) / sum(n_targets.values())
    loss.backward()
    gradients = {
        name: sum(
            p.grad
            for p in (dict(models["short"].named_parameters())[name], dict(models["long"].named_parameters())[name])
            if p.grad is not None
        )
        for name, _ in models["short"].named_parameters()
    }
    return (
        loss.item(),
        {w: float(total[w].detach() / n_targets[w]) for w in total if n_targets[w]},
        sum(n_targets.values()),
        gradients,
    )


def cases_of(world: int) -> tuple[list[tuple[int, int, int]], list[list[int]]]:
    """(world, sp, accumulation) and the segments of each case; in the last one, with sp=2, a sequence shard is all
    padding.
    """
    cases = [case for case in CASES if case[0] == world]
    segments = [
        [2 * j + (m % 2) + 1 for m in range(accumulation) for j in range(world // sp)] for _, sp, accumulation in cases
    ]
    return [*cases, (world, world, 2)], [*segments, [EMPTY_SHARD, 3]]


# Strategy -> segments of its step, all on one engine. Odd numbers are long segments, even ones short; see `segment`.
STRATEGIES = {
    "auto": [1, 2], "ulysses": [1, EMPTY_SHARD], "ring": [2, 3], "gather": [EMPTY_SHARD, 5], "ulysses_ring": [1, 2],
    "local": [WITHIN, WITHIN]
}  # fmt: skip


def every_strategy(rank: int, world: int):
    """(strategy, stats, gradients) of one step of each. A learning rate of 0 leaves the weights as they are."""
    import torch.distributed as dist

    from lr2train.model import load
    from lr2train.parallel.mesh import make_mesh
    from lr2train.training.deepspeed.engine import Engine
    from lr2train.training.deepspeed.start import start_deepspeed

    start_deepspeed(torch.device("cpu"))
    config, mesh = config_for(world, 2, world), make_mesh(world, ring=min(2, world))
    engine = Engine(config, mesh, factors(), load.config_of(config.model), torch.device("cpu"))
    gradients = captured_gradients(engine)
    found = []
    for strategy, segments in STRATEGIES.items():
        engine.attention.strategy = strategy
        stats = engine.step([segment(i) for i in segments], lr=0.0)
        found.append(
            (strategy, stats, {name: gradient.numpy() for name, gradient in gradients.items()} if rank == 0 else None)
        )
    dist.barrier()
    engine._engine.destroy()
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_every_strategy_gives_the_same_step(world, tmp_path):
    for strategy, stats, gradients in run_ranks(every_strategy, world, tmp_path=tmp_path, timeout_s=240)[0]:
        loss, _, n_targets, expected = plain_step(STRATEGIES[strategy])
        assert stats.n_target_tokens == n_targets, strategy
        assert stats.loss == pytest.approx(loss, rel=1e-5), strategy
        for name, gradient in expected.items():
            error = np.abs(gradients[name] - gradient.numpy()).max() / gradient.abs().max().item()
            assert error < 1e-5, f"{strategy} {name}: {error:.1e}"


VARIANTS = {  # other settings, on two ranks that share segments: overrides of config_for, and the error against fp64
    "recompute none": ({"recompute": "none"}, {}, 1e-5),
    "recompute layer": ({"recompute": "layer"}, {}, 1e-5),
    "offload": ({"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}, {}, 1e-5),
    "stage 1": ({"zero_stage": 1, "deepspeed": {}}, {}, 1e-5),
    "stage 2": ({"zero_stage": 2, "deepspeed": {}}, {}, 1e-5),
    "bfloat16": (
        {},
        {"dtype": "bfloat16"},
        3e-2,
    ),  # eight bits of mantissa; the norm of all gradients, as single ones may cancel
}


def variants(rank: int, world: int):
    """One step of each variant."""
    return [one_step(rank, world, 2, 2, [1, 2], engine, model) for engine, model, _ in VARIANTS.values()]


def test_other_engine_settings_give_the_same_step(tmp_path):
    results = run_ranks(variants, 2, tmp_path=tmp_path, timeout_s=240)[0]
    loss, _, _, expected = plain_step([1, 2])
    size = math.sqrt(sum(float((gradient**2).sum()) for gradient in expected.values()))
    for (name, (_, _, bound)), (stats, gradients) in zip(VARIANTS.items(), results, strict=True):
        off = math.sqrt(sum(float(((gradients[n] - gradient.numpy()) ** 2).sum()) for n, gradient in expected.items()))
        assert stats.loss == pytest.approx(loss, rel=bound), name
        assert off / size < bound, f"{name}: {off / size:.1e}"


@pytest.mark.parametrize("world", [1, 2])
def test_loss_and_gradients_equal_one_plain_process(world, tmp_path):
    """All cases of a world in one launch. As from the loader, all ranks have one window in the n-th micro-batch."""
    cases, segments = cases_of(world)
    results = run_ranks(steps, world, cases, segments, tmp_path=tmp_path, timeout_s=240)
    for number, (case, used) in enumerate(zip(cases, segments, strict=True)):
        (stats, gradients), *others = [of_rank[number] for of_rank in results]
        loss, by_window, n_targets, expected = plain_step(used)
        assert all(other[0] == stats for other in others), case
        assert stats.n_target_tokens == n_targets, case
        assert stats.loss == pytest.approx(loss, rel=1e-5), case
        assert {
            w: v for w, v in (("short", stats.loss_short), ("long", stats.loss_long)) if v is not None
        } == pytest.approx(by_window, rel=1e-5), case
        for name, gradient in expected.items():
            error = np.abs(gradients[name] - gradient.numpy()).max() / gradient.abs().max().item()
            assert error < 1e-5, f"{case} {name}: {error:.1e}"
