"""A run folder: where a verb writes, what it ran with, how it draws random numbers, logs and shows progress.

Choice: one folder a run, ``<runs_folder>/<name>``, opened by every verb the same way. The resolved config lies in it; opening it again with another
config is refused with the keys that differ, so a resumed run is the run that was started.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from lr2train.config import Config, UserError, differences, to_dict
from lr2train.io import read_json, write_json

T = TypeVar("T")

# Keys inside the groups of a run that may change between a start and its resumption: they do not change what it computes.
FREE_KEYS = (
    "parallel.", "engine.checkpoint_every_steps", "engine.keep_checkpoints", "data.tokenizer_train_bytes", "model.allow_download",
    "data.workers", "data.tokenizer_backend", "data.verify",
    "data.skip_steps", "data.prefetch_steps", "data.loader_threads",
)  # fmt: skip
_PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "tokenizers", "numpy", "flash-attn", "ring-flash-attn")


def rank() -> int:
    """This process's global rank, from the launcher's environment; 0 outside a launcher."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """The number of processes of the job; 1 outside a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


@dataclass(frozen=True)
class Run:
    """An opened run folder."""

    folder: Path
    verb: str
    values: dict[str, Any] = field(default_factory=dict)  # what the folder belongs to once it is claimed
    follows: bool = False  # another config takes the folder over

    def claim(self, inputs: dict[str, str]) -> IO[str] | None:
        """Make the folder belong to this config and these inputs. Called once the input has proved good: a typo must not reserve a name.

        Args:
            inputs: fingerprints of what is read (corpus, model …): the same path may hold something else by now.

        Returns:
            An open lock that the caller keeps as long as it writes; the kernel lets go of it when the process ends, however it ends.

        Raises:
            UserError: another job is writing here.
        """
        self.refuse_other_inputs(inputs)
        lock = self.lock()
        self.note(inputs)
        return lock

    def note(self, inputs: dict[str, str]) -> None:
        """Write down what the folder belongs to, from rank 0 alone; for a verb that has taken the lock before it knows that its input is good."""
        saved = self.folder / f"{self.verb}.config.json"
        if rank() != 0 or (saved.exists() and not self.changes()):
            return
        write_json(self.folder / f"{self.verb}.provenance.json", provenance())
        write_json(self.folder / f"{self.verb}.inputs.json", inputs)
        write_json(saved, self.values)

    def changes(self) -> list[str]:
        """What differs from the saved config, ``key: old -> new``, in a folder that follows its newest config; else nothing is asked."""
        saved = self.folder / f"{self.verb}.config.json"
        if not self.follows or not saved.exists():
            return []
        return list(differences(read_json(saved), json.loads(json.dumps(self.values))))

    def refuse_other_inputs(self, inputs: dict[str, str]) -> None:
        """Refuse to go on from work that was done on other inputs under the same paths.

        Raises:
            UserError: some input has been written anew since.
        """
        file = self.folder / f"{self.verb}.inputs.json"
        if not file.exists():
            return
        found = read_json(file)
        changed = [name for name in inputs if inputs[name] != found.get(name)]
        if changed:
            raise UserError(
                f"run folder {self.folder} was made from another {' and '.join(changed)}, written anew since; choose another name=, or remove "
                "the folder to start over"
            )

    def lock(self) -> IO[str] | None:
        """Keep other jobs out of the folder as long as what is returned stays open; on rank 0 alone.

        Raises:
            UserError: another job is writing here.
        """
        if rank() != 0:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = (self.folder / f".{self.verb}.lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"run folder {self.folder} is in use by {lock.read().strip()}; wait until it has ended, or choose another name="
            ) from None
        except OSError:  # a file system without locks: go on without
            return None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}\n")
        lock.flush()
        return lock

    def log(self, message: str) -> None:
        """One line to the terminal and to ``log.txt``, from rank 0 alone."""
        if rank() == 0:
            say(self.verb, message)
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "log.txt").open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {self.verb}: {message}\n")

    def write_json(self, name: str, value: Any) -> Path:
        """Write ``value`` as JSON under the run folder, atomically, from rank 0 alone."""
        path = self.folder / name
        if rank() == 0:
            write_json(path, value)
        return path


