"""The real interface files of pinned flash-attn releases, from the package registry, for tests without a GPU.

An sdist of flash-attn has 8 MB and the wheel of flash-attn 4 half a MB. pip downloads each once into a cache folder
(``LR2TRAIN_TEST_CACHE``, else ``~/.cache/lr2train-tests``); later runs read the folder. Where pip reaches no registry
the tests that need a file are skipped, with a warning in pytest's summary. Nothing is compiled or installed, and no
file of flash-attn is kept in this repository.
"""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from functools import cache
from pathlib import Path

import pytest

FLASH_2 = ("2.7.4.post1", "2.8.3.post2")
FLASH_3 = "2.8.3.post2"  # flash-attn 3 is the folder hopper of this sdist
FLASH_4 = "4.0.0b36"
_TIMEOUT_S = 120


def flash_2(version: str) -> Path:
    """The folder ``flash_attn`` of an sdist: its interface file."""
    return _file("flash-attn", version, "flash_attn/flash_attn_interface.py").parent


def flash_3() -> Path:
    """The interface file of flash-attn 3."""
    return _file("flash-attn", FLASH_3, "hopper/flash_attn_interface.py")


def flash_4_signatures() -> dict[str, ast.arguments]:
    """The parameters of flash-attn 4's raw functions; the file itself needs the compiler of its kernels."""
    return {name: function.args for name, function in _flash_4_functions().items()}


def flash_4_results() -> set[int]:
    """How many results flash-attn 4's forward function returns, over all its return statements."""
    returns = [node for node in ast.walk(_flash_4_functions()["_flash_attn_fwd"]) if isinstance(node, ast.Return)]
    return {len(node.value.elts) for node in returns if isinstance(node.value, ast.Tuple)}


def _flash_4_functions() -> dict[str, ast.FunctionDef]:
    tree = ast.parse(_file("flash-attn-4", FLASH_4, "flash_attn/cute/interface.py").read_text())
    wanted = ("_flash_attn_fwd", "_flash_attn_bwd")
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted}


def _file(project: str, version: str, inside: str) -> Path:
    default = Path.home() / ".cache" / "lr2train-tests"
    folder = Path(os.environ.get("LR2TRAIN_TEST_CACHE", default)) / f"{project}-{version}"
    if not (folder / inside).exists() and (reason := _fetch(project, version, folder)):
        warnings.warn(f"tests over the real files of {project} {version} are skipped: {reason}", stacklevel=2)
        pytest.skip(reason)
    return folder / inside


@cache  # a registry out of reach is asked once
def _fetch(project: str, version: str, folder: Path) -> str | None:
    """Download a release and keep its Python files; returns the reason of a failure."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--retries=1"]
    kind = ["--no-binary", project] if project == "flash-attn" else ["--only-binary", project]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        into = Path(made)
        environment = {**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}  # its metadata then needs no compiler
        try:
            subprocess.run(
                [*command, *kind, "--dest", made, f"{project}=={version}"],
                env=environment, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            return f"pip cannot download {project}=={version}: {said[-1] if said else error}"
        _keep_python(next(path for path in into.iterdir() if path.is_file()), into / "kept")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(into / "kept", folder)
    return None


def _keep_python(archive: Path, into: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(into, [name for name in wheel.namelist() if name.endswith("interface.py")])
        return
    with tarfile.open(archive) as sdist:
        wanted = [one for one in sdist.getmembers() if one.name.endswith("flash_attn_interface.py")]
        for member in wanted:
            member.name = member.name.partition("/")[2]  # without the folder of the release
        sdist.extractall(into, wanted, filter="data")
