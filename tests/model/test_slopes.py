"""Slopes of a document's loss: against differences of ``score``, in float64 weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lr2train.model import rotary
from lr2train.model.score import score
from lr2train.model.slopes import SlopeModel
from lr2train.rope import METHODS, Spectrum

SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 64,
    "initializer_range": 0.2,
}  # fmt: skip
SPANS = ((100, 104), (150, 153))
SPECTRUM = Spectrum(16, 10000.0, 64)
FACTORS = replace(METHODS["yarn"](SPECTRUM, 256), attention_factor=1.15)
TOKENS = np.random.default_rng(0).integers(0, 60, 160)


def model_of(family: str):
    torch.manual_seed(1)
    if family == "sliding":
        return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=40)).double().eval()
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).double().eval()


class Exact(torch.nn.Module):
    """RoPE in float64, with gradients; transformers computes all the rest."""

    def __init__(self, log_rescale, attention_factor):
        super().__init__()
        self.inv_freq = torch.tensor(SPECTRUM.inv_freq) * (-log_rescale).exp()
        self.attention_factor = attention_factor

    def forward(self, x, position_ids, **_):
        angles = position_ids[..., None].double() * self.inv_freq
        angles = torch.cat((angles, angles), -1)
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor


def reference(model) -> tuple[list[float], np.ndarray, float]:
    logs = torch.tensor(FACTORS.rescale, dtype=torch.float64).log().requires_grad_()
    factor = torch.tensor(FACTORS.attention_factor, dtype=torch.float64, requires_grad=True)
    model.base_model.rotary_emb = Exact(logs, factor)
    tokens = torch.from_numpy(TOKENS)[None]
    losses = -model(tokens).logits[0, :-1].log_softmax(-1)[torch.arange(len(TOKENS) - 1), tokens[0, 1:]]
    answers = [losses[start - 1 : stop - 1].sum() for start, stop in SPANS]
    by_logs, by_factor = torch.autograd.grad(sum(answers), (logs, factor))
    return [float(one.detach()) for one in answers], by_logs.numpy(), float(by_factor)


@pytest.mark.parametrize("family", ["llama", "sliding"])
@pytest.mark.parametrize("recompute", [False, True])
def test_slopes_are_those_of_plain_transformers_in_float64(family, recompute):
    nlls, by_logs, by_factor = reference(model_of(family))
    model = model_of(family)
    table = rotary.install(model, FACTORS)
    found = SlopeModel(model, table, recompute)(TOKENS, SPANS)
    # our table and its slopes are in fp32: angles of up to 160 rad have an error of 1e-5
    assert found.nlls == pytest.approx(nlls, rel=1e-4)
    np.testing.assert_allclose(found.log_rescale, by_logs, atol=1e-3 * np.abs(by_logs).max())
    assert found.attention_factor == pytest.approx(by_factor, rel=1e-3)


def test_the_model_scores_as_before():
    model = model_of("llama")
    table = rotary.install(model, FACTORS)
    before = score(model, table, "long", TOKENS, SPANS)
    table.window = "short"
    SlopeModel(model, table, recompute=True)(TOKENS, SPANS)
    assert score(model, table, "long", TOKENS, SPANS) == before
    assert model.config._attn_implementation == "sdpa"
    assert not any(module.training for module in model.base_model.layers.modules())
