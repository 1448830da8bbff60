"""What ranks compare before a step: one that was handed other work than its peers would not fail but compute something else, or wait forever.

Choice: each rank says what it is about to do in a few words, over ``control.together``, which also carries the error of a rank that cannot do
it; every rank then reads all answers and comes to the same verdict. Cost: one exchange of some hundred bytes a rank and step, on the host.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lr2train.data.batch import Batch
from lr2train.parallel import control


class Said(NamedTuple):
    """What a rank is about to do with one micro-batch."""

    window: str
    n_tokens: int
    spans: int  # their crc32
    strategy: str


def said_of(batch: Batch, strategy: str) -> Said:
    """What a rank that serves ``batch`` with ``strategy`` says."""
    return Said(batch.window, len(batch.tokens), zlib.crc32(repr(batch.spans).encode()), strategy)


def agree(say: Callable[[], Sequence[Said]], sp: int) -> None:
    """Compare what all ranks say of a step's micro-batches; ranks of one sequence-parallel group (``sp`` consecutive ones) share segments.

    Raises:
        RuntimeError: they disagree, or ``say`` raised on some rank; the same sentence on every rank.
        UserError: ``say`` raised one.
        PeerGone: a rank is gone.
    """
    found = disagreement(control.together(lambda: list(say())), sp)
    if found is not None:
        raise RuntimeError(f"{found}; every rank must be started with the same config and see the same corpus")


def disagreement(told: Sequence[Sequence[Said]], sp: int) -> str | None:
    """The first disagreement among what the ranks said, in order of rank, or None.

    Ranks of one group have to say the same; all ranks have to run the same number of micro-steps, each with one window.
    """
    counts = [len(one) for one in told]
    if len(set(counts)) > 1:
        return f"ranks disagree on the micro-batches of a step: {_by_rank(counts)}"
    for number in range(counts[0]):
        said = [one[number] for one in told]
        windows = [one.window for one in said]
        if len(set(windows)) > 1:
            return f"ranks disagree on the window of micro-step {number}: {_by_rank(windows)}"
        for first in range(0, len(said), sp):
            group = said[first : first + sp]
            for name, values in zip(Said._fields, zip(*group, strict=True), strict=True):
                if len(set(values)) > 1:
                    return f"ranks that share a segment disagree on its {name} in micro-step {number}: {_by_rank(values, first)}"
    return None


def _by_rank(values: Sequence[object], first: int = 0) -> str:
    """Each value with the first rank that holds it."""
    holders = {value: rank for rank, value in reversed(list(enumerate(values, first)))}
    return ", ".join(f"{value} on rank {rank}" for value, rank in sorted(holders.items(), key=lambda held: held[1]))
