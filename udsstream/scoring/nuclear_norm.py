"""The nuclear norm of a logits matrix, `‖L‖_* = Σ σ_j(L)`: the definition, and the form that scoring uses.

    N tokens, V vocabulary, D hidden width, r columns of a factor (r ≤ D or so)

Any X (N×r) with `X Xᵀ = L Lᵀ` has the singular values of L. For a linear head `L = H Wᵀ`, `X = H Rᵀ` with `WᵀW = RᵀR` is such
a matrix and has D columns instead of V (`lm_head.py` makes R). The singular values of X are the square roots of the eigenvalues of
its smaller Gram matrix. Squaring costs half the digits, so the Gram matrix is formed in float64 where the device has it: values
down to 1e-7 of the largest survive, as they would in a float32 SVD.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gram_dtype", "nuclear_norm", "nuclear_norm_from_gram", "nuclear_norm_svd"]


def nuclear_norm_svd(logits: Tensor) -> Tensor:
    """The definition: logits (N, V) → scalar, in the dtype of `logits`. The slow reference of everything below."""
    return torch.linalg.svdvals(logits).sum()


def gram_dtype(device: torch.device) -> torch.dtype:
    """float64 on the CPU. float32 elsewhere: on most accelerators float64 is slow or absent."""
    return torch.float64 if device.type == "cpu" else torch.float32


def nuclear_norm(factor: Tensor) -> Tensor:
    """X (N, r) float32 with the singular values of L → `‖L‖_*`, a float32 scalar on the same device.

    Uses X Xᵀ or XᵀX, whichever is smaller. NaN when X holds a value that is not finite.
    """
    x = factor.to(gram_dtype(factor.device))
    return nuclear_norm_from_gram(x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x)


def nuclear_norm_from_gram(gram: Tensor) -> Tensor:
    """L Lᵀ or Lᵀ L (n, n) → `‖L‖_*`, a float32 scalar: the sum of the square roots of the eigenvalues, rounding below 0 cut off.

    NaN when the matrix holds a value that is not finite; the eigenvalue routine would raise without saying for which sample.
    """
    finite = torch.isfinite(gram).all()
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite, gram, torch.zeros_like(gram)))
    norm = eigenvalues.clamp_min(0).sqrt().sum()
    return torch.where(finite, norm, norm.new_full((), float("nan"))).float()
