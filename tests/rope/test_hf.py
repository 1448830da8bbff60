"""RoPE keys of Hugging Face configs, read and written; transformers is the reference for written configs."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from lr2train.config import UserError
from lr2train.rope import METHODS, Factors, Spectrum
from lr2train.rope.hf import factors_of, refuse_wrong_values, spectrum_of, write

HEADS, L0, L = 4, 128, 1024


def plain_config(head_dim=16, base=1e4, old=False, partial=None, window=L0):
    config = {"hidden_size": HEADS * head_dim, "num_attention_heads": HEADS, "max_position_embeddings": window}
    rope = {"rope_theta": base} | ({} if partial is None else {"partial_rotary_factor": partial})
    return config | (rope | {"rope_scaling": None} if old else {"rope_parameters": rope | {"rope_type": "default"}})


def made(rotary_dim, attention_factor=1.2, method="longrope2", **more):
    n = rotary_dim // 2
    return Factors(tuple(np.linspace(1.0, 12.0, n)), attention_factor, Spectrum(rotary_dim, 1e4, L0), L, method, **more)


def tables(rotary):
    """The module's frequencies after a forward inside the original window, and after one that leaves it by a token."""
    x = torch.zeros(1)
    rotary(x, torch.arange(L0)[None])
    short = rotary.inv_freq.double().numpy().copy()
    rotary(x, torch.arange(L0 + 1)[None])
    return short, rotary.inv_freq.double().numpy()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_llama_loads_what_is_written(old, head_dim):
    factors = made(head_dim)
    rotary = LlamaRotaryEmbedding(LlamaConfig(**write(plain_config(head_dim, old=old), factors)))
    short, long = tables(rotary)
    np.testing.assert_allclose(short, factors.spectrum.inv_freq, rtol=2e-6)
    np.testing.assert_allclose(long, factors.inv_freq, rtol=2e-6)
    assert rotary.attention_scaling == 1.2


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("partial", [0.75, 0.5])
def test_phi3_loads_what_is_written_with_partial_rotary(old, partial):
    factors = made(int(16 * partial))
    written = write(plain_config(old=old, partial=partial), factors)
    assert written["rope_parameters"]["partial_rotary_factor"] == partial
    rotary = Phi3RotaryEmbedding(Phi3Config(**written, num_key_value_heads=HEADS, pad_token_id=0))
    short, long = tables(rotary)
    np.testing.assert_allclose(short, factors.spectrum.inv_freq, rtol=2e-6)
    np.testing.assert_allclose(long, factors.inv_freq, rtol=2e-6)
    assert rotary.attention_scaling == 1.2


def test_the_written_config_has_every_number_under_both_names():
    config = plain_config()
    before = copy.deepcopy(config)
    written = write(config, made(16))
    assert config == before
    assert written["rope_parameters"] == written["rope_scaling"]
    assert written["rope_parameters"] is not written["rope_scaling"]
    rope = written["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"], rope["rope_theta"]) == (
        "longrope",
        8.0,
        L0,
        1e4,
    )
    assert (rope["attention_factor"], rope["long_mscale"], rope["short_mscale"]) == (1.2, 1.2, 1.0)
    assert (written["max_position_embeddings"], written["original_max_position_embeddings"], written["rope_theta"]) == (
        L,
        L0,
        1e4,
    )


def test_a_config_that_transformers_saved_again_reads_the_same():
    factors = made(16)
    saved = LlamaConfig(**write(plain_config(), factors)).to_dict()
    assert factors_of(saved) == Factors(factors.rescale, 1.2, factors.spectrum, L, "longrope")


@given(
    st.integers(2, 40),
    st.sampled_from([None, 0.25, 0.5, 0.75]),
    st.booleans(),
    st.floats(100, 1e8),
    st.integers(7, 10**5),
    st.integers(0, 10**6),
    st.data(),
)
def test_round_trip(quarter, partial, old, base, window, extra, data):
    config = plain_config(4 * quarter if partial is None else 16 * quarter, base, old, partial, window)
    spectrum = spectrum_of(config)
    table = st.lists(st.floats(0.1, 1e4), min_size=spectrum.n_dims, max_size=spectrum.n_dims).map(tuple)
    positive = st.floats(0.1, 10)
    other = replace(spectrum, own_rescale=data.draw(st.none() | table), attention_factor=data.draw(positive))
    factors = Factors(data.draw(table), data.draw(positive), other, window + extra, "longrope")
    written = write(config, factors)
    assert factors_of(written) == replace(factors, spectrum=spectrum), "the short window is the config's own"
    assert spectrum_of(written) == spectrum
    assert write(written, factors) == written


