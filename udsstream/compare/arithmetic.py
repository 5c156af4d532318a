"""The arithmetic of a comparison, as pure functions of numbers.

E evaluations of a run, R rows of two logs that hold the same candidates, S steps
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Spread", "at", "chance_overlap", "overlap", "paired", "spread"]


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
