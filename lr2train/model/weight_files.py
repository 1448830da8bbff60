"""The weight files of a model folder: which files count, and the tensors in these files.

Choice: only safetensors are read, memory-mapped; a pickled file could run code. Two lists of files that disagree (an
index beside a single file, a tensor in two files) are refused, because loaders resolve them differently. Cost: a folder
with such a leftover has to be cleaned by hand. The tensors go to ``weights.conversions_of`` and ``weights.fill``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lr2train import progress
from lr2train.config import UserError
from lr2train.model import config_json

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth")
_KNOWN = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is read when it is called.

    Attributes:
        shape: known before the tensor is read.
        dtype: of torch; the code of safetensors for a dtype that no model has.
        read: returns the tensor.
        file: name of the file that holds it; empty for a tensor in memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], torch.Tensor]
    file: str = ""

    def __call__(self) -> torch.Tensor:
        return self.read()

    @classmethod
    def of(cls, tensor: torch.Tensor) -> StoredTensor:
        """A stored tensor in memory."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def files_of(folder: Path) -> list[Path]:
    """The files that decide the model: config.json, then the weight files, by the index where there is one.

    Raises:
        UserError: there are no weights, only pickled weights, or two lists of weight files that disagree.
    """
    return [folder / config_json.NAME, *(folder / name for name in _weight_files(folder))]


def safetensors_of(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model folder by name, memory-mapped: a tensor is read when it is called.

    Raises:
        UserError: as ``files_of``; a file is missing or damaged; a tensor is in two files, or not in the file that the
            index names.
    """
    tensors: dict[str, StoredTensor] = {}
    for name in _weight_files(folder):
        for tensor, stored in _contents(folder / name).items():
            if tensor in tensors:
                raise UserError(
                    f"{folder} holds {tensor} twice, in {tensors[tensor].file} and {name}; remove the file that does "
                    "not belong to the model"
                )
            tensors[tensor] = stored
    # A file beside the listed ones is no error: published folders hold such copies.
    ignored = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in _weight_files(folder))
    if ignored:
        progress.say(
            "model",
            f"{folder}: {some_of(ignored)} not read, as {INDEX if _index(folder) else FILE} holds the model without",
        )
    lost = [tensor for tensor, name in _index(folder).items() if tensor not in tensors or tensors[tensor].file != name]
    if lost:
        raise UserError(
            f"{folder / INDEX} names {len(lost)} tensors that are not where it says ({some_of(lost)}); fetch the "
            "folder again"
        )
    return tensors


def _weight_files(folder: Path) -> list[str]:
    """Names of the weight files, in order."""
    single, listed = (folder / FILE).exists(), sorted(set(_index(folder).values()))
    if single and listed and listed != [FILE]:
        raise UserError(
            f"{folder} holds {FILE} beside {INDEX}, which names other files, and loaders disagree; remove one of the "
            "two"
        )
    if not single and not listed:
        pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
        if pickled:
            raise UserError(
                f"{folder} holds pickled weights ({pickled[0]}), which could run code when they are read; save the "
                "model as safetensors with "
                "transformers first"
            )
        raise UserError(
            f"{folder} holds no .safetensors weights ({FILE}, or {INDEX} and the files that it names); set model.path "
            "to a complete folder"
        )
    return listed or [FILE]


def _index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name; empty where there is no index."""
    file = folder / INDEX
    if not file.exists():
        return {}
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        good = bool(listed) and all(isinstance(name, str) and _inside(name) for name in listed.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise UserError(
            f"{file} has no readable weight_map of tensor names to file names in this folder; fetch the folder again"
        )
    return listed


def _inside(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _contents(file: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(file, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{file} does not exist, although {INDEX} names it; fetch the folder again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or cannot be read ({error}); fetch it again") from error
    tensors = {}
    for name in opened.keys():  # noqa: SIM118 (no mapping)
        part = opened.get_slice(name)
        dtype = _KNOWN.get(part.get_dtype()) or str(part.get_dtype())
        tensors[name] = StoredTensor(tuple(part.get_shape()), dtype, partial(opened.get_tensor, name), file.name)
    return tensors


def some_of(names: Sequence[str]) -> str:
    """The first three names, and an ellipsis where there are more."""
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
