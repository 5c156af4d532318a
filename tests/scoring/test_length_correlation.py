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


@given(PAIRS, st.integers(2, 9))
def test_within_steps_it_is_pearson_s_of_what_is_left_without_the_steps_means(pairs, step):
    running, scores, lengths = LengthCorrelation(), [], []
    for start in range(0, len(pairs), step):
        some_scores, some_lengths = np.array(pairs[start : start + step]).T
        running.add(some_scores.tolist(), some_lengths.astype(int).tolist())
        scores += (some_scores - some_scores.mean()).tolist()
        lengths += (some_lengths - some_lengths.mean()).tolist()
    if np.std(scores) > 1e-6 * max(abs(score) for score, _ in pairs) and np.std(lengths) > 1e-6:
        assert running.within_steps == pytest.approx(np.corrcoef(scores, lengths)[0, 1], abs=1e-6)


def test_candidates_of_similar_length_do_not_correlate_within_their_steps():
    """Scores that follow the length of the batch, but not of the sample: a choice owes nothing to length."""
    rng, running = np.random.default_rng(0), LengthCorrelation()
    for length in rng.integers(50, 500, size=200):
        lengths = length + rng.integers(0, 3, size=8)
        running.add((lengths + rng.normal(size=8) * 5).tolist(), lengths.tolist())
    assert running.value > 0.99
    assert abs(running.within_steps) < 0.3
    assert LengthCorrelation().within_steps is None
