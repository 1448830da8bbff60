"""Processes that each do one task after another, and say so when they die.

Choice: a pipe to each of a few spawned processes, and tasks are drawn one by one as processes become free, so what is handed out next may
depend on what has come back. A worker that is killed is named with its task (``concurrent.futures`` says only that the pool is broken); one
whose parent is killed ends at once and finishes nothing. Cost: a spawned process imports its modules anew, about a second; one worker alone
therefore runs in this process.
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
Report = Callable[[float], None]
"""Called by the work now and then with what it has done so far."""
Work = Callable[[Any, Report], Any]
_CONTEXT = multiprocessing.get_context("spawn")


class WorkerPool(Generic[Task]):
    """``count`` processes for the same kind of work. Use as a context manager: on the way out they end.

    Args:
        make: called once in each process, gives what does a task; it must be importable or a picklable object.
        count: processes; 1 works in this process.
        name: of a task, for messages.
        alone: whether a task has the machine to itself, and may use all its cores.
    """

    def __init__(self, make: Callable[[], Work], count: int, name: Callable[[Task], str] = str, alone: bool = False) -> None:
        self._make, self._count, self._name, self._alone = make, count, name, alone
        self._idle: list[_Worker] = []
        self._busy: dict[_Worker, Task] = {}
        self._work: Work | None = None  # of this process

    def __enter__(self) -> WorkerPool[Task]:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in [*self._idle, *self._busy]:
            worker.end()
        self._idle, self._busy = [], {}

    def run(self, draw: Callable[[], Task | None], report: Callable[[Task, float], None]) -> Iterator[tuple[Task, Any]]:
        """Do tasks until there are none; yields each with its result as it is done, in any order.

        Args:
            draw: the next task, None where there is none now; asked again whenever a result has come back.
            report: told how far a task is.

        Raises:
            UserError: the work's own, or a worker died. Any other error of the work is raised as it is, with the worker's traceback as a note.
        """
        return self._run_here(draw, report) if self._count == 1 else self._run_apart(draw, report)

    def _run_here(self, draw: Callable[[], Task | None], report: Callable[[Task, float], None]) -> Iterator[tuple[Task, Any]]:
        self._work = self._work or self._make()
        while (task := draw()) is not None:
            yield task, self._work(task, lambda done, task=task: report(task, done))

    def _run_apart(self, draw: Callable[[], Task | None], report: Callable[[Task, float], None]) -> Iterator[tuple[Task, Any]]:
        while True:
            while len(self._busy) < self._count and (task := draw()) is not None:
                worker = self._idle.pop() if self._idle else _Worker(self._make, self._alone)
                self._busy[worker] = task
                worker.give(task)
            if not self._busy:
                return
            for worker in _readable(list(self._busy)):
                done, value = self._answer(worker)
                if done:
                    yield self._free(worker), value
                else:
                    report(self._busy[worker], value)

    def _free(self, worker: _Worker) -> Task:
        self._idle.append(worker)
        return self._busy.pop(worker)

    def _answer(self, worker: _Worker) -> tuple[bool, Any]:
        try:
            kind, value = worker.pipe.recv()
        except (EOFError, ConnectionError):
            raise UserError(f"a worker process {worker.how_it_died()} at {self._name(self._busy[worker])}{_ADVICE}") from None
        if kind == _ERROR:
            raise value
        return kind == _DONE, value


_ADVICE = "; set data.workers to fewer if memory ran out, and run the same command again to go on"
_DONE, _PROGRESS, _ERROR = "done", "progress", "error"


class _Worker:
    """One process and our end of its pipe."""

    def __init__(self, make: Callable[[], Work], alone: bool) -> None:
        self.pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, alone), daemon=True)
        self._process.start()
        theirs.close()
        self.give(make)  # through our own pipe, which breaks when the process dies; multiprocessing's would wait for ever

    def give(self, value: Any) -> None:
        """A task; first of all what makes the work."""
        with contextlib.suppress(BrokenPipeError):  # it died: its answer will say so
            self.pipe.send(value)

    def how_it_died(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        if code is not None and code < 0:
            why = ", as the kernel does where memory runs out" if -code == signal.SIGKILL else ""
            return f"was killed by {signal.Signals(-code).name}{why},"
        return f"ended with exit code {code}"

    def end(self) -> None:
        self._process.terminate()
        self._process.join()
        self.pipe.close()


def _readable(workers: list[_Worker]) -> list[_Worker]:
    ready = set(connection.wait([worker.pipe for worker in workers]))
    return [worker for worker in workers if worker.pipe in ready]


def _serve(pipe: connection.Connection, alone: bool) -> None:
    """The life of a worker: interrupts are for the parent, who ends us; without a parent there is nothing to work for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if not alone:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core is what we are
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            work = pipe.recv()()
            while True:
                pipe.send((_DONE, work(pipe.recv(), lambda done: pipe.send((_PROGRESS, done)))))
        except EOFError:
            return
        except BaseException as error:
            pipe.send((_ERROR, _portable(error)))


def _portable(error: BaseException) -> BaseException:
    """An error that survives the pipe, with the traceback of this process; a sentence for users needs none."""
    if isinstance(error, UserError):
        return error
    where = "in a worker process:\n" + traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # some take other arguments than they keep
        return RuntimeError(where)
    error.add_note(where)
    return error


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
