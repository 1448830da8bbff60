"""How a rank that fails in the middle of common work tells the other ranks why.

Choice: the failing rank writes its reason into the store of the process group, then leaves. The others are blocked in a
collective that the failing rank never joins. gloo wakes them when the process ends; they read the store and raise the
reason instead of "connection closed". A rank that is not woken, under nccl or in host code, is ended with the reason by
its watchdog (``parallel.watchdog``). An error before the first collective is better raised inside ``control.together``,
which keeps the process group usable.

Cost: the store has to outlive the failing rank. Under the ``deepspeed`` launcher and SLURM rank 0 holds the store; if
rank 0 fails, it waits up to two seconds until the watchdogs of the others have read the reason. If rank 0 is killed,
the others can only say that rank 0 is gone.
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
from lr2train.parallel.control import alone
from lr2train.parallel.watchdog import DEFECT, GONE, HEARD, KEY, USER, Reason, leave, watchdog
from lr2train.ranks import PeerGone, rank, world

_STORE_S = 5.0  # time-out; a working store answers in milliseconds
_OTHERS_S = 5.0  # after a time-out, ranks that run notice it within seconds of each other
_HEARD_S = 2.0  # watchdogs look once a second
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
        leave(_of(error))
        elsewhere = _first_reason(error)
        if elsewhere is None:
            raise
        raise elsewhere from error
    except BaseException:  # asked to stop: the process ends in its own time
        leave()
        raise


def _first_reason(error: Exception) -> Exception | None:
    """The error of another rank that ended the common work; None where this rank's ``error`` did."""
    own = _of(error)
    told = _first_told(own, timed_out=_closed(error) and _TIMED_OUT in str(error))
    if told.kind == GONE:  # on every rank in the words of the first
        return None if isinstance(error, PeerGone) and told.text == own.text else PeerGone(told.said)
    if told.rank == rank() or told[1:] == own[1:]:  # the first, or every rank says the same
        return None
    return (UserError if told.kind == USER else RuntimeError)(told.said)


def _first_told(own: Reason, timed_out: bool) -> Reason:
    """The reason that the first rank wrote into the store; ``own`` where this rank is the first, or the store does not
    answer.

    A thread asks, because the store's own time-out does not apply to this call: a stopped rank 0 keeps the connection
    open for ever.
    """
    dog = watchdog()
    if dog is not None and dog.heard is not None:  # the store may be gone since
        return dog.heard
    told = [own]

    def ask() -> None:
        """Add the failure that was told first to ``told``."""
        with contextlib.suppress(RuntimeError, ValueError):  # the store went with its rank
            store = _get_default_store()
            store.set(f"{KEY}/{rank()}", "ended")
            mine = own
            if timed_out and (silent := _silent_ranks(store)):
                names = ", ".join(map(str, silent))
                said = f"no answer from rank {names}: stopped, or the machine is lost (seen by rank {rank()})"
                mine = own._replace(kind=GONE, text=said)
            told.append(Reason(*json.loads(store.compare_set(KEY, "", json.dumps(mine)))))
            store.set(f"{HEARD}/{rank()}", "")
            if rank() == 0 and dog is not None:
                store.wait([f"{HEARD}/{number}" for number in range(1, world())], timedelta(seconds=_HEARD_S))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_STORE_S + (_OTHERS_S if timed_out else 0.0))
    if asking.is_alive() and rank() != 0:
        told.append(
            Reason(own.rank, GONE, f"rank 0 does not answer: it was stopped, or its machine is lost ({own.text})")
        )
    if dog is not None:
        dog.heard = told[-1]  # a block around this one need not ask again
    return told[-1]


def _silent_ranks(store: Any) -> list[int]:
    """The ranks that have not written into the store that their work ended, within ``_OTHERS_S``."""
    keys = {f"{KEY}/{number}": number for number in range(world())}
    with contextlib.suppress(RuntimeError):  # DistStoreError is the store's time-out
        store.wait(list(keys), timedelta(seconds=_OTHERS_S))
    return [number for key, number in keys.items() if not store.check([key])]


def _of(error: Exception) -> Reason:
    told = for_user(error)
    text = " ".join(str(told or error).split())
    if isinstance(error, PeerGone):
        return Reason(rank(), GONE, text)  # the text names the rank
    if _closed(error):
        seen = f"a rank is gone or does not answer, its own log says why (seen by rank {rank()}: {text[:200]})"
        return Reason(rank(), GONE, seen)
    if told is not None:
        return Reason(rank(), USER, text)
    return Reason(rank(), DEFECT, f"{type(error).__name__}: {text}")


def _closed(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CLOSED)
