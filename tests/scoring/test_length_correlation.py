"""The running correlation against NumPy's, in any split into steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from udsstream.scoring.length_correlation import LengthCorrelation

PAIRS = st.lists(st.tuples(st.floats(-1e4, 1e6, allow_subnormal=False), st.integers(1, 4096)), min_size=2, max_size=60)


@given(PAIRS, st.integers(1, 9))
def test_it_is_pearson_s(pairs, step):
    running = LengthCorrelation()
    for start in range(0, len(pairs), step):
        scores, lengths = zip(*pairs[start : start + step], strict=True)
        running.add(scores, lengths)
    scores, lengths = np.array(pairs).T
    if scores.std() > 1e-6 * abs(scores).max() and lengths.std() > 0:
        assert running.value == pytest.approx(np.corrcoef(scores, lengths)[0, 1], abs=1e-6)


def test_it_is_undefined_without_spread():
    running = LengthCorrelation()
    assert running.value is None
    running.add([2.0, 2.0], [5, 9])
    assert running.value is None
    running.add([3.0], [9])
    assert running.value == pytest.approx(0.5)


def test_large_means_cost_no_digits():
    running = LengthCorrelation()
    running.add([1e9 + x for x in (0.0, 1.0, 2.0)], [1_000_000, 1_000_001, 1_000_002])
    assert running.value == pytest.approx(1.0)
