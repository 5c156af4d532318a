"""The numbers of a report: one pass over a log, in memory that grows with its steps (some bytes each) and not with its candidates.

Counts, sums, means and the correlation are exact, whatever the size. Quantiles, the distribution of scores and the plot of
length against score are taken from at most `SAMPLE_ROWS` candidates: all of a log that has no more, else one in n, by a hash
of step and position (so the same log gives the same figures). Steps are put together into at most `BINS` bins of (nearly)
equally many logged steps each.

Every figure is of the run as it stands: what an older attempt had written from a resumed step on is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udsstream.errors import LogCorruptError, LogError
from udsstream.log_queries.texts import stream_names
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.timings import TIMINGS, read_timings

__all__ = [
    "BINS",
    "QUANTILES",
    "SAMPLE_ROWS",
    "Figures",
    "Histogram",
    "MemoryUse",
    "SampledRows",
    "StepBins",
    "StepTimes",
    "StreamChoice",
    "bands",
    "histogram",
    "logged_steps",
    "measure",
    "scan_rows",
]

BINS = 100
SAMPLE_ROWS = 1_000_000
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

_COLUMNS = ["step", "epoch", "position", "stream", "tokens", "intra", "inter", "score", "selected"]


@dataclass(frozen=True, kw_only=True)
class StepBins:
    """Steps in their order, put together; every array has one element per bin."""

    first: np.ndarray
    """int64: the bin's first logged step."""
    last: np.ndarray
    """int64: its last."""
    candidates: np.ndarray
    kept: np.ndarray
    candidate_tokens: np.ndarray
    kept_tokens: np.ndarray
    inter_candidates: np.ndarray
    """float64: mean distance to the memory of all candidates; NaN where none was recorded."""
    inter_kept: np.ndarray
    """float64: the same of those that were kept."""

    @property
    def middle(self) -> np.ndarray:
        """float64: where a bin is drawn."""
        return (self.first + self.last) / 2

    def __len__(self) -> int:
        return len(self.first)


@dataclass(frozen=True, kw_only=True)
class SampledRows:
    """The candidates that the distributions are drawn from, in no particular order; all arrays have their number of elements."""

    one_in: int
    """1: all candidates are here."""
    bin: np.ndarray
    tokens: np.ndarray
    intra: np.ndarray
    """float32, NaN where there is no value; `inter` and `score` too."""
    inter: np.ndarray
    score: np.ndarray
    selected: np.ndarray

    def __len__(self) -> int:
        return len(self.bin)


