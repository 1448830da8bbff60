"""Composition by Hydra: from the typed overrides to a composed config; Hydra's errors become one sentence.

Choice: Hydra composes and does nothing else: no logging, no working folder, no exit codes. The folder of
``--config-dir`` and ``conf/`` of the
working folder are searched before our own ``conf/``, so a user's file replaces our file of the same name.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lr2train import config as schema
from lr2train.cli.overrides import Override, below, core_of, place_of
from lr2train.config import CONF_FOLDER, Config, UserError, load, reads


def config_folders(given: str | None = None) -> list[Path]:
    """The folders that are searched for configs, in order: the given folder, ``conf/`` of the working folder, our own.

    Raises:
        UserError: the given folder does not exist.
    """
    if given is not None and not Path(given).expanduser().is_dir():
        raise UserError(f"--config-dir={given} is no folder; name a folder of YAML files such as {CONF_FOLDER}")
    folders = [Path(given).expanduser()] if given is not None else []
    folders += [Path("conf")] if Path("conf").is_dir() else []
    return list(dict.fromkeys(folder.resolve() for folder in (*folders, CONF_FOLDER)))


_FOLDERS: ContextVar[Sequence[Path]] = ContextVar(
    "folders", default=()
)  # searched before our own, inside ``searching``


@contextlib.contextmanager
def searching(folders: Sequence[Path]) -> Iterator[None]:
    """Let Hydra search folders in their order. The last folder is our own and holds the primary configs."""
    _register()
    before = _FOLDERS.set(folders[:-1])
    try:
        yield
    finally:
        _FOLDERS.reset(before)


@cache
def _register() -> None:
    """Register the schema, from which ``conf/base.yaml`` starts, and the search path with Hydra."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class Folders(SearchPathPlugin):
        def manipulate_search_path(self, search_path: Any) -> None:
            for folder in reversed(_FOLDERS.get()):
                search_path.prepend("lr2train", f"file://{folder}")

    ConfigStore.instance().store(name="schema", node=Config)
    Plugins.instance().register(Folders)


def composed(name: str, arguments: Sequence[str], folders: Sequence[Path]) -> DictConfig:
    """Compose ``<name>.yaml`` of the first folder that has the file, with the typed overrides on top.

    Raises:
        UserError: an override cannot be parsed, or YAML has read a text as a number.
    """
    overrides = hydra_overrides(name, arguments, folders)
    made = _compose(name, overrides, folders)
    _refuse_changed_text(name, overrides, folders)
    return made


def compose(verb: str, arguments: list[str]) -> Config:
    """Compose ``conf/<verb>.yaml`` with what was typed after the verb, without a command line.

    Raises:
        UserError: an unknown key, group or option, or a value of the wrong type; the text names it.
    """
    with told():
        return load(composed(verb, arguments, config_folders()), verb)


def _compose(name: str, overrides: list[str], folders: Sequence[Path]) -> DictConfig:
    import hydra

    with searching(folders), hydra.initialize_config_dir(str(folders[-1]), version_base="1.3"):
        try:
            return hydra.compose(name, overrides=overrides)
        except (TypeError, ValueError) as error:  # OmegaConf has no own error for a name where a list wants a number
            raise UserError(f"{' '.join(overrides)} cannot be composed ({one_sentence(error)})") from error


