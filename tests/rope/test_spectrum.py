"""The numbers of the paper's models, to the printed digits, and the promises of a spectrum for any model."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lr2train.config import UserError
from lr2train.rope import METHODS, Spectrum
from lr2train.rope.curves import yarn_range

PHI3 = Spectrum(96, 1e4, 2048)
LLAMA3 = Spectrum(128, 5e5, 8192)
LLAMA2 = Spectrum(128, 1e4, 4096)
QWEN = Spectrum(128, 1e6, 32768)
L = 131072


@pytest.mark.parametrize(
    ("spectrum", "scale", "real", "tcd", "d10"),
    [
        (PHI3, 64, "30.1578", 31, 19),
        (LLAMA3, 16, "34.9841", 35, 24),
        (LLAMA2, 32, "45.0269", 46, 30),
        (QWEN, 4, "39.6509", 40, 29),
    ],
)
def test_critical_indices(spectrum, scale, real, tcd, d10):
    assert METHODS["none"](spectrum, L).scale == scale
    assert f"{spectrum.critical_index_real:.4f}" == real
    assert (spectrum.critical_index, spectrum.lowest_critical_index) == (tcd, d10)


@pytest.mark.parametrize("spectrum", [PHI3, LLAMA3, LLAMA2, QWEN])
def test_ntk_is_s_at_the_real_valued_critical_index(spectrum):
    rescale = METHODS["ntk"](spectrum, L).rescale
    # lambda_i = lambda_1^i
    assert rescale[1] ** spectrum.critical_index_real == pytest.approx(L / spectrum.window_tokens, rel=1e-11)


@pytest.mark.parametrize(("spectrum", "searched"), [(PHI3, 25), (LLAMA3, 30)])
def test_the_critical_indices_that_the_papers_searches_found_lie_among_the_candidates(spectrum, searched):
    assert spectrum.lowest_critical_index <= searched <= spectrum.critical_index


@pytest.mark.parametrize(
    ("spectrum", "base", "at_tcd", "at_last"),
    [
        (PHI3, "7.49491e+06", "71.882", "652.94"),
        (LLAMA3, "7.97607e+07", "16.0202", "147.37"),
        (LLAMA2, "1.37841e+06", "34.489", "127.63"),
    ]
    + [(QWEN, "9.37082e+06", "4.0491", "9.0489")],
)
def test_ntk_base_and_factors(spectrum, base, at_tcd, at_last):
    rescale = METHODS["ntk"](spectrum, L).rescale
    assert f"{spectrum.base * rescale[1] ** spectrum.n_dims:.5e}" == base  # lambda_1 = (b'/b)^(1/D)
    for index, printed in ((spectrum.critical_index, at_tcd), (-1, at_last)):
        assert f"{rescale[index]:.{len(printed.split('.')[1])}f}" == printed


@pytest.mark.parametrize(
    ("spectrum", "low_high"), [(LLAMA2, (20, 46)), (LLAMA3, (18, 35)), (PHI3, (12, 31)), (QWEN, (23, 40))]
)
def test_yarn_range(spectrum, low_high):
    assert yarn_range(spectrum) == low_high


@pytest.mark.parametrize(
    ("spectrum", "rcd", "scale", "base"), [(PHI3, 25, 64.0, "29367403.479"), (LLAMA3, 30, 16.0, "185250462.392")]
)
def test_longrope2_base(spectrum, rcd, scale, base):
    rescale = METHODS["longrope2"](spectrum, L, critical_index=rcd, tail=scale).rescale
    assert f"{spectrum.base * rescale[1] ** spectrum.n_dims:.3f}" == base
    assert rescale[0] == 1.0
    assert set(rescale[rcd:]) == {scale}


def test_periods_of_phi3_that_the_paper_quotes():
    period = PHI3.period_tokens
    assert [f"{period[i]:.2f}" for i in (7, 47)] == ["24.07", "51861.67"]
    assert (f"{period[30]:.1f}", f"{period[31]:.0f}") == ("1986.9", "2407")
    assert period[30] < PHI3.window_tokens < period[31]


@given(st.integers(2, 128), st.floats(100, 1e8), st.integers(7, 10**6))
def test_invariants(n_dims, base, window):
    spectrum = Spectrum(2 * n_dims, base, window)
    assert spectrum.n_dims == n_dims == len(spectrum.inv_freq) == len(spectrum.period_tokens)
    assert spectrum.inv_freq[0] == 1.0
    assert np.all(np.diff(spectrum.inv_freq) < 0)
    assert 1 <= spectrum.lowest_critical_index <= spectrum.critical_index <= n_dims - 1
    if 1 <= spectrum.critical_index_real <= n_dims - 1:
        k = spectrum.critical_index
        assert spectrum.period_tokens[k] >= window * (1 - 1e-9)
        assert spectrum.period_tokens[k - 1] <= window * (1 + 1e-9)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ((63, 1e4, 512), "model.path"),
        ((2, 1e4, 512), "model.path"),
        ((64, 1.0, 512), "rope_theta"),
        ((64, math.nan, 512), "rope_theta"),
    ]
    + [((64, math.inf, 512), "rope_theta"), ((64, 1e4, 6), "model.original_window_tokens")],
)
def test_values_outside_the_limits_are_refused_with_the_key_to_set(arguments, key):
    with pytest.raises(UserError, match=key):
        Spectrum(*arguments)
