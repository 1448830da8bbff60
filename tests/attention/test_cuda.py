"""The CUDA kernels are called as they are documented, through the real interface files of the libraries.

The files of flash-attn 2 and 3 and the signatures of flash-attn 4 come from the registry (``flash_attn_files``). Below
them stand emulations of the compiled functions. An emulation computes attention written out, from the arguments that
reach it. So a wrong mask, length or order shows in the numbers. The real kernels run in ``tools.gpu.check``.
"""

import ast
import contextlib
import importlib
import importlib.util
import math
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lr2train.attention import cuda, kernel
from lr2train.attention.blocks import Block, CappedScale, Queries
from lr2train.attention.kernel import attend, attend_block
from lr2train.config import UserError
from tests.attention import flash_attn_files
from tests.attention.reference import TILES, attend_explicitly, explicit_tiles, gradients_explicitly, random_qkv
from tools.gpu.simulation import LayerInputs, simulate


def flash_mask(cu_q, cu_k, max_k, causal, left, right) -> torch.Tensor:
    """Flash attention's mask over packed tiles: diagonals aligned to the bottom right, windows in keys left and right.

    With a window to the left and none to the right, flash attention sets the right window to the longest keys
    (``set_params_fprop`` of flash-attn 2).
    """
    assert cu_q.dtype == cu_k.dtype == torch.int32
    mask = torch.zeros(int(cu_q[-1]), int(cu_k[-1]), dtype=torch.bool)
    right = 0 if causal else right
    right = max_k if left >= 0 > right else right
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        ahead = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        allowed = (ahead >= -right) if right >= 0 else torch.ones_like(ahead, dtype=torch.bool)
        mask[q0:q1, k0:k1] = allowed & (ahead <= left) if left >= 0 else allowed
    assert mask.any(1).all(), "a query that sees no key"
    return mask


def varlen_like_flash(q, k, v, cu_q, cu_k, max_k, scale, causal, left, right, softcap=0.0):
    """out [N, Hq, D], lse [Hq, N] of the capped scores."""
    mask = flash_mask(cu_q, cu_k, max_k, causal, left, right)
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    scores = capped(torch.einsum("ihd,jhd->hij", q, k).mul(scale), softcap).masked_fill(~mask, -math.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1)


def capped(scores, softcap):
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def backward_like_flash(grad_out, q, k, v, out, lse, cu_q, cu_k, max_k, scale, causal, left, right, softcap=0.0):
    """FlashAttention-2's formulas, with the out and the lse [Hq, N] that are handed in."""
    mask = flash_mask(cu_q, cu_k, max_k, causal, left, right)
    n_kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    assert lse.is_contiguous()
    inputs = (grad_out, q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), out)
    grad_out, q_, k_, v_, out = (x.double() for x in inputs)
    scores = capped(torch.einsum("ihd,jhd->hij", q_, k_) * scale, softcap)
    p = (scores - lse.double().unsqueeze(-1)).exp() * mask
    delta = (grad_out * out).sum(-1).T.unsqueeze(-1)
    ds = p * (torch.einsum("ihd,jhd->hij", grad_out, v_) - delta) * scale
    ds = ds * (1 - (scores / softcap) ** 2) if softcap else ds
    dq = torch.einsum("hij,jhd->ihd", ds, k_)
    by_query_head = torch.einsum("hij,ihd->jhd", ds, q_), torch.einsum("hij,ihd->jhd", p, grad_out)
    dk, dv = (x.unflatten(1, (n_kv_heads, group)).sum(2) for x in by_query_head)
    return [grad.to(q.dtype) for grad in (dq, dk, dv)]


# ---- the real interfaces over emulated C functions ----


