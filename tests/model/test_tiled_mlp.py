"""An MLP in tiles equals the whole MLP: outputs and gradients in fp64, and how often it computes."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lr2train.config import EngineConfig, UserError
from lr2train.model import recompute, tiled_mlp

SIZE = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
DENSE = {"llama": {}, "phi3": {}, "gemma2": {"head_dim": 8}, "olmo2": {}, "gpt_neox": {}, "qwen3": {"head_dim": 8}}
EXPERTS = {"mixtral": {"num_local_experts": 2}, "qwen3_moe": {"num_experts": 2}, "granitemoe": {"num_local_experts": 2}}


def model_of(family: str, changes: dict, dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZE, **changes, attn_implementation="eager")
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).to(dtype).train()


def results(model, n_tokens: int) -> list[torch.Tensor]:
    """Logits, and the gradients of all weights."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(SIZE["vocab_size"], (1, n_tokens), generator=generator)
    logits = model(input_ids=tokens, use_cache=False).logits
    weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    (logits * weights).sum().backward()
    return [logits.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("how", ["none", "layer"])
def test_a_model_with_tiles_equals_the_model_without(family, how):
    expected = results(model_of(family, DENSE[family]), 29)
    tiled = model_of(family, DENSE[family])
    found = recompute.install(tiled, EngineConfig(recompute=how, tile_mlp=8))
    assert len(found) == SIZE["num_hidden_layers"]
    for own, wanted in zip(results(tiled, 29), expected, strict=True):
        assert (own - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@given(st.integers(1, 20), st.integers(1, 24))
def test_any_tile_of_any_number_of_tokens(n_tokens, tile):
    """Three matrices and a bias; the input is a view, and its gradient is asked for."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 3, bias=False)).double()
    x, grad = torch.randn(3, n_tokens, dtype=torch.float64).T.requires_grad_(), torch.randn(n_tokens, 3).double()
    tiled = tiled_mlp.TiledMLP(mlp.forward, tuple(mlp.parameters()), tile)
    wanted, found = (
        [out.detach(), *torch.autograd.grad(out, (x, *mlp.parameters()), grad)] for out in (mlp(x), tiled(x))
    )
    for one, other in zip(wanted, found, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-13 * one.abs().max().clamp(min=1)


@pytest.mark.parametrize(("how", "passes"), [("none", 2), ("layer", 2)])
def test_the_mlp_runs_once_forward_and_once_backward(how, passes):
    """Also in a recomputed layer, whose second pass stops in front of its MLP."""
    model, calls = model_of("llama", {}), Counter()
    recompute.install(model, EngineConfig(recompute=how, tile_mlp=8))
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda *_: calls.update(["down"]))
    results(model, 29)
    assert calls["down"] == passes * 4 * SIZE["num_hidden_layers"]  # 29 tokens in 4 tiles


def test_gradients_of_bfloat16_weights_are_summed_in_fp32():
    """Beside fp64, 64 tiles of one token are as good as the whole; a sum in bfloat16 would be worse."""
    torch.manual_seed(0)
    exact = nn.Linear(32, 32, bias=False).bfloat16()
    x, grad = torch.randn(64, 32).bfloat16().requires_grad_(), torch.randn(64, 32).bfloat16()
    wanted = grad.double().T @ x.double()
    tiled = tiled_mlp.TiledMLP(exact.forward, tuple(exact.parameters()), 1)
    errors = []
    for forward in (exact, tiled):
        (found,) = torch.autograd.grad(forward(x), (exact.weight,), grad)
        assert found.dtype == torch.bfloat16
        errors.append((found.double() - wanted).norm() / wanted.norm())
    in_bfloat16 = sum((g[:, None] * row for g, row in zip(grad, x, strict=True)), torch.zeros(32, 32).bfloat16())
    assert errors[1] < 1.5 * errors[0] < 0.5 * (in_bfloat16.double() - wanted).norm() / wanted.norm()


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_refused(family):
    with pytest.raises(UserError, match=r"engine.tile_mlp=8 .* has (experts|no such module); set engine.tile_mlp to 0"):
        recompute.install(model_of(family, EXPERTS[family]), EngineConfig(tile_mlp=8))


def test_dropout_is_refused():
    model = model_of("llama", {})
    model.model.layers[1].mlp.act_fn = nn.Dropout(0.1)
    with pytest.raises(UserError, match="has dropout in it; set engine.tile_mlp to 0"):
        tiled_mlp.install(model, 8)
