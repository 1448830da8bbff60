"""Factors <-> the rope keys of a Hugging Face config: the only file that knows those names and their versions.

Configs are plain dicts (config.json, or `config.to_dict()`). Since version 5 transformers keeps everything in `rope_parameters`; before,
`rope_theta`, `partial_rotary_factor` and `rope_scaling` stood apart, with "type" for "rope_type" and "su" (Phi-3, at times "yarn") for
"longrope".

Choice: `write` gives one dict under both names, with every number written out, so that no runtime has anything to infer:

- transformers reads `attention_factor`, and applies that ONE number to both windows. Below the original window its model is therefore the
  trained one only if the factor is 1; the config format has no way to say otherwise to it.
- vLLM and SGLang do not read `attention_factor` but `short_mscale` and `long_mscale`, and fall back to sqrt(1 + ln s / ln L0) for both
  windows without them. So we write them: 1 and the long factor. Cost: transformers logs one "Unrecognized keys" warning when it loads the
  config, and ignores them.
- llama.cpp's converter computes sqrt(1 + ln s / ln L0) itself, whatever is written.
- Phi-3 in transformers before version 5 accepts exactly three keys in `rope_scaling` and refuses ours: better than a temperature that it
  would invent.
"""

from __future__ import annotations

import copy
from typing import Any

from lr2train.config import UserError
from lr2train.rope.factors import Factors, longrope_attention_factor
from lr2train.rope.spectrum import Spectrum

DEFAULT_BASE = 10000.0  # transformers' own, for configs that name none


def spectrum_of(config: dict[str, Any]) -> Spectrum:
    """The original RoPE of a model: plain RoPE, or `longrope` of which it is the original.

    rotary dimension = int(head_dim x partial_rotary_factor), head_dim = hidden_size // num_attention_heads when not named;
    base = rope_theta; window = original_max_position_embeddings, else max_position_embeddings.

    Raises:
        UserError: a key is missing, or the model already rescales its frequencies by another rule (linear, yarn, llama3 ...).
    """
    rope = _rope_dict(config)
    kind = _kind(rope)
    if kind not in ("default", "longrope"):
        raise UserError(
            f"the model's RoPE is of type {kind}, which already rescales its frequencies; "
            "set model.path to a model with plain RoPE (type default)"
        )
    head_dim = config.get("head_dim") or int(_need(config, "hidden_size")) // int(_need(config, "num_attention_heads"))
    base = _first(rope.get("rope_theta"), config.get("rope_theta"), DEFAULT_BASE)
    return Spectrum(int(head_dim * _first(_partial(config), 1.0)), float(base), _original_window(config, rope))


def factors_of(config: dict[str, Any]) -> Factors | None:
    """The long factors that a config carries; None for a model with plain RoPE. Read as they are, whatever their order and bounds.

    Where no attention factor is written, the one that runtimes then use is recorded: sqrt(1 + ln s / ln L0), for *both* windows. One that
    is written acts on both windows too, unless short_mscale says otherwise.

    Raises:
        UserError: a key is missing (without an original window a `longrope` model never leaves its short table), or a table
            has the wrong length.
    """
    rope = _rope_dict(config)
    if _kind(rope) != "longrope":
        return None
    spectrum = spectrum_of(config)
    target = _target_window(config, rope, spectrum)
    default = longrope_attention_factor(rope.get("factor") or target / spectrum.window_tokens, spectrum.window_tokens)
    written = rope.get("attention_factor")
    return Factors(
        rescale=_need(rope, "long_factor"),
        attention_factor=_first(written, rope.get("long_mscale"), default),
        spectrum=spectrum,
        target_window_tokens=target,
        method="longrope",
        short_rescale=_need(rope, "short_factor"),
        short_attention_factor=_first(rope.get("short_mscale"), written, default),
    )


def write(config: dict[str, Any], factors: Factors) -> dict[str, Any]:
    """A copy of the config with the factors in it, for transformers, vLLM, SGLang (the module's text says what each of them reads).

    Raises:
        UserError: the factors were made for another rotary dimension or base than the config's, or keep the original RoPE for first tokens,
            which no runtime's config can say.
    """
    if factors.original_tokens:
        raise UserError(
            f"the factors keep the original RoPE for the first {factors.original_tokens} tokens (rope.options.original_tokens), which no key of "
            "a Hugging Face config can say, so no runtime would compute what was measured; set rope.options.original_tokens=0"
        )
    own, made_for = spectrum_of(config), factors.spectrum
    if (own.rotary_dim, own.base) != (made_for.rotary_dim, made_for.base):
        raise UserError(
            f"the factors are for rotary dimension {made_for.rotary_dim} and base {made_for.base:g}, "
            f"but the model has {own.rotary_dim} and {own.base:g}; "
            "set rope.factors to factors of this model"
        )
    rope = _longrope_dict(factors)
    if (partial := _partial(config)) is not None:
        rope["partial_rotary_factor"] = partial
    return copy.deepcopy(config) | {
        "max_position_embeddings": factors.target_window_tokens,
        "original_max_position_embeddings": made_for.window_tokens,  # Phi-3 and converters look here
        "rope_theta": made_for.base,
        "rope_parameters": rope,
        "rope_scaling": copy.deepcopy(rope),
    }


def _longrope_dict(factors: Factors) -> dict[str, Any]:
    short = factors.short_rescale or (1.0,) * factors.spectrum.n_dims
    return {
        "rope_type": "longrope",
        "type": "longrope",
        "rope_theta": factors.spectrum.base,
        "factor": factors.scale,
        "original_max_position_embeddings": factors.spectrum.window_tokens,
        "long_factor": list(factors.rescale),
        "short_factor": list(short),
        "attention_factor": factors.attention_factor,
        "long_mscale": factors.attention_factor,
        "short_mscale": factors.short_attention_factor,
    }


def _rope_dict(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_scaling` where it is filled, else `rope_parameters`: transformers 5 has the same preference."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"the model has a RoPE per layer type ({', '.join(rope)}); set model.path to a model with one RoPE for all layers")
    return rope


def _kind(rope: dict[str, Any]) -> str:
    if "long_factor" in rope:  # whatever the type is called: Phi-3 has used su, yarn and longrope for the same thing
        return "longrope"
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default" and "mrope_section" in rope:
        return "mrope"
    return "longrope" if kind == "su" else kind


def _original_window(config: dict[str, Any], rope: dict[str, Any]) -> int:
    key = "original_max_position_embeddings"
    window = _first(config.get(key), rope.get(key))  # the config's own wins, as in transformers
    if window is None and _kind(rope) == "longrope":
        raise UserError(
            f"the model's longrope config names no {key}, so no runtime would ever leave its short table; add {key} to its config.json"
        )
    return int(_need(config, "max_position_embeddings") if window is None else window)


def _target_window(config: dict[str, Any], rope: dict[str, Any], spectrum: Spectrum) -> int:
    window = config.get("max_position_embeddings") or 0
    if window > spectrum.window_tokens or not rope.get("factor"):
        return int(_first(window or None, spectrum.window_tokens))
    return round(rope["factor"] * spectrum.window_tokens)


def _partial(config: dict[str, Any]) -> float | None:
    return _first(_rope_dict(config).get("partial_rotary_factor"), config.get("partial_rotary_factor"), config.get("rotary_pct"))


def _need(keys: dict[str, Any], name: str) -> Any:
    if keys.get(name) is None:
        raise UserError(f"the model's config has no {name}; set model.path to a model whose config.json names it")
    return keys[name]


def _first(*values: Any) -> Any:
    """The first value that is not None, or None."""
    return next((value for value in values if value is not None), None)
