"""Forward and backward passes timed in turn: warm-up, CUDA events, medians over rounds.

Choice: each round runs every pass once. A comparison is the median over rounds of the ratio, so a clock that falls
while the GPU warms affects all passes alike. Cost: a pass never finds its own data in the cache, as in training.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a pass, forward and backward."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Pass:
    """Work to time. Gradients of ``leaves`` are cleared before each run; ``grads`` start the backward pass."""

    name: str
    forward: Callable[[], Sequence[Tensor]]
    leaves: Sequence[Tensor]
    flops: Flops
    grads: Sequence[Tensor] | None = None  # None: the outputs are scalars
    around: Callable[[], contextlib.AbstractContextManager[None]] = (
        contextlib.nullcontext
    )  # entered around forward and backward


@dataclass
class Timing:
    """Timings of a pass: seconds of each round, or the error that ended it."""

    flops: Flops
    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def rounds_s(self) -> list[float]:
        """Seconds of forward and backward together, by round."""
        return [a + b for a, b in zip(self.forward_s, self.backward_s, strict=True)]

    @property
    def median_s(self) -> float:
        """Median of ``rounds_s``; nan where the pass failed."""
        return statistics.median(self.rounds_s) if self.rounds_s else float("nan")

    def with_forwards(self, times: float) -> float:
        """Seconds of ``times`` forward passes and one backward pass; nan where the pass failed."""
        if not self.rounds_s:
            return float("nan")
        return times * statistics.median(self.forward_s) + statistics.median(self.backward_s)

    def over(self, other: Timing) -> float:
        """Time over the time of another timing: median of the rounds' ratios; nan where either failed."""
        ratios = [a / b for a, b in zip(self.rounds_s, other.rounds_s, strict=False)]
        return statistics.median(ratios) if ratios else float("nan")

    def figures(self) -> dict[str, Any]:
        """Milliseconds and TFLOP/s, for the table and the JSON."""
        if not self.rounds_s:
            return {"error": self.error}
        forward, backward = statistics.median(self.forward_s), statistics.median(self.backward_s)
        return {
            "forward_ms": 1e3 * forward,
            "backward_ms": 1e3 * backward,
            "forward_tflops_per_s": self.flops.forward / forward / 1e12,
            "backward_tflops_per_s": self.flops.backward / backward / 1e12,
            "tflops_per_s": self.flops.total / self.median_s / 1e12,
        }


def time_in_turn(passes: Sequence[Pass], device: torch.device, rounds: int, warm_ups: int) -> dict[str, Timing]:
    """Time all passes in turn, ``rounds`` times after ``warm_ups``. A pass that fails is not run again.

    Raises:
        torch.OutOfMemoryError: a pass does not fit into the device's memory.
    """
    timings = {one.name: Timing(one.flops) for one in passes}
    for number in range(warm_ups + rounds):
        for one in passes:
            timing = timings[one.name]
            if timing.error is None:
                _run(one, timing, device, counts=number >= warm_ups)
    return timings


def _run(one: Pass, timing: Timing, device: torch.device, counts: bool) -> None:
    for leaf in one.leaves:
        leaf.grad = None
    try:
        forward_s, backward_s = _seconds(one, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind: the other passes continue
        timing.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        timing.forward_s.clear()
        timing.backward_s.clear()
        return
    if counts:
        timing.forward_s.append(forward_s)
        timing.backward_s.append(backward_s)


def _seconds(one: Pass, device: torch.device) -> tuple[float, float]:
    with one.around():
        start = _mark(device)
        outputs = one.forward()
        middle = _mark(device)
        torch.autograd.backward(outputs, one.grads)
        stop = _mark(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return start.elapsed_time(middle) / 1e3, middle.elapsed_time(stop) / 1e3
    return middle - start, stop - middle


def _mark(device: torch.device) -> Any:
    """A point in time: an event on the GPU's stream, or the CPU's clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def fitting(work: Callable[[int], Any], sizes: Sequence[int], unit: str, say: Callable[[str], None]) -> Any:
    """``work(size)`` for the first of ``sizes`` that fits into memory; ``say`` reports each size that does not.

    Raises:
        torch.OutOfMemoryError: the last size does not fit.
    """
    for size, smaller in _steps(sizes):
        try:
            return work(size)
        except torch.OutOfMemoryError:
            if smaller is None:
                raise
        torch.cuda.empty_cache()  # outside the handler, which would keep the failed tensors alive
        say(f"{size} {unit} do not fit into memory; going on with {smaller}")
    raise AssertionError("no size was given")


def _steps(sizes: Sequence[int]) -> Iterator[tuple[int, int | None]]:
    yield from zip(sizes, [*sizes[1:], None], strict=True)


_CLOCKS = ("clocks.sm", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks, power and temperature from nvidia-smi; empty where nvidia-smi fails. Nothing is changed."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return {}
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    query = f"--query-gpu={','.join(_CLOCKS)}"
    command = ["nvidia-smi", query, "--format=csv,noheader", "-i", uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_CLOCKS, (value.strip() for value in answer.split(",")), strict=False))
