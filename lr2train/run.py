"""A run folder: where a verb writes, what it ran with, how it draws random numbers, logs and shows progress.

Choice: one folder a run, ``<runs_folder>/<name>``, opened by every verb the same way. The resolved config lies in it; opening it again with another
config is refused with the keys that differ, so a resumed run is the run that was started.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np

from lr2train.changes import MAY_CHANGE, differences, leaves, may_change
from lr2train.config import Config, UserError, to_dict
from lr2train.io import fingerprint, finite, read_json, write_json
from lr2train.progress import say
from lr2train.ranks import rank, world

_PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "tokenizers", "numpy", "flash-attn", "ring-flash-attn")


class Interrupted(KeyboardInterrupt):
    """The job was asked to stop. Its work is saved and its log says so; the command line ends with the exit code of an interrupt."""


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
        decisive = {key: value for key, value in leaves(values) if key != "name" and not f"{key}:".startswith(MAY_CHANGE)}
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
        groups: the top-level config keys that decide what the verb computes; a change of another key, or of ``MAY_CHANGE``, does not matter.
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
    changed = [line for line in differences(read_json(saved), values) if not may_change(line)]
    if changed:
        raise UserError(
            f"run folder {saved.parent} belongs to another config ({len(changed)} keys differ: {'; '.join(changed[:8])}); "
            "put them back, or choose another name="
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
