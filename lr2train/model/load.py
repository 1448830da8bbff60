"""Hugging Face models in and out: every verb gets its model, config and tokenizer from here.

Choice: a model is built empty inside the caller's init context (under ZeRO-3 parameters are divided as they are made)
and filled from memory-mapped safetensors, one group at a time. So every verb reads weights alike, and no rank ever
holds a whole divided model. No code of a folder is run, no question is asked on the terminal, and a hub id is refused
unless ``model.allow_download`` is set. Cost: tensor names are converted by transformers' internal functions, whose form
may change between releases.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lr2train import progress
from lr2train.config import ModelConfig, UserError
from lr2train.model import config_json, head
from lr2train.model.folder import GENERATION_FILES, copy_companions, values_in, write_folder
from lr2train.model.weight_files import StoredTensor, files_of, safetensors_of
from lr2train.model.weights import Conversion, Gather, conversions_of, fill, owners, whole
from lr2train.rope import hf as rope_hf
from lr2train.rope.spectrum import Spectrum

__all__ = [
    "DTYPES", "Gather", "StoredTensor", "assembled", "build_empty", "config_of", "copy_companions", "files_of",
    "folder_fingerprint",
    "folder_of", "generation_files_of", "is_hub_id", "load_tokenizer", "load_whole", "plain_config", "planned",
    "safetensors_of",
    "scratch_weights", "spectrum_of", "stop_ids_of",
    "whole", "write_folder",
]  # fmt: skip

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
InitContext = Callable[[], contextlib.AbstractContextManager[Any]]


def config_of(model: ModelConfig) -> Any:
    """The transformers config of ``model.path`` or of ``model.architecture``, under ``model.overrides``.

    Raises:
        UserError: neither is set; the folder is missing; a hub id is given without ``model.allow_download``;
            config.json is unreadable or holds a wrong value; the weights are quantized; the model is no causal LM; or
            an override is no key of its config.
    """
    silence_transformers()
    if model.path is None:
        return config_json.from_architecture(model.architecture, model.overrides)
    return config_json.parsed(folder_of(model), model.overrides)


def folder_of(model: ModelConfig) -> Path:
    """The local folder of ``model.path``; a hub id is downloaded where ``model.allow_download`` is set.

    Raises:
        UserError: there is no such folder, or the download is not allowed or fails.
    """
    path = Path(str(model.path)).expanduser()
    if path.is_dir():
        return path
    if not is_hub_id(str(model.path)):
        first = "run this in lr2train's checkout, which has it, or " if str(model.path).startswith("launch/") else ""
        raise UserError(f"model.path={model.path} is no folder; {first}set model.path to a Hugging Face model folder")
    if not model.allow_download:
        raise UserError(
            f"model.path={model.path} is no local folder and downloads are off; set model.path to a folder, or "
            "model.allow_download=true "
            "to fetch it from the hub"
        )
    return _download(model)


def is_hub_id(name: str) -> bool:
    """Whether a name may be a repository of the Hugging Face hub, and is no path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~", "runs/", "launch/"))


def generation_files_of(model: ModelConfig) -> list[Path]:
    """The base model's sampling settings and chat templates; empty where there is no base or its folder is gone."""
    try:
        return [file for name in GENERATION_FILES if (file := folder_of(model) / name).is_file()] if model.path else []
    except UserError:
        return []


def _download(model: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(str(model.path), revision=model.revision, allow_patterns=wanted))
    except Exception as error:  # the hub client raises a dozen kinds; each means the same to the user
        raise UserError(
            f"model.path={model.path} cannot be fetched ({type(error).__name__}: {config_json.brief(error)}); "
            "download it by hand and set model.path "
            "to the folder"
        ) from error


def assembled(
    hf_config: Any, dtype: str, tensors: Mapping[str, StoredTensor], init_context: InitContext, gather: Gather = whole
) -> Any:
    """A Hugging Face causal LM with its weights.

    Names, shapes and dtypes are checked before anything is built, on a twin on the meta device, alike on every rank.
    Embeddings that the config ties stay tied, unless the weights hold two different ones, as in transformers; the
    model's own config then says so.

    Args:
        hf_config: from ``config_of``.
        dtype: a key of ``DTYPES``.
        tensors: from ``safetensors_of`` or ``scratch_weights``.
        init_context: the model is built in it: ZeRO's, which divides parameters as they are made, or a device.
        gather: context manager that makes partitioned parameters whole.

    Raises:
        UserError: the weights do not belong to this model, or hold numbers that are not finite; raised on every rank.
    """
    hf_config, _, conversions = planned(hf_config, dtype, tensors)
    model = build_empty(hf_config, dtype, init_context)
    fill(model, conversions, tensors, gather)
    return model


def planned(hf_config: Any, dtype: str, tensors: Mapping[str, StoredTensor]) -> tuple[Any, nn.Module, list[Conversion]]:
    """A copy of the config that says whether the head is tied, the model on the meta device, and how it is filled.

    Raises:
        UserError: as ``assembled``, except for numbers that are not finite: none is read.
    """
    hf_config = copy.deepcopy(hf_config)  # transformers writes dtype and attention into the config of a model
    twin, conversions = _twin_of(hf_config, dtype, tensors)
    if _two_heads(twin, conversions, tensors):
        progress.say(
            "model",
            "config.json ties the output head to the embeddings, and the weights hold a head of its own: "
            "this head is used",
        )
        hf_config.tie_word_embeddings = hf_config.get_text_config().tie_word_embeddings = False
        twin, conversions = _twin_of(hf_config, dtype, tensors)
    return hf_config, twin, conversions


