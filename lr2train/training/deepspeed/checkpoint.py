"""Checkpoints of the engine: written whole, checked before they are read, and read by any number of ranks that divides the work.

    checkpoints/step_00000300/*.pt            DeepSpeed's shard files, one or two a rank
    checkpoints/step_00000300/manifest.json   the step, the ranks, the run, and size, checksum and rank of every shard file
    checkpoints.latest.json                   {tag}: the checkpoint that a resumed run reads; beside the folder, so that a folder that is lost is missed

Choice: DeepSpeed writes, and reads where the number of ranks is the same. With another number every rank reads its new share of the weights and of
AdamW's moments out of the old shards (``partitions``), bit for bit. Shards and folders are synced to the disk before the latest one is named. A
start compares every shard with its checksum and refuses the checkpoint of another run: each rank hashes its own files while it reads them, or, on
another number of ranks, a share of all files beforehand. Shards are read as data alone
(``weights_only``), so nothing in a file is executed. There is no random state to keep: nothing is dropped out, and a step's data follows from its
number. Cost: reading on other ranks knows DeepSpeed's file layout; an optimizer on NVMe keeps its state elsewhere and wants the same number of
ranks.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lr2train import io, progress, ranks
from lr2train.config import UserError
from lr2train.parallel import control
from lr2train.training.deepspeed import partitions

MANIFEST = "manifest.json"
_STEP = re.compile(r"step_\d{8}")  # other names are the user's own copies
# What a cut or foreign file makes torch.load, and us afterwards, raise.
_UNREADABLE = (OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError)
_WRITER = ("PytorchStreamWriter", "inline_container")  # torch's: what it cannot write, as on a full disk, is a RuntimeError that names it


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run.

    Attributes:
        folder: where they lie.
        run: fingerprint of all that decides what the run computes; a checkpoint of another run is refused.
        keep: how many to keep.
    """

    folder: Path
    run: str = ""
    keep: int = 1

    @property
    def latest(self) -> Path:
        """The file that names the newest one."""
        return self.folder.with_name(f"{self.folder.name}.latest.json")

    @property
    def steps(self) -> list[Path]:
        """The folders of all checkpoints, the oldest first, whole or not."""
        return sorted(path for path in self.folder.glob("step_*") if _STEP.fullmatch(path.name) and path.is_dir())


def save(engine: Any, of: Checkpoints, step: int) -> None:
    """Write a checkpoint and only then name it the latest; older ones beyond ``of.keep`` go. A collective.

    Args:
        engine: DeepSpeed's.
        of: the run's checkpoints.
        step: steps done so far.

    Raises:
        UserError: there is no room for the checkpoint; the one before stays the latest.
    """
    target = of.folder / _tag(step)
    # A killed run began it, perhaps on more ranks, whose files would be left between ours.
    control.together(lambda: _remove(target) if ranks.rank() == 0 else None)
    with _recorded(engine.checkpoint_engine) as written, _writing(target):
        engine.save_checkpoint(str(of.folder), tag=target.name, client_state={"step": step}, save_latest=False)
    files: dict[str, Any] = {}
    for mine in control.together(lambda: {path.name: _sealed(path) for path in written}):
        files |= mine
    about = {"step": step, "world": ranks.world(), "zero_stage": engine.zero_optimization_stage(), "run": of.run}
    control.together(lambda: _publish(of, target, {**about, "files": files}) if ranks.rank() == 0 else None)


def _publish(of: Checkpoints, target: Path, manifest: dict[str, Any]) -> None:
    """Make a checkpoint whose shards the disk holds the latest one."""
    with _writing(target):
        io.seal(target / MANIFEST, manifest)
        io.sync_folder(of.folder)
        _name_latest(of, target.name)
    _forget(of, target.name)


def _tag(step: int) -> str:
    return f"step_{step:08d}"


_KEEP = -1


