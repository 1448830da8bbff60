"""Every rule that turns (original spectrum, target window) into rescale factors, and the one door from a RopeConfig to Factors.

Choice: a method is a plain function whose keyword-only parameters are its options; `build` reads the signature, so an option cannot be
named here and forgotten there. Everything is float64. A parameter that only a search can find (critical index, tail) has no default: an
invented one would train for days before anybody noticed. Cost: the searched methods do not run without their numbers.

What a rule says in terms of bases is written as factors: a base b' instead of b is lambda_i = (b'/b)^(2i/d).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lr2train.config import RopeConfig, UserError
from lr2train.rope import hf
from lr2train.rope.factors import Factors, extension_ratio, longrope_attention_factor, read_factors_json
from lr2train.rope.spectrum import Spectrum


def none(spectrum: Spectrum, target_tokens: int) -> Factors:
    """lambda_i = 1: the original RoPE, extrapolated."""
    return _made("none", spectrum, target_tokens, np.ones(spectrum.n_dims))


def pi(spectrum: Spectrum, target_tokens: int) -> Factors:
    """lambda_i = s: positional interpolation (Chen et al. 2023); `linear` in transformers."""
    scale = extension_ratio(spectrum, target_tokens)
    return _made("pi", spectrum, target_tokens, np.full(spectrum.n_dims, scale))


def ntk_aware(spectrum: Spectrum, target_tokens: int) -> Factors:
    """lambda_i = s^(2i/(d-2)), base b s^(d/(d-2)): the community's rule; 1 at the first index, exactly s at the last."""
    scale = extension_ratio(spectrum, target_tokens)
    exponent = np.arange(spectrum.n_dims) / (spectrum.n_dims - 1)
    return _made("ntk_aware", spectrum, target_tokens, scale**exponent)


def ntk(spectrum: Spectrum, target_tokens: int) -> Factors:
    """lambda_i = (b'/b)^(2i/d), b' = b^(ln(L/2pi) / ln(L0/2pi)): Liu et al. 2023, the "NTK" of the paper (section 2.3).

    Equals s at the real-valued critical index and exceeds it above.
    """
    extension_ratio(spectrum, target_tokens)
    growth = math.log(target_tokens / (2 * math.pi)) / math.log(spectrum.window_tokens / (2 * math.pi))
    return _made("ntk", spectrum, target_tokens, _base_change(spectrum, spectrum.base ** (growth - 1.0)))


def dynamic_ntk(spectrum: Spectrum, target_tokens: int, *, length_tokens: int | None = None) -> Factors:
    """Base b ((s l / L0) - (s - 1))^(d/(d-2)), l = max(length, L0): NTK by the current length; `dynamic` in transformers.

    Args:
        length_tokens: the current length; the target window when None, since a fixed table has to serve all of it.
    """
    scale = extension_ratio(spectrum, target_tokens)
    length = max(target_tokens if length_tokens is None else length_tokens, spectrum.window_tokens)
    stretch = scale * length / spectrum.window_tokens - (scale - 1.0)
    exponent = np.arange(spectrum.n_dims) / (spectrum.n_dims - 1)  # (2i/d) * (d/(d-2))
    return _made("dynamic_ntk", spectrum, target_tokens, stretch**exponent)


def yarn(spectrum: Spectrum, target_tokens: int, *, beta_fast: float = 32.0, beta_slow: float = 1.0) -> Factors:
    """lambda_i = 1 / ((1 - ramp_i) + ramp_i / s), attention factor 0.1 ln s + 1 (Peng et al. 2023): frequencies are blended linearly.

    Args:
        beta_fast: periods inside L0 above which an index is kept.
        beta_slow: periods inside L0 below which it is interpolated by s.
    """
    return _yarn(spectrum, target_tokens, yarn_ramp(spectrum, beta_fast, beta_slow), "yarn")


