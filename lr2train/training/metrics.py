"""Where a step's figures go: metrics.jsonl always, TensorBoard and wandb by choice. Rank 0 alone writes.

Choice: metrics.jsonl is the record, one JSON object a step, cut back on resume to the checkpoint's step so that no step stands twice; the dashboards are
copies of it. This is the only file that imports wandb.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from lr2train import run
from lr2train.config import Config, UserError, to_dict


class Sink(Protocol):
    """Takes one step's figures."""

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Record the figures of one step; None values are absent figures."""

    def close(self) -> None:
        """Flush and let go."""


class Jsonl:
    """``metrics.jsonl``: a line a step."""

    def __init__(self, path: Path, done_steps: int):
        self._cut_back(path, done_steps)
        self._file = path.open("a")

    def _cut_back(self, path: Path, done_steps: int) -> None:
        """Drop what a killed run wrote after its last checkpoint, and a half-written last line."""
        kept = [line for line in read_jsonl(path) if line["step"] <= done_steps]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Append and flush one line."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Event files under ``tensorboard/``."""

    def __init__(self, folder: Path, done_steps: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done_steps + 1)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """One scalar a figure."""
        for key, value in figures.items():
            if value is not None:
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class Wandb:
    """A wandb run that a resumed job continues; ``logger.mode=offline`` needs no network."""

    def __init__(self, config: Config, folder: Path):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"logger.wandb=true but wandb cannot be imported ({error}); pip install wandb, or set logger.wandb=false"
            ) from error
        logger = config.logger
        identity = run.hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        try:
            self._run = wandb.init(
                project=logger.project,
                entity=logger.entity,
                name=config.name,
                id=identity,
                resume="allow",
                mode=cast("Literal['online', 'offline']", logger.mode),
                dir=str(folder),
                config=to_dict(config),
            )
        except Exception as error:  # wandb's own errors: no key, no network
            raise UserError(
                f"logger.wandb=true but wandb cannot start ({str(error).splitlines()[0]}); run `wandb login`, or set logger.mode=offline"
            ) from error

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """One row a step."""
        self._run.log({key: value for key, value in figures.items() if value is not None}, step=step)

    def close(self) -> None:
        """Finish the upload."""
        self._run.finish()


def sinks(config: Config, folder: Path, done_steps: int) -> list[Sink]:
    """The sinks that ``logger`` asks for; none on ranks other than 0."""
    if run.rank() != 0:
        return []
    chosen: list[Sink] = [Jsonl(folder / "metrics.jsonl", done_steps)]
    if config.logger.tensorboard:
        chosen.append(TensorBoard(folder / "tensorboard", done_steps))
    if config.logger.wandb:
        chosen.append(Wandb(config, folder))
    return chosen


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a jsonl file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
