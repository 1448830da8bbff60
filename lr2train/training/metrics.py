"""Metric sinks: metrics.jsonl always, TensorBoard and wandb by choice. Rank 0 alone writes.

Choice: metrics.jsonl is the record, one JSON object for each step. On resume the file is cut back to the checkpoint's
step, so that no step stands twice. The dashboards are copies: of train's figures, and of those of search and evaluate,
with their tables and pictures.

A step whose held-out loss was measured has it in its line. The measurement before the first step has a line of its own,
step 0, without the figures of a step.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from lr2train import io, progress, ranks
from lr2train.config import Config
from lr2train.training import panels
from lr2train.training.wandb_sink import Wandb


class Sink(Protocol):
    """A destination for the figures of each step."""

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Record the figures of one step; None means that the figure is absent."""

    def close(self) -> None:
        """Flush and close."""


class Dashboard(Sink, Protocol):
    """A sink that shows pictures and tables too."""

    def picture(self, name: str, file: Path) -> None:
        """Show a PNG file."""

    def table(self, name: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table; an empty cell is None."""


def _text(line: dict[str, Any]) -> str:
    """One line of JSON; a number that is not finite becomes null."""
    return json.dumps(io.finite(line), allow_nan=False) + "\n"


class Jsonl:
    """``metrics.jsonl``: one line for each step.

    Args:
        path: of the file, which may hold the lines of earlier starts.
        done_steps: of the checkpoint; later lines are dropped. 0: all lines are.

    Attributes:
        last: the figures of the last step before this start; None at the first start.
        written: the last step that earlier starts have written, perhaps dropped now; -1: none.
    """

    def __init__(self, path: Path, done_steps: int):
        self._cut_back(path, done_steps)
        self._file = path.open("a")

    def _cut_back(self, path: Path, done_steps: int) -> None:
        """Drop the lines after the checkpoint, which a killed run wrote, and damaged lines."""
        lines, damaged = read_lines(path)
        self.written = max((line.get("step", 0) for line in lines), default=-1)
        if damaged:
            progress.say(
                "train",
                f"{damaged} damaged lines were taken out of {path}: the figures of these steps are lost, training is "
                "not affected",
            )
        # A run without a checkpoint begins again, with the line of step 0.
        kept = [line for line in lines if line.get("step", math.inf) <= done_steps] if done_steps else []
        if done_steps and not kept:
            progress.say("train", f"{path} has no figures of the {done_steps} steps that are done; the run goes on")
        io.write_text(path, "".join(_text(line) for line in kept))
        self.last = kept[-1] if kept else None

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Append and flush one line."""
        self._file.write(_text({"step": step, **figures}))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Brief:
    """The newest figures in a few words, for the progress line: a window that a step lacks keeps its last loss."""

    def __init__(self) -> None:
        self._newest: dict[str, Any] = {}

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Take the figures of one step."""
        self._newest |= {key: value for key, value in figures.items() if value is not None}

    def note(self) -> str:
        """Losses, speed and memory, most important first."""
        newest = self._newest
        windows = [f"{name} {newest[key]:.3f}" for name in ("short", "long") if (key := f"loss_{name}") in newest]
        losses = f"loss {' '.join(windows)}" if windows else f"loss {newest['loss']:.3f}" if "loss" in newest else ""
        bad = newest.get("bad_steps", 0)
        parts = (
            losses,
            f"{bad} steps without an update" if bad else "",
            f"{newest['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in newest else "",
            f"{newest['peak_gib']:.1f} GiB" if "peak_gib" in newest else "",
        )
        return ", ".join(filter(None, parts))

    def close(self) -> None:
        """Nothing is open."""


class TensorBoard:
    """Event files under ``tensorboard/``, with the panels of ``panels`` as their layout."""

    def __init__(self, folder: Path, done_steps: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done_steps + 1 if done_steps else 0)
        self._writer.add_custom_scalars(panels.layout())

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Record each figure as a scalar."""
        for key, value in figures.items():
            if value is not None:
                self._writer.add_scalar(key, value, step)

    def picture(self, name: str, file: Path) -> None:
        """Show a PNG file."""
        from matplotlib.image import imread

        self._writer.add_image(name, imread(file)[..., :3], dataformats="HWC")

    def table(self, name: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table in Markdown."""
        lines = [head, ["---"] * len(head), *rows]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines))

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def sinks(config: Config, folder: Path, done_steps: int) -> list[Sink]:
    """metrics.jsonl and the dashboards of a training; an empty list on ranks other than 0."""
    if ranks.rank() != 0:
        return []
    record = Jsonl(folder / "metrics.jsonl", done_steps)
    return [record, *dashboards(config, folder, "train", done_steps, record.written)]


def dashboards(
    config: Config, folder: Path, verb: str, done_steps: int = 0, written_steps: int = -1
) -> list[Dashboard]:
    """The dashboards that the config group ``logger`` asks for; an empty list on ranks other than 0.

    Args:
        config: of the job.
        folder: of the run.
        verb: train, search or evaluate.
        done_steps: the job goes on after them.
        written_steps: the last step that earlier starts have written; -1: none.
    """
    if ranks.rank() != 0:
        return []
    chosen: list[Dashboard] = []
    if config.logger.tensorboard:
        place = folder / "tensorboard" / ("evaluate" if verb == "evaluate" else "")  # beside its training's figures
        chosen.append(TensorBoard(place, done_steps))
    if config.logger.wandb:
        chosen.append(Wandb(config, folder, verb, written_steps + 1))
    return chosen


@contextlib.contextmanager
def closing(opened: Sequence[Sink]) -> Iterator[None]:
    """Close all sinks at the end of the block, also after an error."""
    with contextlib.ExitStack() as stack:
        for sink in opened:
            stack.callback(sink.close)
        yield


def bad_steps_in(opened: Sequence[Sink]) -> int:
    """The number of bad steps of earlier starts, from the last line of metrics.jsonl; 0 on ranks other than 0."""
    lines = (sink.last for sink in opened if isinstance(sink, Jsonl))
    return next(((line or {}).get("bad_steps", 0) for line in lines), 0)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a jsonl file."""
    return read_lines(path)[0]


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a jsonl file, and the number of damaged lines.

    A last line that a kill cut short is neither returned nor counted.
    """
    if not path.exists():
        return [], 0
    texts = path.read_text(errors="replace").splitlines(keepends=True)
    found = [_parsed(text) for text in texts]
    cut_short = bool(texts) and found[-1] is None and not texts[-1].endswith("\n")
    lines = [line for line in found if line is not None]
    return lines, len(found) - len(lines) - cut_short


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line if isinstance(line, dict) else None
