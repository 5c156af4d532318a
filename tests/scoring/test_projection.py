"""The two scalings against explicit matrices, their geometry over many draws, and draws that must never change."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch

from udsstream.config import PUBLISHED_ALPHA, convert_alpha
from udsstream.errors import ConfigError
from udsstream.scoring.projection import BilinearProjection, TrigonometricSketch

SCALES = ["isometric", "reference"]


def sketch(d: int, n: int, scale="isometric", seed: int = 17, side: str = "vocabulary") -> TrigonometricSketch:
    return TrigonometricSketch.draw(d, n, scale=scale, seed=seed, side=side)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("d", "n"), [(1, 1), (8, 8), (16, 123), (31, 252), (128, 507), (7, 152_064)])
def test_columns_equal_the_explicit_matrix(scale, d, n):
    drawn = sketch(d, n, scale)
    expected = oracles.gamma(drawn)
    columns = drawn.columns(0, n)
    assert columns.dtype == torch.float32
    assert columns.shape == (d, n)
    # Every column, the last as well as the first, is right to the rounding of one float32.
    np.testing.assert_allclose(oracles.f64(columns), expected, rtol=0, atol=1.2e-7 * np.abs(expected).max())


@pytest.mark.parametrize("scale", SCALES)
def test_any_slice_of_columns_is_that_slice_of_the_matrix(scale):
    drawn = sketch(16, 507, scale)
    whole = drawn.columns(0, 507)
    for start, stop in [(0, 1), (123, 252), (506, 507), (5, 5)]:
        assert torch.equal(drawn.columns(start, stop), whole[:, start:stop])


def test_all_rows_of_the_isometric_map_are_an_orthogonal_matrix():
    gamma = oracles.f64(sketch(123, 123).columns(0, 123))
    np.testing.assert_allclose(gamma @ gamma.T, np.eye(123), atol=2e-6)


def mean_squared_ratio(scale: str, vector: np.ndarray, draws: int = 200) -> float:
    ratios = [
        np.linalg.norm(oracles.f64(sketch(64, len(vector), scale, seed=seed).columns(0, len(vector))) @ vector) ** 2
        for seed in range(draws)
    ]
    return float(np.mean(ratios) / np.linalg.norm(vector) ** 2)


def unit(n: int, place: int) -> np.ndarray:
    return np.eye(n)[place]


@pytest.mark.parametrize(
    "vector",
    [
        pytest.param(np.random.default_rng(0).normal(size=506), id="dense"),
        pytest.param(np.ones(507), id="constant"),
        pytest.param(unit(506, 0), id="first"),
        pytest.param(unit(506, 253), id="middle"),
        pytest.param(unit(506, 505), id="last"),
        pytest.param(unit(507, 100) - unit(507, 406), id="mirrored pair"),
    ],
)
def test_isometry_over_200_draws(vector):
    assert mean_squared_ratio("isometric", vector) == pytest.approx(1, rel=0.05)


def test_plain_cosines_would_count_some_coordinates_twice():
    """Why the isometric map is a DCT: the published map is that much off for the first and the middle coordinate."""
    dense = mean_squared_ratio("reference", np.random.default_rng(0).normal(size=506))
    assert mean_squared_ratio("reference", unit(506, 0)) / dense == pytest.approx(2, rel=0.05)
    assert mean_squared_ratio("reference", unit(506, 253)) / dense == pytest.approx(2, rel=0.05)


def bilinear(scale: str, seed: int, v: int = 507, t: int = 64) -> BilinearProjection:
    return BilinearProjection.draw(vocab_size=v, max_seq_len=t, dims=(32, 8), scale=scale, seed=seed)


def test_isometry_of_both_sides_together():
    generator = np.random.default_rng(1)
    ratios = []
    for seed in range(200):
        matrix = generator.normal(size=(40, 507))
        z = bilinear("isometric", seed).project_logits(torch.from_numpy(matrix))
        ratios.append(float(oracles.f64(z) @ oracles.f64(z)) / np.sum(matrix**2))
    assert np.mean(ratios) == pytest.approx(1, rel=0.05)


def test_distances_of_the_reference_are_longer_by_the_factor_that_converts_alpha():
    v, t = 507, 64
    generator = np.random.default_rng(2)
    squares = {"isometric": 0.0, "reference": 0.0}
    for seed in range(200):
        one, other = torch.from_numpy(generator.normal(size=(2, 40, v))).float()
        for scale in SCALES:
            projection = bilinear(scale, seed, v, t)
            gap = projection.project_logits(one) - projection.project_logits(other)
            squares[scale] += float(gap.square().sum())
    ratio = math.sqrt(squares["reference"] / squares["isometric"])
    assert ratio == pytest.approx(math.sqrt(t * v) / 2, rel=0.05)
    assert convert_alpha(1.0, vocab_size=v, max_seq_len=t) == pytest.approx(math.sqrt(t * v) / 2)


def test_alpha_at_the_published_shapes():
    """512 × 152064 logits: distances 4411 times longer (method.md)."""
    assert convert_alpha(PUBLISHED_ALPHA, vocab_size=152_064, max_seq_len=512) == pytest.approx(
        1.5e-3 * 4411.8, rel=1e-4
    )


# Draws -----------------------------------------------------------------------------------------------------------------


def test_frequencies_of_the_isometric_map_are_distinct_and_of_the_reference_map_are_not():
    isometric, reference = sketch(400, 507), sketch(400, 507, "reference")
    assert len(set(isometric.frequencies.tolist())) == 400
    assert len(set(reference.frequencies.tolist())) < 400
    for drawn in (isometric, reference):
        assert drawn.frequencies.min() >= 0
        assert drawn.frequencies.max() < 507
        assert set(drawn.signs.tolist()) == {-1, 1}


def test_more_rows_than_columns_are_refused_where_frequencies_must_be_distinct():
    with pytest.raises(ConfigError, match=r"33 rows on the vocabulary side.*only 32 columns.*choose at most 32"):
        sketch(33, 32)
    assert sketch(33, 32, "reference").d == 33


def test_seeds_and_sides_give_other_draws_and_the_same_seed_the_same():
    base = sketch(16, 507)
    again = sketch(16, 507)
    np.testing.assert_array_equal(base.frequencies, again.frequencies)
    np.testing.assert_array_equal(base.signs, again.signs)
    for other in (sketch(16, 507, seed=18), sketch(16, 507, side="token")):
        assert base.frequencies.tolist() != other.frequencies.tolist()
        agreement = np.mean(base.signs == other.signs)
        assert 0.4 < agreement < 0.6


def test_golden_draws():
    """Logs name only the seed: a draw that changes makes every log unreadable. Computed once; never to be updated."""
    projection = BilinearProjection.draw(vocab_size=49_152, max_seq_len=2048, dims=(128, 8), scale="isometric", seed=17)
    assert projection.vocabulary.frequencies[:6].tolist() == GOLDEN["vocabulary"]
    assert projection.tokens.frequencies.tolist() == GOLDEN["token"]
    assert projection.vocabulary.signs[:16].tolist() == GOLDEN["vocabulary signs"]
    assert projection.tokens.signs[:16].tolist() == GOLDEN["token signs"]
    assert sketch(6, 49_152, "reference").frequencies.tolist() == GOLDEN["reference"]


GOLDEN = {
    "vocabulary": [13281, 35743, 20487, 15815, 47755, 9384],
    "token": [429, 1461, 847, 1584, 1129, 181, 1806, 1141],
    "vocabulary signs": [1, -1, 1, 1, 1, -1, -1, 1, 1, -1, -1, -1, 1, -1, -1, 1],
    "token signs": [1, -1, 1, 1, 1, 1, -1, -1, 1, 1, -1, -1, -1, 1, 1, -1],
    "reference": [12221, 35198, 6694, 37599, 31770, 17130],
}