def _name_latest(of: Checkpoints, tag: str, went_back_to: int | None = _KEEP) -> None:
    """Name the checkpoint that a resumed run reads, and the step that a user has gone back to, so that a repeated command does not go back again."""
    if went_back_to == _KEEP:
        went_back_to = (_latest(of) or {}).get("went_back_to")
    io.write_json(of.latest, {"tag": tag} | ({} if went_back_to is None else {"went_back_to": went_back_to}))


def _latest(of: Checkpoints) -> dict[str, Any] | None:
    """Which checkpoint is named the latest; None where the file is missing or damaged."""
    try:
        found = io.read_json(of.latest)
    except UserError:
        return None
    named = isinstance(found, dict) and isinstance(found.get("tag"), str) and _STEP.fullmatch(found["tag"])
    return found if named else None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _recorded(files: Any) -> Iterator[list[Path]]:
    """The paths that DeepSpeed's checkpoint engine writes on this rank meanwhile."""
    written: list[Path] = []
    own = files.save

    def save_and_record(state_dict: Any, path: str) -> None:
        own(state_dict, path)
        written.append(Path(path))

    files.save = save_and_record
    try:
        yield written
    finally:
        files.save = own


def _sealed(path: Path) -> dict[str, Any]:
    """Have the disk hold a shard file; returns what the manifest says of it."""
    with _writing(path.parent):
        io.sync_file(path)
        io.sync_folder(path.parent)
        return {"bytes": path.stat().st_size, "xxh3": io.checksum(path), "rank": ranks.rank()}


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


def _forget(of: Checkpoints, newest: str) -> None:
    """Remove what is older than the newest whole ones. A later one was begun by a killed run, or a user has gone back: it takes nobody's place."""
    until_now = [path for path in of.steps if path.name <= newest]
    kept = [path for path in until_now if (path / MANIFEST).exists()][-of.keep :]
    for old in until_now:
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)


def load(engine: Any, of: Checkpoints, resume_from: int | None = None, accept: Callable[[int], None] = lambda _: None) -> int:
    """Read a checkpoint into a fresh engine; returns the number of steps done, 0 where there is none. A collective.

    Args:
        engine: DeepSpeed's, on the same or another number of ranks than wrote the checkpoint.
        of: the run's checkpoints.
        resume_from: ``engine.resume_from``: the step to go back to, once; None reads the latest.
        accept: called on every rank with the steps done before anything is read or noted; may refuse them.

    Raises:
        UserError: checkpoints are there and none is named the latest; the checkpoint is damaged, another run's, not there on every machine, or
            cannot be read by this number of ranks; on every rank.
    """
    # Rank 0 looks: what another machine's cache shows may differ.
    chosen, *_ = control.together(lambda: _choose(of, resume_from) if ranks.rank() == 0 else None)
    accept(0 if chosen is None else int(chosen[1]["step"]))
    if chosen is None:
        return 0
    tag, manifest, went_back_to = chosen
    checkpoint, world, stage = of.folder / tag, int(manifest["world"]), engine.zero_optimization_stage()
    started = time.monotonic()
    if world == ranks.world() or not _optimizer_files(checkpoint):
        with _offering(of, checkpoint):
            mine: dict[str, dict[str, Any]] = {}
            control.together(lambda: mine.update(_read_checked(checkpoint, manifest["files"], _weights_file(stage, 0))))
        engine.checkpoint_engine.load = lambda path, map_location=None: mine[Path(path).name]
        path, _ = engine.load_checkpoint(str(of.folder), tag=tag)
        assert path is not None, "DeepSpeed does not find what was looked at before"
        mine.clear()  # the engine keeps the function
    else:
        with _offering(of, checkpoint):
            control.together(lambda: _refuse_damaged(checkpoint, manifest["files"]))
        _load_on_other_ranks(engine, checkpoint, stage, world)
    control.together(lambda: _name_latest(of, tag, went_back_to) if ranks.rank() == 0 and went_back_to != _KEEP else None)
    progress.say("checkpoint", f"{checkpoint}: checked and read in {time.monotonic() - started:.1f} s")
    return int(manifest["step"])


class _Unusable(UserError):
    """Why a checkpoint cannot be used, without what to do instead."""


