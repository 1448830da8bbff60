"""Hugging Face models in and out: configs, weights, tokenizers.

Choice: a model is built empty inside the engine's init context and its tensors are streamed in one group at a time, read by rank 0 from the
memory-mapped safetensors. No rank ever holds the whole model, on the way in or out. A hub id is refused unless a download is allowed:
nothing is fetched by surprise.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lr2train.config import ModelConfig, UserError
from lr2train.io import read_json, write_json
from lr2train.rope import hf as rope_hf
from lr2train.rope.spectrum import Spectrum
from lr2train.run import rank

Gather = Callable[[list[nn.Parameter]], contextlib.AbstractContextManager[Any]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GROUP_BYTES = 512 * 2**20  # parameters gathered at one time while weights stream in or out
SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Stored:
    """A tensor that is read when it is called, and whose shape is known before."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    def __call__(self) -> torch.Tensor:
        return self.read()


def whole(_: list[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
    """The gather of a model that is not partitioned."""
    return contextlib.nullcontext()


def config_of(model: ModelConfig) -> Any:
    """The transformers config of ``model.path`` under ``model.overrides``, or of ``model.architecture``.

    Raises:
        UserError: neither is given, the folder is missing, a hub id is given without ``model.allow_download``, or an override is no key of
            the model's config.
    """
    from transformers import AutoConfig

    if model.path is None:
        return _scratch_config(model.architecture)
    hush_transformers()
    folder = folder_of(model)
    try:
        hf_config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:  # KeyError: a rope type that transformers has forgotten
        raise UserError(
            f"model.path={model.path} has no readable config.json ({_brief(error)}); set model.path to a Hugging Face model folder"
        ) from error
    return _overridden(hf_config, folder, model.overrides) if model.overrides else hf_config


def _overridden(hf_config: Any, folder: Path, overrides: Mapping[str, Any]) -> Any:
    """The config built anew from the folder's values and ours, so that what transformers derives from them (layer types) follows."""
    from huggingface_hub.errors import StrictDataclassError

    unknown = [key for key in overrides if not hasattr(hf_config, key)]
    if unknown:
        raise UserError(f"model.overrides names {unknown[0]}, which {type(hf_config).__name__} does not have; correct model.overrides")
    try:
        return type(hf_config).from_dict({**read_json(folder / "config.json"), **overrides})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.overrides makes no transformers config ({_brief(error)}); correct model.overrides") from error


def _scratch_config(architecture: Mapping[str, Any]) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    values = dict(architecture)
    if "model_type" not in values:
        raise UserError(
            "model.path is empty and model.architecture has no model_type; set model.path to a folder, or choose experiment=tiny_base to "
            "train from scratch"
        )
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.architecture makes no transformers config ({_brief(error)}); correct model.architecture") from error


def folder_of(model: ModelConfig) -> Path:
    """The local folder of a pretrained model; fetched from the hub only where ``model.allow_download`` says so."""
    path = Path(str(model.path)).expanduser()
    if path.is_dir():
        return path
    looks_like_hub_id = str(model.path).count("/") == 1 and not str(model.path).startswith((".", "/", "~", "runs/"))
    if not looks_like_hub_id:
        raise UserError(f"model.path={model.path} is no folder; set model.path to a Hugging Face model folder")
    if not model.allow_download:
        raise UserError(
            f"model.path={model.path} is no local folder and downloads are off; set model.path to a folder, or model.allow_download=true "
            "to fetch it from the hub"
        )
    return _download(model)


def _download(model: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(str(model.path), revision=model.revision, allow_patterns=wanted))
    except Exception as error:  # the hub client raises a dozen kinds; each means the same to the user
        raise UserError(
            f"model.path={model.path} cannot be fetched ({type(error).__name__}: {_brief(error)}); download it by hand and set model.path "
            "to the folder"
        ) from error


def _brief(error: Exception) -> str:
    """What another library said, as one line of bearable length."""
    return " ".join(str(error).split())[:200]


def build_empty(hf_config: Any, dtype: str, init_context: Callable[[], contextlib.AbstractContextManager[Any]]) -> Any:
    """An architecture without weights, built inside ``init_context`` (ZeRO's, so that parameters are partitioned as they are made)."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with init_context(), no_init_weights():
        model = AutoModelForCausalLM.from_config(hf_config, dtype=DTYPES[dtype])
    model.tie_weights()
    _refuse_unusual_heads(model)
    return model


def _refuse_unusual_heads(model: Any) -> None:
    head, config = model.get_output_embeddings(), model.config
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise UserError(f"{type(model).__name__} has no plain linear head without bias; set model.path to a model that has one")
    for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise UserError(
                f"{type(model).__name__} scales its logits ({key}={getattr(config, key)}), which the chunked loss does not; set "
                "model.path to a model without it"
            )


def fill(model: nn.Module, tensors: Mapping[str, Stored], gather: Gather = whole) -> None:
    """Copy named tensors into a built model, group by group.

    Args:
        model: from ``build_empty``.
        tensors: by name, the same on every rank; read on rank 0 only when ``gather`` broadcasts, else on every rank.
        gather: context manager over a list of parameters that makes them whole and, on exit, spreads rank 0's values.

    Raises:
        UserError: a parameter of the model has no tensor, or one of another shape; on every rank, before anything is copied.
    """
    sources = _sources(model, tensors)
    for group in _groups(model):
        with gather([parameter for _, parameter in group]), torch.no_grad():
            for name, parameter in group:
                if gather is whole or rank() == 0:
                    parameter.copy_(sources[name]().to(parameter.dtype))


def _sources(model: nn.Module, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Parameter name -> its tensor, which may be stored under another name of the same parameter."""
    found = {name: [tensors[alias] for alias in aliases if alias in tensors] for name, aliases in tied_names(model).items()}
    missing = [name for name, stored in found.items() if not stored]
    if missing:
        raise UserError(_incomplete("the weights", missing))
    sources = {name: stored[0] for name, stored in found.items()}
    for name, parameter in model.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # a partitioned parameter's own shape is empty
        if sources[name].shape != shape:  # copy_ would broadcast
            raise UserError(
                f"{name} has shape {list(sources[name].shape)} in the weights and {list(shape)} in the model; set model.path to a folder "
                "whose config.json belongs to its weights"
            )
    return sources


def _incomplete(what: str, missing: list[str]) -> str:
    return (
        f"{what} lack {len(missing)} tensors of the model ({', '.join(missing[:3])} …); set model.path to a complete folder of the same "
        "architecture"
    )


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """name -> every name of the same Parameter (tied embeddings have two)."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        names.setdefault(owner, []).append(name)
    return names


def _groups(model: nn.Module) -> Iterator[list[tuple[str, nn.Parameter]]]:
    group: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in model.named_parameters():
        size += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        group.append((name, parameter))
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def safetensors_of(folder: Path) -> dict[str, Stored]:
    """The tensors by name of every .safetensors of a folder (memory-mapped: a tensor is read when it is asked for).

    Raises:
        UserError: the folder holds none.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); fetch it again") from error
        for name in file.keys():  # noqa: SIM118 (no mapping)
            tensors[name] = Stored(tuple(file.get_slice(name).get_shape()), partial(file.get_tensor, name))
    if not tensors:
        raise UserError(f"model.path={folder} holds no .safetensors; convert the weights to safetensors first")
    return tensors


def scratch_weights(hf_config: Any, seed: int) -> dict[str, Stored]:
    """Freshly initialised weights: the same for a seed on any number of ranks. Only for models small enough to be trained from scratch."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    return {name: Stored(tuple(tensor.shape), lambda tensor=tensor: tensor) for name, tensor in model.state_dict().items()}


def hush_transformers() -> None:
    """No bar for every load of weights, and no warning about the two keys that vLLM reads in our `longrope` dict; errors are still said."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_rope_utils").setLevel(logging.ERROR)


