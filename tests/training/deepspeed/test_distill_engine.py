"""A distilled step of the engine against one plain process in fp64; resuming; nothing without a weight."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import labels_of, positions_of
from ranks import run_ranks

from lr2train.cli.composition import compose
from lr2train.config import ModelConfig, UserError
from lr2train.training.deepspeed.checkpoint import Checkpoints
from tests.remedies import remedy_of
from tests.training.deepspeed.test_engine import ARCHITECTURE, L0, L, captured_gradients, config_for, factors, segment

WEIGHT = 4.0
STEPS, SAVED = 4, 2
OFFLOADED = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
OFFLOAD = {"zero_optimization": {**OFFLOADED, "stage3_param_persistence_threshold": 0}}
HPZ = {"zero_optimization": {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}}


def write_base(folder: Path) -> Path:
    """A random model as a Hugging Face folder: the original."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**ARCHITECTURE, "initializer_range": 0.3}))
    model.save_pretrained(folder / "base")
    return folder / "base"


def engine_of(world: int, sp: int, base: Path, weight: float = WEIGHT, **engine):
    from lr2train.model import load
    from lr2train.parallel.mesh import make_mesh
    from lr2train.training.deepspeed.engine import Engine
    from lr2train.training.deepspeed.start import start_deepspeed

    start_deepspeed(torch.device("cpu"))
    config = config_for(sp, 2, world)
    config = replace(
        config,
        model=ModelConfig(path=str(base), dtype=engine.pop("dtype", "float32")),
        optim=replace(config.optim, distill_short=weight),
        engine=replace(config.engine, **engine),
    )
    return Engine(config, make_mesh(sp), factors(), load.config_of(config.model), torch.device("cpu"))


def numbers_of(step: int, dp_size: int) -> list[list[int]]:
    """Segments of a step for each micro-batch: long ones, then short ones, of which one is partly padding."""
    short = [2, 8, 4, 6]
    ranks = range(dp_size)
    return [[2 * (step + rank) + 1 for rank in ranks], [short[(step + rank) % 4] for rank in ranks]]


def steps_of(engine, steps: range) -> list:
    mine = engine.mesh.dp_rank
    return [
        engine.step([segment(row[mine]) for row in numbers_of(step, engine.mesh.dp_size)], lr=2e-2) for step in steps
    ]


def whole_weights(engine) -> dict[str, np.ndarray]:
    """The fp32 weights of the model in training. A collective."""
    with engine._gather(None)(list(engine.model.lm.parameters())):
        return {name: p.detach().float().numpy().copy() for name, p in engine.model.lm.named_parameters()}


def second_step(rank: int, world: int, cases: list[tuple[int, dict]], base: Path):
    """(stats, weights before, gradients) of a second step, when the model is no longer the original."""
    found = []
    for sp, changes in cases:
        engine = engine_of(world, sp, base, **changes)
        gradients = captured_gradients(engine)
        steps_of(engine, range(1))
        before = whole_weights(engine)
        (stats,) = steps_of(engine, range(1, 2))
        found.append((stats, before, {name: one.numpy() for name, one in gradients.items()}))
        engine._engine.destroy()
    return found


