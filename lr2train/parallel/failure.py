"""How a rank that fails in the middle of common work tells the other ranks why.

Choice: the failing rank writes its reason into the store of the process group, then leaves. The others are blocked in a
collective that the failing rank never joins. gloo wakes them when the process ends; they read the store and raise the
reason instead of "connection closed". An error before the first collective is better raised inside
``control.together``, which keeps the process group usable.

Cost: the store has to outlive the failing rank. Under the ``deepspeed`` launcher rank 0 holds the store; if rank 0
fails, the others can only say that a rank is gone. Under nccl a blocked rank waits on the device and is not woken: the
launcher ends the process, or nccl's watchdog does after ``parallel.timeout_s``. The reason then stands only in the log
of the rank that failed.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import _get_default_store

from lr2train.config import UserError
from lr2train.io import for_user
from lr2train.parallel.control import PeerGone, alone
from lr2train.ranks import rank, world

_KEY = "lr2train/failure"
_USER, _DEFECT, _GONE = "user", "defect", "gone"  # kinds of a reason
_STORE_S = 10.0  # time-out; a working store answers in milliseconds
_OTHERS_S = 5.0  # after a time-out, ranks that run notice it within seconds of each other
# Parts of gloo's messages for a peer that has ended, or that does not answer.
_TIMED_OUT = "Timed out waiting"
_CLOSED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", _TIMED_OUT)


@contextlib.contextmanager
def told_to_all() -> Iterator[None]:
    """An error of one rank inside the block is raised on every rank. The process group cannot be used afterwards.

    Raises:
        UserError: another rank raised a UserError first; the text names the rank.
        PeerGone: a rank ended without a reason, or did not answer; on every rank that is left.
        RuntimeError: another rank raised another error first; the text names the rank, the class and the reason.
        Exception: this rank's own error, unchanged, where this rank was the first, or where all ranks raised the same.
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
    """The error of another rank that ended the common work; None where this rank's ``error`` did."""
    own = _of(error)
    told = _first_told(own, timed_out=_closed(error) and _TIMED_OUT in str(error))
    number, kind, text = told
    if kind == _GONE:  # the writer is not to blame, so the text does not begin with its number
        return None if isinstance(error, PeerGone) else PeerGone(text)
    if number == rank() or told[1:] == own[1:]:  # the first, or every rank says the same
        return None
    return (UserError if kind == _USER else RuntimeError)(f"rank {number}: {text}")


def _first_told(own: list[Any], timed_out: bool) -> list[Any]:
    """The reason that the first rank wrote into the store; ``own`` where this rank is the first, or the store does not
    answer.

    A thread asks, because the store's own time-out does not apply to this call: a stopped rank 0 keeps the connection
    open for ever.
    """
    told = [own]

    def ask() -> None:
        """Add the failure that was told first to ``told``."""
        with contextlib.suppress(RuntimeError, ValueError):  # the store went with its rank
            store = _get_default_store()
            store.set(f"{_KEY}/{rank()}", "ended")
            if timed_out and (silent := _silent_ranks(store)):
                own[2] = (
                    f"no answer from rank {', '.join(map(str, silent))}: stopped, or the machine is lost ({own[2]})"
                )
            told.append(json.loads(store.compare_set(_KEY, "", json.dumps(own))))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_STORE_S + (_OTHERS_S if timed_out else 0.0))
    if asking.is_alive() and rank() != 0:
        return [own[0], _GONE, f"rank 0 does not answer: it was stopped, or its machine is lost ({own[2]})"]
    return told[-1]


def _silent_ranks(store: Any) -> list[int]:
    """The ranks that have not written into the store that their work ended, within ``_OTHERS_S``."""
    keys = {f"{_KEY}/{number}": number for number in range(world())}
    with contextlib.suppress(RuntimeError):  # DistStoreError is the store's time-out
        store.wait(list(keys), timedelta(seconds=_OTHERS_S))
    return [number for key, number in keys.items() if not store.check([key])]


def _of(error: Exception) -> list[Any]:
    """[rank, kind, text]: the form of a reason in the store."""
    told = for_user(error)
    text = " ".join(str(told or error).split())
    if isinstance(error, PeerGone):
        return [rank(), _GONE, text]  # the text names the rank
    if _closed(error):
        seen = f"a rank is gone or does not answer, its own log says why (seen by rank {rank()}: {text[:200]})"
        return [rank(), _GONE, seen]
    return [rank(), _DEFECT, f"{type(error).__name__}: {text}"] if told is None else [rank(), _USER, text]


def _closed(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CLOSED)