def open_run(config: Config, verb: str, groups: tuple[str, ...], follows: bool = False) -> Run:
    """Open ``<runs_folder>/<name>`` for a verb; nothing is written before ``Run.claim`` or ``Run.lock``.

    Args:
        config: the experiment; ``claim`` saves it as ``<verb>.config.json``.
        verb: the verb's name.
        groups: the top-level config keys that decide what the verb computes; a change of another key, or of ``FREE_KEYS``, does not matter.
        follows: the folder takes over the newest config, because the verb itself refuses what would spoil finished work.

    Raises:
        UserError: the folder holds a run of another verb, or of the same one with another config; the keys that differ are listed.
    """
    folder = Path(config.runs_folder) / config.name
    _refuse_other_verb(folder, verb)
    values = {key: value for key, value in to_dict(config).items() if key in groups}
    saved = folder / f"{verb}.config.json"
    if saved.exists() and not follows:
        _refuse_other_config(saved, values, config.name)
    return Run(folder, verb, values, follows)


def _refuse_other_verb(folder: Path, verb: str) -> None:
    """A folder of another verb's results has files of the same names, such as factors.json."""
    for other in ("prepare", "search", "train"):
        if other != verb and (folder / f"{other}.config.json").exists():
            raise UserError(f"run folder {folder} belongs to a run of {other}, whose results {verb} would overwrite; choose another name=")


def _refuse_other_config(saved: Path, values: dict[str, Any], name: str) -> None:
    changed = [line for line in differences(read_json(saved), json.loads(json.dumps(values))) if not line.startswith(FREE_KEYS)]
    if changed:
        raise UserError(
            f"run folder {saved.parent} belongs to another config ({len(changed)} keys differ: {'; '.join(changed[:8])}); "
            f"choose another name= (now {name}), or remove the folder to start over"
        )


def provenance() -> dict[str, Any]:
    """Who ran what, with which code and packages."""
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "command": sys.argv,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": {name: version for name, version in versions.items() if version},
        "commit": _git_commit(),
        "world": world(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        out = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """A random stream that depends on the seed and its name only, never on how much another stream was used."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint64))


def say(verb: str, message: str) -> None:
    """One line for a person, from rank 0 alone. Goes to stderr: stdout is for results."""
    if rank() == 0:
        print(f"[{verb}] {message}", file=sys.stderr, flush=True)


Tick = Callable[[float, float, str], None]
"""(done, total, note): how far the work is; the total may change as it goes."""


def progress(items: Iterable[T], total: int, description: str, done: int = 0) -> Iterator[T]:
    """Iterate with a progress bar and the time left, on rank 0; off a terminal, a line now and then instead.

    Args:
        items: what remains to do.
        total: how many there are in all.
        description: what is being done.
        done: how many were done before (a resumed run).
    """
    with meter(description, done) as tick:
        for number, item in enumerate(items, done + 1):
            yield item
            tick(number, total, "")


@contextlib.contextmanager
def meter(description: str, done: float = 0) -> Iterator[Tick]:
    """A progress bar for work that does not iterate: call what it yields now and then.

    Args:
        description: what is being done.
        done: how much was done before, which the time left must not be judged by.
    """
    if rank() != 0:
        yield lambda *_: None
    elif sys.stderr.isatty():
        with _bar(description, done) as tick:
            yield tick
    else:
        with _lines(description, done) as tick:
            yield tick


@contextlib.contextmanager
def _bar(description: str, done: float) -> Iterator[Tick]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[counted]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=None, completed=int(done), note="", counted="")
        yield lambda now, total, note: bar.update(task, completed=now, total=total, note=note, counted=_counted(now, total))


@contextlib.contextmanager
def _lines(description: str, done: float, every_s: float = 15.0) -> Iterator[Tick]:
    start = last = time.monotonic()
    state: tuple[float, float, str] | None = None

    def tick(now_done: float, total: float, note: str) -> None:
        nonlocal last, state
        state = now_done, total, note
        if now_done > done and time.monotonic() - last >= every_s:
            last = time.monotonic()
            tell(*state)

    def tell(now_done: float, total: float, note: str) -> None:
        spent, more = time.monotonic() - start, f", {note}" if note else ""
        left = spent / (now_done - done) * (total - now_done)
        print(f"{description}: {_counted(now_done, total)}, {spent:.0f} s, {left:.0f} s left{more}", file=sys.stderr, flush=True)

    yield tick
    if state and state[0] > done:  # how it ended
        tell(*state)


def _counted(done: float, total: float) -> str:
    """Whole things as they are, shares in percent."""
    return f"{done}/{total}" if isinstance(done, int) else f"{done / total:.0%}"
