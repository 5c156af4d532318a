"""What the finished runs of a comparison left behind, read from their folders: numbers, curves, choices.

Nothing here trains, and nothing is written. Losses come from `evals.jsonl`, tokens and choices from the selection log, seconds from
`timings.jsonl`; the last is a convenience that a crash may shorten, so seconds may be unknown.

    E evaluations, R rows of the log
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from udsstream.compare.arithmetic import overlap
from udsstream.compare.config import PlannedRun
from udsstream.errors import LogCorruptError
from udsstream.evals import read_evals
from udsstream.log_queries.summary import summarize
from udsstream.run_folder import is_finished
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.timings import read_timings

__all__ = ["ANSWERS", "Choices", "Curve", "FinishedRun", "choices_overlap", "read_finished", "read_run"]

ANSWERS = "answers.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """The held-out loss along a run, before its first step first, (E,) each."""

    step: np.ndarray
    """int64: batches trained before the evaluation."""
    loss: np.ndarray
    """Nats per token."""
    tokens: np.ndarray
    """int64: tokens trained on before it, prompts included, padding not."""
    seconds: np.ndarray
    """Spent in training steps before it, without loading data, evaluating and saving; NaN where a step's time is not known."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Choices:
    """The candidates of a run and which of them were trained on, (R,) each, by step and place."""

    step: np.ndarray
    sample_id: np.ndarray
    selected: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedRun:
    """One entry with one seed, trained to its end."""

    entry: str
    seed: int
    steps: int
    candidates: int
    kept: int
    candidate_tokens: int
    kept_tokens: int
    seconds: float | None
    """In training steps, as in `Curve`."""
    length_correlation: float | None
    """Pearson, of the candidates' scores and lengths; None when nothing was scored."""
    curve: Curve
    choices: Choices
    accuracy: float | None
    """Share of generated answers that match exactly; None when none were asked for."""

    @property
    def loss(self) -> float | None:
        """The held-out loss after the last step, nats per token; None when there was no held-out data."""
        at_end = len(self.curve.step) and int(self.curve.step[-1]) == self.steps
        return float(self.curve.loss[-1]) if at_end else None


def read_finished(runs: Sequence[PlannedRun]) -> list[FinishedRun]:
    """Those of the runs that are finished, in order.

    Raises:
        LogError, LogCorruptError: a run's record cannot be read.
    """
    return [read_run(run.folder, entry=run.entry, seed=run.seed) for run in runs if is_finished(run.folder)]


def read_run(folder: Path, *, entry: str, seed: int) -> FinishedRun:
    """A finished run, from its folder.

    Raises:
        LogError, LogCorruptError: its record cannot be read.
    """
    log = SelectionLog.open(folder)
    summary = summarize(log)
    rows = log.table(columns=["step", "sample_id", "tokens", "selected"])
    step, tokens = rows["step"].to_numpy(), rows["tokens"].to_numpy().astype(np.int64)
    selected = rows["selected"].to_numpy(zero_copy_only=False)
    trained = np.zeros(summary.steps + 1, np.int64)  # tokens trained on before each step
    steps = np.unique(step)
    if len(steps) and not np.array_equal(steps, np.arange(len(steps))):
        raise LogCorruptError(
            f"{folder}: the log of a finished run holds {len(steps)} steps, but not 0 to {len(steps) - 1}; see udsstream audit {folder}"
        )
    trained[1:] = np.cumsum(np.bincount(step, weights=tokens * selected, minlength=len(steps))).astype(np.int64)
    timings = read_timings(folder)
    spent = np.full(summary.steps, math.nan)
    within = timings["step"] < summary.steps
    spent[timings["step"][within]] = timings["step_seconds"][within]
    seconds = np.concatenate([[0.0], np.cumsum(spent)])
    evals = read_evals(folder)
    known = evals["step"] <= summary.steps
    at = evals["step"][known]
    return FinishedRun(
        entry=entry,
        seed=seed,
        steps=summary.steps,
        candidates=summary.candidates,
        kept=summary.kept,
        candidate_tokens=summary.candidate_tokens,
        kept_tokens=summary.kept_tokens,
        seconds=None if math.isnan(seconds[-1]) else float(seconds[-1]),
        length_correlation=summary.score_length_correlation,
        curve=Curve(step=at, loss=evals["loss"][known], tokens=trained[at], seconds=seconds[at]),
        choices=Choices(step=step, sample_id=rows["sample_id"].to_numpy(), selected=selected),
        accuracy=_accuracy(folder / ANSWERS),
    )


def choices_overlap(one: Choices, other: Choices) -> tuple[float | None, int, int]:
    """How alike two runs chose where they had the same candidates in the same order.

    Returns:
        The mean Jaccard index over those steps (None when there are none), the number of those steps, and of the steps that both have.
    """
    mine, theirs = _Steps.of(one), _Steps.of(other)
    common, i, j = np.intersect1d(mine.step, theirs.step, assume_unique=True, return_indices=True)
    equal = np.array(
        [
            mine.count[a] == theirs.count[b]
            and np.array_equal(one.sample_id[mine.rows(a)], other.sample_id[theirs.rows(b)])
            for a, b in zip(i, j, strict=True)
        ],
        dtype=bool,
    )
    here = np.isin(one.step, common[equal])
    there = np.isin(other.step, common[equal])
    return overlap(one.step[here], one.selected[here], other.selected[there]), int(equal.sum()), len(common)


@dataclass(frozen=True)
class _Steps:
    step: np.ndarray
    start: np.ndarray
    count: np.ndarray

    @classmethod
    def of(cls, choices: Choices) -> _Steps:
        return cls(*np.unique(choices.step, return_index=True, return_counts=True))

    def rows(self, index: int) -> slice:
        return slice(int(self.start[index]), int(self.start[index] + self.count[index]))


def _accuracy(path: Path) -> float | None:
    if not path.exists():
        return None
    try:
        return float(json.loads(path.read_text())["accuracy"])
    except (ValueError, KeyError, TypeError) as error:
        raise LogCorruptError(
            f"{path}: holds no accuracy ({error}). No decision depends on this file: remove it, and the answers are generated again"
        ) from error
