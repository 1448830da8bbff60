"""FLOP counts equal torch's own counter on transformers' Llama."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from lr2train.model import flops

LAYERS, HEADS, HEAD_SIZE, TOKENS = 2, 4, 8, 32


def counted(model, ids) -> tuple[float, float]:
    """FLOPs of the forward and of the backward pass, as torch counts matrix products."""
    with FlopCounterMode(display=False) as forward:
        loss = model(ids, use_cache=False).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_a_llama_costs_what_torch_counts():
    """Eager attention computes the masked pairs too: T * T pairs a head."""
    config = LlamaConfig(
        hidden_size=HEADS * HEAD_SIZE,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        vocab_size=64,
        attn_implementation="eager",
    )
    model = AutoModelForCausalLM.from_config(config)
    matrices = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and "embed_tokens" not in name]
    parameters, pairs = sum(weight.numel() for weight in matrices), LAYERS * HEADS * TOKENS**2
    forward, backward = counted(model, torch.arange(TOKENS)[None])
    assert forward == flops.linear_flops(parameters, TOKENS) + flops.attention_flops(pairs, HEAD_SIZE)
    assert backward == flops.BACKWARD * forward
    assert flops.training_flops(parameters, TOKENS, pairs, HEAD_SIZE) == forward + backward


def test_the_flash_kernel_computes_five_products_for_two():
    assert flops.attention_flops(100, 8) == 2 * 2 * 8 * 100
    assert flops.attention_flops(100, 8, flops.FLASH_BACKWARD) == 5 * 2 * 8 * 100


@pytest.mark.parametrize("span", [1024, 8192, 131072])
def test_a_causal_token_sees_half_of_its_document(span):
    pairs = sum(range(1, span + 1))
    assert flops.causal_pairs_per_token(span) * span == pytest.approx(pairs, rel=1e-3)
