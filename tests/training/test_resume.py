"""Training that is killed goes on where its checkpoint was, on as many ranks as there are by then, and ends where an undisturbed run ends."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from ranks import RankError, run_ranks

from lr2train.cli.composition import compose
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
        "optim.lr=1e-2", "data.group_segments=2",  # so that two data-parallel ranks may go on later
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


def train_until(rank: int, world: int, overrides: list[str], last: int) -> int:
    """The verb on a rank among others, asked to stop after its first ``last`` steps; its exit code."""
    from lr2train.cli.door import door
    from lr2train.train import train
    from lr2train.training.deepspeed.engine import Engine

    steps, step = [], Engine.step

    def asking(engine, *arguments):
        steps.append(engine.step)
        stats = step(engine, *arguments)
        if rank == 0 and len(steps) == last - 1:  # the flag goes with the next step, which is the last
            os.kill(os.getpid(), signal.SIGTERM)
        return stats

    Engine.step = asking  # in this process alone
    with pytest.raises(SystemExit) as end, door("train"):
        train(compose("train", overrides))
    return end.value.code


def test_a_run_goes_on_with_other_numbers_of_ranks(overrides, undisturbed, tmp_path):
    """One rank; four that share segments in pairs; three, which is refused; two that share one segment."""
    folder, fixed = folder_of(overrides, "moving"), [*(o for o in overrides if o != "parallel.sp=1"), "name=moving"]
    for world, sp, steps in ((1, 1, 3), (4, 2, 3), (3, 1, 0), (2, 2, 2)):
        launch = partial(run_ranks, train_until, world, [*fixed, f"parallel.sp={sp}"], steps, tmp_path=tmp_path, timeout_s=120)
        if steps:
            assert launch() == [130] * world
            continue
        with pytest.raises(RankError, match="optim.segments_per_step=2 is not divisible by the 3 data-parallel ranks") as refused:
            launch()
        assert str(refused.value).count("set optim.segments_per_step to 3") == 3  # on every rank, in the same words
    found = losses(folder)
    assert list(found) == list(range(1, 9))
    assert found == pytest.approx({step: undisturbed[step] for step in found}, rel=1e-5)  # fp32: sums in another order, through AdamW
    for key in ("n_target_tokens", "tokens_seen", "window_mix", "lr"):  # the same segments
        assert figures(folder, key) == figures(folder_of(overrides, "undisturbed"), key)[:8], key


def figures(folder: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_losses_fall(undisturbed):
    assert undisturbed[STEPS] < undisturbed[1] - 0.1


@pytest.mark.parametrize(
    ("change", "tells"),
    [
        (["seed=7"], ["belongs to another config", "seed: 0 -> 7"]),
        (["data.path=nowhere", "name=fresh"], ["nowhere"]),
        (["model.path=missing/model", "name=fresh"], ["model.path=missing/model", "downloads are off"]),
        (["model.path=./missing", "name=fresh"], ["model.path=./missing", "is no folder"]),
        (["optim.segments_per_step=3", "data.group_segments=0", "parallel.sp=2", "name=fresh"], ["parallel.sp=2", "does not divide"]),
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