def yarn_rcd(spectrum: Spectrum, target_tokens: int, *, critical_index: int, beta_fast: float = 32.0) -> Factors:
    """YaRN with the found critical index at the upper end of its ramp, where tcd stands otherwise (paper, section 4.3 and Figure 9)."""
    high = _checked_index(spectrum, critical_index)
    low = min(max(math.floor(spectrum.index_of(beta_fast)), 0), high - 1)  # below `high`, so that s is reached there
    return _yarn(spectrum, target_tokens, _ramp(spectrum, low, high), "yarn_rcd")


def ntk_rcd(spectrum: Spectrum, target_tokens: int, *, critical_index: int) -> Factors:
    """lambda_i = s^(i / rcd): NTK that reaches s at the found critical index (paper, section 4.3 and Figure 9)."""
    scale = extension_ratio(spectrum, target_tokens)
    exponent = np.arange(spectrum.n_dims) / _checked_index(spectrum, critical_index)
    return _made("ntk_rcd", spectrum, target_tokens, scale**exponent)


def llama3(
    spectrum: Spectrum, target_tokens: int, *, low_freq_factor: float = 1.0, high_freq_factor: float = 4.0, factor: float | None = None
) -> Factors:
    """Meta's rule for LLaMA 3.1: keep periods below L0 / high, divide the frequencies of periods above L0 / low, blend linearly between.

    Args:
        low_freq_factor: periods inside L0 below which a frequency is divided.
        high_freq_factor: periods inside L0 above which it is kept.
        factor: what frequencies are divided by; s when None.
    """
    if not 0.0 <= low_freq_factor < high_freq_factor:
        raise UserError(
            f"rope.options.low_freq_factor={low_freq_factor} is not below rope.options.high_freq_factor={high_freq_factor}; "
            "set it below (Meta uses 1 and 4)"
        )
    factor = extension_ratio(spectrum, target_tokens) if factor is None else factor
    n_periods = spectrum.window_tokens / spectrum.period_tokens
    kept = np.clip((n_periods - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return _made("llama3", spectrum, target_tokens, frequency_linear(1.0 - kept, factor))


def longrope(
    spectrum: Spectrum,
    target_tokens: int,
    *,
    rescale: Sequence[float] | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Factors:
    """LongRoPE (v1, Ding et al. 2024, arXiv 2402.13753), attention factor sqrt(1 + ln s / ln L0).

    Args:
        rescale: the D factors, searched in [1, 1.25 s] in steps of 0.01, non-decreasing. None gives the curve that its search starts from,
            (1 - ramp_i) + s ramp_i over YaRN's ramp: the *factors* are blended linearly, which is not YaRN's own curve.
        beta_fast, beta_slow: ends of that ramp.
    """
    scale = extension_ratio(spectrum, target_tokens)
    table = lambda_linear(yarn_ramp(spectrum, beta_fast, beta_slow), scale) if rescale is None else rescale
    return _made("longrope", spectrum, target_tokens, table, longrope_attention_factor(scale, spectrum.window_tokens))


def longrope2(
    spectrum: Spectrum, target_tokens: int, *, critical_index: int, tail: Sequence[float] | float, attention_factor: float | None = None
) -> Factors:
    """lambda_i = tail[i - rcd] for i >= rcd, lambda_rcd^(i / rcd) below (paper, section 3.2, Algorithms 1 and 2).

    The left side is NTK with the base b lambda_rcd^(d / (2 rcd)), which meets the tail at the critical index.

    Args:
        critical_index: rcd, zero-based cosine index, 1 ... D-1.
        tail: the D - rcd searched factors; one number stands for a constant tail. Any order: bounds belong to the search.
        attention_factor: None is 1. The paper states none; runtimes that find none use LongRoPE's on both windows, and a search can do
            better than either.
    """
    left = _checked_index(spectrum, critical_index)
    right = _full_tail(spectrum, left, tail)
    table = np.concatenate([right[0] ** (np.arange(left) / left), right])
    return _made("longrope2", spectrum, target_tokens, table, 1.0 if attention_factor is None else attention_factor)


METHODS: dict[str, Callable[..., Factors]] = {
    method.__name__: method for method in (none, pi, ntk_aware, ntk, dynamic_ntk, yarn, llama3, longrope, longrope2, yarn_rcd, ntk_rcd)
}


def yarn_ramp(spectrum: Spectrum, beta_fast: float = 32.0, beta_slow: float = 1.0) -> np.ndarray:
    """clip((i - low) / (high - low), 0, 1), float64 [D], with (low, high) of `yarn_range`: 0 is kept, 1 is interpolated by s."""
    if not 0.0 < beta_slow < beta_fast:
        raise UserError(
            f"rope.options.beta_slow={beta_slow} is not below rope.options.beta_fast={beta_fast}; set it below (YaRN uses 1 and 32)"
        )
    return _ramp(spectrum, *yarn_range(spectrum, beta_fast, beta_slow))


def yarn_range(spectrum: Spectrum, beta_fast: float = 32.0, beta_slow: float = 1.0) -> tuple[int, int]:
    """(low, high) = max(floor(dim(beta_fast)), 0), min(ceil(dim(beta_slow)), d - 1); dim(r) has r periods inside L0.

    The bound is d - 1 and not D - 1, as in YaRN's own code.
    """
    low = max(math.floor(spectrum.index_of(beta_fast)), 0)
    return low, min(math.ceil(spectrum.index_of(beta_slow)), spectrum.rotary_dim - 1)


def frequency_linear(ramp: np.ndarray, scale: float) -> np.ndarray:
    """1 / ((1 - ramp) + ramp / s): factors whose frequencies lie linearly between theta and theta / s (YaRN, llama3)."""
    return 1.0 / ((1.0 - ramp) + ramp / scale)


def lambda_linear(ramp: np.ndarray, scale: float) -> np.ndarray:
    """(1 - ramp) + s ramp: factors that lie linearly between 1 and s (LongRoPE's starting population)."""
    return (1.0 - ramp) + scale * ramp


def _made(name: str, spectrum: Spectrum, target_tokens: int, rescale: Iterable[float], attention_factor: float = 1.0) -> Factors:
    return Factors(tuple(float(x) for x in rescale), attention_factor, spectrum, target_tokens, name)


def _yarn(spectrum: Spectrum, target_tokens: int, ramp: np.ndarray, name: str) -> Factors:
    scale = extension_ratio(spectrum, target_tokens)
    return _made(name, spectrum, target_tokens, frequency_linear(ramp, scale), 0.1 * math.log(scale) + 1.0)


def _ramp(spectrum: Spectrum, low: int, high: int) -> np.ndarray:
    width = high - low or 0.001  # as in YaRN's own code: an empty ramp becomes a step just above `low`
    return np.clip((np.arange(spectrum.n_dims) - low) / width, 0.0, 1.0)


def _base_change(spectrum: Spectrum, ratio: float) -> np.ndarray:
    """(b'/b)^(2i/d) for ratio = b'/b."""
    return ratio ** (2.0 * np.arange(spectrum.n_dims) / spectrum.rotary_dim)


def _checked_index(spectrum: Spectrum, critical_index: int) -> int:
    if not 1 <= critical_index < spectrum.n_dims:
        raise UserError(
            f"rope.critical_index={critical_index} is not between 1 and {spectrum.n_dims - 1}; a search looks for it "
            f"between {spectrum.lowest_critical_index} and {spectrum.critical_index} for this model"
        )
    return critical_index


def _full_tail(spectrum: Spectrum, critical_index: int, tail: Sequence[float] | float) -> np.ndarray:
    numbers = np.atleast_1d(np.asarray(tail, dtype=np.float64))
    needed = spectrum.n_dims - critical_index
    if len(numbers) not in (1, needed):
        raise UserError(
            f"rope.tail has {len(numbers)} numbers, but rope.critical_index={critical_index} "
            f"of {spectrum.n_dims} cosine dimensions needs {needed}; "
            f"give {needed}, or one for a constant tail"
        )
    if not 0.0 < numbers[0] < math.inf:
        raise UserError(f"rope.tail[0]={numbers[0]} is not a positive finite number; set it to at least the extension ratio")
    return np.broadcast_to(numbers, needed) if len(numbers) == 1 else numbers


def build(rope: RopeConfig, spectrum: Spectrum) -> Factors:
    """The factors that a config asks for: those of `rope.factors` when set, else those of `rope.method`.

    `rope.attention_factor`, when set, replaces theirs in both cases. A method that leaves attention as it is (factor 1) keeps the factor that
    the model has in its own window.

    Args:
        rope: target window, and a factors file or a method with its parameters.
        spectrum: of the model that will use them.

    Raises:
        UserError: naming the key to mend; a file that is missing or was made for another model or target, an unknown method, a parameter
            that is missing, unknown to the method or of the wrong size.
    """
    factors = _from_file(rope, spectrum) if rope.factors else _from_method(rope, spectrum)
    return factors if rope.attention_factor is None else replace(factors, attention_factor=rope.attention_factor)


def _from_file(rope: RopeConfig, spectrum: Spectrum) -> Factors:
    assert rope.factors
    path = Path(rope.factors)
    if path.is_dir():  # a search's run folder, or a model folder
        path = path / "factors.json" if (path / "factors.json").exists() else path / "config.json"
    data = read_factors_json(path)
    if "rescale" not in data:
        hf.refuse_wrong_values(data, f"rope.factors: {path}")
    factors = Factors.from_json(data) if "rescale" in data else hf.factors_of(data)
    if factors is None:
        raise UserError(
            f"rope.factors: {path} carries no longrope factors; set rope.factors to a factors.json or to a model folder that has them"
        )
    _refuse_strangers(factors, rope, spectrum, path)
    return factors


def _refuse_strangers(factors: Factors, rope: RopeConfig, spectrum: Spectrum, path: Path) -> None:
    if factors.spectrum != spectrum:
        raise UserError(
            f"rope.factors: {path} was made for a model with {_described(factors.spectrum)}, but this model has {_described(spectrum)}; "
            "set rope.factors to factors of this model, or correct model.original_window_tokens"
        )
    if factors.target_window_tokens != rope.target_window_tokens:
        raise UserError(
            f"rope.factors: {path} was made for a target of {factors.target_window_tokens} tokens, "
            f"but rope.target_window_tokens={rope.target_window_tokens}; "
            f"set rope.target_window_tokens={factors.target_window_tokens} or search again"
        )


def _described(spectrum: Spectrum) -> str:
    return f"rotary dimension {spectrum.rotary_dim}, base {spectrum.base:g}, original window {spectrum.window_tokens}"


def _from_method(rope: RopeConfig, spectrum: Spectrum) -> Factors:
    method = METHODS.get(rope.method)
    if method is None:
        raise UserError(f"rope.method={rope.method} is not one of {', '.join(METHODS)}; set rope.method to one of them")
    arguments = _arguments(rope, method)
    try:
        made = method(spectrum, rope.target_window_tokens, **arguments)
        return replace(made, attention_factor=spectrum.attention_factor) if made.attention_factor == 1.0 else made
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:  # options are untyped in YAML
        raise UserError(f"rope.options={rope.options} do not fit rope.method={rope.method} ({error}); give numbers") from error


def _arguments(rope: RopeConfig, method: Callable[..., Factors]) -> dict[str, Any]:
    """The keyword arguments of a method, refused where it does not take one that was given or lacks one that it needs."""
    given = dict(rope.options)
    if rope.critical_index is not None:
        given["critical_index"] = rope.critical_index
    if rope.tail:
        given["tail"] = rope.tail
    options = {p.name: p for p in inspect.signature(method).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for name in [n for n in given if n not in options]:
        raise UserError(
            f"{_key(name)} is set, but rope.method={rope.method} takes {', '.join(map(_key, options)) or 'no options'}; unset {_key(name)}"
        )
    for name in [n for n, p in options.items() if p.default is p.empty and n not in given]:
        raise UserError(
            f"rope.method={rope.method} needs {_key(name)}, which a search finds; set rope.factors to its factors.json, or {_key(name)}"
        )
    return given


def _key(name: str) -> str:
    return f"rope.{name}" if name in ("critical_index", "tail", "attention_factor") else f"rope.options.{name}"
