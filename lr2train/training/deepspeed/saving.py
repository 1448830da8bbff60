"""Write a checkpoint while training goes on.

Choice: at the end of a step every rank copies its part to host memory, and a thread of each rank writes the copy. The
copy is what a waiting save would write, so a resumed run is bit-identical. The threads of all ranks exchange their
outcomes over a channel of their own, and rank 0 names the checkpoint the latest only when every file is on the disk. At
most one checkpoint is in hand: the next one, the end of the run and an interrupt wait for it. An error of a writer is
raised on all ranks at the end of the first step after it. A run that ends with an error still finishes the checkpoint
in hand, if its peers do.

Cost: host memory for one copy of the rank's part (14 bytes for each of its parameters in bfloat16, 16 in float32), and
in each step with a checkpoint in hand one exchange of a few bytes. A job that is killed meanwhile goes on from the
checkpoint before. Where the copies of a machine's ranks would take more than half of the free memory, training waits
for the writing, and the log says so once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from lr2train import progress
from lr2train.parallel import control, processes
from lr2train.parallel.watchdog import WRITER
from lr2train.training.deepspeed import checkpoint, shard_files
from lr2train.training.deepspeed.checkpoint import Checkpoints, Draft

_SHARE = 0.5  # of the free memory, for the copies
_CGROUPS = Path("/sys/fs/cgroup")


class Saver:
    """Writes the checkpoints of an engine, one at a time."""

    def __init__(self) -> None:
        self._writing: _Writing | None = None
        self._channel: control.Channel | None = None
        self._said = self._fitted = False

    def save(self, engine: Any, of: Checkpoints, step: int, wait: bool) -> None:
        """Write a checkpoint after ``step`` steps. A collective.

        Args:
            engine: DeepSpeed's.
            of: the run's checkpoints.
            step: steps done so far.
            wait: whether the checkpoint is written when this call returns.

        Raises:
            UserError: the disk is full; this checkpoint's error where ``wait``, or the error of the one before.
        """
        self.finish()
        draft = checkpoint.draft(engine, of, step)
        if wait or not self._fits(draft):
            draft.write()
            return
        self._channel = self._channel or control.new_channel()
        self._writing = _Writing(draft.on_host(), self._channel)
        self._writing.start()

    def check(self) -> None:
        """Raise the error of a checkpoint that all ranks have ended to write. A collective while one is in hand.

        Raises:
            UserError: the disk is full; on every rank in the same step.
        """
        if self._writing is not None and all(control.from_all(not self._writing.is_alive())):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint in hand, if there is one.

        Raises:
            UserError: the disk is full; on every rank.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.join()
            if writing.error is not None:
                raise writing.error

    def _fits(self, draft: Draft) -> bool:
        """Whether every machine has room for the copies. A collective.

        On CUDA a positive answer stays: torch keeps the page-locked memory of the first copies and uses it again.
        """
        if self._fitted:
            return True
        needed = shard_files.n_bytes(draft.states) * processes.ranks_per_node()
        free = free_host_bytes()
        short = [one for one in control.from_all((needed, free)) if one[0] > _SHARE * one[1]]
        if short and not self._said:
            needed, free = short[0]
            progress.say(
                "checkpoint",
                f"training waits while a checkpoint is written: host copies take {needed / 2**30:.1f} GiB on a "
                f"machine with {free / 2**30:.1f} GiB of free memory, and may take half of it",
            )
        self._said = self._said or bool(short)
        self._fitted = not short and torch.cuda.is_available()
        return not short


@contextlib.contextmanager
def finished_at_the_end() -> Iterator[None]:
    """When the block ends, wait for the checkpoint that this process still writes, also after an error.

    For a block inside the lock of the run folder: no other job may begin there meanwhile. The wait ends with
    ``parallel.timeout_s`` at the latest where a peer does not answer.
    """
    try:
        yield
    finally:
        for thread in threading.enumerate():
            if thread.name == WRITER:
                thread.join()


class _Writing(threading.Thread):
    """Writes one checkpoint."""

    def __init__(self, draft: Draft, channel: control.Channel | None):
        super().__init__(name=WRITER)
        self._draft: Draft | None = draft
        self._channel = channel
        self.error: Exception | None = None

    def run(self) -> None:
        assert self._draft is not None
        try:
            self._draft.write(self._channel)
        except Exception as error:
            self.error = error
        self._draft = None  # frees the copy


def free_host_bytes() -> int:
    """Memory that this process can still get: of the machine, and of each cgroup (version 2) above the process."""
    return min([psutil.virtual_memory().available, *_left_in_cgroups()])


def _left_in_cgroups() -> Iterator[int]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return
    folder = _CGROUPS / own
    for one in (folder, *folder.parents):
        if one.is_relative_to(_CGROUPS):
            yield from _left_in(one)


def _left_in(cgroup: Path) -> Iterator[int]:
    """Limit less usage; pages of files that can be dropped are no usage. Nothing where there is no limit."""
    try:
        limit, used = ((cgroup / f"memory.{what}").read_text().strip() for what in ("max", "current"))
        kinds = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return
    if limit != "max":
        yield int(limit) - int(used) + int(kinds.get("inactive_file", 0))
