"""Model folders that lr2train writes: weights under their published names, a config, and the companion files of a
runtime.

Choice: tensors get the names under which the model family is published (transformers' own reverse conversion), so every
runtime finds them. A folder is written beside its place, flushed to the disk and then renamed: it appears whole or not
at all. Files get the permissions of the umask. No file names a path of this machine, or code that is not shipped. Cost:
the disk holds the old and the new folder for a moment.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lr2train import io
from lr2train.config import UserError
from lr2train.model import weight_files, weights
from lr2train.model.weight_files import StoredTensor
from lr2train.model.weights import Gather, whole
from lr2train.ranks import rank

SHARD_BYTES = 4 * 2**30
GENERATION_FILES = (
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)  # sampling settings and chat templates
_CODE = ("auto_map",)  # points to code in the base model's folder, which is not shipped
# on the machine that wrote the file
_PATHS = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")


def write_folder(
    model: nn.Module,
    config: Mapping[str, Any],
    folder: Path,
    gather: Gather = whole,
    dtype: torch.dtype | None = None,
    extras: Callable[[Path], None] | None = None,
) -> None:
    """Write config.json and safetensors files; every rank calls it, rank 0 writes. The folder appears whole or not at
    all.

    Loaders trust config.json, so its class, tied embeddings and dtype are set from the model itself.

    Args:
        model: a Hugging Face causal LM.
        config: contents of config.json; the facts above replace its own.
        folder: is replaced.
        gather: context manager that makes partitioned parameters whole.
        dtype: of the written weights; None: each parameter keeps its own.
        extras: called on rank 0 with the unfinished folder, to write further files into it.
    """
    with replacing(folder) as temporary:
        _write(model, config, temporary, gather, dtype, extras)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``folder``, which takes its place when the block ends. After an error it is removed.

    Every rank may enter; rank 0 alone makes, renames and removes folders.
    """
    temporary = folder.with_name(f".{folder.name}{io.TEMPORARY}")
    try:
        if rank() == 0:
            _remove(temporary)
            temporary.mkdir(parents=True)
        yield temporary
    except BaseException:
        if rank() == 0:
            _remove(temporary)  # gigabytes, and the disk may be full
        raise
    if rank() == 0:
        _take_the_place_of(folder, temporary)


