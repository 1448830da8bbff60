"""A run folder: where a verb writes, what it ran with, how it draws random numbers, logs and shows progress.

Choice: one folder a run, ``<runs_folder>/<name>``, opened by every verb the same way. The resolved config lies in it; opening it again with another
config is refused with the keys that differ, so a resumed run is the run that was started.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from lr2train.config import Config, UserError, to_dict
from lr2train.io import fingerprint, finite, read_json, write_json

T = TypeVar("T")

# What may change between the starts of one run. All else is refused with the keys that differ.
_MAY_CHANGE = (
    # other ranks
    "parallel.",
    # the input's contents decide, not its path
    "model.path:", "model.revision:", "model.allow_download:", "data.path:", "rope.factors:",
    # decided when the corpus was prepared: its contents tell
    *(f"data.{key}" for key in (
        "sources", "tokenizer", "vocab_size", "shard_bytes", "deduplicate", "decontaminate", "short_tokens", "long_tokens", "buckets", "weights_of",
        "max_repeats", "keep_below", "over_long", "holdout", "align_sp", "workers",
    )),
    # how data is read; lr2train.training.steps has its own rule for skipped steps and groups
    "data.verify:", "data.prefetch_steps:", "data.loader_threads:", "data.skip_steps:", "data.group_segments:",
    # when checkpoints are written and read
    "engine.checkpoint_every_steps:", "engine.keep_checkpoints:", "engine.max_bad_steps:", "engine.resume_from:",
    # memory against time
    "engine.activation_checkpointing:", "engine.loss_chunk_tokens:", "search.chunk_tokens:", "search.shard:",
    *(f"engine.deepspeed.zero_optimization.{key}" for key in (
        "offload_", "stage3_", "allgather_", "reduce_bucket_size", "sub_group_size", "overlap_comm", "contiguous_gradients", "round_robin_gradients",
    )),
    # logging
    *(f"engine.deepspeed.{key}" for key in ("wall_clock_breakdown", "steps_per_print", "comms_logger", "flops_profiler", "memory_breakdown")),
)  # fmt: skip
_OPEN = re.compile(r"model\.(architecture|overrides)\.|rope\.options\.|engine\.deepspeed\.|data\.keep_below\.|.*\.(options|sources)\.$")
_PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "tokenizers", "numpy", "flash-attn", "ring-flash-attn")


def rank() -> int:
    """This process's global rank, from the launcher's environment; 0 outside a launcher."""
    return int(os.environ.get("RANK", 0)) if world() > 1 else 0  # a shell may still have the RANK of an old job


def world() -> int:
    """The number of processes of the job; 1 outside a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def refuse_ranks(verb: str) -> None:
    """Refuse several ranks for a verb that works in one process: each would do the whole work and write the same files.

    Raises:
        UserError: a launcher, or what is left of one in the environment, says that there are several.
    """
    if world() > 1:
        raise UserError(
            f"{verb} was started on {world()} ranks (WORLD_SIZE), which would all write the same files; start it once, without a launcher and "
            "without WORLD_SIZE in the environment"
        )


@dataclass(frozen=True)
class Run:
    """An opened run folder."""

    folder: Path
    verb: str
    values: dict[str, Any] = field(default_factory=dict)  # the config that the folder belongs to once it is claimed
    follows: bool = False  # another config takes the folder over

    def lock(self, needed: bool = True) -> IO[str] | None:
        """Keep other jobs, of whatever verb, out of the folder as long as the returned file stays open; on rank 0 alone.

        The kernel lets go of the lock when the process ends, however it ends. The config is compared once more under the lock: two jobs may
        have been started on one new name at the same time.

        Args:
            needed: False: a folder that may only be read is left without a lock.

        Raises:
            UserError: another job is writing here, or the folder belongs to another verb or config.
        """
        if rank() != 0:
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("a+")
        except OSError as error:
            if needed or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"run folder {self.folder} is in use by {lock.read().strip()}; wait until it has ended, or choose another name="
            ) from None
        except OSError:  # a file system without locks: go on without
            return None
        self.refuse_other_config()
        lock.truncate(0)
        lock.write(f"{self.verb}, process {os.getpid()} on {platform.node()}\n")
        lock.flush()
        return lock

    def refuse_other_config(self) -> None:
        """Refuse to overwrite what another verb or config has made.

        Raises:
            UserError: the folder holds a run of another verb, or of this one with another config; the keys that differ are listed.
        """
        if not self.values:  # a verb that adds to a run
            return
        _refuse_other_verb(self.folder, self.verb)
        saved = self.folder / f"{self.verb}.config.json"
        if saved.exists() and not self.follows:
            _refuse_other_config(saved, self.values)

    def claim(self, inputs: dict[str, Any]) -> None:
        """Note that the folder belongs to this config and these inputs, from rank 0 alone. Called once the input has proved good.

        Args:
            inputs: name -> fingerprint of what is read, or {"content": fingerprint, "files": …} (lr2train.parallel.inputs): the same path may
                hold something else by the next start.
        """
        if rank() != 0:
            return
        saved = self.folder / f"{self.verb}.config.json"
        write_json(self.folder / f"{self.verb}.inputs.json", inputs)
        if not saved.exists() or self.changes():
            write_json(saved, self.values)
        with (self.folder / f"{self.verb}.provenance.jsonl").open("a") as file:
            file.write(json.dumps(provenance()) + "\n")

    def changes(self) -> list[str]:
        """The keys that differ from the saved config, ``key: old -> new``, in a folder that follows its newest config."""
        saved = self.folder / f"{self.verb}.config.json"
        if not self.follows or not saved.exists():
            return []
        return list(differences(read_json(saved), self.values))

    def noted_inputs(self) -> dict[str, Any]:
        """What ``claim`` noted of the inputs at the first start; empty before it."""
        saved = self.folder / f"{self.verb}.inputs.json"
        return read_json(saved) if saved.exists() else {}

    def refuse_other_inputs(self, inputs: dict[str, Any]) -> None:
        """Refuse to go on from work that was done on inputs with other contents.

        Raises:
            UserError: an input is not the one that the run was started with.
        """
        noted = self.noted_inputs()
        changed = [name for name in inputs if name in noted and content_of(noted[name]) != content_of(inputs[name])]
        if changed:
            raise UserError(
                f"run folder {self.folder} was made from another {' and '.join(changed)} than is there now; put back what was there, or choose "
                "another name="
            )

    @property
    def fingerprint(self) -> str:
        """Of everything that decides what the claimed run computes: its first config and its inputs."""
        values, inputs = (read_json(self.folder / f"{self.verb}.{what}.json") for what in ("config", "inputs"))
        decisive = {key: value for key, value in _leaves(values) if key != "name" and not f"{key}:".startswith(_MAY_CHANGE)}
        return fingerprint([decisive, {name: content_of(one) for name, one in inputs.items()}])

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