def load_whole(folder: str | Path, dtype: str = "float32", device: str = "cpu", overrides: Mapping[str, Any] | None = None) -> Any:
    """A complete model in one process, for the search, evaluation and generation; in eval mode, without gradients.

    Args:
        folder: of a Hugging Face model.
        dtype: a name of ``DTYPES``.
        device: of torch.
        overrides: ``model.overrides`` of a base model; a trained folder's config has them already.

    Raises:
        UserError: the folder is missing, is not a causal LM, or lacks weights (which transformers would draw at random).
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    model_config = ModelConfig(path=str(folder), overrides=dict(overrides or {}))
    hf_config = config_of(model_config)
    hush_transformers()
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, report = load(
            folder_of(model_config), config=hf_config, dtype=DTYPES[dtype], attn_implementation="sdpa", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} has no readable weights ({_brief(error)}); set model.path to a complete model folder") from error
    if report["missing_keys"]:
        raise UserError(_incomplete(f"the weights in {folder}", sorted(report["missing_keys"])))
    return model.to(device).eval().requires_grad_(False)


def write_folder(
    model: nn.Module,
    config: Mapping[str, Any],
    folder: Path,
    gather: Gather = whole,
    dtype: torch.dtype | None = None,
    extras: Callable[[Path], None] | None = None,
) -> None:
    """Write config.json and safetensors shards; every rank calls it, rank 0 writes. The folder appears whole or not at all.

    The config's dtype becomes that of the weights: loaders cast to what it says.

    Args:
        model: whose parameters are written.
        config: for config.json.
        folder: is replaced.
        gather: makes partitioned parameters whole.
        dtype: of the written weights; None keeps each parameter's.
        extras: called on rank 0 with the folder that is about to take its place, to write what else belongs into it.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shards = _Shards(temporary)
    if rank() == 0:
        _remove(temporary)
        temporary.mkdir(parents=True)
    for group in _groups(model):
        with gather([parameter for _, parameter in group]):
            if rank() == 0:
                for name, parameter in group:
                    shards.add(name, parameter.detach().to("cpu", dtype or parameter.dtype, copy=True).contiguous())
    if rank() == 0:
        shards.close()
        write_json(temporary / "config.json", {**config, "dtype": shards.dtype})
        if extras is not None:
            extras(temporary)
        _take_the_place_of(folder, temporary)


