"""Steps made ahead of time by threads, in order.

Choice: threads, not processes, because a step costs copies of mapped memory, which numpy makes without the
interpreter's lock. Steps come out in the order in which they were asked for, whatever the number of threads. Cost:
``ahead`` more steps of batches in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetched(make: Callable[[int], T], steps: Iterable[int], ahead: int, workers: int) -> Generator[T, None, None]:
    """``make(step)`` for each step. The threads end when the generator is exhausted, fails or is closed.

    Args:
        make: called on a thread; an exception is raised here, at its step.
        steps: taken as they are needed.
        ahead: at most so many steps are made, or being made, beyond the one that is handed out; 0 makes each step when
            it is asked for.
        workers: threads.
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
            for future in pending:  # a step that a thread has begun is finished before the pool closes
                future.cancel()
