"""Scores against whole logits of plain transformers, whole and in chunks, for families that differ in attention; and
the work that is saved.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lr2train.config import UserError
from lr2train.model import hidden, rotary
from lr2train.model.score import score, score_together
from lr2train.rope import METHODS, Spectrum

L0, VOCAB, T = 64, 400, 301
SPANS = ((60, 70), (5, 9), (298, 300))  # in any order; one crosses borders of chunks; nothing after 299 is needed
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": L0, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "initializer_range": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}  # fmt: skip
FAMILIES = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama_gqa": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "phi3": ("phi3", {}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 1.0}),  # its layers do not hand keyword arguments on
    "mistral_sliding": ("mistral", {"sliding_window": 50}),
    "qwen2_sliding_in_some_layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1},
    ),
    "mistral_sliding_at_the_end": ("mistral", {"sliding_window": 298}),
}
CHUNKS = (0, 1, 7, 64, 149, 298, 299, 1000)  # 149 and 298 leave a last chunk of one token


def make(family: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa"):
    """A random model of a family under a rescaled table, and its rotary."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, changes = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**SHAPE, **changes}), attn_implementation=attention
    )
    model = model.to(dtype).eval().requires_grad_(False)
    return model, rotary.install(
        model, METHODS["longrope2"](Spectrum(16, 1000.0, L0), 320, critical_index=3, tail=[5.0] * 5)
    )


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(2, VOCAB, T)


@torch.no_grad()
def from_whole_logits(model, table) -> list[float]:
    table.window = "long"
    log_p = model(torch.from_numpy(tokens())[None]).logits[0].log_softmax(-1)
    return [-sum(log_p[t - 1, tokens()[t]].item() for t in range(*span)) for span in SPANS]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_whole_logits_whatever_the_chunk(family, dtype, bound):
    model, table = make(family, dtype)
    expected = from_whole_logits(model, table)
    for chunk_tokens in CHUNKS:
        table.window = "short"
        found = score(model, table, "long", tokens(), SPANS, chunk_tokens)
        assert found.nlls == pytest.approx(expected, rel=bound), chunk_tokens
        assert found.nll == pytest.approx(sum(expected), rel=bound)
        assert found.n_tokens == 16
        assert from_whole_logits(model, table) == expected, "the model is as it was"


def test_the_size_of_a_mask_changes_no_score(monkeypatch):
    model, table = make("qwen2_sliding_in_some_layers", torch.float64)
    monkeypatch.setitem(hidden.MASK_CELLS, "cpu", 1000)  # one or two queries at a time
    assert score(model, table, "long", tokens(), SPANS, 100).nlls == pytest.approx(
        from_whole_logits(model, table), rel=1e-10
    )


def test_scores_of_all_tokens_equal_those_of_whole_logits():
    """Where most rows are wanted, the last layer computes all of them."""
    model, table = make("llama_gqa", torch.float64)
    table.window = "long"
    ids = torch.from_numpy(tokens())
    log_p = model(ids[None]).logits[0].log_softmax(-1)
    expected = -log_p[:-1].gather(1, ids[1:, None]).sum().item()
    for chunk_tokens in (0, 90):
        assert score(model, table, "long", tokens(), [(1, T)], chunk_tokens).nll == pytest.approx(expected, rel=1e-10)


def test_a_score_is_exact_where_greedy_decoding_produces_every_token():
    model, table = make("llama_gqa")
    table.window, text = "long", tokens()
    for t in (90, 91, 92):
        text[t] = int(model(torch.from_numpy(text[:t])[None]).logits[0, -1].argmax())
    for chunk_tokens in (0, 50):
        assert score(model, table, "long", text, [(90, 93)], chunk_tokens).exact
        assert not score(model, table, "long", text, [(90, 94)], chunk_tokens).exact


