"""The last layer's gradients of the candidates, by their norms and inner products, without logits and without a backward.

    N tokens, D hidden width, V vocabulary, B candidates, n positions of all of them whose next token has a label

The gradient of a candidate's mean loss with respect to the head's weight W (V×D) is

    g_i = (1/n_i) Σ over its positions t of  δ_t h_tᵀ,     δ_t = scale · cap'(l_t) ∘ (softmax(l_t) − onehot(target_t))

It is V×D, as large as the head, but its rows by slices of the vocabulary need only that slice's logits, and norms and inner products are
sums over slices. Two passes over the head: one for the logarithm of the sums, one for the gradients; with the product that makes g_i about
three times the head's own forward, 6·n·V·D operations, and a slice of all candidates' gradients (64 MB) in memory.

That W trains is not needed: under LoRA it stays as it is, and its gradient still tells in which direction a sample pulls.

What is not here: which tokens have a label, and what becomes of norms and products (`methods.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from udsstream.scoring.lm_head import LMHead
from udsstream.scoring.losses import labelled_positions, log_sums
from udsstream.scoring.nuclear_norm import choose_dtype, exact_float32

__all__ = ["GradientProducts", "gradient_norms", "gradient_products"]

_SLICE_BYTES = 64 * 2**20
"""What a slice of all candidates' gradients may take in float32."""


@dataclass(frozen=True, kw_only=True)
class GradientProducts:
    """Inner products of last-layer gradients, float32 on the device of the hidden states."""

    between: Tensor
    """(B, B): ⟨g_i, g_j⟩."""
    with_reference: Tensor | None
    """(B,): ⟨g_i, g_ref⟩, for the mean gradient of some other samples. None: there were none."""


@torch.no_grad()
def gradient_norms(hidden: Sequence[Tensor], labels: Sequence[Tensor], head: LMHead) -> Tensor:
    """`‖g_i‖_F`: hidden (N_i, D) on any device, labels (N_i,) int64 on the host → (B,) float32 on the device.

    A candidate without a label after its first token is NaN. With a sharded head every rank of its group must call it as often.
    """
    with exact_float32():
        rows, targets, counts = labelled_positions(hidden, labels)
        weights = _per_row(counts, [1 / max(1, count) for count in counts], rows.device)
        squares = torch.zeros(len(counts), dtype=choose_dtype(rows.device), device=rows.device)
        for part in _slices_of_gradients(rows, targets, weights, counts, head):
            squares += (part * part).sum(dim=1)
        known = torch.tensor(counts).to(rows.device) > 0
        return torch.where(known, squares.sqrt().float(), torch.nan)


@torch.no_grad()
def gradient_products(
    hidden: Sequence[Tensor],
    labels: Sequence[Tensor],
    head: LMHead,
    *,
    reference: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> GradientProducts:
    """All inner products of the candidates' gradients, and those with the mean gradient of the `reference` samples (hidden, labels).

    Shapes as in `gradient_norms`. A candidate without a label has the gradient 0.
    """
    others = ([], []) if reference is None else reference
    with exact_float32():
        rows, targets, counts = labelled_positions([*hidden, *others[0]], [*labels, *others[1]])
        own, theirs = counts[: len(hidden)], counts[len(hidden) :]
        shares = [1 / max(1, count) for count in own] + [1 / max(1, count) / len(theirs) for count in theirs]
        weights = _per_row(counts, shares, rows.device)
        groups = own + ([sum(theirs)] if reference is not None else [])
        products = torch.zeros(len(groups), len(groups), dtype=choose_dtype(rows.device), device=rows.device)
        for part in _slices_of_gradients(rows, targets, weights, groups, head):
            products += part @ part.T
        products = products.float()
        b = len(hidden)
        return GradientProducts(
            between=products[:b, :b].contiguous(),
            with_reference=products[:b, b].contiguous() if reference is not None else None,
        )


def _per_row(counts: Sequence[int], values: Sequence[float], device: torch.device) -> Tensor:
    """Each candidate's value at each of its rows: (n,) float32."""
    return torch.repeat_interleave(torch.tensor(values), torch.tensor(list(counts), dtype=torch.int64)).to(device)


def _slices_of_gradients(
    rows: Tensor, targets: Tensor, weights: Tensor, groups: Sequence[int], head: LMHead
) -> Iterator[Tensor]:
    """(G, v·D) float32 for one slice of v vocabulary rows after the other: Σ over each group's rows of weight · δ hᵀ."""
    rows = rows.float()
    log_sum, _ = log_sums(head.sliced_logits(rows), targets)
    step = max(1, _SLICE_BYTES // (4 * rows.shape[1] * max(1, len(groups))))
    ends = torch.tensor(list(groups)).cumsum(0).tolist()
    begins = [0, *ends[:-1]]
    for start, logits in head.sliced_logits(rows):
        delta = (logits - log_sum[:, None]).exp()
        here = (targets >= start) & (targets < start + logits.shape[1])
        # Not by a mask of rows: its length would have to be waited for.
        column = (targets - start).clamp(0, max(0, logits.shape[1] - 1))
        if logits.shape[1]:
            delta.scatter_add_(1, column[:, None], -here.float()[:, None])
        if head.softcap is not None:
            delta *= 1 - (logits / head.softcap) ** 2
        delta *= (weights * head.scale)[:, None]
        for part in delta.split(step, dim=1):
            yield torch.stack(
                [(part[low:high].T @ rows[low:high]).flatten() for low, high in zip(begins, ends, strict=True)]
            )