def _twin_of(hf_config: Any, dtype: str, tensors: Mapping[str, StoredTensor]) -> tuple[Any, list[Conversion]]:
    twin = build_empty(hf_config, dtype, lambda: torch.device("meta"))
    return twin, conversions_of(twin, tensors)


def _two_heads(twin: nn.Module, conversions: Sequence[Conversion], tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether one parameter of the model is stored under two names with two values."""
    owner = owners(twin.state_dict(keep_vars=True))
    stored: dict[str, list[str]] = {}
    for conversion in conversions:
        stored.setdefault(owner[conversion.targets[0]], []).append(conversion.sources[0])
    pairs = [[tensors[name]() for name in names] for names in stored.values() if len(names) > 1]
    return any(not torch.equal(first, other) for first, *others in pairs for other in others)


def build_empty(hf_config: Any, dtype: str, init_context: InitContext) -> Any:
    """A model without weights, built inside ``init_context``.

    Raises:
        UserError: transformers cannot build it, or its head or dtypes are not supported.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with init_context(), no_init_weights():
        try:
            model = AutoModelForCausalLM.from_config(hf_config, dtype=DTYPES[dtype], trust_remote_code=False)
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
            raise UserError(
                f"transformers cannot build a model of type {hf_config.model_type} from its config "
                f"({config_json.brief(error)}); correct "
                "its config.json"
            ) from error
    model.tie_weights()
    head.form_of(model)  # refuses a head that the chunked loss does not compute
    _refuse_mixed_dtypes(model, DTYPES[dtype])
    return model


def _refuse_mixed_dtypes(model: Any, dtype: torch.dtype) -> None:
    """Raises UserError for a model of which transformers keeps some parameters in float32 whatever dtype is asked
    for.
    """
    kept = [pattern for pattern, held in model._get_dtype_plan(dtype).items() if held != dtype]
    names = [
        name for name, _ in model.named_parameters() for pattern in kept if re.search(pattern.replace("*", ".*"), name)
    ]
    if names:
        raise UserError(
            f"{type(model).__name__} keeps {names[0]} in float32 whatever model.dtype says, and one dtype is held "
            "here; set model.dtype=float32"
        )


def scratch_weights(hf_config: Any, seed: int) -> dict[str, StoredTensor]:
    """Freshly initialised weights, the same for a seed on any number of ranks. Each rank holds them whole: for small
    models only.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(hf_config), dtype=torch.float32, trust_remote_code=False)
    return {name: StoredTensor.of(tensor) for name, tensor in model.state_dict().items()}


def silence_transformers() -> None:
    """Switch off the progress bar of each load, and the warning about ``short_mscale`` and ``long_mscale``; errors
    stay.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_rope_utils").setLevel(logging.ERROR)


def load_whole(
    folder: str | Path, dtype: str = "float32", device: str = "cpu", overrides: Mapping[str, Any] | None = None
) -> Any:
    """A complete model in one process, in eval mode and without gradients, for search, evaluation and generation.

    Args:
        folder: of a Hugging Face model.
        dtype: a key of ``DTYPES``.
        device: of torch.
        overrides: ``model.overrides`` of a base model; the config of a trained folder has them already.

    Raises:
        UserError: as ``config_of``, ``safetensors_of`` and ``assembled``.
    """
    model_config = ModelConfig(path=str(folder), overrides=dict(overrides or {}))
    hf_config = config_of(model_config)
    model = assembled(hf_config, dtype, safetensors_of(folder_of(model_config)), lambda: torch.device(device))
    return model.eval().requires_grad_(False)


def plain_config(hf_config: Any) -> dict[str, Any]:
    """A transformers config as a plain dict, the contents of config.json."""
    return json.loads(hf_config.to_json_string(use_diff=False))


def spectrum_of(hf_config: Any, model: ModelConfig) -> Spectrum:
    """The model's own RoPE up to L0; ``model.original_window_tokens``, where set, replaces the window of its config.

    Raises:
        UserError: the config has no RoPE that is understood, or no table that serves ``model.original_window_tokens``.
    """
    config, window = plain_config(hf_config), model.original_window_tokens
    spectrum = rope_hf.spectrum_of(config)
    if window is None:
        return spectrum
    rope_hf.refuse_window(config, window)
    return replace(spectrum, window_tokens=window)


def load_tokenizer(folder: str | Path) -> Any:
    """The fast tokenizer of a model folder.

    Raises:
        UserError: there is none, or it needs code of the folder.
    """
    from transformers import AutoTokenizer

    silence_transformers()
    values = values_in(Path(folder) / config_json.NAME)
    early = rope_hf.with_current_type(values) is not values  # transformers reads config.json, and would refuse this one
    try:
        config = {"config": config_json.parsed(Path(folder))} if early else {}
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **config)
    except Exception as error:  # transformers and tokenizers raise a dozen kinds, bare Exception among them
        raise UserError(
            f"{folder} has no readable tokenizer ({config_json.brief(error)}); copy the model's tokenizer files into it"
        ) from error


def stop_ids_of(folder: Path, tokenizer: Any) -> set[int]:
    """Token ids that end a text, from tokenizer, config.json and generation_config.json: chat models have several."""
    named = [tokenizer.eos_token_id]
    for name in ("config.json", "generation_config.json"):
        said = values_in(folder / name).get("eos_token_id")
        named += said if isinstance(said, list) else [said]
    return {one for one in named if isinstance(one, int)}


def folder_fingerprint(folder: Path) -> str:
    """Hash of name, size and time of config and weight files: changes when a folder is written anew, and reads no
    weights.
    """
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files_of(folder)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
