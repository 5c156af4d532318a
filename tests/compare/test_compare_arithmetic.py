"""The arithmetic of a comparison against numbers worked out by hand, and overlaps against sets and enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udsstream.compare.arithmetic import Spread, at, chance_overlap, holm, overlap, paired, spread, t_test


def test_spread():
    assert spread([1.0, 2.0, 4.0]) == Spread(mean=7 / 3, deviation=pytest.approx(math.sqrt(7 / 3)), n=3)  # n − 1
    assert spread([3.0, None]) == Spread(mean=3.0, deviation=None, n=1)
    assert spread([None, math.nan]) is None
    assert str(spread([0.5, 0.7])) == "0.6000 ± 0.1414"
    assert str(spread([0.5])) == "0.5000"


def test_paired_takes_the_seeds_that_both_have():
    assert paired({1: 0.5, 2: 0.25, 3: None, 4: 1.0}, {1: 1.0, 2: None, 3: 1.0, 4: 0.5, 5: 9.0}) == [-0.5, 0.5]


def students_tails(t: float, freedom: int) -> float:
    """P(|T| > t) by Simpson's rule over Student's density (1908), with x = tan θ so that the tail is finite."""
    theta = np.linspace(math.atan(t), math.pi / 2, 20_001)[:-1]
    density = (1 + np.tan(theta) ** 2 / freedom) ** (-(freedom + 1) / 2) / np.cos(theta) ** 2
    density = np.append(density, 1.0 if freedom == 1 else 0.0)  # the limit at π/2
    weights = np.where(np.arange(len(density)) % 2, 4.0, 2.0)
    weights[[0, -1]] = 1.0
    integral = float((weights * density).sum()) * (math.pi / 2 - math.atan(t)) / (len(density) - 1) / 3
    constant = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    return 2 * constant * integral


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 9, 16, 31])
@pytest.mark.parametrize("shift", [-2.5, -0.3, 0.0, 0.8])
def test_t_test_is_the_integral_of_the_tails(n, shift):
    differences = np.random.default_rng(n).normal(shift, 1.0, n).tolist()
    t = abs(np.mean(differences)) / (np.std(differences, ddof=1) / math.sqrt(n))
    assert t_test(differences) == pytest.approx(students_tails(t, n - 1), rel=1e-6, abs=1e-12)
    assert t_test([-value for value in differences]) == t_test(differences)


@pytest.mark.parametrize(
    ("freedom", "critical"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228)]
)
def test_t_test_at_the_tabulated_critical_values(freedom, critical):
    """Student's t, two-sided 5%: any table has them."""
    n = freedom + 1
    values = np.arange(n) - freedom / 2
    differences = values / values.std(ddof=1) + critical / math.sqrt(n)
    assert t_test(differences.tolist()) == pytest.approx(0.05, abs=5e-5)


def test_t_test_of_few_or_equal_differences():
    assert t_test([]) is None
    assert t_test([0.5]) is None
    assert t_test([0.5, 0.5]) == 0.0
    assert t_test([0.0, 0.0, 0.0]) == 1.0


def test_holm_goes_on_until_the_first_that_is_not_rejected():
    p_values = {"a": 0.06, "b": 0.001, "c": 0.02, "d": 0.015}
    assert holm(p_values) == ["b", "d", "c"]  # ≤ 0.05 / 4, / 3, / 2
    assert holm(p_values | {"d": 0.02}) == ["b"]  # 0.02 > 0.05 / 3: c, which alone would pass at 0.05 / 2, is not asked
    assert holm({"a": 0.05}) == ["a"]
    assert holm({}) == []


def test_at_is_on_the_straight_line_between_two_points():
    xs, ys = np.array([0.0, 100.0, 300.0]), np.array([2.0, 1.0, 0.5])
    assert at(50, xs, ys) == 1.5
    assert at(200, xs, ys) == 0.75
    assert at(300, xs, ys) == 0.5
    assert at(301, xs, ys) is None
    assert at(-1, xs, ys) is None
    assert at(150, np.array([0.0, math.nan, 300.0]), ys) == 1.25  # without the point that is not known
    assert at(0, np.empty(0), np.empty(0)) is None


def test_overlap_by_hand():
    step = np.array([0, 0, 0, 0, 1, 1, 1, 2])
    one = np.array([1, 1, 0, 0, 1, 0, 0, 0], bool)
    other = np.array([1, 0, 1, 0, 1, 0, 0, 0], bool)
    assert overlap(step, one, other) == pytest.approx((1 / 3 + 1) / 2)  # nothing was chosen at step 2
    assert overlap(step[7:], one[7:], other[7:]) is None
    assert overlap(step[:0], one[:0], other[:0]) is None


@given(st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=5), min_size=1, max_size=6))
def test_overlap_is_the_mean_of_the_steps_sets(steps):
    step = np.array([10 * i for i, rows in enumerate(steps) for _ in rows])
    one, other = (np.array([row[which] for rows in steps for row in rows]) for which in (0, 1))
    expected = []
    for rows in steps:
        a, b = ({i for i, row in enumerate(rows) if row[which]} for which in (0, 1))
        expected += [len(a & b) / len(a | b)] if a | b else []
    found = overlap(step, one, other)
    assert found == (pytest.approx(sum(expected) / len(expected)) if expected else None)


@pytest.mark.parametrize(("candidates", "one", "other"), [(8, 2, 2), (6, 2, 5), (4, 4, 1), (5, 0, 2), (3, 0, 0)])
def test_chance_overlap_is_the_mean_over_all_choices(candidates, one, other):
    fixed = set(range(one))
    values = []
    for choice in itertools.combinations(range(candidates), other):
        either = fixed | set(choice)
        values.append(len(fixed & set(choice)) / len(either) if either else 0.0)
    assert chance_overlap(candidates, one, other) == pytest.approx(sum(values) / len(values))