class _Shards:
    """Tensors on their way into safetensors files of about ``SHARD_BYTES`` each."""

    def __init__(self, folder: Path):
        self.dtype = ""  # of the first tensor, the embeddings
        self._folder = folder
        self._held: dict[str, torch.Tensor] = {}
        self._file_of: dict[str, str] = {}
        self._held_bytes = self._total_bytes = self._n_files = 0

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

        self._n_files += 1
        file = f"model-{self._n_files:05d}.safetensors"
        try:
            save_file(self._held, self._folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(
                f"{self._folder / file} cannot be written ({error}); free some room on that disk, and run the same command again to go on"
            ) from error
        self._file_of.update(dict.fromkeys(self._held, file))
        self._held, self._held_bytes = {}, 0

    def close(self) -> None:
        """Write what is left; one file alone gets the name that needs no index."""
        if self._held:
            self._write()
        if self._n_files == 1:
            (self._folder / "model-00001.safetensors").rename(self._folder / "model.safetensors")
        else:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": self._file_of}
            write_json(self._folder / "model.safetensors.index.json", index)


def _take_the_place_of(folder: Path, complete: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    _remove(old)
    if folder.exists():
        folder.rename(old)
    complete.rename(folder)
    _remove(old)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def plain_config(hf_config: Any) -> dict[str, Any]:
    """A transformers config as the dict that config.json holds."""
    return json.loads(hf_config.to_json_string(use_diff=False))


def spectrum_of(hf_config: Any, model: ModelConfig) -> Spectrum:
    """The model's original RoPE spectrum; ``model.original_window_tokens`` overrides the window that its config states."""
    spectrum = rope_hf.spectrum_of(plain_config(hf_config))
    return replace(spectrum, window_tokens=model.original_window_tokens) if model.original_window_tokens else spectrum


def load_tokenizer(folder: str | Path) -> Any:
    """The fast tokenizer of a model folder.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no readable tokenizer ({_brief(error)}); copy the model's tokenizer files into it") from error


def files_of(folder: Path) -> list[Path]:
    """A model folder's config and weights: the files whose contents decide what the model computes."""
    return sorted((*folder.glob("*.safetensors"), folder / "config.json"))


def fingerprint(folder: Path) -> str:
    """Of a model folder's config and weights, by name, size and time: sees that a folder was written anew without reading gigabytes."""
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files_of(folder)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
