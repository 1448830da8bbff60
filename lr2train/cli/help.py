"""``lr2train VERB --help``: the keys that the verb reads, each with its type, value, limits and comment, and the
presets of each group.

Choice: the schema's source is the one place where a key is explained, so the help reads the comments there. The values
are those that the
command line gives: ``lr2train train experiment=tiny_4k --help`` shows what that experiment sets.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from lr2train.cli.overrides import core_of
from lr2train.config import VERBS, Config, Limits, reads, schema

_INDENT, _VALUE_CHARACTERS = " " * 6, 60
_TYPES = {int: "integer", float: "number", str: "text", bool: "true | false", Any: "value"}

_FLAGS = """Flags:
  --cfg job            print the whole config that this command line gives, and run nothing
  --multirun           run a job for each combination of values: optim.lr=1e-5,2e-5
  --config-dir DIR     YAML files in DIR take precedence over conf/ of the working folder and of lr2train
  --hydra-help         all flags of Hydra"""


def overview() -> str:
    """All verbs, a line each."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {summary(verb)}" for verb in VERBS]
    return "\n".join(
        [
            "lr2train extends the context window of a pretrained causal language model with LongRoPE2.",
            "",
            "  lr2train VERB key=value …      lr2train VERB --help",
            "",
            *lines,
            "",
            "On several ranks: deepspeed --no_local_rank --module lr2train train … (also search, evaluate, doctor)",
        ]
    )


def summary(verb: str) -> str:
    """The first sentence of a verb's module."""
    return " ".join(_about(verb).split("\n\n")[0].partition(": ")[2].split())


def _about(verb: str) -> str:
    """The docstring of a verb's module, without importing it: torch takes seconds."""
    source = (Path(inspect.getfile(schema)).parents[1] / f"{verb}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""


class Key(NamedTuple):
    """A key of the schema."""

    name: str  # dotted; data.sources.NAME.path in the entries of a list
    owner: type  # the dataclass that declares it
    field: Field[Any]
    hint: Any  # its type


def of_verb(verb: str, composed: DictConfig, folders: Sequence[Path]) -> str:
    """The help of a verb.

    Args:
        verb: its name.
        composed: the config of this command line.
        folders: where presets are searched.
    """
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    parts = [
        _about(verb),
        "Config keys, each with the value that results from this command line, its type and its limits:",
    ]
    for group, keys in itertools.groupby(
        _keys_of(verb), lambda key: key.name.partition(".")[0] if "." in key.name else ""
    ):
        head = [f"{group}: {_doc(Config, group)}" if group else "general", *_presets(group, folders)]
        parts.append("\n".join([*head, *(line for key in keys for line in _entry(key, composed, width))]))
    parts += ["\n".join(["experiment: presets that set keys of several groups", *_presets("experiment", folders)])]
    return "\n\n".join([*parts, _FLAGS])


def _keys_of(verb: str) -> list[Key]:
    """The keys that a verb reads, those without a group first, each group together."""
    keys = [key for key in _keys(Config) if reads(verb, key.name)]
    return sorted(keys, key=lambda key: "." in key.name)  # the sort is stable


def _keys(owner: type, prefix: str = "") -> Iterator[Key]:
    hints = get_type_hints(owner)
    for one in fields(owner):  # type: ignore[arg-type]
        core = core_of(hints[one.name])
        entry = get_args(core)[0] if get_origin(core) is list else None
        if is_dataclass(core):
            yield from _keys(core, f"{prefix}{one.name}.")  # type: ignore[arg-type]
        elif is_dataclass(entry):
            yield from _keys(entry, f"{prefix}{one.name}.NAME.")  # type: ignore[arg-type]
        else:
            yield Key(f"{prefix}{one.name}", owner, one, hints[one.name])


def _doc(owner: type, name: str) -> str:
    return " ".join((inspect.getdoc(core_of(get_type_hints(owner)[name])) or "").split())


def _presets(group: str, folders: Sequence[Path]) -> list[str]:
    """A line with the choices of a config group; none where the group has no file or a single one."""
    names = sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")}) if group else []
    return [f"  presets: {', '.join(f'{group}={name}' for name in names)}"] if len(names) > 1 else []


def _entry(key: Key, composed: DictConfig, width: int) -> Iterator[str]:
    yield f"  {key.name}{_value(key, composed)}  ({_kind(key)})"
    about = _comments()[key.owner.__name__, key.field.name]
    yield from textwrap.wrap(about, width, initial_indent=_INDENT, subsequent_indent=_INDENT)


def _value(key: Key, composed: DictConfig) -> str:
    """`` = value``; nothing for a key in the entries of a list, because each entry has a value of its own."""
    if ".NAME." in key.name:
        return ""
    group, _, name = key.name.rpartition(".")
    if OmegaConf.is_missing(OmegaConf.select(composed, group) if group else composed, name):
        return "=…  has to be given"
    value = OmegaConf.select(composed, key.name)
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    shown = "null" if plain is None else str(plain).lower() if isinstance(plain, bool) else str(plain)
    return f" = {shown if len(shown) <= _VALUE_CHARACTERS else shown[:_VALUE_CHARACTERS] + '…'}"


def _kind(key: Key) -> str:
    """The type of a key with its choices or limits, in words."""
    null = " or null" if NoneType in get_args(key.hint) else ""
    if choices := key.field.metadata.get("choices"):
        own = " | package.module.NAME" if key.field.metadata.get("plugins") else ""
        return " | ".join(choices.__members__) + own + null
    core = core_of(key.hint)
    one = "path" if key.field.metadata.get("path") else _TYPES.get(core) or _TYPES[get_args(core)[-1]]
    many = {list: f"list of {one}s", dict: f"dictionary of {one}s"}
    limits: Limits | None = key.field.metadata.get("limits")
    words = limits.in_words() if limits else ""
    return f"{many.get(get_origin(core), one)} {words}".rstrip() + null


@cache
def _comments() -> dict[tuple[str, str], str]:
    """(class, field) -> the comment above the field in the schema's source."""
    lines = inspect.getsource(schema).splitlines()
    found = {}
    for node in ast.parse("\n".join(lines)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for one in node.body:
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
                above = itertools.takewhile(
                    lambda line: line.startswith("#"), map(str.strip, lines[one.lineno - 2 :: -1])
                )
                found[node.name, one.target.id] = " ".join(reversed([line.removeprefix("#").strip() for line in above]))
    return found
