"""Whole models of each family through transformers' attention interface, against the same with eager attention and an explicit mask."""

import copy
import logging

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lr2train.attention.hf import NAME, attention_forward, choose, install
from lr2train.config import UserError
from lr2train.parallel.layout import Layout
from lr2train.parallel.mesh import Mesh, make_mesh
from tests.attention.reference import mask_of, relative_error

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2")
N_TOKENS = 32
CROSSING = ((0, 5), (5, 21), (21, 29))  # and three tokens of padding
ALIGNED = ((0, 5), (5, 16), (16, 29))


def tiny_model(family: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    vocabulary = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}
    values = {**size, **vocabulary, "attn_implementation": "eager", "initializer_range": 0.2, **changes}
    config = AutoConfig.for_model(family, **values)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64)


def segment(spans) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input ids [1, T], position ids [1, T] that restart in each span, weights of a loss [1, T, V], zero outside the spans)."""
    generator = torch.Generator().manual_seed(1)
    positions, weights = torch.arange(N_TOKENS), torch.randn(N_TOKENS, 64, generator=generator, dtype=torch.float64)
    for start, stop in spans:
        positions[start:stop] = torch.arange(stop - start)
    weights[~mask_of(spans, N_TOKENS).any(-1)] = 0
    return torch.randint(64, (1, N_TOKENS), generator=generator), positions[None], weights[None]


def forward_backward(model, ids, positions, weights, **kwargs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids, position_ids=positions, use_cache=False, **kwargs).logits
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def explicitly(model, spans) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    mask = torch.zeros(1, 1, N_TOKENS, N_TOKENS, dtype=torch.float64).masked_fill(~mask_of(spans, N_TOKENS), -1e30)
    return forward_backward(model, *segment(spans), attention_mask=mask)


def check_model(model, mesh: Mesh, spans, expected, passed) -> None:
    """The shards' logits equal the whole's where a span is, and the gradients' sum over ranks equals the whole's."""
    layout = Layout("contiguous", N_TOKENS, mesh.sp_rank, mesh.sp_size)
    ids, positions, weights = (layout.shard(x, 1) for x in segment(spans))
    logits, grads = forward_backward(model, ids, positions, weights, spans=passed)
    inside = layout.shard(mask_of(spans, N_TOKENS).any(-1), 0)
    expected_logits, expected_grads = expected
    assert relative_error(logits[0, inside], layout.shard(expected_logits, 1)[0, inside]) < 1e-5
    for name, grad in grads.items():
        if dist.is_initialized():
            dist.all_reduce(grad, group=mesh.sp_group)
        assert relative_error(grad, expected_grads[name]) < 1e-5, name


def check_family(family: str, mesh: Mesh) -> None:
    plain = tiny_model(family)
    ours = copy.deepcopy(plain)
    install(ours, mesh)
    assert plain.config._attn_implementation == "eager"
    assert ours.model.config._attn_implementation == NAME
    whole = ((0, N_TOKENS),)
    cases = [(spans, explicitly(plain, spans), passed) for spans, passed in ((CROSSING, CROSSING), (ALIGNED, ALIGNED), (whole, None))]
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            ours.train()
        for spans, expected, passed in cases:
            check_model(ours, mesh, spans, expected, passed)


def check_families(rank: int, world: int) -> None:
    mesh = make_mesh(world)
    for family in FAMILIES:
        check_family(family, mesh)


def test_every_family_on_2_ranks(tmp_path):
    run_ranks(check_families, 2, tmp_path=tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_one_rank(family):
    check_family(family, Mesh())


# ---- choice ----


def test_auto_chooses_from_spans_and_says_why():
    two = Mesh(world=2, sp_size=2)
    assert choose("auto", CROSSING, 32, Mesh()) == ("local", "parallel.sp=1")
    assert choose("auto", ALIGNED, 16, two) == ("local", "every span lies inside one shard: nothing is sent")
    assert choose("auto", CROSSING, 16, two) == ("ulysses", "spans cross shard borders: heads are exchanged among 2 ranks")
    assert choose("ulysses", ALIGNED, 16, two)[0] == "ulysses"


def test_the_choice_is_logged_once_for_a_model(caplog):
    model = tiny_model("llama")
    install(model, Mesh())
    ids, positions, _ = segment(CROSSING)
    with caplog.at_level(logging.INFO, logger="lr2train.attention.hf"):
        for _ in range(2):
            model(input_ids=ids, position_ids=positions, spans=CROSSING, use_cache=False)
    assert [record.getMessage() for record in caplog.records] == ["attention strategy local: parallel.sp=1"]


# ---- refusals ----


@pytest.mark.parametrize(
    ("family", "changes", "mesh", "strategy", "text"),
    [
        ("llama", {}, Mesh(world=8, sp_size=8), "auto", r"num_attention_heads=4 cannot be shared by parallel.sp=8"),
        (
            "llama",
            {},
            Mesh(),
            "rings",
            r"parallel.strategy=rings is unknown; set parallel.strategy to one of \['auto', 'local', 'ulysses'\]",
        ),
        ("gemma2", {"head_dim": 16}, Mesh(), "auto", r"gemma2 caps attention scores \(attn_logit_softcapping=50.0\)"),
        ("bloom", {"n_head": 4}, Mesh(), "auto", "BloomForCausalLM does not use transformers' attention interface"),
    ],
)
def test_install_refuses(family, changes, mesh, strategy, text):
    with pytest.raises(UserError, match=text):
        install(tiny_model(family, **changes), mesh, strategy)


def test_layers_that_are_not_attention_over_spans_are_refused():
    """Linear attention and the like would restart on every shard."""
    model = tiny_model("llama")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(UserError, match=r"llama has layers of type linear_attention"):
        install(model, Mesh())


def test_local_alone_does_not_mind_the_heads():
    install(tiny_model("llama"), Mesh(world=8, sp_size=8), "local")


@pytest.mark.parametrize(
    ("changes", "kwargs", "text"),
    [
        ({"sliding_window": 15}, {"spans": CROSSING}, "sliding_window=15 of the model is shorter than a span of 16 tokens"),
        ({"sliding_window": 16}, {"spans": None}, "sliding_window=16 of the model is shorter than a span of 32 tokens"),
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


def test_a_sliding_window_as_long_as_the_longest_span_is_no_limit():
    model = tiny_model("mistral", sliding_window=16)
    install(model, Mesh())
    model(input_ids=segment(CROSSING)[0], use_cache=False, spans=CROSSING)


def test_a_key_cache_is_refused():
    model = tiny_model("llama")
    install(model, Mesh())
    cache = model(input_ids=torch.zeros(1, 4, dtype=torch.long)).past_key_values
    with pytest.raises(UserError, match="1 queries over 5 keys: neither cross attention nor a key cache"):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)


def test_a_batch_and_a_late_module_are_our_own_mistakes():
    model = tiny_model("llama")
    install(model, Mesh())
    with pytest.raises(AssertionError, match="batch of 2: one call takes one packed segment"):
        model(input_ids=torch.zeros(2, 4, dtype=torch.long))
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(AssertionError, match=r"Linear was not there when attention.hf.install ran"):
        attention_forward(nn.Linear(1, 1), x, x, x, None)
