"""A run on wandb, for train, search and evaluate. This is the only file that imports wandb.

Choice: the run's id stands in ``<verb>.wandb.json`` of the run folder, so a resumed job continues its curves wherever
the folder lies, and a new run in an old place starts its own. Nothing waits for the network for long: where wandb does
not answer within half a minute, or nobody is logged in, the run is recorded offline, and a line says how to upload it.
Cost: figures that a killed job had not uploaded stay in its folder until ``wandb sync``.

No secret leaves: the config and the command line are filtered (``config.hidden``), and neither the remote of git nor
code is sent.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lr2train import io, progress, run
from lr2train.config import Config, UserError, WandbMode, to_dict
from lr2train.config.hidden import shown, without_secrets

_START_S, _FINISH_S = 30.0, 120.0  # the most that a start and an end wait; WANDB_INIT_TIMEOUT sets another start


class Wandb:
    """A wandb run that a resumed job continues.

    Args:
        config: of the job.
        folder: of the run; wandb's files go to its subfolder ``wandb``.
        verb: train, search or evaluate: wandb's job type.
        done: the steps below are recorded by earlier starts of this id; offline they are not recorded again.

    Raises:
        UserError: wandb is not installed, or cannot even record offline.
    """

    def __init__(self, config: Config, folder: Path, verb: str, done: int = 0):
        self._verb = verb
        told, is_new = _identity(config, folder, verb)
        self._run, self._offline = _started(config, folder, verb, told)
        # Offline, nobody but our own records knows what earlier starts have written.
        self._first = self._run.starting_step if not self._offline else 0 if is_new else done

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Record one row."""
        if step >= self._first:
            self._run.log({key: value for key, value in figures.items() if value is not None}, step=step)

    def picture(self, name: str, file: Path) -> None:
        """Show a PNG file."""
        import wandb

        self._run.log({name: wandb.Image(str(file))})

    def table(self, name: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table; wandb wants one type in a column, so cells are texts unless all are numbers."""
        import wandb

        columns = [_of_one_type(column) for column in zip(*rows, strict=True)]
        data: Any = [list(row) for row in zip(*columns, strict=True)]
        self._run.log({name: wandb.Table(columns=[one or "row" for one in head], data=data)})

    def close(self) -> None:
        """Finish the upload, which waits two minutes at most; offline: say how to upload."""
        folder = Path(self._run.dir).parent
        self._run.finish()
        if self._offline:
            progress.say(self._verb, f"wandb has recorded offline; upload it with `wandb sync {folder}`")


def _of_one_type(column: Sequence[Any]) -> list[Any]:
    if all(cell is None or (isinstance(cell, int | float) and not isinstance(cell, bool)) for cell in column):
        return [None if cell is None else float(cell) for cell in column]
    return ["" if cell is None else str(cell) for cell in column]


def identity_file(folder: Path, verb: str) -> Path:
    """Where a run folder keeps the id of the verb's run on wandb."""
    return folder / f"{verb}.wandb.json"


def _identity(config: Config, folder: Path, verb: str) -> tuple[dict[str, Any], bool]:
    """(id, group and place of the run as the folder knows it, whether the id is new).

    A job that goes back to an earlier checkpoint gets a new id: its curve starts where it went back to. As the engine
    does, it goes back once: the same command repeated goes on.
    """
    file = identity_file(folder, verb)
    known = io.read_json(file) if file.exists() else {}
    back_to = config.engine.resume_from if verb == "train" else None
    is_new = "id" not in known or (back_to is not None and known.get("went_back_to") != back_to)
    told = {
        "id": secrets.token_hex(8) if is_new else known["id"],
        "project": config.logger.project,
        "entity": config.logger.entity,
        "group": config.logger.group or known.get("group") or _group_of_others(folder) or folder.resolve().name,
    }
    told |= {} if back_to is None else {"went_back_to": back_to}
    if told != known:
        io.write_json(file, told)
    return told, is_new


def _group_of_others(folder: Path) -> str | None:
    """The group of the run folder's other verbs: an evaluation joins its training."""
    files = (identity_file(folder, verb) for verb in ("train", "search", "evaluate"))
    return next((group for file in files if file.exists() and (group := io.read_json(file).get("group"))), None)


# ---- start ----


def _started(config: Config, folder: Path, verb: str, told: dict[str, Any]) -> tuple[Any, bool]:
    """(wandb's run, whether it is recorded offline)."""
    wandb = _library()
    mode = str(config.logger.mode)
    if mode == WandbMode.online and (why := _why_not_logged_in(wandb)):
        mode = _fall_back(wandb, verb, why)
    try:
        return _init(wandb, config, folder, verb, told, mode), mode == WandbMode.offline
    except Exception as error:  # wandb's own errors: no network, a refused key
        if mode != WandbMode.online:
            raise UserError(
                f"logger.wandb=true but wandb cannot start ({_first_line(error)}); set logger.wandb=false"
            ) from error
        mode = _fall_back(wandb, verb, _first_line(error))
    return _init(wandb, config, folder, verb, told, mode), True


def _library() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"logger.wandb=true but wandb cannot be imported ({error}); pip install wandb, or set logger.wandb=false"
        ) from error
    return wandb


def _why_not_logged_in(wandb: Any) -> str:
    """Why no key is there, without asking a server or the person at the terminal; empty where one is."""
    try:
        there = wandb.login(prompt=False, verify=False)
    except Exception as error:  # a key of the wrong form
        return _first_line(error)
    return "" if there else "nobody is logged in, see `wandb login`"


def _fall_back(wandb: Any, verb: str, why: str) -> str:
    """Give up on the network; returns the mode that needs none."""
    progress.say(verb, f"wandb does not start online ({why}); this run is recorded offline, and nothing is lost")
    wandb.teardown()  # the service keeps the id of the failed start
    return str(WandbMode.offline)


def _init(wandb: Any, config: Config, folder: Path, verb: str, told: dict[str, Any], mode: str) -> Any:
    settings: dict[str, Any] = {"finish_timeout": _FINISH_S, "disable_git": True, "disable_code": True}
    if "WANDB_INIT_TIMEOUT" not in os.environ:
        settings["init_timeout"] = _START_S
    with _plain_arguments():
        return wandb.init(
            project=told["project"],
            entity=told["entity"],
            group=told["group"],
            job_type=verb,
            name=folder.resolve().name if verb != "evaluate" else f"evaluate {folder.resolve().name}",
            id=told["id"],
            resume="allow",
            mode=mode,
            dir=str(folder),
            config=without_secrets({**to_dict(config), "commit": run.provenance()["commit"]}),
            settings=wandb.Settings(**settings),
        )


@contextlib.contextmanager
def _plain_arguments() -> Iterator[None]:
    """Let wandb see the command line without its secrets: it records the arguments."""
    before, sys.argv = sys.argv, [shown("", argument) for argument in sys.argv]
    try:
        yield
    finally:
        sys.argv = before


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def default_entity() -> str:
    """The team or user that runs go to where none is named. Asks wandb's server.

    Raises:
        Exception: wandb's own, where nobody is logged in or the server does not answer.
    """
    return str(_library().Api(timeout=int(_START_S)).default_entity)
