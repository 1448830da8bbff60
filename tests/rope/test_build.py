"""From a RopeConfig to Factors: the presets of conf/rope, the released LLaMA3-8B numbers, and refusals of wrong
settings.
"""

import json
import math

import numpy as np
import pytest
from omegaconf import OmegaConf

from lr2train.config import CONF_FOLDER, RopeConfig, UserError
from lr2train.rope import METHODS, Factors, Spectrum, build
from lr2train.rope.hf import write

LLAMA3 = Spectrum(128, 5e5, 8192)
SMALL = Spectrum(16, 1e4, 512)
PRESETS = sorted(path.stem for path in (CONF_FOLDER / "rope").glob("*.yaml"))

# as printed, to ten digits, in the authors' released training example
RELEASED = [
    1, 1.097906416, 1.205398499, 1.323414747, 1.452985542, 1.595242149, 1.751426591, 1.922902493, 2.111166985,
    2.317863779, 2.544797515,
    2.79394952, 3.067495105, 3.367822558, 3.697553996, 4.059568257, 4.457026037, 4.893397485, 5.372492496, 5.898493984,
    6.475994392,
    7.110035795, 7.806153921, 8.570426477, 9.40952622, 10.33077921, 11.34222878, 12.45270576, 13.67190555, 15.01047283,
    16.48009443,
    18.09360142, 19.8650811, 21.81, 21.87, 21.88, 22.23, 22.28, 22.53, 22.65, 22.73, 22.89, 22.92, 23.18, 23.23, 23.36,
    23.42, 23.47, 23.51,
    23.52, 23.75, 23.82, 23.89, 24.06, 24.13, 24.14, 24.3, 24.53, 24.67, 24.75, 24.97, 25.49, 26.01, 26.05,
]  # fmt: skip


def preset(name, **changes):
    """A file of conf/rope, typed by the schema, with a user's overrides on top."""
    merged = OmegaConf.merge(
        OmegaConf.structured(RopeConfig), OmegaConf.load(CONF_FOLDER / "rope" / f"{name}.yaml"), changes
    )
    return OmegaConf.to_object(merged)


def small(method, **more):
    return RopeConfig(target_window_tokens=4096, method=method, **more)


def test_the_released_llama3_factors():
    factors = build(preset("llama3_8b_released"), LLAMA3)
    np.testing.assert_allclose(factors.rescale, RELEASED, rtol=0, atol=1e-8)
    assert list(factors.rescale[33:]) == RELEASED[33:]
    assert [f"{x:.10g}" for x in factors.rescale] == [f"{x:.10g}" for x in RELEASED]
    assert factors.attention_factor == math.sqrt(1 + math.log(16) / math.log(8192)) == pytest.approx(1.1435, abs=5e-5)
    assert factors.short_attention_factor == 1.0
    assert factors.short_rescale is None
    assert factors.method == "longrope2"
    assert factors.scale == 16.0


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    searched = {
        "longrope2": {"critical_index": 30, "tail": [20.0]},
        "yarn_rcd": {"critical_index": 30},
        "ntk_rcd": {"critical_index": 30},
    }
    factors = build(preset(name, **searched.get(name, {})), LLAMA3)
    assert factors.method == ("longrope2" if name == "llama3_8b_released" else name)
    assert factors.target_window_tokens == 131072


def test_every_method_has_a_preset():
    assert set(METHODS) == set(PRESETS) - {"llama3_8b_released"}


def test_presets_of_methods_give_the_methods_own_defaults():
    for name in set(PRESETS) - {"longrope2", "yarn_rcd", "ntk_rcd", "llama3_8b_released"}:
        assert build(preset(name), LLAMA3) == METHODS[name](LLAMA3, 131072)


def test_one_number_is_a_constant_tail():
    assert build(small("longrope2", critical_index=3, tail=[12.0]), SMALL).rescale[3:] == (12.0,) * 5


def test_attention_factor_of_the_config_replaces_the_methods():
    assert build(small("yarn"), SMALL).attention_factor == 0.1 * math.log(8) + 1
    assert build(small("yarn", attention_factor=1.25), SMALL).attention_factor == 1.25
    assert build(small("longrope2", critical_index=3, tail=[12.0]), SMALL).attention_factor == 1.0
    assert (
        build(small("longrope2", critical_index=3, tail=[12.0], attention_factor=1.25), SMALL).attention_factor == 1.25
    )


def test_explicit_longrope_table_and_options():
    table = [1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 9.0, 10.0]
    assert build(small("longrope", options={"rescale": table}), SMALL).rescale == tuple(table)
    assert build(small("dynamic_ntk", options={"length_tokens": 1024}), SMALL) == METHODS["dynamic_ntk"](
        SMALL, 4096, length_tokens=1024
    )


@pytest.fixture
def searched():
    return METHODS["longrope2"](SMALL, 4096, critical_index=3, tail=[9.0, 10.0, 11.0, 12.0, 13.0], attention_factor=1.2)


