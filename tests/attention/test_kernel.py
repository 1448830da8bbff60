"""The kernel door against attention written out in float64: out, lse, gradients, for any spans."""

import inspect
import math
import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lr2train.attention import kernel
from lr2train.attention.kernel import attend, kernel_name, merge
from lr2train.config import UserError
from tests.attention.reference import attend_explicitly, gradients_explicitly, random_qkv, relative_error

TORCH_VARLEN = torch.nn.attention.varlen.varlen_attn
FULL = ((0, 96),)
PACKED = ((0, 1), (3, 35), (35, 67), (70, 95))  # length 1, gaps, two equal neighbours
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}


def check(q, k, v, spans, causal=True, tolerance=1e-5):
    """Out, lse and gradients equal the explicit ones, and tokens outside spans are out 0, lse -inf, gradient 0."""
    scale = 0.7 / math.sqrt(q.shape[-1])
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves, spans, scale, causal)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    out.backward(grad_out)
    expected_out, expected_lse = attend_explicitly(q, k, v, spans, scale, causal)
    inside = expected_lse.isfinite()
    assert out.dtype == q.dtype
    assert out.shape == q.shape
    assert lse.shape == q.shape[:2]
    assert not lse.requires_grad
    assert relative_error(out, expected_out) < tolerance
    assert torch.equal(lse.isfinite(), inside)
    assert (lse[inside] - expected_lse[inside]).abs().max() < tolerance * 10
    assert not out[~inside].any()
    assert (lse[~inside] == -math.inf).all()
    expected_grads = gradients_explicitly(q, k, v, spans, scale, grad_out, causal)
    for name, leaf, grad in zip("qkv", leaves, expected_grads, strict=True):
        size = max(grad.abs().max(), 0.1 * expected_grads[2].abs().max())  # spans of one token: q and k have no gradient, only rounding
        assert (leaf.grad.double() - grad).abs().max() / size < tolerance, f"gradient of {name}"
        assert not leaf.grad[~inside[:, 0]].any()


@pytest.mark.parametrize("head_size", [32, 64, 80])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("spans", [FULL, PACKED], ids=("full", "packed"))
def test_equals_explicit_attention(spans, heads, head_size):
    check(*random_qkv(96, *heads, head_size), spans)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    check(*random_qkv(96, 4, 2, 32, dtype), PACKED, tolerance=1e-13 if dtype == torch.float64 else 2e-2)


def test_without_a_causal_mask():
    check(*random_qkv(96, 4, 2, 32), PACKED, causal=False)


@st.composite
def spans_of(draw, n_tokens=48):
    """Any spans of a row: borders are drawn, and each piece between them is a span or a gap. Doubled borders make lengths repeat."""
    borders = sorted(draw(st.sets(st.integers(0, n_tokens), min_size=2, max_size=14)))
    pieces = list(pairwise(borders))
    kept = draw(st.lists(st.booleans(), min_size=len(pieces), max_size=len(pieces)))
    return tuple(piece for piece, keep in zip(pieces, kept, strict=True) if keep) or (pieces[0],)


@given(spans=spans_of(), heads=st.sampled_from(sorted(HEADS.values())), head_size=st.sampled_from((8, 32, 80)))
@settings(max_examples=60, deadline=None)
def test_equals_explicit_attention_for_any_spans(spans, heads, head_size):
    check(*random_qkv(48, *heads, head_size), spans)


def test_views_and_expanded_gradients_are_read_right():
    """Phi3 slices q, k, v out of one tensor, and the gradient of a sum is one number with strides of zero."""
    packed = torch.randn(96, 4, 3 * 32)
    q, k, v = packed.requires_grad_().split(32, dim=-1)
    attend(q, k, v, PACKED, 0.2)[0].sum().backward()
    expected = gradients_explicitly(q, k, v, PACKED, 0.2, torch.ones(96, 4, 32))
    assert relative_error(packed.grad, torch.cat(expected, -1)) < 1e-5
    transposed = [x.detach().permute(0, 2, 1).contiguous().permute(0, 2, 1) for x in (q, k, v)]
    assert transposed[0].stride(-1) != 1
    assert torch.equal(attend(*transposed, PACKED, 0.2)[0], attend(q, k, v, PACKED, 0.2)[0])


