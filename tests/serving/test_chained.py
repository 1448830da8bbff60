"""Folders of an export as bases of the next extension: what their own window is, and that it stays, bit for bit."""

import json

import pytest
import serving_families as families
import torch
from serving_families import L0, L, tokens

from lr2train.config import ModelConfig, UserError
from lr2train.model import load
from lr2train.rope import METHODS
from lr2train.rope import hf as rope_hf
from lr2train.serving import folders

CARDS = dict.fromkeys(folders.FOLDERS, "a card")
BASES = ("llama", "llama, llama3", "qwen2, yarn", "phi3, own short table", "olmo3, yarn in global layers")


def extended_again(base, folder, target):
    """The folder as `train` leaves it: the same weights, other factors, a longer window."""
    hf_config = load.config_of(ModelConfig(path=str(base)))
    spectrum = load.spectrum_of(hf_config, ModelConfig(path=str(base)))
    factors = METHODS["ntk"](spectrum, target)
    values = rope_hf.write(load.plain_config(hf_config), factors)
    load.write_folder(load.load_whole(base), values, folder, dtype=torch.float32)
    return families.Trained(folder, factors)


@pytest.mark.parametrize("family", BASES)
def test_two_and_long_are_extended_once_more(family, tmp_path):
    first = families.train(tmp_path / "model", family, torch.float32)
    folders.write(first.source("float32"), tmp_path / "first", folders.FOLDERS, CARDS)
    model, table = first.ours(torch.float32)
    for name, window, own in (("two", L0, "short"), ("long", L, "long")):
        again = extended_again(tmp_path / "first" / name, tmp_path / name, 2 * L)
        assert again.factors.spectrum.window_tokens == window
        folders.write(again.source("float32"), tmp_path / f"{name} again", folders.FOLDERS, CARDS)
        text, table.window = tokens(window), own
        later, later_table = again.ours(torch.float32)
        short = families.loaded(tmp_path / f"{name} again" / "short", torch.float32)
        with torch.no_grad():
            wanted = later(text).logits
            assert torch.equal(short(text).logits, wanted)
            error = (wanted - model(text).logits).abs().max() / wanted.abs().max()
        assert error == 0 if name == "two" else error < 1e-4  # long/ has the attention factor in its weights
        assert torch.equal(later_table.tables["short"].inv_freq, table.tables[own].inv_freq)
        config = json.loads((tmp_path / f"{name} again" / "long" / "config.json").read_text())
        assert rope_hf.BASE_ROPE not in config
        assert "short_inv_freq" not in str(config)


def test_a_dynamic_base_has_no_window_beyond_its_own():
    """There its table depends on the length of the text."""
    hf_config = load.config_of(ModelConfig(architecture={**families.SIZES, **families.FAMILIES["llama, dynamic"]}))
    assert load.spectrum_of(hf_config, ModelConfig(original_window_tokens=16)).window_tokens == 16
    with pytest.raises(UserError, match=r"model\.original_window_tokens=33 .* dynamic"):
        load.spectrum_of(hf_config, ModelConfig(original_window_tokens=33))


def test_the_early_type_name_su_loads_as_longrope(tmp_path):
    """transformers 5 itself refuses this name for Phi-3."""
    published = {**families.SIZES, **families.FAMILIES["phi3, own short table"]}
    published["rope_scaling"] = {**published["rope_scaling"], "type": "su"}
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = load.plain_config(load.config_of(ModelConfig(path=str(tmp_path))))
    assert config["rope_parameters"]["rope_type"] == "longrope"
    assert rope_hf.spectrum_of(config) == rope_hf.spectrum_of(published)
    overridden = load.config_of(ModelConfig(path=str(tmp_path), overrides={"initializer_range": 0.3}))
    assert (overridden.rope_parameters["rope_type"], overridden.initializer_range) == ("longrope", 0.3)