@given(st.integers(2, 10), st.booleans(), st.data())
def test_a_short_window_of_its_own_is_kept(quarter, old, data):
    """Of a base that is `longrope` already: training leaves its short window as it is."""
    config = plain_config(4 * quarter, old=old, window=L) | {"original_max_position_embeddings": L0}
    table = st.lists(st.floats(0.1, 1e4), min_size=2 * quarter, max_size=2 * quarter)
    short, long, positive = data.draw(table), data.draw(table), st.floats(0.1, 10)
    own = {"type": data.draw(st.sampled_from(["su", "longrope"])), "short_factor": short, "long_factor": long}
    own |= data.draw(
        st.fixed_dictionaries(
            {}, optional={"attention_factor": positive, "short_mscale": positive, "long_mscale": positive}
        )
    )
    base = config | {"rope_scaling": own}
    before, factors = factors_of(base), made(4 * quarter)
    after = factors_of(write(base, factors))
    assert (after.rescale, after.attention_factor) == (factors.rescale, factors.attention_factor)
    assert (after.short_rescale, after.short_attention_factor) == (before.short_rescale, before.short_attention_factor)
    assert write(write(base, factors), factors) == write(base, factors)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_a_rescaling_by_a_factor_of_one_counts_as_plain_rope(kind, name):
    config = plain_config(old=True) | {"rope_scaling": {name: kind, "factor": 1.0}}
    assert spectrum_of(config) == spectrum_of(plain_config(old=True))
    assert factors_of(write(config, made(16))) == made(16, method="longrope")


ODD = {
    "hidden_size": ["64", 64.5, 0, -1, 2**40, [64], {}, True],
    "max_position_embeddings": [64.0, "64", False],
    "rope_theta": ["1e4", 0, -1.0, math.inf, math.nan, [1e4], True],
    "partial_rotary_factor": ["half", 0.0],
    "rope_scaling": [3, "linear", [1.0]],
    "rope_scaling.long_factor": [4.0, "4", [1.0] * 7, [0.0] * 8, ["1"] * 8, [None] * 8, [math.nan] * 8, {}],
    "rope_scaling.original_max_position_embeddings": [64.0, "64", {}],
    "rope_scaling.attention_factor": ["1", math.inf],
    "rope_scaling.factor": [[8.0], math.nan],
    "rope_scaling.type": [3, ["longrope"]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ODD.items() for value in values])
def test_a_value_of_a_wrong_type_is_named_with_its_file_and_key(key, value):
    scaling = {
        "type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": L0,
    }
    config = plain_config(old=True, window=L) | {"rope_scaling": scaling}
    refuse_wrong_values(config, "x/config.json")
    outer, _, inner = key.partition(".")
    changed = config | ({outer: scaling | {inner: value}} if inner else {outer: value})
    with pytest.raises(UserError) as error:
        refuse_wrong_values(changed, "x/config.json")
    said = str(error.value)
    assert said.startswith(f"x/config.json: {key}")
    assert "7 numbers" in said if value == [1.0] * 7 else f"={value!r}"[:57] in said


def test_a_missing_attention_factor_is_the_one_that_runtimes_use_on_both_windows():
    config = write(plain_config(), made(16))
    for name in ("rope_parameters", "rope_scaling"):
        for key in ("attention_factor", "long_mscale", "short_mscale"):
            del config[name][key]
    factors, expected = factors_of(config), math.sqrt(1 + math.log(8) / math.log(L0))
    assert (factors.attention_factor, factors.short_attention_factor) == (expected, expected)
    assert LlamaRotaryEmbedding(LlamaConfig(**config)).attention_scaling == pytest.approx(expected, rel=1e-15)


def test_a_written_attention_factor_alone_acts_on_both_windows():
    config = plain_config() | {
        "rope_scaling": {
            "rope_type": "longrope",
            "long_factor": [2.0] * 8,
            "short_factor": [1.0] * 8,
            "attention_factor": 1.3,
        }
    }
    config |= {"original_max_position_embeddings": L0, "max_position_embeddings": L, "rope_theta": 1e4}
    factors = factors_of(config)
    assert (factors.attention_factor, factors.short_attention_factor, factors.target_window_tokens) == (1.3, 1.3, L)


