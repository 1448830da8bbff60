"""Greedy continuation of several prompts, against transformers' own ``generate`` for each prompt alone."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lr2train.model import greedy, rotary
from lr2train.model.load import plain_config
from lr2train.rope import METHODS
from lr2train.rope import hf as rope_hf

L0, L, V = 24, 96, 64
SIZES = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": L0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.4,  # so large that the next token depends on every position
}  # fmt: skip
LENGTHS = [7, 31, 20, 7]


@pytest.fixture(scope="module", params=["llama", "qwen3", "phi3", "mistral"])
def models(request):
    """(model with two tables, its table, {window: the same weights in plain transformers})."""
    own = {
        "phi3": {"original_max_position_embeddings": L0},
        "mistral": {"sliding_window": 9},
        "qwen3": {"head_dim": 8},
    }.get(request.param, {})
    torch.manual_seed(1)
    ours = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **SIZES, **own)).eval()
    spectrum = rope_hf.spectrum_of(plain_config(ours.config))
    factors = METHODS["longrope2"](
        spectrum, L, critical_index=1, tail=[5.0] * (spectrum.n_dims - 1), attention_factor=1.25
    )
    plain = {}
    for window in ("short", "long"):
        values = plain_config(ours.config)
        if window == "long":
            # one table for every length: transformers would choose by length
            values = rope_hf.write(values, factors)
            for rope in (values["rope_parameters"], values["rope_scaling"]):
                rope["short_factor"] = rope["long_factor"]
        plain[window] = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values)
        ).eval()
        plain[window].load_state_dict(ours.state_dict())
    return ours, rotary.install(ours, factors), plain


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, V, (length,), generator=generator) for length in LENGTHS]


def expected(model, prompt: torch.Tensor, n: int) -> list[int]:
    """transformers' generate; its end token is left out."""
    said = model.generate(prompt[None], max_new_tokens=n, do_sample=False, use_cache=True)[0, len(prompt) :].tolist()
    return said[: said.index(2)] if 2 in said else said


@pytest.mark.parametrize("window", ["short", "long"])
@pytest.mark.parametrize("chunk_tokens", [0, 5])
def test_rows_equal_generate(models, window, chunk_tokens):
    model, table, plain = models
    room = [12, 5, 30, 1]
    found = greedy.continue_prompts(model, table, window, prompts(), room, {2}, chunk_tokens=chunk_tokens)
    for one, prompt, n in zip(found, prompts(), room, strict=True):
        assert one.finite and one.tokens == expected(plain[window], prompt, n)


def test_the_window_matters(models):
    model, table, _ = models
    short, long = (greedy.continue_prompts(model, table, window, prompts(), [30] * 4) for window in ("short", "long"))
    assert short != long


def test_a_row_ends_where_its_caller_says(models):
    model, table, _ = models
    whole = greedy.continue_prompts(model, table, "short", prompts(), [10] * 4)
    ended = greedy.continue_prompts(
        model, table, "short", prompts(), [10] * 4, ended=lambda row, tokens: row == 1 and len(tokens) == 3
    )
    assert ended[1].tokens == whole[1].tokens[:3]
    assert [ended[row] for row in (0, 2, 3)] == [whole[row] for row in (0, 2, 3)]


def test_logits_that_are_not_finite_end_their_row_alone():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).eval()
    spectrum = rope_hf.spectrum_of(plain_config(model.config))
    table = rotary.install(model, METHODS["none"](spectrum, L))
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")
    good, bad = torch.tensor([7, 8, 9]), torch.tensor([7, 5, 9])
    alone = greedy.continue_prompts(model, table, "short", [good], [4])
    found = greedy.continue_prompts(model, table, "short", [good, bad], [4, 4])
    assert found[0] == alone[0] and found[0].finite
    assert not found[1].finite and found[1].tokens == []


def test_ranks_in_lockstep_make_as_many_calls_as_the_busiest():
    """What another rank needs is asked for by call; the results stay those of a rank alone."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).eval()
    table = rotary.install(model, METHODS["none"](rope_hf.spectrum_of(plain_config(model.config)), L))
    calls = []
    model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    alone = greedy.continue_prompts(model, table, "short", prompts(), [3] * 4)
    n_alone, others = len(calls), iter([9, 1, 1, 1, 1, 0, 0, 0])  # nine prefills, then five tokens
    calls.clear()
    lockstep = greedy.Lockstep(lambda mine: max(mine, next(others)))
    assert greedy.continue_prompts(model, table, "short", prompts(), [3] * 4, lockstep=lockstep) == alone
    assert (n_alone, len(calls)) == (4 + 2, 9 + 4)