def write_stream(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> str:
    """Write tensors to the safetensors files of a new folder as they come; no more than one file is held in memory.

    Args:
        tensors: (published name, value); in one process.
        folder: exists, and holds no weights.

    Returns:
        The dtype of the first tensor, which is the embeddings'.
    """
    shards = _Shards(folder)
    for name, tensor in tensors:
        shards.add(name, tensor.contiguous())
    shards.close()
    return shards.dtype


def share_weights(source: Path, folder: Path) -> None:
    """Give a folder the weight files of another by hard links; where the disk has no links, by copies."""
    names = [file.name for file in weight_files.files_of(source)[1:]]
    for name in [*names, *([weight_files.INDEX] if (source / weight_files.INDEX).exists() else [])]:
        try:
            os.link(source / name, folder / name)
        except OSError:
            shutil.copyfile(source / name, folder / name)


def shareable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the keys that name code which is not shipped, or a path of this machine."""
    return {key: value for key, value in config.items() if key not in (*_CODE, *_PATHS)}


def facts_of(model: Any) -> dict[str, Any]:
    """The keys of config.json that follow from the model itself: its class, and whether its embeddings are tied."""
    return _facts(model, model.state_dict(keep_vars=True))


def _write(
    model: nn.Module,
    config: Mapping[str, Any],
    folder: Path,
    gather: Gather,
    dtype: torch.dtype | None,
    extras: Callable[[Path], None] | None,
) -> None:
    from transformers.core_model_loading import revert_weight_conversion

    own = model.state_dict(keep_vars=True)  # the parameters themselves: ZeRO gathers no copies
    shards = _Shards(folder)
    for group in _groups(model, own):
        with gather([own[name] for name in group if isinstance(own[name], nn.Parameter)]):
            if rank() == 0:
                held = {name: own[name].detach().to("cpu", _dtype_of(own[name], dtype), copy=True) for name in group}
                for name, tensor in revert_weight_conversion(model, held).items():  # type: ignore[arg-type]
                    shards.add(name, tensor.contiguous())
    if rank() == 0:
        shards.close()
        io.write_json(folder / "config.json", {**shareable(config), **_facts(model, own), "dtype": shards.dtype})
        if extras is not None:
            extras(folder)


def _dtype_of(tensor: torch.Tensor, asked: torch.dtype | None) -> torch.dtype:
    return asked if asked is not None and tensor.is_floating_point() else tensor.dtype


def _facts(model: Any, own: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    tied = len(set(weights.owners(own).values())) < len(own)
    return {"architectures": [type(model).__name__], "tie_word_embeddings": tied}


def _groups(model: Any, own: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Names of the tensors to write, in groups of about ``GROUP_BYTES``."""
    group: list[str] = []
    for names in _units(model, own):
        group += names
        if sum(weights.bytes_of(own[name]) for name in group) >= weights.GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group


def _units(model: Any, own: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names of the tensors to write, each once. Tensors that are published as one tensor stand together."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, apply_converters

    backwards = [one.reverse_transform() for one in reversed(get_model_conversion_mapping(model, add_legacy=False))]
    converters = [one for one in backwards if isinstance(one, WeightConverter)]
    units: dict[str, list[str]] = {}
    for name in dict.fromkeys(weights.owners(own).values()):
        if name not in (model._keys_to_ignore_on_save or ()):
            published, pattern = apply_converters(name, converters)
            units.setdefault(published if pattern else name, []).append(name)
    return list(units.values())


def published(model: Any, own: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors of a model as ``write_folder`` would publish them, by their published names; none is read before its use.

    Args:
        model: on the meta device.
        own: by the model's own names; a tied tensor under the first of its names.
    """
    found: dict[str, StoredTensor] = {}
    for names in _units(model, model.state_dict(keep_vars=True)):
        unit = _Unit(model, {name: own[name] for name in names})
        for name, (shape, dtype) in unit.made_of_shapes().items():
            found[name] = StoredTensor(shape, dtype, partial(unit.read, name), own[names[0]].file)
    return found


class _Unit:
    """Tensors of a model that are published together, such as the stacked experts of a layer."""

    def __init__(self, model: Any, own: Mapping[str, StoredTensor]):
        self._model, self._own = model, own
        self._made: dict[str, torch.Tensor] = {}  # what was converted and is not asked for yet

    def made_of_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        empty = {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in self._own.items()}  # type: ignore[call-overload]
        return {name: (tuple(one.shape), one.dtype) for name, one in self._converted(empty).items()}

    def read(self, name: str) -> torch.Tensor:
        if name not in self._made:
            self._made = self._converted({own: stored() for own, stored in self._own.items()})
        return self._made.pop(name)

    def _converted(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self._model, tensors))  # type: ignore[arg-type]


class _Shards:
    """Collects tensors and writes safetensors files of about ``SHARD_BYTES`` each.

    Attributes:
        dtype: of the first tensor, which is the embeddings'.
    """

    def __init__(self, folder: Path):
        self.dtype = ""
        self._folder = folder
        self._held: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []  # names of the tensors in each file
        self._held_bytes = self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.dtype = self.dtype or str(tensor.dtype).removeprefix("torch.")
        self._held[name] = tensor
        self._held_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes
        if self._held_bytes >= SHARD_BYTES:
            self._write()

    def _write(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        file = self._folder / self._name(len(self._shards))
        try:
            save_file(self._held, file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(
                f"{file} cannot be written ({error}); free some room on that disk, and run the same command again to "
                "go on"
            ) from error
        io.usual_mode(file)
        self._shards.append(list(self._held))
        self._held, self._held_bytes = {}, 0

    @staticmethod
    def _name(number: int) -> str:
        return f"model-{number + 1:05d}.safetensors"

    def close(self) -> None:
        """Write the rest. A single file gets the name that needs no index; several files get an index."""
        if self._held:
            self._write()
        count = len(self._shards)
        names = (
            [weight_files.FILE]
            if count == 1
            else [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        )
        for number, name in enumerate(names):
            (self._folder / self._name(number)).rename(self._folder / name)
        if count > 1:
            file_of = {tensor: name for name, tensors in zip(names, self._shards, strict=True) for tensor in tensors}
            io.write_json(
                self._folder / weight_files.INDEX,
                {"metadata": {"total_size": self._total_bytes}, "weight_map": file_of},
            )


def _take_the_place_of(folder: Path, complete: Path) -> None:
    for file in complete.rglob("*"):
        if file.is_file():
            io.sync_file(file)
    io.sync_folder(complete)
    old = folder.with_name(f".{folder.name}.old")
    _remove(old)
    if folder.exists():
        folder.rename(old)  # not deleted before the new folder has its name: a kill in between loses nothing
    complete.rename(folder)
    io.sync_folder(folder.parent)
    _remove(old)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def copy_companions(files: Iterable[Path], folder: Path, window_tokens: int) -> None:
    """Copy tokenizer, sampling and template files into the folder of a model with another window.

    The tokenizer's ``model_max_length`` and the ``max_length`` of generation, where there is one, become the window.
    Temporary files of a killed writer and unreadable JSON files are left out.

    Args:
        files: a later file replaces an earlier file of the same name.
        folder: the destination.
        window_tokens: of the model in ``folder``.
    """
    for file in files:
        if io.is_temporary(file) or not file.is_file():
            continue
        if file.name == "tokenizer_config.json":
            _rewrite(file, folder, lambda values: {**values, "model_max_length": window_tokens})
        elif file.name == "generation_config.json":
            _rewrite(file, folder, lambda values: {**values, **_max_length(values, window_tokens)})
        else:
            shutil.copyfile(file, folder / file.name)


def _max_length(values: Mapping[str, Any], window_tokens: int) -> dict[str, Any]:
    return {"max_length": window_tokens} if isinstance(values.get("max_length"), (int, float)) else {}


def _rewrite(file: Path, folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if values := values_in(file):
        io.write_json(folder / file.name, shareable(change(values)))


def values_in(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a published folder; empty where the file is missing or unreadable: the model works
    without it.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
