"""The nuclear norm of a logits matrix, `‖L‖_* = Σ σ_j(L)`: the definition, and two forms that cost a hundredth of it.

    B candidates, N tokens, V vocabulary, r columns of a factor, n = min(N, r)

Any X (N×r) with `X Xᵀ = L Lᵀ` has the singular values of L. For a linear head `L = H Wᵀ`, `X = H Rᵀ` with `WᵀW = RᵀR` is such
a matrix and has about D columns instead of V (`lm_head.py` makes R). The smaller of its two Gram matrices, G (n×n), is enough.

`svd`    the definition, `torch.linalg.svdvals`. The slow reference of the other two.
`gram`   the square roots of G's eigenvalues, one candidate after the other. The CPU's form.
`polar`  `‖L‖_* = ⟨U, C⟩` with the Cholesky factor C of G and C's polar factor U from odd polynomial iterations: products of
         matrices only, batched, and never a wait for the device. The form of GPUs, where eigenvalues are slow.

Error relative to the definition in float64: at most 2e-5 (`gram`) and 1e-4 (`polar`) on every spectrum of
`tests/scoring/test_nuclear_norm.py`, below 1e-6 on a language model's. Squaring costs half the digits, so G is formed in float64;
`dtype=torch.float32` saves a fifth of the time and is off by 1e-5 on a language model's spectrum, but on a matrix of low rank by per cents
(`gram`) or several times its norm (`polar`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "NuclearNormForm",
    "buckets",
    "choose_dtype",
    "choose_form",
    "exact_float32",
    "nuclear_norm_svd",
    "nuclear_norms",
    "nuclear_norms_from_grams",
    "polar_coefficients",
    "smaller_gram",
]

NuclearNormForm = Literal["svd", "gram", "polar"]

_LEAST_FILL = 0.9
"""Candidates share a padded batch when the shortest has at least this part of the longest's rows."""

