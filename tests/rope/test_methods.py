"""Methods against transformers, or against their formulas where transformers has none; and their promises for any
model.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lr2train.config import UserError
from lr2train.rope import METHODS, Spectrum
from lr2train.rope.curves import frequency_linear, lambda_linear, yarn_ramp
from lr2train.rope.hf import spectrum_of

# transformers works in fp32: base^x with x rounded to 2^-24 is off by ln(base) * 6e-8 (1e-6 for base 1e7), and a few
# roundings come on top
FP32 = 2e-6
MODELS = [
    (96, 1e4, 2048, 131072),
    (128, 5e5, 8192, 131072),
    (128, 1e6, 32768, 131072),
    (64, 1e4, 512, 4096),
    (16, 1e7, 300, 1000),
    (72, 1e4, 4096, 4096),
    (80, 1e4, 4096, 32768),
    (256, 1e6, 8192, 131072),
    (72, 5e5, 8192, 131072),
]
# head size, partial rotary factor: Phi-4-mini, GPT-NeoX, StableLM, GLM
PARTIAL = [(128, 0.75), (96, 0.25), (80, 0.25), (128, 0.5), (72, 0.75), (256, 0.25)]


def from_transformers(kind, spectrum, target, seq_len=None, head_dim=None, **keys):
    """inv_freq and attention factor as transformers computes them; a head larger than the rotary dimension comes with
    its partial factor.
    """
    rope = {"rope_type": kind, "rope_theta": spectrum.base, "factor": target / spectrum.window_tokens, **keys}
    if kind in ("yarn", "longrope", "llama3"):
        rope["original_max_position_embeddings"] = spectrum.window_tokens
    window = spectrum.window_tokens if kind == "dynamic" else target
    head_dim = head_dim or spectrum.rotary_dim
    config = LlamaConfig(head_dim=head_dim, hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=window)
    config.rope_parameters = rope
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=seq_len)
    return inv_freq.double().numpy(), attention_factor


def assert_equal(factors, oracle):
    inv_freq, attention_factor = oracle
    np.testing.assert_allclose(factors.inv_freq, inv_freq, rtol=FP32)
    assert factors.attention_factor == pytest.approx(attention_factor, rel=1e-12)


@pytest.fixture(params=MODELS, ids=str)
def model(request):
    return Spectrum(*request.param[:3]), request.param[3]


def test_pi_is_linear(model):
    assert_equal(METHODS["pi"](*model), from_transformers("linear", *model))


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0, 2.0])
def test_dynamic_ntk_is_dynamic(model, share):
    length = round(share * model[1])
    assert_equal(
        METHODS["dynamic_ntk"](*model, length_tokens=length), from_transformers("dynamic", *model, seq_len=length)
    )


def test_dynamic_ntk_serves_the_whole_target_by_default(model):
    assert_equal(METHODS["dynamic_ntk"](*model), from_transformers("dynamic", *model, seq_len=model[1]))


@pytest.mark.parametrize("betas", [{}, {"beta_fast": 16.0, "beta_slow": 2.0}])
def test_yarn_is_yarn(model, betas):
    assert_equal(METHODS["yarn"](*model, **betas), from_transformers("yarn", *model, **betas))


@pytest.mark.parametrize("options", [{}, {"factor": 8.0}, {"low_freq_factor": 2.0, "high_freq_factor": 32.0}])
def test_llama3_is_llama3(model, options):
    keys = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | options
    assert_equal(METHODS["llama3"](*model, **options), from_transformers("llama3", *model, **keys))


def test_longrope_with_a_table_is_longrope(model):
    spectrum, target = model
    table = np.linspace(1.0, 1.25 * target / spectrum.window_tokens, spectrum.n_dims).tolist()
    keys = {"long_factor": table, "short_factor": [1.0] * spectrum.n_dims}
    assert_equal(
        METHODS["longrope"](*model, rescale=table),
        from_transformers("longrope", *model, seq_len=spectrum.window_tokens + 1, **keys),
    )


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3", "longrope"])
@pytest.mark.parametrize(("head_dim", "partial"), PARTIAL)
def test_partial_rotary(head_dim, partial, kind):
    spectrum = spectrum_of(
        {"head_dim": head_dim, "max_position_embeddings": 4096, "rope_theta": 1e4, "partial_rotary_factor": partial},
    )
    assert spectrum == Spectrum(round(head_dim * partial), 1e4, 4096)
    table = np.linspace(1.0, 40.0, spectrum.n_dims).tolist()
    keys = {"partial_rotary_factor": partial, "head_dim": head_dim} | {
        "linear": {},
        "dynamic": {"seq_len": 131072},
        "yarn": {},
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "longrope": {"seq_len": 4097, "long_factor": table, "short_factor": [1.0] * spectrum.n_dims},
    }[kind]
    name = {"linear": "pi", "dynamic": "dynamic_ntk"}.get(kind, kind)
    options = {"rescale": table} if kind == "longrope" else {}
    assert_equal(METHODS[name](spectrum, 131072, **options), from_transformers(kind, spectrum, 131072, **keys))


def test_none_is_the_original(model):
    factors = METHODS["none"](*model)
    np.testing.assert_array_equal(factors.inv_freq, model[0].inv_freq)
    assert factors.attention_factor == 1.0


def test_ntk_aware_is_dynamic_ntk_of_its_own_stretch(model):
    spectrum, target = model
    scale, d, i = target / spectrum.window_tokens, spectrum.rotary_dim, np.arange(spectrum.n_dims)
    base = spectrum.base * scale ** (d / (d - 2))
    np.testing.assert_allclose(METHODS["ntk_aware"](*model).inv_freq, base ** (-2 * i / d), rtol=1e-12)
    assert METHODS["ntk_aware"](*model).rescale[-1] == pytest.approx(scale, rel=1e-15)


def test_ntk_is_a_base_change_that_reaches_s_at_the_critical_index(model):
    spectrum, target = model
    d, i = spectrum.rotary_dim, np.arange(spectrum.n_dims)
    base = spectrum.base ** (math.log(target / (2 * math.pi)) / math.log(spectrum.window_tokens / (2 * math.pi)))
    np.testing.assert_allclose(METHODS["ntk"](*model).inv_freq, base ** (-2 * i / d), rtol=1e-11)
    assert (base / spectrum.base) ** (2 * spectrum.critical_index_real / d) == pytest.approx(
        target / spectrum.window_tokens, rel=1e-11
    )


def test_longrope_starts_from_another_curve_than_yarn(model):
    spectrum, target = model
    ramp, scale = yarn_ramp(spectrum), target / spectrum.window_tokens
    np.testing.assert_array_equal(METHODS["longrope"](*model).rescale, lambda_linear(ramp, scale))
    np.testing.assert_array_equal(METHODS["yarn"](*model).rescale, frequency_linear(ramp, scale))
    # the same ramp, got back out of YaRN's frequencies (which are transformers' own), blends the factors here
    if scale > 1:
        share = (1 - 1 / np.array(METHODS["yarn"](*model).rescale)) / (1 - 1 / scale)
        np.testing.assert_allclose(METHODS["longrope"](*model).rescale, 1 + (scale - 1) * share, rtol=1e-12)
    if scale > 1 and np.any((ramp > 0) & (ramp < 1)):
        assert np.any(lambda_linear(ramp, scale) > 1.1 * frequency_linear(ramp, scale))


def test_rcd_variants_at_the_theoretical_index_are_their_parents():
    spectrum = Spectrum(128, 5e5, 8192)
    tcd = spectrum.critical_index
    assert (
        METHODS["yarn_rcd"](spectrum, 131072, critical_index=tcd).rescale == METHODS["yarn"](spectrum, 131072).rescale
    )
    parent, child = (
        METHODS["ntk"](spectrum, 131072).rescale,
        METHODS["ntk_rcd"](spectrum, 131072, critical_index=tcd).rescale,
    )
    np.testing.assert_allclose(child, np.array(parent) ** (spectrum.critical_index_real / tcd), rtol=1e-12)


def test_rcd_variants_reach_s_at_the_found_index():
    spectrum = Spectrum(128, 5e5, 8192)
    for name in ("yarn_rcd", "ntk_rcd"):
        assert METHODS[name](spectrum, 131072, critical_index=30).rescale[30] == pytest.approx(16.0, rel=1e-15)
    yarn_rcd = METHODS["yarn_rcd"](spectrum, 131072, critical_index=30)
    same = METHODS["longrope2"](spectrum, 131072, critical_index=30, tail=16.0, head="yarn")
    assert same.rescale == yarn_rcd.rescale, "longrope2 with YaRN's factors below rcd, and s from there on"
    assert set(yarn_rcd.rescale[:19]) == {1.0}
    assert set(yarn_rcd.rescale[30:]) == {16.0}
    assert yarn_rcd.attention_factor == METHODS["yarn"](spectrum, 131072).attention_factor


def test_rcd_variants_between_their_ends():
    """LLaMA3-8B, index by index: YaRN's ramp from floor(dim(32)) = 18 to rcd = 30, and NTK's power."""
    spectrum = Spectrum(128, 5e5, 8192)
    yarn_rcd, ntk_rcd = (METHODS[name](spectrum, 131072, critical_index=30).rescale for name in ("yarn_rcd", "ntk_rcd"))
    for i in range(64):
        share = min(max((i - 18) / 12, 0), 1)
        assert 1 / yarn_rcd[i] == pytest.approx((1 - share) + share / 16, rel=1e-14)
        assert math.log(ntk_rcd[i]) == pytest.approx(i / 30 * math.log(16), rel=1e-13)


@given(st.integers(1, 63), st.sampled_from(["yarn_rcd", "ntk_rcd"]))
def test_rcd_variants_reach_s_at_any_index(index, name):
    rescale = METHODS[name](Spectrum(128, 5e5, 8192), 131072, critical_index=index).rescale
    assert rescale[0] == 1.0
    assert rescale[index] == pytest.approx(16.0, rel=1e-12)


def test_longrope2_is_ntk_below_the_critical_index_and_has_attention_factor_1():
    spectrum = Spectrum(64, 1e4, 512)
    tail = np.linspace(8.0, 16.0, 20)
    factors = METHODS["longrope2"](spectrum, 4096, critical_index=12, tail=tail)
    np.testing.assert_array_equal(factors.rescale[12:], tail)
    np.testing.assert_allclose(factors.rescale[:12], 8.0 ** (np.arange(12) / 12), rtol=1e-15)
    assert factors.attention_factor == 1.0
    assert (
        METHODS["longrope2"](spectrum, 4096, critical_index=12, tail=tail, attention_factor=1.2).attention_factor == 1.2
    )


def test_longrope2_reads_tails_in_any_order():
    factors = METHODS["longrope2"](Spectrum(16, 1e4, 512), 4096, critical_index=5, tail=[9.0, 3.0, 20.0])
    assert factors.rescale[5:] == (9.0, 3.0, 20.0)


@st.composite
def calls(draw):
    """(name, spectrum, target, options) for any method, with options that the searches would give."""
    spectrum = Spectrum(2 * draw(st.integers(2, 128)), draw(st.floats(1e3, 1e7)), draw(st.integers(16, 200_000)))
    target = round(spectrum.window_tokens * draw(st.floats(1.0, 64.0)))
    name, options = draw(st.sampled_from(sorted(METHODS))), {}
    if name in ("longrope2", "yarn_rcd", "ntk_rcd"):
        options["critical_index"] = draw(st.integers(spectrum.lowest_critical_index, spectrum.critical_index))
    if name == "longrope2":
        n, scale = spectrum.n_dims - options["critical_index"], target / spectrum.window_tokens
        options["tail"] = sorted(draw(st.lists(st.floats(scale, 2 * scale), min_size=n, max_size=n)))
    return name, spectrum, target, options


@given(calls())
def test_every_method_slows_and_never_speeds_up_towards_higher_indices(call):
    name, spectrum, target, options = call
    factors = METHODS[name](spectrum, target, **options)
    rescale = np.array(factors.rescale)
    assert factors.method == name
    assert factors.spectrum == spectrum
    assert factors.target_window_tokens == target
    assert len(rescale) == spectrum.n_dims
    assert rescale[0] >= 1.0
    assert np.all(np.diff(rescale) >= -1e-9 * rescale[1:])
    assert np.all(np.diff(factors.inv_freq) < 0)
    assert factors.attention_factor >= 1.0
    np.testing.assert_array_equal(factors.short_inv_freq, spectrum.inv_freq)


@given(calls())
def test_every_method_is_the_identity_where_nothing_is_extended(call):
    name, spectrum, _, options = call
    if "tail" in options:
        options["tail"] = 1.0
    factors = METHODS[name](spectrum, spectrum.window_tokens, **options)
    np.testing.assert_allclose(factors.rescale, 1.0, rtol=1e-12)
    assert factors.attention_factor == 1.0


@given(calls())
def test_shrinking_is_refused(call):
    name, spectrum, _, options = call
    with pytest.raises(UserError, match=r"rope\.target_window_tokens=5 "):
        METHODS[name](spectrum, 5, **options)