@pytest.mark.parametrize("kind", ["su", "longrope", "yarn"])
def test_phi3_mini_as_microsoft_published_it(kind):
    config = {
        "hidden_size": 3072,
        "num_attention_heads": 32,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
    }
    config |= {
        "rope_theta": 10000.0,
        "rope_scaling": {"type": kind, "short_factor": [1.05] * 48, "long_factor": [1.03] * 40 + [50.0, 64.9] * 4},
    }
    factors = factors_of(config)
    assert factors.spectrum == Spectrum(96, 1e4, 4096, own_rescale=[1.05] * 48)
    assert factors.target_window_tokens == 131072
    assert factors.short_rescale == (1.05,) * 48
    assert factors.rescale[-2:] == (50.0, 64.9)
    assert factors.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


def test_phi35_moe_with_its_mscales():
    config = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 131072, "rope_theta": 1e4}
    scaling = {
        "type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "short_mscale": 1.1,
        "long_mscale": 1.243,
    }
    factors = factors_of(config | {"rope_scaling": scaling | {"original_max_position_embeddings": 4096}})
    assert (factors.attention_factor, factors.short_attention_factor) == (1.243, 1.1)


def test_the_target_comes_from_the_factor_where_the_config_kept_its_old_window():
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "factor": 8.0,
        "original_max_position_embeddings": L0,
    }
    assert factors_of(plain_config() | {"rope_scaling": scaling}).target_window_tokens == 1024


def test_an_original_window_of_the_config_itself_wins_as_in_transformers():
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    }
    config = plain_config(window=L) | {"original_max_position_embeddings": L0, "rope_scaling": scaling}
    assert spectrum_of(config).window_tokens == L0
    theirs = Phi3Config(**copy.deepcopy(config), num_key_value_heads=HEADS, pad_token_id=0)
    assert theirs.rope_parameters["original_max_position_embeddings"] == L0


def test_plain_models_have_no_factors():
    assert factors_of(plain_config()) is None
    assert factors_of(LlamaConfig().to_dict()) is None


@pytest.mark.parametrize(
    ("config", "spectrum"),
    [
        (plain_config(old=True, partial=0.75), Spectrum(12, 1e4, L0)),
        (plain_config(partial=0.75), Spectrum(12, 1e4, L0)),
        (
            {
                "head_dim": 128,
                "hidden_size": 5120,
                "num_attention_heads": 32,
                "max_position_embeddings": 40960,
                "rope_theta": 1e6,
            },
            Spectrum(128, 1e6, 40960),
        ),
        (
            {"head_dim": None, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64},
            Spectrum(16, 1e4, 64),
        ),
        (
            {"hidden_size": 2048, "num_attention_heads": 8, "rotary_pct": 0.25, "max_position_embeddings": 2048},
            Spectrum(64, 1e4, 2048),
        ),
        (LlamaConfig(rope_theta=5e5, head_dim=128, max_position_embeddings=8192).to_dict(), Spectrum(128, 5e5, 8192)),
    ],
)
def test_spectrum_of(config, spectrum):
    assert spectrum_of(config) == spectrum


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "type llama3 names no low_freq_factor"),
        ({"rope_scaling": {"type": "linear"}}, "type linear names no factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1000.0}}, "dynamic with alpha"),
        ({"rope_scaling": {"type": "proportional", "factor": 2.0}}, "type proportional"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}, "type mrope"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "full_attention is not understood"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "chunked": {}}}, "chunked is not understood"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"max_position_embeddings": None}, "no max_position_embeddings"),
        (
            {"rope_scaling": {"rope_type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8}},
            "names no original_max_position_embeddings",
        ),
    ],
)
def test_models_that_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        spectrum_of(plain_config() | changes)


def test_a_longrope_config_without_its_tables_is_refused():
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 8, "original_max_position_embeddings": L0}
    with pytest.raises(UserError, match="no long_factor"):
        factors_of(plain_config(window=L) | {"rope_scaling": scaling})


def test_factors_of_another_model_are_not_written():
    with pytest.raises(UserError, match="rotary dimension 12 and base 10000, but the model has 16"):
        write(plain_config(), made(12))


@pytest.mark.parametrize("name", ["none", "pi", "ntk_aware", "ntk", "dynamic_ntk", "yarn", "llama3", "longrope"])
def test_every_method_is_served_through_longrope(name):
    factors = METHODS[name](Spectrum(16, 1e4, L0), L)
    rotary = LlamaRotaryEmbedding(LlamaConfig(**write(plain_config(), factors)))
    np.testing.assert_allclose(tables(rotary)[1], factors.inv_freq, rtol=2e-6)
    assert rotary.attention_scaling == factors.attention_factor
