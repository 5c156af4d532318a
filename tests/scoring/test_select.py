"""From scores to the kept: ties, order, values that are not finite, and budgets of tokens."""

from __future__ import annotations

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from udsstream.errors import ScoreError
from udsstream.scoring.select import check_finite, top_k, within_budget


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
    scores=st.lists(st.sampled_from([-1.0, 0.0, 1.5, 2.0]), min_size=1, max_size=20),
    budget=st.integers(1, 200),
    ranks=st.integers(1, 4),
    data=st.data(),
)
def test_a_token_budget_is_filled_by_falling_score_and_never_exceeded(scores, budget, ranks, data):
    scores = scores * ranks  # batches that the ranks share evenly
    tokens = data.draw(st.lists(st.integers(1, 60), min_size=len(scores), max_size=len(scores)))
    found = within_budget(torch.tensor(scores), tokens, budget, multiple_of=ranks).tolist()
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    k = 0
    while k < len(order) and sum(tokens[place] for place in order[: k + 1]) <= budget:
        k += 1
    k = max(ranks, k - k % ranks)
    assert found == sorted(order[:k])
    assert len(found) == ranks or sum(tokens[place] for place in found) <= budget


def test_what_is_longer_than_the_budget_is_kept_when_it_is_the_best_and_stops_the_rest():
    assert within_budget(torch.tensor([1.0, 3.0, 2.0]), [5, 50, 5], 20).tolist() == [1]
    assert within_budget(torch.tensor([3.0, 2.0, 1.0]), [5, 50, 5], 20).tolist() == [0]
    assert within_budget(torch.tensor([3.0, 2.0, 1.0]), [5, 10, 5], 20).tolist() == [0, 1, 2]