def _choose(of: Checkpoints, resume_from: int | None) -> tuple[str, dict[str, Any], int | None] | None:
    """The checkpoint to read, by its tag, its manifest, and what to note as the step that was gone back to; None where the folder has none."""
    latest = _latest(of) or {}
    going_back = resume_from is not None and latest.get("went_back_to") != resume_from
    tag = _tag(resume_from) if going_back and resume_from is not None else latest.get("tag")
    if tag is None:
        if of.steps:
            raise UserError(f"{of.latest} is missing or damaged, and {of.folder} holds checkpoints; {_offer(of)}")
        if of.latest.exists():
            raise UserError(
                f"{of.latest} is damaged, and {of.folder} holds no checkpoint; bring the folder back, or choose another name= to start over"
            )
        return None
    with _offering(of, of.folder / tag):
        manifest = _manifest(of, of.folder / tag)
    return tag, manifest, resume_from if going_back or (resume_from is None and "went_back_to" in latest) else _KEEP


@contextlib.contextmanager
def _offering(of: Checkpoints, checkpoint: Path) -> Iterator[None]:
    """Say beside why a checkpoint cannot be used which other one can."""
    try:
        yield
    except UserError as error:  # of any rank, whose kind does not travel
        raise UserError(f"the checkpoint {checkpoint} cannot be used ({error}); {_offer(of, but=checkpoint)}") from error


def _offer(of: Checkpoints, but: Path | None = None) -> str:
    """The newest whole checkpoint of this run and how to go on from there, judged by the sizes of its files.

    A later one than the latest is of a history that a user has left by going back.
    """
    newest = (_latest(of) or {}).get("tag", "step_99999999")
    for checkpoint in reversed(of.steps):
        if checkpoint != but and checkpoint.name <= newest:
            with contextlib.suppress(_Unusable):
                manifest = _manifest(of, checkpoint)
                _refuse_other_sizes(checkpoint, manifest["files"])
                return f"set engine.resume_from={manifest['step']} to go on from {checkpoint.name}, the newest whole one"
    return "no whole checkpoint of this run is left besides: restore the folder, or choose another name= to start over"


def _manifest(of: Checkpoints, checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint of this run.

    Raises:
        _Unusable: the checkpoint is missing, unfinished, or another run's.
    """
    if not checkpoint.is_dir():
        raise _Unusable("the folder is missing")
    try:
        manifest = io.sealed(checkpoint / MANIFEST)
    except UserError as error:
        raise _Unusable(str(error).partition(";")[0]) from None
    if manifest["run"] != of.run:
        raise _Unusable("another run wrote it, with another model, corpus, factors or settings")
    if _tag(manifest["step"]) != checkpoint.name:
        raise _Unusable(f"it holds step {manifest['step']}")
    return manifest


def _refuse_other_sizes(checkpoint: Path, files: dict[str, Any]) -> None:
    if not checkpoint.is_dir():
        raise _Unusable("it is not there on every machine: put runs_folder on a file system that all machines share")
    for name, about in files.items():
        found = (checkpoint / name).stat().st_size if (checkpoint / name).is_file() else None
        if found != about["bytes"]:
            raise _Unusable(f"{name} " + ("is missing" if found is None else f"has {found} bytes, {about['bytes']} were written"))


def _refuse_damaged(checkpoint: Path, files: dict[str, Any]) -> None:
    """Compare the sizes of all shard files, and the checksums of this rank's share of them, with the manifest."""
    _refuse_other_sizes(checkpoint, files)
    by_size = sorted(files, key=lambda name: files[name]["bytes"])  # every rank gets large ones and small ones
    for name in by_size[ranks.rank() :: ranks.world()]:
        with _naming(name):
            _refuse_other_checksum(name, io.checksum(checkpoint / name), files)


def _read_checked(checkpoint: Path, files: dict[str, Any], weights: str) -> dict[str, dict[str, Any]]:
    """The shard files that this rank has written, and the one that holds the weights of all ranks, by name; each is checked while it is read.

    Not mapped: DeepSpeed keeps tensors of a file as the optimizer's state.
    """
    _refuse_other_sizes(checkpoint, files)
    found = {}
    for name, about in files.items():
        if about["rank"] == ranks.rank() or name == weights:
            with _naming(name), io.Hashed(checkpoint / name) as file:
                try:
                    found[name] = _opened(file, mmap=False)
                finally:  # damage is the better reason where the reading failed too
                    _refuse_other_checksum(name, file.checksum(), files)
    return found


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        raise _Unusable(f"{name}: {_brief(error)}") from error


def _refuse_other_checksum(name: str, checksum: str, files: dict[str, Any]) -> None:
    if checksum != files[name]["xxh3"]:
        raise _Unusable(f"{name} does not have the checksum that it was written with")


def _opened(file: Path | io.Hashed, mmap: bool = True) -> dict[str, Any]:
    """What a shard file holds: tensors, plain values and DeepSpeed's own few classes. Anything else in it is refused, and nothing is executed."""
    with torch.serialization.safe_globals(_classes_in_checkpoints()):
        return torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)  # type: ignore[arg-type]


