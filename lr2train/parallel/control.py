"""Control messages between ranks: small Python objects, and above all errors.

Choice: a gloo group of its own, whatever the backend of the default group is. Rank 0 receives from every rank in turn,
then sends all objects to each. gloo sees a closed socket at once; nccl would carry objects through the GPU and notice a
dead peer by its watchdog only, after the whole time-out. Because all messages pass rank 0, a lost rank is known by its
number, and the others hear of the loss at once. Cost: two hops and world - 1 small messages each way through one rank,
and one more set of sockets. On several machines whose host names resolve to 127.0.0.1, GLOO_SOCKET_IFNAME has to name
the interface.

The first call makes the group, so all ranks have to make the first call. A rank waits for a live, busy peer as long as
the time-out of the default group. A second thread needs a channel of its own (``new_channel``): messages of one channel
are told apart by their order alone.
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
from lr2train.ranks import PeerGone, rank, world

T = TypeVar("T")

# A rank that leaves waits so long for the others to read why; a busy rank finds the connection closed later.
_NOTICE_S = 2.0


def alone() -> bool:
    """Whether this process has no other to talk to: there is no process group yet, or a group of one."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def from_all(mine: T, channel: Channel | None = None) -> list[T]:
    """Every rank's object, in rank order, on every rank.

    Args:
        mine: this rank's object.
        channel: None: the channel of the main thread.

    Raises:
        PeerGone: a rank is gone; on every remaining rank.
    """
    return [mine] if alone() else (channel or _main_channel()).exchange(mine)


def from_rank_0(value: T) -> T:
    """Rank 0's object on every rank; the objects of other ranks are ignored.

    Raises:
        PeerGone: a rank is gone; on every remaining rank.
    """
    return value if alone() else from_all(value if rank() == 0 else None)[0]  # type: ignore[return-value]


def together(fn: Callable[[], T], channel: Channel | None = None) -> list[T]:
    """Call ``fn`` on every rank; returns all results in rank order. An error on one rank is raised on every rank.

    ``fn`` may contain a collective only if it fails on all ranks alike: a rank that raises before a collective leaves
    the others waiting. ``channel`` as in ``from_all``.

    Raises:
        UserError: the first rank that failed raised a UserError. The text names the rank, unless all ranks raised the
            same text.
        PeerGone: a rank is gone.
        RuntimeError: the first rank that failed raised another error. The text names the rank, the class and the
            reason.
    """
    error: Exception | None = None
    try:
        outcome: _Done | _Failed = _Done(fn())
    except Exception as caught:
        told = for_user(caught)
        error, outcome = caught, _Failed(type(caught).__name__, str(told or caught), told is not None)
    outcomes = from_all(outcome, channel)
    failures = {number: one for number, one in enumerate(outcomes) if isinstance(one, _Failed)}
    if failures:
        raise _one_error(failures, len(outcomes)) from error
    return [one.value for one in outcomes if isinstance(one, _Done)]


def on_rank_0(fn: Callable[[], T]) -> T | None:
    """Call ``fn`` on rank 0 alone; returns the result on rank 0, and None on the others. Raises as ``together``.

    The result stays on rank 0, so it may be an object that cannot be pickled, such as an open lock.
    """
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


class Channel:
    """The gloo group and the exchange through rank 0.

    Once a rank is lost, every later call raises the same PeerGone.
    """

    def __init__(self, timeout: timedelta):
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)  # every rank is a member
        self._group: dist.ProcessGroup | None = group
        self._lost = ""

    def exchange(self, mine: Any) -> list[Any]:
        if self._group is None:
            raise PeerGone(self._lost)
        try:
            return self._on_rank_0(mine) if rank() == 0 else self._on_other_rank(mine)
        except PeerGone as gone:
            self._leave(str(gone))
            raise

    def _on_rank_0(self, mine: Any) -> list[Any]:
        parts = [mine, *(self._receive(peer) for peer in range(1, world()))]
        for peer in range(1, world()):
            self._finish(self._start_sending(parts, peer), peer)
        return parts

    def _on_other_rank(self, mine: Any) -> list[Any]:
        # Not waited for yet: rank 0 may announce a lost rank without reading this message.
        sending = self._start_sending(mine, 0)
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
        """Tell the others, then close the connections, so that a rank that reads later does not wait for the
        time-out.
        """
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


# By default group; ends with the group.
_channels: WeakKeyDictionary[dist.ProcessGroup, Channel] = WeakKeyDictionary()


def new_channel() -> Channel | None:
    """A channel for a thread beside the main thread; None for a rank alone, which needs none. A collective."""
    group = dist.group.WORLD
    if group is None or alone():
        return None
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    return Channel(group._get_backend(device).options._timeout)


def _main_channel() -> Channel:
    group = dist.group.WORLD
    assert group is not None
    if group not in _channels:
        made = new_channel()
        assert made is not None
        _channels[group] = made
    return _channels[group]


@contextlib.contextmanager
def _naming(peer: int) -> Iterator[None]:
    """Add the number of the peer to gloo's error for a closed connection or a time-out."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise PeerGone(
            f"rank {peer} is gone or did not answer (seen by rank {rank()}: {reason}); its own log says why"
        ) from error
