"""Which samples of a selection log are chosen for an output, in which order, and what the log says of each.

Reads the log alone (numpy and pyarrow), never the samples. What counts are the rows of the run as it stands: what a resume superseded
does not. Of R candidate rows it holds about 55 R bytes, and 90 bytes for each distinct sample: 1.5 GB for 10 million rows.

The rules, exactly (docs/curating.md says the same to users):

1. Steps considered: those below `until`; with `last_epoch` of these only the ones of the highest epoch that the log has there.
2. A sample was *offered* as often as it has a row in them, and *chosen* as often as such a row was trained on.
3. `times=n` asks for n choices or more (default 1; default 0 with `top_quantile`).
4. A sample's *mean score* is the mean of its finite scores over its offers. `top_quantile=q` keeps, of the S samples that have one, the
   ceil(q·S) with the highest; of equal scores the sample that was offered earlier.
5. `only` keeps the samples of these streams.
6. Quotas come last. `quotas[stream]=n` keeps at most n of a stream; `shares[stream]=p` keeps at most p of the *output*: the output is the
   largest for which each such stream has at most floor(p · size) samples. Kept are those of the highest mean score, samples without one
   last; of equal scores the one that was offered earlier.
7. Each sample comes once, ordered by its *first turn*: its first choice, by (step, training order); those that were never chosen
   follow, by their first offer. Its score, intra and inter are those of its first turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow.compute as pc

from udsstream.errors import ConfigError, LogError
from udsstream.selection_log.reader import SelectionLog

__all__ = ["Choice", "Chosen", "choose", "largest_output"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which samples are wanted; see the module's rules."""

    times: int | None = None
    """Chosen at least so often. None: once, or with `top_quantile` not even that."""
    last_epoch: bool = False
    until: int | None = None
    """Only steps below it: what the checkpoint of that name (ba120: 120) was trained on."""
    top_quantile: Fraction | None = None
    only: tuple[str, ...] = ()
    """Streams by name; empty: all."""
    quotas: Mapping[str, int] = field(default_factory=dict)
    shares: Mapping[str, Fraction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.times is not None and not 0 <= self.times < 1 << 31:
            raise ConfigError(f"times={self.times}, expected a whole number of at least 0")
        if self.until is not None and self.until < 1:
            raise ConfigError(f"until={self.until}, expected a step of at least 1: before it nothing was trained")
        if self.top_quantile is not None and not 0 < self.top_quantile <= 1:
            raise ConfigError(f"top_quantile={float(self.top_quantile)}, expected more than 0 and at most 1")
        for name, number in self.quotas.items():
            if number < 0:
                raise ConfigError(f"the quota of stream {name!r} is {number}, expected at least 0")
        for name, share in self.shares.items():
            if not 0 < share <= 1:
                raise ConfigError(f"the share of stream {name!r} is {float(share)}, expected more than 0 and at most 1")
        if both := sorted(set(self.quotas) & set(self.shares)):
            raise ConfigError(f"stream {both[0]!r} has a quota and a share; give it one of them")

    @property
    def least_times(self) -> int:
        """How often a sample must have been chosen."""
        if self.times is not None:
            return self.times
        return 1 if self.top_quantile is None else 0

    def as_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON; only what was asked for, and `times`."""
        values: dict[str, Any] = {"times": self.least_times}
        if self.last_epoch:
            values["last_epoch"] = True
        if self.until is not None:
            values["until"] = self.until
        if self.top_quantile is not None:
            values["top_quantile"] = str(self.top_quantile)
        if self.only:
            values["only"] = sorted(self.only)
        if self.quotas:
            values["quotas"] = dict(sorted(self.quotas.items()))
        if self.shares:
            values["shares"] = {name: str(share) for name, share in sorted(self.shares.items())}
        return values


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """C samples in the order in which they are written, each once. Arrays are (C,)."""

    sample_id: np.ndarray
    """int64"""
    stream: np.ndarray
    """int64: number of the stream in run.json."""
    shard: np.ndarray
    """int64: place of the shard in its stream's index; −1: the log does not say."""
    shard_index: np.ndarray
    """int64: place in the shard; −1: the log does not say."""
    first_step: np.ndarray
    """int64: step of its first turn."""
    score: np.ndarray
    """float32, of its first turn; NaN where nothing was scored. `intra` and `inter` likewise."""
    intra: np.ndarray
    inter: np.ndarray
    mean_score: np.ndarray
    """float64, over all its offers that were scored; NaN where none was."""
    times_chosen: np.ndarray
    """int64"""
    times_offered: np.ndarray
    """int64"""
    offered: int
    """Distinct samples offered in the steps considered."""
    candidates: int
    """Rows in the steps considered."""
    ever_chosen: int
    """Distinct samples chosen at least once in the steps considered."""

    def __len__(self) -> int:
        return len(self.sample_id)


def choose(log: SelectionLog, choice: Choice) -> Chosen:
    """The samples that `choice` asks for.

    Raises:
        ConfigError: a stream that run.json does not name, or shares that only an empty output can meet.
        LogError: the log cannot be read, has no decisions, or does not reach `until`.
    """
    names, first_ids = _streams(log.run)
    for name in (*choice.only, *choice.quotas, *choice.shares):
        if name not in names:
            known = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            raise ConfigError(f"run.json names no stream {name!r}; it has {known or 'none'}")
    filter = None if choice.until is None else pc.field("step") < choice.until
    if choice.last_epoch:
        epochs = log.table(columns=["epoch"], filter=filter)["epoch"]
        if len(epochs):
            newest = pc.field("epoch") == int(epochs.to_numpy().max())
            filter = newest if filter is None else filter & newest
    columns = ["step", "position", "sample_id", "stream", "shard", "shard_index", "intra", "inter", "score"]
    table = log.table(columns=[*columns, "selected", "train_order"], filter=filter)
    if not table.num_rows:
        raise LogError(f"{log.root} has no decisions{'' if choice.until is None else f' before step {choice.until}'}")

    step = table["step"].to_numpy()
    if choice.until is not None and int(step[-1]) < choice.until - 1:
        raise LogError(
            f"{log.root} does not reach ba{choice.until}: its last step is {step[-1]}; the newest state that it can speak of is "
            f"ba{step[-1] + 1}"
        )
    # Codes count samples in the order of their first offer, for rows come by (step, position).
    encoded = table["sample_id"].combine_chunks().dictionary_encode()
    ids, code = encoded.dictionary.to_numpy(), encoded.indices.to_numpy()
    samples = len(ids)
    selected = table["selected"].to_numpy().astype(bool, copy=False)
    score = pc.fill_null(table["score"], math.nan).to_numpy()

    offered = np.bincount(code, minlength=samples)
    chosen = np.bincount(code[selected], minlength=samples)
    mean_score = _means(code, score, samples)
    turn, place = _first_turns(table, code, selected, step, samples)

    stream = pc.fill_null(table["stream"], -1).to_numpy()[turn].astype(np.int64)
    if first_ids is not None:
        by_id = np.searchsorted(first_ids, ids, side="right") - 1
        stream = np.where(stream < 0, by_id, stream)

    keep = chosen >= choice.least_times
    best_first = np.lexsort((np.arange(samples), -mean_score))  # NaN last
    if choice.top_quantile is not None:
        with_score = int(np.isfinite(mean_score).sum())
        among = np.zeros(samples, bool)
        among[best_first[: math.ceil(choice.top_quantile * with_score)]] = True
        keep &= among & np.isfinite(mean_score)
    if choice.only:
        keep &= np.isin(stream, [names.index(name) for name in choice.only])
    keep = _within_quotas(keep, stream, best_first, names, choice)

    kept = np.flatnonzero(keep)
    kept = kept[np.argsort(place[kept], kind="stable")]
    rows = turn[kept]

    def of_turn(name: str) -> np.ndarray:
        return table[name].take(rows).to_numpy()

    def place_of_turn(name: str) -> np.ndarray:
        return pc.fill_null(table[name].take(rows), -1).to_numpy().astype(np.int64)

    return Chosen(
        sample_id=ids[kept],
        stream=stream[kept],
        shard=place_of_turn("shard"),
        shard_index=place_of_turn("shard_index"),
        first_step=step[rows],
        score=score[rows],
        intra=pc.fill_null(table["intra"].take(rows), math.nan).to_numpy(),
        inter=pc.fill_null(table["inter"].take(rows), math.nan).to_numpy(),
        mean_score=mean_score[kept],
        times_chosen=chosen[kept],
        times_offered=offered[kept],
        offered=samples,
        candidates=table.num_rows,
        ever_chosen=int((chosen > 0).sum()),
    )


def _means(code: np.ndarray, score: np.ndarray, samples: int) -> np.ndarray:
    """(samples,) float64: the mean of each sample's finite scores, NaN where it has none."""
    finite = np.isfinite(score)
    counts = np.bincount(code[finite], minlength=samples)
    sums = np.bincount(code[finite], score[finite].astype(np.float64), minlength=samples)
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _first_turns(
    table: Any, code: np.ndarray, selected: np.ndarray, step: np.ndarray, samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """(samples,) the row of each sample's first turn, and (samples,) its place in the order of writing."""
    position = table["position"].to_numpy()
    order = pc.fill_null(table["train_order"], -1).to_numpy()
    order = np.where(order < 0, position, order)
    choices = np.flatnonzero(selected)
    choices = choices[np.lexsort((order[choices], step[choices]))]
    turn = np.empty(samples, np.int64)
    place = np.arange(len(choices), len(choices) + samples)
    # Of several values assigned to one place NumPy keeps the last: the order is turned round to keep the first.
    turn[code[::-1]] = np.arange(len(code) - 1, -1, -1)
    turn[code[choices][::-1]] = choices[::-1]
    place[code[choices][::-1]] = np.arange(len(choices) - 1, -1, -1)
    return turn, place


def _within_quotas(
    keep: np.ndarray, stream: np.ndarray, best_first: np.ndarray, names: Sequence[str], choice: Choice
) -> np.ndarray:
    if not choice.quotas and not choice.shares:
        return keep
    limits = {names.index(name): number for name, number in choice.quotas.items()}
    ranked = best_first[keep[best_first]]
    if choice.shares:
        counts = {number: int((stream[ranked] == number).sum()) for number in np.unique(stream[ranked]).tolist()}
        counts = {number: min(count, limits.get(number, count)) for number, count in counts.items()}
        shares = {names.index(name): share for name, share in choice.shares.items()}
        size = largest_output(counts, shares)
        if size == 0 and ranked.size:
            total = sum(shares.values())
            raise ConfigError(
                f"only an empty output meets the shares ({', '.join(f'{name}={share}' for name, share in choice.shares.items())}): they "
                f"add up to {float(total):g} and no other stream has a sample to fill the rest; let them add up to 1 or more, or take in "
                "another stream"
            )
        limits |= {number: math.floor(share * size) for number, share in shares.items()}
    within = np.zeros_like(keep)
    within[ranked] = True
    for number, limit in limits.items():
        mine = ranked[stream[ranked] == number]
        within[mine[limit:]] = False
    return within


def largest_output(counts: Mapping[int, int], shares: Mapping[int, Fraction]) -> int:
    """The largest size T for which T = Σ over the streams of their count, or of min(count, floor(share · T)) where they have a share."""
    size = sum(counts.values())
    while True:
        smaller = sum(
            min(count, math.floor(shares[number] * size)) if number in shares else count
            for number, count in counts.items()
        )
        if smaller == size:
            return size
        size = smaller


def _streams(run: Mapping[str, Any]) -> tuple[list[str], np.ndarray | None]:
    """The streams' names, and the first sample id of each (None: run.json does not say how many samples they have)."""
    listed = run.get("streams")
    streams = [item if isinstance(item, dict) else {} for item in listed] if isinstance(listed, list) else []
    names = [str(item.get("name")) for item in streams]
    counts = [item.get("samples") for item in streams]
    if not counts or not all(isinstance(count, int) and 0 <= count < 1 << 40 for count in counts):
        return names, None
    return names, np.concatenate([[0], np.cumsum(np.array(counts, np.int64))[:-1]]).astype(np.int64)
