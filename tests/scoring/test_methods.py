"""The methods: each against its definition, written another way."""

from __future__ import annotations

from typing import get_args

import numpy as np
import oracles
import pytest
import torch
from candidates import candidates
from hypothesis import given
from hypothesis import strategies as st

from udsstream.config import Method
from udsstream.errors import ConfigError, ScoreError
from udsstream.scoring import methods
from udsstream.scoring.candidates import checked_scores, measures
from udsstream.scoring.select import check_finite


def test_every_method_of_the_settings_is_there_and_no_other():
    assert set(methods.METHODS) == set(get_args(Method))


@given(
    values=st.lists(st.tuples(st.floats(0, 1e6, width=32), st.floats(0, 1e4, width=32)), min_size=1, max_size=10),
    alpha=st.floats(0, 100),
)
def test_the_score_can_be_recomputed_in_numpy_to_the_last_bit(values, alpha):
    intra, inter = (np.array(column, dtype=np.float32) for column in zip(*values, strict=True))
    expected = (intra.astype(np.float64) + alpha * inter.astype(np.float64)).astype(np.float32)
    found = methods.uds(candidates(intra=intra, inter=inter, alpha=alpha))
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected)


def test_a_score_that_overflows_is_infinite_and_so_refused():
    scores = methods.uds(candidates(intra=[3e38, 1.0], inter=[3e38, 1.0], alpha=1.0))
    with pytest.raises(ScoreError, match=r"inf for sample 8 \(position 0\)"):
        check_finite(scores, [8, 9])


def test_parts_and_baselines_are_their_measures():
    given = candidates(
        intra=[3.0, 1.0], inter=[1.0, 2.0], loss=[0.5, 0.25], grad_norm=[7.0, 9.0], tokens=[11, 12], alpha=2.0
    )
    assert methods.uds(given).tolist() == [5.0, 5.0]
    assert methods.uds_intra(given).tolist() == [3.0, 1.0]
    assert methods.uds_inter(given).tolist() == [1.0, 2.0]
    assert methods.by_loss(given).tolist() == [0.5, 0.25]
    assert methods.by_gradient(given).tolist() == [7.0, 9.0]
    assert methods.by_length(given).tolist() == [11.0, 12.0]
    assert methods.everything(given).tolist() == [0.0, 0.0]


@given(st.lists(st.tuples(st.floats(0, 100, width=32), st.floats(0, 100, width=32)), min_size=1, max_size=10))
def test_rho_loss_can_be_recomputed_to_the_last_bit(pairs):
    loss, reference = (np.array(column, np.float32) for column in zip(*pairs, strict=True))
    expected = (loss.astype(np.float64) - reference.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(methods.rho_loss(candidates(loss=loss, reference_loss=reference)), expected)


def gradients(seed: int, count: int = 7, rank: int | None = None) -> np.ndarray:
    """(count, 40); of low rank, some are sums of others."""
    rng = np.random.default_rng(seed)
    if rank is None:
        return rng.standard_normal((count, 40)) * rng.uniform(0.2, 3, (count, 1))
    return rng.standard_normal((count, rank)) @ rng.standard_normal((rank, 40))


def order_of(scores: torch.Tensor) -> list[int]:
    """The places by falling score; the scores must be B, B − 1, …, 1."""
    assert sorted(scores.tolist()) == list(range(1, len(scores) + 1))
    return torch.argsort(scores, descending=True).tolist()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rate", [1e-4, 0.02, 0.5])
def test_greats_takes_what_the_taylor_expansion_says(seed, rate):
    own, validation = gradients(seed), gradients(seed + 100, 3).mean(axis=0)
    given = candidates(alignment=own @ validation, interaction=rate * own @ own.T)
    assert order_of(methods.greats(given)) == oracles.greats_order(own, validation, rate)


def test_greats_avoids_a_second_sample_like_the_first():
    own = np.array([[1.0, 0.0], [0.99, 0.0], [0.0, 0.9]])
    validation = np.array([1.0, 1.0])
    assert order_of(methods.greats(candidates(alignment=own @ validation, interaction=own @ own.T))) == [0, 2, 1]
    assert order_of(methods.greats(candidates(alignment=own @ validation, interaction=0 * own @ own.T))) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rank", [None, 3])
def test_divbs_takes_what_adds_most_to_the_span(seed, rank):
    own = gradients(seed, rank=rank)
    found, expected = order_of(methods.divbs(candidates(interaction=own @ own.T))), oracles.divbs_order(own)
    # Of three dimensions, once two are taken, all that is left points in one direction: rounding decides.
    told = rank - 1 if rank else len(own)
    assert found[:told] == expected[:told]


def test_divbs_takes_no_twin_while_anything_else_is_left():
    own = np.array([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 0.05]])
    assert order_of(methods.divbs(candidates(interaction=own @ own.T))) == [0, 2, 3, 1]


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_selective_backprop_draws_by_percentile(share):
    """How often the best of 3 is which, over 4000 draws, against the weights' shares; χ² with 2 degrees of freedom, once in 1000: 13.8."""
    loss = [0.2, 5.0, 1.0]
    draws = 4000
    best = np.zeros(3)
    for batch in range(draws):
        best[int(methods.selective_backprop(candidates(loss=loss, share=share, seed=3, batch=batch)).argmax())] += 1
    weight = np.array([1 / 3, 3 / 3, 2 / 3]) ** (1 / share - 1)
    expected = draws * weight / weight.sum()
    assert ((best - expected) ** 2 / expected).sum() < 13.8


def test_selective_backprop_depends_on_its_coordinates_alone():
    def draw(**changed):
        return methods.selective_backprop(
            candidates(loss=[1.0, 2.0, 3.0, 3.0], **{"share": 0.25, "seed": 1, **changed})
        ).tolist()

    assert draw() == draw()
    assert len({tuple(draw(**change)) for change in ({}, {"seed": 2}, {"epoch": 1}, {"batch": 1}, {"share": 0.5})}) == 5


def test_a_method_of_ones_own_sees_what_it_asked_for_and_nothing_else():
    @measures("loss")
    def mine(given):
        return given["loss"] / given.tokens

    given = candidates(loss=[4.0, 9.0], tokens=[2, 3])
    assert mine.measures == ("loss",)
    assert checked_scores(mine(given), 2, "mine").tolist() == [2.0, 3.0]
    with pytest.raises(
        ConfigError, match=r"asks for 'intra', but loss was measured; put @udsstream.measures\('intra'\)"
    ):
        given["intra"]
    with pytest.raises(ConfigError, match=r"mine returned scores of shape \(3,\), expected \(2,\)"):
        checked_scores([1, 2, 3], 2, "mine")
    with pytest.raises(ConfigError, match="mine returned str, expected 2 numbers"):
        checked_scores("high", 2, "mine")
