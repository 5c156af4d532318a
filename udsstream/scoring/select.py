"""From scores to the kept candidates: a total order, so that the same scores give the same choice everywhere.

B candidates in canonical order (by their place in the global batch), K kept
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from udsstream.errors import ScoreError

__all__ = ["check_finite", "top_k", "within_budget"]


def check_finite(scores: Tensor, sample_ids: Sequence[int]) -> None:
    """Raises ScoreError, naming the samples, when a score is NaN or infinite; scores (B,) on the host."""
    bad = torch.nonzero(~torch.isfinite(scores)).flatten().tolist()
    if bad:
        named = ", ".join(f"{scores[i].item()} for sample {sample_ids[i]} (position {i})" for i in bad[:8])
        more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
        raise ScoreError(
            f"{len(bad)} of {len(scores)} scores are not finite: {named}{more}. The model's hidden states overflowed or are NaN: "
            "look for a diverged loss, float16 without scaling, or a damaged checkpoint; nothing was selected at this step"
        )


def top_k(scores: Tensor, k: int) -> Tensor:
    """scores (B,), 1 ≤ k ≤ B → (k,) int64: places of the k largest, ascending. Of equal scores the smaller place is kept."""
    best = torch.sort(scores, descending=True, stable=True).indices[:k]
    return best.sort().values


def within_budget(scores: Tensor, tokens: Sequence[int], budget: int, *, multiple_of: int = 1) -> Tensor:
    """scores (B,) → places, ascending, of the largest ones for as long as their tokens sum to at most `budget`; int64.

    None is skipped for a shorter one with a smaller score. Their number is a multiple of `multiple_of`, and at least that: so many are kept
    even if they are longer than the budget.
    """
    best = torch.sort(scores, descending=True, stable=True).indices
    taken = torch.tensor(list(tokens), dtype=torch.int64)[best].cumsum(0)
    fits = int((taken <= budget).sum())
    return best[: max(multiple_of, fits // multiple_of * multiple_of)].sort().values
