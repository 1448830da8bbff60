"""A rank that fails inside a step, or has other work than its peers, ends the step on all ranks with one reason."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import RankError, run_ranks

from lr2train.training.agreement import MicroBatch, disagreement
from tests.training.deepspeed.test_engine import T, config_for, factors, segment

SHORT = MicroBatch("short", n_tokens=64, spans=7, n_targets=60, n_pairs=300, strategy="local")
LONG = MicroBatch("long", n_tokens=64, spans=9, n_targets=63, n_pairs=2080, strategy="ring")


def engine_of(world: int):
    from lr2train.model import load
    from lr2train.parallel.mesh import make_mesh
    from lr2train.training.deepspeed.engine import Engine
    from lr2train.training.deepspeed.start import start_deepspeed

    start_deepspeed(torch.device("cpu"))
    return Engine(
        config_for(world, 1, world),
        make_mesh(world),
        factors(),
        load.config_of(config_for(1, 1, 1).model),
        torch.device("cpu"),
    )


def handed_unlike_work(rank: int, world: int) -> list[str]:
    """The error of each step in which rank 1 has another batch, and the loss of a good step afterwards."""
    engine, long = engine_of(world), segment(1)
    longer = replace(long, tokens=np.zeros(2 * T, dtype=np.int32))
    others = [
        replace(long, window="short"),
        replace(long, spans=((0, 30), (30, T))),
        longer,
        replace(long, spans=((0, T + 1),)),
    ]
    heard = []
    for other in others:
        with pytest.raises((RuntimeError, AssertionError)) as raised:
            engine.step([other if rank == 1 else long], lr=0.0)
        heard.append(str(raised.value))
    return [*heard, f"{engine.step([long], lr=0.0).loss:.4f}"]


def test_ranks_with_different_work_raise_the_same_error_and_can_go_on(tmp_path):
    first, second = run_ranks(handed_unlike_work, 2, tmp_path=tmp_path, timeout_s=120)
    assert first == second
    assert first[0].startswith(
        "ranks disagree on the window of micro-batch 0: long on rank 0, short on rank 1; every rank must be started"
    )
    assert first[1].startswith("ranks that share a segment disagree on its spans in micro-batch 0: ")
    assert first[2].startswith(
        "ranks that share a segment disagree on its n_tokens in micro-batch 0: 64 on rank 0, 128 on rank 1"
    )


def failing_inside(rank: int, world: int) -> None:
    """Rank 1 fails between two collectives of the forward pass."""
    engine = engine_of(world)
    if rank == 1:
        layer = engine.model.lm.base_model.layers[1]
        layer.mlp.register_forward_hook(lambda *_: (_ for _ in ()).throw(ArithmeticError("out of memory, say")))
    engine.step([segment(1)], lr=0.0)


def test_a_rank_that_fails_inside_a_step_ends_all_with_its_reason(tmp_path):
    """The time-out of collectives is half an hour here: a rank that ends sooner was told the reason."""
    with pytest.raises(RankError) as raised:
        run_ranks(failing_inside, 2, tmp_path=tmp_path, timeout_s=120)
    lines = [line for line in str(raised.value).splitlines() if line.startswith(("ArithmeticError", "RuntimeError"))]
    assert "ArithmeticError: out of memory, say" in lines
    assert "RuntimeError: rank 1: ArithmeticError: out of memory, say" in lines


# ---- the comparison alone ----


def test_ranks_that_agree():
    assert disagreement([[SHORT, LONG], [SHORT, LONG]], sp=2) is None
    other = LONG._replace(spans=1, strategy="gather", n_tokens=32)
    assert disagreement([[LONG], [LONG], [other], [other]], sp=2) is None, (
        "data-parallel ranks have segments of their own"
    )


@pytest.mark.parametrize(
    ("told", "sp", "text"),
    [
        ([[SHORT], [SHORT, LONG]], 1, "ranks disagree on the micro-batches of a step: 1 on rank 0, 2 on rank 1"),
        (
            [[SHORT, SHORT], [SHORT, LONG]],
            1,
            "ranks disagree on the window of micro-batch 1: short on rank 0, long on rank 1",
        ),
        (
            [[LONG], [LONG], [LONG], [LONG._replace(strategy="ring_flash_attn")]],
            2,
            "ranks that share a segment disagree on its strategy in micro-batch 0: ring on rank 2, ring_flash_attn on "
            "rank 3",
        ),
    ],
)
def test_ranks_that_disagree(told, sp, text):
    assert disagreement(told, sp) == text
