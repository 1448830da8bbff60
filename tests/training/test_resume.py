"""A resumed run ends where an undisturbed run ends: after a kill, after an interrupt, on another number of ranks.

Positions of its long segments jump.
"""

import json
import os
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
from ranks import RankError, run_ranks

from lr2train.cli.composition import compose
from lr2train.prepare import prepare
from lr2train.run import Interrupted
from tests.training import starts

STEPS = 12
TEXT = (
    "def add(a, b):\n    return a + b\n\nclass Point:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n"
    * 40
)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    """A corpus of a few generated files, and the overrides that train a very small model on it."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "text").mkdir()
    for number in range(30):
        (folder / "text" / f"{number}.txt").write_text(f"# file {number}\n" + TEXT[: 60 + 150 * number])
    runs = folder / "runs"
    common = [
        f"runs_folder={runs}", "experiment=tiny_4k", "model.path=null", "rope=longrope2", "rope.factors=null",
        "rope.critical_index=2", "rope.tail=[2.0]",
        "rope.target_window_tokens=256", "data.long_positions=skip", "model.original_window_tokens=64",
        "model.architecture.max_position_embeddings=64",
        "model.architecture.hidden_size=32",
        "model.architecture.head_dim=16", "model.architecture.num_hidden_layers=1", "model.architecture.vocab_size=400",
        "model.architecture.intermediate_size=48",
        "data.vocab_size=400", "data.segment_tokens=128", "data.short_tokens=0", "data.long_tokens=0",
        f"data.path={runs}/corpus",
        f"data.sources=[{{name: text, kind: folder, path: {folder / 'text'}}}]", "parallel.sp=1",
        "optim.warmup_steps=2",
        "optim.lr=1e-2", "threads=1", "data.group_segments=2",  # so that two data-parallel ranks may go on later
    ]  # fmt: skip
    prepare(compose("prepare", [*common, "name=corpus"]))
    return [*common, f"optim.steps={STEPS}", "engine.checkpoint_every_steps=3", "logger=jsonl"]


def folder_of(overrides: list[str], name: str) -> Path:
    return Path(next(o for o in overrides if o.startswith("runs_folder=")).partition("=")[2]) / name


def figures(folder: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    steps = figures(folder, "step")
    assert steps == list(range(1, len(steps) + 1)), "a step stands twice or is missing"
    return dict(zip(steps, figures(folder, "loss"), strict=True))


@pytest.fixture(scope="module")
def undisturbed(overrides, tmp_path_factory) -> dict[int, float]:
    ended = starts.train([*overrides, "name=undisturbed"], tmp_path_factory.mktemp("start"))
    assert ended.code == 0, ended.err
    return losses(folder_of(overrides, "undisturbed"))


def test_killed_and_interrupted_training_ends_like_an_undisturbed_one(overrides, undisturbed, tmp_path):
    """The kill strikes between two checkpoints, the interrupt in the second step after the checkpoint."""
    folder, command = folder_of(overrides, "disturbed"), [*overrides, "name=disturbed"]
    killed = starts.train(command, tmp_path, strike=(6, signal.SIGKILL))
    assert killed.code == -signal.SIGKILL, killed.err
    assert list(losses(folder)) == [1, 2, 3, 4, 5]
    assert not (folder / "train.json").exists()
    interrupted = starts.train(command, tmp_path, strike=(2, signal.SIGTERM))
    assert (interrupted.code, interrupted.err.count("run the same command again")) == (130, 1), interrupted.err
    assert list(losses(folder)) == [1, 2, 3, 4, 5]
    ended = starts.train(command, tmp_path)
    assert ended.code == 0, ended.err
    assert losses(folder) == undisturbed  # the same numbers, not only close ones: one process, one thread
    assert json.loads((folder / "train.json").read_text())["steps"] == STEPS
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (folder / "model" / name).exists()
    whole = folder_of(overrides, "undisturbed") / "model" / "model.safetensors"
    assert (folder / "model" / "model.safetensors").read_bytes() == whole.read_bytes()


def train_until(rank: int, world: int, overrides: list[str], last: int) -> None:
    """The verb on a rank among others, interrupted in its step number ``last``."""
    from lr2train.train import train

    if rank == 0:
        starts.strike_in_step(last, signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(compose("train", overrides))


def test_a_run_goes_on_with_other_numbers_of_ranks(overrides, undisturbed, tmp_path):
    """One rank; four that share segments in pairs; three, which is refused; two that share one segment."""
    folder, fixed = folder_of(overrides, "moving"), [*(o for o in overrides if o != "parallel.sp=1"), "name=moving"]
    for world, sp, steps in ((1, 1, 3), (4, 2, 3), (3, 1, 0), (2, 2, 2)):
        launch = partial(
            run_ranks, train_until, world, [*fixed, f"parallel.sp={sp}"], steps, tmp_path=tmp_path, timeout_s=120
        )
        if steps:
            launch()
            continue
        with pytest.raises(
            RankError, match="optim.segments_per_step=2 is not divisible by the 3 data-parallel ranks"
        ) as refused:
            launch()
        assert str(refused.value).count("set optim.segments_per_step to 3") == 3  # on every rank, in the same words
    found = losses(folder)
    assert list(found) == list(range(1, 9))
    assert found == pytest.approx(
        {step: undisturbed[step] for step in found}, rel=1e-5
    )  # fp32: sums in another order, through AdamW
    for key in ("n_target_tokens", "tokens_seen", "window_mix", "lr"):  # the same segments
        assert figures(folder, key) == figures(folder_of(overrides, "undisturbed"), key)[:8], key


def interrupted_with_a_slow_dashboard(rank: int, world: int, overrides: list[str], folder: Path) -> list[bool]:
    """Whether, when this rank leaves, the dashboard is closed and the marker is written; on rank 0 also whether the
    marker was there when the dashboard began to close.
    """
    from lr2train.run import MARKER
    from lr2train.train import train
    from lr2train.training.metrics import Jsonl

    marker, closed, before = folder / "marker", folder / "closed", []
    os.environ[MARKER] = str(marker)
    own = Jsonl.close

    def slow(sink):
        before.append(marker.exists())
        threading.Event().wait(1.0)  # an upload
        own(sink)
        closed.touch()

    Jsonl.close = slow
    if rank == 1:
        starts.strike_in_step(2, signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(compose("train", overrides))
    return [closed.exists(), marker.exists(), *before]


def test_no_rank_leaves_before_rank_0_has_closed_its_dashboards(overrides, tmp_path):
    first, second = run_ranks(
        interrupted_with_a_slow_dashboard, 2, [*overrides, "name=slow"], tmp_path, tmp_path=tmp_path, timeout_s=120
    )
    assert first == [True, True, True]
    assert second == [True, True]


def test_losses_fall(undisturbed):
    assert undisturbed[STEPS] < undisturbed[1] - 0.1


@pytest.mark.parametrize(
    ("change", "tells"),
    [
        (["seed=7"], ["belongs to another config", "seed: 0 -> 7"]),
        (["data.path=nowhere", "name=fresh"], ["nowhere"]),
        (["model.path=missing/model", "name=fresh"], ["model.path=missing/model", "downloads are off"]),
        (["model.path=./missing", "name=fresh"], ["model.path=./missing", "is no folder"]),
        (
            ["optim.segments_per_step=3", "data.group_segments=0", "parallel.sp=2", "name=fresh"],
            ["parallel.sp=2", "does not divide"],
        ),
        (["rope.tail=[2.0, 2.0]", "name=fresh"], ["rope.tail"]),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing_over(overrides, undisturbed, tmp_path, change, tells):
    folder = folder_of(overrides, "undisturbed")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    kept = [one for one in overrides if one.partition("=")[0] not in {key.partition("=")[0] for key in change}]
    names = [] if "name=fresh" in change else ["name=undisturbed"]
    ended = starts.train([*kept, *names, *change], tmp_path)
    assert ended.code == 2, ended.err
    assert all(part in ended.err for part in tells), ended.err
    assert "Traceback" not in ended.err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
