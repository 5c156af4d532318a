"""What a run's trackers are told of its decisions, as pure functions; names, meanings and units are listed in docs/trackers.md.

    B candidates of all ranks

Everything here is known on the host when a step is decided: no metric waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from udsstream.mosaicml.decision import Decision

__all__ = ["TokenTotals", "step_metrics", "time_metrics"]

_QUANTILES = (10, 50, 90)
"""Percentiles of the scores, of all candidates and of the kept ones."""


@dataclass
class TokenTotals:
    """Real tokens over all steps of the run so far, of all ranks; a checkpoint carries them."""

    candidates: int = 0
    kept: int = 0

    def add(self, decision: Decision) -> None:
        """Takes in one step."""
        self.candidates += sum(decision.lengths)
        self.kept += sum(decision.lengths[place] for place in decision.kept)

    @property
    def saved(self) -> int:
        """Tokens that were looked at, but not trained on."""
        return self.candidates - self.kept


def step_metrics(decision: Decision, totals: TokenTotals) -> dict[str, float]:
    """The metrics of one step; `totals` with this step already taken in.

    Where selection was off, those about scores are left out; so is `novelty` while the memory is empty.
    """
    lengths = np.array(decision.lengths, dtype=np.int64)
    tokens, kept_tokens = int(lengths.sum()), int(lengths[decision.kept].sum())
    metrics = {
        "candidates": len(lengths),
        "kept": len(decision.kept),
        "kept_share": len(decision.kept) / len(lengths),
        "candidate_tokens": tokens,
        "kept_tokens": kept_tokens,
        "kept_token_share": kept_tokens / tokens,
        "tokens_saved": totals.saved,
    }
    for name, values in _valued(decision).items():
        metrics[f"{name}_mean"] = values.mean()
        metrics[f"{name}_kept_mean"] = values[decision.kept].mean()
    if decision.scores is not None:
        scores = decision.scores.double().numpy()
        kept = scores[decision.kept]
        for prefix, values in (("score", scores), ("score_kept", kept)):
            for percent, value in zip(_QUANTILES, np.percentile(values, _QUANTILES), strict=True):
                metrics[f"{prefix}_p{percent}"] = value
        metrics["score_cut"] = kept.min()
    if metrics.get("inter_mean", 0) > 0:
        metrics["novelty"] = metrics["inter_kept_mean"] / metrics["inter_mean"]
    return {f"selection/{name}": float(value) for name, value in metrics.items()}


def time_metrics(*, step_seconds: float, selection_seconds: float, log_seconds: float) -> dict[str, float]:
    """What a finished step took, and which part of it was not training."""
    return {
        "selection/step_seconds": step_seconds,
        "selection/share_of_step": (selection_seconds + log_seconds) / step_seconds,
    }


def _valued(decision: Decision) -> dict[str, np.ndarray]:
    """(B,) float64 by the names of the log's columns: whatever the method measured of each candidate, and the score."""
    valued = dict(decision.measured)
    if decision.scores is not None:
        valued["score"] = decision.scores
    return {name: values.double().numpy() for name, values in valued.items()}
