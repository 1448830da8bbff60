"""Factors: the values that it refuses, and an exact JSON form."""

import json
import math
import string
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lr2train.config import UserError
from lr2train.rope import Factors, Spectrum

SPECTRUM = Spectrum(8, 1e4, 128)
positive = st.floats(1e-3, 1e6)


@st.composite
def any_factors(draw):
    n = draw(st.integers(2, 40))
    table = st.lists(positive, min_size=n, max_size=n).map(tuple)
    own = draw(positive), draw(st.none() | table)
    spectrum = Spectrum(2 * n, draw(st.floats(1.5, 1e9)), draw(st.integers(7, 10**6)), *own)
    target = spectrum.window_tokens + draw(st.integers(0, 10**7))
    return Factors(draw(table), draw(positive), spectrum, target, draw(st.text(string.printable)))


@given(any_factors())
def test_json_round_trip_is_exact(factors):
    read = Factors.from_json(json.loads(json.dumps(factors.to_json())))
    assert (read, read.short_attention_factor) == (factors, factors.short_attention_factor)


def test_a_file_of_a_release_whose_spectrum_held_the_attention_factor():
    made = replace(SPECTRUM, attention_factor=1.19)
    factors = Factors((1.0, 1.1, 2.0, 4.0), 1.2, made, 512, "longrope2")
    old = factors.to_json() | {"short_attention_factor": 1.0}
    assert Factors.from_json(old).short_attention_factor == 1.19


def test_save_and_load(tmp_path):
    factors = Factors((1.0, 1.1, 2.0, 4.0), 1.2, SPECTRUM, 512, "longrope2")
    path = tmp_path / "runs" / "factors.json"
    factors.save(path)
    factors.save(path)  # over an older file
    assert Factors.load(path) == factors
    assert [p.name for p in path.parent.iterdir()] == ["factors.json"]


def test_the_notes_of_a_search_are_passed_over_and_any_other_key_is_refused():
    factors = Factors((1.0, 1.1, 2.0, 4.0), 1.2, SPECTRUM, 512, "longrope2")
    assert Factors.from_json(factors.to_json() | {"search": {"perplexity": 1.4}}) == factors
    with pytest.raises(UserError, match=r"rope\.factors hold original_tokens=4, .* rope\.factors"):
        Factors.from_json(factors.to_json() | {"original_tokens": 4})


def test_frequencies():
    factors = Factors((1.0, 2.0, 4.0, 8.0), 1.2, replace(SPECTRUM, own_rescale=(1.0, 1.0, 1.0, 2.0)), 1024, "x")
    np.testing.assert_array_equal(factors.inv_freq, SPECTRUM.inv_freq / [1, 2, 4, 8])
    np.testing.assert_array_equal(factors.short_inv_freq, SPECTRUM.inv_freq / [1, 1, 1, 2])
    assert factors.scale == 8.0


def test_a_short_table_of_ones_is_the_original():
    assert replace(SPECTRUM, own_rescale=[1.0] * 4) == SPECTRUM


def test_published_sets_out_of_order_are_read_as_they_are():
    assert Factors((1.0, 30.0, 2.0, 0.5), 1.0, SPECTRUM, 512, "x").rescale == (1.0, 30.0, 2.0, 0.5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rescale": (1.0, 2.0)}, "rescale has 2 numbers, but a rotary dimension of 8 needs 4"),
        ({"rescale": (1.0, 2.0, 0.0, 4.0)}, r"rescale\[2\]=0.0 is not a positive finite number"),
        ({"rescale": (1.0, 2.0, 3.0, math.nan)}, r"rescale\[3\]=nan"),
        ({"rescale": (1.0, -2.0, 3.0, 4.0)}, r"rescale\[1\]=-2.0"),
        ({"attention_factor": 0.0}, "rope.attention_factor"),
        ({"attention_factor": math.nan}, "rope.attention_factor"),
        ({"target_window_tokens": 127}, "rope.target_window_tokens=127 is below the original window of 128"),
    ],
)
def test_refusals(changes, words):
    good = {
        "rescale": (1.0, 2.0, 3.0, 4.0),
        "attention_factor": 1.0,
        "spectrum": SPECTRUM,
        "target_window_tokens": 512,
        "method": "x",
    }
    with pytest.raises(UserError, match=words):
        Factors(**(good | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"own_rescale": (math.inf, 1.0, 1.0, 1.0)}, r"own table\[0\]=inf"),
        ({"own_rescale": ()}, "own table has 0 numbers"),
        ({"attention_factor": math.inf}, "own attention factor=inf"),
    ],
)
def test_a_table_of_the_model_that_cannot_be_built_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        replace(SPECTRUM, **changes)


@pytest.mark.parametrize(
    "text",
    ["", "[1, 2]", "{}", '{"spectrum": 3}', '{"spectrum": {"rotary_dim": 8}, "rescale": [1]}', '{"spectrum": null}'],
)
def test_files_that_are_no_factors(tmp_path, text):
    path = tmp_path / "factors.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"rope\.factors"):
        Factors.load(path)


def test_a_number_of_the_wrong_kind_in_a_file(tmp_path):
    data = Factors((1.0, 2.0, 3.0, 4.0), 1.0, SPECTRUM, 512, "x").to_json()
    for wrong in ({"attention_factor": None}, {"attention_factor": "four"}, {"rescale": 3}):
        with pytest.raises(UserError, match=r"rope\.factors"):
            Factors.from_json(data | wrong)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"rope\.factors: .*nowhere\.json does not exist"):
        Factors.load(tmp_path / "nowhere.json")
