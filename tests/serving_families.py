"""Tiny trained-looking models of every family that `train` takes, windows 32 -> 128, and what they compute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lr2train.model import load, rotary
from lr2train.rope import METHODS, Factors
from lr2train.rope import hf as rope_hf
from lr2train.serving import folders

L0, L, VOCAB = 32, 128, 40
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": L0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
OWN_TABLE = {
    "type": "longrope", "short_factor": [1.0, 1.05, 1.1, 2.0], "long_factor": [1.0, 4.0, 8.0, 8.0],
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2, biases": {"model_type": "qwen2"},
    "qwen3, norms of a head": {"model_type": "qwen3", "head_dim": 16},
    "phi3, partial": {"model_type": "phi3", "partial_rotary_factor": 0.5, "original_max_position_embeddings": L0},
    "phi3, own short table": {
        "model_type": "phi3", "rope_scaling": OWN_TABLE, "original_max_position_embeddings": L0,
        "max_position_embeddings": 4 * L0,
    },
    "olmo2, norms of a projection": {"model_type": "olmo2"},
    "llama, llama3": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen2, yarn": {
        "model_type": "qwen2", "hidden_size": 64, "max_position_embeddings": 8,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    },
    "llama, linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama, dynamic": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "cohere, pairs": {"model_type": "cohere", "logit_scale": 1.0, "use_qk_norm": False},
    "glm, pairs, partial": {"model_type": "glm", "partial_rotary_factor": 0.5, "head_dim": 8},
    "gemma3, linear in global layers": {
        "model_type": "gemma3_text", "sliding_window": 12, "num_hidden_layers": 4, "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 8,
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    },
    "olmo3, yarn in global layers": {
        "model_type": "olmo3", "sliding_window": 12, "num_hidden_layers": 4, "max_position_embeddings": 16,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "attention_factor": 1.1386,
            "beta_fast": 32.0, "beta_slow": 1.0,
        },
    },
    "stablelm, partial, norms, biases": {
        "model_type": "stablelm", "partial_rotary_factor": 0.5, "qk_layernorm": True, "use_qkv_bias": True,
    },
    "smollm3, a layer without RoPE": {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "granite": {"model_type": "granite"},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox, partial": {"model_type": "gpt_neox", "rotary_pct": 0.5, "num_key_value_heads": 4},
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MORE: dict[str, dict[str, Any]] = {  # for tools/families.py alone
    "granite, scaled": {
        "model_type": "granite", "logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 8, "num_experts": 4, "mlp_only_layers": [], **_EXPERTS},
    "qwen2_moe": {
        "model_type": "qwen2_moe", "num_experts": 4, "shared_expert_intermediate_size": 16, "mlp_only_layers": [],
        **_EXPERTS,
    },
    "olmoe": {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {
        "model_type": "granitemoe", "num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 4.0,
    },
    "phimoe, without noise": {  # its router draws random numbers in training
        "model_type": "phimoe", "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0,
        "input_jitter_noise": 0.0,
    },
    "ernie4_5_moe": {
        "model_type": "ernie4_5_moe", "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16,
        "moe_layer_start_index": 0,
    },
    "olmo": {"model_type": "olmo"},
    "gemma": {"model_type": "gemma", "head_dim": 8},
    "gemma2, capped": {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 24},
    "cohere, pairs, logits scaled": {"model_type": "cohere"},
    "cohere2": {"model_type": "cohere2", "head_dim": 8, "sliding_window": 24},
    "starcoder2": {"model_type": "starcoder2"},
    "glm4": {"model_type": "glm4", "head_dim": 8},
    "ernie4_5": {"model_type": "ernie4_5", "head_dim": 8},
    "helium": {"model_type": "helium", "head_dim": 8},
    "seed_oss": {"model_type": "seed_oss", "head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "hyperclovax": {"model_type": "hyperclovax", "head_dim": 8, "logits_scaling": 0.5},
    "hunyuan_v1_dense": {"model_type": "hunyuan_v1_dense", "head_dim": 8},
    "arcee": {"model_type": "arcee", "head_dim": 8},
    "nanochat, capped": {"model_type": "nanochat", "head_dim": 8},
    "gpt_oss, sinks": {
        "model_type": "gpt_oss", "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "sliding_window": 24,
    },
    "diffllama": {"model_type": "diffllama", "head_dim": 8},
    "doge": {"model_type": "doge", "head_dim": 8},
    "nemotron": {"model_type": "nemotron", "head_dim": 8},
    "persimmon": {"model_type": "persimmon"},
    "phi": {"model_type": "phi"},
}  # fmt: skip


def tokens(length: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Random ids [rows, length], no special ones."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Trained:
    """A model folder as `train` leaves it, and its factors."""

    folder: Path
    factors: Factors

    def source(self, dtype: str) -> folders.Source:
        """For ``folders.write``."""
        values = load.plain_config(load.config_of(load.ModelConfig(path=str(self.folder))))
        return folders.Source(self.folder, values, self.factors, dtype)

    def ours(self, dtype: torch.dtype) -> tuple[Any, rotary.WindowRotary]:
        """The model under our own two tables; in fp64 the attention factor is not rounded to fp32."""
        model = loaded(self.folder, dtype)
        table = rotary.install(model, self.factors)
        if dtype == torch.float64:
            table.__class__ = ExactScale
        return model, table


class ExactScale(rotary.WindowRotary):
    """cos and sin as transformers has them, in fp32, times the attention factor in x's dtype."""

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``WindowRotary``."""
        if layer_type in self.fixed:
            return super().forward(x, position_ids, layer_type)
        scale, table = self.tables[self.window].attention_factor, self.tables[self.window]
        self.tables[self.window] = table._replace(attention_factor=1.0)
        cos, sin = super().forward(x, position_ids)
        self.tables[self.window] = table
        return cos.to(x.dtype) * scale, sin.to(x.dtype) * scale


def loaded(folder: Path, dtype: torch.dtype, **more: Any) -> Any:
    """By plain transformers, unless told otherwise."""
    attention = {} if dtype != torch.float64 else {"experts_implementation": "eager"}  # the default takes no fp64
    config = AutoConfig.from_pretrained(folder)
    attention = attention if hasattr(config, "num_local_experts") else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **attention, **more).eval()


def train(folder: Path, family: str, dtype: torch.dtype, factor: float = 1.3) -> Trained:
    """Random weights, norms and biases too: a row that is folded wrongly shows."""
    torch.manual_seed(0)
    values = {**SIZES, **FAMILIES[family]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values), dtype=dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 1.0)
    values = load.plain_config(model.config)
    spectrum = rope_hf.spectrum_of(values)
    tail = [4.5, 5.0, 5.5, 6.0, 7.0, 8.0, 8.5, 9.0][: spectrum.n_dims - 1]
    factors = METHODS["longrope2"](spectrum, L, critical_index=1, tail=tail, attention_factor=factor)
    load.write_folder(model, rope_hf.write(values, factors), folder, dtype=dtype)
    return Trained(folder, factors)
