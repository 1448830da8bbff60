"""The kernel door equals attention written out in float64: out, lse and gradients, for any documents and any tiles."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lr2train.attention import blocks, cpu, cuda, explicit
from lr2train.attention.blocks import Block, CappedScale, Queries
from lr2train.attention.kernel import attend, attend_block, backward_block, forward_block, kernel_name, merge
from lr2train.attention.tiles import Tile, diagonal
from lr2train.config import UserError
from tests.attention.reference import (
    TILES,
    attend_explicitly,
    explicit_tiles,
    gradients_explicitly,
    mask_of,
    random_qkv,
    relative_error,
)

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
        size = max(grad.abs().max(), 0.1 * expected_grads[2].abs().max())  # of one token q and k have only rounding
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
    """Any documents of a segment: borders are drawn, and each part between two borders is a document or a gap."""
    borders = sorted(draw(st.sets(st.integers(0, n_tokens), min_size=2, max_size=14)))
    pieces = list(pairwise(borders))
    kept = draw(st.lists(st.booleans(), min_size=len(pieces), max_size=len(pieces)))
    return tuple(piece for piece, keep in zip(pieces, kept, strict=True) if keep) or (pieces[0],)


@given(spans=spans_of(), heads=st.sampled_from(sorted(HEADS.values())), head_size=st.sampled_from((8, 32, 80)))
@settings(max_examples=60)
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
    ("spans", "n_calls"),
    [(tuple((i, i + 64) for i in range(0, 4096, 64)), 1), (PACKED, 3), (((0, 8), (16, 24), (40, 48)), 1)],
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
    """A causal document of 64, and the attention of its second half in two parts: own keys, earlier keys."""
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
    """A ring's backward rests on this: with out and lse of the whole, the gradients of the parts add up."""
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


@pytest.mark.parametrize("sliding_window", [None, 1, 7, 16, 1000])
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
def test_tiles_equal_explicit_attention(tiles, sliding_window, monkeypatch):
    monkeypatch.setattr(blocks, "_LONGEST_BAND", 8)  # so that these short rows are cut into bands
    (q, _, _), (_, k, v) = random_qkv(40, 4, 2, 16, torch.float64), random_qkv(60, 4, 2, 16, torch.float64, seed=1)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected, expected_lse, mask = explicit_tiles(*leaves, tiles, 0.3, sliding_window)
    assert sum(tile.pairs(sliding_window) for tile in tiles) == mask.sum()
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    expected_grads = torch.autograd.grad(expected, leaves, grad_out)
    out, lse = attend_block(q, k, v, 0.3, Block(tiles, sliding_window))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    for grad, wanted in zip(torch.autograd.grad(out, leaves, grad_out), expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-12, rtol=1e-9)


@given(
    spans=spans_of(),
    heads=st.sampled_from(sorted(HEADS.values())),
    sliding_window=st.integers(1, 50),
    band=st.sampled_from((4, 16, 256)),
)
@settings(max_examples=60)
def test_sliding_windows_equal_explicit_attention_whatever_the_bands(spans, heads, sliding_window, band):
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


def test_the_kernel_is_named_with_its_reason():
    """On any machine, whatever is installed on it."""
    assert kernel_name("cpu") == ("cpu_flash", "torch's flash kernel for CPU")
    name, reason = kernel_name("cuda")
    assert name in ("flash_attn_3", "flash_attn", "torch_varlen")
    assert "flash_attn" in reason
    with pytest.raises(UserError, match="device=mps has no attention kernel here; set device to cpu or cuda"):
        kernel_name("mps")


def test_agrees_with_torch_on_one_span():
    q, k, v = random_qkv(96, 4, 2, 32)
    by_head = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, T, D] each
    expected = F.scaled_dot_product_attention(*by_head, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, FULL, 32**-0.5)[0], expected[0].transpose(0, 1))


# ---- capped scores ----


@pytest.mark.parametrize("sliding_window", [None, 5])
@pytest.mark.parametrize("cells", [2**22, 50])
def test_capped_scores_equal_their_definition(monkeypatch, sliding_window, cells):
    """Whole, and a few queries at a time; the cap bends most scores."""
    monkeypatch.setitem(explicit._CELLS, "cpu", cells)
    spans, cap, scale, n = ((0, 7), (8, 25)), 0.8, 0.5, 27
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(n, heads, 8, generator=generator, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2, 4)
    )
    out, lse = attend(q, k, v, spans, CappedScale(scale, cap), sliding_window=sliding_window)
    ours = torch.autograd.grad(out, (q, k, v), grad)
    mask = mask_of(spans, n, True, sliding_window)
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, 1)) * scale
    scores = (cap * torch.tanh(scores / cap)).masked_fill(~mask, -1e30)
    inside = mask.any(-1)
    weights = scores.softmax(-1) * inside[:, None]
    expected = torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(2, 1))
    theirs = torch.autograd.grad(expected, (q, k, v), grad)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse[inside], scores.logsumexp(-1).T[inside], rtol=1e-12, atol=1e-13)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_a_kernel_without_a_cap_refuses_capped_scores():
    x = torch.zeros(4, 1, 8)
    with pytest.raises(UserError, match="torch's own flash attention does not cap scores"):
        cuda._torch_forward(x, x, x, None, CappedScale(1.0, 50.0))
