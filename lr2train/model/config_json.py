"""The config.json of a model folder: read as data, checked, and turned into a transformers config.

Choice: values are checked before transformers sees them, so a message names the file, the key, the value and the wanted
type. transformers checks most keys, but not those of the RoPE dicts, and its messages differ from family to family.
Code that a folder brings along (``auto_map``) is never run. Cost: a family that exists only as such code cannot be
loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lr2train.config import UserError
from lr2train.rope import hf as rope_hf

NAME = "config.json"
_COUNTS = {  # whole numbers: (least, largest); the limits also keep loops over them short
    "vocab_size": (1, rope_hf.LARGEST_COUNT), "intermediate_size": (1, rope_hf.LARGEST_COUNT), "num_hidden_layers": (1,
    10_000),
    "num_key_value_heads": (1, rope_hf.LARGEST_COUNT), "sliding_window": (0, rope_hf.LARGEST_COUNT), "num_labels": (0,
    100_000),
}  # fmt: skip
_OBJECTS = ("auto_map", "quantization_config")


def read(folder: Path) -> dict[str, Any]:
    """The values of a folder's config.json.

    Raises:
        UserError: the file is missing, unreadable, no JSON object, or holds a value that its key does not allow.
    """
    file = folder / NAME
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or not JSON
        raise UserError(
            f"model.path={folder} has no readable config.json ({brief(error)}); set model.path to a Hugging Face "
            "model folder"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no JSON object; set model.path to a Hugging Face model folder")
    refuse_wrong_values(values, str(file))
    return values


def refuse_wrong_values(values: Mapping[str, Any], where: str) -> None:
    """Refuse values from which no model can be built. Keys that only transformers understands are left to transformers.

    Raises:
        UserError: names the file, the key, the value and the wanted type or limits.
    """
    for key, number in _floats(values, ""):
        if not math.isfinite(number):
            raise rope_hf.wrong_value(where, key, number, "a finite number")
    for key in _OBJECTS:
        if not isinstance(values.get(key, {}), (dict, type(None))):
            raise rope_hf.wrong_value(where, key, values[key], "an object")
    for key, bounds in _COUNTS.items():
        rope_hf.refuse_wrong_count(values, key, where, bounds=bounds)
    rope_hf.refuse_wrong_values(values, where)
    _refuse_quantized(values, where)


def _floats(value: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from _floats(one, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from _floats(one, f"{key}[{number}]")


def _refuse_quantized(values: Mapping[str, Any], where: str) -> None:
    found = values.get("quantization_config")
    if found:
        method = found.get("quant_method", "unknown")
        raise UserError(
            quantized(f"{where} says that the weights are quantized (quantization_config, quant_method {method})")
        )


def quantized(found: str) -> str:
    """The sentence that refuses quantized weights; ``found`` says how they were recognised."""
    return (
        f"{found}; dequantize the model with transformers, save it to a new folder, and set model.path to that folder"
    )


def parsed(folder: Path, overrides: Mapping[str, Any] | None = None) -> Any:
    """The transformers config of a folder, with ``overrides`` laid over it.

    Raises:
        UserError: config.json is unreadable or holds a wrong value, its model type is unknown or no causal LM, or an
            override is no key of the config.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    values = read(folder)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        raise UserError(
            f"{folder / NAME} names model_type={kind!r}, which transformers does not know, and code of a model "
            "folder is never run; set "
            "model.path to a model of a type that transformers knows"
        )
    where = str(folder / NAME)
    current = rope_hf.with_current_type(values)
    if current is values:
        hf_config = guarded(where, lambda: AutoConfig.from_pretrained(folder, trust_remote_code=False))
    else:
        hf_config = guarded(where, lambda: CONFIG_MAPPING[kind].from_dict(current))
    for name in ("_attn_implementation", "_experts_implementation"):
        # a folder may name a kernel of the hub, which is code; transformers then chooses its own
        setattr(hf_config, name, None)
    if overrides:
        hf_config = _overridden(hf_config, current, overrides)
    _refuse_other_tasks(hf_config, where)
    return hf_config


def guarded(where: str, make: Any) -> Any:
    """The result of ``make()``. Any error of transformers about a config becomes one sentence about ``where``."""
    try:
        return make()
    except UserError:
        raise
    # each family raises its own kinds, from KeyError to huggingface_hub's StrictDataclassError
    except Exception as error:
        raise UserError(f"{where} makes no transformers config ({brief(error)}); correct {where}") from error


def _overridden(hf_config: Any, values: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """The config, built anew from its values and the overrides: derived values (layer types) follow the
    overrides.
    """
    unknown = [key for key in overrides if not hasattr(hf_config, key)]
    if unknown:
        raise UserError(
            f"model.overrides names {unknown[0]}, which {type(hf_config).__name__} does not have; correct "
            "model.overrides"
        )
    merged = {key: value for key, value in {**values, **overrides}.items() if not key.endswith("_implementation")}
    refuse_wrong_values(merged, "model.overrides")
    return guarded("model.overrides", lambda: type(hf_config).from_dict(merged))


def _refuse_other_tasks(hf_config: Any, where: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(hf_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{where} names model_type={hf_config.model_type!r}, which is no causal language model; set model.path to "
            "one that is"
        )


def from_architecture(architecture: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Any:
    """The transformers config of ``model.architecture``, with ``overrides`` laid over it.

    Raises:
        UserError: it names no model type, an unknown one, or wrong values; or an override is no key of the config.
    """
    from transformers import AutoConfig

    values = dict(architecture)
    if "model_type" not in values:
        raise UserError(
            "model.path is empty and model.architecture has no model_type; set model.path to a folder, or choose "
            "experiment=tiny_base to "
            "train from scratch"
        )
    refuse_wrong_values(values, "model.architecture")
    hf_config = guarded("model.architecture", lambda: AutoConfig.for_model(values.pop("model_type"), **values))
    if overrides:
        hf_config = _overridden(hf_config, architecture, overrides)
    _refuse_other_tasks(hf_config, "model.architecture")
    return hf_config


def brief(error: Exception) -> str:
    """The message of another library's error, on one line of at most 200 characters."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 200 else f"{said[:197]}..."
