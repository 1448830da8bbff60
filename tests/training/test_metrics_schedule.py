"""Metric sinks and the learning rate."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lr2train.config import Config, OptimConfig
from lr2train.training import loop, metrics
from lr2train.training.schedule import learning_rate


def figures(loss: float) -> dict:
    return {"loss": loss, "loss_long": None, "lr": 0.1}


def test_jsonl_is_cut_back_to_the_checkpoint_and_loses_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = metrics.Jsonl(path, 0)
    for step in range(1, 6):
        sink.write(step, figures(1 / step))
    sink.close()
    path.write_text(path.read_text() + '{"step": 6, "lo')
    sink = metrics.Jsonl(path, 3)
    sink.write(4, figures(0.5))
    sink.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.5)]


def test_tensorboard_gets_every_figure_that_is_there(tmp_path):
    sink = metrics.TensorBoard(tmp_path, 0)
    sink.write(1, figures(2.0))
    sink.write(2, figures(1.0))
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "lr"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]


OFFLINE = """
import sys
from pathlib import Path
from lr2train.config import Config, LoggerConfig
from lr2train.training import metrics

for sink in metrics.sinks(Config(name="one", logger=LoggerConfig(tensorboard=False, wandb=True, mode="offline")),
Path(sys.argv[1]), 0):
    sink.write(1, {"loss": 2.0})
    sink.close()
"""


def test_wandb_works_offline(tmp_path):
    """In a process of its own: wandb's service may write the last of a run after ``finish``, but before the process
    ends.
    """
    subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path)], env={**os.environ, "WANDB_SILENT": "true"}, check=True
    )
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"loss" in record.read_bytes()


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert metrics.sinks(Config(name="one"), tmp_path, 0) == []
    assert list(tmp_path.iterdir()) == []


def test_warm_up_rises_to_lr_and_the_schedule_ends_at_its_floor():
    optim = OptimConfig(lr=2.0, warmup_steps=4, min_lr_ratio=0.1, schedule="cosine")
    rates = [learning_rate(step, 24, optim) for step in range(25)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[14] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 10 / 20))))
    assert rates[24] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_every_schedule_at_its_middle(schedule, middle):
    optim = OptimConfig(lr=1.0, warmup_steps=0, schedule=schedule)
    assert learning_rate(50, 100, optim) == pytest.approx(middle)


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA H200", 989.4), ("NVIDIA A100-SXM4-80GB", 312.0), ("Abacus", None)])
def test_mfu_is_of_the_gpu_that_the_run_is_on(name, peak, monkeypatch, capfd):
    """Never of the GPU that a plan assumes; a GPU of unknown peak is said once, and has none."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert loop.peak_of(torch.device("cuda", 0)) == peak
    assert loop.peak_of(torch.device("cpu")) is None
    loop._say_missing_peak(torch.device("cuda", 0))
    said = f"mfu is not reported, because the bf16 peak of {name} is unknown"
    assert (said in "".join(capfd.readouterr())) == (peak is None)