@dataclass(frozen=True, kw_only=True)
class StreamChoice:
    """How one stream fared."""

    name: str
    candidates: int
    kept: int


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """The memory of embeddings."""

    capacity: int
    pushed: int
    """Embeddings pushed over the whole run, by the newest push in the log."""

    @property
    def turnovers(self) -> float:
        """How many times as many embeddings were pushed as the memory holds: 1 when each of its rows was written once."""
        return self.pushed / self.capacity


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """What the steps took, in seconds: means per step, one element per bin, NaN where no step of the bin has times; and sums over all."""

    step: np.ndarray
    selection: np.ndarray
    steps: int
    """Logged steps that have times."""
    step_total: float
    selection_total: float
    log_total: float

    @property
    def selection_share(self) -> float | None:
        """Of the time of those steps, the part spent on choosing."""
        return self.selection_total / self.step_total if self.step_total > 0 else None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A run in numbers."""

    steps: int
    scored_steps: int
    """Steps at which at least one candidate has a score."""
    epochs: int
    """Epochs that the log has rows of."""
    candidates: int
    scored: int
    not_finite: int
    """Scores that are NaN or infinite; they are in no figure but this one."""
    kept: int
    candidate_tokens: int
    kept_tokens: int
    correlation: float | None
    """Pearson, of score and tokens over all candidates with a finite score; None where it is undefined."""
    bins: StepBins
    rows: SampledRows
    streams: tuple[StreamChoice, ...]
    """Every stream that offered a candidate, most offered first."""
    memory: MemoryUse | None
    times: StepTimes | None
    notes: tuple[str, ...]
    """What could not be read beside the decisions, and why."""

    @property
    def saved_tokens(self) -> int:
        """Tokens of candidates that were not trained on."""
        return self.candidate_tokens - self.kept_tokens


def measure(log: SelectionLog, *, sample_rows: int = SAMPLE_ROWS) -> Figures:
    """Reads the log twice: for its steps, then for all the rest.

    Raises:
        LogCorruptError: a file of the log cannot be read, or is not what the manifest says.
    """
    steps, rows = logged_steps(log)
    sums = _Sums.empty(steps=steps, one_in=max(1, -(-rows // sample_rows)))
    for batch in scan_rows(log, _COLUMNS):
        sums.add(batch)
    notes: list[str] = []
    times = _times(log, sums, notes)
    memory = _memory(log, sums, notes)
    return sums.figures(stream_names(log.run), memory=memory, times=times, notes=tuple(notes))


def scan_rows(log: SelectionLog, columns: list[str]) -> Iterator[dict[str, np.ndarray]]:
    """The decisions of the run as it stands, some tens of thousands at a time, in no particular order.

    Floats that are null come as NaN, a `stream`, `shard` or `shard_index` that is null as −1. Beside `score` comes `has_score`:
    whether there is one (it may be a NaN).

    Raises:
        LogCorruptError: a file of the log cannot be read, or is not what the manifest says.
    """
    try:
        for batch in log.dataset().scanner(columns=columns, batch_size=65536).to_batches():
            if batch.num_rows:
                arrays = {name: _to_numpy(batch.column(name)) for name in columns}
                if "score" in columns:
                    arrays["has_score"] = _to_numpy(batch.column("score").is_valid())
                yield arrays
    except (OSError, pa.ArrowInvalid) as error:
        raise LogCorruptError(
            f"{log.root}: a sealed file cannot be unpacked: {error}. `udsstream audit` names it; restore it from a copy"
        ) from error


def logged_steps(log: SelectionLog) -> tuple[np.ndarray, int]:
    """The steps that have decisions, ascending, (steps,) int64, and how many decisions there are."""
    found, rows = [np.empty(0, np.int64)], 0
    for batch in scan_rows(log, ["step"]):
        found.append(np.unique(batch["step"]))
        rows += len(batch["step"])
    return np.unique(np.concatenate(found)), rows


def bands(values: np.ndarray, bins: np.ndarray, count: int) -> np.ndarray:
    """`QUANTILES` of the values of each bin, linearly interpolated: (len(QUANTILES), count) float64, NaN where a bin has no value.

    NaN and infinite values are left out.
    """
    finite = np.isfinite(values)
    values, bins = values[finite].astype(np.float64), bins[finite]
    order = np.argsort(bins, kind="stable")
    values, edges = values[order], np.searchsorted(bins[order], np.arange(count + 1))
    out = np.full((len(QUANTILES), count), np.nan)
    for number in range(count):
        part = values[edges[number] : edges[number + 1]]
        if len(part):
            out[:, number] = np.quantile(part, QUANTILES)
    return out


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of the kept and of the rejected over common edges, each (n,) int64; edges (n + 1,)."""

    edges: np.ndarray
    kept: np.ndarray
    rejected: np.ndarray
    outside: int
    """Values beyond the edges: they are counted in the outermost bins."""


def histogram(values: np.ndarray, selected: np.ndarray, *, bins: int = 40) -> Histogram | None:
    """From the smallest to the largest value; with a thousand values or more, from the 0.1% to the 99.9% quantile. None without values."""
    finite = np.isfinite(values)
    values, selected = values[finite].astype(np.float64), selected[finite]
    if not len(values):
        return None
    low, high = (
        np.quantile(values, (0.001, 0.999), method="nearest") if len(values) >= 1000 else (values.min(), values.max())
    )
    if low == high:
        low, high = low - 0.5, high + 0.5
    outside = int(((values < low) | (values > high)).sum())
    inside = np.clip(values, low, high)
    edges = np.linspace(low, high, max(1, min(bins, 2 * math.isqrt(len(values)))) + 1)
    return Histogram(
        edges=edges,
        kept=np.histogram(inside[selected], edges)[0],
        rejected=np.histogram(inside[~selected], edges)[0],
        outside=outside,
    )


