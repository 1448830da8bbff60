"""Every strategy in whole models of every family: logits and gradients equal transformers' eager attention in fp64.

The reference is the family's model in one process, under an explicit block-diagonal mask (banded in layers that slide).
Ours computes in fp32, its tokens spread over real ranks as its strategy wants them. All cases of a number of ranks
share one launch.
"""

import copy
import itertools
from dataclasses import dataclass
from itertools import groupby

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lr2train.attention.hf import install
from lr2train.parallel.mesh import Mesh, make_mesh
from tests.attention.reference import mask_of, relative_error

N_TOKENS, VOCABULARY = 64, 64
# fp32 rounds at 6e-8. Two layers of some hundred sums add up to a few 1e-7, and to 4e-6 where a gradient nearly
# cancels.
TOLERANCE = 1e-5
SIZE = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128,
    "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "olmo2": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "stablelm": {"partial_rotary_factor": 0.5},  # its layers do not hand keyword arguments on
    "mixtral": {"num_local_experts": 4, "experts_implementation": "eager"},  # the default kernel takes no fp64
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "experts_implementation": "eager",
    },
}
CAPS = {"head_dim": 16, "query_pre_attn_scalar": 4, "attn_logit_softcapping": 0.7, "final_logit_softcapping": None}
SLIDING = {  # in every layer, in one of two, and one as long as the segment
    "mistral": {"sliding_window": 11},
    "phi3": {"sliding_window": 64},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "gemma2": {"sliding_window": 9, **CAPS},  # caps that bend most scores
    "qwen3": {"use_sliding_window": True, "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]},
}
SEGMENTS = {
    "short, aligned": ((0, 5), (5, 16), (16, 31), (32, 33), (33, 35), (36, 48), (48, 61)),  # crosses no border of 4
    "short": ((0, 5), (5, 21), (21, 22), (22, 47), (47, 49), (49, 60)),
    "long": ((0, 64),),
    "long by document": ((0, 41), (41, 64)),
    "long, with padding": ((0, 39),),  # some ranks hold nothing but padding
}
ALIGNED, EVERY = ("short, aligned",), tuple(SEGMENTS)
KINDS = ("short", "long", "long by document")


@dataclass(frozen=True)
class Case:
    """A model, and what it is to run."""

    family: str
    strategy: str
    segments: tuple[str, ...]
    changes: dict
    ring: int = 1


def tiny_model(family: str, changes: dict, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZE, "attn_implementation": "eager", **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).to(dtype)


def segment(spans) -> tuple[Tensor, Tensor, Tensor]:
    """ids [1, T], positions [1, T] that restart in each document, weights of a loss [1, T, V], 0 outside documents."""
    generator = torch.Generator().manual_seed(1)
    positions = torch.arange(N_TOKENS)
    weights = torch.randn(N_TOKENS, VOCABULARY, generator=generator, dtype=torch.float64)
    for start, stop in spans:
        positions[start:stop] = torch.arange(stop - start)
    weights[~mask_of(spans, N_TOKENS).any(-1)] = 0
    return torch.randint(VOCABULARY, (1, N_TOKENS), generator=generator), positions[None], weights[None]


def added_mask(spans, sliding_window: int | None) -> Tensor:
    """What eager attention adds to its scores, [1, 1, T, T]."""
    seen = mask_of(spans, N_TOKENS)
    if sliding_window is not None:
        seen = seen.triu(1 - sliding_window)
    return torch.zeros(1, 1, N_TOKENS, N_TOKENS, dtype=torch.float64).masked_fill(~seen, -1e30)


def masks_of(config, spans) -> dict[str, Tensor] | Tensor:
    """As the family's model takes them: of each type of layer where there are types, else one."""
    sliding_window = getattr(config, "sliding_window", None)
    if getattr(config, "layer_types", None) is None:
        return added_mask(spans, sliding_window)
    return {"full_attention": added_mask(spans, None), "sliding_attention": added_mask(spans, sliding_window)}


def forward_backward(model, ids: Tensor, positions: Tensor, weights: Tensor, **kwargs) -> Tensor:
    logits = model(input_ids=ids, position_ids=positions, use_cache=False, **kwargs).logits
    (logits * weights).sum().backward()
    return logits.detach()


def gradients(model) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def explicitly(family: str, changes: dict, spans) -> tuple[Tensor, dict[str, Tensor]]:
    model = tiny_model(family, changes, torch.float64)
    logits = forward_backward(model, *segment(spans), attention_mask=masks_of(model.config, spans))
    return logits, gradients(model)


def cases_of(world: int, whole: bool) -> list[Case]:
    """Llama under everything. ``whole``: the other families under each strategy with each kind of segment; else each
    of their strategies takes one kind, and each family meets all kinds: their attention is alike.
    """
    cases, turn = [], itertools.count()

    def kinds() -> tuple[str, ...]:
        return KINDS if whole else (KINDS[next(turn) % len(KINDS)],)

    for family, changes in FAMILIES.items():
        llama = family == "llama"
        cases.append(Case(family, "local", ALIGNED if world > 1 else EVERY if llama or whole else KINDS[:1], changes))
        for strategy in ("ulysses", "ring", "gather", "ulysses_ring"):
            ring = min(2, world) if strategy == "ulysses_ring" else 1
            cases.append(Case(family, strategy, EVERY if llama else kinds(), changes, ring))
    for family, changes in SLIDING.items():
        cases.append(Case(family, "local", ALIGNED, changes))
        cases += [Case(family, strategy, kinds(), changes) for strategy in ("ulysses", "ring", "gather")]
        cases.append(Case(family, "auto", EVERY if whole else kinds(), changes, ring=min(2, world)))
    return [case for case in cases if world < 4 or case.family in ("llama", "qwen2")]


def check_cases(rank: int, world: int, whole: bool) -> None:
    meshes = {ring: make_mesh(world, None, ring) for ring in {1, min(2, world)}} if world > 1 else {1: Mesh()}
    for (family, _), cases in groupby(cases_of(world, whole), key=lambda case: (case.family, case.changes)):
        alike = list(cases)
        changes = alike[0].changes
        names = dict.fromkeys(name for case in alike for name in case.segments)
        expected = {name: explicitly(family, changes, SEGMENTS[name]) for name in names}
        model = tiny_model(family, changes, torch.float32)
        for case in alike:
            attention = install(model, meshes[case.ring], case.strategy)
            for name in case.segments:
                check(model, attention, SEGMENTS[name], *expected[name], f"{case} {name}")


def check(model, attention, spans, expected_logits: Tensor, expected_gradients: dict[str, Tensor], what: str) -> None:
    """Inside documents the logits are this rank's part of the reference; gradients summed over ranks are the
    reference.
    """
    segment_attention = attention.segment(spans, N_TOKENS)
    layout = segment_attention.layout
    ids, positions, weights = (layout.shard(x, 1) for x in segment(spans))
    model.zero_grad()
    logits = forward_backward(model, ids, positions, weights, segment_attention=segment_attention)
    inside = layout.shard(mask_of(spans, N_TOKENS).any(-1), 0)
    if inside.any():
        assert relative_error(logits[0, inside], layout.shard(expected_logits, 1)[0, inside]) < TOLERANCE, what
    for name, grad in summed(gradients(model)).items():
        assert relative_error(grad, expected_gradients[name]) < TOLERANCE, f"{what} {name}"


def summed(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Over all ranks; in one collective, as ranks on few cores are slow to meet."""
    flat = torch.cat([grad.flatten() for grad in grads.values()])
    if dist.is_initialized():
        dist.all_reduce(flat)
    parts = flat.split([grad.numel() for grad in grads.values()])
    return {name: part.view_as(grad) for (name, grad), part in zip(grads.items(), parts, strict=True)}


HOW_MANY = pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "whole"])


@HOW_MANY
def test_on_one_rank(whole):
    check_cases(0, 1, whole)


@HOW_MANY
@pytest.mark.parametrize("world", [2, 4])
def test_on_ranks(world, whole, tmp_path):
    run_ranks(check_cases, world, whole, tmp_path=tmp_path, timeout_s=180)


# ---- how training calls a model ----


def check_modes(rank: int, world: int) -> None:
    mesh = make_mesh(world)
    for family in ("llama", "stablelm"):
        check_modes_of(family, {**FAMILIES[family]}, mesh)


def check_modes_of(family: str, changes: dict, mesh: Mesh) -> None:
    """Recomputed activations, accumulated gradients, eval mode, no_grad, while the strategy changes between calls."""
    plain = tiny_model(family, changes, torch.float64)
    sums: dict[str, Tensor] = {}
    model = copy.deepcopy(plain).float()
    attention = install(model, mesh)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name in ("short, aligned", "long", "short", "long by document", "short, aligned"):
        spans = SEGMENTS[name]
        logits, grads = explicitly(family, changes, spans)
        sums = {key: grad + sums.get(key, 0) for key, grad in grads.items()}
        segment_attention = attention.segment(spans, N_TOKENS)
        layout = segment_attention.layout
        ids, positions, weights = (layout.shard(x, 1) for x in segment(spans))
        inside = layout.shard(mask_of(spans, N_TOKENS).any(-1), 0)
        with torch.no_grad():
            given = {"position_ids": positions, "segment_attention": segment_attention, "use_cache": False}
            looked = model.eval()(ids, **given).logits
        trained = forward_backward(model.train(), ids, positions, weights, segment_attention=segment_attention)
        for found in (looked, trained):
            assert relative_error(found[0, inside], layout.shard(logits, 1)[0, inside]) < TOLERANCE, name
    for key, grad in summed(gradients(model)).items():
        assert relative_error(grad, sums[key]) < TOLERANCE, key


def test_modes_and_segments_in_turn(tmp_path):
    run_ranks(check_modes, 2, tmp_path=tmp_path)
