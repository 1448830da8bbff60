"""The table that a model's config names for its own window: rescale factors, attention factor, window.

The formulas are those of transformers, in float64. They serve the search (bounds, critical index) and written configs.
A model itself never computes with them: its short window is transformers' own table, bit for bit (``model.rotary``).

Choice: one function for each type that transformers names, and one fact each: which window the table serves. Published
configs do not agree on this window for `linear`; the rule here is the one that never claims too much.

- ``default``, ``dynamic``: plain RoPE up to max_position_embeddings. Beyond, ``dynamic`` depends on the length of the
  text, which a fixed table cannot.
- ``linear``: max_position_embeddings (Gemma 3, deepseek-coder); factor x original_max_position_embeddings where that is
  named. Vicuna and LongChat mean factor x max_position_embeddings: there, set model.original_window_tokens.
- ``llama3``: max_position_embeddings, which exceeds factor x the window that the rule was made for (Llama 3.1: 131072).
- ``yarn``: factor x original_max_position_embeddings (Qwen2.5 keeps max_position_embeddings at the smaller window).
- ``longrope``: original_max_position_embeddings, up to which its short table serves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lr2train.config import UserError
from lr2train.rope.curves import frequency_linear, llama3_ramp, yarn_ramp
from lr2train.rope.spectrum import Spectrum

RESCALING = ("linear", "dynamic", "yarn", "llama3")  # by a factor: a factor of 1 changes no frequency
TYPES = ("default", "longrope", *RESCALING)
_ORIGINAL = "original_max_position_embeddings"


def own_spectrum(kind: str, rope: Mapping[str, Any], plain: Spectrum, original: int | None) -> Spectrum:
    """The spectrum of a model of a type of ``RESCALING``.

    Args:
        kind: the type.
        rope: the RoPE dict of the config.
        plain: rotary dimension, base, and max_position_embeddings as the window.
        original: original_max_position_embeddings, where the config names it.

    Raises:
        UserError: a key that the type needs is missing.
    """
    if kind == "dynamic":
        if rope.get("alpha") is not None:
            raise UserError(
                "the model's RoPE is of type dynamic with alpha, which is another rule than transformers' dynamic; set "
                "model.path to a model of another type"
            )
        return plain
    if kind == "linear":
        factor = _number(rope, "factor", kind)
        window = plain.window_tokens if original is None else round(factor * original)
        return replace(plain, window_tokens=window, own_rescale=(factor,) * plain.n_dims)
    if kind == "llama3":
        return _llama3(rope, plain, plain.window_tokens if original is None else original)
    return _yarn(rope, plain, plain.window_tokens if original is None else original)


def _llama3(rope: Mapping[str, Any], plain: Spectrum, original: int) -> Spectrum:
    low, high = (_number(rope, name, "llama3") for name in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise UserError(
            f"the model's RoPE of type llama3 has low_freq_factor={low:g}, which is not below high_freq_factor="
            f"{high:g}; correct both in its config.json"
        )
    ramp = llama3_ramp(replace(plain, window_tokens=original), low, high)
    return replace(plain, own_rescale=tuple(frequency_linear(ramp, _number(rope, "factor", "llama3"))))


def _yarn(rope: Mapping[str, Any], plain: Spectrum, original: int) -> Spectrum:
    factor = float(rope["factor"]) if rope.get("factor") else plain.window_tokens / original
    betas = float(rope.get("beta_fast") or 32.0), float(rope.get("beta_slow") or 1.0)
    ramp = yarn_ramp(replace(plain, window_tokens=original), *betas, whole=rope.get("truncate") is not False)
    attention_factor = rope.get("attention_factor")
    return replace(
        plain,
        window_tokens=round(factor * original),
        own_rescale=tuple(frequency_linear(ramp, factor)),
        attention_factor=_yarn_attention(rope, factor) if attention_factor is None else float(attention_factor),
    )


def _yarn_attention(rope: Mapping[str, Any], factor: float) -> float:
    """0.1 ln s + 1; with mscale and mscale_all_dim (DeepSeek) the quotient of both rules."""

    def rule(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    return rule(above) / rule(below) if above and below else rule(1.0)


def _number(rope: Mapping[str, Any], name: str, kind: str) -> float:
    if rope.get(name) is None:
        raise UserError(f"the model's RoPE of type {kind} names no {name}; add {name} to its config.json")
    return float(rope[name])
