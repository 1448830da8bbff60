"""Positions that jump: a short row of text sees the distances of a longer window (``data.long_positions=skip``).

Each attention span of n tokens is cut at a random place. Positions count 0, 1, 2 … up to the cut, jump there by J
tokens, and count on. J is uniform over 0 … L - n, so positions stay below L. Source: positional skip-wise training
(PoSE; Zhu et al., 2023, section 3), with two chunks.

Choice: the text goes on across the cut; only positions jump (v_i = 0 in the paper). So a question keeps its answer in
the row, and no document needs L tokens. One cut: with k chunks the distance between two of them is a sum of jumps and
no longer uniform, and more tokens lose their neighbour. Over rows, every distance from n to L - n is met equally
often, and distances up to L - 1 occur. Cost: no token sees L keys, so what grows with their number is not trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def drawn_jumps(
    spans: Sequence[tuple[int, int]], reach_tokens: int, rng: np.random.Generator
) -> tuple[tuple[int, int], ...]:
    """``Batch.jumps`` of one segment: one for each attention span of 2 tokens or more.

    Args:
        spans: attention spans, sorted and disjoint.
        reach_tokens: L; positions stay below. A span of L tokens or more does not jump.
        rng: the segment's own.
    """
    return tuple(
        (start + int(rng.integers(1, stop - start)), int(rng.integers(reach_tokens - (stop - start) + 1)))
        for start, stop in spans
        if 2 <= stop - start <= reach_tokens
    )
