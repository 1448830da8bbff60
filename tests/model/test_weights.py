"""The weights of a folder become the model that plain transformers makes, bit for bit, or are refused by name."""

import contextlib
import json
import shutil

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lr2train.config import ModelConfig, UserError
from lr2train.model import load, weight_files, weights

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
LONGROPE = {
    "type": "longrope", "short_factor": [1.0, 1.05, 1.1, 2.0], "long_factor": [1.0, 4.0, 8.0, 8.0],
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1, "mlp_only_layers": []}
FAMILIES = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 16},
    "phi3": {"model_type": "phi3", "num_key_value_heads": 4, "max_position_embeddings": 256,
    "original_max_position_embeddings": 64,
             "rope_scaling": LONGROPE, "rope_theta": 1e4},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    # more than ten: 10 comes after 9
    "mixtral": {"model_type": "mixtral", "num_local_experts": 12, "num_experts_per_tok": 2},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 8, "num_experts": 4, **EXPERTS},
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.5},
}  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
LAST = "model.layers.1.mlp.up_proj.weight"


def publish(folder, family: str = "llama", one_file: bool = False):
    """A folder as its owner publishes it, by transformers' own ``save_pretrained``; Llamas in one file, others in
    several.
    """
    torch.manual_seed(0)
    values = {**SIZES, **FAMILIES[family]}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(values.pop("model_type"), **values), dtype=torch.float32
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # norms too: a tensor in another's place shows
    model.save_pretrained(folder, max_shard_size="1GB" if one_file or "llama" in family else "20KB")
    return folder


def theirs(folder, dtype: str = "float32"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=load.DTYPES[dtype], trust_remote_code=False).eval()


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(a, b) -> None:
    """Parameters, buffers and logits, bit for bit."""
    for kind in (lambda model: dict(model.named_parameters()), lambda model: dict(model.named_buffers())):
        first, second = kind(a), kind(b)
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []
        assert [name for name in first if first[name].dtype != second[name].dtype] == []
    ids = torch.arange(30)[None] * 7 % SIZES["vocab_size"]
    with torch.no_grad():
        assert torch.equal(a(ids).logits, b(ids).logits)


@pytest.fixture
def llama(tmp_path):
    return publish(tmp_path / "llama")


def changed(folder, change):
    """The folder with ``change`` applied to the dict of its tensors."""
    tensors = load_file(folder / weight_files.FILE)
    change(tensors)
    save_file(tensors, folder / weight_files.FILE, {"format": "pt"})
    return folder


def refusal(folder, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        load.load_whole(folder, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- as transformers ----


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_folder_is_loaded_and_written_as_transformers_does(tmp_path, monkeypatch, family):
    monkeypatch.setattr(weights, "GROUP_BYTES", 9000)  # several groups
    base = publish(tmp_path / "base", family)
    for dtype in DTYPES:
        assert_same(load.load_whole(base, dtype), theirs(base, dtype))
    ours = load.load_whole(base)
    load.write_folder(ours, load.plain_config(ours.config), tmp_path / "written")
    assert_same(theirs(tmp_path / "written"), theirs(base))
    assert_same(load.load_whole(tmp_path / "written"), theirs(base))
    published, written = tensors_of(base), tensors_of(tmp_path / "written")
    assert published.keys() == written.keys(), "in the names in which the family is published"
    assert all(torch.equal(published[name], written[name]) for name in published)
    assert json.loads((tmp_path / "written" / "config.json").read_text())["architectures"] == [type(ours).__name__]


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "gpt_neox"])
def test_a_model_from_scratch_is_written_in_published_names(tmp_path, family):
    hf_config = load.config_of(ModelConfig(architecture={**SIZES, **FAMILIES[family]}))
    model = load.assembled(hf_config, "float32", load.scratch_weights(hf_config, 0), contextlib.nullcontext)
    load.write_folder(model, load.plain_config(hf_config), tmp_path / "m")
    assert tensors_of(tmp_path / "m").keys() == tensors_of(publish(tmp_path / "base", family)).keys()
    assert_same(theirs(tmp_path / "m"), model.eval())


