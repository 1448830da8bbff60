"""A step of the engine over a mixture of experts, with its load-balancing loss, against plain transformers in fp64."""

import math

import numpy as np
import pytest
import torch
from batches import labels_of, positions_of
from ranks import run_ranks
from training.deepspeed.test_engine import L0, RELEASE_ALL, T, one_step, segment

from lr2train.config import ModelConfig, UserError
from lr2train.model import load
from lr2train.model.router import router_loss_of, summed

SIZE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": L0, "tie_word_embeddings": False, "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "output_router_logits": True,
    "router_aux_loss_coef": 0.5, "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "mixtral": {"num_local_experts": 4, "head_dim": 8},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8, "num_experts_per_tok": 3},
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
}
SEGMENTS = [0, 2, 4, 6]  # short windows: packed documents, padding
CASES = [(1, 1, 2), (2, 1, 1), (2, 2, 2)]  # world, sp, accumulation


def architecture(family: str) -> dict:
    return {"model_type": family, **SIZE, **FAMILIES[family]}


def steps(rank: int, world: int, family: str, cases: list[tuple[int, int, int]]):
    changes = {"deepspeed": RELEASE_ALL, "recompute": "keep_attention"}
    return [
        one_step(rank, world, sp, accumulation, SEGMENTS[: accumulation * world // sp], changes,
                 {"architecture": architecture(family)})
        for _, sp, accumulation in cases
    ]  # fmt: skip


def plainly(family: str, segments: list[int]):
    """Loss, router loss and gradients of transformers' own code; one segment a call, each with its padding masked."""
    from transformers import AutoConfig, AutoModelForCausalLM

    hf_config = load.config_of(ModelConfig(architecture=architecture(family)))
    state = {name: read() for name, read in load.scratch_weights(hf_config, 3).items()}
    config = AutoConfig.for_model(**architecture(family), experts_implementation="eager")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64)
    model.load_state_dict(state)
    model_code = __import__(type(model).__module__, fromlist=["x"])
    losses, targets, balances = [], 0, []
    for index in segments:
        batch = segment(index)
        mask, inside = torch.full((T, T), -math.inf, dtype=torch.float64), torch.zeros(1, T)
        for start, stop in (*batch.spans, *((t, t + 1) for t in range(batch.spans[-1][1], T))):
            mask[start:stop, start:stop] = torch.triu(mask[start:stop, start:stop], 1)
        for start, stop in batch.spans:
            inside[0, start:stop] = 1
        out = model.model(
            input_ids=torch.from_numpy(batch.tokens).long()[None],
            position_ids=torch.from_numpy(positions_of(batch)).long()[None],
            attention_mask=mask[None, None],
            use_cache=False,
            output_router_logits=True,
        )
        logits = model.lm_head(out.last_hidden_state)[0] / getattr(config, "logits_scaling", 1.0)
        labels = torch.from_numpy(labels_of(batch)).long()
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100))
        targets += batch.n_target_tokens
        n_experts = out.router_logits[0].shape[-1]
        balances.append(
            model_code.load_balancing_loss_func(out.router_logits, n_experts, config.num_experts_per_tok, inside)
        )
    loss, balance = sum(losses) / targets, sum(balances) / len(balances)
    (loss + SIZE["router_aux_loss_coef"] * balance).backward()
    return loss.item(), balance.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("world", [1, 2])
def test_loss_and_gradients_equal_transformers(family, world, tmp_path):
    cases = [case for case in CASES if case[0] == world]
    results = run_ranks(steps, world, family, cases, tmp_path=tmp_path)[0]
    for (_, sp, accumulation), (stats, gradients) in zip(cases, results, strict=True):
        loss, balance, expected = plainly(family, SEGMENTS[: accumulation * world // sp])
        assert stats.loss == pytest.approx(loss, rel=1e-6)
        assert stats.router_loss == pytest.approx(balance, rel=1e-6)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            error = np.abs(gradients[name] - gradient.numpy()).max() / gradient.abs().max().item()
            assert error < 2e-5, f"{family} sp={sp} accumulation={accumulation} {name}: {error:.1e}"


def test_without_the_flag_there_is_no_such_loss(capsys):
    hf_config = load.config_of(ModelConfig(architecture={**architecture("mixtral"), "output_router_logits": False}))
    model = load.build_empty(hf_config, "float32", lambda: torch.device("meta"))
    assert router_loss_of(model) is None
    assert "router_aux_loss_coef=0.5 adds no loss" in capsys.readouterr().err


def test_another_loss_is_refused(monkeypatch):
    from transformers.models.mixtral import modeling_mixtral

    hf_config = load.config_of(ModelConfig(architecture=architecture("mixtral")))
    model = load.build_empty(hf_config, "float32", lambda: torch.device("meta"))
    found = router_loss_of(model)
    assert found is not None
    assert (found.coefficient, found.n_choices) == (0.5, 2)
    own = modeling_mixtral.load_balancing_loss_func
    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", lambda *given: own(*given) * 2)
    with pytest.raises(UserError, match="MixtralForCausalLM computes its router's loss in a way"):
        router_loss_of(model)
    monkeypatch.undo()
    forward = type(model).forward

    def with_another_weight(self, *args, **given):  # the same loss, and another share of it is added
        self.router_aux_loss_coef = 0.3
        return forward(self, *args, **given)

    monkeypatch.setattr(type(model), "forward", with_another_weight)
    with pytest.raises(UserError, match="MixtralForCausalLM computes its router's loss in a way"):
        router_loss_of(model)


def test_even_choices_cost_the_number_of_choices():
    """Every expert equally likely and equally often chosen: E * sum(k / E * 1 / E) = k."""
    gates = [torch.eye(4).roll(1, 0) * 1e-6 + torch.eye(4) * 2e-6]
    counts, probabilities = summed(gates, 2, torch.ones(4, dtype=torch.bool))
    assert counts.tolist() == [2, 2, 2, 2]
    assert (counts / 4 * probabilities / 4).sum().item() * 4 == pytest.approx(2, rel=1e-5)
