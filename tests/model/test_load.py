"""Models in and out of folders: no tensor lost, none drawn at random, no folder half written."""

import contextlib
import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lr2train.config import ModelConfig, UserError
from lr2train.model import folder as folders
from lr2train.model import load, weights

ARCHITECTURE = {
    "model_type": "llama", "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}  # fmt: skip
LOST = "model.layers.1.mlp.up_proj.weight"


def built(seed: int = 0, dtype: str = "float32", **changes):
    """(model filled from scratch weights, its transformers config)."""
    hf_config = load.config_of(ModelConfig(architecture={**ARCHITECTURE, **changes}))
    return load.assembled(hf_config, dtype, load.scratch_weights(hf_config, seed), contextlib.nullcontext), hf_config


def written(folder, **changes):
    model, hf_config = built(**changes)
    load.write_folder(model, load.plain_config(hf_config), folder)
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [2**30, 4000])
def test_a_model_comes_back_as_it_was_written(tmp_path, monkeypatch, tied, shard_bytes):
    monkeypatch.setattr(folders, "SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(weights, "GROUP_BYTES", 3000)  # several groups too
    model = written(tmp_path / "m", tie_word_embeddings=tied)
    files = {file.name for file in (tmp_path / "m").glob("*.safetensors")}
    assert files == {"model.safetensors"} if shard_bytes > 4000 else len(files) > 2
    stored = {name: tensor for file in files for name, tensor in load_file(tmp_path / "m" / file).items()}
    assert stored.keys() == {name for name, _ in model.named_parameters()}, "each once: a tied head is not stored twice"
    back = load.load_whole(tmp_path / "m")
    assert same(back, model)
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == tied
    assert not back.training
    assert not any(parameter.requires_grad for parameter in back.parameters())


def test_the_index_names_every_file(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "SHARD_BYTES", 4000)
    model = written(tmp_path / "m")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in (tmp_path / "m").glob("*.safetensors")}
    assert index["metadata"]["total_size"] == 4 * sum(parameter.numel() for parameter in model.parameters())


def test_another_dtype_is_written_and_said(tmp_path):
    model, hf_config = built()
    load.write_folder(model, load.plain_config(hf_config), tmp_path / "m", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "m" / "model.safetensors").values()} == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters()), (
        "the model in training stays as it is"
    )
    assert torch.equal(load.load_whole(tmp_path / "m", "bfloat16").lm_head.weight, model.lm_head.weight.bfloat16())


def test_the_written_config_names_the_dtype_of_the_weights(tmp_path):
    """A float32 run of a model whose config says bfloat16: loaders cast to the dtype of the config and would lose
    bits.
    """
    model, hf_config = built()
    load.write_folder(model, {**load.plain_config(hf_config), "dtype": "bfloat16"}, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "float32"


def test_scratch_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = built(1)[0]
    assert torch.equal(torch.get_rng_state(), before), "nobody else's random numbers are used up"
    assert same(first, built(1)[0])
    assert not torch.equal(first.lm_head.weight, built(2)[0].lm_head.weight)


def test_a_full_disk_half_way_leaves_the_old_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "SHARD_BYTES", 4000)
    old = written(tmp_path / "m")
    names = {file.name for file in (tmp_path / "m").iterdir()}
    limits, largest = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        max(file.stat().st_size for file in (tmp_path / "m").iterdir()),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, limits[1]))  # a writer sees what it sees on a full disk
    try:
        with pytest.raises(UserError, match="cannot be written .* free some room"):
            written(tmp_path / "m", seed=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name for file in (tmp_path / "m").iterdir()} == names
    assert same(load.load_whole(tmp_path / "m"), old)
    new = written(tmp_path / "m", seed=1)
    assert same(load.load_whole(tmp_path / "m"), new)
    assert [file.name for file in tmp_path.iterdir()] == ["m"], "nothing is left lying about"


def test_further_files_of_a_folder_appear_with_it_or_not_at_all(tmp_path):
    model, hf_config = built()

    def complete(folder):
        (folder / "card").write_text("first")

    load.write_folder(model, load.plain_config(hf_config), tmp_path / "m", extras=complete)
    assert (tmp_path / "m" / "card").read_text() == "first"

    def killed(folder):
        (folder / "card").write_text("half")
        raise KeyboardInterrupt

    other, _ = built(seed=1)
    with pytest.raises(KeyboardInterrupt):
        load.write_folder(other, load.plain_config(hf_config), tmp_path / "m", extras=killed)
    assert (tmp_path / "m" / "card").read_text() == "first"
    assert same(load.load_whole(tmp_path / "m"), model)


def test_a_model_that_lacks_tensors_is_refused(tmp_path):
    """transformers would draw the missing tensors at random."""
    written(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    del tensors[LOST]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"lack 1 tensors of the model \({LOST}"):
        load.load_whole(tmp_path / "m")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_safetensors_cut_short_is_refused(tmp_path, share):
    written(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"model.safetensors is damaged .* fetch it again"):
        load.load_whole(tmp_path / "m")


