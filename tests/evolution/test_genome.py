"""The search space: every drawn, mutated or crossed candidate stays inside the bounds and on the grid."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lr2train.config import SearchConfig, UserError
from lr2train.evolution.genome import ALL, ATTENTION_GRID, Candidate, Space
from lr2train.rope import METHODS, Spectrum


@st.composite
def spaces(draw) -> Space:
    """Spaces of many shapes, bounds on and off the grid among them."""
    window = draw(st.sampled_from([64, 500, 512, 8192]))
    spectrum = Spectrum(draw(st.sampled_from([8, 16, 64, 128])), draw(st.sampled_from([100.0, 1e4, 5e5])), window)
    low, attention_low = draw(st.floats(0.8, 1.2)), draw(st.floats(0.9, 1.2))
    options = SearchConfig(
        population=draw(st.integers(2, 24)),
        top_k=1,
        mutation_probability=draw(st.sampled_from([0.05, 0.3, 1.0])),
        mutation_step=draw(st.sampled_from([0.01, 0.25, 1.0])),
        mutation_spread=draw(st.sampled_from([0.01, 0.25, 3.0])),
        move_critical_index=draw(st.sampled_from([0.0, 0.2, 1.0])),
        crossover=draw(st.sampled_from([0.0, 0.5])),
        tail_low=low,
        tail_high=low + draw(st.floats(0.0, 1.0)),
        critical_index=draw(st.sampled_from([None, None, 1, 3])),
        head=draw(st.sampled_from(["ntk", "yarn"])),
        search_attention_factor=draw(st.booleans()),
        attention_factor=1.0625,
        attention_factor_low=attention_low,
        attention_factor_high=attention_low + draw(st.floats(0.0, 0.4)),
    )
    return Space(spectrum, draw(st.integers(window, 64 * window)), options)


def on_grid(value: float, step: float, low: float, high: float) -> bool:
    return value in (low, high) or math.isclose(value / step, round(value / step), abs_tol=1e-6)


def head_of(space: Space, rcd: int, first: float) -> list[float]:
    """Factors below the critical index, by the formulas of the paper and of YaRN (ramp from 32 periods to rcd)."""
    if space.settings.head == "ntk":
        return [first ** (i / rcd) for i in range(rcd)]
    spectrum = space.spectrum
    periods = math.log(spectrum.window_tokens / (2 * math.pi * 32)) / math.log(spectrum.base)
    low = min(max(math.floor(spectrum.n_dims * periods), 0), rcd - 1)
    shares = [min(max((i - low) / (rcd - low), 0.0), 1.0) for i in range(rcd)]
    return [1.0 / ((1.0 - share) + share / first) for share in shares]


def check(space: Space, candidate: Candidate) -> None:
    options, tail = space.settings, np.array(candidate.tail)
    low, high = options.tail_low * space.scale, options.tail_high * space.scale
    d10, tcd = space.spectrum.lowest_critical_index, space.spectrum.critical_index
    allowed = range(d10, tcd + 1) if options.critical_index is None else [options.critical_index]
    assert candidate.critical_index in allowed
    assert len(tail) == space.spectrum.n_dims - candidate.critical_index
    assert (low <= tail).all()
    assert (tail <= high).all()
    assert (np.diff(tail) >= 0).all()
    assert all(on_grid(value, options.mutation_step, low, high) for value in candidate.tail)
    if options.search_attention_factor:
        bounds = options.attention_factor_low, options.attention_factor_high
        assert bounds[0] <= candidate.attention_factor <= bounds[1]
        assert on_grid(candidate.attention_factor, ATTENTION_GRID, *bounds)
    else:
        assert candidate.attention_factor == 1.0625
    factors = space.factors(candidate)
    head = head_of(space, candidate.critical_index, candidate.tail[0])
    assert factors.rescale[candidate.critical_index :] == candidate.tail
    # two ways to the same number in float64
    np.testing.assert_allclose(factors.rescale[: candidate.critical_index], head, rtol=1e-12)
    assert factors.attention_factor == candidate.attention_factor
    assert factors.target_window_tokens == space.target_tokens


@settings(max_examples=60)
@given(spaces(), st.integers(0, 2**32 - 1))
def test_initial_members_and_chains_of_mutations_stay_inside_the_space(space, seed):
    rng = np.random.default_rng(seed)
    members = space.initial(rng)
    assert 1 <= len(members) <= space.settings.population
    assert len({member.key for member in members}) == len(members)
    for member in members:
        check(space, member)
    candidate = members[0]
    for _ in range(50):
        candidate = space.mutate(candidate, rng, members)
        check(space, candidate)


@settings(max_examples=100)
@given(
    st.lists(st.sampled_from([16.0, 16.01, 16.0100001, 123456.78, 123456.79]), min_size=2, max_size=2),
    st.lists(st.sampled_from([16.0, 16.01, 16.0100001, 123456.78, 123456.79]), min_size=2, max_size=2),
    st.sampled_from([(1.0, 1.0), (1.0, 1.0000001), (1.25, 1.2)]),
    st.sampled_from([(3, 3), (3, 4)]),
)
def test_keys_are_equal_iff_candidates_are(tail, other, attention, index):
    a = Candidate(index[0], tuple(tail), attention[0])
    b = Candidate(index[1], tuple(other), attention[1])
    assert (a.key == b.key) == (a == b)


@pytest.mark.parametrize("head", ["ntk", "yarn"])
@pytest.mark.parametrize("own", [None, tuple(np.linspace(1.0, 2.0, 32))])
@pytest.mark.parametrize("start_from", ["own", "plain"])
def test_slopes_of_the_factors_below_the_critical_index_are_finite_differences(head, own, start_from):
    spectrum, step = Spectrum(64, 10000.0, 512, own_rescale=own), 1e-5
    space = Space(spectrum, 4096, SearchConfig(algorithm="evolution", head=head), start_from)
    for index in space.critical_indices:
        one = Candidate(index, (9.0,) * (32 - index), 1.2)
        moved = [replace(one, tail=(9.0 * math.exp(by),) * (32 - index)) for by in (-step, step)]
        before, after = (np.log(space.factors(candidate).rescale[:index]) for candidate in moved)
        np.testing.assert_allclose(space.head_slopes(one), (after - before) / (2 * step), atol=1e-8)


def default_space(**options) -> Space:
    return Space(Spectrum(64, 10000.0, 512), 4096, SearchConfig(**{"algorithm": "evolution", **options}))


def test_the_initial_population_covers_every_critical_index_with_constant_tails():
    """Algorithm 1: one member for each index from d10 = 8 to tcd = 16; the others are mutations of these."""
    members = default_space(population=20).initial(np.random.default_rng(0))
    first = members[:9]
    assert [member.critical_index for member in first] == list(range(8, 17))
    assert all(len(set(member.tail)) == 1 for member in first)
    assert any(len(set(member.tail)) > 1 for member in members[9:])
    assert len(members) == 20


def test_a_small_population_is_spread_over_the_critical_indices():
    members = default_space(population=3, top_k=1).initial(np.random.default_rng(0))
    assert [member.critical_index for member in members] == [8, 12, 16]


def test_a_population_larger_than_the_space_ends_with_the_whole_space():
    space = default_space(population=64, tail_low=1.0, tail_high=1.0, critical_index=12, search_attention_factor=False)
    only = Candidate(12, (8.0,) * 20, 1.0)
    assert space.initial(np.random.default_rng(0)) == [only]
    assert space.fill([], [only], 5, np.random.default_rng(0), frozenset({only.key})) == []


def test_mutations_reach_the_whole_space():
    """A chain of mutations visits every critical index and both ends of both ranges."""
    space, rng = default_space(move_critical_index=0.5), np.random.default_rng(0)
    candidate = space.initial(rng)[0]
    seen = [candidate := space.mutate(candidate, rng, [candidate]) for _ in range(600)]
    assert {one.critical_index for one in seen} == set(range(8, 17))
    assert min(one.tail[0] for one in seen) == 8.0
    assert max(one.tail[-1] for one in seen) == 16.0
    assert {1.0, 1.4} <= {one.attention_factor for one in seen}


def test_without_mutation_a_child_is_its_parent():
    space = default_space(mutation_probability=0.0, move_critical_index=0.0)
    parent = space.initial(np.random.default_rng(1))[0]
    assert space.mutate(parent, np.random.default_rng(2), [parent]) == parent


def test_crossover_mixes_the_traits_of_two_parents():
    space, rng = (
        default_space(mutation_probability=0.0, move_critical_index=0.0, crossover=1.0),
        np.random.default_rng(0),
    )
    parent, mate = Candidate(10, (9.0,) * 11 + (12.0,) * 11, 1.0), Candidate(8, (16.0,) * 24, 1.3)
    children = [space.mutate(parent, rng, [mate]) for _ in range(200)]
    for child in children:
        check(space, child)
        assert set(child.tail) <= {9.0, 12.0, 16.0}
    assert {(child.critical_index, child.attention_factor) for child in children} == {
        (8, 1.0),
        (8, 1.3),
        (10, 1.0),
        (10, 1.3),
    }
    between = np.mean([np.mean(child.tail) for child in children])
    assert between == pytest.approx((10.5 + 16.0) / 2, abs=0.2), "no parent is preferred"


def longrope_space(**options) -> Space:
    return default_space(space="longrope", tail_high=1.25, **options)


def test_longrope_starts_from_pi_ntk_and_the_yarn_like_curve():
    members = longrope_space(population=8, top_k=2).initial(np.random.default_rng(0))
    assert [member.critical_index for member in members] == [ALL] * 8
    spectrum = Spectrum(64, 10000.0, 512)
    for member, name in zip(members, ("pi", "ntk_aware", "longrope"), strict=False):
        np.testing.assert_allclose(member.tail, METHODS[name](spectrum, 4096).rescale, atol=0.005 + 1e-9)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.0]))
def test_longrope_candidates_stay_inside_the_space(seed, crossover):
    space, rng = longrope_space(crossover=crossover), np.random.default_rng(seed)
    members = space.initial(rng)
    for member in [*members, *(space.mutate(members[i % len(members)], rng, members) for i in range(30))]:
        tail = np.array(member.tail)
        assert member.critical_index == ALL
        assert len(tail) == 32
        assert (np.diff(tail) >= 0).all()
        assert tail[0] >= 1.0
        assert tail[-1] <= 10.0
        factors = space.factors(member)
        assert factors.rescale == member.tail
        assert factors.attention_factor == member.attention_factor


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"critical_index": 32}, r"search\.critical_index=32 is outside 1 … 31"),
        ({"critical_index": 0}, r"search\.critical_index=0 is outside"),
        ({"tail_low": 2.0, "tail_high": 1.0}, r"search\.tail_low=2\.0 and search\.tail_high=1\.0 are no range"),
        ({"tail_low": 0.0}, r"search\.tail_low=0\.0"),
        (
            {"attention_factor_low": 1.5},
            r"search\.attention_factor_low=1\.5 and search\.attention_factor_high=1\.4 are no range",
        ),
        ({"mutation_step": 0.0}, r"search\.mutation_step=0\.0 is not a finite number of 1e-6 or more"),
        ({"mutation_step": 1e-320}, r"is not a finite number of 1e-6 or more"),
        ({"top_k": 64}, r"search\.top_k=64 is outside 1 … 63, .*set search\.top_k to 16"),
        ({"operators": "authors"}, r"search\.operators=authors needs one critical index .*search\.critical_index .*16"),
        (
            {"operators": "authors", "critical_index": 12, "tail_high": 1.01},
            r"20 strictly increasing factors in steps of search\.mutation_step=0\.01 do not fit between 8 and 8\.08",
        ),
        ({"space": "longrope", "critical_index": 9}, r"search\.critical_index=9 has no meaning"),
        ({"top_k": 0}, r"search\.top_k=0 is outside"),
    ],
)
def test_settings_that_leave_nothing_to_search_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        default_space(**options)


@pytest.mark.parametrize("all_dims", [False, True])
def test_a_model_that_is_extended_already_is_searched_on_top_of_its_table_or_from_plain_frequencies(all_dims):
    own = METHODS["yarn"](Spectrum(64, 10000.0, 512), 2048)  # by 4: the own table of a window of 2048
    spectrum = Spectrum(64, 10000.0, 2048, own.attention_factor, own.rescale)
    more = {"space": "longrope"} if all_dims else {}
    options = SearchConfig(population=12, top_k=2, search_attention_factor=False, attention_factor=1.0, **more)
    on_top, plain = (Space(spectrum, 8192, options, start_from) for start_from in ("own", "plain"))
    assert (on_top.scale, plain.scale) == (4, 16)
    assert plain.start == Spectrum(64, 10000.0, 512)
    for space, table in ((on_top, np.array(own.rescale)), (plain, np.ones(32))):
        low, high = space.bounds
        for one in space.initial(np.random.default_rng(0)):
            made, free = space.factors(one), len(one.tail)
            np.testing.assert_allclose(made.rescale[-free:], table[-free:] * one.tail, rtol=1e-15)
            assert low <= min(one.tail) <= max(one.tail) <= high
            assert made.spectrum is spectrum
            assert made.attention_factor == spectrum.attention_factor, "at least the base's own"
