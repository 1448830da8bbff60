"""The methods: rules that turn (original spectrum, target window) into rescale factors; ``build`` makes Factors from a
RopeConfig.

Choice: a method is a plain float64 function, and its keyword-only parameters are its options. ``build`` reads the
signature, so an option cannot be declared here and forgotten there. A method of a user's own package is named
``package.module.function`` in ``rope.method``. Parameters that only a search can find (critical
index, tail) have no default: a wrong default would go unnoticed through days of training. Cost: the searched methods do
not run without these parameters.

A rule that is published as another base b' is written as factors: lambda_i = (b'/b)^(2i/d). Symbols are those of
``spectrum``; s = L / L0 is the extension ratio, L the target window.

A method acts on top of the model's own table, where the spectrum has one: "theta_i", "period" and "critical index" in a
formula are then those of the own table, and the result holds own factor x lambda_i. ``Spectrum.unscaled`` is the
spectrum for factors of the unscaled frequencies. ``build`` chooses (``rope.start_from``).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lr2train.config import Head, RopeConfig, UserError
from lr2train.config.plugins import is_plugin, plugin
from lr2train.rope import hf
from lr2train.rope.curves import frequency_linear, lambda_linear, llama3_ramp, ramp_to, yarn_ramp
from lr2train.rope.factors import Factors, extension_ratio, longrope_attention_factor, read_factors_json
from lr2train.rope.spectrum import Spectrum, checked_table


def none(spectrum: Spectrum, target_tokens: int) -> Factors:
    """lambda_i = 1: the original RoPE beyond its window."""
    return made("none", spectrum, target_tokens, np.ones(spectrum.n_dims))


def pi(spectrum: Spectrum, target_tokens: int) -> Factors:
    """lambda_i = s: positional interpolation (Chen et al. 2023, arXiv 2306.15595); `linear` in transformers."""
    scale = extension_ratio(spectrum, target_tokens)
    return made("pi", spectrum, target_tokens, np.full(spectrum.n_dims, scale))


def ntk_aware(spectrum: Spectrum, target_tokens: int) -> Factors:
    """lambda_i = s^(2i/(d-2)), base b s^(d/(d-2)): the "NTK-aware" rule of bloc97 (2023); 1 at i = 0, exactly s at i =
    D-1.
    """
    scale = extension_ratio(spectrum, target_tokens)
    exponent = np.arange(spectrum.n_dims) / (spectrum.n_dims - 1)  # 2i/(d-2)
    return made("ntk_aware", spectrum, target_tokens, scale**exponent)


def ntk(spectrum: Spectrum, target_tokens: int) -> Factors:
    """lambda_i = (b'/b)^(2i/d), b' = b^(ln(L/2pi) / ln(L0/2pi)): the paper's "NTK" (Section 2.3; Liu et al. 2023, arXiv
    2310.05209).

    lambda is s at the real-valued critical index, and larger at every higher index.
    """
    scale = extension_ratio(spectrum, target_tokens)
    if spectrum.own_rescale is not None:  # the same curve, told by its critical index
        exponent = np.arange(spectrum.n_dims) / spectrum.critical_index_real
        return made("ntk", spectrum, target_tokens, scale**exponent)
    growth = math.log(target_tokens / (2 * math.pi)) / math.log(spectrum.window_tokens / (2 * math.pi))
    return made("ntk", spectrum, target_tokens, _base_change(spectrum, spectrum.base ** (growth - 1.0)))


def dynamic_ntk(spectrum: Spectrum, target_tokens: int, *, length_tokens: int | None = None) -> Factors:
    """Base b ((s l / L0) - (s - 1))^(d/(d-2)), l = max(length, L0): NTK by the current length; `dynamic` in
    transformers.

    Args:
        length_tokens: l, the current length. None: the target window, because a fixed table serves every length up to
            L.
    """
    scale = extension_ratio(spectrum, target_tokens)
    length = max(target_tokens if length_tokens is None else length_tokens, spectrum.window_tokens)
    stretch = scale * length / spectrum.window_tokens - (scale - 1.0)
    exponent = np.arange(spectrum.n_dims) / (spectrum.n_dims - 1)  # (2i/d) * (d/(d-2))
    return made("dynamic_ntk", spectrum, target_tokens, stretch**exponent)


def yarn(spectrum: Spectrum, target_tokens: int, *, beta_fast: float = 32.0, beta_slow: float = 1.0) -> Factors:
    """lambda_i = 1 / ((1 - ramp_i) + ramp_i / s), attention factor (mscale) 0.1 ln s + 1 (YaRN, Peng et al. 2023, arXiv
    2309.00071).

    The ramp blends *frequencies* linearly between theta_i and theta_i / s.

    Args:
        beta_fast: with more periods than this inside L0, an index keeps its frequency.
        beta_slow: with fewer periods than this inside L0, an index is interpolated by s.
    """
    return _yarn(spectrum, target_tokens, yarn_ramp(spectrum, beta_fast, beta_slow), "yarn")


def yarn_rcd(spectrum: Spectrum, target_tokens: int, *, critical_index: int, beta_fast: float = 32.0) -> Factors:
    """YaRN-rcd: YaRN whose ramp ends at the found critical index instead of tcd (paper, Section 4.3)."""
    ramp = ramp_to(spectrum, _checked_index(spectrum, critical_index), beta_fast)
    return _yarn(spectrum, target_tokens, ramp, "yarn_rcd")


def ntk_rcd(spectrum: Spectrum, target_tokens: int, *, critical_index: int) -> Factors:
    """NTK-rcd: lambda_i = s^(i / rcd), which is s at the found critical index (paper, Section 4.3)."""
    scale = extension_ratio(spectrum, target_tokens)
    exponent = np.arange(spectrum.n_dims) / _checked_index(spectrum, critical_index)
    return made("ntk_rcd", spectrum, target_tokens, scale**exponent)


def llama3(
    spectrum: Spectrum,
    target_tokens: int,
    *,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    factor: float | None = None,
) -> Factors:
    """Meta's rule for LLaMA 3.1: keep periods below L0 / high, divide the frequencies of periods above L0 / low, blend
    between.

    Args:
        low_freq_factor: low; with fewer periods than this inside L0, a frequency is divided by ``factor``.
        high_freq_factor: high; with more periods than this inside L0, a frequency is kept.
        factor: None: s.
    """
    if not 0.0 <= low_freq_factor < high_freq_factor:
        raise UserError(
            f"rope.options.low_freq_factor={low_freq_factor} is not below "
            f"rope.options.high_freq_factor={high_freq_factor}; "
            "set it below (Meta uses 1 and 4)"
        )
    factor = extension_ratio(spectrum, target_tokens) if factor is None else factor
    ramp = llama3_ramp(spectrum, low_freq_factor, high_freq_factor)
    return made("llama3", spectrum, target_tokens, frequency_linear(ramp, factor))


def longrope(
    spectrum: Spectrum,
    target_tokens: int,
    *,
    rescale: Sequence[float] | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Factors:
    """LongRoPE v1 (Ding et al. 2024, arXiv 2402.13753), attention factor sqrt(1 + ln s / ln L0).

    Args:
        rescale: the D factors; its search keeps them in [1, 1.25 s], in steps of 0.01, non-decreasing. None: the curve
            that the search starts from, (1 - ramp_i) + s ramp_i over YaRN's ramp. It blends *factors* linearly, so it
            is not YaRN's own curve.
        beta_fast, beta_slow: ends of the ramp, as in ``yarn``.
    """
    scale = extension_ratio(spectrum, target_tokens)
    table = lambda_linear(yarn_ramp(spectrum, beta_fast, beta_slow), scale) if rescale is None else rescale
    return made("longrope", spectrum, target_tokens, table, longrope_attention_factor(scale, spectrum.window_tokens))


def longrope2(
    spectrum: Spectrum,
    target_tokens: int,
    *,
    critical_index: int,
    tail: Sequence[float] | float,
    head: str = Head.ntk,
    attention_factor: float | None = None,
) -> Factors:
    """lambda_i = tail[i - rcd] for i >= rcd, lambda_rcd^(i / rcd) below (paper, Section 3.2, Algorithms 1 and 2).

    Below rcd this is NTK with the base b lambda_rcd^(d / (2 rcd)): it meets the tail at the critical index. With
    ``head="yarn"`` it is YaRN-rcd with lambda_rcd in the place of s, which is not in the paper.

    Args:
        critical_index: rcd, zero-based cosine index, 1 ... D-1.
        tail: the D - rcd searched factors in any order, or one number for a constant tail. Bounds are the search's own.
        head: "ntk" | "yarn".
        attention_factor: None: 1. The paper states none; the search finds one (``search.search_attention_factor``).
    """
    if head not in list(Head):
        raise UserError(f"rope.options.head={head} is not one of {', '.join(Head)}; set it to one of them")
    rcd = _checked_index(spectrum, critical_index)
    right = _full_tail(spectrum, rcd, tail)  # [D - rcd]
    left = (
        right[0] ** (np.arange(rcd) / rcd) if head == Head.ntk else frequency_linear(ramp_to(spectrum, rcd), right[0])
    )
    table = np.concatenate([left[:rcd], right])  # [D]
    return made("longrope2", spectrum, target_tokens, table, 1.0 if attention_factor is None else attention_factor)


METHODS: dict[str, Callable[..., Factors]] = {
    method.__name__: method
    for method in (none, pi, ntk_aware, ntk, dynamic_ntk, yarn, llama3, longrope, longrope2, yarn_rcd, ntk_rcd)
}


def made(
    name: str, spectrum: Spectrum, target_tokens: int, rescale: Iterable[float], attention_factor: float = 1.0
) -> Factors:
    """The Factors of a method: its D rescale factors on top of the model's own table.

    Raises:
        UserError: ``rescale`` has another length than D, or a factor is not positive and finite.
    """
    on_top = checked_table("rescale", tuple(rescale), spectrum.n_dims)
    table = tuple(float(own * x) for own, x in zip(spectrum.own_factors, on_top, strict=True))
    return Factors(table, attention_factor, spectrum, target_tokens, name)


def _yarn(spectrum: Spectrum, target_tokens: int, ramp: np.ndarray, name: str) -> Factors:
    scale = extension_ratio(spectrum, target_tokens)
    return made(name, spectrum, target_tokens, frequency_linear(ramp, scale), 0.1 * math.log(scale) + 1.0)


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
            f"set rope.tail to {needed} numbers, or to one number for a constant tail"
        )
    if not 0.0 < numbers[0] < math.inf:
        raise UserError(
            f"rope.tail[0]={numbers[0]} is not a positive finite number; set rope.tail to numbers of at least the "
            "extension ratio"
        )
    return np.broadcast_to(numbers, needed) if len(numbers) == 1 else numbers


def build(rope: RopeConfig, spectrum: Spectrum) -> Factors:
    """The factors that a config names: ``rope.factors`` where it is set, else ``rope.method``.

    ``rope.attention_factor``, where it is set, replaces the attention factor of either. A method's attention factor is
    at least the attention factor of the model's own window.

    Args:
        rope: target window, and a factors file or a method with its options.
        spectrum: of the model that uses the factors.

    Raises:
        UserError: the file is missing or was made for another model or target; the method is unknown; an option is
            missing, unknown to the method or of the wrong size.
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
            f"rope.factors: {path} carries no longrope factors; set rope.factors to a factors.json or to a model "
            "folder that has them"
        )
    _refuse_other_model_or_target(factors, rope, spectrum, path)
    return replace(factors, spectrum=spectrum)  # the short window is the model's own, whatever the file says


