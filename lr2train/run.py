"""Run folders, provenance and named random streams.

Choice: one folder for each run, ``<runs_folder>/<name>``, opened by every verb in the same way. The folder holds the
resolved config. Opening the folder with another config is refused, and the refusal lists the keys that differ
(``changes``). So a resumed run is the run that was started.
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
from lr2train.config.hidden import shown
from lr2train.io import fingerprint, finite, read_json, write_json
from lr2train.progress import say
from lr2train.ranks import rank, world

_PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "tokenizers", "numpy", "flash-attn", "ring-flash-attn")


class Interrupted(KeyboardInterrupt):
    """The job was asked to stop.

    Its work is saved and its log says so; the command line ends with the exit code of an interrupt.
    """


MARKER = "LR2TRAIN_INTERRUPTED"  # environment variable: a path


def note_interrupt() -> None:
    """Write the empty file that ``LR2TRAIN_INTERRUPTED`` names, if it is set: the job was asked to stop, and the same
    command goes on. On rank 0 alone.

    For ``launch/slurm.sbatch``, which queues the job again where the file is there. An exit code would not do: a
    launcher that kills the ranks that still end changes it.
    """
    if rank() == 0 and os.environ.get(MARKER):
        Path(os.environ[MARKER]).touch()


@dataclass(frozen=True)
class Run:
    """An opened run folder.

    Attributes:
        folder: perhaps not there yet: opening writes nothing.
        verb: whose run this is.
        values: the part of the config that decides the result; empty for a verb that adds to the run of another verb.
        follows: a later config may take the folder over.
    """

    folder: Path
    verb: str
    values: dict[str, Any] = field(default_factory=dict)
    follows: bool = False

    def lock(self, needed: bool = True) -> IO[str] | None:
        """Keep the jobs of all verbs out of the folder while the returned file is open; on rank 0 alone.

        The kernel releases the lock when the process ends, also after a kill. The config is compared once more under
        the lock, because two jobs may have started at the same time with one new name.

        Args:
            needed: whether a folder without write permission is an error; if not, the folder stays without a lock.

        Raises:
            UserError: another job holds the lock, or the folder belongs to another verb or config.
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
                f"run folder {self.folder} is in use by {lock.read().strip()}; wait until it has ended, or choose "
                "another name="
            ) from None
        except OSError:  # a file system without locks: go on without
            return None
        self.refuse_other_config()
        lock.truncate(0)
        lock.write(f"{self.verb}, process {os.getpid()} on {platform.node()}\n")
        lock.flush()
        return lock

    def refuse_other_config(self) -> None:
        """Refuse to overwrite the results of another verb or config.

        Raises:
            UserError: the folder belongs to another verb, or to another config of this verb; the text lists the keys
                that differ.
        """
        if not self.values:  # the verb adds to a run
            return
        _refuse_other_verb(self.folder, self.verb)
        saved = self.folder / f"{self.verb}.config.json"
        if saved.exists() and not self.follows:
            _refuse_other_config(saved, self.values)

    def claim(self, inputs: dict[str, Any]) -> None:
        """Write down that the folder belongs to this config and these inputs, on rank 0 alone. Call when all checks
        have passed.

        Args:
            inputs: name -> fingerprint of the contents, or {"content": fingerprint, "files": …}
                (lr2train.parallel.inputs). A path is not enough: the file behind the path may change.
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
        """The changed keys, as ``key: old -> new``; empty unless the folder follows its newest config."""
        saved = self.folder / f"{self.verb}.config.json"
        if not self.follows or not saved.exists():
            return []
        return list(differences(read_json(saved), self.values))

    def noted_inputs(self) -> dict[str, Any]:
        """The inputs that ``claim`` wrote down; empty before the first start."""
        saved = self.folder / f"{self.verb}.inputs.json"
        return read_json(saved) if saved.exists() else {}

    def refuse_other_inputs(self, inputs: dict[str, Any]) -> None:
        """Refuse to go on with other inputs than at the first start.

        Raises:
            UserError: the contents of an input have changed; the text names the input.
        """
        noted = self.noted_inputs()
        changed = [name for name in inputs if name in noted and content_of(noted[name]) != content_of(inputs[name])]
        if changed:
            raise UserError(
                f"run folder {self.folder} was made from another {' and '.join(changed)} than is there now; "
                "put the former one back, or choose another name="
            )

    @property
    def fingerprint(self) -> str:
        """Fingerprint of everything that decides the result of the claimed run: its first config and its inputs."""
        values, inputs = (read_json(self.folder / f"{self.verb}.{what}.json") for what in ("config", "inputs"))
        decisive = {
            key: value for key, value in leaves(values) if key != "name" and not f"{key}:".startswith(MAY_CHANGE)
        }
        return fingerprint([decisive, {name: content_of(one) for name, one in inputs.items()}])

    def log(self, message: str) -> None:
        """Write one line to stderr and to ``log.txt``, on rank 0 alone."""
        if rank() == 0:
            say(self.verb, message)
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "log.txt").open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {self.verb}: {message}\n")

    def write_json(self, name: str, value: Any) -> Path:
        """Write ``value`` as JSON into the run folder, atomically, on rank 0 alone; returns the path."""
        path = self.folder / name
        if rank() == 0:
            write_json(path, value)
        return path


def content_of(noted: Any) -> str:
    """The fingerprint of an input's contents, from either form that ``claim`` takes."""
    return noted["content"] if isinstance(noted, dict) else noted


