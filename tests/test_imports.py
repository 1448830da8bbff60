"""Imports point down the house: verbs -> training, evolution, evaluation -> model, data -> attention, rope ->
parallel.
"""

import ast
from pathlib import Path

import pytest

from lr2train.config import READS

ROOT = Path(__file__).resolve().parent.parent / "lr2train"
FLOORS = {
    "planning": 4,
    "diagnosis": 4,
    "reporting": 4,
    "training": 3,
    "evolution": 3,
    "evaluation": 3,
    "serving": 3,
    "model": 2,
    "data": 2,
    "attention": 1,
    "rope": 1,
    "parallel": 0,
}
FREE = {
    "changes",
    "config",
    "io",
    "journals",
    "progress",
    "ranks",
    "run",
}  # may be imported by all, and import only each other
VERBS = {*READS, "report"}
FEW_FILES = {  # a folder ends with a slash
    "deepspeed": ("training/deepspeed/",),
    "wandb": ("training/wandb_sink.py",),
    "wandb_workspaces": ("training/wandb_view.py",),
    "flash_attn": ("attention/cuda.py",),
    "liger_kernel": ("model/fused.py",),
    "triton": ("attention/merging.py",),
    "lm_eval": ("evaluation/harness",),
    "hydra": ("cli/composition.py", "cli/overrides.py", "cli/door.py"),
}
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    """The folder of a part, or the file of a verb."""
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, at any depth of it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    here = room(path)
    others = {name.split(".")[1] for name in imported(path) if name.startswith("lr2train.")} - {here}
    rooms = {other for other in others if (ROOT / other).is_dir() or (ROOT / f"{other}.py").exists()} - FREE
    if here in FREE:
        assert not rooms
    elif here == "rope":
        assert not rooms
    elif here in FLOORS:
        assert all(other in FLOORS and FLOORS[other] < FLOORS[here] for other in rooms), rooms


@pytest.mark.parametrize(("library", "homes"), FEW_FILES.items())
def test_a_library_lives_in_few_files(library, homes):
    users = {
        str(path.relative_to(ROOT)) for path in FILES if any(name.split(".")[0] == library for name in imported(path))
    }
    assert users, f"nothing imports {library}"
    assert all(user.startswith(homes) for user in users), users


def test_only_verbs_know_the_command_line():
    users = {room(path) for path in FILES if any(name.startswith("lr2train.cli.door") for name in imported(path))}
    assert users - {"cli"} == {*VERBS, "__main__"}


def test_data_and_rope_work_without_torch():
    for path in FILES:
        if room(path) in ("data", "rope"):
            assert not any(name.split(".")[0] in ("torch", "transformers") for name in imported(path)), path
