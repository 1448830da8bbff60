"""Python and the packages: which versions are here, whether lr2train is tested with them, and whether they load."""

from __future__ import annotations

import contextlib
import importlib
import io as streams
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

import lr2train
from lr2train import run
from lr2train.diagnosis.findings import Findings

SECTION = "Versions"
_PACKAGE = "lr2train"
_OF_DEVELOPERS = {"pytest", "pytest-xdist", "hypothesis", "ruff", "pyright", "setuptools"}
_MODULES = {  # distribution -> module, of everything that a person asks about
    "torch": "torch",
    "deepspeed": "deepspeed",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "datasets": "datasets",
    "numpy": "numpy",
    "hydra-core": "hydra",
    "wandb": "wandb",
    "wandb-workspaces": "wandb_workspaces",
    "tensorboard": "tensorboard",
    "flash-attn": "flash_attn",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-4": "flash_attn.cute",
    "ring-flash-attn": "ring_flash_attn",
    "liger-kernel": "liger_kernel",
    "lm-eval": "lm_eval",
}
_LOADED = ("transformers", "deepspeed", "flash-attn", "liger-kernel", "datasets")  # tried: an import may fail


def look(found: Findings) -> None:
    """Note Python's and the packages' versions; name those that are missing, differ from the pins, or do not load."""
    found.note(SECTION, "lr2train", _own_version())
    found.note(SECTION, "python", f"{platform.python_version()} ({platform.system()} {platform.release()})")
    pins = _pins()
    for name, module in _MODULES.items():
        version = version_of(name)
        failed = _why_not_loaded(module) if version and name in _LOADED else ""
        found.note(SECTION, name, _words(version, pins.get(name), failed))
        if failed:
            found.problem(
                f"{name} {version} cannot be imported ({failed})", f"install {name} again", stops=name in pins
            )
    for name, pin in pins.items():
        _compare(found, name, pin)


def version_of(name: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _own_version() -> str:
    folder = Path(lr2train.__file__).parent
    how = "installed" if Path(sysconfig.get_path("purelib")) in folder.parents else "a checkout"
    commit = run.provenance()["commit"]
    return f"{lr2train.__version__} ({how}{f' of {commit}' if commit else ''})"


def _words(version: str | None, pin: Requirement | None, failed: str) -> str:
    if version is None:
        return "not installed" + ("" if pin is None else f", and lr2train needs {pin.specifier}")
    if failed:
        return f"{version}, cannot be imported"
    return version if pin is None or pin.specifier.contains(_public(version)) else f"{version}, tested {pin.specifier}"


def _public(version: str) -> str:
    """A version without its build: 2.13.0 for 2.13.0+cpu."""
    return version.partition("+")[0]


def _compare(found: Findings, name: str, pin: Requirement) -> None:
    """Name a required package that is missing or has another version than the pinned one."""
    version = version_of(name)
    if version is None:
        found.problem(f"{name} is not installed", f"run `pip install '{pin}'`", stops=True)
    elif not pin.specifier.contains(_public(version), prereleases=True):
        found.problem(
            f"{name} {version} is installed, and lr2train is tested with {pin.specifier}", f"run `pip install '{pin}'`"
        )


def _pins() -> dict[str, Requirement]:
    """The packages that lr2train needs, without the tools of its developers."""
    pins = (_requirement(line) for line in _requirement_lines())
    return {pin.name: pin for pin in pins if pin is not None and pin.name not in _OF_DEVELOPERS}


def _requirement_lines() -> list[str]:
    """requirements.txt of a checkout, else what the installed wheel says."""
    file = Path(lr2train.__file__).parents[1] / "requirements.txt"
    if file.is_file():
        return file.read_text(encoding="utf-8").splitlines()
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.requires(_PACKAGE) or []
    return []


def _requirement(line: str) -> Requirement | None:
    try:
        return Requirement(re.split(r"\s#|^#", line, maxsplit=1)[0].strip())
    except InvalidRequirement:  # an empty line, or `-r other.txt`
        return None


def _why_not_loaded(module: str) -> str:
    """Why a module cannot be imported, in one line; empty where it can."""
    try:
        with quiet():
            importlib.import_module(module)
    except Exception as error:  # whatever a foreign module raises
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
    return ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what libraries print while they are imported."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(streams.StringIO()):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(streams.StringIO()):
            yield
