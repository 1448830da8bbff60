"""A pool of processes that do one task after another. A process that dies is named with its task.

Choice: each of a few spawned processes has its own pipe, and takes a new task when it is free, so the next task may
depend on the results so far. (``concurrent.futures`` reports a killed process as a broken pool, without its task.) A
process whose parent is killed ends at once. Cost: a spawned process imports its modules anew, about a second; a pool of
one process therefore works in the calling process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any, Generic, TypeVar

from lr2train.config import UserError

Task = TypeVar("Task")
ReportProgress = Callable[[float], None]
"""Called by a task now and then with the amount that is done so far."""
TaskFunction = Callable[[Any, ReportProgress], Any]
"""(task, report) -> result."""
NextTask = Callable[[], Task | None]
"""The next task; None where there is none now. It is asked again after every result."""
_CONTEXT = multiprocessing.get_context("spawn")
_DONE, _PROGRESS, _ERROR = "done", "progress", "error"  # kinds of messages from a worker process
_END_S = 5.0  # to wait for the exit code of a process whose pipe has closed


class WorkerPool(Generic[Task]):
    """Processes that do the same kind of task. Use as a context manager: they end with the block.

    Args:
        make: called once in each process, returns the function that does a task. It must be picklable.
        count: of processes; 1 works in the calling process.
        name: of a task, for messages.
        alone: whether a task has the machine to itself and may use all cores.
    """

    def __init__(
        self,
        make: Callable[[], TaskFunction],
        count: int,
        name: Callable[[Task], str] = str,
        alone: bool = False,
    ) -> None:
        self._make, self._count, self._name, self._alone = make, count, name, alone
        self._idle: list[_WorkerProcess] = []
        self._busy: dict[_WorkerProcess, Task] = {}
        self._function: TaskFunction | None = None  # of the calling process

    def __enter__(self) -> WorkerPool[Task]:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in [*self._idle, *self._busy]:
            worker.end()
        self._idle, self._busy = [], {}

    def run(self, next_task: NextTask[Task], report: Callable[[Task, float], None]) -> Iterator[tuple[Task, Any]]:
        """Do tasks until there are none. Yields (task, result) in the order of completion.

        Args:
            next_task: the next task, None where there is none now; asked again after every result.
            report: told how far a task is.

        Raises:
            UserError: raised by a task, or a process died.
            Exception: any other error of a task, with the traceback of its process as a note.
        """
        return self._run_here(next_task, report) if self._count == 1 else self._run_apart(next_task, report)

    def _run_here(self, next_task: NextTask[Task], report: Callable[[Task, float], None]) -> Iterator[tuple[Task, Any]]:
        self._function = self._function or self._make()
        while (task := next_task()) is not None:
            yield task, self._function(task, lambda done, task=task: report(task, done))

    def _run_apart(
        self,
        next_task: NextTask[Task],
        report: Callable[[Task, float], None],
    ) -> Iterator[tuple[Task, Any]]:
        while True:
            while len(self._busy) < self._count and (task := next_task()) is not None:
                worker = self._idle.pop() if self._idle else _WorkerProcess(self._make, self._alone)
                self._busy[worker] = task
                worker.send(task)
            if not self._busy:
                return
            for worker in _readable(list(self._busy)):
                done, value = self._receive(worker)
                if done:
                    yield self._set_idle(worker), value
                else:
                    report(self._busy[worker], value)

    def _set_idle(self, worker: _WorkerProcess) -> Task:
        self._idle.append(worker)
        return self._busy.pop(worker)

    def _receive(self, worker: _WorkerProcess) -> tuple[bool, Any]:
        """(True, result) or (False, progress)."""
        try:
            kind, value = worker.pipe.recv()
        except (EOFError, ConnectionError):
            raise UserError(
                f"a worker process {worker.how_it_died()} at {self._name(self._busy[worker])}; set data.workers "
                "to fewer if memory ran out, and run the same command again to go on"
            ) from None
        if kind == _ERROR:
            raise value
        return kind == _DONE, value


class _WorkerProcess:
    """One process and our end of its pipe."""

    def __init__(self, make: Callable[[], TaskFunction], alone: bool) -> None:
        self.pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, alone), daemon=True)
        self._process.start()
        theirs.close()
        # sent through our own pipe, which breaks when the process dies; multiprocessing's own would wait for ever
        self.send(make)

    def send(self, value: Any) -> None:
        """Send ``make`` first, then tasks."""
        with contextlib.suppress(BrokenPipeError):  # the process died, which the next receive reports
            self.pipe.send(value)

    def how_it_died(self) -> str:
        self._process.join(_END_S)
        code = self._process.exitcode
        if code is not None and code < 0:
            reason = ", as the kernel does where memory runs out" if -code == signal.SIGKILL else ""
            return f"was killed by {signal.Signals(-code).name}{reason},"
        return f"ended with exit code {code}"

    def end(self) -> None:
        self._process.kill()  # not SIGTERM: a process inherits that its parent ignores it
        self._process.join()
        self.pipe.close()


def _readable(workers: list[_WorkerProcess]) -> list[_WorkerProcess]:
    """Wait until at least one worker has sent something."""
    ready = set(connection.wait([worker.pipe for worker in workers]))
    return [worker for worker in workers if worker.pipe in ready]


def _serve(pipe: connection.Connection, alone: bool) -> None:
    """The main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if not alone:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is already a process for every core
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            function = pipe.recv()()
            while True:
                pipe.send((_DONE, function(pipe.recv(), lambda done: pipe.send((_PROGRESS, done)))))
        except EOFError:
            return
        except BaseException as error:
            pipe.send((_ERROR, _portable(error)))


def _portable(error: BaseException) -> BaseException:
    """An error that survives pickling, with the traceback of this process as a note. A UserError needs no traceback."""
    if isinstance(error, UserError):
        return error
    where = "in a worker process:\n" + traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # some errors take other arguments than they keep
        return RuntimeError(where)
    error.add_note(where)
    return error


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
