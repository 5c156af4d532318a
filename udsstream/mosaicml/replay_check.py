"""A decision that was made again, against the one in the log: pure functions, and a tally over steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from udsstream.mosaicml.decision import Decision
from udsstream.mosaicml.replay_data import LoggedStep

__all__ = ["Divergence", "StepComparison", "Tally", "compare"]


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A candidate whose score, or fate, is not the logged one. Margins are distances to the score of the last one kept (the k-th best):
    below zero for a candidate that was not kept."""

    step: int
    sample_id: int
    position: int
    logged_score: float
    new_score: float
    logged_margin: float
    new_margin: float
    was_kept: bool
    is_kept: bool

    def __str__(self) -> str:
        fate = {
            (True, True): "kept, as it was",
            (False, False): "rejected, as it was",
            (True, False): "was kept, would be rejected",
            (False, True): "was rejected, would be kept",
        }[self.was_kept, self.is_kept]
        return (
            f"step {self.step}, sample {self.sample_id} (position {self.position}): logged score {self.logged_score:.9g}, new score "
            f"{self.new_score:.9g}; margin to the k-th score {self.logged_margin:+.3g}, now {self.new_margin:+.3g}; {fate}"
        )


@dataclass(frozen=True, kw_only=True)
class StepComparison:
    """One step."""

    same_choice: bool
    equal_scores: int
    """Scores that are the logged ones bit for bit."""
    scores: int
    largest_difference: float
    """Relative to the logged score."""
    divergence: Divergence | None
    """Of the candidates that differ, the one that says most: a changed fate first, then the largest relative difference."""


def compare(logged: LoggedStep, decision: Decision) -> StepComparison:
    """Compares a decision with the logged one over the same candidates in the same order.

    Args:
        logged: with all candidates, scored.
        decision: made again.
    """
    assert decision.scores is not None
    assert decision.sample_ids == logged.sample_ids
    old, new = logged.scores.astype(np.float32), decision.scores.numpy()
    was, now = (np.zeros(len(old), dtype=bool) for _ in range(2))
    was[logged.kept] = True
    now[decision.kept] = True
    relative = np.abs(new.astype(np.float64) - old) / np.maximum(
        np.abs(old.astype(np.float64)), np.finfo(np.float32).tiny
    )
    differing = np.flatnonzero((was != now) | (new != old))
    divergence = None
    if len(differing):
        worst = differing[np.lexsort((-relative[differing], (was == now)[differing]))[0]]
        divergence = Divergence(
            step=logged.step,
            sample_id=logged.sample_ids[worst],
            position=int(worst),
            logged_score=float(old[worst]),
            new_score=float(new[worst]),
            logged_margin=float(old[worst]) - float(old[was].min()),
            new_margin=float(new[worst]) - float(new[now].min()),
            was_kept=bool(was[worst]),
            is_kept=bool(now[worst]),
        )
    return StepComparison(
        same_choice=bool((was == now).all()),
        equal_scores=int((new == old).sum()),
        scores=len(old),
        largest_difference=float(relative.max()),
        divergence=divergence,
    )


@dataclass(kw_only=True)
class Tally:
    """What a verified replay has found so far."""

    steps: int = 0
    """Scored steps that were decided again."""
    unscored: int = 0
    """Steps at which selection was off, then as now: nothing to compare."""
    agreed: int = 0
    """Steps with the same choice."""
    scores: int = 0
    equal_scores: int = 0
    memories: int = 0
    """Steps whose pushes the log holds a digest of."""
    equal_memories: int = 0
    """Steps after which the memory was the logged one bit for bit."""
    largest_difference: float = 0.0
    """Relative, of a score to the logged one."""
    first_divergence: dict[str, Any] | None = None
    """The first step with another choice: the fields of `Divergence`."""
    first_difference: dict[str, Any] | None = None
    """The first step with another score, whatever became of the choice."""

    def add(self, comparison: StepComparison) -> None:
        """Counts a step."""
        self.steps += 1
        self.agreed += comparison.same_choice
        self.scores += comparison.scores
        self.equal_scores += comparison.equal_scores
        self.largest_difference = max(self.largest_difference, comparison.largest_difference)
        if comparison.divergence is None:
            return
        found = asdict(comparison.divergence)
        if self.first_difference is None:
            self.first_difference = found
        if self.first_divergence is None and not comparison.same_choice:
            self.first_divergence = found

    @property
    def holds(self) -> bool:
        """Whether every decision is the logged one."""
        return self.agreed == self.steps

    def as_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON and for a checkpoint."""
        return asdict(self)