class FlashAttention2(ModuleType):
    """flash_attn_2_cuda, which the interface file calls with positional arguments."""

    @staticmethod
    def varlen_fwd(
        q, k, v, out, cu_q, cu_k, used_k, leftpad_k, block_table, alibi_slopes, max_q, max_k, dropout_p, scale,
        zero_tensors, causal, left, right, softcap, return_softmax, generator,
    ):  # fmt: skip
        assert [out, used_k, leftpad_k, block_table, alibi_slopes, generator] == [None] * 6
        assert not (zero_tensors or return_softmax or dropout_p)
        check_longest(cu_q, cu_k, max_q, max_k)
        out, lse = varlen_like_flash(q, k, v, cu_q, cu_k, max_k, scale, causal, left, right, softcap)
        return out.to(q.dtype), lse.float(), q.new_empty(0), torch.zeros(2, dtype=torch.int64)

    @staticmethod
    def varlen_bwd(
        dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, alibi_slopes, max_q, max_k, dropout_p, scale, zero_tensors,
        causal, left, right, softcap, deterministic, generator, rng_state,
    ):  # fmt: skip
        assert [alibi_slopes, generator, rng_state] == [None] * 3
        assert not (zero_tensors or dropout_p)
        asked_for_order.append(deterministic)
        check_longest(cu_q, cu_k, max_q, max_k)
        fill(
            (dq, dk, dv),
            backward_like_flash(dout, q, k, v, out, lse, cu_q, cu_k, max_k, scale, causal, left, right, softcap),
        )
        return dq, dk, dv, lse.clone()


asked_for_order = []  # "deterministic" of every backward call


def fill(into, grads):
    for one, grad in zip(into, grads, strict=True):
        one.copy_(grad)


FLASH_3_OPERATORS = (  # as flash-attn 2.8.3's hopper/flash_api.cpp registers them; the sdist has no C++ of hopper
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)",
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0.0, bool deterministic=False, int sm_margin=0) "
    "-> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)",
)


flash_3_calls = []  # arguments, by name


def flash_3_fwd(*args, **kwargs):
    given = bound(torch.ops.flash_attn_3.fwd.default, args, kwargs)
    flash_3_calls.append(given)
    check_longest(given["cu_seqlens_q"], given["cu_seqlens_k"], given["max_seqlen_q"], given["max_seqlen_k"])
    out, lse = varlen_like_flash(*(given[name] for name in (
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_k", "softmax_scale", "is_causal",
        "window_size_left", "window_size_right", "softcap",
    )))  # fmt: skip
    assert given["num_splits"] == 1
    return out.to(given["q"].dtype), lse.float(), torch.empty(0), torch.empty(0)


def flash_3_bwd(*args, **kwargs):
    given = bound(torch.ops.flash_attn_3.bwd.default, args, kwargs)
    flash_3_calls.append(given)
    asked_for_order.append(given["deterministic"])
    check_longest(given["cu_seqlens_q"], given["cu_seqlens_k"], given["max_seqlen_q"], given["max_seqlen_k"])
    grads = backward_like_flash(*(given[name] for name in (
        "dout", "q", "k", "v", "out", "softmax_lse", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_k", "softmax_scale",
        "is_causal", "window_size_left", "window_size_right", "softcap",
    )))  # fmt: skip
    into = [given[name] for name in ("dq", "dk", "dv")]
    fill(into, grads)
    return (*into, *(torch.empty(0) for _ in range(5)))


def flash_4_fwd(given):
    """Four results and more, of which lse exists only where it is asked for."""
    assert given["return_lse"]
    assert given["out"] is given["lse"] is given["page_table"] is given["seqused_k"] is None
    check_longest(given["cu_seqlens_q"], given["cu_seqlens_k"], given["max_seqlen_q"], given["max_seqlen_k"])
    left, right = flash_4_windows(given)
    out, lse = varlen_like_flash(
        given["q"], given["k"], given["v"], given["cu_seqlens_q"], given["cu_seqlens_k"], math.inf,
        given["softmax_scale"], given["causal"], left, right, given["softcap"],
    )  # fmt: skip
    return out.to(given["q"].dtype), lse.float(), None, None, None


def flash_4_bwd(given):
    asked_for_order.append(given["deterministic"])
    check_longest(given["cu_seqlens_q"], given["cu_seqlens_k"], given["max_seqlen_q"], given["max_seqlen_k"])
    assert given["lse"].shape == (given["q"].shape[1], given["q"].shape[0])
    left, right = flash_4_windows(given)
    return tuple(backward_like_flash(
        given["dout"], given["q"], given["k"], given["v"], given["out"], given["lse"], given["cu_seqlens_q"],
        given["cu_seqlens_k"], math.inf, given["softmax_scale"], given["causal"], left, right, given["softcap"],
    ))  # fmt: skip


def flash_4_windows(given):
    """None is a window without an end (``_resolve_causal_local_window``); a negative size alone would be a window."""
    windows = given["window_size_left"], given["window_size_right"]
    assert all(size is None or size >= 0 for size in windows)
    return [-1 if size is None else size for size in windows]