def content_of(noted: Any) -> str:
    """The fingerprint of an input's contents, in either form that ``claim`` takes."""
    return noted["content"] if isinstance(noted, dict) else noted


def open_run(config: Config, verb: str, groups: tuple[str, ...], follows: bool = False) -> Run:
    """Open ``<runs_folder>/<name>`` for a verb; nothing is written before ``Run.lock``.

    Args:
        config: the experiment; ``claim`` saves it as ``<verb>.config.json``, with absolute paths.
        verb: the verb's name.
        groups: the top-level config keys that decide what the verb computes; a change of another key, or of ``_MAY_CHANGE``, does not matter.
        follows: the folder takes over the newest config, because the verb itself refuses what would spoil finished work.

    Raises:
        UserError: the folder holds a run of another verb, or of the same one with another config; the keys that differ are listed.
    """
    values = {key: value for key, value in to_dict(_absolute(config)).items() if key in groups}
    job = Run(Path(config.runs_folder) / config.name, verb, json.loads(json.dumps(finite(values))), follows)
    job.refuse_other_config()
    return job


def _absolute(config: Config) -> Config:
    """The config with absolute paths: a run is read from other folders than the one that it was started in. A hub id stays as it is."""

    def absolute(path: str | None) -> str | None:
        return os.path.abspath(path) if path is not None and Path(path).exists() else path

    sources = [replace(source, path=absolute(source.path)) for source in config.data.sources]
    data = replace(config.data, path=absolute(config.data.path), tokenizer=absolute(config.data.tokenizer), sources=sources)
    model, rope = replace(config.model, path=absolute(config.model.path)), replace(config.rope, factors=absolute(config.rope.factors))
    return replace(config, model=model, rope=rope, data=data)


def _refuse_other_verb(folder: Path, verb: str) -> None:
    """A folder of another verb's results has files of the same names, such as factors.json."""
    for other in ("prepare", "search", "train"):
        if other != verb and (folder / f"{other}.config.json").exists():
            raise UserError(f"run folder {folder} belongs to a run of {other}, whose results {verb} would overwrite; choose another name=")


def _refuse_other_config(saved: Path, values: dict[str, Any]) -> None:
    changed = [line for line in differences(read_json(saved), values) if not _allowed(line)]
    if changed:
        raise UserError(
            f"run folder {saved.parent} belongs to another config ({len(changed)} keys differ: {'; '.join(changed[:8])}); "
            "put them back, or choose another name="
        )


def _allowed(line: str) -> bool:
    """Whether a run may go on with this difference."""
    if line.startswith(_MAY_CHANGE):
        return True
    key, _, change = line.partition(": ")
    old, _, new = change.partition(" -> ")
    return key == "optim.steps" and old.isdigit() and new.isdigit() and 0 < int(old) < int(new)  # more steps than were planned


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield ``key: old -> new`` for every leaf that differs between two plain configs.

    A field that the old config does not have is of a later release: the run was started without it. A key of an open dictionary is not.
    """
    for key in sorted(old.keys() | new.keys()):
        if key not in old and not _OPEN.match(prefix):
            continue
        a, b = (values.get(key, {} if isinstance(other.get(key), dict) else _UNSET) for values, other in ((old, new), (new, old)))
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif _names(a) and _names(a) == _names(b):
            for one, other in zip(a, b, strict=True):
                yield from differences(one, other, f"{prefix}{key}.{one['name']}.")
        elif a != b:
            yield f"{prefix}{key}: {a!r} -> {b!r}"


class _Unset:
    def __repr__(self) -> str:
        return "not set"


_UNSET = _Unset()


def _names(value: Any) -> list[str]:
    """The names in a list of named things, such as sources; empty for anything else."""
    named = isinstance(value, list) and all(isinstance(one, dict) and "name" in one for one in value)
    return [one["name"] for one in value] if named else []


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


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
        with contextlib.suppress(BrokenPipeError):  # whoever read the terminal is gone; the work goes on
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
        with contextlib.suppress(BrokenPipeError):
            print(f"{description}: {_counted(now_done, total)}, {spent:.0f} s, {left:.0f} s left{more}", file=sys.stderr, flush=True)

    yield tick
    if state and state[0] > done:  # how it ended
        tell(*state)


def _counted(done: float, total: float) -> str:
    """Whole things as they are, shares in percent."""
    return f"{done}/{total}" if isinstance(done, int) else f"{done / total:.0%}"
