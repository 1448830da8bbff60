"""This process' limit of open files: 1024 on many systems, while a corpus may map thousands of token shards.

Choice: raise the soft limit only where it is too low, as far as the system's hard limit allows. Cost: the limit stays
raised for the process.
"""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable
from typing import TypeVar

from lr2train.config import UserError

T = TypeVar("T")

_FILES_A_SHARD = 3  # of a token shard that is read: .bin mapped, .bin read ahead, .targets.npy
_FILES_BESIDES = 256  # of everything else in the process
_REMEDY = (
    "raise the limit (`ulimit -Hn`, nofile in limits.conf), or prepare another corpus with a greater data.shard_bytes"
)


def allow_open_files(n_shards: int) -> None:
    """Raise the limit, so that all token shards of a corpus can be open at once.

    Raises:
        UserError: the system's hard limit is too low.
    """
    needed = _FILES_A_SHARD * n_shards + _FILES_BESIDES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"the corpus has {n_shards} token shards, which take {needed} open files, and this system allows a "
            f"process {hard}; {_REMEDY}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def with_files(open_it: Callable[[], T]) -> T:
    """``open_it()``; where the soft limit stops it, the limit is raised to the hard one and it is called once more.

    Raises:
        UserError: the hard limit is reached.
    """
    try:
        return open_it()
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        raise UserError(
            f"the corpus has more token shards than this system lets a process open files ({hard}); {_REMEDY}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return open_it()