class Sizes(TorchDispatchMode):
    """Tokens that go into every linear layer and queries of every attention call, in order."""

    def __init__(self):
        super().__init__()
        self.linear: list[int] = []
        self.queries: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.linear.default:
            self.linear.append(args[0].shape[-2])
        elif func is torch.ops.aten.scaled_dot_product_attention.default:
            self.queries.append(args[0].shape[2])
        return func(*args, **(kwargs or {}))


def sizes_of(chunk_tokens: int) -> Sizes:
    model, table = make("llama")
    text = tokens()
    text[300:] = 10**9  # no token at all: it would raise where it were read
    with torch.inference_mode(), Sizes() as sizes:  # there a mode sees whole operators
        score(model, table, "long", text, SPANS, chunk_tokens)
    return sizes


def test_only_positions_that_the_answers_need_are_computed():
    sizes = sizes_of(0)
    assert sizes.queries == [299, 299, 16], "the last layer attends from the scored positions alone"
    assert sizes.linear[-1] == 16, "logits at the scored positions alone"
    assert max(sizes.linear) == 299, "nothing after the last answer"


def test_no_activation_is_longer_than_a_chunk():
    sizes = sizes_of(50)
    assert max(sizes.linear) == max(sizes.queries) == 50
    assert sum(sizes.queries) == 2 * 299 + 16
    assert sizes.linear[-1] == 16


def test_other_attention_runs_whole_and_refuses_chunks():
    model, table = make("llama_gqa", torch.float64, "eager")
    assert score(model, table, "long", tokens(), SPANS).nlls == pytest.approx(
        from_whole_logits(model, table), rel=1e-10
    )
    with pytest.raises(
        UserError, match=r"attention implementation eager does not run in chunks, sdpa does; set search.chunk_tokens=0"
    ):
        score(model, table, "long", tokens(), SPANS, 50)


def test_an_interrupted_pass_leaves_the_model_as_it_was(monkeypatch):
    model, table = make("llama_gqa")
    expected = from_whole_logits(model, table)

    def fail(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(hidden, "_attend_rows", fail)
        with pytest.raises(MemoryError):
            score(model, table, "long", tokens(), SPANS, 50)
    assert model.config._attn_implementation == "sdpa"
    assert from_whole_logits(model, table) == expected


@pytest.mark.parametrize("chunk_tokens", [0, 64])
def test_a_model_that_makes_its_own_mask_is_refused(monkeypatch, chunk_tokens):
    monkeypatch.setitem(FAMILIES, "doge", ("doge", {"head_dim": 16}))
    with pytest.raises(UserError, match="DogeAttention makes an attention mask of its own"):
        score(*make("doge"), "long", tokens(), SPANS, chunk_tokens)


def test_what_cannot_be_expressed_is_refused():
    model, table = make("llama_gqa")
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(
        UserError, match=r"LlamaForCausalLM has layers of type linear_attention and does not run in chunks"
    ):
        score(model, table, "long", tokens(), SPANS, 50)
    with pytest.raises(UserError, match=r"no token to score"):
        score(model, table, "long", tokens(), [(4, 4)])


@pytest.mark.parametrize("window", ["short", "long"])
def test_texts_together_equal_texts_alone(window):
    model, table = make("llama")
    rng = np.random.default_rng(0)
    texts = [(rng.integers(0, VOCAB, n), [(n - k, n)]) for n, k in ((40, 1), (12, 3), (57, 56), (40, 2))]
    for last in (3, 4, 5):  # these differ in their last token alone
        texts.append((np.append(texts[0][0][:-1], last), [(39, 40)]))
    calls = []
    model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    found = score_together(model, table, window, texts)
    assert calls == [torch.Size([4, 56])], "rows that differ in their last token alone are computed once"
    for one, (tokens, spans) in zip(found, texts, strict=True):
        alone = score(model, table, window, tokens, spans)
        assert one.nlls == pytest.approx(alone.nlls, rel=1e-5)
        assert (one.n_tokens, one.exact, one.right) == (alone.n_tokens, alone.exact, alone.right)
