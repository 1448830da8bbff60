"""Checkpoints of the engine: written whole, checked before use, and read by any number of ranks that divides the global
batch.

    checkpoints/step_00000300/*.pt            DeepSpeed's files: weights and optimizer shards, one or two for each rank
    checkpoints/step_00000300/manifest.json   the step, the ranks, the run, and size, checksum and rank of every file
    checkpoints.latest.json                   {tag}: the checkpoint that a resumed run reads

The last file lies beside the folder, so that a lost folder is noticed.

Choice: DeepSpeed says what is written, and reads where the number of ranks is the same. On another number of ranks,
every rank reads its new shard of the weights and of AdamW's moments out of the old files, bit for bit (``partitions``).
Files and folders are synced to the disk before the latest checkpoint is named. The ranks together compare every file
with its checksum: each rank the files it wrote and the weights file, or every n-th file on another number of ranks.
Another run's checkpoint is refused. No random state is kept: there is no dropout, and the data of a step follow from
its number. Writing goes on beside training (``saving``). Cost: reading on another number of ranks depends on
DeepSpeed's file format. An optimizer on NVMe keeps its state elsewhere, so it needs the same number of ranks.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lr2train import io, progress
from lr2train.config import UserError
from lr2train.parallel import control
from lr2train.ranks import rank, world
from lr2train.training.deepspeed import partitions, shard_files
from lr2train.training.deepspeed.shard_files import UNREADABLE, Unusable, brief

MANIFEST = "manifest.json"
_STEP = re.compile(r"step_\d{8}")  # folders of other names are the user's own copies
# torch.save raises a full disk as a RuntimeError that names one of these.
_WRITER = ("PytorchStreamWriter", "inline_container")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run.

    Attributes:
        folder: holds a folder for each checkpoint.
        run: fingerprint of everything that decides the run's result; the checkpoint of another run is refused.
        keep: how many to keep.
    """

    folder: Path
    run: str = ""
    keep: int = 1

    @property
    def latest(self) -> Path:
        """The file that names the newest checkpoint."""
        return self.folder.with_name(f"{self.folder.name}.latest.json")

    @property
    def steps(self) -> list[Path]:
        """The folders of all checkpoints, oldest first, finished or not."""
        return sorted(path for path in self.folder.glob("step_*") if _STEP.fullmatch(path.name) and path.is_dir())


def _tag(step: int) -> str:
    return f"step_{step:08d}"


# ---- write ----


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is not written yet.

    Attributes:
        of: the run's checkpoints.
        target: the checkpoint's folder.
        about: the manifest without its files.
        states: this rank's files: path and content. The tensors are the engine's own, until they are copied.
        put: writes a content to a path.
    """

    of: Checkpoints
    target: Path
    about: dict[str, Any]
    states: list[tuple[Path, Any]]
    put: Callable[[Any, str], None]

    def on_host(self) -> Draft:
        """The same with a copy of every tensor in host memory, which later steps do not change."""
        return replace(self, states=shard_files.on_host(self.states))

    def write(self, channel: control.Channel | None = None) -> None:
        """Write the checkpoint, then name it the latest, then remove older ones beyond ``of.keep``. A collective.

        Args:
            channel: for the messages between ranks; None: the channel of the main thread.

        Raises:
            UserError: the disk is full; the checkpoint before stays the latest.
        """
        files: dict[str, Any] = {}
        for mine in control.together(
            lambda: {path.name: self._written(path, one) for path, one in self.states}, channel
        ):
            files |= mine
        manifest = {**self.about, "files": files}
        control.together(lambda: _publish(self.of, self.target, manifest) if rank() == 0 else None, channel)

    def _written(self, path: Path, state: Any) -> dict[str, Any]:
        with _writing(self.target):
            self.put(state, str(path))
        return _synced(path)


def draft(engine: Any, of: Checkpoints, step: int) -> Draft:
    """Collect what a checkpoint holds and make its folder; no file is written. A collective.

    Args:
        engine: DeepSpeed's.
        of: the run's checkpoints.
        step: steps done so far.

    Raises:
        UserError: the folder cannot be made.
    """
    target = of.folder / _tag(step)
    # A killed run, perhaps of more ranks, may have begun this checkpoint: its files would stay between ours.
    control.together(lambda: _remove(target) if rank() == 0 else None)
    put = engine.checkpoint_engine.save
    with _collected(engine.checkpoint_engine) as states, _writing(target):
        engine.save_checkpoint(str(of.folder), tag=target.name, client_state={"step": step}, save_latest=False)
    about = {"step": step, "world": world(), "zero_stage": engine.zero_optimization_stage(), "run": of.run}
    return Draft(of, target, about, states, put)


@contextlib.contextmanager
def _collected(files: Any) -> Iterator[list[tuple[Path, Any]]]:
    """The files that DeepSpeed's checkpoint engine ``files`` is told to write inside the block; none is written."""
    collected: list[tuple[Path, Any]] = []
    own = files.save
    files.save = lambda state_dict, path: collected.append((Path(path), shard_files.without_enums(state_dict)))
    try:
        yield collected
    finally:
        files.save = own


