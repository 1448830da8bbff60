"""The settings of a finished run, laid under the config of a verb that reads the run: ``run=first`` is enough.

Choice: a key of ``model`` or ``data.needles`` that has its dataclass default counts as not given, and the run's own
value takes its place. Every other value wins over the run's. Cost: such a verb cannot set a key back to its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from lr2train import io, progress
from lr2train.config import Config, UserError, runs_of
from lr2train.model.load import is_hub_id

T = TypeVar("T")


def named(config: Config) -> list[str]:
    """The runs that ``run=`` names."""
    return runs_of(config.run)


def folder_of(config: Config, name: str) -> Path:
    """The folder of a run: its name in ``runs_folder``, or a path."""
    return Path(config.runs_folder) / name


def is_run(config: Config, name: str) -> bool:
    """Whether a training was started in this folder."""
    folder = folder_of(config, name)
    return (folder / "train.config.json").exists() or (folder / "train.json").exists()


def run_folder(config: Config) -> Path:
    """The folder of the one run that ``run=`` names.

    Raises:
        UserError: ``run`` is empty.
    """
    runs = named(config)
    if not runs:
        raise UserError("run is empty; set run=<name of a finished training run>")
    return folder_of(config, runs[0])


def completed(config: Config, with_model: bool = True) -> Config:
    """``config`` over the run's ``train.config.json``: how the base is read, dtype of the weights, corpus and needles.

    ``model.path`` is the run's base model, whatever an experiment names. Only if this folder is gone, the config's own
    ``model.path`` stands in for it.

    Args:
        config: of the verb; ``run`` names the run.
        with_model: whether the run has written its model, whose dtype counts. If not, the dtype of training counts.

    Raises:
        UserError: the run has no saved config, or no model yet.
    """
    folder = run_folder(config)
    saved = io.read_json(folder / "train.config.json")
    written = io.read_json(folder / "model" / "config.json") if with_model else saved["model"]
    model = _laid_over(config.model, {**saved["model"], "dtype": written["dtype"]})
    needles = _laid_over(config.data.needles, saved["data"]["needles"])
    data = replace(config.data, path=config.data.path or saved["data"]["path"], needles=needles)
    return replace(config, model=replace(model, path=_base(config, saved["model"]["path"])), data=data)


def _base(config: Config, trained_from: str | None) -> str | None:
    """Where the run's base model is now: a folder may have moved since the training."""
    given = config.model.path
    if not trained_from or not given or is_hub_id(trained_from):
        return trained_from
    if Path(trained_from).expanduser().is_dir() or not Path(given).expanduser().is_dir():
        return trained_from
    progress.say("model", f"the run's base model {trained_from} is not here any more; model.path={given} stands in")
    return given


def _laid_over(given: T, saved: Mapping[str, Any]) -> T:
    """``given`` with the keys that have their default taken from ``saved``. For config groups of plain values alone."""
    default = type(given)()
    names = [one.name for one in fields(given) if one.name in saved]  # type: ignore[arg-type]
    return replace(given, **{name: saved[name] for name in names if getattr(given, name) == getattr(default, name)})  # type: ignore[type-var]
