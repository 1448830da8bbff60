"""The door to transformers reads a model's attention layers, logs the choice once, and refuses models that it cannot
serve.

Numbers are in test_families.py.
"""

import logging

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lr2train.attention.hf import (
    NAME,
    install,
    layers_of,
    refuse_config,
    refuse_device,
    refuse_jumps,
    ring_ranks,
    tell_windows,
)
from lr2train.config import ParallelConfig, UserError
from lr2train.parallel.layout import Layout
from lr2train.parallel.mesh import Mesh

N_TOKENS = 32
SIZE = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128,
    "attn_implementation": "eager", "initializer_range": 0.2,
}  # fmt: skip
CROSSING = ((0, 5), (5, 21), (21, 29))  # and three tokens of padding


def tiny_model(family: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZE, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64)


def segment(spans) -> tuple[torch.Tensor, torch.Tensor]:
    """(input ids [1, T], position ids [1, T] that restart in each span)."""
    generator = torch.Generator().manual_seed(1)
    positions = torch.arange(N_TOKENS)
    for start, stop in spans:
        positions[start:stop] = torch.arange(stop - start)
    return torch.randint(64, (1, N_TOKENS), generator=generator), positions[None]


# ---- what is read and logged ----


def test_the_choice_is_logged_once_for_a_model(caplog):
    model = tiny_model("llama")
    attention = install(model, Mesh())
    ids, positions = segment(CROSSING)
    with caplog.at_level(logging.INFO, logger="lr2train.attention.hf"):
        for _ in range(2):
            segment_attention = attention.segment(CROSSING, N_TOKENS)
            model(input_ids=ids, position_ids=positions, segment_attention=segment_attention, use_cache=False)
    said = [record.getMessage() for record in caplog.records if record.name == "lr2train.attention.hf"]
    assert said == ["attention strategy local: parallel.sp=1"]


def test_only_the_installed_model_changes():
    model, other = tiny_model("llama"), tiny_model("llama")
    install(model, Mesh())
    assert (model.model.config._attn_implementation, other.config._attn_implementation) == (NAME, "eager")


def test_the_layout_follows_the_strategy():
    mesh = Mesh(world=4, sp_size=4, sp_rank=1, ring_size=2)
    names = ("gather", "ring", "ulysses_ring")
    layouts = {name: install(tiny_model("llama"), mesh, name).segment(CROSSING, 32).layout for name in names}
    assert layouts == {
        "gather": Layout("contiguous", 32, 1, 4),
        "ring": Layout("zigzag", 32, 1, 4, spans=CROSSING),
        "ulysses_ring": Layout("zigzag_nested", 32, 1, 4, 2, CROSSING),
    }


SLIDING = ["sliding_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("llama", {}, ((None, 2),)),
        ("mistral", {"sliding_window": 7}, ((7, 2),)),
        ("phi3", {"sliding_window": None}, ((None, 2),)),
        ("qwen2", {"sliding_window": 7}, ((None, 2),)),  # use_sliding_window is False
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, ((None, 1), (7, 1))),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "layer_types": SLIDING}, ((7, 2),)),
    ],
)
def test_sliding_windows_are_read_by_layer(family, changes, windows):
    assert layers_of(tiny_model(family, **changes).config).sliding_windows == windows


def test_a_sliding_window_below_the_longest_document_is_logged(caplog):
    config = tiny_model("mistral", sliding_window=7).config
    with caplog.at_level(logging.INFO, logger="lr2train.attention.hf"):
        tell_windows(config, 7)
        assert not caplog.records
        tell_windows(config, 8)
    assert "2 layers of mistral attend to 7 tokens back and no further, in spans of up to 8" in caplog.text


# ---- refusals ----


def test_positions_may_not_jump_farther_than_a_sliding_window_reaches():
    qwen = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    for family, changes in (("mistral", {"sliding_window": 7}), ("qwen2", qwen)):
        config = tiny_model(family, **changes).config
        refuse_jumps(config, 7)
        with pytest.raises(UserError, match=r"attend to 7 tokens back.*distances up to 8; set data.long_positions"):
            refuse_jumps(config, 8)
    refuse_jumps(tiny_model("llama").config, 8)


def test_a_config_that_no_rank_could_run_is_refused_without_weights():
    config = tiny_model("llama").config
    refuse_config(config, ParallelConfig(sp=8), 32, 32, 8)
    assert ring_ranks(config, ParallelConfig(sp=8), 8) == 2
    with pytest.raises(UserError, match="num_attention_heads=4 .* parallel.sp=8"):
        refuse_config(config, ParallelConfig(sp=8, strategy="ulysses"), 32, 32, 8)
    with pytest.raises(UserError, match="parallel.ring=3 .* parallel.sp=8"):
        refuse_config(config, ParallelConfig(sp=8, ring=3), 32, 32, 8)