def _synced(path: Path) -> dict[str, Any]:
    """Sync a file to the disk; returns its entry in the manifest."""
    with _writing(path.parent):
        io.sync_file(path)
        io.sync_folder(path.parent)
        return {"bytes": path.stat().st_size, "xxh3": io.checksum(path), "rank": rank()}


def _publish(of: Checkpoints, target: Path, manifest: dict[str, Any]) -> None:
    """Make a checkpoint the latest one. All its files are on the disk by now."""
    with _writing(target):
        io.seal(target / MANIFEST, manifest)
        io.sync_folder(of.folder)
        _name_latest(of, target.name)
    _forget(of, target.name)


@contextlib.contextmanager
def _writing(checkpoint: Path) -> Iterator[None]:
    """Turn an error of the disk into a sentence that names the checkpoint."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and not any(name in str(error) for name in _WRITER):
            raise  # no error of the disk: a lost rank, for example
        raise UserError(
            f"the checkpoint {checkpoint} cannot be written ({brief(error)}); free some room on that disk, "
            "and run the same command again to go on from the checkpoint before it"
        ) from error


def _forget(of: Checkpoints, newest: str) -> None:
    """Remove all but the newest ``of.keep`` finished checkpoints up to ``newest``.

    A later checkpoint was left by a killed run, or by a user who went back. It is not counted and not removed.
    """
    until_now = [path for path in of.steps if path.name <= newest]
    kept = [path for path in until_now if (path / MANIFEST).exists()][-of.keep :]
    for old in until_now:
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- the latest checkpoint ----

_AS_BEFORE = -1  # for ``went_back_to``: keep the step that is noted


def _name_latest(of: Checkpoints, tag: str, went_back_to: int | None = _AS_BEFORE) -> None:
    """Name the checkpoint that a resumed run reads.

    ``went_back_to`` notes the step of ``engine.resume_from``, so that the same command does not go back a second time.
    """
    if went_back_to == _AS_BEFORE:
        went_back_to = (_latest(of) or {}).get("went_back_to")
    io.write_json(of.latest, {"tag": tag} | ({} if went_back_to is None else {"went_back_to": went_back_to}))


def _latest(of: Checkpoints) -> dict[str, Any] | None:
    """The content of ``checkpoints.latest.json``; None where the file is missing or damaged."""
    try:
        found = io.read_json(of.latest)
    except UserError:
        return None
    named = isinstance(found, dict) and isinstance(found.get("tag"), str) and _STEP.fullmatch(found["tag"])
    return found if named else None


def _choose(of: Checkpoints, resume_from: int | None) -> tuple[str, dict[str, Any], int | None] | None:
    """The checkpoint to read: (tag, manifest, step to note as gone back to). None where the run has no checkpoint."""
    latest = _latest(of) or {}
    going_back = resume_from is not None and latest.get("went_back_to") != resume_from
    tag = _tag(resume_from) if going_back and resume_from is not None else latest.get("tag")
    if tag is None and not of.latest.exists() and len(of.steps) == 1:
        # A kill hit the first checkpoint before its name was written: the checkpoint is whole, or nothing is lost.
        tag = of.steps[0].name
        if not (of.folder / tag / MANIFEST).exists():
            return None
    if tag is None:
        if of.steps:
            raise UserError(f"{of.latest} is missing or damaged, and {of.folder} holds checkpoints; {_offer(of)}")
        if of.latest.exists():
            raise UserError(
                f"{of.latest} is damaged, and {of.folder} holds no checkpoint; restore the folder, or choose another "
                "name= to start over"
            )
        return None
    with _offering(of, of.folder / tag):
        manifest = _manifest(of, of.folder / tag)
    return (
        tag,
        manifest,
        resume_from if going_back or (resume_from is None and "went_back_to" in latest) else _AS_BEFORE,
    )


def _manifest(of: Checkpoints, checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint of this run.

    Raises:
        Unusable: the checkpoint is missing, unfinished, or written by another run.
    """
    if not checkpoint.is_dir():
        raise Unusable("the folder is missing")
    try:
        manifest = io.sealed(checkpoint / MANIFEST)
    except UserError as error:
        raise Unusable(str(error).partition(";")[0]) from None
    if manifest["run"] != of.run:
        raise Unusable("another run wrote it, with another model, corpus, factors or settings")
    if _tag(manifest["step"]) != checkpoint.name:
        raise Unusable(f"it holds step {manifest['step']}")
    return manifest


