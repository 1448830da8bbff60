"""Tasks of lm-eval, loaded: by name, with a number of few-shot examples, and from a folder of the user's task files.

Choice: a folder of task files is data. Code that such a file names is refused, and templates run in a sandbox.
lm-eval's own tasks may use lm-eval's own functions. Data sets come from local files and from the local cache; the hub
is asked only where downloads are allowed. Cost: lm-eval's template environment, progress bar and log level, and the
offline switches of Hugging Face, are global; they are replaced while tasks run.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import huggingface_hub
import jinja2
import jinja2.sandbox
import lm_eval
import numpy as np
import yaml
from lm_eval import utils as lm_eval_utils
from lm_eval.api import task as lm_eval_task
from lm_eval.api.registry import metric_registry
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from lr2train import ranks
from lr2train.config import UserError
from lr2train.parallel import control

MEAN_OF_TASKS = "_mean_of_tasks"  # the end of the name of a group's metric
_NAMES_CODE = ("class", "custom_dataset", "use_prompt", "unsafe_code")  # keys of a task file


class _Generators:
    """Python's and numpy's global random numbers, seeded as lm-eval's command line does; ours come back afterwards."""

    def __init__(self) -> None:
        self._after_loading: Any = None

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """The first time, when tasks are loaded, from the seed on; later from where loading ended."""
        before = random.getstate(), np.random.get_state()
        if self._after_loading is None:
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
        else:
            random.setstate(self._after_loading[0])
            np.random.set_state(self._after_loading[1])
        try:
            yield
        finally:
            self._after_loading = self._after_loading or (random.getstate(), np.random.get_state())
            random.setstate(before[0])
            np.random.set_state(before[1])


@dataclass
class Loaded:
    """The tasks behind one name.

    Attributes:
        task: lm-eval's name.
        shots: few-shot examples; None: the task's own number.
        metric: that stands in tables; None: see ``harness.TaskResult``.
        allow_download: whether the tasks may fetch something.
        tasks: lm-eval's objects.
        generators: the random numbers of these tasks.
    """

    task: str
    shots: int | None
    metric: str | None
    allow_download: bool = False
    tasks: Any = None
    generators: _Generators = field(default_factory=_Generators)

    def named(self, task: str) -> str:
        """A task as tables show it."""
        return task if self.shots is None else f"{task}@{self.shots}"


def load_on_all_ranks(
    names: Sequence[str],
    task_path: str | Path | None,
    allow_download: bool,
    log: Callable[[str], None],
    others: Sequence[str] = (),
) -> list[Loaded]:
    """All tasks, on every rank; rank 0 comes first, so that a data set is fetched once.

    Args:
        names, task_path, allow_download, log: as in ``harness.load_tasks``.
        others: names that are none of lm-eval's, and may be meant by an unknown one.
    """
    held: list[Loaded] = []

    def load() -> None:
        wanted = [replace(parsed(name), allow_download=allow_download) for name in names]
        manager = manager_of([one.task for one in wanted], task_path, allow_download)
        for one in wanted:
            _refuse_unknown(one.task, manager, others)
            _load(one, manager, log)
        held.extend(wanted)

    control.on_rank_0(load)
    control.together(lambda: None if ranks.rank() == 0 else load())
    return held


def parsed(name: str) -> Loaded:
    """A name of ``eval.tasks`` (``task``, ``task@examples``, ``task@examples:metric``), not loaded yet.

    Raises:
        UserError: the name has another form.
    """
    parts = re.fullmatch(r"([^@:]+)(?:@(\d{1,4}))?(?::([^@:]+))?", name)
    if parts is None:
        raise UserError(
            f"eval.tasks names {name!r}, which has another form than task, task@examples or task@examples:metric; "
            "write it like mmlu@5"
        )
    task, shots, metric = parts.groups()
    return Loaded(task, None if shots is None else int(shots), metric)


