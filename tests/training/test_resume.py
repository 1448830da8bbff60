"""Training that is killed goes on where its checkpoint was and ends where an undisturbed run ends; one that belongs to other ranks is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lr2train.config import compose
from lr2train.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
TEXT = "def add(a, b):\n    return a + b\n\nclass Point:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n" * 40


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    """A corpus of a few generated files, and the overrides that train a very small model on it."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "text").mkdir()
    for number in range(30):
        (folder / "text" / f"{number}.txt").write_text(f"# file {number}\n" + TEXT[: 60 + 150 * number])
    runs = folder / "runs"
    common = [
        f"runs_folder={runs}", "experiment=tiny_4k", "model.path=null", "rope=longrope2", "rope.factors=null", "rope.critical_index=2", "rope.tail=[2.0]",
        "rope.target_window_tokens=128", "model.original_window_tokens=64", "model.architecture.max_position_embeddings=64",
        "model.architecture.hidden_size=32",
        "model.architecture.head_dim=16", "model.architecture.num_hidden_layers=1", "model.architecture.vocab_size=400",
        "model.architecture.intermediate_size=48",
        "data.vocab_size=400", "data.segment_tokens=128", "data.short_tokens=0", "data.long_tokens=0", f"data.path={runs}/corpus",
        f"data.sources=[{{name: text, kind: folder, path: {folder / 'text'}}}]", "parallel.sp=1", "optim.warmup_steps=2",
        "optim.lr=1e-2",
    ]  # fmt: skip
    prepare(compose("prepare", [*common, "name=corpus"]))
    return [*common, f"optim.steps={STEPS}", "engine.checkpoint_every_steps=3", "logger=jsonl"]


def start(overrides: list[str], name: str, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "lr2train.train", *overrides, f"name={name}", *more]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


def folder_of(overrides: list[str], name: str) -> Path:
    return Path(next(o for o in overrides if o.startswith("runs_folder=")).partition("=")[2]) / name


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "a step stands twice or is missing"
    return {line["step"]: line["loss"] for line in lines}


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Return as soon as metrics.jsonl holds the step."""
    deadline = time.monotonic() + 90
    path = folder / "metrics.jsonl"
    while not (path.exists() and len(path.read_text().splitlines()) >= step):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "training did not get there"


@pytest.fixture(scope="module")
def undisturbed(overrides) -> dict[int, float]:
    process = start(overrides, "undisturbed")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return losses(folder_of(overrides, "undisturbed"))


def test_killed_and_interrupted_training_ends_like_an_undisturbed_one(overrides, undisturbed):
    folder = folder_of(overrides, "disturbed")
    first = start(overrides, "disturbed")
    wait_for_step(first, folder, 5)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (folder / "train.json").exists()
    second = start(overrides, "disturbed")
    wait_for_step(second, folder, 7)
    second.send_signal(signal.SIGTERM)
    _, err = second.communicate(timeout=60)
    assert (second.returncode, "run the same command again" in err) == (130, True) or second.returncode == 0, err
    third = start(overrides, "disturbed")
    _, err = third.communicate(timeout=120)
    assert third.returncode == 0, err
    assert losses(folder) == undisturbed  # the same numbers, not only close ones: one process, one thread
    assert json.loads((folder / "train.json").read_text())["steps"] == STEPS
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (folder / "model" / name).exists()
    assert (folder / "model" / "model.safetensors").read_bytes() == (
        folder_of(overrides, "undisturbed") / "model" / "model.safetensors"
    ).read_bytes()


def test_losses_fall(undisturbed):
    assert undisturbed[STEPS] < undisturbed[1] - 0.1


@pytest.mark.parametrize(
    ("change", "tells"),
    [
        (["seed=7"], ["belongs to another config", "seed: 0 -> 7"]),
        (["data.path=nowhere", "name=fresh"], ["nowhere"]),
        (["model.path=missing/model", "name=fresh"], ["model.path=missing/model", "downloads are off"]),
        (["model.path=./missing", "name=fresh"], ["model.path=./missing", "is no folder"]),
        (["optim.segments_per_step=3", "parallel.sp=2", "name=fresh"], ["parallel.sp=2", "does not divide"]),
        (["rope.tail=[2.0, 2.0]", "name=fresh"], ["rope.tail"]),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing_over(overrides, undisturbed, change, tells):
    folder = folder_of(overrides, "undisturbed")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    process = start([o for o in overrides if not any(o.startswith(c.partition("=")[0] + "=") for c in change)], "undisturbed", *change)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert all(part in err for part in tells), err
    assert "Traceback" not in err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
