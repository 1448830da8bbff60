"""Checkpoints: any number of ranks goes on from them bit for bit; a damaged, unfinished or foreign checkpoint is
refused in one sentence.
"""

import contextlib
import json
import os
import resource
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import RankError, run_ranks

from lr2train import io
from lr2train.config import UserError
from lr2train.parallel.failure import told_to_all
from lr2train.training.deepspeed import partitions, saving, shard_files
from lr2train.training.deepspeed.checkpoint import Checkpoints
from tests.training.deepspeed.test_engine import RELEASE_ALL, config_for, factors, segment

LONG, SHORT = [1, 3, 5, 7], [2, 4, 6, 10]  # the segments of a step: four of one window, for one, two and four ranks
STEPS = [LONG, SHORT, LONG, SHORT]
SAVED = 2
SMALL_GROUPS = {"zero_optimization": {"sub_group_size": 1000, "stage3_param_persistence_threshold": 0}}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
# Overrides of the engine and the model, and the relative error of a later loss.
# fp32: sums in another order. bfloat16: eight bits of mantissa.
VARIANTS = {
    "stage 3": ({"deepspeed": RELEASE_ALL}, {}, 1e-6),
    "stage 3, kept parameters": ({"deepspeed": {}}, {}, 1e-6),  # below DeepSpeed's threshold: whole on every rank
    "stage 3, small groups": (
        {"deepspeed": SMALL_GROUPS},
        {},
        1e-6,
    ),  # groups are cut by a rank's share: two and four ranks have others
    "stage 3, offload": ({"deepspeed": OFFLOAD}, {}, 1e-6),
    "stage 3, bfloat16": ({"deepspeed": RELEASE_ALL}, {"dtype": "bfloat16"}, 1e-2),
    "stage 2": ({"zero_stage": 2, "deepspeed": {}}, {}, 1e-6),
    "stage 1": ({"zero_stage": 1, "deepspeed": {}}, {}, 1e-6),
    "stage 1, bfloat16": ({"zero_stage": 1, "deepspeed": {}}, {"dtype": "bfloat16"}, 1e-2),
    "stage 0": ({"zero_stage": 0, "deepspeed": {}}, {}, 1e-6),
}
Trained = tuple[dict[int, float], dict[str, np.ndarray]]


