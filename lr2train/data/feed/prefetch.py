"""Steps made ahead of time by threads, in order.

Choice: threads, not processes: what a step costs is copying mapped memory, which numpy does without the interpreter's lock. Steps come out
in the order in which they were asked for, whatever the number of threads, because each is a pure function of its number. Cost: ``ahead``
more steps of batches in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetched(make: Callable[[int], T], steps: Iterable[int], ahead: int, workers: int) -> Generator[T, None, None]:
    """``make(step)`` for each step.

    Args:
        make: called on a thread; what it raises is raised here, at its step.
        steps: taken as they are needed.
        ahead: steps at most that are made, or being made, beyond the one that is handed out; 0 makes each when it is asked for.
        workers: threads.

    Ends its threads when it is exhausted, fails or is closed; what was begun is finished first, what was not is dropped.
    """
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers, "prefetch") as pool:
        try:
            for step in steps:
                pending.append(pool.submit(make, step))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