_RESOLVED = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Singular values below this part of ‖X‖_F are only partly counted by `polar`, whose number of iterations grows with its logarithm."""


def nuclear_norm_svd(logits: Tensor) -> Tensor:
    """The definition: logits (N, V) → scalar, in the dtype of `logits`. The slow reference of everything below."""
    return torch.linalg.svdvals(logits).sum()


def choose_form(device: torch.device) -> NuclearNormForm:
    """`gram` on the CPU, where eigenvalues cost less than some thirty products of the same size; `polar` on any accelerator."""
    return "gram" if device.type == "cpu" else "polar"


def choose_dtype(device: torch.device) -> torch.dtype:
    """The dtype of Gram matrices: float64, or float32 on devices that have no float64 (Apple's)."""
    return torch.float64 if device.type in ("cpu", "cuda", "xpu") else torch.float32


@torch.no_grad()
def nuclear_norms(
    factors: Sequence[Tensor], *, form: NuclearNormForm | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """X_i (N_i, r) float32, each with the singular values of a candidate's logits → `‖L_i‖_*`, (B,) float32 on the same device.

    A candidate's value does not depend on the others, but for the rounding of `polar`'s batched products. It is NaN when its factor
    holds a value that is not finite.

    Args:
        factors: one for each candidate; their N_i may differ.
        form: None: `choose_form`.
        dtype: of the Gram matrices (`svd`: of the decomposition). None: `choose_dtype`.
    """
    device = factors[0].device
    form, dtype = form or choose_form(device), dtype or choose_dtype(device)
    if form == "svd":
        return torch.stack([_svd_or_nan(factor.to(dtype)) for factor in factors]).float()
    with exact_float32():
        return nuclear_norms_from_grams([smaller_gram(factor, dtype) for factor in factors], form=form)


@torch.no_grad()
def nuclear_norms_from_grams(grams: Sequence[Tensor], *, form: Literal["gram", "polar"] | None = None) -> Tensor:
    """L Lᵀ or Lᵀ L of each candidate (n_i, n_i), float64 or float32 → `‖L_i‖_*`, (B,) float32 on the same device.

    Only the lower triangles are read.
    """
    if (form or choose_form(grams[0].device)) == "gram":
        with _one_thread(grams[0].device):
            return torch.stack([_sum_of_roots(gram) for gram in grams]).float()
    norms: list[Tensor] = [grams[0]] * len(grams)
    with exact_float32():
        for places in buckets([gram.shape[0] for gram in grams]):
            found = _polar_norms([grams[place] for place in places])
            for place, norm in zip(places, found.unbind(), strict=True):
                norms[place] = norm
    return torch.stack(norms).float()


def smaller_gram(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """X (N, r) → the lower triangle, at least, of X Xᵀ or XᵀX, whichever is smaller, (n, n) in `dtype`."""
    x = factor.to(dtype)
    x = x if x.shape[0] <= x.shape[1] else x.T
    n = x.shape[0]
    if n < 2 * _STRIP:
        return x @ x.T
    gram = x.new_zeros(n, n)
    for start in range(0, n, _STRIP):
        stop = min(start + _STRIP, n)
        torch.mm(x[start:stop], x[:stop].T, out=gram[start:stop, :stop])
    return gram


_STRIP = 128
"""Rows of a Gram matrix computed at a time; above the diagonal only what falls into the strip. Narrower ones would idle the cores."""


@contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 products in float32, whatever training chose for its own: TF32 and bfloat16 would cost 1e-3 of a score."""
    chosen = torch.get_float32_matmul_precision()
    if chosen == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


def buckets(sizes: Sequence[int]) -> list[list[int]]:
    """Places of matrices that are padded to one size: sorted by size, the smallest of each bucket at least 0.9 of its largest."""
    order = sorted(range(len(sizes)), key=lambda place: (-sizes[place], place))
    found: list[list[int]] = []
    for place in order:
        if found and sizes[place] >= _LEAST_FILL * sizes[found[-1][0]]:
            found[-1].append(place)
        else:
            found.append([place])
    return found


# Eigenvalues ------------------------------------------------------------------------------------------------------------


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On the CPU: LAPACK loses a tenth by a second thread on a few hundred rows, and no value depends on how many there are."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _sum_of_roots(gram: Tensor) -> Tensor:
    """Sum of the square roots of the eigenvalues, rounding below 0 cut off; NaN instead of LAPACK's nameless error."""
    finite = torch.isfinite(gram.diagonal()).all()  # |g_ij| ≤ √(g_ii g_jj): a sound diagonal is a sound matrix
    if gram.device.type != "cpu":  # there, to ask would be to wait for the device
        gram = torch.where(finite, gram, 0)
    elif not finite:
        return gram.new_tensor(float("nan"))
    norm = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum()
    return torch.where(finite, norm, float("nan"))


def _svd_or_nan(matrix: Tensor) -> Tensor:
    finite = torch.isfinite(matrix).all()
    return torch.where(finite, nuclear_norm_svd(torch.where(finite, matrix, 0)), float("nan"))


# The polar factor -------------------------------------------------------------------------------------------------------


def _polar_norms(grams: list[Tensor]) -> Tensor:
    """Gram matrices (n_i, n_i) of about the same size → (b,) in their dtype.

    Each is divided by its trace. One of low rank has no Cholesky factor but for a jitter of a few roundings on its diagonal, which
    makes of a singular value of zero one that is below what the iterations resolve; both factors are computed, since to ask which is
    needed would be to wait for the device. Padding is another block on the diagonal, left out of the sum.
    """
    dtype, widest = grams[0].dtype, max(gram.shape[0] for gram in grams)
    sizes = torch.tensor([gram.shape[0] for gram in grams]).to(grams[0].device, non_blocking=True)
    padded = torch.stack([torch.nn.functional.pad(gram, (0, widest - len(gram)) * 2) for gram in grams])
    real = torch.arange(widest, device=padded.device) < sizes[:, None]
    diagonal = torch.diagonal(padded, dim1=1, dim2=2)
    trace = diagonal.sum(dim=1)
    finite = torch.isfinite(trace)  # |g_ij| ≤ √(g_ii g_jj): a sound diagonal is a sound matrix
    sound = (finite & (trace > 0))[:, None, None]
    eye = torch.eye(widest, dtype=dtype, device=padded.device)
    scaled = torch.where(sound, padded / trace[:, None, None], eye / widest)
    scaled = scaled + torch.diag_embed(torch.where(real, 0.0, 1 / widest).to(dtype))
    jitter = 8 * widest**0.5 * torch.finfo(dtype).eps
    lower, failed = torch.linalg.cholesky_ex(scaled)
    jittered, lost = torch.linalg.cholesky_ex(scaled + jitter * eye)
    lower = torch.where((failed == 0)[:, None, None], lower, jittered / (1 + jitter) ** 0.5)
    factor = torch.tril(lower).float()
    aligned = (_polar_factor(factor, smallest=_RESOLVED[dtype]) * factor * real[:, :, None]).sum(dim=(1, 2))
    norms = torch.where(trace > 0, aligned.to(dtype) * trace.sqrt(), 0)
    return torch.where(finite & ((failed == 0) | (lost == 0)), norms, float("nan"))


def _polar_factor(factor: Tensor, *, smallest: float) -> Tensor:
    """C (b, n, n) float32, ‖C‖₂ ≤ 1 → U with C = U·(CᵀC)^½, for the singular values from `smallest` on; less than U below."""
    x = factor
    for a, b, c in polar_coefficients(smallest):
        square = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


@functools.cache
def polar_coefficients(smallest: float) -> list[tuple[float, float, float]]:
    """(a, b, c) of the polynomials a·x + b·x³ + c·x⁵ which, one after the other, take [smallest, 1] to within 1e-6 of 1.

    Each is the best one for the interval that those before it leave: the greedy composition that is optimal among all compositions
    (Polar Express, arXiv 2505.16932). While errors are large the polynomials are steep at the interval's upper end, and what rounding
    lifts above it would multiply from one to the next: so the interval is taken larger by 1/200 each time.
    """
    low, high, found = smallest, _MARGIN, []
    while not found or high - low > 2e-6:
        coefficients, error = _best_odd_quintic(low, high)
        found.append(coefficients)
        low, high = 1 - error, (1 + error) * (_MARGIN if error > 0.05 else 1)
    return found


_MARGIN = 1.005


def _best_odd_quintic(low: float, high: float) -> tuple[tuple[float, float, float], float]:
    """The p(x) = a·x + b·x³ + c·x⁵ with the smallest error ε = max |1 − p| on [low, high]; Remez: 1 − p is ±ε at four points."""
    inner = np.array([0.75 * low + 0.25 * high, 0.25 * low + 0.75 * high])
    while True:
        x = np.array([low, *inner, high])
        a, b, c, error = np.linalg.solve(
            np.stack([x, x**3, x**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1), np.ones(4)
        )
        discriminant = 9 * b * b - 20 * a * c
        if high - low < 1e-2 or discriminant <= 0:
            # The limit of a vanishing interval: p(1) = 1, p'(1) = p''(1) = 0.
            a, b, c = 15 / 8, -10 / 8, 3 / 8
            worst = max(abs(1 - (a * y + b * y**3 + c * y**5)) for y in (low, high))
            return (a, b, c), worst
        extrema = np.sqrt((-3 * b + np.array([-1.0, 1.0]) * np.sqrt(discriminant)) / (10 * c))
        if np.abs(extrema - inner).max() < 1e-12:
            return (float(a), float(b), float(c)), float(abs(error))
        inner = extrema
