"""The data mix: the tokens to plan from each source and bucket, and the refusals of a mix that cannot be filled.

A config sets the mix in one of three ways:
    weights of sources inside each bucket (``weights_of: bucket``): each bucket has its budget, each source its share of
    that budget; weights of sources over the whole corpus (``weights_of: corpus``): both marginals hold at once, by
    iterative proportional fitting; weights of single cells (``buckets.*.sources``): the table itself.

Choice, for the second way: the table of tokens that the sources naturally hold is scaled by rows and columns until both
marginals hold. Among all tables with these marginals the result is nearest to the natural one in relative entropy
(Csiszar, 1975). So all sources draw long documents more by the same factors, while the mix over sources stays (Fu et
al., 2024, *per-source upsampling*). A cell repeats its documents at most ``max_repeats`` times; the fit knows that
bound and moves the excess to other cells. Cost: where the bound acts, the table is no longer a product of factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lr2train.config import DataConfig, UserError, WeightsOf
from lr2train.data.batch import WINDOWS
from lr2train.data.plan.buckets import Bucket

_ROUNDS = 3_000  # of the fit, at most
_SETTLED = 1e-10  # the fit ends when no row misses its marginal by more than this share of all tokens
_MOST_BUCKETS = 16  # the check for a mix that cannot be filled looks at all 2 ** n sets of buckets


def budgets(data: DataConfig) -> dict[str, int]:
    """Tokens to plan by window; 0 plans each document once."""
    return dict(zip(WINDOWS, (data.short_tokens, data.long_tokens), strict=True))


def check(data: DataConfig, buckets: Sequence[Bucket]) -> None:
    """Refuse a mix that no documents can fill, before hours of tokenising.

    Raises:
        UserError: budgets, weights or repeats are out of their limits, or settings contradict each other.
    """
    if not 0 < data.max_repeats < np.inf:
        raise UserError(f"data.max_repeats={data.max_repeats} is not above 0; set it to a number of passes such as 4")
    for window, budget in budgets(data).items():
        if budget < 0:
            raise UserError(
                f"data.{window}_tokens={budget} is below 0; set it to a number of tokens, or to 0 for every document "
                "once"
            )
    for source in data.sources:
        if not 0 <= source.weight < np.inf:
            raise UserError(f"data.sources.{source.name}.weight={source.weight} is not 0 or more; set it to a share")
    if data.weights_of is WeightsOf.corpus:
        _check_corpus_weights(data, buckets)


def _check_corpus_weights(data: DataConfig, buckets: Sequence[Bucket]) -> None:
    for key, contradicts in (
        ("data.short_tokens=0 or data.long_tokens=0", not all(budgets(data).values())),
        ("data.buckets.*.sources", any(one.sources for one in buckets)),
    ):
        if contradicts:
            raise UserError(
                "data.weights_of=corpus makes a source's weight its share of a known number of tokens, which "
                f"contradicts {key}; set data.weights_of=bucket, or budgets for both windows and no weights of single "
                "cells"
            )
    if not sum(source.weight for source in data.sources) > 0:
        raise UserError(
            "data.sources.*.weight add up to 0, and data.weights_of=corpus divides all tokens by them; give a source "
            "a weight"
        )


def targets(data: DataConfig, buckets: Sequence[Bucket], available: np.ndarray) -> np.ndarray:
    """Tokens to plan from each source and bucket.

    Args:
        data: gives budgets, weights and max_repeats.
        buckets: of :func:`lr2train.data.plan.buckets.resolve`.
        available: int64 [sources, buckets], tokens of one pass.

    Returns:
        int64 [sources, buckets].

    Raises:
        UserError: a budget cannot be filled (the text says how much is missing, where, and which key to change), or
            settings contradict each other.
    """
    check(data, buckets)
    wanted = _by_bucket(data, buckets, available)
    cells = (
        _by_corpus(data, buckets, wanted, available)
        if data.weights_of is WeightsOf.corpus
        else _inside(data, buckets, wanted, available)
    )
    # a share of less than one token of an empty cell is 0
    return np.where(available > 0, np.rint(cells), 0).astype(np.int64)


def _by_bucket(data: DataConfig, buckets: Sequence[Bucket], available: np.ndarray) -> np.ndarray:
    """float [buckets]: the budget of each; in a window without budget, all tokens of the bucket."""
    wanted = available.sum(axis=0).astype(float)
    for window, budget in budgets(data).items():
        inside = np.array([one.window == window for one in buckets])
        if not budget:
            continue
        weight = np.array([sum(one.sources.values()) if one.sources else one.weight for one in buckets]) * inside
        if not weight.sum() > 0:
            raise UserError(
                f"the weights of data.buckets with window={window} add up to 0; set data.{window}_tokens=0, or give "
                "one a weight"
            )
        wanted[inside] = (budget * weight / weight.sum())[inside]
        for at in np.flatnonzero(inside & (wanted > 0) & (available.sum(axis=0) == 0)).tolist():
            one, whole = buckets[at], round(wanted[at])
            raise UserError(
                f"data.{window}_tokens={budget} cannot be filled, because there is no {window} document of "
                f"{one.range_text} tokens (bucket {one.name}): all {whole} are missing; add such documents, or set "
                f"data.{window}_tokens=0 or the bucket's weight to 0"
            )
    return wanted


def _inside(data: DataConfig, buckets: Sequence[Bucket], wanted: np.ndarray, available: np.ndarray) -> np.ndarray:
    """float [sources, buckets], each bucket on its own.

    Listed cells come first, else the weights of the sources that have documents there. A bucket of a window without
    budget takes each document once.
    """
    cells = available.astype(float)
    for at, bucket in enumerate(buckets):
        if not budgets(data)[bucket.window]:
            continue
        listed = np.array([bucket.sources.get(source.name, 0.0) for source in data.sources])
        own = np.array([source.weight for source in data.sources]) * (available[:, at] > 0)
        weight = listed if bucket.sources else own
        if wanted[at] and not weight.sum():
            raise UserError(
                f"bucket {bucket.name} has a budget of {wanted[at]:.0f} tokens, and no source with such documents has "
                f"a weight; set data.sources.*.weight, or data.buckets.{bucket.name}.weight=0"
            )
        cells[:, at] = wanted[at] * weight / (weight.sum() or 1.0)
        _refuse_shortfall(data, bucket, cells[:, at], available[:, at])
    return cells


def _refuse_shortfall(data: DataConfig, bucket: Bucket, wanted: np.ndarray, available: np.ndarray) -> None:
    short = wanted - np.floor(data.max_repeats * available)
    for source, missing, asked, there in zip(data.sources, short, wanted, available, strict=True):
        if missing >= 1:
            key = (
                f"data.buckets.{bucket.name}.sources.{source.name}"
                if bucket.sources
                else f"data.sources.{source.name}.weight"
            )
            raise UserError(
                f"{source.name} cannot fill its {asked:.0f} tokens of bucket {bucket.name} ({bucket.range_text} "
                f"tokens): it has {there}, at most {data.max_repeats:g} times, so {missing:.0f} are missing; raise its "
                f"limits or data.max_repeats (to {np.ceil(10 * asked / there) / 10 if there else np.inf:g}), or lower "
                f"{key} or data.{bucket.window}_tokens"
            )


def _by_corpus(data: DataConfig, buckets: Sequence[Bucket], wanted: np.ndarray, available: np.ndarray) -> np.ndarray:
    weights = np.array([source.weight for source in data.sources])
    by_source = wanted.sum() * weights / weights.sum()
    _refuse_unfillable(data, buckets, by_source, wanted, available)
    return proportional_fit(available.astype(float), by_source, wanted, data.max_repeats)


def proportional_fit(natural: np.ndarray, rows: np.ndarray, columns: np.ndarray, max_repeats: float) -> np.ndarray:
    """The table with given marginals and bounded cells that is nearest to the natural one in relative entropy.

    The table is ``natural * min(max_repeats, a[row] * d[column])``. a and d are found in turn, each exactly: iterative
    proportional fitting (Deming and Stephan, 1940); with the bound it is coordinate ascent of the dual. Where no such
    table exists, the result misses the marginals.

    Args:
        natural: [rows, columns], not negative; a 0 stays 0.
        rows, columns: marginals with the same sum.
        max_repeats: bound of each cell, in multiples of the natural one.
    """
    a, d = np.ones(len(rows)), np.ones(len(columns))
    table = natural
    for _ in range(_ROUNDS):
        a = np.array([_factor(amounts, d, wanted, max_repeats) for amounts, wanted in zip(natural, rows, strict=True)])
        d = np.array(
            [_factor(amounts, a, wanted, max_repeats) for amounts, wanted in zip(natural.T, columns, strict=True)]
        )
        table = natural * np.minimum(max_repeats, np.outer(a, d))
        if np.abs(table.sum(axis=1) - rows).max() <= _SETTLED * rows.sum():
            break
    return table


def _factor(amounts: np.ndarray, others: np.ndarray, wanted: float, most: float) -> float:
    """The least x with ``sum(amounts * min(most, x * others)) = wanted``, or the x that comes closest where no x does.

    The sum is piecewise linear in x, with a corner where a term reaches its bound.
    """
    there = (amounts > 0) & (others > 0)
    if not there.any() or wanted <= 0:
        return 0.0
    corners = np.concatenate([[0.0], np.sort(most / others[there])])
    sums = np.minimum(most, np.outer(corners, others[there])) @ amounts[there]
    return float(np.interp(wanted, sums, corners))


def _refuse_unfillable(
    data: DataConfig, buckets: Sequence[Bucket], rows: np.ndarray, columns: np.ndarray, available: np.ndarray
) -> None:
    """Refuse marginals that cannot both be met; the text names the set of buckets that lacks most.

    They can be met unless some set of buckets asks for more than all sources together can give to it: the minimum cut
    between sources and buckets.
    """
    if len(buckets) > _MOST_BUCKETS:
        raise UserError(
            f"data.buckets makes {len(buckets)} buckets, and data.weights_of=corpus takes at most {_MOST_BUCKETS}; "
            "join some, or set data.weights_of=bucket"
        )
    chosen = (np.arange(1, 2 ** len(buckets))[:, None] >> np.arange(len(buckets)) & 1).astype(float)  # [sets, buckets]
    # small sets first: of equal lacks, argmax names the smallest set
    chosen = chosen[np.argsort(chosen.sum(axis=1), kind="stable")]
    documents = data.max_repeats * chosen @ available.T  # [sets, sources]: tokens that a source has for a set
    missing = chosen @ columns - np.minimum(documents, rows).sum(axis=1)
    worst = int(np.argmax(np.round(missing)))
    if missing[worst] < 1:
        return
    inside, most = np.flatnonzero(chosen[worst]).tolist(), documents[worst]
    asking = ", ".join(f"{buckets[at].name} ({buckets[at].range_text} tokens)" for at in inside)
    giving = ", ".join(
        f"{source.name} {min(there, budget):.0f} "
        f"({'all of its budget' if budget <= there else 'its documents of these lengths'})"
        for source, there, budget in zip(data.sources, most, rows, strict=True)
    )
    raise UserError(
        f"the buckets {asking} ask {(chosen @ columns)[worst]:.0f} tokens, and with "
        f"data.max_repeats={data.max_repeats:g} the sources give at most {giving}: {missing[worst]:.0f} are missing; "
        "add documents of these lengths or raise data.max_repeats, lower the weights of these buckets "
        "(data.buckets.*.weight), or raise the weights of sources that have such documents (data.sources.*.weight)"
    )