def flash_4_module():
    """A module whose functions have the parameters of flash-attn 4's, over the emulation."""
    module = ModuleType("flash_attn.cute.interface")
    for name, parameters in flash_attn_files.flash_4_signatures().items():
        for one in (*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs):
            one.annotation = None
        body = ast.parse(f"return _emulated_{name[-3:]}(locals())").body
        made = ast.FunctionDef(name, parameters, body, [], type_params=[])
        tree = ast.fix_missing_locations(ast.Module([made], []))
        vars(module).update(_emulated_fwd=flash_4_fwd, _emulated_bwd=flash_4_bwd)
        exec(compile(tree, name, "exec"), module.__dict__)
    return module


def check_longest(cu_q, cu_k, max_q, max_k):
    assert max_q == max(b - a for a, b in pairwise(cu_q.tolist()))
    assert max_k >= max(b - a for a, b in pairwise(cu_k.tolist()))


def aten_flash(*args, **kwargs):
    """aten._flash_attention_forward; the dispatcher has held the call to the schema of the installed torch."""
    given = bound(torch.ops.aten._flash_attention_forward.default, args, kwargs)
    check_longest(given["cum_seq_q"], given["cum_seq_k"], given["max_q"], given["max_k"])
    assert given["dropout_p"] == 0.0
    window = given["window_size_left"], given["window_size_right"]
    assert given["is_causal"] == (window == (-1, 0)), "as torch.nn.attention.varlen calls it"
    out, lse = varlen_like_flash(
        given["query"], given["key"], given["value"], given["cum_seq_q"], given["cum_seq_k"], given["max_k"],
        given["scale"], given["is_causal"], given["window_size_left"], given["window_size_right"],
    )  # fmt: skip
    return out.to(given["query"].dtype), lse.float(), torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def aten_flash_backward(*args, **kwargs):
    """aten._flash_attention_backward, likewise."""
    given = bound(torch.ops.aten._flash_attention_backward.default, args, kwargs)
    assert given["rng_state"].dtype == torch.uint64
    return tuple(backward_like_flash(
        given["grad_out"], given["query"], given["key"], given["value"], given["out"], given["logsumexp"],
        given["cum_seq_q"], given["cum_seq_k"], given["max_k"], given["scale"], given["is_causal"],
        given["window_size_left"], given["window_size_right"],
    ))  # fmt: skip


def bound(operator, args, kwargs) -> dict:
    """Arguments by the names of an operator's schema, defaults filled in."""
    arguments = operator._schema.arguments
    positional = [argument.name for argument in arguments if not argument.kwarg_only]
    given = dict(zip(positional, args, strict=False)) | kwargs
    return {one.name: given.get(one.name, one.default_value) for one in arguments}


@contextlib.contextmanager
def torch_varlen():
    """torch's own operators, with a kernel for CPU tensors."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", aten_flash, "CPU")
        library.impl("_flash_attention_backward", aten_flash_backward, "CPU")
        yield


@contextlib.contextmanager
def flash_2(version):
    """flash-attn 2's own interface file, whose operators serve CUDA tensors, and CPU tensors for these tests."""
    with modules({"flash_attn": package(flash_attn_files.flash_2(version)), "flash_attn_2_cuda": FlashAttention2("c")}):
        interface = importlib.import_module("flash_attn.flash_attn_interface")
        for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
            operator = getattr(interface, name)
            operator.register_kernel("cpu")(operator._init_fn)
        yield


@contextlib.contextmanager
def flash_3():
    """flash-attn 3's own interface file over its operators."""
    file = flash_attn_files.flash_3()
    with torch.library._scoped_library("flash_attn_3", "DEF") as library:
        for schema, emulated in zip(FLASH_3_OPERATORS, (flash_3_fwd, flash_3_bwd), strict=True):
            library.define(schema)
            library.impl(schema.partition("(")[0], emulated, "CPU")
        with modules({"flash_attn_3": package(), "flash_attn_3._C": ModuleType("flash_attn_3._C")}):
            spec = importlib.util.spec_from_file_location("flash_attn_interface", file)
            sys.modules["flash_attn_interface"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules["flash_attn_interface"])
            yield


@contextlib.contextmanager
def flash_4():
    names = ("flash_attn", "flash_attn.cute")
    with modules({**{name: package() for name in names}, "flash_attn.cute.interface": flash_4_module()}):
        yield


def package(folder=None):
    made = ModuleType("package")
    made.__path__ = [] if folder is None else [str(folder)]
    return made


