"""Each form of the nuclear norm against the definition in float64: spectra, shapes, batches, threads, and the rule that picks one.

N tokens, r columns of a factor, B candidates
"""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from udsstream.scoring import nuclear_norm
from udsstream.scoring.nuclear_norm import (
    buckets,
    choose_dtype,
    choose_form,
    exact_float32,
    nuclear_norms,
    nuclear_norms_from_grams,
    polar_coefficients,
    smaller_gram,
)

CEILING = {"svd": 2e-6, "gram": 2e-5, "polar": 1e-4}
FORMS = list(CEILING)

SPECTRA = {
    "one huge": torch.cat([torch.tensor([1e4]), torch.ones(99)]),
    "flat": torch.ones(100),
    "tail of 1e-4": torch.cat([torch.ones(1), torch.full((99,), 1e-4)]),
    "tail of 1e-5": torch.cat([torch.ones(1), torch.full((99,), 1e-5)]),
    "tail of 1e-6": torch.cat([torch.ones(1), torch.full((99,), 1e-6)]),
    "half of it 1e-6": torch.cat([torch.ones(50), torch.full((50,), 1e-6)]),
    "seven decades": torch.logspace(0, -7, 100),
    "rank 1": torch.ones(1),
    "rank 2": torch.tensor([1.0, 1e-3]),
    "tiny": torch.full((100,), 1e-15),
    "large": torch.full((100,), 1e15),
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(values: torch.Tensor, n: int, r: int) -> torch.Tensor:
    """(n, r) float32 with about these singular values."""
    left = torch.linalg.qr(normal(n, len(values)).double()).Q
    right = torch.linalg.qr(normal(r, len(values), seed=1).double()).Q
    return ((left * values.double()) @ right.T).float()


def errors(found: torch.Tensor, factors: list[torch.Tensor]) -> list[float]:
    return [
        oracles.relative_error(norm, oracles.nuclear_norm(factor)) for norm, factor in zip(found, factors, strict=True)
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(123, 123), (123, 507), (507, 123), (512, 600)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_adversarial_spectra(form, shape, spectrum):
    factor = with_spectrum(SPECTRA[spectrum], *shape)
    assert errors(nuclear_norms([factor], form=form), [factor])[0] <= CEILING[form]


@pytest.mark.parametrize("form", FORMS)
def test_unequal_lengths_in_one_call(form):
    factors = [normal(n, 123, seed=n) for n in (1, 2, 60, 61, 59, 252, 123, 122, 124, 300, 1)]
    assert max(errors(nuclear_norms(factors, form=form), factors)) <= 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_one_token_is_its_length(form):
    factor = normal(1, 507)
    assert oracles.relative_error(nuclear_norms([factor], form=form)[0], factor.double().norm()) <= 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_zero_is_zero_and_what_is_not_finite_is_nan_by_itself(form):
    factors = [normal(40, 60, seed=1), torch.zeros(40, 60), normal(40, 60), normal(40, 60), normal(40, 60, seed=2)]
    factors[2][3, 4] = float("inf")
    factors[3][3, 4] = float("nan")
    found = nuclear_norms(factors, form=form)
    assert found[1] == 0
    assert torch.isnan(found[[2, 3]]).all()
    assert max(errors(found[[0, 4]], [factors[0], factors[4]])) <= 1e-6


@pytest.mark.parametrize(("form", "ceiling"), [("gram", 1e-5), ("polar", 2e-5)])
def test_float32_gram_matrices_do_for_a_language_models_spectrum(form, ceiling):
    """Singular values that fall off by three decades, the first several times the second: SmolLM2's on GSM8K."""
    spectrum = torch.cat([torch.tensor([4.0]), torch.logspace(0, -2.5, 120)])
    factor = with_spectrum(spectrum, 121, 576)
    assert errors(nuclear_norms([factor], form=form, dtype=torch.float32), [factor])[0] <= ceiling
    flat = with_spectrum(SPECTRA["rank 1"], 121, 576)
    assert errors(nuclear_norms([flat], form=form, dtype=torch.float32), [flat])[0] > 1e-3  # and not for this one


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(1, 70), min_size=1, max_size=8), form=st.sampled_from(FORMS), data=st.data())
def test_a_value_does_not_depend_on_the_batch(sizes, form, data):
    factors = [normal(n, 33, seed=place) for place, n in enumerate(sizes)]
    order = data.draw(st.permutations(range(len(sizes))))
    together = nuclear_norms([factors[place] for place in order], form=form)
    for place, of in enumerate(order):
        alone = nuclear_norms([factors[of]], form=form)[0]
        if form == "polar":
            assert oracles.relative_error(together[place], alone) <= 1e-6
        else:
            assert together[place] == alone


@pytest.mark.parametrize("form", FORMS)
def test_the_same_call_gives_the_same_bits(form):
    factors = [normal(n, 252, seed=n) for n in (30, 31, 100, 300)]
    assert torch.equal(nuclear_norms(factors, form=form), nuclear_norms(factors, form=form))


