"""Compare the work of all ranks before a step. A rank with other work than its peers would compute a wrong result, or
make the others wait for ever.

Choice: each rank describes its micro-batches in a few words and sends them over ``control.together``, which also
carries the error of a rank that cannot describe its work. Every rank compares all descriptions, so all come to the same
result. Cost: one exchange of some hundred bytes per rank and step, on the host.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lr2train.data.batch import Batch
from lr2train.parallel import control


class MicroBatch(NamedTuple):
    """A rank's description of one micro-batch."""

    window: str
    n_tokens: int
    spans: int  # crc32 of the document spans
    n_targets: int  # tokens that are predicted
    n_pairs: int  # causal query-key pairs within document spans
    strategy: str  # of attention
    jumps: int = 0  # crc32 of the jumps of positions


def described(batch: Batch, strategy: str) -> MicroBatch:
    """The description of ``batch`` served with ``strategy``."""
    n_pairs = sum((stop - start) * (stop - start + 1) // 2 for start, stop in batch.spans)
    spans = zlib.crc32(repr(batch.spans).encode())
    jumps = zlib.crc32(repr(batch.jumps).encode())
    return MicroBatch(batch.window, len(batch.tokens), spans, batch.n_target_tokens, n_pairs, strategy, jumps)


def agree(describe: Callable[[], Sequence[MicroBatch]], sp: int) -> list[MicroBatch]:
    """Compare the micro-batches of a step over all ranks. ``sp`` consecutive ranks share segments. A collective.

    Returns:
        The micro-batches of the whole step, one for each segment; the same on every rank.

    Raises:
        RuntimeError: ranks disagree, or ``describe`` failed on a rank; the same sentence on every rank.
        UserError: ``describe`` raised a UserError on a rank; on every rank.
        PeerGone: a rank is gone.
    """
    by_rank = control.together(lambda: list(describe()))
    found = disagreement(by_rank, sp)
    if found is not None:
        raise RuntimeError(f"{found}; every rank must be started with the same config and see the same corpus")
    return [micro_batch for group in by_rank[::sp] for micro_batch in group]


def disagreement(by_rank: Sequence[Sequence[MicroBatch]], sp: int) -> str | None:
    """The first disagreement between ranks as a sentence, or None.

    All ranks have to have the same number of micro-batches, and the n-th micro-batches have to be of one window. Ranks
    that share a segment have to describe it alike.
    """
    counts = [len(one) for one in by_rank]
    if len(set(counts)) > 1:
        return f"ranks disagree on the micro-batches of a step: {_by_rank(counts)}"
    for number in range(counts[0]):
        works = [one[number] for one in by_rank]
        windows = [one.window for one in works]
        if len(set(windows)) > 1:
            return f"ranks disagree on the window of micro-batch {number}: {_by_rank(windows)}"
        for first in range(0, len(works), sp):
            group = works[first : first + sp]
            for name, values in zip(MicroBatch._fields, zip(*group, strict=True), strict=True):
                if len(set(values)) > 1:
                    said = _by_rank(values, first)
                    return f"ranks that share a segment disagree on its {name} in micro-batch {number}: {said}"
    return None


def _by_rank(values: Sequence[object], first: int = 0) -> str:
    """Each value with its first rank, in order of rank."""
    holders = {value: rank for rank, value in reversed(list(enumerate(values, first)))}
    return ", ".join(f"{value} on rank {rank}" for value, rank in sorted(holders.items(), key=lambda held: held[1]))
