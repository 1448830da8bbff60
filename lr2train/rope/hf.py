"""Factors <-> the RoPE keys of a Hugging Face config; the only file that knows these names and their versions.

Configs are plain dicts (config.json, or ``config.to_dict()``). transformers 5 keeps all RoPE keys in
``rope_parameters``. Before, there were ``rope_theta``, ``partial_rotary_factor`` and ``rope_scaling``, with "type" for
"rope_type" and "su" (Phi-3, at times "yarn") for "longrope".

Choice: ``write`` (both windows), ``write_one_table`` (the long table alone) and ``write_short_window`` put one dict
under both names, with every number written out, so a runtime has nothing to infer. What runtimes do with both windows:

- transformers applies ``attention_factor`` to both windows. Below the original window its model is the trained one only
  where this factor equals the short window's own. The config has no key that would say otherwise.
- vLLM and SGLang read ``short_mscale`` and ``long_mscale`` instead, and fall back to sqrt(1 + ln s / ln L0) for both
  windows. ``write`` gives the short window's own factor and the long factor. Cost: transformers logs one "Unrecognized
  keys" warning and ignores both.
- llama.cpp's converter reads the type alone for Llama and Mistral, and writes no factors.
- Phi-3 in transformers 4 accepts exactly three keys in ``rope_scaling`` and refuses these dicts; that is better than a
  wrong attention factor.

The short window is the model's own, in training and in ``write``. A base model with plain RoPE has short factors 1 and
attention factor 1. A base model of type ``longrope`` keeps its ``short_factor`` and its short attention factor.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lr2train.config import UserError
from lr2train.rope.factors import Factors, longrope_attention_factor
from lr2train.rope.spectrum import Spectrum

DEFAULT_BASE = 10000.0  # of transformers, for configs that name none
# Types that change no frequency where their factor is 1.
SCALED_BY_FACTOR = ("linear", "dynamic", "yarn", "llama3")

LARGEST_COUNT = 2**31 - 1

# The keys that are read here, by the type of their values.
_COUNTS = (
    "hidden_size",
    "num_attention_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
)
_NUMBERS = ("rope_theta", "factor", "attention_factor", "short_mscale", "long_mscale")
_SHARES = ("partial_rotary_factor", "rotary_pct")
_TABLES = ("long_factor", "short_factor")
_DICTS = ("rope_scaling", "rope_parameters")
_TEXTS = ("rope_type", "type")
_WRITTEN = (*_DICTS, "rope_theta", "original_max_position_embeddings")  # what ``write`` puts into a config


def refuse_wrong_values(config: Mapping[str, Any], where: str) -> None:
    """Check every RoPE key of a config before a number is computed from it.

    Args:
        config: contents of config.json.
        where: name of the file, for the message.

    Raises:
        UserError: a value has another JSON type than its key, or is outside the key's limits.
    """
    _refuse_wrong_keys(config, where, "")
    for name in _DICTS:
        rope = config.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise wrong_value(where, name, rope, "an object")
        by_layer_type = bool(rope) and all(isinstance(part, dict) for part in rope.values())
        parts = {f"{name}.{kind}.": part for kind, part in rope.items()} if by_layer_type else {f"{name}.": rope}
        for prefix, part in parts.items():
            _refuse_wrong_keys(part, where, prefix)
            _refuse_wrong_tables(part, config, where, prefix)


def _refuse_wrong_keys(keys: Mapping[str, Any], where: str, prefix: str) -> None:
    for name in _COUNTS:
        refuse_wrong_count(keys, name, where, prefix)
    for name in _NUMBERS:
        if (value := keys.get(name)) is not None and not _positive(value):
            raise wrong_value(where, f"{prefix}{name}", value, "a positive finite number")
    for name in _SHARES:
        if (value := keys.get(name)) is not None and not (_positive(value) and value <= 1):
            raise wrong_value(where, f"{prefix}{name}", value, "a number above 0 and up to 1")
    if prefix:
        for name in _TEXTS:
            if (value := keys.get(name)) is not None and not isinstance(value, str):
                raise wrong_value(where, f"{prefix}{name}", value, "a text")


def _refuse_wrong_tables(rope: Mapping[str, Any], config: Mapping[str, Any], where: str, prefix: str) -> None:
    for name in _TABLES:
        table = rope.get(name)
        if table is None:
            continue
        if not isinstance(table, list) or not all(_positive(value) for value in table):
            raise wrong_value(where, f"{prefix}{name}", table, "a list of positive finite numbers")
        # Without these keys the rotary dimension is unknown here; transformers then has defaults of its own.
        sized = config.get("head_dim") or (config.get("hidden_size") and config.get("num_attention_heads"))
        if sized and len(table) != (wanted := _rotary_dim(dict(config)) // 2):
            raise UserError(
                f"{where}: {prefix}{name} has {len(table)} numbers, and a rotary dimension of {2 * wanted} needs "
                f"{wanted}; correct "
                f"{prefix}{name} there"
            )


def refuse_wrong_count(
    keys: Mapping[str, Any], name: str, where: str, prefix: str = "", bounds: tuple[int, int] = (1, LARGEST_COUNT)
) -> None:
    """Raises UserError unless ``keys[name]`` is missing, null or a whole number within ``bounds``."""
    value, (least, most) = keys.get(name), bounds
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most):
        raise wrong_value(where, f"{prefix}{name}", value, f"a whole number from {least} to {most}")


def wrong_value(where: str, key: str, value: Any, wanted: str) -> UserError:
    """The error for a value in a file that its key does not allow."""
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    return UserError(f"{where}: {key}={shown} is not {wanted}; correct {key} there")


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def spectrum_of(config: dict[str, Any]) -> Spectrum:
    """The original RoPE of a model of type default or ``longrope``.

    rotary dimension = int(head_dim x partial_rotary_factor), with head_dim = hidden_size // num_attention_heads where
    no key names it; base = rope_theta; original window = original_max_position_embeddings, else
    max_position_embeddings.

    Raises:
        UserError: a key is missing, or the model rescales its frequencies by another rule (linear, yarn, llama3 ...).
    """
    rope = _rope_dict(config)
    kind = _kind(rope)
    if kind not in ("default", "longrope"):
        raise UserError(
            f"the model's RoPE is of type {kind}, which already rescales its frequencies; "
            "set model.path to a model with plain RoPE (type default)"
        )
    base = _first(rope.get("rope_theta"), config.get("rope_theta"), DEFAULT_BASE)
    plain = Spectrum(_rotary_dim(config), float(base), _original_window(config, rope))
    return plain if kind == "default" else replace(plain, attention_factor=_short_attention_factor(config, rope, plain))


def factors_of(config: dict[str, Any]) -> Factors | None:
    """The factors that a ``longrope`` config carries, in any order and without bounds; None for a model with plain
    RoPE.

    A config without an attention factor gets the default of the runtimes, sqrt(1 + ln s / ln L0), for *both* windows. A
    written ``attention_factor`` acts on both windows too, unless there is a ``short_mscale``.

    Raises:
        UserError: a key is missing, or a table has the wrong length. The original window is needed: without it a
            ``longrope`` model never leaves its short table.
    """
    rope = _rope_dict(config)
    if _kind(rope) != "longrope":
        return None
    spectrum = spectrum_of(config)
    return Factors(
        rescale=_need(rope, "long_factor"),
        attention_factor=_first(
            rope.get("attention_factor"), rope.get("long_mscale"), _default_attention_factor(config, rope, spectrum)
        ),
        spectrum=spectrum,
        target_window_tokens=_target_window(config, rope, spectrum),
        method="longrope",
        short_rescale=_need(rope, "short_factor"),
        short_attention_factor=spectrum.attention_factor,
    )


def _short_attention_factor(config: dict[str, Any], rope: dict[str, Any], spectrum: Spectrum) -> float:
    return _first(
        rope.get("short_mscale"), rope.get("attention_factor"), _default_attention_factor(config, rope, spectrum)
    )


def _default_attention_factor(config: dict[str, Any], rope: dict[str, Any], spectrum: Spectrum) -> float:
    scale = rope.get("factor") or _target_window(config, rope, spectrum) / spectrum.window_tokens
    return longrope_attention_factor(scale, spectrum.window_tokens)


def write(config: dict[str, Any], factors: Factors) -> dict[str, Any]:
    """A copy of the config with the factors in it, for transformers, vLLM and SGLang.

    The long window is that of the factors. The short window is the config's own, as in training.

    Raises:
        UserError: the factors were made for another rotary dimension or base than the config's.
    """
    _refuse_other_spectrum(config, factors)
    rope = _longrope_dict(factors, factors_of(config))
    return _with_longrope(config, rope, factors.spectrum.window_tokens, factors)


def write_one_table(config: dict[str, Any], factors: Factors) -> dict[str, Any]:
    """A copy of the config with the long table at every length, for weights that hold the attention factor.

    Both tables are the long one, the original window is the target, and every factor is 1, so that no runtime can
    choose or infer anything else.

    Raises:
        UserError: as ``write``.
    """
    _refuse_other_spectrum(config, factors)
    rescale, target = factors.rescale, factors.target_window_tokens
    rope = _table_dict(factors.spectrum.base, 1.0, target, rescale, rescale, (1.0, 1.0))
    return _with_longrope(config, rope, target, factors)


def write_short_window(config: dict[str, Any], window_tokens: int) -> dict[str, Any]:
    """A copy of a trained model's config for texts of its original window alone: plain RoPE, or the base's own short
    table.

    Args:
        config: plain, or as ``write`` made it.
        window_tokens: L0.
    """
    own = factors_of(config)
    said = {key: value for key, value in copy.deepcopy(config).items() if key not in _WRITTEN}
    said |= {"max_position_embeddings": window_tokens, "original_max_position_embeddings": window_tokens}
    if own is None:
        return said | {key: copy.deepcopy(config[key]) for key in ("rope_theta", *_DICTS) if config.get(key)}
    short, factor, base = own.short_rescale or (), own.short_attention_factor, own.spectrum.base
    partial = {} if (share := _partial(config)) is None else {"partial_rotary_factor": share}
    if factor == 1 and all(value == 1 for value in short):
        rope = {"rope_type": "default", "rope_theta": base, **partial}
        return said | {"rope_theta": base, "rope_parameters": rope}
    rope = _table_dict(base, 1.0, window_tokens, short, short, (factor, factor)) | partial
    return (
        said | {"rope_theta": base} | _head_dim(config) | {"rope_parameters": rope, "rope_scaling": copy.deepcopy(rope)}
    )


def _refuse_other_spectrum(config: dict[str, Any], factors: Factors) -> None:
    own, made_for = spectrum_of(config), factors.spectrum
    if (own.rotary_dim, own.base) != (made_for.rotary_dim, made_for.base):
        raise UserError(
            f"the factors are for rotary dimension {made_for.rotary_dim} and base {made_for.base:g}, "
            f"but the model has {own.rotary_dim} and {own.base:g}; "
            "set rope.factors to factors of this model"
        )


def _with_longrope(
    config: dict[str, Any], rope: dict[str, Any], window_tokens: int, factors: Factors
) -> dict[str, Any]:
    """The config with a ``longrope`` dict under both names, and the switch at ``window_tokens``."""
    if (partial := _partial(config)) is not None:
        rope["partial_rotary_factor"] = partial
    return (
        copy.deepcopy(config)
        | _head_dim(config)
        | {
            "max_position_embeddings": factors.target_window_tokens,
            "original_max_position_embeddings": window_tokens,  # Phi-3 and converters read the outer key
            "rope_theta": factors.spectrum.base,
            "rope_parameters": rope,
            "rope_scaling": copy.deepcopy(rope),
        }
    )


def _longrope_dict(factors: Factors, own: Factors | None) -> dict[str, Any]:
    """The keys of ``longrope``; ``own`` are the factors that the config carries already."""
    short = (own and own.short_rescale) or (1.0,) * factors.spectrum.n_dims
    scales = (own.short_attention_factor if own else 1.0, factors.attention_factor)
    spectrum = factors.spectrum
    return _table_dict(spectrum.base, factors.scale, spectrum.window_tokens, short, factors.rescale, scales)


def _table_dict(
    base: float,
    factor: float,
    window_tokens: int,
    short: Sequence[float],
    long: Sequence[float],
    scales: tuple[float, float],
) -> dict[str, Any]:
    """Every key of ``longrope`` that a runtime reads; ``scales`` are the attention factors (short, long)."""
    return {
        "rope_type": "longrope",
        "type": "longrope",
        "rope_theta": base,
        "factor": factor,
        "original_max_position_embeddings": window_tokens,
        "long_factor": list(long),
        "short_factor": list(short),
        "attention_factor": scales[1],
        "long_mscale": scales[1],
        "short_mscale": scales[0],
    }


def _rope_dict(config: dict[str, Any]) -> dict[str, Any]:
    """``rope_scaling`` where it is filled, else ``rope_parameters``: the preference of transformers 5."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            f"the model has one RoPE per layer type ({', '.join(rope)}); set model.path to a model with one RoPE for "
            "all layers"
        )
    return rope


