"""From a composed Hydra config to a ``Config`` whose values a verb can take.

Choice: one validation point, at the top of a verb. Limits and choices come from the fields; a check that needs several
keys stands here.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from lr2train.config.fields import UserError, as_typed
from lr2train.config.gpus import GPUS, memory_gib, peak_tflops
from lr2train.config.plugins import is_plugin
from lr2train.config.schema import Config
from lr2train.config.verbs import reads


def load(composed: DictConfig, verb: str) -> Config:
    """Turn a composed Hydra config into a ``Config`` whose values a verb can take.

    Raises:
        UserError: a mandatory key is missing, or the value of a key that the verb reads is out of its limits.
    """
    if missing := sorted(_missing(composed)):
        key = missing[0]
        raise UserError(f"{key} has no value and no default; set it on the command line: {key}=…")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    _with_homes(config)
    _with_runs(config, verb)
    for key, one, value in _leaves(config):
        if reads(verb, key):
            _check(key, one, value)
    _with_members(config)
    refuse_together(config, verb)
    return config


def refuse_together(config: Config, verb: str) -> None:
    """Refuse values that do not go together, and fill in a key that others decide.

    Raises:
        UserError: two keys that the verb reads contradict each other.
    """
    for verbs, check in _TOGETHER:
        if verb in verbs:
            check(config)


def runs_of(run: str | None) -> list[str]:
    """The runs that ``run=`` names: one, or several between brackets; a folder that is there is one."""
    if run is None or not run.strip():
        return []
    several = run.startswith("[") and run.endswith("]") and not os.path.isdir(run)
    return [one.strip().strip("'\"") for one in run[1:-1].split(",") if one.strip()] if several else [run]


def _with_runs(config: Config, verb: str) -> None:
    """Put the absolute folder in the place of a run that is a folder and not a name in runs_folder.

    Raises:
        UserError: several runs are named, and the verb takes one.
    """
    runs = runs_of(config.run)
    if len(runs) > 1 and verb != "evaluate":
        raise UserError(f"run={config.run} names several runs, and {verb} takes one; set run to {runs[0]}")
    found = [
        os.path.abspath(one) if not os.path.isdir(os.path.join(config.runs_folder, one)) and os.path.isdir(one) else one
        for one in map(os.path.expanduser, runs)
    ]
    config.run = f"[{','.join(found)}]" if len(found) > 1 else found[0] if found else None


def _missing(node: Any, prefix: str = "") -> Iterator[str]:
    """The keys without a value and without a default.

    Raises:
        UserError: the ``${…}`` of a value leads nowhere; the text names the key and the value as they stand.
    """
    for name in node if isinstance(node, DictConfig) else range(len(node)):
        key = f"{prefix}{name}"
        if OmegaConf.is_missing(node, name):
            yield key
            continue
        try:
            value = node[name]
        except InterpolationResolutionError as error:
            raw = OmegaConf.to_container(node, resolve=False)[name]  # type: ignore[index, call-overload]
            cause = " ".join(str(error).split("\n")[0].split())
            raise UserError(
                f"{key}={raw} cannot be resolved ({cause}); write \\${{ where a text has ${{ and names no key"
            ) from error
        if OmegaConf.is_config(value):
            yield from _missing(value, f"{key}.")


def typed_key(key: str) -> str:
    """A key as the command line takes it: ``data.sources.0.path`` for ``data.sources[0].path``."""
    return re.sub(r"\[(\d+)\]", r".\1", key)


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values (enums by name), for provenance and comparison."""
    return {one.name: _plain(getattr(config, one.name)) for one in fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return to_dict(value) if hasattr(value, "__dataclass_fields__") else value


def _with_homes(node: Any) -> None:
    """Put the home folder in the place of ``~`` where a path begins with it."""
    for one in fields(node):
        value = getattr(node, one.name)
        if is_dataclass(value):
            _with_homes(value)
        elif isinstance(value, list) and one.metadata.get("path"):
            setattr(node, one.name, [os.path.expanduser(item) for item in value])
        elif isinstance(value, list):
            for item in filter(is_dataclass, value):
                _with_homes(item)
        elif value is not None and one.metadata.get("path"):
            setattr(node, one.name, os.path.expanduser(value))


def _with_members(node: Any) -> None:
    """Put the Enum's member in the place of its name. A wrong name, of a key that the verb does not read, stays."""
    for one in fields(node):
        value, choices = getattr(node, one.name), one.metadata.get("choices")
        if choices and value in choices.__members__:
            setattr(node, one.name, choices[value])
        for item in value if isinstance(value, list) else [value]:
            if is_dataclass(item):
                _with_members(item)


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """(key, field, value) of everything below a dataclass; in a list of named things the name stands in the key."""
    for one in fields(node):
        key, value = f"{prefix}{one.name}", getattr(node, one.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{key}.")
        elif isinstance(value, list) and value and is_dataclass(value[0]):
            for number, item in enumerate(value):
                yield from _leaves(item, f"{key}.{getattr(item, 'name', number)}.")
        else:
            yield key, one, value


def _check(key: str, one: Field[Any], value: Any) -> None:
    """Refuse a value that its field does not take. null, where the type allows it, is for the reader of the key."""
    choices, limits = one.metadata.get("choices"), one.metadata.get("limits")
    if one.metadata.get("plugins") and is_plugin(value):
        return  # imported where it is used
    if choices and value not in choices.__members__ and not (value is None and one.default is None):
        names = list(choices.__members__)
        close = difflib.get_close_matches(str(value), names, n=1) or names
        shown = ", ".join((["null"] if one.default is None else []) + names)
        raise UserError(f"{key}={as_typed(value)} is not one of {shown}; set {key} to {close[0]}")
    if limits is None or value is None:
        return
    default = one.default_factory() if callable(one.default_factory) else one.default
    if limits.count is not None and len(value) != limits.count:
        raise UserError(
            f"{key}={as_typed(value)} holds {len(value)} of {limits.count} numbers; set {key} to {as_typed(default)}"
        )
    for name, item, usual in _numbers(key, value, default):
        if (why := limits.why_not(item)) is not None:
            raise UserError(f"{name}={as_typed(item)} {why}; set {name} to {limits.nearest(item, usual)}")


def _numbers(key: str, value: Any, default: Any) -> Iterator[tuple[str, float, Any]]:
    """(key, number, default) of a number, or of each number in a list or a dict."""
    if isinstance(value, list):
        usual = default if len(default) == len(value) else [None] * len(value)
        yield from ((f"{key}.{index}", item, usual[index]) for index, item in enumerate(value))
    elif isinstance(value, dict):
        yield from ((f"{key}.{name}", item, None) for name, item in value.items())
    else:
        yield key, value, default


_NAME = re.compile(r"\w[\w.+=-]*")  # one folder, inside runs_folder, that no shell or pattern trips over


def _check_name(config: Config) -> None:
    if not _NAME.fullmatch(config.name):
        raise UserError(
            f"name={config.name!r} is no name of a folder in runs_folder={config.runs_folder}; begin with a letter or "
            "a digit and go on with "
            "those, '.', '_', '+', '=' or '-'"
        )


def _check_parents(config: Config) -> None:
    population, top_k = config.search.population, config.search.top_k
    most = population if config.search.algorithm == "gradient" else population - 1  # children need room
    if top_k > most:
        remedy = f"search.top_k to {max(1, population // 4)}" if most else "search.population to 2"
        raise UserError(
            f"search.top_k={top_k} is above {most}, which search.population={population} leaves room for; set {remedy}"
        )


def _check_group(config: Config) -> None:
    group, total = config.data.group_segments, config.optim.segments_per_step
    if group and total % group:
        raise UserError(
            f"data.group_segments={group} does not divide optim.segments_per_step={total}; set data.group_segments to "
            "0, which chooses a divisor"
        )


def _check_shards(config: Config) -> None:
    """The remedy divides what ``sp`` divides: the ranks of the launch stay a multiple, and the corpus stays as it was
    planned.
    """
    length, sp, ring = config.data.segment_tokens, config.parallel.sp, config.parallel.ring
    if length % sp:
        raise UserError(
            f"data.segment_tokens={length} is not divisible by parallel.sp={sp}; set parallel.sp to "
            f"{math.gcd(length, sp)}"
        )
    if ring and sp % ring:
        raise UserError(
            f"parallel.ring={ring} does not divide parallel.sp={sp}; set parallel.ring to 0, which chooses a divisor"
        )


def _with_the_gpu(config: Config) -> None:
    """Put peak and memory of ``hardware.gpu`` in the place of 0."""
    hardware = config.hardware
    hardware.gpu_bf16_tflops = hardware.gpu_bf16_tflops or peak_tflops(hardware.gpu) or 0.0
    hardware.gpu_memory_gib = hardware.gpu_memory_gib or memory_gib(hardware.gpu) or 0.0
    if not hardware.gpu_bf16_tflops:
        known = ", ".join(name for name, *_ in GPUS)
        raise UserError(
            f"hardware.gpu={hardware.gpu} is none of the GPUs whose peak is known ({known}); set "
            "hardware.gpu_bf16_tflops to its dense bf16 peak in TFLOP/s"
        )
    if not hardware.gpu_memory_gib:
        raise UserError(
            f"hardware.gpu={hardware.gpu} is no GPU of one known memory size; set hardware.gpu_memory_gib to its "
            "memory in GiB"
        )


def _check_offload(config: Config) -> None:
    if config.engine.offload_inputs and config.engine.recompute == "none":
        raise UserError(
            "engine.offload_inputs=true moves what recomputed layers keep, and engine.recompute=none recomputes none; "
            "set engine.recompute to auto"
        )


def _check_distillation(config: Config) -> None:
    weight = config.optim.distill_short
    if weight and config.model.path is None:
        raise UserError(
            f"optim.distill_short={weight} keeps a model near the one at model.path, and model.path is empty; set "
            "optim.distill_short to 0"
        )


def _check_jumps(config: Config) -> None:
    if config.data.long_positions == "skip" and config.data.kind == "curriculum":
        raise UserError(
            "data.long_positions=skip is for long segments, and data.kind=curriculum has short ones alone; set "
            "data.long_positions to full"
        )


def _check_settling(config: Config) -> None:
    n = config.optim.settle_validations
    if n and not config.engine.validate_every_steps:
        raise UserError(
            f"optim.settle_validations={n} looks at held-out losses, and engine.validate_every_steps=0 measures none; "
            "set optim.settle_validations to 0"
        )


def _check_zero(config: Config) -> None:
    """Refuse what DeepSpeed cannot run, and what it would leave out in silence (docs/RUNNING.md has the table)."""
    stage, dtype = config.engine.zero_stage, config.model.dtype
    if stage == 0 and dtype != "float32":
        raise UserError(
            f"engine.zero_stage=0 trains in float32 alone, and model.dtype={dtype}; set engine.zero_stage to 1"
        )
    for key, least, used in (
        ("offload_optimizer.device", 1, lambda value: value != "none"),
        ("offload_param.device", 3, lambda value: value != "none"),
        ("zero_hpz_partition_size", 3, lambda value: value != 1),
    ):
        path = f"zero_optimization.{key}"
        value = _value_at(config.engine.deepspeed, path)
        if stage < least and value is not None and used(value):
            raise UserError(
                f"engine.deepspeed.{path}={as_typed(value)} has no effect with engine.zero_stage={stage}; set "
                f"engine.zero_stage to {least}"
            )


def _value_at(values: Any, path: str) -> Any:
    """The value under a dotted path of nested dictionaries; None where there is none."""
    for name in path.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


_TOGETHER: tuple[tuple[tuple[str, ...], Callable[[Config], None]], ...] = (
    (("prepare", "search", "train", "evaluate", "generate", "plan", "rehearse"), _check_name),
    (("search", "plan"), _check_parents),
    (("train", "inspect", "plan", "rehearse"), _check_group),
    (("train", "plan", "rehearse"), _check_shards),
    (("plan", "rehearse"), _with_the_gpu),
    (("train", "plan", "rehearse"), _check_offload),
    (("train", "plan", "rehearse"), _check_zero),
    (("train", "plan", "rehearse"), _check_distillation),
    (("train", "plan", "rehearse"), _check_jumps),
    (("train", "plan", "rehearse"), _check_settling),
)
"""Checks of several keys, which may fill in a key that others decide, and the verbs that read all these keys."""