# -- one pass ------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Correlation:
    """Pearson from running sums of gaps to the first batch's means, which keeps the digits that sums of squares would lose."""

    count: int = 0
    shift: tuple[float, float] = (0.0, 0.0)
    sums: np.ndarray = field(default_factory=lambda: np.zeros(5))
    """Σx, Σy, Σx², Σy², Σxy of the gaps."""

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        if not len(x):
            return
        x, y = x.astype(np.float64), y.astype(np.float64)
        if not self.count:
            self.shift = float(x.mean()), float(y.mean())
        x, y = x - self.shift[0], y - self.shift[1]
        self.count += len(x)
        self.sums += [x.sum(), y.sum(), x @ x, y @ y, x @ y]

    @property
    def value(self) -> float | None:
        if self.count < 2:
            return None
        x, y, xx, yy, xy = self.sums
        spread = (xx - x * x / self.count) * (yy - y * y / self.count)
        if not spread > 0:
            return None
        return float(np.clip((xy - x * y / self.count) / math.sqrt(spread), -1, 1))


@dataclass(kw_only=True)
class _Sums:
    """What one pass gathers."""

    steps: np.ndarray
    bin_of_step: np.ndarray
    one_in: int
    sums: dict[str, np.ndarray]
    scored_step: np.ndarray
    correlation: _Correlation = field(default_factory=_Correlation)
    scored: int = 0
    not_finite: int = 0
    epochs: set[int] = field(default_factory=set)
    streams: dict[int, tuple[int, int]] = field(default_factory=dict)
    parts: list[dict[str, np.ndarray]] = field(default_factory=list)

    @classmethod
    def empty(cls, *, steps: np.ndarray, one_in: int) -> _Sums:
        bins = min(len(steps), BINS)
        names = (
            "candidates",
            "kept",
            "candidate_tokens",
            "kept_tokens",
            "inter",
            "inters",
            "inter_kept",
            "inters_kept",
        )
        return cls(
            steps=steps,
            bin_of_step=np.arange(len(steps)) * bins // max(1, len(steps)),
            one_in=one_in,
            sums={name: np.zeros(bins) for name in names},
            scored_step=np.zeros(len(steps), bool),
        )

    @property
    def bins(self) -> int:
        return len(self.sums["kept"])

    def add(self, batch: dict[str, np.ndarray]) -> None:
        # A live run may have written steps since they were looked up: the figures are of the steps that were there then.
        known = np.isin(batch["step"], self.steps)
        if not known.all():
            batch = {name: values[known] for name, values in batch.items()}
        place = np.searchsorted(self.steps, batch["step"])
        bins, selected = self.bin_of_step[place], batch["selected"]
        tokens, inter, score = (batch[name].astype(np.float64) for name in ("tokens", "inter", "score"))
        measured = np.isfinite(inter)
        for name, where, weights in (
            ("candidates", slice(None), None),
            ("kept", selected, None),
            ("candidate_tokens", slice(None), tokens),
            ("kept_tokens", selected, tokens),
            ("inter", measured, inter),
            ("inters", measured, None),
            ("inter_kept", measured & selected, inter),
            ("inters_kept", measured & selected, None),
        ):
            given = None if weights is None else weights[where]
            self.sums[name] += np.bincount(bins[where], given, minlength=self.bins)
        finite = np.isfinite(score)
        self.scored += int(finite.sum())
        self.not_finite += int((batch["has_score"] & ~finite).sum())
        self.scored_step[place[finite]] = True
        self.correlation.add(score[finite], tokens[finite])
        self.epochs.update(np.unique(batch["epoch"]).tolist())
        numbers, inverse = np.unique(batch["stream"], return_inverse=True)
        offered, kept = np.bincount(inverse), np.bincount(inverse, selected)
        for number, *counts in zip(numbers.tolist(), offered.tolist(), kept.tolist(), strict=True):
            before = self.streams.get(number, (0, 0))
            self.streams[number] = before[0] + int(counts[0]), before[1] + int(counts[1])
        taken = _hash(batch["step"], batch["position"]) % np.uint64(self.one_in) == 0
        part = {name: batch[name][taken] for name in ("tokens", "intra", "inter", "score", "selected")}
        self.parts.append(part | {"bin": bins[taken].astype(np.int16)})

    def figures(
        self, names: list[str], *, memory: MemoryUse | None, times: StepTimes | None, notes: tuple[str, ...]
    ) -> Figures:
        edges = np.searchsorted(self.bin_of_step, np.arange(self.bins + 1))
        sums = self.sums
        with np.errstate(invalid="ignore", divide="ignore"):
            bins = StepBins(
                first=self.steps[edges[:-1]],
                last=self.steps[edges[1:] - 1],
                candidates=sums["candidates"].astype(np.int64),
                kept=sums["kept"].astype(np.int64),
                candidate_tokens=sums["candidate_tokens"].astype(np.int64),
                kept_tokens=sums["kept_tokens"].astype(np.int64),
                inter_candidates=sums["inter"] / sums["inters"],
                inter_kept=sums["inter_kept"] / sums["inters_kept"],
            )
        empty = {name: np.empty(0, np.float32) for name in ("tokens", "intra", "inter", "score")}
        parts = self.parts or [empty | {"selected": np.empty(0, bool), "bin": np.empty(0, np.int16)}]
        streams = [
            StreamChoice(name=_stream_name(number, names), candidates=candidates, kept=kept)
            for number, (candidates, kept) in self.streams.items()
        ]
        return Figures(
            steps=len(self.steps),
            scored_steps=int(self.scored_step.sum()),
            epochs=len(self.epochs),
            candidates=int(bins.candidates.sum()),
            scored=self.scored,
            not_finite=self.not_finite,
            kept=int(bins.kept.sum()),
            candidate_tokens=int(bins.candidate_tokens.sum()),
            kept_tokens=int(bins.kept_tokens.sum()),
            correlation=self.correlation.value,
            bins=bins,
            rows=SampledRows(
                one_in=self.one_in, **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            ),
            streams=tuple(sorted(streams, key=lambda stream: (-stream.candidates, stream.name))),
            memory=memory,
            times=times,
            notes=notes,
        )