@contextlib.contextmanager
def modules(named):
    """Of flash-attn only ``named`` modules, and what they import, for as long as the context lasts."""
    before = dict(sys.modules)
    _forget_flash_attn()
    sys.modules.update(named)
    try:
        yield
    finally:
        _forget_flash_attn()
        sys.modules.update(before)


def _forget_flash_attn():
    for name in list(sys.modules):
        if name.startswith("flash_attn"):
            del sys.modules[name]


LIBRARIES = {
    "torch_varlen": torch_varlen,
    "flash_attn_3": flash_3,
    "flash_attn_4": flash_4,
    **{f"flash_attn {version}": partial(flash_2, version) for version in flash_attn_files.FLASH_2},
}


@pytest.fixture(params=LIBRARIES, scope="module")
def cuda_kernel(request):
    """A CUDA kernel by name, serving CPU tensors. Tiles are cut as on CUDA: not at all."""
    name = request.param.split()[0]
    with LIBRARIES[request.param](), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "kernel_name", lambda device: (name, "under test"))
        yield name


@pytest.mark.parametrize("sliding_window", [None, 1, 7])
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_cuda_kernels_are_called_as_they_are_documented(cuda_kernel, tiles, sliding_window):
    """Out, lse and gradients through the CUDA path equal the explicit ones, in bf16: 2e-2 is a few of its roundings."""
    (q, _, _), (_, k, v) = random_qkv(40, 4, 2, 16, torch.bfloat16), random_qkv(60, 4, 2, 16, torch.bfloat16, seed=1)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected, expected_lse, _ = explicit_tiles(*leaves, tiles, 0.3, sliding_window)
    expected_grads = torch.autograd.grad(expected, leaves, grad_out.double())
    out, lse = attend_block(*leaves, 0.3, Block(tiles, sliding_window))
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-2, rtol=1e-2)
    for grad, wanted in zip(torch.autograd.grad(out, leaves, grad_out), expected_grads, strict=True):
        assert (grad.double() - wanted.double()).abs().max() <= 2e-2 * max(1.0, wanted.abs().max())


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_libraries_are_told_to_add_in_a_fixed_order(cuda_kernel, deterministic):
    """torch's own operator asks torch itself; the backward of the others has a parameter."""
    asked_for_order.clear()
    (q, _, _), (_, k, v) = random_qkv(40, 4, 2, 16, torch.bfloat16), random_qkv(60, 4, 2, 16, torch.bfloat16, seed=1)
    block = Block(next(iter(TILES.values())))
    out, _ = attend_block(*(x.requires_grad_() for x in (q, k, v)), 0.3, block)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        out.float().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(asked_for_order) == (set() if cuda_kernel == "torch_varlen" else {deterministic})


@pytest.mark.parametrize("seed", range(6))
def test_rings_of_cuda_kernels(cuda_kernel, seed):
    """The tiles of a ring of 6 ranks under a sliding window, in bf16: 3e-2 is a few of its roundings."""
    generator = torch.Generator().manual_seed(seed)
    borders = sorted(torch.randperm(97, generator=generator)[:5].tolist())
    spans, sliding_window = tuple(pairwise(borders)), (5, 9, 17, 40, 9, None)[seed]
    q, k, v = random_qkv(96, 4, 2, 16, torch.bfloat16, seed)
    grad_out = torch.randn(q.shape, generator=generator).bfloat16()
    result = simulate("ring", LayerInputs(q, k, v, grad_out, spans, 0.3, sliding_window), 6)
    expected_out, _ = attend_explicitly(q, k, v, spans, 0.3, sliding_window=sliding_window)
    expected = [expected_out, *gradients_explicitly(q, k, v, spans, 0.3, grad_out, sliding_window=sliding_window)]
    for name, actual, wanted in zip(("out", "dq", "dk", "dv"), result, expected, strict=True):
        assert (actual.double() - wanted).abs().max() < 3e-2 * max(1.0, wanted.abs().max()), name


