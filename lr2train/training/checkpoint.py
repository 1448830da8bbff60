"""Checkpoints of the engine: written whole, only then named the latest, and read by any number of ranks that divides the work.

    checkpoints/step_00000300/      DeepSpeed's shard files, one or two a rank
    checkpoints/latest.json         {step, tag, world}: the checkpoint that a resumed run reads

Choice: DeepSpeed writes, and reads where the number of ranks is the same; where it is another, every rank reads its new share of the weights and
of AdamW's moments out of the old shards (``partitions``), bit for bit. There is no random state to keep: nothing is dropped out, and what a step
holds is a function of its number. Cost: reading on other ranks knows DeepSpeed's file layout; ZeRO's optimizer on NVMe keeps its state elsewhere
and wants the same number of ranks.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lr2train import io, run
from lr2train.config import UserError
from lr2train.parallel import control
from lr2train.training import partitions

# What a cut or foreign file makes torch.load, and us afterwards, raise.
_UNREADABLE = (OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError)
_WRITER = ("PytorchStreamWriter", "inline_container")  # torch's: what it cannot write, as on a full disk, is a RuntimeError that names it


def save(engine: Any, folder: Path, step: int, keep: int) -> None:
    """Write a checkpoint and only then name it the latest; older ones beyond ``keep`` go. A collective.

    Args:
        engine: DeepSpeed's.
        folder: of all checkpoints of the run.
        step: steps done so far.
        keep: how many to keep, this one included.

    Raises:
        UserError: there is no room for it, on the rank that found none; the checkpoint before stays the latest.
    """
    tag = f"step_{step:08d}"
    if control.rank() == 0 and (folder / tag).exists():
        shutil.rmtree(folder / tag)  # a killed run began it, perhaps on more ranks, whose files would be left between ours
    dist.barrier()
    with _writing(folder / tag):
        engine.save_checkpoint(str(folder), tag=tag, client_state={"step": step}, save_latest=False)
    dist.barrier()
    if control.rank() == 0:
        with _writing(folder / tag):
            io.write_json(folder / "latest.json", {"step": step, "tag": tag, "world": control.world()})
        _forget(folder, tag, keep)
    dist.barrier()


@contextlib.contextmanager
def _writing(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and not any(name in str(error) for name in _WRITER):
            raise  # a rank is gone, say
        raise UserError(
            f"the checkpoint {checkpoint} cannot be written ({_brief(error)}); free some room on that disk, and run the same command again to go "
            "on from the checkpoint before it"
        ) from error


def _forget(folder: Path, newest: str, keep: int) -> None:
    """Remove checkpoints before the newest; a later one was begun by a killed run, or a user has gone back: it takes nobody's place."""
    until_now = sorted(path for path in folder.glob("step_*") if path.name <= newest)
    for old in until_now[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def load(engine: Any, folder: Path) -> int:
    """Read the latest complete checkpoint into a fresh engine; returns the number of steps done, 0 where there is none. A collective.

    Args:
        engine: DeepSpeed's, on the same or another number of ranks than wrote the checkpoint.
        folder: of all checkpoints of the run.

    Raises:
        UserError: the checkpoint is damaged, is not there on every machine, or cannot be read by this number of ranks; on every rank.
    """
    latest = folder / "latest.json"
    # Rank 0 looks: what another machine's cache shows may differ.
    written, *_ = control.together(lambda: io.read_json(latest) if control.rank() == 0 and latest.exists() else None)
    if written is None:
        return 0
    checkpoint, world = folder / written["tag"], int(written["world"])
    stage = engine.zero_optimization_stage()
    control.together(lambda: _refuse_incomplete(checkpoint, latest, stage, world))
    if world == control.world() or not _optimizer_files(checkpoint):
        control.together(lambda: _refuse_damaged(checkpoint, latest, stage))
        path, _ = engine.load_checkpoint(str(folder), tag=written["tag"])
        assert path is not None, "DeepSpeed does not find what was looked at before"
    else:
        _load_on_other_ranks(engine, checkpoint, latest, stage, world)
    return int(written["step"])


def _refuse_incomplete(checkpoint: Path, latest: Path, stage: int, world: int) -> None:
    if not checkpoint.is_dir():
        raise UserError(
            f"the checkpoint {checkpoint} is not there on every machine; put runs_folder on a file system that all machines share, or remove "
            f"{latest} to start over"
        )
    found = set(os.listdir(checkpoint))
    wanted = [_weights_file(stage, number) for number in (range(world) if stage == 3 else [0])]
    missing = [name for name in wanted if name not in found]
    n_optimizers = len(_optimizer_files(checkpoint))
    if stage > 0 and n_optimizers != world:
        missing.append(f"{world - n_optimizers} of {world} optim_states files")
    if missing:
        raise UserError(_unreadable(checkpoint, latest, f"it lacks {missing[0]}"))


def _refuse_damaged(checkpoint: Path, latest: Path, stage: int) -> None:
    """Open this rank's own files: the index of a file stands at its end, so that one which was cut short cannot be opened."""
    own = [checkpoint / _weights_file(stage, control.rank()), *_optimizer_files(checkpoint)[control.rank() :][:1]]
    try:
        for file in own:
            _opened(file)
    except _UNREADABLE as error:
        raise UserError(_unreadable(checkpoint, latest, f"{file.name}: {_brief(error)}")) from error


def _opened(file: Path) -> dict[str, Any]:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def _weights_file(stage: int, rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"


def _optimizer_files(checkpoint: Path) -> list[Path]:
    """The shards of the optimizer, in order of rank; none where every rank holds all of it."""
    return sorted(
        checkpoint.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"), key=lambda path: int(path.name.split("_rank_")[1].split("_")[0])
    )


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _unreadable(checkpoint: Path, latest: Path, reason: str) -> str:
    return (
        f"the checkpoint {checkpoint} cannot be read ({reason}); restore the folder, name an older checkpoint in {latest}, or remove that file to "
        "start over"
    )


def _load_on_other_ranks(engine: Any, checkpoint: Path, latest: Path, stage: int, world: int) -> None:
    """Read what ``world`` ranks have written; nothing is changed before every rank has read its share."""
    begin = time.monotonic()
    share: list[tuple[dict[str, Any], dict[str, Any]]] = []
    control.together(lambda: share.append(_share(engine, checkpoint, latest, stage, world)))
    common, state = share.pop()
    _hand_over(engine, common, state, stage)
    run.say(
        "checkpoint", f"{checkpoint} of {world} ranks was divided anew over {control.world()} ranks in {time.monotonic() - begin:.1f} s"
    )


def _share(engine: Any, checkpoint: Path, latest: Path, stage: int, world: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What all ranks have in common, and this rank's own state."""
    if stage not in partitions.FORMS or engine.zero_nvme_offload_optimizer():
        how = "with its optimizer on NVMe" if stage in partitions.FORMS else f"by ZeRO stage {stage} with a divided optimizer"
        raise UserError(
            f"the checkpoint {checkpoint} was written by {world} ranks {how}, which this job's {control.world()} ranks cannot read; start it "
            f"with {world} ranks, or give a new name= to start over"
        )
    try:
        common = _opened(checkpoint / _weights_file(stage, 0))
        written, sizes = (_sizes(shapes) for shapes in (common["param_shapes"], engine._get_zero_param_shapes()))
        files, form = _optimizer_files(checkpoint), partitions.FORMS[stage]
        live = engine.optimizer.state_dict()
        return common, partitions.repartitioned(files, written, form, live, sizes, control.rank(), control.world())
    except _UNREADABLE as error:
        raise UserError(_unreadable(checkpoint, latest, _brief(error))) from error


def _sizes(shapes: list[dict[str, torch.Size]]) -> partitions.Sizes:
    return [{name: shape.numel() for name, shape in group.items()} for group in shapes]


def _hand_over(engine: Any, common: dict[str, Any], state: dict[str, Any], stage: int) -> None:
    """What DeepSpeed's own load_checkpoint does with a state that it has read."""
    prepare, finish = (getattr(engine.optimizer, f"checkpoint_event_{name}", None) for name in ("prologue", "epilogue"))
    if prepare:
        prepare()
    if stage != 3:  # every rank holds all weights in the model's dtype; in stage 3 they follow from the fp32 ones
        engine.module.load_state_dict(common["module"])
    engine.optimizer.load_state_dict({control.rank(): state}, load_from_fp32_weights=True)
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, common[name])
    if finish:
        finish()
