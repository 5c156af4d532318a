"""The language-model head as scoring sees it: `L = cap(scale · (H Wᵀ + 1 bᵀ))`, and what stands in for it so that L is never built.

    N tokens, V vocabulary, D hidden width, d1 rows of Γ1

For a head without a cap, two small matrices replace W, and both come from sums over slices of the vocabulary:

    R (r×D)   with RᵀR = WᵀW, so that H Rᵀ has the singular values of L
    P (d1×D)  = Γ1 W, so that Γ2 H Pᵀ = Γ2 L Γ1ᵀ

With a bias, H gains a column of ones and W a column b; the scale multiplies both. A capped head (`cap · tanh(x / cap)`, Gemma 2) is
not linear: its Gram matrix and projection are summed over slices of the vocabulary for each sample (`VocabularySlices`).

What is not here: finding the head in a model, and the check that this formula is the model's (`udsstream/mosaicml/trunk.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from udsstream.scoring.projection import BilinearProjection

__all__ = ["HeadFactors", "LMHead", "append_ones", "factor_head"]

_SLICE = 8192
"""Vocabulary rows handled at a time: 8192 × 3584 is 117 MB in float32, 235 MB in float64, the largest temporary that a head causes."""


@dataclass(frozen=True, kw_only=True)
class LMHead:
    """A head: weight (V, D), bias (V,) or None, logit scale, and soft cap or None."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.weight.shape[0]

    @property
    def is_linear(self) -> bool:
        """Whether R and P can stand in for the weight."""
        return self.softcap is None

    def logits(self, hidden: Tensor) -> Tensor:
        """The definition: hidden (N, D) → logits (N, V) float32. Builds N×V; for reference, tests and the self-check."""
        return torch.cat([part for _, part in self.sliced_logits(hidden)], dim=-1)

    def sliced_logits(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first vocabulary row, logits (N, ≤ 8192) float32) for one slice of the vocabulary after the other."""
        for start in range(0, self.vocab_size, _SLICE):
            part = hidden.float() @ self.weight[start : start + _SLICE].float().T
            if self.bias is not None:
                part = part + self.bias[start : start + _SLICE].float()
            part = part * self.scale
            if self.softcap is not None:
                part = self.softcap * torch.tanh(part / self.softcap)
            yield start, part

    def augmented_slices(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, scale · [W b] (≤ 8192, D or D+1) float32) for one slice of the vocabulary after the other."""
        for start in range(0, self.vocab_size, _SLICE):
            rows = self.weight[start : start + _SLICE].float()
            if self.bias is not None:
                rows = torch.cat([rows, self.bias[start : start + _SLICE].float()[:, None]], dim=1)
            yield start, rows * self.scale


@dataclass(frozen=True, kw_only=True)
class HeadFactors:
    """What stands in for a linear head: R (r, D') and P (d1, D') float32, D' = D, or D+1 with a bias."""

    gram_factor: Tensor
    projected: Tensor


def append_ones(hidden: Tensor) -> Tensor:
    """H (N, D) → [H 1] (N, D+1): how a bias enters a linear map."""
    return torch.cat([hidden, hidden.new_ones(hidden.shape[0], 1)], dim=1)


@torch.no_grad()
def factor_head(head: LMHead, projection: BilinearProjection) -> HeadFactors:
    """R and P of a linear head, on the device of its weight, in one pass over slices of the vocabulary.

    WᵀW is formed in float64 where the device has it: its eigenvalues are squares, and in float32 those below 1e-7 of the largest
    would be rounding, which the nuclear norm sums up (5e-4 of it for a weight of low rank). Costs 1.5× float32, once per weight.
    R is the Cholesky factor of WᵀW; when W has not full column rank, the square root from its eigenvalues instead; and W itself
    when V ≤ D.
    """
    device = head.weight.device
    accumulate = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
    width = head.weight.shape[1] + (head.bias is not None)
    gram = torch.zeros(width, width, dtype=accumulate, device=device)
    projected = torch.zeros(projection.vocabulary.d, width, dtype=accumulate, device=device)
    for start, rows in head.augmented_slices():
        exact = rows.to(accumulate)
        gram += exact.T @ exact
        gamma1 = projection.vocabulary.columns(start, start + rows.shape[0]).to(device)
        projected += (gamma1 @ rows).to(accumulate)
    if head.vocab_size <= width:
        gram_factor = torch.cat([rows for _, rows in head.augmented_slices()])
    else:
        gram_factor = _square_root(gram).float()
    return HeadFactors(gram_factor=gram_factor, projected=projected.float())


def _square_root(gram: Tensor) -> Tensor:
    """R with RᵀR = gram (n, n). Waits for the device once, when the head is factored, never per step."""
    lower, info = torch.linalg.cholesky_ex(gram)
    if int(info) == 0:
        return lower.T
    eigenvalues, vectors = torch.linalg.eigh(gram)
    return eigenvalues.clamp_min(0).sqrt()[:, None] * vectors.T
