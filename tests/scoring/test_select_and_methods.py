"""From scores to the kept: ties, order, values that are not finite, and the exact rounding of the combined score."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from udsstream.errors import ScoreError
from udsstream.scoring import methods
from udsstream.scoring.select import check_finite, top_k


@given(scores=st.lists(st.sampled_from([-1.0, 0.0, -0.0, 1.5, 2.0]), min_size=1, max_size=40), data=st.data())
def test_top_k_is_the_naive_one_with_many_ties(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    assert top_k(torch.tensor(scores), k).tolist() == oracles.top_k(scores, k)


@given(scores=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_top_k_is_the_naive_one_for_any_scores(scores):
    k = (len(scores) + 1) // 2
    assert top_k(torch.tensor(scores), k).tolist() == oracles.top_k(scores, k)


def test_equal_scores_keep_the_smaller_places():
    assert top_k(torch.zeros(1000), 3).tolist() == [0, 1, 2]
    assert top_k(torch.tensor([1.0, 3.0, 3.0, 3.0, 5.0]), 3).tolist() == [1, 2, 4]


def test_check_finite_names_the_sample_its_place_and_its_value():
    check_finite(torch.tensor([1.0, -2.0]), [5, 6])
    with pytest.raises(
        ScoreError, match=r"2 of 4 scores are not finite: nan for sample 71 \(position 1\), inf for sample 73"
    ):
        check_finite(torch.tensor([1.0, float("nan"), 2.0, float("inf")]), [70, 71, 72, 73])
    with pytest.raises(ScoreError, match=r"20 of 20 .* \(position 7\) and 12 more\."):
        check_finite(torch.full((20,), float("nan")), list(range(20)))


@given(
    values=st.lists(st.tuples(st.floats(0, 1e6, width=32), st.floats(0, 1e4, width=32)), min_size=1, max_size=10),
    alpha=st.floats(0, 100),
)
def test_the_score_can_be_recomputed_in_numpy_to_the_last_bit(values, alpha):
    intra, inter = (np.array(column, dtype=np.float32) for column in zip(*values, strict=True))
    expected = (intra.astype(np.float64) + alpha * inter.astype(np.float64)).astype(np.float32)
    found = methods.uds(torch.from_numpy(intra), torch.from_numpy(inter), alpha)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected)


def test_a_score_that_overflows_is_infinite_and_so_refused():
    scores = methods.uds(torch.tensor([3e38, 1.0]), torch.tensor([3e38, 1.0]), 1.0)
    with pytest.raises(ScoreError, match=r"inf for sample 8 \(position 0\)"):
        check_finite(scores, [8, 9])