def test_a_head_that_a_tied_config_stores_again_stays_tied(tmp_path):
    base = publish(tmp_path / "m", "llama, tied")
    changed(base, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    ours = load.load_whole(base)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert_same(ours, theirs(base))


def test_a_head_with_values_of_its_own_stays_untied_under_a_tied_config(tmp_path):
    base = publish(tmp_path / "m")
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": True}))
    ours = load.load_whole(base)
    assert_same(ours, theirs(base))
    assert ours.lm_head.weight is not ours.model.embed_tokens.weight
    assert ours.config.tie_word_embeddings is False
    load.write_folder(ours, values | {"tie_word_embeddings": True}, tmp_path / "written")
    assert json.loads((tmp_path / "written" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_missing_untied_head_is_refused(llama):
    changed(llama, lambda tensors: tensors.pop("lm_head.weight"))
    assert r"lack 1 tensors of the model (lm_head.weight)" in refusal(llama)


def test_only_the_head_of_a_tied_model_is_enough(tmp_path):
    base = publish(tmp_path / "m", "llama, tied")
    changed(base, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    assert_same(load.load_whole(base), theirs(base))


def test_buffers_of_older_versions_are_ignored(llama):
    changed(llama, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert_same(load.load_whole(llama), theirs(llama))


def test_a_base_model_without_prefix_is_loaded(tmp_path, llama):
    changed(
        llama,
        lambda tensors: [tensors.update({name.removeprefix("model."): tensors.pop(name)}) for name in list(tensors)],
    )
    assert "layers.0.mlp.up_proj.weight" in load_file(llama / weight_files.FILE)
    assert_same(load.load_whole(llama), theirs(llama))


# ---- which files count ----


def indexed(folder):
    """The folder in two shards with an index."""
    tensors = load_file(folder / weight_files.FILE)
    (folder / weight_files.FILE).unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    listed = {name: file for file, part in parts.items() for name in part}
    (folder / weight_files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder


def test_a_shard_that_the_index_does_not_name_is_not_read_and_said(llama, capsys):
    expected = theirs(llama)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(llama / weight_files.FILE).items()}
    indexed(llama)
    save_file(zeros, llama / "model-00003-of-00003.safetensors", {"format": "pt"})
    assert_same(load.load_whole(llama), expected)
    assert "model-00003-of-00003.safetensors not read" in capsys.readouterr().err
    assert [file.name for file in load.files_of(llama)] == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip


def test_files_of_a_single_file(llama):
    assert load.files_of(llama) == [llama / "config.json", llama / "model.safetensors"]


def test_an_index_beside_a_file_that_it_does_not_name_is_refused(llama):
    copy = (llama / weight_files.FILE).read_bytes()
    indexed(llama)
    (llama / weight_files.FILE).write_bytes(copy)
    assert "model.safetensors beside model.safetensors.index.json" in refusal(llama)


def test_a_tensor_in_two_shards_is_named(llama):
    indexed(llama)
    file = llama / "model-00002-of-00002.safetensors"
    save_file({**load_file(file), "lm_head.weight": torch.zeros(40, 32)}, file, {"format": "pt"})
    assert (
        "holds lm_head.weight twice, in model-00001-of-00002.safetensors and model-00002-of-00002.safetensors"
        in refusal(llama)
    )


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "has no readable weight_map"),
        ("[]", "has no readable weight_map"),
        ('{"weight_map": {}}', "has no readable weight_map"),
        ('{"weight_map": {"lm_head.weight": 3}}', "has no readable weight_map"),
        ('{"weight_map": {"lm_head.weight": "../other.safetensors"}}', "has no readable weight_map"),
        ('{"weight_map": {"lm_head.weight": "model-9.safetensors"}}', "model-9.safetensors does not exist, although"),
        (
            '{"weight_map": {"lm_heat": "model-00001-of-00002.safetensors"}}',
            "names 1 tensors that are not where it says (lm_heat)",
        ),
    ],
)
def test_an_index_that_is_wrong_is_refused(llama, index, words):
    indexed(llama)
    (llama / weight_files.INDEX).write_text(index)
    assert words in refusal(llama)


def test_pickled_weights_are_never_read(llama, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("must not unpickle"))
    (llama / weight_files.FILE).rename(llama / "pytorch_model.bin")
    assert "holds pickled weights (pytorch_model.bin)" in refusal(llama)


# ---- what does not fit ----


def test_layers_beyond_the_config_are_named(llama):
    values = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 1}))
    assert "9 tensors that have no place in the model (model.layers.1.input_layernorm.weight" in refusal(llama)


def test_a_missing_expert_is_named(tmp_path):
    base = publish(tmp_path / "m", "qwen3_moe", one_file=True)
    changed(base, lambda tensors: tensors.pop("model.layers.0.mlp.experts.2.gate_proj.weight"))
    assert "do not make up model.layers.0.mlp.experts.gate_up_proj" in refusal(base)
    changed(base, lambda tensors: tensors.pop("model.layers.0.mlp.experts.2.up_proj.weight"))
    assert (
        "model.layers.0.mlp.experts.gate_up_proj has shape [3, 32, 32] in the weights and [4, 32, 32] in the model"
        in refusal(base)
    )


def test_a_tensor_under_a_former_and_a_present_name_is_named(tmp_path):
    base = publish(tmp_path / "m", "gpt_neox", one_file=True)
    changed(base, lambda tensors: tensors.update({"lm_head.weight": tensors["embed_out.weight"].clone()}))
    assert "twice, as embed_out.weight and as lm_head.weight" in refusal(base)