@pytest.mark.parametrize(
    ("family", "changes", "text"),
    [
        ("gpt_oss", {"head_dim": 16, "num_local_experts": 2}, "GptOssForCausalLM has attention sinks"),
        ("bloom", {"n_head": 4}, "BloomForCausalLM does not use transformers' attention interface"),
    ],
)
def test_install_refuses(family, changes, text):
    with pytest.raises(UserError, match=text):
        install(tiny_model(family, **changes), Mesh())


def test_what_the_gpu_does_not_compute_is_refused_before_weights_exist(monkeypatch):
    def refused(config, dtype, name="torch_varlen", device="cuda"):
        monkeypatch.setattr("lr2train.attention.hf.kernel_name", lambda device: (name, "under test"))
        try:
            refuse_device(config, dtype, torch.device(device))
        except UserError as error:
            return str(error)
        return None

    gemma, odd = tiny_model("gemma2", head_dim=16).config, tiny_model("llama", head_dim=12).config
    assert "gemma2 caps attention scores, " in refused(gemma, torch.bfloat16)
    assert refused(gemma, torch.bfloat16, "flash_attn") is None
    assert refused(gemma, torch.float32) is None, "the definition has a cap"
    assert "head_dim=12 has no flash attention on CUDA" in refused(odd, torch.bfloat16)
    assert refused(odd, torch.float32) is None
    assert "model.dtype=float16 needs flash attention" in refused(gemma, torch.float16, "explicit")
    assert refused(odd, torch.bfloat16, "cpu_flash", "cpu") is None


def test_value_heads_of_another_size_are_refused():
    from transformers import DeepseekV3Config

    with pytest.raises(UserError, match=r"deepseek_v3 .*128.*192"):
        refuse_config(DeepseekV3Config(), ParallelConfig(), 32, 32, 1)


def test_layers_that_are_not_attention_over_spans_are_refused():
    """Linear attention and the like would restart on every shard."""
    model = tiny_model("llama")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(UserError, match=r"llama .*linear_attention"):
        install(model, Mesh())


@pytest.mark.parametrize(
    ("changes", "kwargs", "text"),
    [
        ({"attention_dropout": 0.1}, {}, "attention_dropout=0.1 is not supported in training"),
        ({}, {"attention_mask": torch.zeros(1, 1, 32, 32)}, "an attention mask would be ignored"),
        ({}, {"is_causal": False}, "is not causal"),
        ({}, {"s_aux": torch.zeros(4)}, "wants attention sinks"),
    ],
)
def test_a_call_that_cannot_be_right_is_refused(changes, kwargs, text):
    model = tiny_model("mistral", **changes).train()
    install(model, Mesh())
    with pytest.raises(UserError, match=text):
        model(input_ids=segment(CROSSING)[0], use_cache=False, **kwargs)


def test_a_key_cache_is_refused():
    model = tiny_model("llama")
    attention = install(model, Mesh()).segment(((0, 4),), 4)
    cache = model(input_ids=torch.zeros(1, 4, dtype=torch.long), segment_attention=attention).past_key_values
    with pytest.raises(UserError, match="1 queries over 5 keys.*use_cache=False"):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)


@pytest.mark.parametrize("spans", [((0, 9), (5, 32)), ((0, 40),), ((16, 32), (0, 16)), ((0, 8), (8, 8))])
@pytest.mark.parametrize("strategy", ["auto", "ring", "gather"])
def test_malformed_spans_are_our_own_mistake_on_any_number_of_ranks(strategy, spans):
    """A ring and a gather would serve them, each rank some other part."""
    attention = install(tiny_model("llama"), Mesh(world=2, sp_size=2), strategy)
    with pytest.raises(AssertionError, match="not sorted, disjoint, non-empty ranges of 32 tokens"):
        attention.segment(spans, N_TOKENS)


def test_a_call_that_does_not_fit_its_segment_is_our_own_mistake():
    model = tiny_model("llama")
    attention = install(model, Mesh())
    with pytest.raises(AssertionError, match="batch of 2: one call takes one packed segment"):
        model(input_ids=torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(AssertionError, match="LlamaAttention was called without segment_attention"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    longer = attention.segment(((0, 5),), 5)
    with pytest.raises(AssertionError, match="4 queries, and a shard of this segment has 5 tokens"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), segment_attention=longer, use_cache=False)
