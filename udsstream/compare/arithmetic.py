"""The arithmetic of a comparison, as pure functions of numbers.

E evaluations of a run, R rows of two logs that hold the same candidates, S steps
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Spread", "at", "chance_overlap", "holm", "overlap", "paired", "spread", "t_test"]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A quantity over the seeds that have it."""

    mean: float
    deviation: float | None
    """Standard deviation with n − 1 in the denominator; None for a single seed."""
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.deviation is None else f" ± {self.deviation:.4f}")


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and sample standard deviation of the values that are known; None when none is."""
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return Spread(mean=statistics.fmean(known), deviation=deviation, n=len(known))


def paired(values: Mapping[int, float | None], baseline: Mapping[int, float | None]) -> list[float]:
    """value − baseline for each seed that has both, in the order of `values`."""
    return [
        value - other
        for seed, value in values.items()
        if value is not None and (other := baseline.get(seed)) is not None
    ]


def t_test(differences: Sequence[float]) -> float | None:
    """The two-sided p-value of a paired t-test: how often n normally distributed differences around 0 lie as far off as these, or further.

    n is small here, and for integer degrees of freedom ν = n − 1 Student's distribution is a finite sum
    (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 for odd ν and 26.7.4 for even ν, with θ = atan(t/√ν)).

    Args:
        differences: one for each seed.

    Returns:
        In [0, 1], absolute error about 1e-15; None for fewer than two. Equal differences other than 0 give 0.
    """
    n = len(differences)
    if n < 2:
        return None
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    if deviation == 0:
        return 1.0 if mean == 0 else 0.0
    freedom = n - 1
    theta = math.atan(abs(mean) / deviation * math.sqrt(n / freedom))
    cos2 = math.cos(theta) ** 2
    odd = freedom % 2
    term = math.cos(theta) if odd else 1.0
    series = 0.0
    for k in range(odd + 1, freedom, 2):
        series += term
        term *= cos2 * k / (k + 1)
    inside = math.sin(theta) * series
    return max(0.0, 1 - (2 / math.pi * (theta + inside) if odd else inside))


def holm(p_values: Mapping[str, float], level: float = 0.05) -> list[str]:
    """Which of several hypotheses are rejected so that with all of them true one or more is, in a share `level` at most (Holm 1979).

    Args:
        p_values: by name.
    """
    rejected = []
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if p > level / (len(p_values) - rank):
            break
        rejected.append(name)
    return rejected


def at(x: float, xs: np.ndarray, ys: np.ndarray) -> float | None:
    """The value at `x` on the straight lines between the points (xs, ys), (E,) each, xs ascending; None outside of them."""
    known = np.isfinite(xs) & np.isfinite(ys)
    xs, ys = xs[known], ys[known]
    if not len(xs) or not xs[0] <= x <= xs[-1]:
        return None
    return float(np.interp(x, xs, ys))


def overlap(step: np.ndarray, one: np.ndarray, other: np.ndarray) -> float | None:
    """Mean over the steps of the Jaccard index |A ∩ B| / |A ∪ B| of two choices among the same candidates.

    Args:
        step: (R,) of each row, ascending.
        one, other: (R,) bool, whether each choice took the row's candidate.

    Returns:
        In [0, 1]; a step of which neither chose anything does not count. None when no step does.
    """
    if not len(step):
        return None
    starts = np.flatnonzero(np.diff(step, prepend=step[0] - 1))
    both = np.add.reduceat((one & other).astype(np.int64), starts)
    either = np.add.reduceat((one | other).astype(np.int64), starts)
    counts = either > 0
    return float((both[counts] / either[counts]).mean()) if counts.any() else None


def chance_overlap(candidates: int, one: int, other: int) -> float:
    """The Jaccard index to expect of two uniform, independent choices of `one` and `other` of the same candidates (hypergeometric)."""
    total = math.comb(candidates, other)
    expected = 0.0
    for common in range(max(0, one + other - candidates), min(one, other) + 1):
        ways = math.comb(one, common) * math.comb(candidates - one, other - common)
        expected += ways / total * (common / (one + other - common) if one + other > common else 0.0)
    return expected
