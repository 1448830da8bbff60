"""Which segments a step holds: pure arithmetic over counts, costs and a seed; no token is touched here.

Each window is an endless stream of its segments, epoch after epoch, every epoch a new permutation. A stream is cut into *groups* of
``group_segments``; a step is a fixed number of groups, and each data-parallel rank takes its part of every group.

Choice: groups, and not ranks, decide what a step holds and in which order windows come, so any number of ranks that divides a group sees the
same segments at the same step, all ranks run the same window in every micro-step, and a run goes on with fewer or more ranks where it was.
Cost: the mix of windows is as coarse as a group, and a group at the border of two epochs takes some of its segments from the next one.

What holds, with p the share of long segments in the plan:

- each epoch of each window holds every segment once, and the streams know no other order than epoch after epoch;
- among the first N groups, for every N, between p N - 1.5 and p N + 1.5 are long: at the borders of an epoch each window is ahead of the
  plan by less than one group, on the way there error diffusion stays within half a group;
- segments of a group cost about the same attention: they are neighbours in a sorting, done inside blocks of the permutation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lr2train.data.batch import LONG, SHORT
from lr2train.run import stream

BLOCK_GROUPS = 64  # groups that are sorted together: more balance better, fewer leave the order nearer to a plain permutation


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
        """Groups of a window that begin before an epoch does: epochs times its segments, in groups, rounded up."""
        return -(-epoch * self.counts[window] // self.group_segments)

    def locate(self, group: int) -> tuple[str, int]:
        """The window of a group, and its number among the groups of that window."""
        epoch = self._epoch(group)
        first = {window: self.groups_before(epoch, window) for window in (SHORT, LONG)}
        long = self.groups_before(epoch + 1, LONG) - first[LONG]
        both = self._all_before(epoch + 1) - self._all_before(epoch)
        place = group - self._all_before(epoch)
        before, after = ((2 * n * long + both) // (2 * both) for n in (place, place + 1))  # the long share of n groups, to the nearest
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
        costs: attention cost of each segment, an array a window; only their order counts.
        seed: of the permutations.
    """

    def __init__(self, schedule: Schedule, costs: Mapping[str, np.ndarray], seed: int) -> None:
        self.schedule = schedule
        self._costs, self._seed = costs, seed
        self._epochs: dict[str, tuple[int, np.ndarray]] = {}  # the last permutation of each window, and its epoch

    def group(self, group: int) -> tuple[str, np.ndarray]:
        """The window of a group and its segments, int64 [group_segments], the cheapest first."""
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
        """A permutation of a window's segments whose groups hold segments of similar cost, and whose groups come in random order.

        The first segments complete the group that the epoch before began; they and those of the last, incomplete group stay as drawn.
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
    """Segments of a group: a multiple of the ranks, at most a quarter of a step, so that both windows meet in every step; else the ranks."""
    room = [n for n in range(dp_size, segments_per_step // 4 + 1, dp_size) if segments_per_step % n == 0]
    return max(room, default=dp_size)


def part(segments: np.ndarray, rank: int, size: int) -> np.ndarray:
    """The segments of a group that one of ``size`` data-parallel ranks takes, one a micro-step.

    The ranks of a micro-step take neighbours in cost; inside a group of several micro-steps who takes the dearer one alternates, so that sums
    are alike too.
    """
    rows = segments.reshape(-1, size)
    places = np.where(np.arange(len(rows)) % 2, size - 1 - rank, rank)
    return rows[np.arange(len(rows)), places]
