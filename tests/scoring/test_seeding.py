"""Draws that depend on their coordinates alone, checked against numbers that must never change."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from candidates import candidates

from udsstream.scoring import methods
from udsstream.scoring.seeding import draw_signs, draw_with_replacement, draw_without_replacement, raw_bits


def random_scores(count, **coordinates):
    return methods.random(candidates(count, **coordinates))


def test_golden_bits():
    """Computed once; a log written with these draws must stay replayable."""
    assert raw_bits(3, seed=17, purpose="golden").tolist() == [
        1896915311980801694,
        6072607548874001492,
        7587211351424136471,
    ]
    assert raw_bits(2, seed=17, purpose="golden", epoch=1, batch=2).tolist() == [
        6070643423292296610,
        4684246179958260359,
    ]
    assert draw_signs(8, seed=3, purpose="golden").tolist() == [1, 1, -1, 1, 1, 1, 1, 1]
    assert draw_without_replacement(5, 100, seed=3, purpose="golden").tolist() == [70, 97, 48, 84, 81]
    assert draw_with_replacement(5, 100, seed=3, purpose="golden").tolist() == [80, 82, 26, 90, 98]


def test_golden_random_scores():
    assert random_scores(4, seed=17, epoch=0, batch=3).tolist() == [
        0.6587494015693665,
        0.8951961994171143,
        0.6572859287261963,
        0.244439959526062,
    ]


def test_every_coordinate_matters():
    base = {"seed": 1, "purpose": "a", "epoch": 2, "batch": 3}
    first = raw_bits(4, **base).tolist()
    others = [
        raw_bits(4, **{**base, **change}).tolist()
        for change in ({"seed": 2}, {"purpose": "b"}, {"epoch": 3}, {"batch": 4}, {"epoch": 3, "batch": 2})
    ]
    assert len({tuple(words) for words in [first, *others]}) == 6
    assert raw_bits(4, **base).tolist() == first


def test_a_longer_draw_begins_with_the_shorter_one():
    assert raw_bits(10, seed=1, purpose="a")[:4].tolist() == raw_bits(4, seed=1, purpose="a").tolist()


def test_neither_reads_nor_moves_the_global_generators():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before, scores = states(), random_scores(8, seed=1, epoch=0, batch=0)
    assert states() == before
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)
    assert torch.equal(random_scores(8, seed=1, epoch=0, batch=0), scores)


def test_without_replacement_is_a_permutation_when_all_are_drawn():
    assert sorted(draw_without_replacement(50, 50, seed=1, purpose="a").tolist()) == list(range(50))


@pytest.mark.parametrize("draw", [draw_with_replacement, draw_without_replacement])
def test_every_integer_is_drawn_about_as_often(draw):
    counts = np.zeros(10)
    for seed in range(2000):
        for value in draw(3, 10, seed=seed, purpose="uniform").tolist():
            counts[value] += 1
    # 600 expected each; χ² with 9 degrees of freedom exceeds 27.9 once in 1000.
    assert ((counts - 600) ** 2 / 600).sum() < 27.9


def test_random_scores_are_uniform_and_choose_every_place_about_as_often():
    scores = torch.cat([random_scores(8, seed=17, epoch=0, batch=batch) for batch in range(2000)])
    assert scores.dtype == torch.float32
    assert 0 <= scores.min() < 0.001
    assert 0.999 < scores.max() < 1
    assert float(scores.mean()) == pytest.approx(0.5, abs=0.01)
    best = scores.view(2000, 8).argmax(dim=1).bincount(minlength=8).double()
    assert float(((best - 250) ** 2 / 250).sum()) < 24.3  # χ², 7 degrees of freedom, once in 1000
