"""ZeRO stages, dtypes, offload, the reduction's dtype and hpZ: each trains, resumes bit for bit and writes its model.

Losses are compared with ZeRO-3 in float32, the written model with plain transformers. ``tools/zero_settings.py`` runs
the whole table of docs/RUNNING.md with the functions of this module.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from batches import labels_of
from ranks import run_ranks

from lr2train.cli.composition import compose
from lr2train.config import Config, UserError
from lr2train.training.deepspeed.checkpoint import Checkpoints
from tests.remedies import remedy_of
from tests.training.deepspeed.test_engine import config_for, factors, segment

STEPS, SAVED = 5, 3
ALL_DIVIDED = {"stage3_param_persistence_threshold": 0}
OFFLOADS = {
    "none": {},
    "optimizer": {"offload_optimizer": {"device": "cpu"}},
    "parameters": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
}
ROUNDING = {"float32": 1e-6, "float16": 1e-4, "bfloat16": 1e-3}
"""Relative error of a loss against float32. A step changes the loss by 1e-2. The last place of a weight is 1e-7, 1e-3
and 8e-3 of its value; in a loss the errors of many weights nearly cancel."""


class Setting(NamedTuple):
    """A combination of engine settings."""

    stage: int
    dtype: str
    offload: str = "none"
    reduce_dtype: str = "float32"
    hpz: int = 1

    @property
    def zero(self) -> dict:
        """The section zero_optimization of ``engine.deepspeed``."""
        own = ALL_DIVIDED if self.stage == 3 else {}
        return own | OFFLOADS[self.offload] | ({} if self.hpz == 1 else {"zero_hpz_partition_size": self.hpz})


class Outcome(NamedTuple):
    """What a setting did; losses in nats per target token."""

    losses: list[float]  # of all steps
    resumed: list[float]  # of the steps after the checkpoint, by a second engine
    measured: float  # held-out loss of the second engine at the end
    written: float  # the same loss of the written model, by plain transformers in float32
    model: bytes  # the written weights
    gathered: dict[int, int]  # bytes of all-gathers of the first engine's steps, by ranks of their group


def outcomes(rank: int, world: int, settings: list[Setting], folder: Path) -> list[Outcome]:
    """The outcome of each setting, on every rank."""
    return [outcome(world, setting, folder / f"{number}") for number, setting in enumerate(settings)]


def outcome(world: int, setting: Setting, folder: Path) -> Outcome:
    import torch.distributed as dist

    from lr2train.model import load

    engine, checkpoints = _engine(world, setting), Checkpoints(folder / "checkpoints")
    with _gathered() as gathered:
        losses = _train(engine, range(SAVED))
        engine.save(checkpoints, SAVED)
        losses += _train(engine, range(SAVED, STEPS))
    engine._engine.destroy()
    engine = _engine(world, setting)
    assert engine.load(checkpoints) == SAVED
    resumed = _train(engine, range(SAVED, STEPS))
    measured = engine.measure([segment(2)])["short"].loss
    engine.write_model(folder / "model", load.plain_config(engine.hf_config))
    dist.barrier()
    engine._engine.destroy()
    weights = (folder / "model" / "model.safetensors").read_bytes()
    return Outcome(losses, resumed, measured, _plain_loss(folder / "model"), weights, gathered)


def _config(world: int, setting: Setting) -> Config:
    config = config_for(1, 2, world)
    engine = replace(
        config.engine,
        zero_stage=setting.stage,
        reduce_dtype=setting.reduce_dtype,
        deepspeed={"zero_optimization": setting.zero} if setting.zero else {},
    )
    model, optim = replace(config.model, dtype=setting.dtype), replace(config.optim, clip=0.5, weight_decay=0.1)
    return replace(config, engine=engine, model=model, optim=optim)


def _engine(world: int, setting: Setting):
    from lr2train.model import load
    from lr2train.parallel.mesh import make_mesh
    from lr2train.training.deepspeed.engine import Engine
    from lr2train.training.deepspeed.start import start_deepspeed

    start_deepspeed(torch.device("cpu"))
    config = _config(world, setting)
    return Engine(config, make_mesh(1), factors(), load.config_of(config.model), torch.device("cpu"))


def _train(engine, steps: range) -> list[float]:
    """Losses of the steps; each has a long and a short micro-batch on every rank, and clips its gradient."""
    first = [2 * (engine.mesh.dp_rank + engine.mesh.dp_size * step) for step in steps]
    return [engine.step([segment(number + 1), segment(number % 10 + 2)], lr=1e-2).loss for number in first]


@contextmanager
def _gathered() -> Iterator[Counter]:
    """Counts the bytes that all-gathers bring to this rank, by the ranks of their group."""
    from deepspeed.runtime.zero import partition_parameters

    own, found = partition_parameters._dist_allgather_fn, Counter()

    def count(part, whole, group):
        found[group.size()] += whole.numel() * whole.itemsize - part.numel() * part.itemsize
        return own(part, whole, group)

    with mock.patch.object(partition_parameters, "_dist_allgather_fn", count):
        yield found


@torch.no_grad()
def _plain_loss(folder: Path) -> float:
    """Of the written model on the segment that is measured, document by document."""
    from lr2train.model import load

    batch, total = segment(2), 0.0
    model = load.load_whole(folder)
    tokens, labels = torch.from_numpy(batch.tokens).long(), torch.from_numpy(labels_of(batch)).long()
    for start, stop in batch.spans:
        logits = model(tokens[None, start:stop]).logits[0].double()
        total += torch.nn.functional.cross_entropy(logits, labels[start:stop], reduction="sum", ignore_index=-100)
    return float(total) / batch.n_target_tokens


def faults(found: Outcome, baseline: Outcome, dtype: str) -> list[str]:
    """What is wrong with an outcome; empty where nothing is."""
    bound = ROUNDING[dtype]
    wrong = ["the resumed losses are others"] if found.resumed != found.losses[SAVED:] else []
    wrong += ["the losses are not those of float32"] if error_of(found, baseline) > bound else []
    off = abs(found.written / found.measured - 1)
    return wrong + (["the written model is not the trained one"] if off > bound else [])


def error_of(found: Outcome, baseline: Outcome) -> float:
    """The largest relative error of a loss."""
    return max(abs(loss / other - 1) for loss, other in zip(found.losses, baseline.losses, strict=True))


def refusal_of(setting: Setting) -> UserError | None:
    """How the config of a setting is refused; None where it is not."""
    typed = [f"engine.deepspeed.zero_optimization.{name}.device=cpu" for name in OFFLOADS[setting.offload]]
    try:
        compose("train", ["name=x", f"engine.zero_stage={setting.stage}", f"model.dtype={setting.dtype}", *typed])
    except UserError as error:
        return error
    return None


BASELINE = Setting(3, "float32")
SOME = [
    BASELINE, Setting(0, "float32"), Setting(1, "bfloat16", "optimizer"), Setting(3, "bfloat16", "parameters"),
    Setting(2, "float32", reduce_dtype="bfloat16"),
]  # fmt: skip
HALF_ON_CPU = torch.ops.mkldnn._is_mkldnn_fp16_supported()  # only some CPUs compute in float16


def test_settings_train_alike_resume_bit_for_bit_and_write_their_model(tmp_path):
    found = run_ranks(outcomes, 2, SOME, tmp_path, tmp_path=tmp_path, timeout_s=240)[0]
    for setting, one in zip(SOME, found, strict=True):
        coarse = "bfloat16" if setting.reduce_dtype == "bfloat16" else setting.dtype
        assert not faults(one, found[0], coarse), setting
    plain, reduced = found[0], found[-1]
    assert plain.losses != reduced.losses, "engine.reduce_dtype has no effect"


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        (Setting(0, "bfloat16"), "engine.zero_stage=1"),
        (Setting(0, "float16", "optimizer"), "engine.zero_stage=1"),
        (Setting(0, "float32", "optimizer"), "engine.zero_stage=1"),
        (Setting(2, "float32", "parameters"), "engine.zero_stage=3"),
    ],
)
def test_what_deepspeed_cannot_run_or_leaves_out_is_refused_with_a_remedy_that_leads_on(setting, remedy):
    error = refusal_of(setting)
    assert error is not None
    assert remedy_of(error) == remedy
    assert refusal_of(setting._replace(stage=int(remedy[-1]))) is None


def secondary(rank: int, world: int, folder: Path) -> list[Outcome]:
    """Plain ZeRO-3, and a secondary copy of the weights in every half of the ranks."""
    plain = Setting(3, "bfloat16")
    return outcomes(rank, world, [plain, plain._replace(hpz=2)], folder)


def test_a_secondary_copy_changes_no_bit_and_keeps_gathers_inside_the_group(tmp_path):
    for plain, copied in run_ranks(secondary, 4, tmp_path, tmp_path=tmp_path, timeout_s=240):
        assert copied[:5] == plain[:5]
        assert copied.gathered.keys() == {2, 4}
        assert plain.gathered.keys() == {4}
        # The first pass of a step alone asks all ranks; by default the second and the third do, too.
        assert copied.gathered[4] < 0.4 * plain.gathered[4]


def engine_on_three(rank: int, world: int) -> str:
    with pytest.raises(UserError) as refused:
        _engine(world, Setting(3, "float32", hpz=2))
    return str(refused.value)


def test_a_secondary_copy_needs_groups_of_equal_size(tmp_path):
    text = run_ranks(engine_on_three, 3, tmp_path=tmp_path)[0]
    assert "zero_hpz_partition_size=2 does not divide the 3 ranks" in text