@contextlib.contextmanager
def _offering(of: Checkpoints, checkpoint: Path) -> Iterator[None]:
    """Add to the reason why a checkpoint cannot be used which other checkpoint can."""
    try:
        yield
    except UserError as error:  # not Unusable: the error may come from another rank, and its class does not travel
        raise UserError(
            f"the checkpoint {checkpoint} cannot be used ({error}); {_offer(of, but=checkpoint)}"
        ) from error


def _offer(of: Checkpoints, but: Path | None = None) -> str:
    """How to go on from the newest whole checkpoint of this run. File sizes alone decide what is whole.

    A checkpoint later than the latest is not offered: it belongs to a history that the user left by going back.
    """
    for checkpoint, manifest in whole_ones(of):
        if checkpoint != but and manifest["run"] == of.run:
            return f"set engine.resume_from={manifest['step']} to go on from {checkpoint.name}, the newest whole one"
    return "no whole checkpoint of this run is left besides: restore the folder, or choose another name= to start over"


def whole_ones(of: Checkpoints) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The whole checkpoints of a folder and their manifests, newest first, whichever run wrote them.

    File sizes alone decide what is whole. A checkpoint later than the latest belongs to a history that the user left by
    going back, and is left out.
    """
    newest = (_latest(of) or {}).get("tag", "step_99999999")
    for checkpoint in reversed(of.steps):
        if checkpoint.name <= newest:
            with contextlib.suppress(UserError):
                manifest = io.sealed(checkpoint / MANIFEST)
                shard_files.refuse_other_sizes(checkpoint, manifest["files"])
                if _tag(manifest["step"]) == checkpoint.name:
                    yield checkpoint, manifest


# ---- read ----


def load(
    engine: Any,
    of: Checkpoints,
    resume_from: int | None = None,
    accept: Callable[[int], None] = lambda _: None,
) -> int:
    """Read a checkpoint into a fresh engine; returns the number of steps done, 0 where the run has no checkpoint. A
    collective.

    Args:
        engine: DeepSpeed's, on the number of ranks that wrote the checkpoint or on another one.
        of: the run's checkpoints.
        resume_from: ``engine.resume_from``: the step to go back to, once; None reads the latest checkpoint.
        accept: called on every rank with the steps done, before anything is read or noted; may raise to refuse them.

    Raises:
        UserError: no checkpoint is named the latest although some exist, or the checkpoint is damaged, of another run,
            not visible on every machine, or not readable by this number of ranks; on every rank.
    """
    # Rank 0 alone chooses, because the file cache of another machine may show another state. Every rank checks files.
    chosen, *_ = control.together(lambda: _choose(of, resume_from) if rank() == 0 else None)
    accept(0 if chosen is None else int(chosen[1]["step"]))
    if chosen is None:
        return 0
    tag, manifest, went_back_to = chosen
    checkpoint, saved_world, stage = of.folder / tag, int(manifest["world"]), engine.zero_optimization_stage()
    started = time.monotonic()
    if saved_world == world() or not shard_files.optimizer_files(checkpoint):
        with _offering(of, checkpoint):
            mine: dict[str, dict[str, Any]] = {}
            weights = shard_files.weights_file(stage, 0)
            control.together(lambda: mine.update(shard_files.read_checked(checkpoint, manifest["files"], weights)))
        engine.checkpoint_engine.load = lambda path, map_location=None: mine[Path(path).name]
        path, _ = engine.load_checkpoint(str(of.folder), tag=tag)
        assert path is not None, "DeepSpeed does not find the checkpoint that was just checked"
        mine.clear()  # the engine keeps the lambda, which would keep the tensors
    else:
        with _offering(of, checkpoint):
            control.together(lambda: shard_files.refuse_damaged(checkpoint, manifest["files"]))
        _load_on_other_ranks(engine, checkpoint, stage, saved_world)
    control.together(
        lambda: _name_latest(of, tag, went_back_to) if rank() == 0 and went_back_to != _AS_BEFORE else None
    )
    progress.say("checkpoint", f"{checkpoint}: checked and read in {time.monotonic() - started:.1f} s")
    return int(manifest["step"])


def _load_on_other_ranks(engine: Any, checkpoint: Path, stage: int, saved_world: int) -> None:
    """Read a checkpoint of ``saved_world`` ranks. Nothing is changed before every rank has read its shard."""
    read: list[tuple[dict[str, Any], dict[str, Any]]] = []
    control.together(lambda: read.append(_read_shard(engine, checkpoint, stage, saved_world)))
    common, state = read.pop()
    _hand_over(engine, common, state, stage)
    progress.say("checkpoint", f"{checkpoint} of {saved_world} ranks was divided anew over {world()} ranks")


def _read_shard(engine: Any, checkpoint: Path, stage: int, saved_world: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state that all ranks have in common, and this rank's own state of the optimizer."""
    if stage not in partitions.STAGES or engine.zero_nvme_offload_optimizer():
        how = (
            "with its optimizer on NVMe"
            if stage in partitions.STAGES
            else f"by ZeRO stage {stage} with a divided optimizer"
        )
        raise UserError(
            f"the checkpoint {checkpoint} was written by {saved_world} ranks {how}, and this job's {world()} ranks "
            f"cannot read it; start {saved_world} ranks, or choose another name= to start over"
        )
    try:
        common = shard_files.opened(checkpoint / shard_files.weights_file(stage, 0))
        saved_sizes, sizes = (_sizes(shapes) for shapes in (common["param_shapes"], engine._get_zero_param_shapes()))
        form, live, files = (
            partitions.STAGES[stage],
            engine.optimizer.state_dict(),
            shard_files.optimizer_files(checkpoint),
        )
        saved = cache(lambda of_rank: shard_files.opened(files[of_rank])["optimizer_state_dict"])
        return common, partitions.repartitioned(saved, saved_world, saved_sizes, form, live, sizes, rank(), world())
    except UNREADABLE as error:
        raise UserError(f"the checkpoint {checkpoint} cannot be read ({brief(error)}); restore the folder") from error


def _sizes(shapes: list[dict[str, torch.Size]]) -> partitions.Sizes:
    return [{name: shape.numel() for name, shape in group.items()} for group in shapes]


def _hand_over(engine: Any, common: dict[str, Any], state: dict[str, Any], stage: int) -> None:
    """Put a state into the engine, as DeepSpeed's own load_checkpoint does after reading."""
    prepare, finish = (getattr(engine.optimizer, f"checkpoint_event_{name}", None) for name in ("prologue", "epilogue"))
    if prepare:
        prepare()
    if stage != 3:  # every rank holds all weights in the model's dtype; in stage 3 they follow from the fp32 weights
        engine.module.load_state_dict(common["module"])
    engine.optimizer.load_state_dict({rank(): state}, load_from_fp32_weights=True)
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, common[name])
    if finish:
        finish()