def engine_of(world: int, sp: int, variant: str):
    from lr2train.model import load
    from lr2train.parallel.mesh import make_mesh
    from lr2train.training.deepspeed.engine import Engine
    from lr2train.training.deepspeed.start import start_deepspeed

    start_deepspeed(torch.device("cpu"))
    engine, model, _ = VARIANTS[variant]
    config = config_for(sp, len(LONG) * sp // world, world)
    config = replace(
        config,
        engine=replace(config.engine, **engine),
        model=replace(config.model, **model),
        optim=replace(config.optim, clip=0.5, weight_decay=0.1),
    )
    return Engine(config, make_mesh(sp), factors(), load.config_of(config.model), torch.device("cpu"))


def trained(rank: int, world: int, cases: list[tuple[int, str]], folder: Path) -> list[Trained]:
    """Losses by step, and the whole optimizer state after ``SAVED`` steps; for each (sp, variant), from its checkpoint
    if there is one.
    """
    return [train(world, sp, folder / variant, variant) for sp, variant in cases]


def train(world: int, sp: int, folder: Path, variant: str) -> Trained:
    import torch.distributed as dist

    engine = engine_of(world, sp, variant)
    done, losses = engine.load(Checkpoints(folder)), {}
    state = whole_state(engine) if done else {}
    for step in range(done, len(STEPS)):
        mine = STEPS[step][engine.mesh.dp_rank :: engine.mesh.dp_size]
        losses[step] = engine.step([segment(i) for i in mine], lr=1e-2).loss
        if step + 1 == SAVED:
            engine.save(Checkpoints(folder), SAVED, wait=False)  # the next steps must not change what is written
            state = whole_state(engine)
    engine.finish_saving()
    dist.barrier()
    engine._engine.destroy()
    return losses, state


def whole_state(engine) -> dict[str, np.ndarray]:
    """Master weights and moments of every parameter, gathered by DeepSpeed, and the options and step counts of torch's
    optimizer.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer, found = engine._engine.optimizer, {}
    if hasattr(
        optimizer, "_lazy_init_hp_params_optimizer_state"
    ):  # ZeRO-1 and 2: where a parameter's moments lie is looked up once
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.model.named_parameters() if engine.config.engine.zero_stage else ():
        found[name] = safe_get_full_fp32_param(parameter).numpy()
        found |= {
            f"{name}/{key}": safe_get_full_optimizer_state(parameter, key).numpy() for key in ("exp_avg", "exp_avg_sq")
        }
    inner = getattr(optimizer, "optimizer", optimizer)
    found |= {
        f"{key}{number}": np.array(group[key])
        for number, group in enumerate(inner.param_groups)
        for key in ("weight_decay", "betas")
    }
    return found | {"steps": np.unique([float(state["step"]) for state in inner.state.values()])}


# All begin on two ranks. Ranks that go on -> cases (sp, variant): more ranks and fewer.
Later = dict[int, list[tuple[int, str]]]
EVERY_WAY: Later = {
    1: [
        (1, "stage 3, small groups"),
        (1, "stage 3, offload"),
        (1, "stage 3, bfloat16"),
        (1, "stage 1"),
        (1, "stage 0"),
    ],
    4: [
        (1, "stage 3"),
        (2, "stage 3"),
        (2, "stage 3, small groups"),
        (1, "stage 3, kept parameters"),
        (1, "stage 2"),
        (1, "stage 1, bfloat16"),
    ],
}
# Each form of a state once: divided by parameter or by group, with a copy of the weights, on the host, undivided.
# `test_a_state_divided_anew_is_what_the_new_ranks_would_have_written` has all numbers of ranks.
EVERY_FORM: Later = {
    1: [(1, "stage 3, offload"), (1, "stage 3, bfloat16"), (1, "stage 0")],
    4: [(2, "stage 3, small groups"), (1, "stage 1, bfloat16")],
}


@pytest.mark.parametrize(
    "later",
    [pytest.param(EVERY_FORM, id="every form"), pytest.param(EVERY_WAY, id="every way", marks=pytest.mark.slow)],
)
def test_any_number_of_ranks_goes_on_bit_for_bit_where_two_were(later, tmp_path):
    variants = list(dict.fromkeys(variant for cases in later.values() for _, variant in cases))
    begun = run_ranks(trained, 2, [(1, v) for v in variants], tmp_path, tmp_path=tmp_path, timeout_s=240)[0]
    undisturbed = dict(zip(variants, begun, strict=True))
    for world, cases in later.items():
        found = run_ranks(trained, world, cases, tmp_path, tmp_path=tmp_path, timeout_s=240)[0]
        for (sp, variant), (losses, state) in zip(cases, found, strict=True):
            case = f"{variant}, {world} ranks, sp {sp}"
            expected, written = undisturbed[variant]
            assert state.keys() == written.keys(), case
            assert state["steps"] == SAVED, case
            for name, value in written.items():
                np.testing.assert_array_equal(state[name], value, err_msg=f"{case}: {name}")
            assert losses == pytest.approx(
                {step: expected[step] for step in range(SAVED, len(STEPS))}, rel=VARIANTS[variant][2]
            ), case


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def zeros(file: Path) -> None:
    """As a file system leaves a block that never reached the disk."""
    middle = file.stat().st_size // 2
    with file.open("r+b") as opened:
        opened.seek(middle)
        opened.write(bytes(512))


def flipped_bit(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 3] ^= 0x40
    file.write_bytes(raw)


def swapped(file: Path) -> None:
    """The shards of two ranks have changed places."""
    other = file.with_name(
        file.name.replace("pp_rank_0", "pp_rank_x").replace("pp_rank_1", "pp_rank_0").replace("pp_rank_x", "pp_rank_1")
    )
    one, two = file.read_bytes(), other.read_bytes()
    file.write_bytes(two)
    other.write_bytes(one)


HARMS = {
    cut_short: "bytes",
    Path.unlink: "is missing",
    zeros: "checksum",
    flipped_bit: "checksum",
    swapped: "",
}  # swapped: of other sizes or not
SHARDS = ("zero_pp_rank_1_mp_rank_00_optim_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def damaged_ones(rank: int, world: int, alone: Path, folder: Path) -> list[str]:
    """What a rank says of each broken checkpoint, and the loss after reading a sound one with the same engine."""
    import torch.distributed as dist

    engine = engine_of(world, 1, "stage 3")
    engine.save(Checkpoints(folder, keep=2), 1)
    engine.save(Checkpoints(folder, keep=2), 2)
    said = []
    for harm in HARMS:
        for name in SHARDS:
            folder_2 = folder / "step_00000002"
            sound = {path: path.read_bytes() for path in folder_2.iterdir()}
            dist.barrier()
            if rank == 0:
                harm(folder_2 / name)
            dist.barrier()
            with pytest.raises(UserError) as raised:
                engine.load(Checkpoints(folder))
            said.append(str(raised.value))
            dist.barrier()
            if rank == 0:
                for path, data in sound.items():
                    path.write_bytes(data)
            dist.barrier()
    assert engine.load(Checkpoints(alone)) == SAVED
    mine = STEPS[SAVED][engine.mesh.dp_rank :: engine.mesh.dp_size]
    return [*said, f"{engine.step([segment(i) for i in mine], lr=1e-2).loss:.5f}"]


def test_a_damaged_checkpoint_is_one_sentence_on_every_rank_and_changes_nothing(tmp_path):
    [(losses, _)] = run_ranks(trained, 1, [(1, "stage 3")], tmp_path, tmp_path=tmp_path, timeout_s=120)[0]
    first, second = run_ranks(damaged_ones, 2, tmp_path / "stage 3", tmp_path / "two", tmp_path=tmp_path, timeout_s=120)
    assert first == second
    *said, loss = first
    for text, reason in zip(said, [reason for reason in HARMS.values() for _ in SHARDS], strict=True):
        assert "step_00000002 cannot be used" in text and reason in text and "pp_rank_" in text, text
        assert text.endswith("set engine.resume_from=1 to go on from step_00000001, the newest whole one"), text
    assert float(loss) == pytest.approx(losses[SAVED], abs=2e-5)  # printed with five digits


def other_starts(rank: int, world: int, folder: Path) -> list[str | int]:
    """The step or the error of each load, while the folder is changed and the user goes back."""
    import torch.distributed as dist

    engine, ours = engine_of(world, 1, "stage 3"), Checkpoints(folder, "this run", keep=3)
    heard: list[str | int] = []

    def load(of: Checkpoints = ours, resume_from: int | None = None) -> None:
        try:
            heard.append(engine.load(of, resume_from))
        except UserError as error:
            heard.append(str(error))
        dist.barrier()

    if rank == 0:  # a kill hit the first checkpoint
        (folder / "step_00000001").mkdir(parents=True)
        (folder / "step_00000001" / "begun.pt").write_bytes(b"0")
    dist.barrier()
    load()
    engine.save(ours, 1)
    if rank == 0:  # or came after its last file and before its name
        ours.latest.unlink()
    dist.barrier()
    load()
    for step in (2, 3):
        engine.save(ours, step)
    load(Checkpoints(folder, "another run"))
    if rank == 0:
        ours.latest.write_text('{"tag": "step_00000002"}')  # the step is the checkpoint's own
    load()
    if rank == 0:
        ours.latest.write_text("")
    load()
    load(resume_from=7)
    load(resume_from=2)
    load(resume_from=2)  # the same command again, before another checkpoint was written
    engine.save(ours, 4)
    load(resume_from=2)  # and after: it does not go back once more
    load()
    load(resume_from=2)  # once the key was left out, it does
    if rank == 0:
        (folder / "step_00000002").rename(folder / "step_00000009")
    load(resume_from=9)
    if rank == 0:
        folder.rename(folder.with_name("elsewhere"))
    dist.barrier()
    load()
    return heard


def test_a_start_reads_the_runs_own_newest_checkpoint_or_the_one_to_go_back_to(tmp_path):
    first, second = run_ranks(other_starts, 2, tmp_path / "checkpoints", tmp_path=tmp_path, timeout_s=120)
    assert first == second
    begun, named, foreign, two, lost, unknown, *steps, renamed, vanished = first
    assert (begun, named) == (0, 1), "a kill in the first checkpoint loses nothing, and the same command goes on"
    assert "another run wrote it" in foreign and "no whole checkpoint of this run is left" in foreign
    assert two == 2
    assert "latest.json is missing or damaged" in lost and "set engine.resume_from=3 " in lost
    assert "step_00000007 cannot be used (the folder is missing); set engine.resume_from=3 " in unknown
    assert steps == [2, 2, 4, 4, 2]
    assert "it holds step 2" in renamed and "no whole checkpoint" in renamed, "step 4 is of the history that was left"
    assert "the folder is missing" in vanished, "a run does not start over where its checkpoints are lost"


def runs_code(rank: int, world: int, folder: Path) -> str:
    """What a rank says of a checkpoint whose shard would run code, with a manifest that fits."""
    engine, of = engine_of(world, 1, "stage 3"), Checkpoints(folder)
    engine.save(of, 1)
    checkpoint = folder / "step_00000001"
    [file] = checkpoint.glob("*optim_states.pt")
    torch.save({"optimizer_state_dict": Runs(folder / "ran")}, file)
    manifest = io.sealed(checkpoint / "manifest.json")
    manifest["files"][file.name] |= {"bytes": file.stat().st_size, "xxh3": io.checksum(file)}
    io.seal(checkpoint / "manifest.json", manifest)
    with pytest.raises(UserError) as raised:
        engine.load(of)
    return str(raised.value)


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self):
        return Path.touch, (self._file,)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    [said] = run_ranks(runs_code, 1, tmp_path / "checkpoints", tmp_path=tmp_path, timeout_s=120)
    assert "optim_states.pt: it holds more than tensors and plain values" in said
    assert not (tmp_path / "checkpoints" / "ran").exists()


def after_kills(rank: int, world: int, folder: Path) -> list[list[str]]:
    """The checkpoints after each save, among the remains of killed runs."""
    import torch.distributed as dist

    engine = engine_of(world, 1, "stage 3")
    begun = [folder / "step_00000009" / f"zero_pp_rank_{number}_mp_rank_00_optim_states.pt" for number in range(4)]
    left = []
    for step in (6, 7, 9, 12):
        if rank == 0 and step == 7:  # four ranks went on from 6 and were killed while they wrote 9
            begun[0].parent.mkdir()
            for file in begun:
                file.write_bytes(b"the beginning of")
        dist.barrier()
        engine.save(Checkpoints(folder), step)
        left.append(
            [f"{path.name}: {len(list(path.glob('*optim_states.pt')))}" for path in sorted(folder.glob("step_*"))]
        )
        dist.barrier()  # both have looked
    return [
        *left,
        [
            json.loads(Checkpoints(folder).latest.read_text())["tag"],
            str(engine_of(world, 1, "stage 3").load(Checkpoints(folder))),
        ],
    ]


def test_remains_of_a_killed_run_are_overwritten_and_replace_no_checkpoint(tmp_path):
    for left in run_ranks(after_kills, 2, tmp_path / "checkpoints", tmp_path=tmp_path, timeout_s=120):
        assert left == [
            ["step_00000006: 2"],
            ["step_00000007: 2", "step_00000009: 4"],
            ["step_00000009: 2"],
            ["step_00000012: 2"],
            ["step_00000012", "12"],
        ]


@contextlib.contextmanager
def no_room():
    """Files of this process end at 1000 bytes: the writer sees what it sees on a full disk, a short write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def without_room(rank: int, world: int, folder: Path) -> None:
    """Rank 1 alone finds no room for its second checkpoint; every rank writes down what it heard."""
    engine = engine_of(world, 1, "stage 3")
    engine.save(Checkpoints(folder), 1)
    with pytest.raises(UserError) as raised, told_to_all(), no_room() if rank == 1 else contextlib.nullcontext():
        engine.save(Checkpoints(folder), 2)
    (folder / f"{rank}.said").write_text(str(raised.value))
    os._exit(1)  # as a verb ends: its peers wait until then


def test_a_full_disk_is_one_sentence_on_every_rank_and_the_last_checkpoint_stays(tmp_path):
    with pytest.raises(RankError):
        run_ranks(without_room, 2, tmp_path / "checkpoints", tmp_path=tmp_path, timeout_s=120)
    said = [(tmp_path / "checkpoints" / f"{rank}.said").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert said[1].startswith(
        f"rank 1: the checkpoint {tmp_path}/checkpoints/step_00000002 cannot be written (RuntimeError: "
    )
    assert said[1].endswith(
        "; free some room on that disk, and run the same command again to go on from the checkpoint before it"
    )
    assert run_ranks(step_read, 2, tmp_path / "checkpoints", tmp_path=tmp_path, timeout_s=120) == [1, 1]


def without_room_later(rank: int, world: int, folder: Path) -> list[int | str]:
    """Rank 1 alone finds no room while training goes on: the steps made, what was heard after the last, a load."""
    engine, of = engine_of(world, 1, "stage 3"), Checkpoints(folder)
    engine.save(of, 1, wait=False)
    engine.finish_saving()
    made: list[int | str] = []
    with no_room() if rank == 1 else contextlib.nullcontext():
        engine.save(of, 2, wait=False)
        for step in range(2, 100):
            engine.step([segment(i) for i in SHORT[rank::world]], lr=1e-2)
            made.append(step)
            try:
                engine.check_saving()
            except UserError as error:
                made.append(str(error))
                break
    engine.save(of, 3)  # once there is room again
    return [*made, engine.load(of)]


def test_a_disk_that_is_full_while_training_goes_on_is_heard_by_all_ranks_after_the_same_step(tmp_path):
    first, second = run_ranks(without_room_later, 2, tmp_path / "checkpoints", tmp_path=tmp_path, timeout_s=120)
    assert first == second
    *steps, said, loaded = first
    assert steps
    assert loaded == 3
    assert said.startswith(
        f"rank 1: the checkpoint {tmp_path}/checkpoints/step_00000002 cannot be written (RuntimeError"
    )


def without_memory(rank: int, world: int, folder: Path) -> list[Any]:
    """Whether a thread wrote the checkpoint, and whether all is written, where rank 1's machine has no free memory."""
    engine, of, found = engine_of(world, 1, "stage 3"), Checkpoints(folder), []
    own = saving.free_host_bytes
    for step, free in ((1, own), (2, lambda: 1000 if rank == 1 else own()), (3, own)):
        saving.free_host_bytes = free
        engine.save(of, step, wait=False)
        found.append((engine._saver._writing is not None, of.latest.exists() and step == 2))
        engine.finish_saving()
    return [*found, engine.load(of)]


def test_training_waits_for_a_checkpoint_where_a_copy_has_no_room_in_memory(tmp_path, capfd):
    for found in run_ranks(without_memory, 2, tmp_path / "checkpoints", tmp_path=tmp_path, timeout_s=120):
        assert found == [(True, False), (False, True), (True, False), 3]


def test_a_cgroup_leaves_its_limit_less_what_cannot_be_dropped(tmp_path):
    for name, text in (("max", "1000"), ("current", "800"), ("stat", "anon 500\ninactive_file 300\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert list(saving._left_in(tmp_path)) == [500]
    (tmp_path / "memory.max").write_text("max\n")
    assert list(saving._left_in(tmp_path)) == list(saving._left_in(tmp_path / "none")) == []
    assert 0 < saving.free_host_bytes() <= psutil.virtual_memory().total


def test_a_host_copy_shares_nothing_and_keeps_what_is_shared():
    whole = torch.arange(12.0)
    state = {
        "a": whole[2:5],
        "b": [whole.view(3, 4).t(), (torch.tensor(3), "x")],
        "c": OrderedDict(d=whole[:0]),
        5: {1},
    }
    copied = shard_files.on_host(state)
    assert shard_files.n_bytes(state) == shard_files.n_bytes(copied) == 12 * 4 + 8
    torch.testing.assert_close(copied["b"][0], whole.view(3, 4).t(), rtol=0, atol=0)
    assert copied["b"][0].stride() == (1, 4)
    assert type(copied["c"]) is OrderedDict
    whole.zero_()
    state[5].add(2)
    assert copied["a"].tolist() == [2.0, 3.0, 4.0]
    assert copied["b"][1][1] == "x"
    assert copied[5] == {1}


def step_read(rank: int, world: int, folder: Path) -> int:
    return engine_of(world, 1, "stage 3").load(Checkpoints(folder))


# ---- parameter shards alone, without ranks ----

GROUPS = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=3)
FORMS = {"by parameter": partitions.STAGES[3], "by group": partitions.STAGES[1]}


def plain_parts(
    groups: list[dict[str, torch.Tensor]], world: int, form: partitions.StageFormat
) -> list[list[torch.Tensor]]:
    """By rank and group, in whole vectors: the reference."""

    def cut(whole: torch.Tensor, multiple: int) -> torch.Tensor:
        return torch.nn.functional.pad(whole, (0, -len(whole) % (multiple * world))).view(world, -1)

    if form is FORMS["by parameter"]:
        parts = [torch.cat([cut(values, 1) for values in group.values()], dim=1) for group in groups]
    else:
        parts = [cut(torch.cat(list(group.values())), partitions.ALIGNMENT) for group in groups]
    return [[part[rank].clone() for part in parts] for rank in range(world)]


def plain_state(groups: list[dict[str, torch.Tensor]], rank: int, world: int, form: partitions.StageFormat) -> dict:
    """A rank's state as ZeRO has it; moments are told from weights by an offset, which padding has not."""
    moved = [{name: values + 0.5 for name, values in group.items()} for group in groups]
    moments = [{"step": torch.tensor(7.0), "exp_avg": part} for part in plain_parts(moved, world, form)[rank]]
    options = [{"weight_decay": 0.1, "params": list(range(len(groups)))}]
    return {
        form.weights: plain_parts(groups, world, form)[rank],
        form.optimizer: {"state": dict(enumerate(moments)), "param_groups": options},
    }


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@settings(max_examples=40)
@given(groups=GROUPS, old=st.integers(1, 7), new=st.integers(1, 7), cut_anew=st.booleans())
def test_a_state_divided_anew_is_what_the_new_ranks_would_have_written(form, groups, old, new, cut_anew):
    numbers = iter(range(10**6))
    before = [
        {f"{g}.{n}": torch.tensor([float(next(numbers)) for _ in range(numel)]) for n, numel in enumerate(group)}
        for g, group in enumerate(groups)
    ]
    after = [{name: values} for group in before for name, values in group.items()] if cut_anew else before
    shards = [plain_state(before, rank, old, form) for rank in range(old)]
    sizes, sizes_after = (
        [{name: len(values) for name, values in group.items()} for group in part] for part in (before, after)
    )
    for rank in range(new):
        expected = plain_state(after, rank, new, form)
        empty = {**expected, form.weights: [torch.zeros_like(part) for part in expected[form.weights]]}
        found = partitions.repartitioned(shards.__getitem__, old, sizes, form, empty, sizes_after, rank, new)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("divide", [partitions.by_parameter, partitions.by_group])
@given(groups=GROUPS, world=st.integers(1, 9))
def test_every_element_has_one_place(divide, groups, world):
    sizes = [{f"{g}.{n}": numel for n, numel in enumerate(group)} for g, group in enumerate(groups)]
    found = divide(sizes, world)
    for group in sizes:
        for name, numel in group.items():
            slices = found.slices[name]
            assert [i for one in slices for i in range(one.start, one.start + one.numel)] == list(range(numel))
    taken = [
        (one.rank, one.group, i)
        for slices in found.slices.values()
        for one in slices
        for i in range(one.flat_start, one.flat_start + one.numel)
    ]
    assert len(set(taken)) == len(taken)
    assert all(rank < world and 0 <= i < found.shard_numels[group] for rank, group, i in taken)


def test_another_way_of_dividing_is_refused():
    form, groups = FORMS["by group"], [{"w": torch.arange(5.0)}]
    for change in ({form.weights: [torch.zeros(7)]}, {"param_alignment_paddings": [[3]]}):
        with pytest.raises(UserError, match="go on with the number of ranks that wrote the checkpoint"):
            partitions.repartitioned(
                {}.__getitem__, 1, [{"w": 5}], form, {**plain_state(groups, 0, 1, form), **change}, [{"w": 5}], 0, 1
            )