def test_a_cap_of_the_scores_reaches_the_kernels_that_have_one(cuda_kernel):
    """In bf16, against the CPU kernel in fp32; the cap bends most scores. torch's own kernel has none."""
    leaves = [x.requires_grad_() for x in random_qkv(40, 4, 2, 16, torch.bfloat16)]
    grad_out = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    spans, scale = ((0, 7), (7, 40)), CappedScale(0.5, 0.8)
    if cuda_kernel == "torch_varlen":
        with pytest.raises(UserError, match="torch's own flash attention does not cap scores"):
            attend(*leaves, spans, scale)
        return
    out, _ = attend(*leaves, spans, scale)
    found = torch.autograd.grad(out, leaves, grad_out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "kernel_name", lambda device: ("cpu_flash", "the reference"))
        exact = [x.detach().float().requires_grad_() for x in leaves]
        wanted, _ = attend(*exact, spans, scale)
        expected = torch.autograd.grad(wanted, exact, grad_out.float())
    for one, other in zip((out, *found), (wanted, *expected), strict=True):
        assert (one.float() - other).abs().max() <= 2e-2 * max(1.0, other.abs().max())


def test_what_cuda_does_not_serve_is_refused(cuda_kernel):
    for head_size in (12, 264):
        with pytest.raises(UserError, match=rf"head_dim={head_size} .*multiples of 8 up to 256"):
            attend(*random_qkv(96, 4, 2, head_size, torch.bfloat16), ((0, 96),), 0.2)


@pytest.mark.parametrize("sliding_window", [None, 1, 7])
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_float32_on_cuda_is_computed_by_the_definition(tiles, sliding_window, monkeypatch):
    """As exactly as on a CPU, whatever flash kernel is installed."""
    monkeypatch.setattr(kernel, "kernel_name", lambda device: ("torch_varlen", "under test"))
    (q, _, _), (_, k, v) = random_qkv(40, 4, 2, 12), random_qkv(60, 4, 2, 12, seed=1)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    expected, expected_lse, _ = explicit_tiles(*leaves, tiles, 0.3, sliding_window)
    expected_grads = torch.autograd.grad(expected, leaves, grad_out.double())
    out, lse = attend_block(*leaves, 0.3, Block(tiles, sliding_window))
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    for grad, wanted in zip(torch.autograd.grad(out, leaves, grad_out), expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), wanted.double(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
@pytest.mark.parametrize("sliding_window", [None, 9])
def test_strategies_in_float64_on_cuda_equal_one_rank(strategy, sliding_window, monkeypatch):
    monkeypatch.setattr(kernel, "kernel_name", lambda device: ("torch_varlen", "under test"))
    q, k, v = random_qkv(96, 4, 2, 16, torch.float64)
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spans = ((0, 17), (17, 60), (64, 96))
    result = simulate(strategy, LayerInputs(q, k, v, grad_out, spans, 0.3, sliding_window), 4)
    expected_out, _ = attend_explicitly(q, k, v, spans, 0.3, sliding_window=sliding_window)
    expected = [expected_out, *gradients_explicitly(q, k, v, spans, 0.3, grad_out, sliding_window=sliding_window)]
    for actual, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-11, rtol=1e-11)


def test_flash_attn_3_is_called_as_its_own_interface_file_calls_it():
    """The file hands over everything by position; our call by the operator's names gives the same arguments."""
    q, k, v = random_qkv(24, 4, 2, 16, torch.bfloat16)
    varlen = cuda.Varlen(*[torch.tensor([0, 9, 24], dtype=torch.int32)] * 2, 15, 15, 5, 0)
    lengths = (varlen.cu_q, varlen.cu_k), (varlen.max_q, varlen.max_k)
    softcapped, grads = CappedScale(0.3, 20.0), [torch.empty_like(x) for x in (q, k, v)]
    flash_3_calls.clear()
    with flash_3():
        interface = sys.modules["flash_attn_interface"]
        out, lse = cuda._flash3_forward(q, k, v, varlen, softcapped)
        interface._flash_attn_forward(
            q, k, v, None, None, None, None, *lengths[0], None, None, None, *lengths[1], *[None] * 9, 0.3,
            causal=True, window_size=(5, 0), softcap=20.0,
        )  # fmt: skip
        cuda._flash3_backward(Queries(q, out, lse, q), k, v, varlen, softcapped)
        interface._flash_attn_backward(
            q, q, k, v, out, lse, *lengths[0], None, None, *lengths[1], *grads, 0.3, True, (5, 0), 20.0
        )
    for ours, theirs in zip(flash_3_calls[::2], flash_3_calls[1::2], strict=True):
        differing = {name for name, one in ours.items() if differs(one, theirs[name])}
        assert differing <= {"is_rotary_interleaved"}, "of no meaning without rotary_cos"