def open_run(config: Config, verb: str, groups: tuple[str, ...], follows: bool = False) -> Run:
    """Open ``<runs_folder>/<name>`` for a verb; nothing is written before ``Run.lock``.

    Args:
        config: the experiment; ``claim`` saves the groups as ``<verb>.config.json``, with absolute paths.
        verb: the verb's name.
        groups: the top-level config keys that decide the verb's result. All other keys, and those of
            ``changes.MAY_CHANGE``, may change.
        follows: the folder follows its newest config; the verb itself refuses a change that would spoil finished work.

    Raises:
        UserError: the folder belongs to another verb, or to another config of this verb; the text lists the keys that
            differ.
    """
    values = {key: value for key, value in to_dict(_absolute(config)).items() if key in groups}
    job = Run(Path(config.runs_folder) / config.name, verb, json.loads(json.dumps(finite(values))), follows)
    job.refuse_other_config()
    return job


def _absolute(config: Config) -> Config:
    """The config with absolute paths, because later verbs may run in another working directory.

    A hub id stays unchanged.
    """

    def absolute(path: str | None) -> str | None:
        return os.path.abspath(path) if path is not None and Path(path).exists() else path

    sources = [replace(source, path=absolute(source.path)) for source in config.data.sources]
    data = replace(
        config.data, path=absolute(config.data.path), tokenizer=absolute(config.data.tokenizer), sources=sources
    )
    model, rope = (
        replace(config.model, path=absolute(config.model.path)),
        replace(config.rope, factors=absolute(config.rope.factors)),
    )
    return replace(config, model=model, rope=rope, data=data)


def _refuse_other_verb(folder: Path, verb: str) -> None:
    """Two verbs write files of the same name, such as factors.json, so they do not share a folder."""
    for other in ("prepare", "search", "train"):
        if other != verb and (folder / f"{other}.config.json").exists():
            raise UserError(
                f"run folder {folder} belongs to a run of {other}, whose results {verb} would overwrite; choose "
                "another name="
            )


def _refuse_other_config(saved: Path, values: dict[str, Any]) -> None:
    changed = [line for line in differences(read_json(saved), values) if not may_change(line)]
    if changed:
        raise UserError(
            f"run folder {saved.parent} belongs to another config ({len(changed)} keys differ: "
            f"{'; '.join(changed[:8])}); "
            "put them back, or choose another name="
        )


def provenance() -> dict[str, Any]:
    """The command, time, host, package versions, commit and number of ranks of this process."""
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "command": [shown("", argument) for argument in sys.argv],
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
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """A random stream that depends on the seed and its name alone, never on the draws from another stream."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint64))