def test_no_span_at_all():
    q, k, v = random_qkv(8, 2, 1, 8)
    out, lse = attend(q, k, v, (), 1.0)
    assert not out.any()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize(
    ("spans", "n_calls"), [(tuple((i, i + 64) for i in range(0, 4096, 64)), 1), (PACKED, 3), (((0, 8), (16, 24), (40, 48)), 1)]
)
def test_spans_of_one_length_share_a_call(spans, n_calls, monkeypatch):
    calls = []
    flash = kernel._cpu_flash
    monkeypatch.setattr(kernel, "_cpu_flash", lambda *args, **kwargs: calls.append(1) or flash(*args, **kwargs))
    attend(*random_qkv(4096, 1, 1, 8), spans, 1.0)
    assert len(calls) == n_calls


@pytest.mark.parametrize("spans", [((4, 2),), ((0, 4), (3, 6)), ((4, 6), (0, 2)), ((0, 9),), ((2, 2),)])
def test_malformed_spans_are_our_own_mistake(spans):
    with pytest.raises(AssertionError, match="not sorted, disjoint, non-empty ranges of 8 tokens"):
        attend(*random_qkv(8, 2, 1, 8), spans, 1.0)


# ---- merge ----


def halves(dtype=torch.float32):
    """A causal span of 64, and the same attention of its second half in two parts: over the first half's keys, and over its own."""
    q, k, v = random_qkv(64, 4, 2, 32, dtype)
    whole = attend(q, k, v, ((0, 64),), 0.2)
    own = attend(q[32:], k[32:], v[32:], ((0, 32),), 0.2)
    earlier = attend(q[32:], k[:32], v[:32], ((0, 32),), 0.2, causal=False)
    return whole, own, earlier


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_merged_parts_are_the_whole(dtype):
    (out, lse), own, earlier = halves(dtype)
    merged_out, merged_lse = merge(*own, *earlier)
    assert merged_out.dtype == merged_lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    assert relative_error(merged_out, out[32:]) < tolerance
    assert relative_error(merged_lse, lse[32:]) < tolerance


def test_merge_is_symmetric_and_nothing_is_its_neutral_element():
    _, (out, lse), other = halves()
    torch.testing.assert_close(merge(out, lse, *other), merge(*other, out, lse))
    nothing = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    for merged in (merge(out, lse, *nothing), merge(*nothing, out, lse)):
        assert torch.equal(merged[0], out)
        assert torch.equal(merged[1], lse)
    assert not merge(*nothing, *nothing)[0].any()
    assert (merge(*nothing, *nothing)[1] == -math.inf).all()


def test_merge_survives_scores_far_apart():
    out = torch.ones(1, 1, 2)
    merged_out, merged_lse = merge(out, torch.tensor([[3e4]]), 5 * out, torch.tensor([[-3e4]]))
    assert torch.equal(merged_out, out)
    assert merged_lse.item() == 3e4


def test_backward_of_a_part_takes_the_merged_lse():
    """The identity that a ring's backward rests on: with out and lse of the whole, the gradients of the parts add up to the whole's."""
    q, k, v = random_qkv(64, 2, 2, 32, torch.float64)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves, ((0, 64),), 0.2)
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    cut = [kernel._cut(x[32:], slice(None), (1, 32)) for x in (grad_out, q, out.detach(), lse)]
    grad_q = 0
    for keys, causal in ((slice(0, 32), False), (slice(32, 64), True)):
        k_cut, v_cut = (kernel._cut(x[keys], slice(None), (1, 32)) for x in (k, v))
        grad_q = grad_q + kernel._cpu_flash_backward(cut[0], cut[1], k_cut, v_cut, cut[2], cut[3], 0.0, causal, scale=0.2)[0]
    assert relative_error(kernel._join(grad_q), leaves[0].grad[32:]) < 1e-12


# ---- the kernels that need CUDA: what surrounds them ----


def varlen_like_flash(q, k, v, bounds, longest, scale, causal):
    """What flash attention promises of packed spans, on CPU: out [N, Hq, D], lse [N, Hq]."""
    borders = bounds.tolist()
    assert bounds.dtype == torch.int32
    assert longest == max(b - a for a, b in pairwise(borders))
    assert borders[-1] == len(q)
    out, lse = attend_explicitly(q, k, v, tuple(pairwise(borders)), scale, causal)
    return out, lse.detach().float() if q.dtype == torch.bfloat16 else lse.detach()