def _kind(rope: dict[str, Any]) -> str:
    if "long_factor" in rope:  # whatever the type's name: Phi-3 has used su, yarn and longrope for one rule
        return "longrope"
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default" and "mrope_section" in rope:  # Qwen-VL: positions of three axes under the default type
        return "mrope"
    if kind in SCALED_BY_FACTOR and rope.get("factor") == 1 and _first(rope.get("attention_factor"), 1) == 1:
        return "default"
    return "longrope" if kind == "su" else kind


def _rotary_dim(config: dict[str, Any]) -> int:
    head_dim = config.get("head_dim") or int(_need(config, "hidden_size")) // int(_need(config, "num_attention_heads"))
    return int(head_dim * _first(_partial(config), 1.0))


def _head_dim(config: dict[str, Any]) -> dict[str, int]:
    """The head dimension where its key is null (Mixtral), against which transformers checks tables of ``longrope``."""
    if "head_dim" not in config or config["head_dim"] is not None:
        return {}
    return {"head_dim": int(_need(config, "hidden_size")) // int(_need(config, "num_attention_heads"))}


def _original_window(config: dict[str, Any], rope: dict[str, Any]) -> int:
    key = "original_max_position_embeddings"
    window = _first(config.get(key), rope.get(key))  # the config's own wins, as in transformers
    if window is None and _kind(rope) == "longrope":
        raise UserError(
            f"the model's longrope config names no {key}, so no runtime would ever leave its short table; add {key} "
            "to its config.json"
        )
    return int(_need(config, "max_position_embeddings") if window is None else window)


def _target_window(config: dict[str, Any], rope: dict[str, Any], spectrum: Spectrum) -> int:
    # Some configs keep the original window in max_position_embeddings; then the target is factor x original window.
    window = config.get("max_position_embeddings") or 0
    if window > spectrum.window_tokens or not rope.get("factor"):
        return int(_first(window or None, spectrum.window_tokens))
    return round(rope["factor"] * spectrum.window_tokens)


def _partial(config: dict[str, Any]) -> float | None:
    return _first(
        _rope_dict(config).get("partial_rotary_factor"), config.get("partial_rotary_factor"), config.get("rotary_pct")
    )


def _need(keys: dict[str, Any], name: str) -> Any:
    if keys.get(name) is None:
        raise UserError(f"the model's config has no {name}; set model.path to a model whose config.json names it")
    return keys[name]


def _first(*values: Any) -> Any:
    """The first value that is not None, or None."""
    return next((value for value in values if value is not None), None)
