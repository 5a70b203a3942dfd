"""Means, standard deviations and paired intervals against scipy's test, known numbers and their limits."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sit_atconv.study.report.statistics import Difference, Summary, paired_difference, summarise


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    random = np.random.default_rng(0)
    ours, first = random.normal(0.5, 0.1, 7), random.normal(0.4, 0.1, 7)
    found = paired_difference(dict(enumerate(ours.tolist())), dict(enumerate(first.tolist())))
    interval = stats.ttest_rel(ours, first).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert found.mean == pytest.approx((ours - first).mean(), rel=1e-12)
    assert found.n == 7


def test_a_known_interval() -> None:
    """Differences 1 to 5: mean 3, standard deviation √2.5, and t = 2.776445 with four degrees of freedom."""
    found = paired_difference({seed: 10.0 + seed for seed in range(1, 6)}, dict.fromkeys(range(1, 6), 10.0))
    half = 2.776445105 * math.sqrt(2.5 / 5)
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half), rel=1e-9)
    assert found.sign == 1


def test_mean_and_sample_standard_deviation() -> None:
    assert summarise([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]) == Summary(5.0, pytest.approx(math.sqrt(32 / 7)), 8)


def test_only_finite_numbers_count() -> None:
    assert summarise([1.0, math.nan, 3.0, math.inf, -math.inf, 1e200, None]) == Summary(
        2.0, pytest.approx(math.sqrt(2)), 2
    )
    assert summarise([None, math.nan]) is None
    assert summarise([]) is None


def test_only_seeds_of_both_rows_are_paired() -> None:
    ours = {0: 1.0, 1: 2.0, 2: math.nan, 3: 4.0, 4: 100.0}
    first = {0: 0.0, 1: 0.0, 2: 0.0, 3: math.inf, 5: -100.0}
    assert paired_difference(ours, first) == paired_difference({0: 1.0, 1: 2.0}, {0: 0.0, 1: 0.0})
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_one_seed_has_no_interval() -> None:
    assert summarise([3.0]) == Summary(3.0, None, 1)
    found = paired_difference({7: 3.0}, {7: 1.0})
    assert found == Difference(2.0, None, None, 1)
    assert found.sign == 0


def test_equal_values_have_no_spread() -> None:
    """0.1 three times: their sum divided by three is another number, which would give a spread of 1e-17."""
    assert summarise([0.1] * 3) == Summary(0.1, 0.0, 3)
    same = dict.fromkeys(range(3), 0.1)
    assert paired_difference(same, same) == Difference(0.0, 0.0, 0.0, 3)
    assert paired_difference(same, same).sign == 0
    assert paired_difference(dict.fromkeys(range(3), 1.5), dict.fromkeys(range(3), 2.0)).sign == -1


def test_differences_that_are_equal_but_for_rounding_have_no_width() -> None:
    shares = {0: (722, 743), 1: (703, 724)}  # of 890 samples: 21 more in both seeds
    first, ours = ({seed: pair[n] / 890 for seed, pair in shares.items()} for n in (0, 1))
    assert len({ours[seed] - first[seed] for seed in shares}) == 2
    found = paired_difference(ours, first)
    assert found.low == found.mean == found.high == pytest.approx(21 / 890)


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.floats(-1e6, 1e6)] * 2), min_size=2, max_size=8))
def test_exchanging_the_rows_turns_the_interval_around(pairs: list[tuple[float, float]]) -> None:
    ours, first = ({seed: pair[side] for seed, pair in enumerate(pairs)} for side in (0, 1))
    there, back = paired_difference(ours, first), paired_difference(first, ours)
    assert (there.mean, there.low, there.high) == (-back.mean, -back.high, -back.low)  # to the last bit
    assert there.low <= there.mean <= there.high
    assert there.sign == -back.sign
