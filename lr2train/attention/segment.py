"""One object for the attention of one packed segment on this rank.

The engine makes a ``SegmentAttention`` once from a batch and hands the object through the model in the place of
document spans. All layers, the recomputation of activations and the backward pass share what hangs on the object: the
layout, the strategy of each kind of layer, the kernel rounds with their row indices on the device, the ring's steps,
the positions.

Choice: everything is made at the first use and lives as long as the segment. No cache is global. Cost: the object is
alive from the first comparison of ranks to the end of the optimizer step, as the micro-batches of the step are.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lr2train.attention.choice import AttentionChoice
from lr2train.attention.once import Once
from lr2train.attention.strategies import strategy_of
from lr2train.attention.strategy import Attend, PackedSegment
from lr2train.attention.tiles import Spans
from lr2train.parallel.comm import to_device
from lr2train.parallel.layout import Layout
from lr2train.parallel.mesh import Mesh


class SegmentAttention(Once):
    """Attention of this rank's sequence shard of one packed segment.

    Attributes:
        segment: the documents, and how many ranks share the segment.
        choice: which strategies serve the segment; the same on every rank.
        mesh: where this rank stands.
        jumps: of positions, as in ``data.batch.Batch``. Attention itself is causal over the order of tokens.
    """

    def __init__(self, segment: PackedSegment, choice: AttentionChoice, mesh: Mesh, jumps: Spans = ()) -> None:
        self.segment, self.choice, self.mesh, self.jumps = segment, choice, mesh, jumps

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, sliding_window: int | None = None) -> Tensor:
        """q [T/sp, Hq, D], k and v [T/sp, Hkv, D] -> [T/sp, Hq, D], for the tokens of ``layout``."""
        n = self.segment.shard_tokens
        assert len(q) == n, f"{len(q)} queries, and a shard of this segment has {n} tokens"
        return self.once(_prepared, self.segment.narrowed(sliding_window))(q, k, v, scale)

    @cached_property
    def layout(self) -> Layout:
        """Which tokens of the segment this rank holds."""
        return self.segment.layout(self.choice.layout_kind, self.mesh.sp_rank)

    def positions(self, device: torch.device) -> Tensor:
        """int64 [T/sp], what RoPE rotates by: 0, 1, 2 … in every document, with its jump; 0 in padding."""
        return self.once(_positions, device)

    def inside(self, device: torch.device) -> Tensor:
        """bool [T/sp], whether a token is in a document."""
        return self.once(_inside, device)


def _prepared(attention: SegmentAttention, sliding_window: int | None) -> Attend:
    strategy = strategy_of(attention.choice.strategy(sliding_window))
    return strategy.prepare(attention.segment, attention.mesh, sliding_window)


def _positions(attention: SegmentAttention, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        whole = document_positions(attention.segment.spans, attention.segment.n_tokens, device, attention.jumps)
        return attention.layout.shard(whole, 0).clone()  # a view would keep the whole segment alive


def _inside(attention: SegmentAttention, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        whole = torch.zeros(attention.segment.n_tokens, dtype=torch.bool)
        for start, stop in attention.segment.spans:
            whole[start:stop] = True
        return to_device(attention.layout.shard(whole, 0).clone(), device)


def document_positions(spans: Spans, n_tokens: int, device: torch.device, jumps: Spans = ()) -> Tensor:
    """int64 [T]: 0, 1, 2 … in every document, 0 between documents. ``jumps``: (place, tokens), as in ``Batch``."""
    borders = torch.tensor([0, *(border for span in spans for border in span), n_tokens])
    lengths = borders.diff()  # of a gap, a document, a gap … a gap
    begins, inside = borders[:-1], torch.arange(len(lengths)) % 2
    begins, inside, lengths = (to_device(one, device) for one in (begins, inside, lengths))
    firsts, inside = (torch.repeat_interleave(one, lengths, output_size=n_tokens) for one in (begins, inside))
    positions = (torch.arange(n_tokens, device=device) - firsts) * inside
    return positions + _skipped(spans, n_tokens, device, jumps) if jumps else positions


def _skipped(spans: Spans, n_tokens: int, device: torch.device, jumps: Spans) -> Tensor:
    """int64 [T]: the tokens that positions have jumped over."""
    stops = {place: next(stop for start, stop in spans if start <= place < stop) for place, _ in jumps}
    edges = [(place, tokens) for place, tokens in jumps] + [(stops[place], -tokens) for place, tokens in jumps]
    places, changes = to_device(torch.tensor(edges).T.contiguous(), device)
    return torch.zeros(n_tokens + 1, dtype=torch.int64, device=device).index_add_(0, places, changes).cumsum(0)[:-1]