def _classes_in_checkpoints() -> list[Any]:
    """DeepSpeed's own classes that its checkpoints hold beside tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def _weights_file(stage: int, rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"


def _optimizer_files(checkpoint: Path) -> list[Path]:
    """The shards of the optimizer, in order of rank; none where every rank holds all of it."""
    return sorted(
        checkpoint.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"), key=lambda path: int(path.name.split("_rank_")[1].split("_")[0])
    )


def _brief(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors and plain values, so reading it could run code"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _load_on_other_ranks(engine: Any, checkpoint: Path, stage: int, world: int) -> None:
    """Read what ``world`` ranks have written; nothing is changed before every rank has read its share."""
    share: list[tuple[dict[str, Any], dict[str, Any]]] = []
    control.together(lambda: share.append(_share(engine, checkpoint, stage, world)))
    common, state = share.pop()
    _hand_over(engine, common, state, stage)
    progress.say("checkpoint", f"{checkpoint} of {world} ranks was divided anew over {ranks.world()} ranks")


def _share(engine: Any, checkpoint: Path, stage: int, world: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What all ranks have in common, and this rank's own state."""
    if stage not in partitions.FORMS or engine.zero_nvme_offload_optimizer():
        how = "with its optimizer on NVMe" if stage in partitions.FORMS else f"by ZeRO stage {stage} with a divided optimizer"
        raise UserError(
            f"the checkpoint {checkpoint} was written by {world} ranks {how}, which this job's {ranks.world()} ranks cannot read; start it "
            f"with {world} ranks, or give a new name= to start over"
        )
    try:
        common = _opened(checkpoint / _weights_file(stage, 0))
        written, sizes = (_sizes(shapes) for shapes in (common["param_shapes"], engine._get_zero_param_shapes()))
        form, live, files = partitions.FORMS[stage], engine.optimizer.state_dict(), _optimizer_files(checkpoint)
        shards = cache(lambda rank: _opened(files[rank])["optimizer_state_dict"])
        return common, partitions.repartitioned(shards, world, written, form, live, sizes, ranks.rank(), ranks.world())
    except _UNREADABLE as error:
        raise UserError(f"the checkpoint {checkpoint} cannot be read ({_brief(error)}); restore the folder") from error


def _sizes(shapes: list[dict[str, torch.Size]]) -> partitions.Sizes:
    return [{name: shape.numel() for name, shape in group.items()} for group in shapes]


def _hand_over(engine: Any, common: dict[str, Any], state: dict[str, Any], stage: int) -> None:
    """What DeepSpeed's own load_checkpoint does with a state that it has read."""
    prepare, finish = (getattr(engine.optimizer, f"checkpoint_event_{name}", None) for name in ("prologue", "epilogue"))
    if prepare:
        prepare()
    if stage != 3:  # every rank holds all weights in the model's dtype; in stage 3 they follow from the fp32 ones
        engine.module.load_state_dict(common["module"])
    engine.optimizer.load_state_dict({ranks.rank(): state}, load_from_fp32_weights=True)
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, common[name])
    if finish:
        finish()
