"""The kernel door against attention written out in float64: out, lse, gradients, for any spans."""

import math
import sys
from itertools import pairwise, product
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lr2train.attention import blocks, cpu, cuda, kernel
from lr2train.attention.blocks import Block, Queries, Rows
from lr2train.attention.kernel import attend, attend_block, backward_block, forward_block, kernel_name, merge
from lr2train.attention.tiles import Tile, diagonal
from lr2train.config import UserError
from tests.attention.reference import attend_explicitly, gradients_explicitly, random_qkv, relative_error
from tools.gpu.simulation import LayerInputs, simulate

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


@pytest.mark.parametrize("head_size", [32, 80, 256])
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
@settings(max_examples=60, derandomize=True, deadline=None)
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
    flash = cpu._flash
    monkeypatch.setattr(cpu, "_flash", lambda *args, **kwargs: calls.append(1) or flash(*args, **kwargs))
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


def one_document(n_tokens: int) -> Block:
    return Block(diagonal(((0, n_tokens),)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_shares_of_blocks_add_up(dtype):
    """What a ring's backward rests on: with out and lse of the whole, the gradients of the parts add up to the whole's."""
    q, k, v = random_qkv(64, 4, 2, 32, dtype)
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out, lse = forward_block(q, k, v, one_document(64), 0.2)
    queries = Queries(q, out, lse, grad_out)
    whole = backward_block(queries, k, v, one_document(64), 0.2)
    low = backward_block(queries.part(slice(32, 64)), k[:32], v[:32], Block((Tile(0, 32, 0, 32, 32),)), 0.2)
    own = backward_block(queries, k, v, Block(diagonal(((0, 32), (32, 64)))), 0.2)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    assert relative_error(own[0] + torch.cat([torch.zeros_like(low[0]), low[0]]), whole[0]) < tolerance
    for ours, theirs, expected in zip(own[1:], low[1:], whole[1:], strict=True):
        assert relative_error(ours + torch.cat([theirs, torch.zeros_like(theirs)]), expected) < tolerance


# ---- tiles: queries and keys of different rows ----


def explicit_tiles(q, k, v, tiles, scale, sliding_window=None):
    """out, lse and the autograd graph of tiles, by an explicit mask [Tq, Tk] in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    mask = torch.zeros(len(q), len(k), dtype=torch.bool)
    for tile in tiles:
        ahead = torch.arange(tile.n_queries)[:, None] + tile.lead - torch.arange(tile.n_keys)
        mask[tile.q_start : tile.q_stop, tile.k_start : tile.k_stop] |= (ahead >= 0) & (ahead < (sliding_window or math.inf))
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, 1)).mul(scale).masked_fill(~mask, -1e9)
    seen = mask.any(1)
    out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v.repeat_interleave(group, 1)) * seen[:, None, None]
    return out, scores.logsumexp(-1).T.masked_fill(~seen[:, None], -math.inf), mask


TILES = {
    "bottom right": (Tile(2, 20, 0, 40, 0),),
    "as many": (Tile(0, 40, 0, 40, 0),),
    "all before": (Tile(0, 20, 5, 40, 20),),
    "before, at a distance": (Tile(0, 20, 5, 40, 27),),
    "few keys before many queries": (Tile(0, 30, 5, 8, 30),),
    "queries twice": (Tile(0, 20, 0, 10, 20), Tile(0, 20, 20, 40, 0), Tile(22, 25, 10, 13, 0)),
    "keys twice": (Tile(0, 10, 0, 20, 10), Tile(10, 30, 0, 20, 0)),
    "packed": (Tile(0, 5, 0, 9, 0), Tile(5, 10, 9, 18, 0), Tile(12, 40, 18, 58, 0)),
    "none": (),
}


@pytest.mark.parametrize("sliding_window", [None, 1, 7, 16, 1000])
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_tiles_equal_explicit_attention(tiles, sliding_window, monkeypatch):
    monkeypatch.setattr(blocks, "_LONGEST_BAND", 8)  # so that these short rows are cut into bands
    (q, _, _), (_, k, v) = random_qkv(40, 4, 2, 16, torch.float64), random_qkv(60, 4, 2, 16, torch.float64, seed=1)
    expected, expected_lse, mask = explicit_tiles(*(leaves := [x.requires_grad_() for x in (q, k, v)]), tiles, 0.3, sliding_window)
    assert sum(tile.pairs(sliding_window) for tile in tiles) == mask.sum()
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    expected_grads = torch.autograd.grad(expected, leaves, grad_out)
    out, lse = attend_block(q, k, v, 0.3, Block(tiles, sliding_window))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    for grad, wanted in zip(torch.autograd.grad(out, leaves, grad_out), expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-12, rtol=1e-9)


@given(
    spans=spans_of(), heads=st.sampled_from(sorted(HEADS.values())), sliding_window=st.integers(1, 50), band=st.sampled_from((4, 16, 256))
)
@settings(max_examples=60, derandomize=True, deadline=None)
def test_sliding_windows(spans, heads, sliding_window, band):
    q, k, v = random_qkv(48, *heads, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_LONGEST_BAND", band)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = attend(*leaves, spans, 0.3, sliding_window=sliding_window)
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        out.backward(grad_out)
    expected, expected_lse = attend_explicitly(q, k, v, spans, 0.3, sliding_window=sliding_window)
    assert relative_error(out, expected) < 1e-5
    torch.testing.assert_close(lse, expected_lse.float())
    wanted = gradients_explicitly(q, k, v, spans, 0.3, grad_out, sliding_window=sliding_window)
    for leaf, grad in zip(leaves, wanted, strict=True):
        assert (leaf.grad - grad).abs().max() < 1e-5 * max(grad.abs().max(), 0.1 * wanted[2].abs().max())


def test_a_sliding_window_needs_memory_for_its_bands_only():
    """Masks are at most (band) x (band + window), whatever the length."""
    block = Block(diagonal(((0, 4096),)), 32)
    attend_block(*random_qkv(4096, 1, 1, 8), 1.0, block)
    masks = {round_.band.added(torch.float32) for round_ in block.cpu_rounds if round_.band is not None}
    assert 0 < len(masks) <= 2, "the first band has its edge, all others share a mask"
    assert max(mask.numel() for mask in masks) <= 256 * (256 + 32)
    assert all(tile.n_queries * tile.n_keys <= 256 * (256 + 32) for round_ in block.cpu_rounds for tile in round_.tiles)


def test_trimming_keeps_every_pair():
    """What is cut off a tile was seen by nobody; what is left is seen by all."""
    for n_queries, n_keys, gap, window in product((1, 4, 7), (1, 5, 9), (0, 7, 12), (1, 3, 8, 15)):
        if gap == 0 and n_keys < n_queries:
            continue
        tile = Tile(0, n_queries, 0, n_keys, gap)
        ahead = torch.arange(n_queries)[:, None] + tile.lead - torch.arange(n_keys)
        seen = (ahead >= 0) & (ahead < window)
        trimmed = tile.trimmed(window)
        if trimmed is None:
            assert not seen.any()
            continue
        left = seen[trimmed.q_start : trimmed.q_stop, trimmed.k_start : trimmed.k_stop]
        assert left.sum() == seen.sum() == trimmed.pairs(window)
        assert left.any(0).all()
        assert left.any(1).all()


# ---- the kernels that need CUDA: how they are called, with stand-ins that keep their promises ----


def flash_mask(cu_q, cu_k, max_k, causal, left, right) -> torch.Tensor:
    """What flash attention lets packed tiles see: diagonals aligned to the bottom right, windows in keys left and right of them.

    With a window to the left and none to the right, it sets the right one to the longest keys (``set_params_fprop`` of flash-attn 2).
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


def varlen_like_flash(q, k, v, cu_q, cu_k, max_k, scale, causal, left, right):
    """out [N, Hq, D], lse [Hq, N]."""
    mask = flash_mask(cu_q, cu_k, max_k, causal, left, right)
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    scores = torch.einsum("ihd,jhd->hij", q, k).mul(scale).masked_fill(~mask, -math.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1)


def backward_like_flash(grad_out, q, k, v, out, lse, cu_q, cu_k, max_k, scale, causal, left, right):
    """FlashAttention-2's formulas, with the out and the lse [Hq, N] that are handed in."""
    mask = flash_mask(cu_q, cu_k, max_k, causal, left, right)
    n_kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    assert lse.is_contiguous()
    inputs = (grad_out, q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), out)
    grad_out, q_, k_, v_, out = (x.double() for x in inputs)
    p = (torch.einsum("ihd,jhd->hij", q_, k_) * scale - lse.double().unsqueeze(-1)).exp() * mask
    delta = (grad_out * out).sum(-1).T.unsqueeze(-1)
    ds = p * (torch.einsum("ihd,jhd->hij", grad_out, v_) - delta) * scale
    grads = torch.einsum("hij,jhd->ihd", ds, k_), torch.einsum("hij,ihd->jhd", ds, q_), torch.einsum("hij,ihd->jhd", p, grad_out)
    dk, dv = (x.unflatten(1, (n_kv_heads, group)).sum(2) for x in grads[1:])
    return [grad.to(q.dtype) for grad in (grads[0], dk, dv)]


class FakeFlash2(ModuleType):
    """flash_attn.flash_attn_interface as flash-attn 2.7 has it."""

    @staticmethod
    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
    ):  # fmt: skip
        check_longest(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_k)
        out, lse = varlen_like_flash(q, k, v, *lengths, softmax_scale, causal, window_size_left, window_size_right)
        return out.to(q.dtype), lse.float(), None, None

    @staticmethod
    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        grads = backward_like_flash(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_k, softmax_scale, causal,
            window_size_left, window_size_right,
        )  # fmt: skip
        for into, grad in zip((dq, dk, dv), grads, strict=True):
            into.copy_(grad)