def test_the_number_of_threads_does_not_change_eigenvalues_and_is_left_as_it_was(monkeypatch):
    grams = [smaller_gram(normal(n, 252, seed=n), torch.float64) for n in (30, 31, 100, 300, 7)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(nuclear_norms_from_grams(grams, form="gram"))
            assert torch.get_num_threads() == threads
        monkeypatch.setattr(nuclear_norm, "_sum_of_roots", lambda _: torch.zeros(1, 2) @ torch.zeros(1, 2))
        with pytest.raises(RuntimeError):
            nuclear_norms_from_grams(grams, form="gram")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


def test_gradients_are_not_recorded():
    factor = normal(5, 6).requires_grad_()
    for form in FORMS:
        assert not nuclear_norms([factor, factor], form=form).requires_grad


# What they are made of --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5, 255, 256, 257, 400])
@pytest.mark.parametrize("r", [300, 33])
def test_the_smaller_gram_matrix(n, r):
    factor = normal(n, r)
    gram = smaller_gram(factor, torch.float64)
    x = factor.double() if n <= r else factor.double().T
    torch.testing.assert_close(torch.tril(gram), torch.tril(x @ x.T))


def test_only_lower_triangles_are_read():
    gram = smaller_gram(normal(40, 60), torch.float64)
    spoilt = torch.tril(gram) + torch.triu(torch.full_like(gram, 7.0), 1)
    for form in ("gram", "polar"):
        assert torch.equal(nuclear_norms_from_grams([spoilt], form=form), nuclear_norms_from_grams([gram], form=form))


@pytest.mark.parametrize("smallest", [1e-2, 1e-3, 1e-4, 1e-5])
def test_the_polynomials_take_the_interval_to_one(smallest):
    x = np.geomspace(smallest, 1, 20_001)
    for a, b, c in polar_coefficients(smallest):
        x = a * x + b * x**3 + c * x**5
    assert np.abs(x - 1).max() <= 2e-6


@pytest.mark.parametrize("n", [20, 120, 255, 383])
@pytest.mark.parametrize("smallest", [1e-4, 1e-5, 1e-6])
def test_rounding_does_not_grow_from_one_polynomial_to_the_next(n, smallest):
    """Values that the first polynomial takes to the very top, where rounding lifts them out of the next one's interval.

    It grows 26 times at each of the first ones. Without a margin, one real sample of 240 was off by 5e-5.
    """
    a, b, c = polar_coefficients(smallest)[0]
    top = math.sqrt((-3 * b - math.sqrt(9 * b * b - 20 * a * c)) / (10 * c))
    count = int(1 / top**2)
    tail = torch.logspace(0, -2.5, n - count).double()
    tail *= math.sqrt(1 - count * top**2) / tail.norm()
    spectrum = torch.cat([torch.full((count,), top, dtype=torch.float64), tail])
    basis = torch.linalg.qr(normal(n, n).double()).Q
    factor = torch.linalg.cholesky((basis * spectrum.square()) @ basis.T)
    aligned = nuclear_norm._polar_factor(factor.float()[None], smallest=smallest)[0]
    values = torch.linalg.svdvals(aligned.double())
    assert (values - 1).abs().max() <= 1e-5


def test_each_polynomial_is_the_best_of_its_kind():
    """Its error takes its largest size at four points with alternating sign (Chebyshev), so no other odd quintic is better."""
    (a, b, c), *_ = polar_coefficients(1e-3)
    x = np.linspace(1e-3, 1.005, 200_001)
    error = 1 - (a * x + b * x**3 + c * x**5)
    extrema = [error[0], *error[1:-1][(np.diff(error)[:-1] * np.diff(error)[1:]) < 0], error[-1]]
    assert len(extrema) == 4
    assert np.ptp(np.abs(extrema)) < 1e-6
    assert (np.diff(np.sign(extrema)) != 0).all()
    assert polar_coefficients(1e-3)[-1] == (1.875, -1.25, 0.375)


@settings(max_examples=50)
@given(sizes=st.lists(st.integers(1, 2048), min_size=1, max_size=40))
def test_buckets_waste_little(sizes):
    found = buckets(sizes)
    assert sorted(place for bucket in found for place in bucket) == list(range(len(sizes)))
    for bucket in found:
        longest = max(sizes[place] for place in bucket)
        assert min(sizes[place] for place in bucket) >= 0.9 * longest


def test_the_rule_goes_by_device():
    assert choose_form(torch.device("cpu")) == "gram"
    assert choose_form(torch.device("cuda")) == choose_form(torch.device("mps")) == "polar"
    assert choose_dtype(torch.device("cpu")) == choose_dtype(torch.device("cuda")) == torch.float64
    assert choose_dtype(torch.device("mps")) == torch.float32


class Operations(TorchDispatchMode):
    """Records the names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket._qualified_op_name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("form", "has", "has_not"),
    [
        ("svd", "_linalg_svd", "_linalg_eigh"),
        ("gram", "_linalg_eigh", "_linalg_svd"),
        ("polar", "linalg_cholesky_ex", "_linalg_eigh"),
    ],
)
def test_a_form_can_be_forced(form, has, has_not):
    with Operations() as seen:
        nuclear_norms([normal(20, 30)], form=form)
    assert has in seen.names
    assert has_not not in seen.names


def test_polar_batches_candidates_of_about_the_same_length():
    def products(lengths) -> int:
        with Operations() as seen:
            nuclear_norms([normal(n, 300, seed=n) for n in lengths], form="polar")
        return sum(name in ("bmm", "baddbmm") for name in seen.names)

    one = products([100])
    assert one == 3 * len(polar_coefficients(1e-5))
    assert products([100, 99, 95, 91]) == one
    assert products([100, 50]) == 2 * one


def test_training_in_tf32_or_bfloat16_products_does_not_reach_the_scores():
    before = torch.get_float32_matmul_precision()
    seen = []
    try:
        torch.set_float32_matmul_precision("medium")
        with exact_float32():
            seen.append(torch.get_float32_matmul_precision())
        seen.append(torch.get_float32_matmul_precision())
        factors = [normal(300, 300)]
        assert errors(nuclear_norms(factors, form="polar"), factors)[0] <= 1e-6
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest", "medium"]