@pytest.mark.parametrize("spans", [FULL, PACKED, ((0, 32), (32, 96))])
def test_packing_around_a_varlen_kernel(spans):
    q, k, v = random_qkv(96, 4, 2, 32, torch.float64)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = kernel._attend_packed(varlen_like_flash, *leaves, spans, 0.2, True)
    grad_out = torch.randn_like(out)
    out.backward(grad_out)
    expected_out, expected_lse = attend_explicitly(q, k, v, spans, 0.2)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)
    for leaf, grad in zip(leaves, gradients_explicitly(q, k, v, spans, 0.2, grad_out), strict=True):
        torch.testing.assert_close(leaf.grad, grad)


def flash_attn_stand_in() -> ModuleType:
    """flash_attn_varlen_func as flash-attn 2.7 documents it."""

    def flash_attn_varlen_func(q, k, v, bounds_q, bounds_k, longest_q, longest_k, *, softmax_scale, causal, return_attn_probs):
        assert bounds_q is bounds_k
        assert longest_q == longest_k
        assert return_attn_probs
        out, lse = varlen_like_flash(q, k, v, bounds_q, longest_q, softmax_scale, causal)
        return out.to(q.dtype), lse.T, None

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    return module


def torch_varlen_stand_in(*args, **kwargs):
    """torch's varlen_attn: held to the signature of the installed one."""
    given = inspect.signature(TORCH_VARLEN).bind(*args, **kwargs).arguments
    q, k = given["query"], given["key"]
    assert given["cu_seq_q"] is given["cu_seq_k"]
    assert given["max_q"] == given["max_k"]
    assert given["return_aux"].lse
    assert given["enable_gqa"] == (q.shape[1] != k.shape[1])
    causal = {(-1, 0): True, (-1, -1): False}[given["window_size"]]
    out, lse = varlen_like_flash(q, k, given["value"], given["cu_seq_q"], given["max_q"], given["scale"], causal)
    return out.to(q.dtype), lse.T


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["flash_attn", "torch_varlen"])
def test_cuda_kernels_are_called_as_they_are_documented(name, causal, monkeypatch):
    """On CPU, with stand-ins for the two functions that need CUDA."""
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn_stand_in())
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", torch_varlen_stand_in)
    monkeypatch.setattr(kernel, "kernel_name", lambda device: (name, "stand-in"))
    for heads in HEADS.values():
        q, k, v = random_qkv(96, *heads, 32, torch.bfloat16)
        out, lse = attend(q, k, v, PACKED, 0.2, causal)
        expected_out, expected_lse = attend_explicitly(q, k, v, PACKED, 0.2, causal)
        torch.testing.assert_close(out, expected_out.bfloat16())
        torch.testing.assert_close(lse, expected_lse.float())
    with pytest.raises(UserError, match=r"model.dtype=float32 has no flash attention on CUDA; set model.dtype to bfloat16"):
        attend(*random_qkv(96, 4, 2, 32), FULL, 0.2)


def test_packing_is_built_once_for_a_segment():
    device = torch.device("cpu")
    with torch.inference_mode():
        assert not kernel._packing(PACKED, 96, device)[1].is_inference(), "an evaluation's packing must serve training too"
    assert kernel._packing(PACKED, 96, device) is kernel._packing(PACKED, 96, device)
    assert kernel._packing(FULL, 96, device)[0] is None


def test_the_kernel_is_named_with_its_reason():
    assert kernel_name("cpu") == ("cpu_flash", "torch's flash kernel for CPU")
    name, reason = kernel_name("cuda")
    assert name in ("flash_attn", "torch_varlen")
    assert "flash_attn" in reason
    with pytest.raises(UserError, match="device=mps has no attention kernel here; set device to cpu or cuda"):
        kernel_name("mps")


def test_agrees_with_torch_on_one_span():
    q, k, v = random_qkv(96, 4, 2, 32)
    expected = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, FULL, 32**-0.5)[0], expected[0].transpose(0, 1))
