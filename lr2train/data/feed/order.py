"""Which segments a step holds: pure arithmetic over counts, costs and a seed. No token is touched here.

Each window is an endless stream of its segments, epoch after epoch, and each epoch is a new permutation. A stream is
cut into *groups* of ``group_segments``. A step is a fixed number of groups, and each data-parallel rank takes its part
of every group.

Choice: groups, not ranks, decide the content of a step and the order of windows. So any number of ranks that divides a
group sees the same segments at the same step, all ranks run the same window in each micro-batch, and a run goes on with
fewer or more ranks. Cost: the mix of windows is as coarse as a group, and a group at the border of two epochs takes
some segments of the next one.

Invariants, with p the share of long segments in the corpus:

- Each epoch of a window holds each of its segments once, and a window's epochs follow each other.
- Among the first N groups, for every N, between p N - 1.5 and p N + 1.5 are long. At the borders of an epoch each
  window is less than one group ahead of its share; inside an epoch, error diffusion stays within half a group.
- The segments of a group cost about the same attention: inside blocks of a permutation, neighbours of a sorting form a
  group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lr2train.data.batch import LONG, SHORT
from lr2train.run import stream

# groups that are sorted together: more balance costs better, fewer stay nearer to a plain permutation
BLOCK_GROUPS = 64


@dataclass(frozen=True)
class Schedule:
    """The window of every group.

    Attributes:
        counts: segments of each window; at least one in all.
        group_segments: Q.
    """

    counts: Mapping[str, int]
    group_segments: int

    def groups_before(self, epoch: int, window: str) -> int:
        """Groups of a window that begin before an epoch: the segments of all earlier epochs in groups, rounded up."""
        return -(-epoch * self.counts[window] // self.group_segments)

    def locate(self, group: int) -> tuple[str, int]:
        """The window of a group, and its number among the groups of that window."""
        epoch = self._epoch(group)
        first = {window: self.groups_before(epoch, window) for window in (SHORT, LONG)}
        long = self.groups_before(epoch + 1, LONG) - first[LONG]
        both = self._all_before(epoch + 1) - self._all_before(epoch)
        place = group - self._all_before(epoch)
        # Error diffusion: of the first n groups of an epoch, the share n * long / both is long, rounded to the nearest.
        before, after = ((2 * n * long + both) // (2 * both) for n in (place, place + 1))
        return (LONG, first[LONG] + before) if after > before else (SHORT, first[SHORT] + place - before)

    def _all_before(self, epoch: int) -> int:
        return self.groups_before(epoch, SHORT) + self.groups_before(epoch, LONG)

    def _epoch(self, group: int) -> int:
        """The last epoch that begins at or before a group; epochs far smaller than a group may begin together."""
        epoch = group * self.group_segments // (self.counts[SHORT] + self.counts[LONG])
        while self._all_before(epoch) > group:
            epoch -= 1
        return epoch


class Order:
    """The segments of every group.

    Args:
        schedule: the window of every group.
        costs: attention cost of each segment, one array for each window; only their order counts.
        seed: of the permutations.
    """

    def __init__(self, schedule: Schedule, costs: Mapping[str, np.ndarray], seed: int) -> None:
        self.schedule = schedule
        self._costs, self._seed = costs, seed
        # by window: the epoch of its last permutation, and the permutation
        self._epochs: dict[str, tuple[int, np.ndarray]] = {}

    def group(self, group: int) -> tuple[str, np.ndarray]:
        """The window of a group, and its segments by ascending cost, int64 [group_segments]."""
        window, nth = self.schedule.locate(group)
        size = self.schedule.group_segments
        epoch, place = np.divmod(np.arange(nth * size, (nth + 1) * size), self.schedule.counts[window])
        segments = np.concatenate([self._epoch(window, int(one))[place[epoch == one]] for one in np.unique(epoch)])
        return window, segments[np.argsort(self._costs[window][segments], kind="stable")]

    def _epoch(self, window: str, epoch: int) -> np.ndarray:
        known = self._epochs.get(window)
        if known is None or known[0] != epoch:
            known = self._epochs[window] = epoch, self._permutation(window, epoch)
        return known[1]

    def _permutation(self, window: str, epoch: int) -> np.ndarray:
        """A permutation of a window's segments: groups of similar cost, in random order.

        The first segments complete the group that the previous epoch began. Those segments, and the last, incomplete
        group, stay as drawn.
        """
        rng = stream(self._seed, "order", window, epoch)
        order, size = rng.permutation(self.schedule.counts[window]), self.schedule.group_segments
        costs = self._costs[window]
        if size > 1 and len(order) and costs.min() < costs.max():
            first = -epoch * len(order) % size
            whole = first + max(0, len(order) - first) // size * size
            for start in range(first, whole, BLOCK_GROUPS * size):
                block = order[start : min(start + BLOCK_GROUPS * size, whole)]
                groups = block[np.argsort(costs[block], kind="stable")].reshape(-1, size)
                block[:] = groups[rng.permutation(len(groups))].ravel()
        return order


def default_group(dp_size: int, segments_per_step: int) -> int:
    """Default of ``data.group_segments``: the largest multiple of the ranks that divides a step into at least 4 groups.

    Four or more groups let both windows meet in a step. Where no multiple does, the default is the number of ranks.
    """
    room = [n for n in range(dp_size, segments_per_step // 4 + 1, dp_size) if segments_per_step % n == 0]
    return max(room, default=dp_size)


def part(segments: np.ndarray, rank: int, size: int) -> np.ndarray:
    """The segments of a group that one of ``size`` data-parallel ranks takes, one a micro-batch.

    The ranks of a micro-batch take neighbours in cost. From micro-batch to micro-batch the order of the ranks is
    reversed, so that the sums of costs are alike too.
    """
    micro_batches = segments.reshape(-1, size)
    places = np.where(np.arange(len(micro_batches)) % 2, size - 1 - rank, rank)
    return micro_batches[np.arange(len(micro_batches)), places]