def test_torchs_own_glue_of_flash_attn_3_calls_the_same_operators():
    """So ``activate_flash_attention_impl("FA3")`` could change nothing."""
    from torch.nn.attention import _fa3

    q, k, v = random_qkv(24, 4, 2, 16, torch.bfloat16)
    varlen = cuda.Varlen(*[torch.tensor([0, 9, 24], dtype=torch.int32)] * 2, 15, 15, 5, 0)
    lengths = varlen.cu_q, varlen.cu_k, varlen.max_q, varlen.max_k
    flash_3_calls.clear()
    with flash_3(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fa3, "_FA3_CUDA_FWD", torch.ops.flash_attn_3.fwd)
        patch.setattr(_fa3, "_FA3_CUDA_BWD", torch.ops.flash_attn_3.bwd)
        out, lse = cuda._flash3_forward(q, k, v, varlen, 0.3)
        _fa3._fa3_run_forward(q, k, v, *lengths, 0.3, True, 5, 0, None, num_splits=1)
        cuda._flash3_backward(Queries(q, out, lse, q), k, v, varlen, 0.3)
        _fa3._fa3_run_backward(q, q, k, v, out, lse, *lengths, 0.3, True, 5, 0)
    for ours, theirs in zip(flash_3_calls[::2], flash_3_calls[1::2], strict=True):
        assert {name for name, one in ours.items() if differs(one, theirs[name])} <= {"is_rotary_interleaved"}


def test_torchs_own_glue_of_flash_attn_4_does_not_fit_it():
    """``activate_flash_attention_impl("FA4")`` of torch 2.13 expects two results. Once it fits, this fails."""
    from torch.nn.attention import _fa4

    assert flash_attn_files.flash_4_results() == {5}
    q, k, v = random_qkv(24, 4, 2, 16, torch.bfloat16)
    lengths = *[torch.tensor([0, 9, 24], dtype=torch.int32)] * 2, 15, 15
    with flash_4(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fa4, "_FA4_MODULE_PATH", "flash_attn.cute.interface")
        patch.setattr(_fa4, "_fa4_import_module", importlib.import_module)
        with pytest.raises(ValueError, match="too many values to unpack"):
            _fa4._fa4_run_forward(q, k, v, *lengths, 0.3, True, -1, 0, None)


def differs(one, other):
    if isinstance(one, torch.Tensor):
        return one.shape != other.shape or one.dtype != other.dtype
    return one != other


def test_the_versions_under_test_are_those_that_are_pinned():
    root = Path(__file__).resolve().parents[2]
    pinned = "".join((root / f"requirements-flash-attn{which}.txt").read_text() for which in ("", "-4"))
    assert f"\nflash-attn=={flash_attn_files.FLASH_2[-1]}\n" in pinned
    assert f"\nflash-attn-4=={flash_attn_files.FLASH_4}\n" in pinned
    gpu = [line for line in (root / "requirements-gpu.txt").read_text().splitlines() if not line.startswith("#")]
    assert not any("flash" in line for line in gpu), "what pip has to compile is a step of its own"


def on_gpu(monkeypatch, *capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capability))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


def test_the_cuda_kernel_is_the_newest_library_that_the_gpu_can_run(monkeypatch):
    served = {
        flash_3: ("torch_varlen", "flash_attn_3", "torch_varlen"),
        flash_4: ("torch_varlen", "flash_attn_4", "flash_attn_4"),
        partial(flash_2, "2.8.3.post2"): ("flash_attn", "flash_attn", "flash_attn"),
    }
    for library, names in served.items():
        with library():
            for generation, name in zip((8, 9, 10), names, strict=True):
                on_gpu(monkeypatch, generation, 0)
                assert cuda.choose()[0] == name
    assert list(cuda.LIBRARIES) == ["flash_attn_3", "flash_attn_4", "flash_attn"], "the fastest first"
    with flash_4():
        assert cuda.refusal("flash_attn_4", 8) == "is built for compute capability 9.x and 10.x alone"
    with modules({}):
        on_gpu(monkeypatch)
        assert cuda.choose()[0] == "torch_varlen"
        assert "flash_attn is not importable: No module named 'flash_attn'" in cuda.choose()[1]


