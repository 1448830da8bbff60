"""The files of one checkpoint: their names, their checks against the manifest, and reading them as data.

Choice: a file is read with ``weights_only``, so nothing in a checkpoint is executed. A rank hashes its own files while
it reads them. Cost: the names and the few classes below are those of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from lr2train import io
from lr2train.config import UserError
from lr2train.ranks import rank, world

# The errors of torch.load, and of our look-ups afterwards, for a damaged or foreign file.
UNREADABLE = (OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError)


class Unusable(UserError):
    """Why a checkpoint cannot be used, without a remedy."""


def weights_file(stage: int, of_rank: int) -> str:
    """The file of the weights in the model's dtype and of the counters; one for all ranks, except under ZeRO-3."""
    return f"zero_pp_rank_{of_rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"


def optimizer_files(checkpoint: Path) -> list[Path]:
    """The files of the optimizer's shards, in order of rank; none under ZeRO stage 0, which divides nothing."""
    return sorted(
        checkpoint.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"),
        key=lambda path: int(path.name.split("_rank_")[1].split("_")[0]),
    )


def refuse_other_sizes(checkpoint: Path, files: dict[str, Any]) -> None:
    """Compare the sizes of all files with the manifest.

    Raises:
        Unusable: the folder is not visible here, or a file is missing or has another size.
    """
    if not checkpoint.is_dir():
        raise Unusable("it is not there on every machine: put runs_folder on a file system that all machines share")
    for name, about in files.items():
        found = (checkpoint / name).stat().st_size if (checkpoint / name).is_file() else None
        if found != about["bytes"]:
            raise Unusable(
                f"{name} " + ("is missing" if found is None else f"has {found} bytes, {about['bytes']} were written")
            )


def refuse_damaged(checkpoint: Path, files: dict[str, Any]) -> None:
    """Compare the sizes of all files, and the checksums of every n-th file on n ranks, with the manifest.

    For another number of ranks than wrote the checkpoint; the same number uses ``read_checked``.

    Raises:
        Unusable: a file differs, or cannot be read.
    """
    refuse_other_sizes(checkpoint, files)
    by_size = sorted(files, key=lambda name: files[name]["bytes"])  # so that every rank gets large and small files
    for name in by_size[rank() :: world()]:
        with _naming(name):
            refuse_other_checksum(name, io.checksum(checkpoint / name), files)


def read_checked(checkpoint: Path, files: dict[str, Any], weights: str) -> dict[str, dict[str, Any]]:
    """Read the files that this rank wrote, and the file ``weights``; check each against the manifest while it is read.

    For the same number of ranks as wrote the checkpoint. Below ZeRO-3 rank 0 wrote ``weights`` for all ranks.

    Returns:
        File name -> content. Not memory-mapped: DeepSpeed keeps tensors of a file as the optimizer's state.

    Raises:
        Unusable: a file differs, or cannot be read.
    """
    refuse_other_sizes(checkpoint, files)
    found = {}
    for name, about in files.items():
        if about["rank"] == rank() or name == weights:
            with _naming(name), io.Hashed(checkpoint / name) as file:
                try:
                    found[name] = opened(file, mmap=False)
                finally:  # where the reading failed too, damage is the better reason
                    refuse_other_checksum(name, file.checksum(), files)
    return found


def without_enums(value: Any) -> Any:
    """The same dictionaries, lists and tuples with the values of Enums in the place of their members.

    Python before 3.11.4 pickles a member as a call of ``getattr``, which ``weights_only`` refuses to read.
    """
    if isinstance(value, Enum):
        return value.value
    if type(value) is dict:
        return {key: without_enums(item) for key, item in value.items()}
    if type(value) in (list, tuple):  # a named tuple stays as it is
        return type(value)(without_enums(item) for item in value)
    return value


def on_host(value: Any) -> Any:
    """A copy that shares nothing: tensors in host memory (page-locked for those of a GPU), other values as they are.

    Tensors that share memory share it in the copy too, so a file of the copy is as large as one of ``value``.
    """
    copied = _on_host(value, {})
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copied


def n_bytes(value: Any) -> int:
    """The memory of the copies of all tensors; memory that several share counts once.

    torch rounds the page-locked memory of a copy from a GPU up to a power of two.
    """
    memories = {_memory_of(tensor): tensor.is_cuda for tensor in _tensors_in(value)}
    return sum(1 << (size - 1).bit_length() if on_gpu and size else size for (_, size), on_gpu in memories.items())


def _on_host(value: Any, copies: dict[tuple[int, int], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        memory, key = value.untyped_storage(), _memory_of(value)
        if key not in copies:
            copies[key] = torch.empty(key[1], dtype=torch.uint8, pin_memory=value.is_cuda)
            source = torch.empty(0, dtype=torch.uint8, device=value.device).set_(memory)
            copies[key].copy_(source, non_blocking=True)
        place = (value.storage_offset(), value.size(), value.stride())
        return torch.empty(0, dtype=value.dtype).set_(copies[key].untyped_storage(), *place)
    if isinstance(value, dict):
        copied = copy.copy(value)  # an OrderedDict of torch has attributes
        copied.update((key, _on_host(item, copies)) for key, item in value.items())
        return copied
    if type(value) in (list, tuple):
        return type(value)(_on_host(item, copies) for item in value)
    return copy.deepcopy(value)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
    elif type(value) in (list, tuple):
        for item in value:
            yield from _tensors_in(item)


def _memory_of(tensor: torch.Tensor) -> tuple[int, int]:
    """(address, bytes) of the memory behind a tensor, which may be a view of a part."""
    memory = tensor.untyped_storage()
    return memory.data_ptr(), memory.nbytes()


def opened(file: Path | io.Hashed, mmap: bool = True) -> dict[str, Any]:
    """The content of a file: tensors, plain values and a few classes of DeepSpeed.

    Raises:
        pickle.UnpicklingError: the file holds anything else. Nothing is executed.
    """
    with torch.serialization.safe_globals(_classes_in_checkpoints()):
        return torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)  # type: ignore[arg-type]


def brief(error: Exception) -> str:
    """An error of reading or writing in a few words."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors and plain values, so reading it could run code"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _classes_in_checkpoints() -> list[Any]:
    """The classes of DeepSpeed that a checkpoint holds beside tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, fragment_address]


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Add the file's name to an error of reading."""
    try:
        yield
    except UNREADABLE as error:
        raise Unusable(f"{name}: {brief(error)}") from error


def refuse_other_checksum(name: str, checksum: str, files: Mapping[str, Any]) -> None:
    """Compare the checksum of a file with the manifest.

    Raises:
        Unusable: the two differ.
    """
    if checksum != files[name]["xxh3"]:
        raise Unusable(f"{name} does not have the checksum that it was written with")
