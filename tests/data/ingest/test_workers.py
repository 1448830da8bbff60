"""A pool of processes: results, errors and progress come back, and a process that dies is named with its task."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lr2train.config import UserError
from lr2train.data.ingest.workers import WorkerPool

ROOT = Path(__file__).resolve().parents[3]


class Odd(Exception):
    """Cannot be unpickled: its constructor takes more arguments than it keeps."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one + two)


def make():
    return work


def work(task, report):
    report(0.5)
    if task == "user":
        raise UserError("a sentence")
    if task == "defect":
        raise KeyError("a defect")
    if task == "odd":
        raise Odd(1, 2)
    if task == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "gone":
        os._exit(3)
    return task, os.getpid()


def run(tasks, count):
    left, told = list(tasks), []
    with WorkerPool(make, count, lambda task: f"task {task}") as workers:
        done = list(workers.run(lambda: left.pop(0) if left else None, lambda task, share: told.append((task, share))))
    return done, told


@pytest.mark.parametrize("count", [1, 2])
def test_all_tasks_come_back_with_their_progress(count):
    done, told = run(range(6), count)
    assert sorted(task for task, _ in done) == list(range(6))
    assert all(task == result for task, (result, _) in done)
    assert sorted(told) == [(task, 0.5) for task in range(6)]
    assert {pid == os.getpid() for _, (_, pid) in done} == {count == 1}


@pytest.mark.parametrize(
    ("task", "error", "words"),
    [
        ("user", UserError, "a sentence"),
        ("defect", KeyError, "a defect"),
        ("odd", RuntimeError, "test_workers.Odd: 3"),
        (
            "killed",
            UserError,
            r"killed by SIGKILL, as the kernel does where memory runs out, at task killed; set data\.workers",
        ),
        ("gone", UserError, "ended with exit code 3 at task gone"),
    ],
)
def test_an_error_or_death_in_a_worker_is_raised_with_its_task(task, error, words):
    with pytest.raises(error, match=words) as caught:
        run([1, task, 2], 2)
    if error is KeyError:
        assert "in work" in "".join(caught.value.__notes__)


def test_processes_end_with_a_killed_parent(tmp_path):
    """The parent is killed while its workers wait for a task. The pipe to this test closes once all are gone."""
    (tmp_path / "parent.py").write_text(
        textwrap.dedent(f"""
        import os, signal, sys
        sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
        from lr2train.data.ingest.workers import WorkerPool
        import test_workers

        if __name__ == "__main__":
            left = [1, 2]
            with WorkerPool(test_workers.make, 2) as workers:
                print(len(list(workers.run(lambda: left.pop() if left else None, lambda *_: None))), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    done = subprocess.run([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.stdout == "2\n", "stdout was closed by all who held it: no worker lives on"
    assert done.returncode == -signal.SIGKILL


def interrupted() -> None:
    left = list(range(6))
    with WorkerPool(make, 2) as workers:
        for _ in workers.run(lambda: left.pop() if left else None, lambda *_: None):
            raise KeyboardInterrupt


def test_an_interruption_ends_the_processes():
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not multiprocessing.active_children()


class Deadly:
    """Ends the process that unpickles it, before that process has read all of it: it is larger than a pipe's buffer."""

    def __init__(self) -> None:
        self.more = bytes(1 << 20)

    def __call__(self):
        return work

    def __reduce__(self):
        return os._exit, (3,), {"more": self.more}


def test_a_process_that_dies_before_its_first_task_is_named():
    left = ["one"]
    with (
        WorkerPool(Deadly(), 2, lambda task: f"task {task}") as workers,
        pytest.raises(UserError, match="ended with exit code 3 at task one"),
    ):
        list(workers.run(lambda: left.pop() if left else None, lambda *_: None))