def plain_step(base: Path, weights: dict[str, np.ndarray], numbers: list[int]):
    """The reference in fp64: transformers' own models, document by document, whole logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def model(**extra):
        hf_config = AutoConfig.for_model(**{**ARCHITECTURE, **extra})
        return AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager", dtype=torch.float64)

    long_rope = {
        "rope_type": "longrope", "rope_theta": 100.0, "factor": 2.0, "original_max_position_embeddings": L0,
        "attention_factor": 1.1, "short_factor": [1.0] * 4, "long_factor": list(factors().rescale),
    }  # fmt: skip
    long = model(rope_parameters=long_rope, max_position_embeddings=L)
    short, original = model(), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    for one in (short, long):
        one.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=False)
        one.tie_weights()
    loss, divergence = torch.zeros(2, dtype=torch.float64)
    n_targets, n_short = 0, 0
    for number in numbers:
        batch = segment(number)
        labels, tokens, positions = (
            torch.from_numpy(x).long() for x in (labels_of(batch), batch.tokens, positions_of(batch))
        )
        for start, stop in batch.spans:
            document = tokens[None, start:stop]
            # With a mask: without one, transformers takes a jump of the positions for the border of a document.
            own = (short if batch.window == "short" else long)(
                document, torch.ones_like(document), positions[None, start:stop], use_cache=False
            ).logits[0]
            targets = labels[start:stop] != -100
            loss = loss + torch.nn.functional.cross_entropy(own[targets], labels[start:stop][targets], reduction="sum")
            n_targets += int(targets.sum())
            if batch.window == "short":
                with torch.no_grad():
                    theirs = original(document, use_cache=False).logits[0][targets].log_softmax(-1)
                log_q = own[targets].log_softmax(-1)
                divergence = divergence + (theirs.exp() * (theirs - log_q)).sum()
                n_short += int(targets.sum())
    ((loss + WEIGHT * divergence) / n_targets).backward()
    gradients = {
        name: sum(p.grad for p in (dict(one.named_parameters())[name] for one in (short, long)) if p.grad is not None)
        for name, _ in short.named_parameters()
    }
    return loss.item() / n_targets, divergence.item() / n_short, gradients


# Ranks -> (sp, changes of the engine, the bound against fp64).
# bfloat16: q - p is a small difference of rounded numbers.
SETTINGS = {
    2: [
        (2, {}, 1e-5),
        (2, {"zero_stage": 2, "deepspeed": {}}, 1e-5),
        (1, {"deepspeed": OFFLOAD}, 1e-5),
        (2, {"dtype": "bfloat16"}, 0.1),
    ],
    4: [(2, {"deepspeed": HPZ}, 1e-5)],
}


@pytest.mark.parametrize("world", SETTINGS)
def test_a_distilled_step_is_that_of_one_plain_process(world, tmp_path):
    base, settings = write_base(tmp_path), SETTINGS[world]
    results = run_ranks(second_step, world, [one[:2] for one in settings], base, tmp_path=tmp_path, timeout_s=240)
    for number, (sp, changes, bound) in enumerate(settings):
        (stats, before, gradients), *others = [of_rank[number] for of_rank in results]
        used = [one for row in numbers_of(1, world // sp) for one in row]
        loss, divergence, expected = plain_step(base, before, used)
        assert all(other[0] == stats for other in others), changes
        assert stats.loss == pytest.approx(loss, rel=bound), changes
        assert stats.distill_loss == pytest.approx(divergence, rel=2 * bound), changes
        assert divergence > 0.01, "the model is still the original"
        size = math.sqrt(sum(float((one**2).sum()) for one in expected.values()))
        off = math.sqrt(sum(float(((gradients[n] - one.numpy()) ** 2).sum()) for n, one in expected.items()))
        assert off / size < bound, f"{sp} {changes}: {off / size:.1e}"


def resumed(rank: int, world: int, base: Path, folder: Path):
    """Losses without a break, and of a second engine from the checkpoint; the held-out loss of both ways."""
    engine, checkpoints = engine_of(world, 2, base), Checkpoints(folder / "checkpoints")
    assert not any("original" in name for name, _ in engine.model.named_parameters())  # checkpoints hold one model
    first = steps_of(engine, range(SAVED))
    held_out = engine.measure([segment(2)])
    engine.save(checkpoints, SAVED)
    rest = steps_of(engine, range(SAVED, STEPS))
    engine._engine.destroy()
    engine = engine_of(world, 2, base)
    assert engine.load(checkpoints) == SAVED
    assert engine.measure([segment(2)]) == held_out
    again = steps_of(engine, range(SAVED, STEPS))
    engine._engine.destroy()
    plain = engine_of(world, 2, base, weight=0.0)
    assert not plain.model.distills
    assert plain.measure([segment(2)]) != held_out
    other = steps_of(plain, range(SAVED))
    plain._engine.destroy()
    return first, rest, again, other


def test_a_resumed_run_is_the_same_and_without_a_weight_there_is_no_second_model(tmp_path):
    base = write_base(tmp_path)
    first, rest, again, plain = run_ranks(resumed, 2, base, tmp_path, tmp_path=tmp_path, timeout_s=240)[0]
    assert again == rest
    assert [one.distill_loss for one in plain] == [None, None]
    assert plain[0].loss == first[0].loss  # before any update; the loss has no divergence in it
    assert first[0].distill_loss == pytest.approx(0.0, abs=1e-6)
    assert plain[1].loss != first[1].loss


def test_a_weight_without_an_original_model_is_refused():
    with pytest.raises(UserError, match=r"optim.distill_short=0.5 .*model.path is empty") as refused:
        compose("train", ["name=x", "optim.distill_short=0.5"])
    compose("train", ["name=x", remedy_of(refused.value)])