def hydra_overrides(name: str, arguments: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """The typed overrides in Hydra's grammar.

    An entry of a list that is addressed by its name comes last, because the composed list tells the entry's number.
    """
    typed = [Override.parse(argument) for argument in arguments]
    first = [one.for_hydra(_no_names) for one in typed if one.place.entry is None]
    named = [one for one in typed if one.place.entry is not None]
    made = _compose(name, first, folders) if named else None
    return first + [one.for_hydra(lambda key, entry: _number_of(made, key, entry)) for one in named]


def _no_names(key: str, entry: str) -> int:
    raise AssertionError(f"{key}.{entry} is addressed by name")


def _number_of(made: DictConfig | None, key: str, entry: str) -> int:
    names = [one.name for one in OmegaConf.select(made, key)]  # type: ignore[arg-type]
    if entry not in names:
        raise UserError(f"{key}.{entry} is not there: {key} has {', '.join(names) or 'no entry'}{_near(entry, names)}")
    return names.index(entry)


def repeated(arguments: Sequence[str]) -> list[str]:
    """The keys that stand more than once on the command line."""
    keys = [Override.parse(argument).key for argument in arguments]
    return [key for key in dict.fromkeys(keys) if keys.count(key) > 1]


def unread(verb: str, arguments: Sequence[str]) -> list[str]:
    """The typed keys that the verb does not read, and keys of Hydra's own that have no effect here."""
    keys = [(one.key, one.is_group) for one in map(Override.parse, arguments)]
    return [
        key
        for key, group in keys
        if key.startswith("hydra.") or (place_of(key).known and not reads(verb, key) and not _of_all(key, group))
    ]


def _of_all(key: str, group: bool) -> bool:
    return group and key.partition(".")[0] in ("hydra", "experiment", "debug", "local")


def _refuse_changed_text(name: str, overrides: list[str], folders: Sequence[Path]) -> None:
    """Refuse a YAML value that is a number where the schema wants text: YAML reads 1e5 as 100000.0.

    Raises:
        UserError: a composed file holds such a value.
    """
    if len(folders) == 1 and not (folders[0] / "local").is_dir():
        return  # our own files alone, of which a test says the same

    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    with searching(folders), initialize_config_dir(str(folders[-1]), version_base="1.3"):
        composed_of = (
            GlobalHydra.instance().config_loader().compute_defaults_list(name, overrides, RunMode.RUN).defaults
        )
    for one in composed_of:
        file = next((found for folder in folders if (found := folder / f"{one.config_path}.yaml").is_file()), None)
        if file is None:  # the schema, or a file of Hydra's own
            continue
        place = place_of(one.package).hint if one.package else Config
        for key, value in _changed(
            OmegaConf.to_container(OmegaConf.load(file), resolve=False), place, one.package or ""
        ):
            raise UserError(
                f"{file}: {key} is text and YAML reads {value!r}, a {type(value).__name__}; put the value in quotes"
            )


def _changed(value: Any, hint: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of each number below a YAML value where the schema declares text."""
    if core_of(hint) is str and isinstance(value, int | float):
        yield key, value
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inside:
        yield from _changed(item, below(hint, str(name)), f"{key}.{name}".lstrip("."))


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turn errors of Hydra and OmegaConf into one sentence.

    Raises:
        UserError: Hydra or OmegaConf raised an error inside.
    """
    from hydra.errors import HydraException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_sentence(error)) from error


def one_sentence(error: Exception) -> str:
    """The essence of an error that Hydra or OmegaConf explains over several lines and causes, and the key that was
    probably meant.
    """
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        text = re.sub(r"\s+", " ", _CHATTER.sub("", str(cause))).strip().removesuffix(".")
        if text and not any(text in seen or seen in text for seen in texts):
            texts.append(text)
        cause = cause.__cause__
    sentence = "; ".join(texts).removeprefix("Error merging override ")
    if preset := _UNKNOWN_PRESET.search(sentence):
        group, name, others = preset.groups()
        return f"{group}={name} is not one of {', '.join(others.split())}{_near(name, others.split())}"
    sentence = _REWORDED[0].sub(_REWORDED[1], sentence)
    if "${" in sentence or "Interpolation" in sentence:
        sentence += "; write \\${ where a text has ${ and names no key"
    unknown = re.search(r"Key '([^']+)' (?:not in|is not in) '(\w+)'", sentence)
    return sentence + _probably_meant(*unknown.groups()) if unknown else sentence


_REWORDED = (
    re.compile(r"Ambiguous value for argument '(.*)' 1\..*"),
    r"\1 has commas; write [a,b] for a list, or add --multirun to run a job for each",
)
_UNKNOWN_PRESET = re.compile(r"Could not find '([^'/]+)/([^']*)' Available options in '\1': (.*)")
_CHATTER = re.compile(
    r"(full_key: |object_type=|reference_type=)\S*|To append to your config use \S+|"
    r"Set the environment variable HYDRA_FULL_ERROR.*|Config search path:[\s\S]*|(?<=Could not load)\s*$"
)


_RENAMED = {
    "activation_checkpointing": "write engine.recompute=layer for true, engine.recompute=none for false",
    "depth": "write search.depths=[0.0] for search.depth=0",
    **dict.fromkeys(
        ("racing", "racing_z", "racing_answers", "proposals", "looks"),
        "search.algorithm=gradient has replaced racing and the surrogate",
    ),
}


def _probably_meant(key: str, type_name: str) -> str:
    if key in _RENAMED:
        return f"; {_RENAMED[key]}"
    if elsewhere := _with_leaf(key):
        return f"; did you mean {' or '.join(elsewhere)}?"
    known = [one.name for one in fields(getattr(schema, type_name))] if hasattr(schema, type_name) else []
    return _near(key, known) or (f"; its keys are {', '.join(known)}" if known else "")


def _with_leaf(name: str) -> list[str]:
    """The keys of the groups that end in a name: hardware.gpus for gpus."""
    groups = ((one.name, one.default_factory) for one in fields(Config) if is_dataclass(one.default_factory))
    return [f"{group}.{name}" for group, made in groups if name in {one.name for one in fields(made)}]  # type: ignore[arg-type]


def _near(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
