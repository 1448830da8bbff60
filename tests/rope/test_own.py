"""Models that are extended already: their own tables, windows and search bounds; transformers is the reference."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lr2train.config import RopeConfig
from lr2train.rope import METHODS, Factors, Spectrum, build
from lr2train.rope.hf import BASE_ROPE, by_layer_type, factors_of, own_config, spectrum_of, write, write_short_window

HEADS = 4
LLAMA31 = {
    "hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 131072, "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
QWEN25_YARN = {
    "hidden_size": 3584, "num_attention_heads": 28, "max_position_embeddings": 32768, "rope_theta": 1e6,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
}  # fmt: skip
OLMO3 = {
    "model_type": "olmo3", "hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 65536,
    "num_hidden_layers": 4, "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32.0,
        "beta_slow": 1.0, "attention_factor": 1.2079441541679836,
    },
}  # fmt: skip
GEMMA3 = {
    "model_type": "gemma3_text", "hidden_size": 2560, "num_attention_heads": 8, "head_dim": 256,
    "max_position_embeddings": 131072, "num_hidden_layers": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}  # fmt: skip


@st.composite
def any_config(draw):
    """A config of each type, with the keys that published models of the type have."""
    kind = draw(st.sampled_from(["linear", "dynamic", "llama3", "yarn"]))
    head_dim, partial = draw(st.sampled_from([(16, None), (64, 0.5), (80, 0.25), (96, None), (128, 0.75)]))
    window, factor = draw(st.integers(64, 2**17)), draw(st.floats(1.01, 64.0))
    rope = {draw(st.sampled_from(["type", "rope_type"])): kind, "factor": factor}
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = draw(st.integers(32, 2**15))
    if kind == "llama3":
        rope |= {"low_freq_factor": draw(st.floats(0.5, 2)), "high_freq_factor": draw(st.floats(2.5, 8))}
    if kind == "yarn":
        optional = {
            "attention_factor": st.floats(0.5, 2), "beta_fast": st.sampled_from([16, 32.0]), "truncate": st.booleans(),
            "beta_slow": st.sampled_from([1, 2.0]), "mscale": st.just(1.0), "mscale_all_dim": st.sampled_from([0.7, 1]),
        }  # fmt: skip
        rope |= draw(st.fixed_dictionaries({}, optional=optional))
    config = {"hidden_size": HEADS * head_dim, "num_attention_heads": HEADS, "max_position_embeddings": window}
    config |= {"rope_theta": draw(st.floats(1e3, 1e7)), "rope_scaling": rope, "head_dim": head_dim}
    return config | ({} if partial is None else {"partial_rotary_factor": partial})


def theirs(config):
    """transformers' config and rotary module."""
    made = LlamaConfig(**copy.deepcopy(config))
    return made, LlamaRotaryEmbedding(made)


def float32_error(config, spectrum):
    """What transformers' float32 may miss: 3e-6 of a frequency, as its power of the base has.

    llama3's ramp divides by the distance of its two ends, and the error of its argument grows as much.
    """
    rope, plain = config["rope_scaling"], spectrum.inv_freq
    if "low_freq_factor" not in rope:
        return 3e-6 * np.asarray(spectrum.own_inv_freq)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    return 3e-6 * (np.asarray(spectrum.own_inv_freq) + np.asarray(plain) * high / (high - low))


@settings(max_examples=30)
@given(any_config())
def test_the_own_table_is_transformers_own(config):
    made, rotary = theirs(config)
    spectrum = spectrum_of(config)
    error = np.abs(spectrum.own_inv_freq - rotary.inv_freq.double().numpy())
    assert np.all(error <= float32_error(config, spectrum))
    assert spectrum.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-15)
    assert spectrum_of(made.to_dict()) == spectrum, "published and normalised configs say the same"


@settings(max_examples=30)
@given(any_config(), st.data())
def test_round_trip(config, data):
    """Written, saved by transformers, read, written again; and the short window put back, bit for bit."""
    spectrum = spectrum_of(config)
    table = st.lists(st.floats(0.1, 1e4), min_size=spectrum.n_dims, max_size=spectrum.n_dims).map(tuple)
    target = spectrum.window_tokens + data.draw(st.integers(0, 10**6))
    factors = Factors(data.draw(table), data.draw(st.floats(0.1, 10)), spectrum, target, "longrope")
    base, own = theirs(config)
    saved = LlamaConfig(**write(base.to_dict(), factors)).to_dict()
    assert factors_of(saved) == factors
    assert spectrum_of(saved) == spectrum
    assert spectrum_of(saved).attention_factor == spectrum.attention_factor
    assert write(saved, factors) == write(write(saved, factors), factors)
    rescaled = config["rope_scaling"].get("type", config["rope_scaling"].get("rope_type"))
    short = write_short_window(saved, spectrum.window_tokens)
    assert (BASE_ROPE in short, short["rope_parameters"]["rope_type"]) == (False, rescaled)
    assert short["rope_parameters"] == short["rope_scaling"] == base.rope_parameters
    for again in (short, own_config(saved)):
        module = theirs(again)[1]
        assert module.attention_scaling == own.attention_scaling
        if rescaled != "dynamic" or again is short:
            assert np.array_equal(module.inv_freq, own.inv_freq)