def _times(log: SelectionLog, sums: _Sums, notes: list[str]) -> StepTimes | None:
    try:
        times = read_timings(log.root)
    except (LogError, OSError) as error:
        notes.append(f"The times of the steps cannot be read: {error}")
        return None
    known = np.isin(times["step"], sums.steps)
    if not known.any():
        return None
    bins = sums.bin_of_step[np.searchsorted(sums.steps, times["step"][known])]
    step, selection, writing = (times[name][known] for name in TIMINGS)
    count = np.bincount(bins, minlength=sums.bins)
    with np.errstate(invalid="ignore"):
        return StepTimes(
            step=np.bincount(bins, step, minlength=sums.bins) / count,
            selection=np.bincount(bins, selection, minlength=sums.bins) / count,
            steps=int(known.sum()),
            step_total=float(step.sum()),
            selection_total=float(selection.sum()),
            log_total=float(writing.sum()),
        )


def _memory(log: SelectionLog, sums: _Sums, notes: list[str]) -> MemoryUse | None:
    settings = log.run.get("log")
    capacity = settings.get("buffer_capacity") if isinstance(settings, dict) else None
    if not isinstance(capacity, int) or capacity < 1:
        return None
    scored = np.flatnonzero(sums.scored_step)
    if not len(scored):
        return None
    # Only the last pushes are needed. A table of all of them would grow with the log.
    try:
        last = log.pushes(columns=["push_index"], filter=pc.field("step") >= int(sums.steps[scored[-1]]))
    except LogError as error:
        notes.append(f"What entered the memory cannot be read: {error}")
        return None
    if not last.num_rows:
        return None
    return MemoryUse(capacity=capacity, pushed=int(last["push_index"].to_numpy().max()) + 1)


def _stream_name(number: int, names: list[str]) -> str:
    if number < 0:
        return "(no stream)"
    return names[number] if number < len(names) else f"(stream {number}, not in run.json)"


def _to_numpy(column: pa.Array) -> np.ndarray:
    if pa.types.is_floating(column.type):
        return column.to_numpy(zero_copy_only=False)
    return (column.fill_null(-1) if column.null_count else column).to_numpy(zero_copy_only=False)


def _hash(step: np.ndarray, position: np.ndarray) -> np.ndarray:
    """uint64, evenly spread: the finaliser of SplitMix64 (Steele, Lea, Flood 2014) over step and position."""
    with np.errstate(over="ignore"):
        z = step.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + position.astype(np.uint64) + np.uint64(1)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
