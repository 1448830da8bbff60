"""Groups alone decide the content of a step: any ranks, resumed anywhere, see each segment once an epoch.

Also: the mix of windows holds at each group, and the ranks of a micro-batch get similar costs.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lr2train.data.batch import LONG, SHORT, WINDOWS
from lr2train.data.feed.order import Order, Schedule, part

SETTINGS = settings(derandomize=True, deadline=None, max_examples=120)
COUNTS = st.tuples(st.integers(0, 70), st.integers(0, 70)).filter(any)
GROUP = st.integers(1, 12)


def made(counts: tuple[int, int], group: int, seed: int = 0) -> Order:
    rng = np.random.default_rng(seed)
    costs = {window: rng.integers(1, 9, n).astype(float) for window, n in zip(WINDOWS, counts, strict=True)}
    return Order(Schedule(dict(zip(WINDOWS, counts, strict=True)), group), costs, seed)


def divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def streams(order: Order, groups: int) -> dict[str, list[list[int]]]:
    """The groups of each window, in order."""
    found: dict[str, list[list[int]]] = {window: [] for window in WINDOWS}
    for number in range(groups):
        window, segments = order.group(number)
        assert order.schedule.locate(number) == (window, len(found[window])), (
            "a group of a window is missing or comes twice"
        )
        found[window].append(segments.tolist())
    return found


@given(COUNTS, GROUP, st.integers(0, 3))
@SETTINGS
def test_each_epoch_of_a_window_holds_each_segment_once(counts, group, seed):
    order, epochs = made(counts, group, seed), 5
    groups = sum(order.schedule.groups_before(epochs, window) for window in WINDOWS)
    for window, found in streams(order, groups).items():
        n = order.schedule.counts[window]
        assert len(found) == -(-epochs * n // group)
        # An epoch's border may lie inside a group, whose segments are sorted by cost: only whole groups from the start
        # can be counted.
        for at in range(len(found) + 1):
            seen = Counter(segment for one in found[:at] for segment in one)
            whole, rest = divmod(at * group, n) if n else (0, 0)
            assert sum(seen[segment] > whole for segment in range(n)) == rest, (
                "an epoch begins before the previous one has ended"
            )
            assert all(whole <= seen[segment] <= whole + 1 for segment in range(n))


@given(COUNTS, GROUP)
@SETTINGS
def test_the_mix_of_windows_is_that_of_the_corpus_at_each_group(counts, group):
    schedule = Schedule(dict(zip(WINDOWS, counts, strict=True)), group)
    share, long = counts[1] / sum(counts), 0
    for number in range(400):
        window, _ = schedule.locate(number)
        long += window == LONG
        assert abs(long - share * (number + 1)) < 1.5, "more than a group and a half away from the share"


@given(COUNTS, st.integers(1, 3), st.integers(1, 6), st.integers(0, 50))
@SETTINGS
def test_ranks_take_each_segment_of_a_group_once_and_no_group_depends_on_another(counts, scale, base, start):
    group = base * scale
    walked, jumped = made(counts, group), made(counts, group)
    for number in range(start):
        walked.group(number)
    window, segments = walked.group(start)
    assert (window, segments.tolist()) == (jumped.group(start)[0], jumped.group(start)[1].tolist())
    for size in divisors(group):
        taken = np.stack([part(segments, rank, size) for rank in range(size)])
        assert sorted(taken.ravel().tolist()) == sorted(segments.tolist())


def test_orders_differ_by_epoch_seed_and_window():
    def first_epochs(seed: int) -> list[list[int]]:
        order = made((48, 48), 1, seed)
        found = streams(order, 192)
        return [[one for (one,) in found[window][at : at + 48]] for window in WINDOWS for at in (0, 48)]

    orders = first_epochs(0) + first_epochs(1)
    assert len({tuple(one) for one in orders}) == 8
    assert {tuple(sorted(one)) for one in orders} == {tuple(range(48))}


def waiting(groups: np.ndarray, costs: np.ndarray, size: int) -> float:
    """Share of the time for which ranks wait: a micro-batch lasts as long as its costliest segment."""
    micro_batches = costs[
        np.concatenate([[part(group, rank, size) for group in groups] for rank in range(size)])
    ].reshape(size, -1)
    return float(1 - micro_batches.mean() / micro_batches.max(axis=0).mean())


@pytest.mark.parametrize("size", [2, 8])
def test_the_ranks_of_a_micro_batch_get_similar_costs(size):
    rng = np.random.default_rng(0)
    costs = rng.lognormal(0, 0.7, 4000)
    order = Order(Schedule({SHORT: 4000, LONG: 0}, 8), {SHORT: costs, LONG: np.zeros(0)}, 0)
    groups = np.stack([order.group(number)[1] for number in range(500)])
    assert waiting(rng.permutation(4000).reshape(-1, 8), costs, size) > 0.25
    assert waiting(groups, costs, size) < 0.06


def test_balancing_leaves_no_trend_over_the_epoch():
    rng = np.random.default_rng(0)
    costs = np.sort(rng.lognormal(0, 0.7, 8000))  # the packer puts the longest documents first
    order = Order(Schedule({SHORT: 8000, LONG: 0}, 8), {SHORT: costs, LONG: np.zeros(0)}, 0)
    means = np.array([costs[order.group(number)[1]].mean() for number in range(1000)])
    # 1000 groups of random order: a correlation with time has a standard deviation of 1 / sqrt(1000) = 0.032.
    assert abs(np.corrcoef(means, np.arange(1000))[0, 1]) < 0.1
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.1