class FakeFlash3(ModuleType):
    """flash_attn_interface as flash-attn 3 has it."""

    @staticmethod
    def _flash_attn_forward(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None, causal=False,
        window_size_left=-1, window_size_right=-1,
    ):  # fmt: skip
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_k)
        out, lse = varlen_like_flash(q, k, v, *lengths, softmax_scale, causal, window_size_left, window_size_right)
        return out.to(q.dtype), lse.float(), torch.tensor([]), torch.tensor([])

    @staticmethod
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None, max_seqlen_q=None,
        max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
    ):  # fmt: skip
        FakeFlash2._flash_attn_varlen_backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, is_causal,
            window_size_left, window_size_right, 0.0, None, False,
        )  # fmt: skip


def check_longest(cu_q, cu_k, max_q, max_k):
    assert max_q == max(b - a for a, b in pairwise(cu_q.tolist()))
    assert max_k >= max(b - a for a, b in pairwise(cu_k.tolist()))


def cuda_flash(*args, **kwargs):
    """torch.ops.aten._flash_attention_forward, held to the schema of the installed torch."""
    given = bound(torch.ops.aten._flash_attention_forward.default, args, kwargs)
    check_longest(given["cum_seq_q"], given["cum_seq_k"], given["max_q"], given["max_k"])
    assert given["dropout_p"] == 0.0
    assert given["is_causal"] == ((given["window_size_left"], given["window_size_right"]) == (-1, 0)), "as torch.nn.attention.varlen has it"
    out, lse = varlen_like_flash(
        given["query"], given["key"], given["value"], given["cum_seq_q"], given["cum_seq_k"], given["max_k"], given["scale"],
        given["is_causal"], given["window_size_left"], given["window_size_right"],
    )  # fmt: skip
    return out.to(given["query"].dtype), lse.float(), torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def cuda_flash_backward(*args, **kwargs):
    """torch.ops.aten._flash_attention_backward, likewise."""
    given = bound(torch.ops.aten._flash_attention_backward.default, args, kwargs)
    assert given["rng_state"].dtype == torch.uint64
    return backward_like_flash(
        given["grad_out"], given["query"], given["key"], given["value"], given["out"], given["logsumexp"], given["cum_seq_q"],
        given["cum_seq_k"], given["max_k"], given["scale"], given["is_causal"], given["window_size_left"], given["window_size_right"],
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
    """The tiles that a ring makes of documents under a sliding window: 6 ranks, bf16, where 3e-2 is a few of its roundings."""
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


def test_what_cuda_does_not_serve_is_refused(cuda_kernel):
    with pytest.raises(UserError, match=r"model.dtype=float32 has no flash attention on CUDA; set model.dtype to bfloat16"):
        attend(*random_qkv(96, 4, 2, 32), FULL, 0.2)
    for head_size in (12, 264):
        with pytest.raises(UserError, match=rf"head_dim={head_size} has no flash attention on CUDA, which serves multiples of 8 up to 256"):
            attend(*random_qkv(96, 4, 2, head_size, torch.bfloat16), FULL, 0.2)


def test_a_block_makes_its_rounds_rows_and_cumulative_lengths_once():
    """All layers of a segment and the backward share them, and an evaluation's must serve training too."""
    device, block = torch.device("cpu"), Block(diagonal(PACKED))
    assert block.cuda_rounds is block.cuda_rounds
    assert block.cpu_rounds is block.cpu_rounds
    (round_,) = block.cuda_rounds
    with torch.inference_mode():
        assert not round_.once(cuda.varlen_of, device).cu_q.is_inference()
        assert not round_.once(cuda.varlen_of, device).no_dropout[0].is_inference()
        assert not round_.queries.on(device).is_inference()
    assert round_.once(cuda.varlen_of, device) is round_.once(cuda.varlen_of, device)
    assert round_.queries.on(device) is round_.queries.on(device)


def test_rows_that_adjoin_are_a_slice():
    """Which selects without a copy."""
    device = torch.device("cpu")
    assert Rows(((0, 3), (3, 9))).on(device) == slice(0, 9)
    assert Rows(()).on(device) == slice(0, 0)
    assert Rows(((0, 3), (4, 6))).on(device).tolist() == [0, 1, 2, 4, 5]
    assert [len(Rows(ranges)) for ranges in ((), ((0, 3), (4, 6)))] == [0, 5]
    assert Rows(((0, 3), (3, 9))).covers(9)
    assert not any(Rows(ranges).covers(9) for ranges in (((0, 3), (4, 9)), ((0, 8),), ((1, 9),), ()))


def test_the_kernel_is_named_with_its_reason():
    """On any machine, whatever is installed on it."""
    assert kernel_name("cpu") == ("cpu_flash", "torch's flash kernel for CPU")
    name, reason = kernel_name("cuda")
    assert name in ("flash_attn_3", "flash_attn", "torch_varlen")
    assert "flash_attn" in reason
    with pytest.raises(UserError, match="device=mps has no attention kernel here; set device to cpu or cuda"):
        kernel_name("mps")


def test_the_cuda_kernel_is_flash_attn_where_it_is_new_enough(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    interface = FakeFlash2("flash_attn.flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    assert cuda.choose() == ("flash_attn", "flash_attn is installed")
    interface._flash_attn_varlen_backward = lambda dout, q, k, v, out, softmax_lse, dq, dk, dv, window_size: None  # as 2.6 had it
    assert cuda.choose() == ("torch_varlen", "flash_attn is older than its functions that we call (2.7 of flash_attn)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", FakeFlash3("flash_attn_interface"))
    assert cuda.choose() == ("flash_attn_3", "flash_attn_3 is installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UserError, match="this GPU has compute capability 7.x and flash attention needs 8"):
        cuda.choose()


def test_agrees_with_torch_on_one_span():
    q, k, v = random_qkv(96, 4, 2, 32)
    expected = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, FULL, 32**-0.5)[0], expected[0].transpose(0, 1))
