"""What ranks tell each other between their work: small Python objects and, first of all, that something went wrong.

Choice: a gloo group of their own, whatever the world's backend is, and rank 0 in the middle: it receives from every rank in turn, then sends
all to each. nccl would carry objects through the GPU and notice a dead peer by its watchdog only, after the whole time-out; gloo sees a
closed socket at once. With rank 0 in the middle a lost rank has a number, and the others are told at once that it is gone. Cost: two hops
and world - 1 small messages each way through one rank, and one more set of sockets (on several machines whose host names resolve to
127.0.0.1, GLOO_SOCKET_IFNAME has to name the interface).

The group is made by the first call, which all ranks have to make. A rank waits as long as the world's own time-out for one that is alive
and busy.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from lr2train.config import UserError
from lr2train.io import for_user
from lr2train.ranks import rank, world

T = TypeVar("T")

_NOTICE_S = 2.0  # how long a rank that leaves the group waits for the others to read why; who is busy finds the connection closed


class PeerGone(RuntimeError):
    """Another rank has died, or has not answered within the time-out. Nothing can be shared any more."""


def alone() -> bool:
    """Whether this process has no other to talk to: there is no process group yet, or a group of one."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def from_all(mine: T) -> list[T]:
    """Every rank's object, in rank order, on every rank.

    Raises:
        PeerGone: a rank is gone; on every rank that is left.
    """
    return [mine] if alone() else _star().exchange(mine)


def from_rank_0(value: T) -> T:
    """Rank 0's object on every rank; what the others hand in is not looked at. Raises PeerGone as ``from_all``."""
    return value if alone() else from_all(value if rank() == 0 else None)[0]  # type: ignore[return-value]


def together(fn: Callable[[], T]) -> list[T]:
    """Call ``fn`` on every rank and return all results in rank order, or raise on every rank what went wrong on one.

    ``fn`` may hold collectives only where it fails on all ranks alike: one that raises before a collective leaves the others waiting in it.

    Raises:
        UserError: the first rank that failed raised one; the text names the rank, unless all ranks say the same.
        PeerGone: a rank is gone.
        RuntimeError: the first rank that failed raised anything else; the text names the rank, the kind and the reason.
    """
    error: Exception | None = None
    try:
        outcome: _Done | _Failed = _Done(fn())
    except Exception as caught:
        told = for_user(caught)
        error, outcome = caught, _Failed(type(caught).__name__, str(told or caught), told is not None)
    outcomes = from_all(outcome)
    failures = {number: one for number, one in enumerate(outcomes) if isinstance(one, _Failed)}
    if failures:
        raise _one_error(failures, len(outcomes)) from error
    return [one.value for one in outcomes if isinstance(one, _Done)]


def on_rank_0(fn: Callable[[], T]) -> T | None:
    """Call ``fn`` on rank 0 alone; returns its result there, which need not be sendable (an open lock), and None on the others. Raises as ``together``."""
    held: list[T] = []
    together(lambda: held.append(fn()) if alone() or rank() == 0 else None)
    return held[0] if held else None


@dataclass(frozen=True)
class _Done:
    value: Any


@dataclass(frozen=True)
class _Failed:
    kind: str
    reason: str
    of_user: bool


def _one_error(failures: dict[int, _Failed], of_ranks: int) -> Exception:
    number, first = next(iter(failures.items()))
    text = first.reason if first.of_user else f"{first.kind}: {first.reason}"
    if len(failures) < of_ranks or len(set(failures.values())) > 1:
        others = f" ({len(failures) - 1} more of {of_ranks} ranks failed too)" if len(failures) > 1 else ""
        text = f"rank {number}: {text}{others}"
    return UserError(text) if first.of_user else RuntimeError(text)


class _Star:
    """The group and its one exchange. Once a rank is lost, every later call says so again."""

    def __init__(self, timeout: timedelta):
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)  # every rank is in it
        self._group: dist.ProcessGroup | None = group
        self._lost = ""

    def exchange(self, mine: Any) -> list[Any]:
        if self._group is None:
            raise PeerGone(self._lost)
        try:
            return self._in_the_middle(mine) if rank() == 0 else self._at_an_end(mine)
        except PeerGone as gone:
            self._leave(str(gone))
            raise

    def _in_the_middle(self, mine: Any) -> list[Any]:
        parts = [mine, *(self._receive(peer) for peer in range(1, world()))]
        for peer in range(1, world()):
            self._finish(self._start_sending(parts, peer), peer)
        return parts

    def _at_an_end(self, mine: Any) -> list[Any]:
        sending = self._start_sending(mine, 0)  # rank 0 may never read it and say instead that somebody is gone
        answer = self._receive(0)
        if isinstance(answer, PeerGone):
            raise answer
        self._finish(sending, 0)
        return answer

    def _start_sending(self, value: Any, peer: int) -> list[dist.Work]:
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        with _naming(peer):
            works = [dist.isend(part, peer, group=self._group) for part in (torch.tensor([len(data)]), data)]
        return [work for work in works if work is not None]

    def _finish(self, works: list[dist.Work], peer: int) -> None:
        with _naming(peer):
            for work in works:
                work.wait()

    def _receive(self, peer: int) -> Any:
        with _naming(peer):
            size = torch.zeros(1, dtype=torch.int64)
            dist.recv(size, peer, group=self._group)
            data = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(data, peer, group=self._group)
        return pickle.loads(data.numpy().tobytes())

    def _leave(self, reason: str) -> None:
        """Tell the others, then close the connections, so that none that reads later waits for the time-out."""
        if rank() == 0:
            self._announce(PeerGone(reason))
        dist.destroy_process_group(self._group)
        self._group, self._lost = None, reason

    def _announce(self, gone: PeerGone) -> None:
        notices = []
        for peer in range(1, world()):
            with contextlib.suppress(PeerGone):
                notices += self._start_sending(gone, peer)
        for notice in notices:
            with contextlib.suppress(RuntimeError):
                notice.wait(timedelta(seconds=_NOTICE_S))


_stars: WeakKeyDictionary[dist.ProcessGroup, _Star] = WeakKeyDictionary()  # of the present world; goes with it


def _star() -> _Star:
    group = dist.group.WORLD
    assert group is not None
    if group not in _stars:
        device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        _stars[group] = _Star(group._get_backend(device).options._timeout)
    return _stars[group]


@contextlib.contextmanager
def _naming(peer: int) -> Iterator[None]:
    """What gloo says of a closed connection or a silent peer, with the number of the rank."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise PeerGone(f"rank {peer} is gone or did not answer (seen by rank {rank()}: {reason}); its own log says why") from error