def manager_of(wanted: Sequence[str], task_path: str | Path | None, allow_download: bool) -> TaskManager:
    """lm-eval's index of tasks, with those of a folder.

    lm-eval's own 14 000 tasks take ten seconds to index. They are left out where the folder has all that is wanted.
    """
    if task_path is None:
        return _lm_evals_own()
    folder = Path(task_path).expanduser()
    _check_folder(folder, allow_download)
    alone = TaskManager(include_path=str(folder), include_defaults=False)
    if wanted and all(_is_whole(alone.task_index, name) for name in wanted):
        return alone
    return TaskManager(include_path=str(folder))


@functools.cache  # one evaluation asks for several models
def _lm_evals_own() -> TaskManager:
    return TaskManager()


def _is_whole(index: Mapping[str, Any], name: str) -> bool:
    """Whether an index has a name and all that a group of this name lists."""
    return name in index and all(one == name or _is_whole(index, one) for one in _members(index[name]))


def _members(entry: Any) -> list[str]:
    """The names that a group or tag lists."""
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    listed = (entry.cfg or {}).get("task")  # of a single task: its name
    names = [one.get("task") or one.get("group") if isinstance(one, dict) else one for one in listed or ()]
    return [one for one in names if isinstance(one, str)] if isinstance(listed, list) else []


def _refuse_unknown(task: str, manager: TaskManager, others: Sequence[str]) -> None:
    if task in manager.task_index:
        return
    near = difflib.get_close_matches(task, {*others, *manager.all_tasks}, 3)
    remedy = f"; the closest names are {', '.join(near)}" if near else "; set eval.task_path to a folder that has it"
    raise UserError(f"eval.tasks names {task}, which neither lr2train nor lm-eval knows{remedy}")


def _load(one: Loaded, manager: TaskManager, log: Callable[[str], None]) -> None:
    if unsafe := _first_with("unsafe_code", manager.task_index, one.task):
        raise UserError(
            f"the task {unsafe} of lm-eval runs code that the model wrote, which is not supported; leave it out"
        )
    if not one.allow_download and (maker := _first_with("custom_dataset", manager.task_index, one.task)):
        raise UserError(
            f"the task {maker} of lm-eval makes its data set with code that downloads, and downloads are off; "
            "set model.allow_download=true"
        )
    try:
        with one.generators.used():
            one.tasks = manager.load([one.task])
    except UserError:
        raise
    except Exception as error:  # of data sets, templates, missing packages: a dozen kinds, each means the same
        raise _not_loaded(one.task, error) from error
    _check_metric(one)
    for task in one.tasks["tasks"].values():
        _set_shots(task, one.shots, log)
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"the task {task.task_name} of lm-eval needs images or sound; leave it out")


def _check_metric(one: Loaded) -> None:
    if one.metric is None:
        return
    known = {metric for task in one.tasks["tasks"].values() for metric in task.aggregation()}
    of_groups = {metric + MEAN_OF_TASKS for metric in known} if one.tasks.get("groups") else set()
    if one.metric.split(",")[0] not in known | of_groups:
        raise UserError(
            f"eval.tasks asks for the metric {one.metric} of {one.task}, which has "
            f"{', '.join(sorted(known | of_groups))}; name one of these"
        )


def _set_shots(task: Any, shots: int | None, log: Callable[[str], None]) -> None:
    """As lm-eval's command line: a task whose own file says 0 stays at 0."""
    own = task.get_config("num_fewshot")
    if shots is not None and own == 0 != shots:
        log(f"{task.task_name} has no few-shot examples by its own definition, so @{shots} has no effect")
    elif shots is not None or own is None:
        task.set_config(key="num_fewshot", value=shots or 0)


def _first_with(key: str, index: Mapping[str, Any], name: str) -> str | None:
    """The first task behind a name whose file sets a key; no code of the file is looked at."""
    entry = index.get(name)
    if entry is None:
        return None
    inner = (_first_with(key, index, one) for one in _members(entry) if one != name)
    return name if (entry.cfg or {}).get(key) else next((one for one in inner if one), None)


def _not_loaded(task: str, error: Exception) -> UserError:
    said = " ".join(str(error).split())[:200] or "no reason given"
    if not _offline_is_why(error):
        return UserError(f"lm-eval cannot load the task {task} ({type(error).__name__}: {said})")
    remedy = (
        "HF_HUB_OFFLINE is set; unset it and set model.allow_download=true"
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() not in ("", "0", "FALSE", "NO", "OFF")
        else "downloads are off; set model.allow_download=true"
    )
    return UserError(
        f"the task {task} needs a data set of the Hugging Face hub that is not in the local cache, and {remedy}"
    )


