"""Generation across the window switch, against a slow reference that computes the whole text without a cache for every
token.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lr2train.config import UserError
from lr2train.model import rotary
from lr2train.model.decode import generate, window_of
from lr2train.model.load import plain_config
from lr2train.rope import METHODS
from lr2train.rope import hf as rope_hf

L0, L, V = 24, 96, 64
SIZES = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": L0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.4,  # so large that the next token depends on every position
}  # fmt: skip


def model_of(family: str):
    torch.manual_seed(1)
    own = {"original_max_position_embeddings": L0} if family == "phi3" else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **own)).eval()


@pytest.fixture(scope="module", params=["llama", "phi3"])
def models(request):
    """(model with two tables, its table, {window: the same weights in plain transformers})."""
    ours, short = model_of(request.param), model_of(request.param)
    spectrum = rope_hf.spectrum_of(plain_config(ours.config))
    factors = METHODS["longrope2"](spectrum, L, critical_index=1, tail=[5.0], attention_factor=1.25)
    values = rope_hf.write(plain_config(short.config), factors)
    long = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).eval()
    long.load_state_dict(short.state_dict())
    return ours, rotary.install(ours, factors), {"short": short, "long": long}


def prompt_of(length: int) -> list[int]:
    return torch.randint(3, V, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@torch.no_grad()
def logits_after(models, tokens: list[int], window: str | None = None) -> torch.Tensor:
    """transformers' longrope selects its long table by the text's length; a second model serves the short window."""
    window = window or ("short" if len(tokens) <= L0 else "long")
    assert window == "short" or len(tokens) > L0
    return models[2][window](torch.tensor([tokens]), use_cache=False).logits[0, -1]


def reference(models, prompt: list[int], n: int, window: str | None = None) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(logits_after(models, tokens, window).argmax()))
    return tokens[len(prompt) :]


@torch.no_grad()
def keeping_the_cache(models, prompt: list[int], n: int) -> list[int]:
    """As every family of transformers but Phi3 generates: the table changes, the cached keys stay."""
    model, table, _ = models
    tokens, cache, first = list(prompt), None, 0
    for _ in range(n):
        table.window = window_of(len(tokens), L0)
        positions = torch.arange(first, len(tokens))[None]
        out = model(torch.tensor([tokens[first:]]), position_ids=positions, past_key_values=cache, use_cache=True)
        cache, first = out.past_key_values, len(tokens)
        tokens.append(int(out.logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("length", [1, L0 - 12, L0 - 1, L0, L0 + 1, L0 + 20])
def test_greedy_text_equals_the_reference_across_the_switch(models, length):
    model, table, _ = models
    assert list(generate(model, table, prompt_of(length), 30, L0)) == reference(models, prompt_of(length), 30)


def test_a_kept_cache_no_switch_and_a_switch_one_token_off_each_change_the_text(models):
    model, table, _ = models
    prompt = prompt_of(L0 - 12)
    right = list(generate(model, table, prompt, 30, L0))
    assert keeping_the_cache(models, prompt, 30) != right, "keys of the old table"
    assert list(generate(model, table, prompt, 30, L0, window="short")) != right, "no switch"
    prompts = [prompt_of(length) for length in range(L0 - 10, L0)]  # several: a single token may agree by chance
    right = [list(generate(model, table, prompt, 14, L0)) for prompt in prompts]
    assert [list(generate(model, table, prompt, 14, L0 + 1)) for prompt in prompts] != right, (
        "a switch that comes one token late"
    )
    assert [list(generate(model, table, prompt, 14, L0 - 1)) for prompt in prompts] != right, "one token early"
    past = prompt_of(L0 + 1)
    assert keeping_the_cache(models, past, 30) == reference(models, past, 30), (
        "beyond the switch a cache is only faster"
    )


def test_a_named_window_serves_the_whole_text(models):
    model, table, _ = models
    assert list(generate(model, table, prompt_of(10), 30, L0, window="short")) == reference(
        models, prompt_of(10), 30, "short"
    )
    assert list(generate(model, table, prompt_of(L0 + 1), 9, L0, window="long")) == reference(
        models, prompt_of(L0 + 1), 9, "long"
    )
    assert table.window == "long"


def test_a_change_of_the_table_between_two_tokens_does_not_change_the_text(models):
    model, table, _ = models
    expected, tokens = reference(models, prompt_of(10), 20), []
    for token in generate(model, table, prompt_of(10), 20, L0):
        tokens.append(token)
        table.window = "long"
    assert tokens == expected


def test_text_ends_after_the_stop_token(models):
    model, table, _ = models
    text = reference(models, prompt_of(8), 30)
    stop = text[6]
    assert list(generate(model, table, prompt_of(8), 30, L0, stop={stop, V})) == text[: text.index(stop)]


def test_samples_depend_on_the_seed_alone(models):
    model, table, _ = models

    def sample(seed: int) -> list[int]:
        return list(generate(model, table, prompt_of(15), 20, L0, temperature=1.5, top_p=0.95, seed=seed))

    first = sample(0)
    torch.manual_seed(99)  # whatever others draw
    assert sample(0) == first
    assert sample(1) != first


def test_samples_come_from_the_nucleus(models):
    """Against the definition: the smallest set of the likeliest tokens whose probabilities reach top_p."""
    model, table, _ = models
    tokens, outside_half = prompt_of(15), 0
    for token in generate(model, table, prompt_of(15), 25, L0, temperature=2.0, top_p=0.6, seed=3):
        probabilities = torch.softmax(logits_after(models, tokens) / 2.0, -1)
        above = probabilities[probabilities > probabilities[token]].sum().item()
        assert above < 0.6 + 1e-5  # the reference's float32 logits differ in their last bits
        outside_half += probabilities[token] < probabilities.max()
        tokens.append(token)
    assert outside_half > 0, "not only the likeliest"
    sampled = generate(model, table, prompt_of(15), 25, L0, temperature=2.0, top_p=1e-9, seed=3)
    assert list(sampled) == reference(models, prompt_of(15), 25), "a nucleus of one is greedy"


def test_an_empty_prompt_is_refused(models):
    with pytest.raises(UserError, match="the prompt is empty"):
        next(generate(models[0], models[1], [], 4, L0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(models, bad, temperature):
    model, table, _ = models
    norm, before = model.base_model.norm.weight.data, model.base_model.norm.weight.data.clone()
    norm[0] = bad
    try:
        with pytest.raises(UserError, match="logits after 8 tokens are not finite"):
            list(generate(model, table, prompt_of(8), 4, L0, temperature=temperature))
    finally:
        norm.copy_(before)
