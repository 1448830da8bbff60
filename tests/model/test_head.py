"""The form of the logits, measured on each family, and the chunked loss and the scores under it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lr2train.config import UserError
from lr2train.model import decode, rotary
from lr2train.model.head import PLAIN, LogitForm, form_of
from lr2train.model.loss import IGNORE, LossHead
from lr2train.model.score import score
from lr2train.rope import METHODS, Spectrum

SIZE = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = {
    "llama": ({}, PLAIN),
    "granite": ({"logits_scaling": 8.0}, LogitForm(0.125)),  # divides
    "hyperclovax": ({"logits_scaling": 0.25}, LogitForm(0.25)),  # multiplies by the same key
    "cohere": ({"logit_scale": 0.0625}, LogitForm(0.0625)),
    "gemma2": ({"final_logit_softcapping": 30.0}, LogitForm(1.0, 30.0)),
    "nanochat": ({}, LogitForm(1.0, 15.0)),
}


def tiny(family: str, device: str = "cpu", **changes):
    torch.manual_seed(0)
    values = {key: value for key, value in SIZE.items() if family != "cohere" or key != "head_dim"}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values, **changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_form_of_a_family_is_measured_without_its_weights(family):
    changes, expected = FAMILIES[family]
    model = tiny(family, "meta", **changes)
    before = dict(model._modules)
    found = form_of(model)
    assert found.softcap == expected.softcap
    assert found.scale == pytest.approx(expected.scale)
    assert dict(model._modules) == before
    assert model.config.vocab_size == SIZE["vocab_size"]


def test_another_form_is_refused(monkeypatch):
    model = tiny("llama")
    own = type(model).forward

    def squared(*args, **kwargs):
        out = own(*args, **kwargs)
        out.logits = out.logits**2
        return out

    monkeypatch.setattr(type(model), "forward", squared)
    with pytest.raises(UserError, match="LlamaForCausalLM computes its logits from its head in a form"):
        form_of(model)


@pytest.mark.parametrize("form", [LogitForm(0.125), LogitForm(3.0), LogitForm(1.0, 2.5), LogitForm(0.5, 1.5)])
@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("one_pass", [False, True])
def test_the_chunked_loss_equals_whole_logits(form, chunk, one_pass):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(12, 50, bias=False, dtype=torch.float64)
    head.weight.data = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    labels = torch.randint(50, (37,), generator=generator)
    labels[::3] = IGNORE
    value = LossHead(head, chunk, form, one_pass)(hidden, labels)
    ours = torch.autograd.grad(3 * value, (hidden, head.weight))
    logits = form.scale * (hidden @ head.weight.T)
    logits = logits if form.softcap is None else form.softcap * torch.tanh(logits / form.softcap)
    expected = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)
    theirs = torch.autograd.grad(3 * expected, (hidden, head.weight))
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_tokens_are_sampled_from_the_models_own_logits(family):
    """Scaled logits at temperature T are the products at T / scale; capped ones have their own distribution."""
    model = tiny(
        family, **FAMILIES[family][0] | ({"final_logit_softcapping": 0.5} if family == "gemma2" else {})
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    table = rotary.install(model, METHODS["none"](Spectrum(8, 10000.0, 32), 32))
    row = decode.Row([5, 9, 23], 20, lambda _: "short", seed=1)
    list(decode.decode(model, table, [row], temperature=0.7))
    draws, tokens = decode.Row([1], 1, lambda _: "short", seed=1), [5, 9, 23]
    for _ in range(20):
        with torch.no_grad():
            p = (model(torch.tensor([tokens])).logits[0, -1].double() / 0.7).softmax(-1)
        ordered = p.sort(descending=True, stable=True)
        place = int((ordered.values.cumsum(-1) <= draws.draw()).sum())
        tokens.append(int(ordered.indices[place]))
    assert row.tokens == tokens[3:]


@pytest.mark.parametrize("family", ["granite", "hyperclovax", "nanochat", "gemma2"])
def test_scores_equal_whole_logits(family):
    model = tiny(family, **FAMILIES[family][0]).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    factors = METHODS["longrope2"](Spectrum(8, 10000.0, 32), 128, critical_index=1, tail=[5.0] * 3)
    table = rotary.install(model, factors)
    tokens = np.random.default_rng(0).integers(3, 40, 30)
    found = score(model, table, "short", tokens, [(4, 9), (20, 29)])
    with torch.no_grad():
        log_p = model(torch.from_numpy(tokens)[None]).logits[0].double().log_softmax(-1)
    for nll, (start, stop) in zip(found.nlls, [(4, 9), (20, 29)], strict=True):
        expected = -sum(log_p[t - 1, tokens[t]].item() for t in range(start, stop))
        assert nll == pytest.approx(expected, rel=1e-4)
