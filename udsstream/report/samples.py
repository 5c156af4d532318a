"""A few samples that tell what the choice was like. The log is read twice. (What they say: `log_queries/texts.py`.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from udsstream.report.figures import logged_steps, scan_rows
from udsstream.selection_log.reader import SelectionLog

__all__ = ["KINDS", "Pick", "pick"]

_COLUMNS = ["step", "position", "sample_id", "stream", "shard", "shard_index", "tokens", "intra", "inter", "score"]

KINDS = {
    "highest": "Chosen: the highest scores",
    "short": "Chosen although short",
    "narrow": "Rejected by the narrowest margin",
    "long": "Rejected although long",
    "lowest": "Rejected: the lowest scores",
}
"""The kinds of samples that are picked, in their order. `short`: many tokens fewer than the longest rejected candidate of the same step;
`long`: many more than the longest that was chosen; `narrow`: a score just below that of the last one chosen."""


@dataclass(frozen=True, kw_only=True)
class Pick:
    """One decision that is worth a look."""

    kind: str
    """A key of KINDS."""
    step: int
    position: int
    sample_id: int
    stream: int
    """Number of the stream in run.json; −1 when there is none."""
    shard: int
    shard_index: int
    tokens: int
    intra: float
    """NaN where the method has none, and `inter` too."""
    inter: float
    score: float
    selected: bool
    threshold: float
    """The lowest score that was chosen at this step; NaN when none was."""
    other_tokens: int
    """Tokens of the step's longest candidate that met the other fate; 0 when there was none."""


def pick(log: SelectionLog, *, per_kind: int = 2) -> list[Pick]:
    """The most telling decisions of the run as it stands, `per_kind` of each kind (fewer where there are not so many), no sample twice.

    Only decisions with a finite score count: where nothing was scored, nothing was chosen either.
    """
    if per_kind < 1:
        return []
    steps, _ = logged_steps(log)
    lowest_kept = np.full(len(steps), np.inf)
    longest = {True: np.zeros(len(steps), np.int64), False: np.zeros(len(steps), np.int64)}
    for batch in scan_rows(log, ["step", "tokens", "score", "selected"]):
        batch = _scored(batch, steps)
        place = np.searchsorted(steps, batch["step"])
        kept = batch["selected"]
        np.minimum.at(lowest_kept, place[kept], batch["score"][kept])
        np.maximum.at(longest[True], place[kept], batch["tokens"][kept])
        np.maximum.at(longest[False], place[~kept], batch["tokens"][~kept])
    pools = {kind: _Pool(per_kind * len(KINDS)) for kind in KINDS}
    for batch in scan_rows(log, [*_COLUMNS, "selected"]):
        batch = _scored(batch, steps)
        place = np.searchsorted(steps, batch["step"])
        kept, score, tokens = batch["selected"], batch["score"].astype(np.float64), batch["tokens"].astype(np.int64)
        batch["threshold"] = np.where(np.isfinite(lowest_kept[place]), lowest_kept[place], np.nan)
        batch["other_tokens"] = np.where(kept, longest[False][place], longest[True][place])
        for kind, eligible, worth in (
            ("highest", kept, score),
            ("short", kept & (tokens < batch["other_tokens"]), batch["other_tokens"] - tokens),
            ("narrow", ~kept & np.isfinite(batch["threshold"]), score - batch["threshold"]),
            (
                "long",
                ~kept & (batch["other_tokens"] > 0) & (tokens > batch["other_tokens"]),
                tokens - batch["other_tokens"],
            ),
            ("lowest", ~kept, -score),
        ):
            pools[kind].offer({name: values[eligible] for name, values in batch.items()}, worth[eligible])
    picks: list[Pick] = []
    for kind, pool in pools.items():
        taken = {found.sample_id for found in picks}
        fresh = [row for row in pool.rows if row["sample_id"] not in taken]
        picks += [Pick(kind=kind, **row) for row in fresh[:per_kind]]
    return picks


class _Pool:
    """The rows of most worth among those offered, best first: each sample once, ties to the earlier step and position."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._least = -np.inf
        self._rows: list[tuple[tuple[float, int, int], dict[str, Any]]] = []

    def offer(self, batch: dict[str, np.ndarray], worth: np.ndarray) -> None:
        worth = worth.astype(np.float64)
        better = np.flatnonzero(worth >= self._least)
        order = better[np.lexsort((batch["position"][better], batch["step"][better], -worth[better]))]
        _, first = np.unique(batch["sample_id"][order], return_index=True)
        for i in order[np.sort(first)][: self._size].tolist():
            row = {name: values[i].item() for name, values in batch.items() if name != "has_score"}
            self._rows.append(((-float(worth[i]), row["step"], row["position"]), row))
        best: dict[int, tuple[tuple[float, int, int], dict[str, Any]]] = {}
        for key, row in sorted(self._rows, key=lambda item: item[0]):
            best.setdefault(row["sample_id"], (key, row))
        self._rows = list(best.values())[: self._size]
        if len(self._rows) == self._size:
            self._least = -self._rows[-1][0][0]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for _, row in self._rows]


def _scored(batch: dict[str, np.ndarray], steps: np.ndarray) -> dict[str, np.ndarray]:
    """The batch's rows with a finite score (of steps that were there when the steps were looked up: the run may be live)."""
    here = np.isfinite(batch["score"]) & np.isin(batch["step"], steps)
    return {name: values[here] for name, values in batch.items()}
