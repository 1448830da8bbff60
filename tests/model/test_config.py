"""A config.json with a wrong value ends in one sentence that names the file, the key, the value and the wanted type."""

import json
import math

import pytest

from lr2train.config import ModelConfig, UserError
from lr2train.model import load
from lr2train.planning.counts import counts_of
from lr2train.rope import hf as rope_hf

LONGROPE = {
    "type": "longrope",
    "long_factor": [2.0] * 8,
    "short_factor": [1.0] * 8,
    "original_max_position_embeddings": 64,
}
BASE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "rope_theta": 10000.0,
}  # fmt: skip
VALUES = [
    None, 64.0, "64", -1, 0, 10**30, math.nan, math.inf, [], {}, [1], {"a": 1}, True, False, 1.5, "nonsense", [[[]]],
    [1.0] * 7, ["a"] * 8,
]  # fmt: skip


def folder_with(tmp_path, values):
    (tmp_path / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return ModelConfig(path=str(tmp_path))


def everything(model: ModelConfig) -> None:
    """Everything that verbs compute from a config before they read weights."""
    hf_config = load.config_of(model)
    load.spectrum_of(hf_config, model)
    rope_hf.factors_of(load.plain_config(hf_config))
    counts_of(hf_config, model)


def outcome(model: ModelConfig) -> str:
    """The message of the UserError; empty where the config is good. Any other exception fails the test."""
    try:
        everything(model)
    except UserError as error:
        return str(error)
    return ""


def said_of(tmp_path, values) -> str:
    with pytest.raises(UserError) as error:
        everything(folder_with(tmp_path, values))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_position_embeddings": 64.0}, "max_position_embeddings=64.0 is not a whole number"),
        ({"hidden_size": "64"}, "hidden_size='64' is not a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is not a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is not a whole number from 1 to 10000"),
        ({"vocab_size": -1}, "vocab_size=-1 is not a whole number"),
        ({"rope_theta": math.nan}, "rope_theta=nan is not a finite number"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps=inf is not a finite number"),
        (
            {"rope_scaling": {**LONGROPE, "long_factor": 4.0}},
            "rope_scaling.long_factor=4.0 is not a list of positive finite numbers",
        ),
        (
            {"rope_scaling": {**LONGROPE, "short_factor": [1.0] * 7}},
            "rope_scaling.short_factor has 7 numbers, and a rotary dimension of 16",
        ),
        (
            {"rope_scaling": {**LONGROPE, "long_factor": [1.0, math.nan]}},
            "rope_scaling.long_factor[1]=nan is not a finite number",
        ),
        ({"auto_map": 3}, "auto_map=3 is not an object"),
        ({"hidden_act": 3}, "config.json makes no transformers config"),
        ({"num_attention_heads": 5}, "config.json makes no transformers config"),
        ({"model_type": ["llama"]}, "model_type=['llama'], which transformers does not know"),
        ({"model_type": "bert"}, "has no plain linear head"),
        ({"model_type": "t5"}, "model_type='t5', which is no causal language model"),
        ({"hidden_act": "nonsense"}, "transformers cannot build a model of type llama from its config"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, changes, said):
    assert said in said_of(tmp_path, BASE | changes)


@pytest.mark.parametrize("key", [*BASE, "rope_scaling", "rope_parameters", "head_dim", "sliding_window",
"tie_word_embeddings", "id2label",
    "eos_token_id", "layer_types", "attention_dropout", "num_labels", "attn_implementation", "quantization_config",
    "partial_rotary_factor",
    "dtype", "original_max_position_embeddings", "auto_map"])  # fmt: skip
def test_every_kind_of_value_is_accepted_or_refused_in_a_sentence(tmp_path, key):
    for value in VALUES:
        assert "\n" not in outcome(folder_with(tmp_path, BASE | {key: value}))


@pytest.mark.parametrize(
    "key", [*LONGROPE, "factor", "attention_factor", "short_mscale", "rope_theta", "rope_type", "mrope_section"]
)
def test_every_kind_of_value_in_a_rope_dict_is_accepted_or_refused_in_a_sentence(tmp_path, key):
    for value in VALUES:
        for name in ("rope_scaling", "rope_parameters"):
            assert "\n" not in outcome(folder_with(tmp_path, BASE | {name: LONGROPE | {key: value}}))


@pytest.mark.parametrize(
    "text", ["", "{", "null", "3", "[]", '"llama"', '{"model_type": "llama"', "\N{BROKEN BAR}", "[" * 100_000]
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json"):
        load.config_of(ModelConfig(path=str(tmp_path)))


def test_a_folder_that_names_a_kernel_of_the_hub_gets_transformers_own(tmp_path):
    for key in ("attn_implementation", "_attn_implementation"):
        hf_config = load.config_of(folder_with(tmp_path, BASE | {key: "somebody/kernel"}))
        assert hf_config._attn_implementation != "somebody/kernel"
        everything(ModelConfig(path=str(tmp_path)))