@settings(max_examples=30)
@given(any_config())
def test_the_short_factors_give_the_own_table_but_for_the_last_bits(config):
    """As plain transformers and other runtimes read them; the modelling file of an export has the exact numbers."""
    base, own = theirs(config)
    factors = METHODS["none"](spectrum_of(config), spectrum_of(config).window_tokens + 1)
    module = theirs(write(base.to_dict(), factors))[1]
    error = np.abs(module.inv_freq.double().numpy() - own.inv_freq.double().numpy())
    assert np.all(error <= 2 * float32_error(config, spectrum_of(config))), "both are computed in float32"


@pytest.mark.parametrize(
    ("config", "window", "unscaled", "tcd", "d10"),
    [
        (LLAMA31, 131072, 16384, 39, 33),  # angles of 16384 plain tokens: 131072 / 8
        (LLAMA31 | {"rope_scaling": LLAMA31["rope_scaling"] | {"factor": 32.0}}, 131072, 4096, 35, 32),
        (QWEN25_YARN, 131072, 32768, 40, 33),
        (OLMO3, 65536, 8192, 35, 30),
        (GEMMA3, 131072, 16384, 73, 52),
        (LLAMA31 | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 131072, 131072, 49, 38),
        (LLAMA31 | {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 16384}, 16384, 4096,
         32, 21),
    ],
)  # fmt: skip
def test_windows_and_indices_of_published_models(config, window, unscaled, tcd, d10):
    """As published, and as transformers normalises the keys."""
    values = dict(config)
    normalised = AutoConfig.for_model(values.pop("model_type", "llama"), **copy.deepcopy(values)).to_dict()
    assert by_layer_type(normalised) == ("model_type" in config)
    for one in (config, normalised):
        spectrum = spectrum_of(one)
        assert spectrum.window_tokens == window
        assert spectrum.unscaled.window_tokens == unscaled
        assert (spectrum.critical_index, spectrum.lowest_critical_index) == (tcd, d10)
        assert spectrum.own_period_tokens[tcd] > window >= spectrum.own_period_tokens[tcd - 1]


@given(any_config(), st.floats(1.5, 32))
def test_both_starts_keep_slow_angles_inside_the_trained_ones(config, extension):
    spectrum = spectrum_of(config)
    target, index = round(spectrum.window_tokens * extension), spectrum.n_dims - 1
    for start_from in ("own", "plain"):
        start = spectrum.start(start_from)
        tail = target / start.window_tokens
        made = METHODS["longrope2"](start, target, critical_index=index, tail=[tail])
        angle, seen = target * made.inv_freq[-1], spectrum.window_tokens * spectrum.own_inv_freq[-1]
        # the smaller window is a whole number of tokens, and at least 7
        assert angle <= seen * (1 + 0.5 / (start.window_tokens - 0.5) + 1e-12) or start.window_tokens == 7


def test_a_method_acts_on_top_of_the_own_table_or_on_the_unscaled_frequencies():
    spectrum = spectrum_of(QWEN25_YARN)
    yarn = {"method": "yarn", "target_window_tokens": 524288}
    plain = build(RopeConfig(**yarn, start_from="plain"), spectrum)
    published = METHODS["yarn"](Spectrum(128, 1e6, 32768), 524288)  # YaRN by 16, as its owner would write it
    assert (plain.rescale, plain.attention_factor) == (published.rescale, published.attention_factor)
    assert plain.spectrum == spectrum
    own = build(RopeConfig(method="pi", target_window_tokens=524288), spectrum)
    np.testing.assert_allclose(own.inv_freq, spectrum.own_inv_freq / 4, rtol=1e-15)
    assert own.attention_factor == spectrum.attention_factor == 0.1 * math.log(4) + 1


@settings(max_examples=30)
@given(any_config(), st.sampled_from(sorted(set(METHODS) - {"longrope2", "yarn_rcd", "ntk_rcd"})))
def test_every_method_is_the_own_table_where_nothing_is_extended(config, method):
    spectrum = spectrum_of(config)
    made = METHODS[method](spectrum, spectrum.window_tokens)
    np.testing.assert_allclose(made.inv_freq, spectrum.own_inv_freq, rtol=1e-12)


@given(st.integers(2, 64), st.floats(1e3, 1e7), st.integers(64, 10**6), st.floats(1.0, 64.0), st.floats(0.5, 40))
def test_a_constant_table_has_the_indices_of_its_smaller_window(n_dims, base, window, factor, periods):
    """Linear scaling by f is plain RoPE at L0 / f: the interpolated index meets the formula, also beyond both ends."""
    scaled = Spectrum(2 * n_dims, base, window, own_rescale=(factor,) * n_dims)
    plain = Spectrum(2 * n_dims, base, window)
    assert scaled.index_of(periods) == pytest.approx(plain.index_of(periods * factor), rel=1e-9, abs=1e-9)
    assert replace(scaled, own_rescale=None) == plain
