"""How a rank that fails in the middle of common work tells the others why.

Choice: the reason goes into the process group's own store, before the failing rank leaves. The others are blocked in a collective that it
will never join; gloo wakes them when its process ends, and they look into the store and raise that reason in the place of "connection
closed". What fails before the first collective is better told by ``control.together``, which leaves the job intact. Cost: the store has to
outlive the failing rank; where rank 0 keeps it itself (the ``deepspeed`` launcher) and is the one that fails, the others can only say that a
rank is gone, and its own log says why. Under nccl a blocked rank waits on the device and is not woken: the launcher ends it, or after
``parallel.timeout_s`` nccl's watchdog ends its process; the reason then stands in the log of the rank that failed, and in no other.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

from torch.distributed.distributed_c10d import _get_default_store

from lr2train.config import UserError
from lr2train.io import for_user
from lr2train.parallel.control import PeerGone, alone
from lr2train.ranks import rank

_KEY = "lr2train/failure"
_STORE_S = 10.0  # a store that works answers in milliseconds
# What gloo says of a peer whose process has ended, or that does not answer.
_CLOSED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")


@contextlib.contextmanager
def told_to_all() -> Iterator[None]:
    """Whatever one rank raises inside becomes the reason that every rank raises. The process group is of no use afterwards.

    Raises:
        UserError: another rank raised one first; the text names the rank.
        PeerGone: a rank ended without a word.
        RuntimeError: another rank raised anything else first; the text names the rank, the kind and the reason.
        Exception: this rank's own, unchanged, when it was the first, or all say the same.
    """
    try:
        yield
    except Exception as error:
        if alone():
            raise
        elsewhere = _first_reason(error)
        if elsewhere is None:
            raise
        raise elsewhere from error


def _first_reason(error: Exception) -> Exception | None:
    """What ended the common work: another rank's error, or None where ``error`` is it."""
    own = _of(error)
    told = _first_told(own)
    number, of_user, text = told
    if number == rank() or told[1:] == own[1:]:  # the first, or every rank says the same
        return PeerGone(text) if _closed(error) and not isinstance(error, PeerGone) else None
    return (UserError if of_user else RuntimeError)(f"rank {number}: {text}")


def _first_told(own: list[int | bool | str]) -> list[Any]:
    """The first rank's reason, which stands in the store; ``own`` where the store is gone or does not answer.

    The store's own time-out does not hold for this call, and a rank 0 that was stopped keeps the connection open for ever.
    """
    told = [own]

    def ask() -> None:
        with contextlib.suppress(RuntimeError, ValueError):  # the store went with its rank
            told.append(json.loads(_get_default_store().compare_set(_KEY, "", json.dumps(own))))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_STORE_S)
    if asking.is_alive() and rank() != 0:
        number, of_user, text = own
        return [number, of_user, f"rank 0 does not answer: it was stopped, or its machine is lost ({text})"]
    return told[-1]


def _of(error: Exception) -> list[int | bool | str]:
    """[rank, whether a user can mend it, text]."""
    told = for_user(error)
    text = " ".join(str(told or error).split())
    if isinstance(error, PeerGone):
        pass  # it says who
    elif _closed(error):
        text = f"a rank is gone or does not answer, its own log says why (seen by rank {rank()}: {text[:200]})"
    elif told is None:
        text = f"{type(error).__name__}: {text}"
    return [rank(), told is not None, text]


def _closed(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CLOSED)