def test_weights_of_another_shape_are_refused(tmp_path):
    written(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    with pytest.raises(
        UserError, match=r"mlp\.down_proj\.weight has shape \[16, 24\] in the weights and \[16, 32\] in the model"
    ):
        load.load_whole(tmp_path / "m")


def test_a_tensor_of_another_shape_is_refused_before_anything_is_built(tmp_path):
    """copy_ would broadcast a row into every row of the matrix."""
    written(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    save_file({**load_file(file), "lm_head.weight": torch.ones(16)}, file, {"format": "pt"})

    def init_context():
        pytest.fail("must not be built")

    hf_config = load.config_of(ModelConfig(path=str(tmp_path / "m")))
    with pytest.raises(UserError, match=r"lm_head\.weight has shape \[16\] in the weights and \[48, 16\] in the model"):
        load.assembled(hf_config, "float32", load.safetensors_of(tmp_path / "m"), init_context)


def test_overrides_are_laid_over_the_config_of_a_folder(tmp_path):
    written(tmp_path / "m", model_type="mistral", sliding_window=32)
    path = str(tmp_path / "m")
    assert load.config_of(ModelConfig(path=path)).sliding_window == 32
    hf_config = load.config_of(ModelConfig(path=path, overrides={"sliding_window": None}))
    assert hf_config.sliding_window is None
    assert (hf_config.hidden_size, hf_config.rope_parameters["rope_theta"]) == (16, 100.0)
    assert load.load_whole(path, overrides={"sliding_window": None}).config.sliding_window is None
    with pytest.raises(UserError, match=r"model\.overrides names slide, which MistralConfig does not have"):
        load.config_of(ModelConfig(path=path, overrides={"slide": 1}))
    with pytest.raises(UserError, match=r"model\.overrides: rms_norm_eps=nan is not a finite number"):
        load.config_of(ModelConfig(path=path, overrides={"rms_norm_eps": float("nan")}))
    with pytest.raises(UserError, match=r"model\.overrides makes no transformers config .*hidden_act"):
        load.config_of(ModelConfig(path=path, overrides={"hidden_act": 3}))


def test_overrides_are_laid_over_an_architecture():
    architecture = {"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": 64}
    hf_config = load.config_of(ModelConfig(architecture=architecture, overrides={"sliding_window": None}))
    assert (hf_config.sliding_window, hf_config.num_hidden_layers) == (None, 2)
    with pytest.raises(UserError, match=r"model\.overrides names slide, which MistralConfig does not have"):
        load.config_of(ModelConfig(architecture=architecture, overrides={"slide": 1}))
    with pytest.raises(UserError, match=r"model\.overrides: num_hidden_layers=-2 is not a whole number"):
        load.config_of(ModelConfig(architecture=architecture, overrides={"num_hidden_layers": -2}))


def test_a_folder_without_weights_is_refused(tmp_path):
    written(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no .safetensors weights"):
        load.load_whole(tmp_path / "m")
    with pytest.raises(UserError, match="has no readable tokenizer"):
        load.load_tokenizer(tmp_path / "m")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            {"path": "meta-llama/Meta-Llama-3-8B"},
            r"no local folder and downloads are off; .* model\.allow_download=true",
        ),
        ({"path": "runs/nothing-here"}, r"model\.path=runs/nothing-here is no folder"),
        ({"path": "/nowhere/at/all"}, r"is no folder; set model\.path"),
        ({}, r"model\.architecture has no model_type"),
        (
            {"architecture": {"model_type": "lama"}},
            r"model\.architecture makes no transformers config \(Unrecognized model identifier: lama",
        ),
        (
            {"architecture": {"model_type": "llama", "hidden_size": "wide"}},
            r"model\.architecture: hidden_size='wide' is not a whole number",
        ),
    ],
)
def test_a_missing_model_is_refused_with_the_key_to_set(monkeypatch, tmp_path, model, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        load.config_of(ModelConfig(**model))
    assert "\n" not in str(error.value)


def test_a_broken_config_is_named(tmp_path):
    written(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"has no readable config\.json"):
        load.load_whole(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="model_type='t5', which is no causal language model"):
        load.load_whole(tmp_path / "m")


def test_a_head_with_a_bias_is_refused():
    changes = {"model_type": "phi", "num_key_value_heads": 2, "pad_token_id": 0}
    hf_config = load.config_of(ModelConfig(architecture={**ARCHITECTURE, **changes}))
    with pytest.raises(UserError, match="PhiForCausalLM has no plain linear head without bias"):
        load.build_empty(hf_config, "float32", contextlib.nullcontext)


def test_the_original_window_can_be_named():
    hf_config = load.config_of(ModelConfig(architecture=ARCHITECTURE))
    assert load.spectrum_of(hf_config, ModelConfig()).window_tokens == 64
    assert load.spectrum_of(hf_config, ModelConfig(original_window_tokens=32)).window_tokens == 32


def test_the_fingerprint_changes_when_a_folder_is_written_anew(tmp_path):
    written(tmp_path / "m")
    first = load.folder_fingerprint(tmp_path / "m")
    assert load.folder_fingerprint(tmp_path / "m") == first
    written(tmp_path / "m", seed=1)
    assert load.folder_fingerprint(tmp_path / "m") != first
