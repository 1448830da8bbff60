"""The reference of kernels and strategies: attention by its definition, every score, an explicit mask, float64."""

import math

import torch
from torch import Tensor

from lr2train.attention.tiles import Tile


def mask_of(spans, n_tokens: int, causal: bool = True, sliding_window: int | None = None) -> Tensor:
    """bool [T, T]: may query i look at key j. Under a sliding window j runs over (i - window, i]."""
    mask = torch.zeros(n_tokens, n_tokens, dtype=torch.bool)
    for start, stop in spans:
        block = torch.ones(stop - start, stop - start, dtype=torch.bool)
        mask[start:stop, start:stop] = block.tril() if causal else block
    if sliding_window is not None:
        mask &= torch.arange(n_tokens)[:, None] - torch.arange(n_tokens) < sliding_window
    return mask


def attend_explicitly(
    q: Tensor, k: Tensor, v: Tensor, spans, scale: float, causal: bool = True, sliding_window: int | None = None
) -> tuple[Tensor, Tensor]:
    """The contract of attention.kernel.attend in float64."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = mask_of(spans, q.shape[0], causal, sliding_window)
    scores = torch.einsum("ihd,jhd->hij", q, k).mul(scale).masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1).T
    weights = torch.where(mask, (scores - lse.T.unsqueeze(-1)).exp(), 0.0)  # outside spans exp(nan) is never chosen
    seen = mask.any(-1)[:, None, None]
    return torch.where(seen, torch.einsum("hij,jhd->ihd", torch.nan_to_num(weights), v), 0.0), lse


def gradients_explicitly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans,
    scale: float,
    grad_out: Tensor,
    causal: bool = True,
    sliding_window: int | None = None,
) -> list[Tensor]:
    """d sum(out * grad_out) / d(q, k, v) in float64; a token outside every span has none."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    inside = torch.cat([torch.arange(start, stop) for start, stop in spans])
    where = {int(token): i for i, token in enumerate(inside)}
    moved = tuple((where[start], where[stop - 1] + 1) for start, stop in spans)
    out, _ = attend_explicitly(*(x[inside] for x in leaves), moved, scale, causal, sliding_window)
    (out * grad_out.double()[inside]).sum().backward()
    return [x.grad for x in leaves]


def explicit_tiles(q, k, v, tiles, scale, sliding_window=None):
    """out, lse and the autograd graph of tiles, by an explicit mask [Tq, Tk] in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    mask = torch.zeros(len(q), len(k), dtype=torch.bool)
    for tile in tiles:
        ahead = torch.arange(tile.n_queries)[:, None] + tile.lead - torch.arange(tile.n_keys)
        seen = (ahead >= 0) & (ahead < (sliding_window or math.inf))
        mask[tile.q_start : tile.q_stop, tile.k_start : tile.k_stop] |= seen
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


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)).item()


def random_qkv(
    n_tokens: int,
    n_heads: int,
    n_kv_heads: int,
    head_size: int,
    dtype=torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    """q [T, Hq, D], k and v [T, Hkv, D]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((n_tokens, heads, head_size) for heads in (n_heads, n_kv_heads, n_kv_heads))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]
