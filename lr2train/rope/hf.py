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
attention factor 1. A base model of type ``longrope`` keeps its ``short_factor`` and its short attention factor. A base
model of another type (``own``) is written with its own factors as ``short_factor``. These numbers give its fp32 table
but for the last bits, so its own RoPE keys are kept beside, under ``base_rope``: from them the short window follows
exactly, and ``write_short_window`` puts them back.

A model with a RoPE for each layer type (Gemma 3, OLMo 3) has the rescaled RoPE in its ``full_attention`` layers. The
``sliding_attention`` layers see no more than their sliding window and stay as they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lr2train.config import UserError
from lr2train.rope import own
from lr2train.rope.factors import Factors, longrope_attention_factor
from lr2train.rope.spectrum import Spectrum

DEFAULT_BASE = 10000.0  # of transformers, for configs that name none
GLOBAL, SLIDING = "full_attention", "sliding_attention"  # layer types
BASE_ROPE = "base_rope"  # key of a written config: the RoPE keys of the base model

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
_ORIGINAL = "original_max_position_embeddings"
_BASE_KEYS = (*_WRITTEN, "max_position_embeddings")  # what ``base_rope`` keeps


def refuse_wrong_values(config: Mapping[str, Any], where: str) -> None:
    """Check every RoPE key of a config before a number is computed from it.

    Args:
        config: contents of config.json.
        where: name of the file, for the message.

    Raises:
        UserError: a value has another JSON type than its key, or is outside the key's limits.
    """
    _refuse_wrong_keys(config, where, "")
    kept = config.get(BASE_ROPE)
    if kept is not None:
        if not isinstance(kept, dict) or not set(kept) <= set(_BASE_KEYS):
            raise wrong_value(where, BASE_ROPE, kept, f"an object of {', '.join(_BASE_KEYS)}")
        refuse_wrong_values(kept, f"{where}: {BASE_ROPE}")
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


def with_current_type(config: dict[str, Any]) -> dict[str, Any]:
    """The config with "longrope" for the early name "su", which transformers 5 refuses; itself where there is none."""
    rope = config.get("rope_scaling")
    if not isinstance(rope, dict) or "su" not in (rope.get("type"), rope.get("rope_type")):
        return config
    return config | {"rope_scaling": {**rope, "type": "longrope", "rope_type": "longrope"}}


def own_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config under which transformers computes the short window: with the base model's RoPE keys, where ``write``
    kept them.
    """
    if (kept := config.get(BASE_ROPE)) is None:
        return config
    return {key: value for key, value in config.items() if key not in (*_BASE_KEYS, BASE_ROPE)} | copy.deepcopy(kept)


def spectrum_of(config: dict[str, Any]) -> Spectrum:
    """The RoPE of a model up to its window L0; of its global layers, where each layer type has a RoPE.

    rotary dimension = int(head_dim x partial_rotary_factor), with head_dim = hidden_size // num_attention_heads where
    no key names it; base = rope_theta; ``own`` has the window of each type. A config of ours holds the window of its
    training.

    Raises:
        UserError: a key is missing, or the model rescales its frequencies by a rule that is not known here.
    """
    rope, kind = _rope_dict(config), _kind(_rope_dict(config))
    if config.get(BASE_ROPE) is not None:
        return replace(spectrum_of(own_config(config)), window_tokens=_original_window(config, rope))
    if kind not in own.TYPES:
        raise UserError(
            f"the model's RoPE is of type {kind}, which is not known here; set model.path to a model of type "
            f"{', '.join(own.TYPES)}"
        )
    base = float(_first(rope.get("rope_theta"), config.get("rope_theta"), DEFAULT_BASE))
    if kind in own.RESCALING:
        original = _first(config.get(_ORIGINAL), rope.get(_ORIGINAL))
        plain = Spectrum(_rotary_dim(config), base, int(_need(config, "max_position_embeddings")))
        return own.own_spectrum(kind, rope, plain, original)
    plain = Spectrum(_rotary_dim(config), base, _original_window(config, rope))
    if kind == "default":
        return plain
    factor = _short_attention_factor(config, rope, plain)
    return replace(plain, attention_factor=factor, own_rescale=_need(rope, "short_factor"))


def refuse_window(config: dict[str, Any], window_tokens: int) -> None:
    """Raises UserError where the model's own RoPE has no fixed table up to ``model.original_window_tokens``."""
    own_window = spectrum_of(config).window_tokens
    if window_tokens > own_window and _kind(_rope_dict(own_config(config))) == "dynamic":
        raise UserError(
            f"model.original_window_tokens={window_tokens} is beyond the {own_window} tokens up to which the model's "
            "RoPE of type dynamic is one table; "
            f"set model.original_window_tokens to {own_window} or less"
        )


def is_rescaled(config: dict[str, Any]) -> bool:
    """Whether the short window is neither plain RoPE nor the short table of a ``longrope`` config."""
    return _kind(_rope_dict(own_config(config))) in own.RESCALING


def by_layer_type(config: Mapping[str, Any]) -> bool:
    """Whether each layer type has a RoPE of its own."""
    return _is_nested(_rope_value(config))