def _offline_is_why(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, huggingface_hub.errors.OfflineModeIsEnabled) or "OfflineModeIsEnabled" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


# Task files of a user: data, never code


def _check_folder(folder: Path, allow_download: bool) -> None:
    """Refuse a folder of task files that is none, or whose files name code.

    Raises:
        UserError: see above; the text names the file.
    """
    files = sorted(folder.rglob("*.yaml"))
    if not files:
        raise UserError(f"eval.task_path={folder} has no task file (.yaml); set eval.task_path to a folder of them")
    done: set[Path] = set()
    for file in files:
        _check_file(file.resolve(), allow_download, done)


def _check_file(file: Path, allow_download: bool, done: set[Path]) -> None:
    """Check a task file and the files that it includes; lm-eval's own files may name lm-eval's own functions."""
    if file in done or file.is_relative_to(Path(lm_eval.__file__).resolve().parent / "tasks"):
        return
    done.add(file)
    try:
        config = yaml.safe_load(file.read_bytes())  # a tag such as !function is an error to this loader
    except yaml.constructor.ConstructorError as error:
        raise _code(file, str(error.problem)) from error
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"eval.task_path: {file} cannot be read as YAML ({' '.join(str(error).split())[:150]}); correct it"
        ) from error
    if not isinstance(config, dict):
        return
    members = config.get("task")  # of a group: names, and tasks that are written out
    inner = [one for one in members if isinstance(one, dict)] if isinstance(members, list) else []
    for one in (config, *inner):
        _check_config(file, one, allow_download)
    included = config.get("include") or []
    for one in included if isinstance(included, list) else [included]:
        _check_file((file.parent / str(one)).resolve(), allow_download, done)


def _check_config(file: Path, config: Mapping[str, Any], allow_download: bool) -> None:
    known = set(metric_registry)
    for key in _NAMES_CODE:
        if config.get(key):
            raise _code(file, f"{key}: {config[key]}")
    for metric in config.get("metric_list") or ():
        # lm-eval runs an unknown metric as a script of the hub or of a folder
        if isinstance(metric, dict) and (metric.get("hf_evaluate") or metric.get("metric") not in known):
            raise _code(file, f"metric: {metric.get('metric')}")
    remote = [text for text in _texts(config.get("dataset_kwargs")) if "://" in text]
    if remote and not allow_download:
        raise UserError(
            f"eval.task_path: {file} names {remote[0]}, and downloads are off; set model.allow_download=true"
        )


def _code(file: Path, what: str) -> UserError:
    return UserError(
        f"eval.task_path: {file} names code ({what}), and nothing from a folder of data is executed; "
        "write the task without it"
    )


def _texts(value: Any) -> Iterator[str]:
    """All strings in a value of a YAML file."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)


@contextlib.contextmanager
def lm_eval_as_data(allow_download: bool) -> Iterator[None]:
    """lm-eval without its bars and lines, its templates in a sandbox, and its data sets from local files and from the
    cache alone where nothing may be downloaded. Everything is as before afterwards.
    """
    sandbox = jinja2.sandbox.SandboxedEnvironment(
        loader=jinja2.BaseLoader(), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    sandbox.filters.update(lm_eval_utils.env.filters)
    logger, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level = logger.level
    with contextlib.ExitStack() as changes:
        changes.enter_context(_replaced(lm_eval_utils, "env", sandbox))
        changes.enter_context(_replaced(lm_eval_task, "tqdm", lambda items, **_: items))
        changes.enter_context(_replaced(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False))  # asks the network too
        if not allow_download:
            changes.enter_context(_replaced(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
            changes.enter_context(_replaced(datasets.config, "HF_HUB_OFFLINE", True))
        logger.setLevel(logging.CRITICAL)
        changes.callback(logger.setLevel, level)
        datasets.disable_progress_bars()
        if not bars:
            changes.callback(datasets.enable_progress_bars)
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
