"""The CUDA kernels are called as they are documented: stand-ins keep the libraries' promises on CPU tensors.

Every stand-in computes attention written out, from the arguments that the real function takes. So a wrong mask, length
or order shows in the numbers. The real kernels run in ``tools.gpu.check``.
"""

import math
import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch

from lr2train.attention import cuda, kernel
from lr2train.attention.blocks import Block, CappedScale
from lr2train.attention.kernel import attend, attend_block
from lr2train.config import UserError
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


class FakeFlash2(ModuleType):
    """flash_attn.flash_attn_interface as flash-attn 2.7 has it."""

    @staticmethod
    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None,
    ):  # fmt: skip
        check_longest(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        lengths, window = (cu_seqlens_q, cu_seqlens_k, max_seqlen_k), (window_size_left, window_size_right)
        out, lse = varlen_like_flash(q, k, v, *lengths, softmax_scale, causal, *window, softcap)
        return out.to(q.dtype), lse.float(), None, None

    @staticmethod
    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        grads = backward_like_flash(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, softmax_scale, causal,
            window_size_left, window_size_right, softcap,
        )  # fmt: skip
        for into, grad in zip((dq, dk, dv), grads, strict=True):
            into.copy_(grad)


class FakeFlash3(ModuleType):
    """flash_attn_interface as flash-attn 3 has it."""

    @staticmethod
    def _flash_attn_forward(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
        causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
    ):  # fmt: skip
        lengths, window = (cu_seqlens_q, cu_seqlens_k, max_seqlen_k), (window_size_left, window_size_right)
        out, lse = varlen_like_flash(q, k, v, *lengths, softmax_scale, causal, *window, softcap)
        return out.to(q.dtype), lse.float(), torch.tensor([]), torch.tensor([])

    @staticmethod
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0,
    ):  # fmt: skip
        FakeFlash2._flash_attn_varlen_backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0,
            softmax_scale, is_causal, window_size_left, window_size_right, softcap, None, False,
        )  # fmt: skip


def check_longest(cu_q, cu_k, max_q, max_k):
    assert max_q == max(b - a for a, b in pairwise(cu_q.tolist()))
    assert max_k >= max(b - a for a, b in pairwise(cu_k.tolist()))


def cuda_flash(*args, **kwargs):
    """torch.ops.aten._flash_attention_forward, held to the schema of the installed torch."""
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


def cuda_flash_backward(*args, **kwargs):
    """torch.ops.aten._flash_attention_backward, likewise."""
    given = bound(torch.ops.aten._flash_attention_backward.default, args, kwargs)
    assert given["rng_state"].dtype == torch.uint64
    return backward_like_flash(
        given["grad_out"], given["query"], given["key"], given["value"], given["out"], given["logsumexp"],
        given["cum_seq_q"], given["cum_seq_k"], given["max_k"], given["scale"], given["is_causal"],
        given["window_size_left"], given["window_size_right"],
    )  # fmt: skip


def bound(operator, args, kwargs) -> dict:
    """Arguments by the names of an operator's schema."""
    names = [argument.name for argument in operator._schema.arguments]
    positional = [argument.name for argument in operator._schema.arguments if not argument.kwarg_only]
    assert len(args) <= len(positional)
    assert set(kwargs) <= set(names)
    required = {argument.name for argument in operator._schema.arguments if not argument.has_default_value()}
    given = dict(zip(positional, args, strict=False)) | kwargs
    assert required <= set(given)
    return given


@pytest.fixture(params=["flash_attn", "flash_attn_3", "torch_varlen"])
def cuda_kernel(request, monkeypatch):
    """A CUDA kernel by name, over its stand-in, serving CPU tensors. Tiles are cut as on CUDA: not at all."""
    package = ModuleType("flash_attn")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", FakeFlash2("flash_attn.flash_attn_interface"))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", FakeFlash3("flash_attn_interface"))
    monkeypatch.setattr(cuda, "_flash", cuda_flash)
    monkeypatch.setattr(cuda, "_flash_backward", cuda_flash_backward)
    monkeypatch.setattr(kernel, "kernel_name", lambda device: (request.param, "stand-in"))
    return request.param


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
    with pytest.raises(UserError, match=r"model.dtype=float32 .*set model.dtype to bfloat16"):
        attend(*random_qkv(96, 4, 2, 32), ((0, 96),), 0.2)
    for head_size in (12, 264):
        with pytest.raises(UserError, match=rf"head_dim={head_size} .*multiples of 8 up to 256"):
            attend(*random_qkv(96, 4, 2, head_size, torch.bfloat16), ((0, 96),), 0.2)


def test_the_cuda_kernel_is_flash_attn_where_it_is_new_enough(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    interface = FakeFlash2("flash_attn.flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    assert cuda.choose() == ("flash_attn", "flash_attn is installed")
    # As version 2.6 had it:
    interface._flash_attn_varlen_backward = lambda dout, q, k, v, out, lse, dq, dk, dv, window_size: None
    assert cuda.choose() == ("torch_varlen", "flash_attn is older than its functions that we call (2.7 of flash_attn)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", FakeFlash3("flash_attn_interface"))
    assert cuda.choose() == ("flash_attn_3", "flash_attn_3 is installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UserError, match="this GPU has compute capability 7.x and flash attention needs 8"):
        cuda.choose()