def to_float8(tensors):
    tensors[LAST] = tensors[LAST].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    "change",
    [
        to_float8,
        lambda tensors: tensors.update({LAST: tensors[LAST].to(torch.int8)}),
        lambda tensors: tensors.update({LAST: tensors[LAST].to(torch.uint8)}),
        lambda tensors: tensors.update({LAST + "_scale_inv": torch.ones(1, 1)}),
        lambda tensors: tensors.update({LAST.replace("weight", "qweight"): tensors.pop(LAST).to(torch.int32)}),
        lambda tensors: tensors.update({LAST.replace("weight", "qzeros"): torch.ones(1, dtype=torch.int32)}),
        lambda tensors: tensors.update({LAST + ".absmax": torch.ones(1)}),
        lambda tensors: tensors.update({LAST + ".quant_state.bitsandbytes__nf4": torch.ones(1, dtype=torch.uint8)}),
    ],
)
def test_quantized_weights_are_refused_with_the_remedy(llama, change):
    assert "dequantize the model with transformers" in refusal(changed(llama, change))


def test_a_config_that_says_quantized_is_refused_before_weights_are_read(llama):
    values = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(
        json.dumps({**values, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    (llama / weight_files.FILE).unlink()
    assert "quant_method gptq); dequantize the model" in refusal(llama)


# ---- numbers ----


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_not_finite_is_named(llama, bad, dtype):
    def spoil(tensors):
        tensors[LAST][3, 4] = tensors[LAST][5, 6] = bad
        tensors["model.norm.weight"][0] = bad

    said = refusal(changed(llama, spoil), dtype=dtype)
    assert f"2 of the 768 numbers of {LAST} are not finite (1 more tensors hold such numbers)" in said


def test_a_finite_weight_that_the_dtype_cannot_hold_is_refused_with_another_dtype(llama):
    changed(llama, lambda tensors: tensors[LAST].__setitem__((0, 0), 1e6))
    assert_same(load.load_whole(llama, "bfloat16"), theirs(llama, "bfloat16"))
    said = refusal(llama, dtype="float16")
    assert (
        f"1 of the 768 numbers of {LAST} is not finite in float16, which is too narrow; set the dtype to bfloat16"
        in said
    )


def test_large_numbers_whose_sum_is_infinite_are_finite():
    assert weights.all_finite(torch.full((1000,), 3e38))
    assert weights.all_finite(torch.full((1000,), 6e4, dtype=torch.float16))
    assert not weights.all_finite(torch.tensor([3e38] * 1000 + [float("nan")]))
    assert weights.all_finite(torch.empty(0))


def on_ranks(rank: int, world: int, folder) -> list[str]:
    """The result of a divided load of each folder: the number of parameters, or the error."""
    from lr2train.training.deepspeed.scoring import load_sharded

    said = []
    for name in ("good", "spoilt", "fewer", "cut"):
        try:
            model = load_sharded(ModelConfig(path=str(folder / name)), torch.device("cpu"))
            said.append(f"{sum(parameter.ds_numel for parameter in model.parameters())} parameters")
        except UserError as error:
            said.append(str(error))
    return said


def test_a_divided_model_is_refused_alike_on_every_rank(tmp_path, llama):
    for name in ("good", "spoilt", "fewer", "cut"):
        shutil.copytree(llama, tmp_path / name)
    changed(tmp_path / "spoilt", lambda tensors: tensors[LAST].fill_(float("nan")))
    changed(tmp_path / "fewer", lambda tensors: tensors.pop(LAST))
    content = (tmp_path / "cut" / weight_files.FILE).read_bytes()
    (tmp_path / "cut" / weight_files.FILE).write_bytes(content[:-8])
    first, second = run_ranks(on_ranks, 2, tmp_path, tmp_path=tmp_path, timeout_s=120)
    assert first == second
    good, spoilt, fewer, cut = first
    assert good == f"{sum(parameter.numel() for parameter in theirs(llama).parameters())} parameters"
    assert spoilt == refusal(tmp_path / "spoilt")
    assert f"768 of the 768 numbers of {LAST} are not finite" in spoilt
    assert fewer == refusal(tmp_path / "fewer")
    assert "is damaged" in cut


# ---- nothing of a folder is run ----

CODE = "open({mark!r}, 'w').write('ran')\n"
MAP = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}


@pytest.fixture
def with_code(llama, tmp_path, monkeypatch):
    """A folder whose code would leave a mark, and a terminal that would say yes."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("must not ask"))
    (llama / "code.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    values = json.loads((llama / "config.json").read_text())
    (llama / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}))

    def write(model_type: str):
        (llama / "config.json").write_text(json.dumps({**values, "model_type": model_type, "auto_map": MAP}))
        return llama

    yield write
    assert not (tmp_path / "mark").exists()


def test_a_known_type_works_without_the_code_of_its_folder(with_code, tmp_path):
    folder = with_code("llama")
    ours = load.load_whole(folder)
    assert_same(ours, theirs(folder))
    load.write_folder(ours, load.plain_config(ours.config), tmp_path / "written")
    assert "auto_map" not in json.loads((tmp_path / "written" / "config.json").read_text())


def test_an_unknown_type_is_refused_in_a_sentence(with_code):
    said = refusal(with_code("mymodel"))
    assert "model_type='mymodel', which transformers does not know, and code of a model folder is never run" in said


def test_a_tokenizer_that_needs_code_is_refused(with_code):
    with pytest.raises(UserError, match="has no readable tokenizer"):
        load.load_tokenizer(with_code("llama"))
