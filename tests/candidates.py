"""Candidates for the methods, from plain numbers."""

from __future__ import annotations

from typing import Any

import torch

from udsstream.scoring.candidates import Candidates

__all__ = ["candidates"]


def candidates(count: int | None = None, *, tokens: Any = None, **given: Any) -> Candidates:
    """Fields of `Candidates` by their names; everything else is a measure."""
    fields = {name: given.pop(name) for name in ("alpha", "batch", "epoch", "seed", "share") if name in given}
    measured = {name: torch.as_tensor(values, dtype=torch.float32) for name, values in given.items()}
    if count is None:
        count = len(next(iter(measured.values()))) if measured else len(tokens)
    return Candidates(
        sample_ids=list(range(count)),
        tokens=torch.as_tensor([1] * count if tokens is None else tokens),
        measured=measured,
        **fields,
    )