def test_factors_file_and_the_folder_of_the_search(tmp_path, searched):
    searched.save(tmp_path / "factors.json")
    for path in (tmp_path / "factors.json", tmp_path):
        assert build(small("yarn", factors=str(path)), SMALL) == searched
    assert build(small("yarn", factors=str(tmp_path), attention_factor=1.3), SMALL).attention_factor == 1.3


def test_model_folder(tmp_path, searched):
    config = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(write(config, searched)))
    factors = build(small("yarn", factors=str(tmp_path)), SMALL)
    assert (factors.rescale, factors.attention_factor, factors.method) == (searched.rescale, 1.2, "longrope")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="carries no longrope factors"):
        build(small("yarn", factors=str(tmp_path)), SMALL)


def test_a_published_set_out_of_order_and_with_a_short_table(tmp_path):
    """A bare config.json, as some models are published: read as it is."""
    long, short = [1.0, 9.0, 2.0, 0.5, 30.0, 4.0, 4.0, 8.0], [1.0, 1.1, 1.2, 1.0, 1.3, 1.0, 1.0, 1.05]
    config = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 512,
    }
    config |= {"rope_theta": 1e4, "rope_scaling": {"type": "longrope", "long_factor": long, "short_factor": short}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    factors = build(small("yarn", factors=str(tmp_path / "config.json")), SMALL)
    assert (list(factors.rescale), factors.spectrum) == (long, SMALL), "the short window stays the model's own"


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        (small("ropelong"), "rope.method=ropelong is not one of none, pi, ntk_aware, .*longrope2"),
        (small("longrope2"), "rope.method=longrope2 needs rope.critical_index"),
        (small("longrope2", critical_index=3), "rope.method=longrope2 needs rope.tail"),
        (
            small("longrope2", critical_index=3, tail=[9.0, 9.0]),
            "rope.tail has 2 numbers, but rope.critical_index=3 of 8 cosine dimensions needs 5",
        ),
        (small("longrope2", critical_index=3, tail=[-9.0]), r"rope\.tail\[0\]=-9.0"),
        (small("longrope2", critical_index=3, tail=[9.0, 9.0, math.nan, 9.0, 9.0]), "rope.tail"),
        (small("longrope2", critical_index=8, tail=[9.0]), "rope.critical_index=8 is not between 1 and 7"),
        (small("ntk_rcd", critical_index=0), "rope.critical_index=0 is not between 1 and 7"),
        (small("yarn_rcd"), "rope.method=yarn_rcd needs rope.critical_index"),
        (
            small("yarn", critical_index=3),
            "rope.critical_index is set, but rope.method=yarn takes rope.options.beta_fast, rope.options.beta_slow",
        ),
        (small("pi", tail=[9.0]), "rope.tail is set, but rope.method=pi takes no options"),
        (
            small("yarn", options={"beta_fats": 16}),
            "rope.options.beta_fats is set, but rope.method=yarn takes rope.options.beta_fast",
        ),
        (
            small("yarn", options={"beta_fast": "many"}),
            "rope.options={'beta_fast': 'many'} do not fit rope.method=yarn",
        ),
        (
            small("yarn", options={"beta_fast": 1, "beta_slow": 2}),
            "rope.options.beta_slow=2 is not below rope.options.beta_fast=1",
        ),
        (small("llama3", options={"low_freq_factor": 4}), "rope.options.low_freq_factor=4 is not below"),
        (small("longrope", options={"rescale": [1.0]}), "rescale has 1 numbers, but a rotary dimension of 16 needs 8"),
        (
            small("longrope", options={"original_tokens": 4}),
            "rope.options.original_tokens is set, but rope.method=longrope takes",
        ),
        (small("pi", attention_factor=0.0), "rope.attention_factor"),
        (
            RopeConfig(target_window_tokens=256, method="pi"),
            "rope.target_window_tokens=256 is below the original window of 512",
        ),
        (small("pi", factors="/nowhere/factors.json"), "rope.factors: /nowhere/factors.json does not exist"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_key(rope, words):
    with pytest.raises(UserError, match=words):
        build(rope, SMALL)


def test_factors_of_another_model_or_target_are_refused_with_both_values(tmp_path, searched):
    searched.save(tmp_path / "factors.json")
    rope = small("yarn", factors=str(tmp_path))
    with pytest.raises(
        UserError,
        match="rotary dimension 16, base 10000, original window 512, but .* rotary dimension 128, base 500000",
    ):
        build(rope, LLAMA3)
    rope.target_window_tokens = 8192
    with pytest.raises(UserError, match=r"target of 4096 tokens, but rope\.target_window_tokens=8192"):
        build(rope, SMALL)


def test_a_folder_without_factors(tmp_path):
    with pytest.raises(UserError, match=r"rope\.factors: .*config\.json does not exist"):
        build(small("yarn", factors=str(tmp_path)), SMALL)


def test_methods_have_the_names_of_the_design():
    names = "none pi ntk_aware ntk dynamic_ntk yarn llama3 longrope longrope2 yarn_rcd ntk_rcd"
    assert list(METHODS) == names.split()
    assert all(isinstance(METHODS[n](SMALL, 4096), Factors) for n in names.split()[:8])
