"""A bad step (loss or gradient norm not finite) makes no update on any rank, under every ZeRO stage; bad weights are
never saved.
"""

import math

import numpy as np
import pytest
import torch
from ranks import run_ranks

from lr2train.config import UserError
from lr2train.training.bad_steps import BadSteps
from lr2train.training.deepspeed.checkpoint import Checkpoints
from lr2train.training.deepspeed.engine import StepStats
from lr2train.training.deepspeed.finite import refuse_non_finite
from tests.training.deepspeed.test_checkpoint import SHORT, engine_of, segment, whole_state

SOME = ("stage 3", "stage 3, offload", "stage 1, bfloat16", "stage 0")
REST = ("stage 3, bfloat16", "stage 2", "stage 1")


def struck(rank: int, world: int, variants: tuple[str, ...]) -> list[dict]:
    """For each variant: a sound step, one with an infinite loss on rank 1 alone, one with a NaN gradient on rank 1
    alone, and a sound one.
    """
    return [strike(rank, world, variant) for variant in variants]


def strike(rank: int, world: int, variant: str) -> dict:
    import torch.distributed as dist

    engine = engine_of(world, 1, variant)
    mine = [segment(i) for i in SHORT[rank::world]]
    first = engine.step(mine, lr=1e-2)
    before = weights(engine)
    calls, loss_head = [], engine.model.loss_head
    own = loss_head.forward

    def infinite_once(*args):
        """The gradient stays finite: only the loss shows it."""
        calls.append(0)
        return own(*args) + (math.inf if rank == 1 and len(calls) == 1 else 0.0)

    loss_head.forward = infinite_once
    infinite = engine.step(mine, lr=1e-2)
    after_infinite = weights(engine)
    hook = engine.model.lm.base_model.norm.weight.register_hook(
        lambda gradient: gradient * (math.nan if rank == 1 else 1.0)
    )
    nan = engine.step(mine, lr=1e-2)
    after_nan = weights(engine)
    hook.remove()
    sound = engine.step(mine, lr=1e-2)
    dist.barrier()
    moved = any((weights(engine)[name] != value).any() for name, value in before.items())
    engine._engine.destroy()
    return {
        "steps": [first, infinite, nan, sound],
        "unchanged": [same(before, after_infinite), same(before, after_nan)],
        "moved": moved,
    }


def weights(engine) -> dict[str, np.ndarray]:
    """Whole weights and, under ZeRO, the optimizer's moments."""
    if engine.config.engine.zero_stage:
        return {name: value.copy() for name, value in whole_state(engine).items() if value.dtype == np.float32}
    return {name: parameter.detach().numpy().copy() for name, parameter in engine.model.named_parameters()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


@pytest.mark.parametrize(
    "variants", [pytest.param(SOME, id="some"), pytest.param(REST, id="rest", marks=pytest.mark.slow)]
)
def test_a_bad_loss_or_gradient_on_one_rank_stops_the_update_on_all(variants, tmp_path):
    by_rank = run_ranks(struck, 2, variants, tmp_path=tmp_path, timeout_s=240)
    for variant, zero, one in zip(variants, *by_rank, strict=True):
        for found in (zero, one):
            assert [step.finite for step in found["steps"]] == [True, False, False, True], variant
            assert found["unchanged"] == [True, True], variant
            assert found["moved"], variant
        assert [step.suspects for step in one["steps"]] == [(), (0,), (), ()], variant
        assert [step.suspects for step in zero["steps"]] == [(), (), (), ()], variant


def saved_with_nan(rank: int, world: int, folder) -> list[str]:
    engine, of, heard = engine_of(world, 1, "stage 3"), Checkpoints(folder), []
    engine.step([segment(i) for i in SHORT[rank::world]], lr=1e-2)
    engine.save(of, 1)
    states = list(engine._engine.optimizer.optimizer.state.values())
    for tensor in (next(engine.model.parameters()).ds_tensor, states[0]["exp_avg_sq"]):
        kept = tensor.clone()
        if rank == 1:
            tensor.view(-1)[0] = math.nan
        with pytest.raises(UserError) as raised:
            engine.save(of, 2)
        heard.append(str(raised.value))
        tensor.copy_(kept)
    return [*heard, *sorted(path.name for path in folder.iterdir() if path.is_dir())]


def test_no_checkpoint_is_written_of_bad_weights_or_moments(tmp_path):
    first, second = run_ranks(saved_with_nan, 2, tmp_path / "checkpoints", tmp_path=tmp_path, timeout_s=120)
    assert first == second
    weight, moment, *left = first
    assert "rank 1: the weight " in weight and "not finite" in weight
    assert "rank 1: the optimizer's exp_avg_sq" in moment
    assert left == ["step_00000001"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_number_that_is_not_finite_is_found_and_a_sum_that_overflows_is_none(dtype):
    largest = torch.full((9,), torch.finfo(dtype).max, dtype=dtype)
    refuse_non_finite(iter([("full", largest), ("empty", largest[:0]), ("a count", torch.tensor(2**62))]))
    for bad in (math.inf, -math.inf, math.nan):
        largest[4] = bad
        with pytest.raises(UserError, match="^full holds numbers that are not finite"):
            refuse_non_finite(iter([("full", largest)]))
    with pytest.raises(UserError):
        refuse_non_finite(iter([("both", torch.tensor([math.inf, -math.inf], dtype=dtype))]))


class Segments:
    """Stands for a loader where no batch is asked for."""

    def described(self, step: int) -> list[str]:
        return [f"short {step} (books)", f"long {step} (code)"]


def stats(finite: bool, suspects: tuple[int, ...] = ()) -> StepStats:
    return StepStats(1.0, 1.0, None, 1, 1, 0.0, 1.0, 1.0, False, finite, suspects)


def test_bad_steps_are_named_with_their_segments_and_too_many_in_a_row_end_the_run(capsys):
    bad = BadSteps(2, total=5)
    bad.look(0, stats(False, (1,)), Segments())
    bad.look(1, stats(True), Segments())
    bad.look(2, stats(False), Segments())
    with pytest.raises(UserError) as raised:
        bad.look(3, stats(False), Segments())
    assert (bad.total, bad.in_a_row) == (8, 2)
    said = capsys.readouterr().err.splitlines()
    assert "step 1: the loss of segment long 0 (code) is not finite" in said[0]
    assert "gradient norm" in said[1] and "short 2 (books); long 2 (code)" in said[1]
    assert "steps 3-4" in str(raised.value) and "data.skip_steps=[3-4]" in str(raised.value)