def test_an_old_library_is_passed_over_with_its_reason(monkeypatch):
    old = ModuleType("flash_attn.flash_attn_interface")  # as version 2.6 had it
    old._flash_attn_varlen_backward = lambda dout, q, k, v, out, lse, dq, dk, dv, cu_seqlens_q, window_size: None
    with modules({"flash_attn": package(), "flash_attn.flash_attn_interface": old}):
        assert cuda.refusal("flash_attn", 8) == "is older than 2.7"
    bundled = ModuleType("flash_attn.cute.interface")  # as flash-attn 2.8.3 installs it
    bundled._flash_attn_bwd = lambda q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0: None
    packages = {name: package() for name in ("flash_attn", "flash_attn.cute")}
    with modules({**packages, "flash_attn.cute.interface": bundled}):
        assert cuda.refusal("flash_attn_4", 10) == "is older than 4.0.0b8"

    def broken(name):
        raise RuntimeError("undefined symbol\nof torch")

    monkeypatch.setattr(importlib, "import_module", broken)
    assert cuda.refusal("flash_attn", 8) == "is not importable: undefined symbol of torch"


def test_a_gpu_older_than_flash_attention_computes_float32_alone(monkeypatch):
    on_gpu(monkeypatch, 7, 5)
    assert cuda.choose() == ("explicit", "this GPU has compute capability 7.x, and flash attention needs 8 (A100)")
    chosen = cuda.KERNELS["explicit"]
    chosen.check(torch.empty(1, 1, 12))
    with pytest.raises(UserError, match=r"model.dtype=bfloat16 needs flash attention, .*set model.dtype to float32"):
        chosen.check(torch.empty(1, 1, 16, dtype=torch.bfloat16))


def test_blackwell_has_no_flash_attn_4_for_some_head_sizes(monkeypatch):
    on_gpu(monkeypatch, 10, 0)
    chosen = cuda.KERNELS["flash_attn_4"]
    for size in (64, 128, 256):
        chosen.check(torch.empty(1, 1, size, dtype=torch.bfloat16))
    with pytest.raises(UserError, match="head_dim=192 has no kernel in flash-attn-4 .*; pip uninstall flash-attn-4"):
        chosen.check(torch.empty(1, 1, 192, dtype=torch.bfloat16))
    on_gpu(monkeypatch, 9, 0)
    chosen.check(torch.empty(1, 1, 192, dtype=torch.bfloat16))


# ---- what follows from the installed torch ----

SCHEMAS = {  # of torch 2.13; a new torch needs its change read, and then a new line here
    "_flash_attention_forward": "(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
    "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
    "SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None, "
    "Tensor? block_table=None, int? num_splits=None) -> (Tensor output, Tensor softmax_logsumexp, Tensor rng_state, "
    "Tensor unused, Tensor debug_attn_mask)",
    "_flash_attention_backward": "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
    "bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, SymInt? window_size_left=None, "
    "SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)",
    "_scaled_dot_product_flash_attention_for_cpu": "(Tensor query, Tensor key, Tensor value, float dropout_p=0., "
    "bool is_causal=False, *, Tensor? attn_mask=None, float? scale=None) -> (Tensor output, Tensor logsumexp)",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "(Tensor grad_out, Tensor query, Tensor key, "
    "Tensor value, Tensor out, Tensor logsumexp, float dropout_p, bool is_causal, *, Tensor? attn_mask=None, "
    "float? scale=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_raw_operators_are_those_that_the_kernels_were_written_for(name):
    assert str(getattr(torch.ops.aten, name).default._schema) == f"aten::{name}{SCHEMAS[name]}"


def test_the_fake_kernels_of_aten_agree_with_what_the_cuda_path_takes(monkeypatch):
    """Shapes and dtypes of out, lse and gradients, by the implementations that torch itself traces with."""
    monkeypatch.setattr(kernel, "kernel_name", lambda device: ("torch_varlen", "under test"))
    with FakeTensorMode():
        leaves = [x.requires_grad_() for x in random_qkv_empty(40, 8, 2, 64)]
        out, lse = attend(*leaves, ((0, 7), (7, 40)), 0.3, sliding_window=5)
        grads = torch.autograd.grad(out.sum(), leaves)
    assert (out.shape, out.dtype) == ((40, 8, 64), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((40, 8), torch.float32)
    assert [(grad.shape, grad.dtype) for grad in grads] == [(leaf.shape, leaf.dtype) for leaf in leaves]


def random_qkv_empty(n_tokens, heads, kv_heads, size):
    return [torch.empty(n_tokens, count, size, dtype=torch.bfloat16) for count in (heads, kv_heads, kv_heads)]
