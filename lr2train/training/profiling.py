"""Traces of chosen steps (``logger.profile_steps``) by torch's profiler, on rank 0 and on the last rank.

    profile/steps_10-12_rank0.json.gz     a Chrome trace: ui.perfetto.dev or chrome://tracing open it
    profile/steps_10-12_rank0.txt         the operators that took most time

Choice: a profiler lives from the first step of a range to the last, so other steps run without any. Waiting for data is
recorded with its step; so are a checkpoint and a held-out loss between two steps of a range. Cost: a recorded step is
slower, and metrics.jsonl has the slower figures. Events stay in host memory until the range ends, so a range should be
a few steps.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lr2train import progress, ranks
from lr2train.training.steps import StepRanges

KEY = "logger.profile_steps"
_ROWS, _SHOWN = 40, 8  # operators in the file, and on the console
_WIDTH = 56  # characters of an operator's name


class StepProfiler:
    """Records chosen steps and writes their traces. Use as a context around the loop.

    Args:
        chosen: the steps to record.
        steps: the steps that the loop will run, in order, counted from 0.
        folder: takes the files.
        device: of this rank.
    """

    def __init__(self, chosen: StepRanges, steps: Sequence[int], folder: Path, device: torch.device):
        self._chosen, self._folder, self._device = chosen, folder, device
        self._records = ranks.rank() in (0, ranks.world() - 1)
        # Step -> the last step of its range that the loop will run.
        self._last_of: dict[int, int] = {}
        for first, last in chosen.ranges:
            to_come = [step + 1 for step in steps if first <= step + 1 <= last]
            self._last_of |= dict.fromkeys(to_come, to_come[-1] if to_come else 0)
        self._recorded: set[int] = set()
        self._profile: Any = None
        self._open: list[int] = []  # steps in the open profile

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Write what an interrupt left open, and name the steps without a trace; after an error write nothing."""
        if kind is None:
            self._write()
            self._say_missing()
        elif self._profile is not None:
            self._profile.stop()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Record a step, counted from 0, if it is chosen."""
        number = step + 1
        if number not in self._last_of:
            yield
            return
        self._recorded.add(number)
        if not self._records:
            yield
            return
        if self._profile is None:
            self._profile = torch.profiler.profile(activities=self._activities())
            self._profile.start()
        with torch.profiler.record_function(f"step {number}"):
            yield
        self._open.append(number)
        if number == self._last_of[number]:
            self._write()

    def _activities(self) -> list[Any]:
        activity = torch.profiler.ProfilerActivity
        return [activity.CPU, *([activity.CUDA] if self._device.type == "cuda" else [])]

    def _write(self) -> None:
        """End the open profile, if there is one, and write its files. An error of the disk costs the trace alone."""
        if self._profile is None:
            return
        profile, steps, self._profile, self._open = self._profile, self._open, None, []
        profile.stop()
        first, last = steps[0], steps[-1]
        name = f"step{'s' * (first < last)}_{first}{f'-{last}' if first < last else ''}_rank{ranks.rank()}"
        trace, started = self._folder / f"{name}.json.gz", time.monotonic()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            unfinished = trace.with_name(f"{name}.unfinished.json.gz")  # the ending decides that it is compressed
            profile.export_chrome_trace(str(unfinished))
            os.replace(unfinished, trace)
            rows = table(profile.key_averages(), self._device.type == "cuda")
            (self._folder / f"{name}.txt").write_text("\n".join(rows[: _ROWS + 1]) + "\n")
        except (OSError, RuntimeError) as error:
            progress.say("train", f"the trace {trace} cannot be written ({error}); training goes on")
            return
        progress.say("train", f"trace of {name}: {trace}, written in {time.monotonic() - started:.1f} s")
        for row in rows[: _SHOWN + 1]:
            progress.say("train", row)

    def _say_missing(self) -> None:
        missing = self._chosen.count - len(self._recorded)
        if missing:
            progress.say(
                "train",
                f"{missing} of the {self._chosen.count} steps of {KEY} ({self._chosen}) have no trace of this start: "
                "they were done before, are skipped, or were not reached",
            )


def table(averages: Any, on_cuda: bool) -> list[str]:
    """Operators by the time spent in themselves, most first: a header, then a line for each.

    Args:
        averages: of torch's profiler.
        on_cuda: whether time on the GPU decides.
    """

    def own_us(one: Any) -> float:
        return one.self_device_time_total if on_cuda else one.self_cpu_time_total

    total = sum(map(own_us, averages)) or 1.0
    where = "gpu" if on_cuda else "cpu"
    lines = [f"{'operator':<{_WIDTH}} {'calls':>8} {f'{where} ms':>10} {'share':>7}"]
    for one in sorted(averages, key=own_us, reverse=True):
        ms, share = own_us(one) / 1e3, own_us(one) / total
        lines.append(f"{one.key[:_WIDTH]:<{_WIDTH}} {one.count:>8} {ms:>10.2f} {share:>7.1%}")
    return lines