def _refuse_other_model_or_target(factors: Factors, rope: RopeConfig, spectrum: Spectrum, path: Path) -> None:
    made_for = factors.spectrum
    if any(getattr(made_for, key) != getattr(spectrum, key) for key in ("rotary_dim", "base", "window_tokens")):
        raise UserError(
            f"rope.factors: {path} was made for a model with {_described(factors.spectrum)}, but this model has "
            f"{_described(spectrum)}; "
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
    method = _method_of(rope.method)
    arguments = _arguments(rope, method)
    try:
        factors = method(spectrum.start(rope.start_from), rope.target_window_tokens, **arguments)
        if not isinstance(factors, Factors):
            raise TypeError(f"it returns {type(factors).__name__} and not Factors")
        # A longrope or YaRN base has an attention factor of its own. A longer window does not need a smaller one.
        factor = max(factors.attention_factor, spectrum.attention_factor)
        return replace(factors, spectrum=spectrum, attention_factor=factor)
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:  # options are untyped in YAML
        raise UserError(
            f"rope.options={rope.options} do not fit rope.method={rope.method} ({error}); give numbers"
        ) from error


def _method_of(name: str) -> Callable[..., Factors]:
    """A method of ours, or a function of a user's own package. Raises UserError where there is none."""
    if is_plugin(name):
        return plugin(name, "rope.method", what="function")
    if name not in METHODS:
        raise UserError(f"rope.method={name} is not one of {', '.join(METHODS)}; set rope.method to one of them")
    return METHODS[name]


def _arguments(rope: RopeConfig, method: Callable[..., Factors]) -> dict[str, Any]:
    """The keyword arguments of a method. Raises UserError for an option that the method does not take, or that it needs
    and does not get.
    """
    given = dict(rope.options)
    if rope.critical_index is not None:
        given["critical_index"] = rope.critical_index
    if rope.tail:
        given["tail"] = rope.tail
    # The keyword-only parameters of a method are its options.
    options = {p.name: p for p in inspect.signature(method).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for name in [n for n in given if n not in options]:
        raise UserError(
            f"{_key(name)} is set, but rope.method={rope.method} takes "
            f"{', '.join(map(_key, options)) or 'no options'}; unset {_key(name)}"
        )
    for name in [n for n, p in options.items() if p.default is p.empty and n not in given]:
        raise UserError(
            f"rope.method={rope.method} needs {_key(name)}, which a search finds; "
            f"set rope.factors to the search's factors.json, or set {_key(name)}"
        )
    return given


def _key(name: str) -> str:
    return f"rope.{name}" if name in ("critical_index", "tail", "attention_factor") else f"rope.options.{name}"
