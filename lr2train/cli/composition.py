"""The door to Hydra: from what was typed to a composed config, and its errors as one sentence.

Choice: Hydra composes and does nothing else: no logging, no working folder, no exit codes of its own. A user's ``conf/`` in the working folder and
the folder of ``--config-dir`` are searched before ours, so that a file of the same name takes our file's place.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lr2train import config as schema
from lr2train.cli.overrides import Override, below, core_of, place_of
from lr2train.config import CONF_FOLDER, Config, UserError, load, reads


def config_folders(given: str | None = None) -> list[Path]:
    """Where configs are looked for, first come first served: the folder that was given, ``conf/`` of the working folder, ours.

    Raises:
        UserError: the given folder is not there.
    """
    if given is not None and not Path(given).expanduser().is_dir():
        raise UserError(f"--config-dir={given} is no folder; name a folder of YAML files such as {CONF_FOLDER}")
    folders = [Path(given).expanduser()] if given is not None else []
    folders += [Path("conf")] if Path("conf").is_dir() else []
    return list(dict.fromkeys(folder.resolve() for folder in (*folders, CONF_FOLDER)))


_FOLDERS: ContextVar[Sequence[Path]] = ContextVar("folders", default=())  # searched before our own, as long as ``searching`` lasts


@contextlib.contextmanager
def searching(folders: Sequence[Path]) -> Iterator[None]:
    """Have Hydra search folders in their order. The last one is ours, which holds the primary configs."""
    _register()
    before = _FOLDERS.set(folders[:-1])
    try:
        yield
    finally:
        _FOLDERS.reset(before)


@cache
def _register() -> None:
    """Make the schema and the search path known to Hydra; ``conf/base.yaml`` starts from the schema."""
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
    """Compose ``<name>.yaml`` of the first folder that has it, under what was typed.

    Raises:
        UserError: what was typed cannot be read, or a YAML file has changed a text into a number.
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
        except (TypeError, ValueError) as error:  # OmegaConf has no error of its own for a name where a list wants a number
            raise UserError(f"{' '.join(overrides)} cannot be composed ({one_sentence(error)})") from error


def hydra_overrides(name: str, arguments: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """What was typed, in Hydra's grammar. Entries of lists that are addressed by name come last, because the lists have to be known."""
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


def unread(verb: str, arguments: Sequence[str]) -> list[str]:
    """The keys that were typed and that a verb does not read, or that Hydra would read and we do not."""
    keys = [(one.key, one.is_group) for one in map(Override.parse, arguments)]
    return [
        key for key, group in keys if key.startswith("hydra.") or (place_of(key).known and not reads(verb, key) and not _of_all(key, group))
    ]


def _of_all(key: str, group: bool) -> bool:
    return group and key.partition(".")[0] in ("hydra", "experiment", "debug", "local")


def _refuse_changed_text(name: str, overrides: list[str], folders: Sequence[Path]) -> None:
    """YAML reads 1e5 as a number, and a key that is declared as text would get 100000.0.

    Raises:
        UserError: a file that was composed has such a value.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    with searching(folders), initialize_config_dir(str(folders[-1]), version_base="1.3"):
        composed_of = GlobalHydra.instance().config_loader().compute_defaults_list(name, overrides, RunMode.RUN).defaults
    for one in composed_of:
        file = next((found for folder in folders if (found := folder / f"{one.config_path}.yaml").is_file()), None)
        if file is None:  # the schema, or Hydra's own
            continue
        place = place_of(one.package).hint if one.package else Config
        for key, value in _changed(OmegaConf.to_container(OmegaConf.load(file), resolve=False), place, one.package or ""):
            raise UserError(f"{file}: {key} is text and YAML reads {value!r}, a {type(value).__name__}; put the value in quotes")


def _changed(value: Any, hint: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of every text below a YAML value that YAML has read as something else."""
    if core_of(hint) is str and isinstance(value, int | float):
        yield key, value
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inside:
        yield from _changed(item, below(hint, str(name)), f"{key}.{name}".lstrip("."))


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Errors of Hydra and OmegaConf as a sentence of ours.

    Raises:
        UserError: in the place of such an error.
    """
    from hydra.errors import HydraException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_sentence(error)) from error


def one_sentence(error: Exception) -> str:
    """Hydra and OmegaConf explain over several lines and causes; keep what tells, add the key that was probably meant."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        text = re.sub(r"\s+", " ", _CHATTER.sub("", str(cause))).strip()
        if text and not any(text in seen or seen in text for seen in texts):
            texts.append(text)
        cause = cause.__cause__
    sentence = _REWORDED[0].sub(_REWORDED[1], "; ".join(texts)).removeprefix("Error merging override ")
    if "${" in sentence or "Interpolation" in sentence:
        sentence += "; write \\${ where a text has ${ and names no key"
    unknown = re.search(r"Key '([^']+)' (?:not in|is not in) '(\w+)'", sentence)
    return sentence + _probably_meant(*unknown.groups()) if unknown else sentence


_REWORDED = (
    re.compile(r"Ambiguous value for argument '(.*)' 1\..*"),
    r"\1 has commas; write [a,b] for a list, or add --multirun to run a job for each",
)
_CHATTER = re.compile(
    r"(full_key: |object_type=|reference_type=)\S*|To append to your config use \S+|"
    r"Set the environment variable HYDRA_FULL_ERROR.*|Config search path:[\s\S]*|(?<=Could not load)\s*$"
)


def _probably_meant(key: str, type_name: str) -> str:
    known = [one.name for one in fields(getattr(schema, type_name))] if hasattr(schema, type_name) else []
    return _near(key, known) or (f"; its keys are {', '.join(known)}" if known else "")


def _near(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
