"""The weights in a checkpoint, read by one process without an engine.

Choice: the fp32 master weights lie in the files of the optimizer's shards, a slice of every parameter on every rank. A
parameter is copied together from memory-mapped files when it is asked for, and rounded to the model's dtype, as
DeepSpeed rounds it after every step. So a checkpoint of any size is read with the memory of one parameter. Cost: the
files that hold weights are read twice, the first time for their checksums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lr2train import io
from lr2train.config import UserError
from lr2train.model.weight_files import StoredTensor
from lr2train.model.weights import GROUP_BYTES
from lr2train.model.window_lm import MODULE_PREFIX
from lr2train.training.deepspeed import partitions, shard_files
from lr2train.training.deepspeed.checkpoint import Checkpoints, whole_ones
from lr2train.training.deepspeed.shard_files import UNREADABLE, brief
from lr2train.training.deepspeed.start import quiet

LAST = "last"


@dataclass(frozen=True)
class StoredCheckpoint:
    """A whole checkpoint of a run.

    Attributes:
        folder: holds its files.
        manifest: what was written into it.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.manifest["step"])

    @property
    def fingerprint(self) -> str:
        """Of the contents."""
        return io.fingerprint(self.manifest["files"])


def find(of: Checkpoints, which: str) -> StoredCheckpoint:
    """The checkpoint ``which``: ``last``, the newest whole one, or a number of steps.

    Raises:
        UserError: there is no such checkpoint.
    """
    found = {int(manifest["step"]): StoredCheckpoint(folder, manifest) for folder, manifest in whole_ones(of)}
    if not found:
        raise UserError(f"{of.folder} holds no whole checkpoint; train until the run has written one")
    if which == LAST:
        return found[max(found)]
    if not which.isdecimal() or int(which) not in found:
        raise UserError(
            f"export.checkpoint={which} is no whole checkpoint in {of.folder}, which holds the steps "
            f"{', '.join(map(str, sorted(found)))}; set export.checkpoint to one of them, or to {LAST}"
        )
    return found[int(which)]


def weights_of(checkpoint: StoredCheckpoint, dtype: torch.dtype) -> dict[str, StoredTensor]:
    """The parameters and buffers of a checkpoint by the model's own names; a tensor is read when it is called.

    Args:
        checkpoint: of any ZeRO stage.
        dtype: of the model that was trained.

    Raises:
        UserError: a file is damaged, or divided in a way that is not known.
    """
    stage, files = int(checkpoint.manifest["zero_stage"]), checkpoint.manifest["files"]
    with quiet():
        import deepspeed  # noqa: F401 (the files name its classes; it prints when it is imported)
    common_file = checkpoint.folder / shard_files.weights_file(stage, 0)
    shards = shard_files.optimizer_files(checkpoint.folder) if stage else []
    try:
        for path in (common_file, *shards):
            shard_files.refuse_other_checksum(path.name, io.checksum(path), files)
        common = shard_files.opened(common_file)
        module: dict[str, torch.Tensor] = common["module"]
        if not stage:
            return _named({name: StoredTensor.of(tensor) for name, tensor in module.items()})
        divided = _divided(shards, common["param_shapes"], stage, dtype)
        # What is no parameter: buffers, which every rank holds whole.
        buffers = {
            name: StoredTensor.of(module[name]) for name in common.get("buffer_names") or () if name in module
        }  # fmt: skip
        return _named({**buffers, **divided})
    except UNREADABLE as error:
        raise UserError(
            f"the checkpoint {checkpoint.folder} cannot be read ({brief(error)}); {_instead_of(checkpoint)}"
        ) from error
    except shard_files.Unusable as error:
        raise UserError(
            f"the checkpoint {checkpoint.folder} cannot be used ({error}); {_instead_of(checkpoint)}"
        ) from error


def _instead_of(damaged: StoredCheckpoint) -> str:
    """The remedy: the newest other checkpoint that is whole."""
    steps = [int(one["step"]) for _, one in whole_ones(Checkpoints(damaged.folder.parent))]
    others = [step for step in steps if step != damaged.step]
    return f"set export.checkpoint={max(others)} to export another one" if others else "restore it"


def _named(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {
        name.removeprefix(MODULE_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(MODULE_PREFIX)
    }


def _divided(
    files: Sequence[Path], groups: Sequence[Mapping[str, torch.Size]], stage: int, dtype: torch.dtype
) -> dict[str, StoredTensor]:
    form = partitions.STAGES[stage]
    sizes = [{name: shape.numel() for name, shape in group.items()} for group in groups]
    shards, saved = form.divide(sizes, len(files)), _States(files)
    partitions.refuse_unknown(saved(0), form, shards)
    return {
        name: StoredTensor(
            tuple(shape), dtype, partial(_read, saved, form.weights, shards.slices[name], shape, dtype), files[0].name
        )
        for group in groups
        for name, shape in group.items()
    }


def _read(
    saved: _States, key: str, slices: Sequence[partitions.Slice], shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """A parameter, copied together from the shards and rounded."""
    out = torch.empty(shape.numel(), dtype=dtype)
    for one in slices:
        part = saved(one.rank)[key][one.group].narrow(0, one.flat_start, one.numel)
        out.narrow(0, one.start, one.numel).copy_(part)
    saved.count(out.numel() * 4)
    return out.view(shape)


class _States:
    """The optimizer's states by rank, memory-mapped. Maps are dropped from time to time, and with them the pages that
    the process holds.
    """

    def __init__(self, files: Sequence[Path]):
        self._files = files
        self._opened: dict[int, dict[str, Any]] = {}
        self._read_bytes = 0

    def __call__(self, of_rank: int) -> dict[str, Any]:
        if of_rank not in self._opened:
            self._opened[of_rank] = shard_files.opened(self._files[of_rank])["optimizer_state_dict"]
        return self._opened[of_rank]

    def count(self, n_bytes: int) -> None:
        """Note that so many bytes were read."""
        self._read_bytes += n_bytes
        if self._read_bytes >= GROUP_BYTES:
            self._opened, self._read_bytes = {}, 0
