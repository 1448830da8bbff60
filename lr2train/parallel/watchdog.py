"""A thread in each rank that ends the process when another rank has failed and this rank does not notice.

Choice: the reason of the first failure stands in the store of the process group (``parallel.failure`` writes it). Each
rank looks there once a second, over a connection of its own. gloo wakes a blocked rank when its peer ends, and the main
thread then ends by itself; under nccl, or in host code, a rank may stay blocked until ``parallel.timeout_s``. So the
main thread gets a few seconds, and then the thread prints the reason and ends the process: with exit code 2 where the
reason is an error of the user, else with 1. A thread that writes a checkpoint is waited for, because its peers may all
be at work still; nothing else is flushed, and files are written atomically.

Cost: one more connection to the store for each rank, and one small request a second. The store lives in rank 0, or in
torchrun. Where the store is gone, the machine or process that held it is gone, and the message says so. A rank 0 that
is stopped (SIGSTOP) answers nobody; the time-out of the collectives ends the others.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from lr2train.ranks import rank

WRITER = "write-checkpoint"  # name of a thread
KEY, HEARD = "lr2train/failure", "lr2train/heard"
USER, DEFECT, GONE = "user", "defect", "gone"  # kinds of a reason
_EVERY_S = 1.0
_GRACE_S = 4.0  # a rank that gloo wakes needs about a second to raise the reason and to print it
_LATER_S = 4.0  # other ranks of a machine wait longer: a launcher ends them, and the machine prints the reason once
_WRITER_S = 120.0  # for a checkpoint that is being written
_LEAVING_S = 60.0  # for a main thread that has begun to end, but is held up


class Reason(NamedTuple):
    """Why the common work ended: the rank that says so, the kind, and the text."""

    rank: int
    kind: str
    text: str

    @property
    def said(self) -> str:
        """The text for other ranks; a lost rank is named in the text already, and its finder is not to blame."""
        return self.text if self.kind == GONE else f"rank {self.rank}: {self.text}"

    @property
    def exit_code(self) -> int:
        """2 for an error of the user, else 1: the codes of ``cli.door``."""
        return 2 if self.kind == USER else 1


def first_reason(store: Any) -> Reason | None:
    """The reason in the store; None where no rank has failed."""
    return Reason(*json.loads(store.get(KEY))) if store.check([KEY]) else None


class Watchdog:
    """The thread of one rank.

    Attributes:
        heard: the first reason, once it was read from the store.
    """

    heard: Reason | None = None

    def __init__(self, store: Any):
        self._store, self._leaving = store, threading.Event()
        self._own: Reason | None = None
        threading.Thread(target=self._watch, name="watch-failures", daemon=True).start()

    def leave(self, reason: Reason | None = None) -> None:
        """The main thread ends the process by itself.

        Args:
            reason: the failure that ends it, for the case that the main thread is held up; None: an orderly end, which
                may take its time.
        """
        self._own = reason
        self._leaving.set()

    def _watch(self) -> None:
        reason = self._listen()
        if reason is not None and not self._leaving.wait(_GRACE_S + (_LATER_S if _local_rank() else 0.0)):
            _end(reason)
        self._leaving.wait()
        if self._own is not None:
            _end_if_held_up(self._own)

    def _listen(self) -> Reason | None:
        """Wait for a failure of any rank; None where the main thread ends first."""
        while not self._leaving.wait(_EVERY_S):
            try:
                told = first_reason(self._store)
                if told is not None:
                    self._store.set(f"{HEARD}/{rank()}", "")
            except (RuntimeError, ValueError) as error:  # DistNetworkError, DistStoreError
                seen = " ".join(str(error).split())[:200]
                told = Reason(
                    0, GONE, f"rank 0 or its machine is gone, its own log says why (seen by rank {rank()}: {seen})"
                )
            if told is not None:
                self.heard = told
                return told
        return None


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def _end_if_held_up(reason: Reason) -> None:
    """End the process where the main thread does not end within ``_LEAVING_S``.

    While a checkpoint is written the main thread waits for it; the writers' own time-out bounds that.
    """
    deadline = time.monotonic() + _LEAVING_S
    while threading.main_thread().is_alive():
        if any(thread.name == WRITER for thread in threading.enumerate()):
            deadline = time.monotonic() + _LEAVING_S
        if time.monotonic() > deadline:
            _end(reason)
        time.sleep(_EVERY_S)


def _end(reason: Reason) -> None:
    print(f"lr2train (rank {rank()}): {reason.said}", file=sys.stderr, flush=True)
    for thread in threading.enumerate():
        if thread.name == WRITER:
            thread.join(_WRITER_S)
    os._exit(reason.exit_code)


# By default group; ends with the group.
_watchdogs: WeakKeyDictionary[dist.ProcessGroup, Watchdog] = WeakKeyDictionary()


def watch_failures() -> None:
    """Start the watchdog of this rank, once for each process group; a rank alone needs none."""
    group = dist.group.WORLD
    if group is not None and group not in _watchdogs and dist.get_world_size() > 1:
        store: Any = _get_default_store()
        _watchdogs[group] = Watchdog(store.clone())


def watchdog() -> Watchdog | None:
    """The watchdog of this rank, if one was started."""
    group = dist.group.WORLD
    return None if group is None else _watchdogs.get(group)


def leave(reason: Reason | None = None) -> None:
    """Tell the watchdog, if there is one, that the main thread ends the process by itself."""
    dog = watchdog()
    if dog is not None:
        dog.leave(reason)