def factors_of(config: dict[str, Any]) -> Factors | None:
    """The factors that a ``longrope`` config carries, in any order and without bounds; None for any other type.

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
    own_window, window = spectrum_of(config), factors.spectrum.window_tokens
    scales = (own_window.attention_factor, factors.attention_factor)
    short = own_window.own_factors.tolist()
    rope = _table_dict(own_window.base, factors.scale, window, short, factors.rescale, scales)
    kept = {} if (base := _base_rope(config)) is None else {BASE_ROPE: base}
    return _with_longrope(config, rope, window, factors) | kept


def write_exact_short_table(config: dict[str, Any], inv_freq: Sequence[float]) -> None:
    """Put the short window's frequencies into a config that ``write`` made, for the modelling file of an export.

    1 / (short_factor x b^(2i/d)) in fp32, which transformers computes, may miss a base's own table by its last bits.

    Args:
        inv_freq: D numbers, radians per token, as the model computes with them.
    """
    for name in _DICTS:
        if rope := config.get(name):
            rope.get(GLOBAL, rope)["short_inv_freq"] = list(inv_freq)


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
    """A copy of a trained model's config for texts of its original window alone: the base's own RoPE.

    Args:
        config: the base's, or as ``write`` made it.
        window_tokens: L0.
    """
    if is_rescaled(config):
        return _with_own_rope(own_config(config), window_tokens)
    carried = factors_of(config)
    said = {key: value for key, value in copy.deepcopy(config).items() if key not in _WRITTEN}
    said |= {"max_position_embeddings": window_tokens, "original_max_position_embeddings": window_tokens}
    if carried is None:
        return said | {key: copy.deepcopy(config[key]) for key in ("rope_theta", *_DICTS) if config.get(key)}
    short, factor, base = carried.spectrum.own_factors.tolist(), carried.short_attention_factor, carried.spectrum.base
    partial = {} if (share := _partial(config)) is None else {"partial_rotary_factor": share}
    if factor == 1 and all(value == 1 for value in short):
        rope = {"rope_type": "default", "rope_theta": base, **partial}
        return said | _flat_or_nested(config, rope, {"rope_theta": base, "rope_parameters": rope})
    rope = _table_dict(base, 1.0, window_tokens, short, short, (factor, factor)) | partial
    both = {"rope_theta": base, "rope_parameters": rope, "rope_scaling": copy.deepcopy(rope)}
    return said | _head_dim(config) | _flat_or_nested(config, rope, both)


def _with_own_rope(config: dict[str, Any], window_tokens: int) -> dict[str, Any]:
    """The base's config with its RoPE dict under both names, as transformers 4 and 5 read it."""
    said = copy.deepcopy(config) | {"max_position_embeddings": window_tokens}
    if by_layer_type(config):
        return said
    rope = _rope_dict(config)
    base = float(_first(rope.get("rope_theta"), config.get("rope_theta"), DEFAULT_BASE))
    both = {"rope_theta": base, "rope_parameters": {**rope, "rope_theta": base}}
    return said | copy.deepcopy(both | {"rope_scaling": both["rope_parameters"]})


def _base_rope(config: dict[str, Any]) -> dict[str, Any] | None:
    """The RoPE keys from which the short window follows; None where ``short_factor`` says all."""
    if config.get(BASE_ROPE) is not None:
        return copy.deepcopy(config[BASE_ROPE])
    if not is_rescaled(config):
        return None
    return {key: copy.deepcopy(config[key]) for key in _BASE_KEYS if config.get(key) is not None}


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
    windows = {
        "max_position_embeddings": factors.target_window_tokens,
        "original_max_position_embeddings": window_tokens,  # Phi-3 and converters read the outer key
    }
    both = {"rope_theta": factors.spectrum.base, "rope_parameters": rope, "rope_scaling": copy.deepcopy(rope)}
    said = {key: value for key, value in copy.deepcopy(config).items() if key not in (BASE_ROPE, "rope_scaling")}
    return said | _head_dim(config) | windows | _flat_or_nested(config, rope, both)


def _flat_or_nested(config: dict[str, Any], rope: dict[str, Any], flat: dict[str, Any]) -> dict[str, Any]:
    """``flat``; where each layer type has a RoPE, ``rope`` in the place of the global layers' one."""
    if not by_layer_type(config):
        return flat
    return {"rope_parameters": {**copy.deepcopy(_rope_value(config)), GLOBAL: rope}}


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


def _rope_value(config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_scaling`` where it is filled, else ``rope_parameters``: the preference of transformers 5."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _is_nested(rope: dict[str, Any]) -> bool:
    return any(isinstance(value, dict) for value in rope.values())


def _rope_dict(config: dict[str, Any]) -> dict[str, Any]:
    """The RoPE dict of the model; of its global layers, where each layer type has one."""
    rope = _rope_value(config)
    if not _is_nested(rope):
        return rope
    if others := [name for name in rope if name not in (GLOBAL, SLIDING)] or [GLOBAL] * (not rope.get(GLOBAL)):
        raise UserError(
            f"the model has one RoPE per layer type ({', '.join(rope)}), and {others[0]} is not understood; set "
            f"model.path to a model whose layer types are {GLOBAL} and {SLIDING}"
        )
    return rope[GLOBAL]


def _kind(rope: dict[str, Any]) -> str:
    if "long_factor" in rope:  # whatever the type's name: Phi-3 has used su, yarn and longrope for one rule
        return "longrope"
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default" and "mrope_section" in rope:  # Qwen-VL: positions of three axes under the default type
        return "mrope"
    if kind in own.RESCALING and rope.get("factor") == 1 and _first(rope.get("attention_factor"), 1) == 1:
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
    key = _ORIGINAL
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
