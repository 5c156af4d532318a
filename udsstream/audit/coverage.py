"""Was the data offered as declared: each epoch every sample, as often as its stream is drawn, and each sample always in its one place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from udsstream.audit.report import Finding, Ledger
from udsstream.audit.rows import Decisions, View
from udsstream.audit.settings import RunFacts, StreamFacts

__all__ = ["check_coverage", "check_places"]

_LISTED = 4
_PADDING = 1024
"""Fewer repeats than this may be padding where run.json does not say how many canonical nodes the data set had."""
_COUNTED = 1 << 28
"""Streams of more samples than this are not counted one by one (a bomb of a run.json would claim 2⁶²)."""


def check_places(rows: Decisions, facts: RunFacts, ledger: Ledger) -> None:
    """Ids are those of the declared streams, and an id always names one row of one shard."""
    streams = facts.streams
    if streams is None:
        ledger.skip("where samples come from: run.json names no streams")
        return
    ids = rows["sample_id"]
    ends = np.cumsum([stream.samples for stream in streams])

    def found(i: int, what: str) -> Finding:
        return Finding(
            check="places",
            step=int(rows["step"][i]),
            rank=int(rows["rank"][i]),
            sample_id=int(ids[i]),
            row=int(rows["position"][i]),
            message=f"step {rows['step'][i]}, position {rows['position'][i]}: sample {ids[i]} {what}",
        )

    outside = (ids < 0) | (ids >= ends[-1])
    ledger.find_each(
        "places",
        np.flatnonzero(outside),
        lambda i: found(i, f"does not exist: the streams have {ends[-1]} samples, numbered from 0"),
    )
    due = np.searchsorted(ends, ids, side="right")
    located = rows["has_stream"] & rows["has_shard"] & rows["has_shard_index"] & ~outside
    ledger.find_each(
        "places",
        np.flatnonzero(located & (rows["stream"] != due)),
        lambda i: found(
            i,
            f"is said to be of stream {rows['stream'][i]}, but its id lies in stream {due[i]} ({streams[due[i]].name})",
        ),
    )
    located &= rows["stream"] == due
    _check_shards(rows, np.flatnonzero(located), found, ledger)
    ledger.check(
        f"places: whether each sample id exists and always lies in one place ({int(located.sum()):,} of {len(rows):,} rows name a shard)"
    )


def _check_shards(rows: Decisions, at: np.ndarray, found, ledger: Ledger) -> None:
    """Within a shard ids and places run in parallel, and shards follow each other as the ids do."""
    ids, shard, index = rows["sample_id"], rows["shard"], rows["shard_index"].astype(np.int64)
    negative = at[(shard[at] < 0) | (index[at] < 0)]
    ledger.find_each("places", negative, lambda i: found(i, f"is said to be row {index[i]} of shard {shard[i]}"))
    # Where each shard's first row would be, by each sample; most rows of a shard agree on it.
    key = rows["stream"].astype(np.int64)[at] << 32 | shard[at].astype(np.int64) & 0xFFFFFFFF
    begin = ids[at] - index[at]
    order = np.lexsort((begin, key))
    key, begin, at = key[order], begin[order], at[order]
    starts = np.flatnonzero(np.append(True, key[1:] != key[:-1])) if len(key) else np.empty(0, np.int64)
    ends = np.append(starts[1:], len(key))
    middle = begin[(starts + ends) // 2] if len(starts) else begin  # the median: a few changed rows do not move it
    of_shard = np.repeat(np.arange(len(starts)), ends - starts)
    off = np.flatnonzero(begin != middle[of_shard]) if len(starts) else np.empty(0, np.int64)
    off = off[np.argsort(at[off], kind="stable")]
    ledger.find_each(
        "places",
        off,
        lambda i: found(
            int(at[i]),
            f"is said to be row {index[at[i]]} of shard {shard[at[i]]} of stream {rows['stream'][at[i]]}, but by the shard's other "
            f"samples that is id {middle[of_shard[i]] + index[at[i]]}",
        ),
    )
    same_stream = (key[starts][1:] >> 32) == (key[starts][:-1] >> 32)
    back = np.flatnonzero(same_stream & (np.diff(middle) <= 0)) + 1 if len(starts) else starts
    ledger.find_each(
        "places",
        back,
        lambda s: found(
            int(at[starts[s]]),
            f"is said to be of shard {shard[at[starts[s]]]}, which begins at id {middle[s]}, but the shard before it begins at id "
            f"{middle[s - 1]}",
        ),
    )


def check_coverage(rows: Decisions, view: View, facts: RunFacts, world_size: int, ledger: Ledger) -> None:
    """In every epoch that was finished, each stream's samples were offered as often as run.json declares.

    An epoch's last, incomplete batch may have been left out, and the data set may repeat samples to divide an epoch evenly: less than
    one batch of a stream's samples may be missing or repeated, or as many as the data set's canonical nodes explain. A data set of C
    canonical nodes repeats up to C − 1 samples, and as many others then miss the epoch's end.
    """
    streams = facts.streams
    if streams is None:
        return
    if any(stream.per_epoch is None for stream in streams):
        ledger.skip(
            "whether each epoch offered every sample: run.json does not say how many are drawn per epoch (an older log)"
        )
        return
    if sum(stream.samples for stream in streams) > _COUNTED:
        ledger.skip(f"whether each epoch offered every sample: the streams have more than {_COUNTED:,}")
        return
    groups = view.groups
    epoch = rows.group("epoch")[groups]
    counts = rows.counts[groups]
    steps = rows.group("step")[groups]
    batch = (facts.batch_size or 0) * world_size or int(counts.max(initial=1))
    firsts = np.flatnonzero(np.append(True, epoch[1:] != epoch[:-1])) if len(epoch) else np.empty(0, np.int64)
    finished = 0
    for number, low in enumerate(firsts.tolist()):
        high = int(firsts[number + 1]) if number + 1 < len(firsts) else len(epoch)
        last = number + 1 == len(firsts)
        if (np.diff(steps[low:high]) != 1).any() or (rows.group("epoch_position") - rows.group("position"))[
            groups[low]
        ] != 0:
            ledger.skip(f"whether epoch {epoch[low]} offered every sample: steps of it are missing")
            continue
        if last and (facts.batches_per_epoch is None or high - low < facts.batches_per_epoch):
            if high > low:
                ledger.skip(
                    f"whether epoch {epoch[low]} offered every sample: only {high - low} of its steps are there"
                )
            continue
        member = rows.rows_in(groups[low:high])
        _check_epoch(rows["sample_id"][member], int(epoch[low]), int(steps[low]), batch, high - low, facts, ledger)
        finished += 1
    ledger.check(
        f"coverage: {finished} finished epoch{'s' if finished != 1 else ''} of {len(streams)} stream{'s' if len(streams) != 1 else ''}, "
        f"how often each sample was offered against what is declared (less than one batch of {batch} a stream may be missing or repeated)"
    )


def _check_epoch(
    ids: np.ndarray, epoch: int, step: int, batch: int, batches: int, facts: RunFacts, ledger: Ledger
) -> None:
    streams = facts.streams
    assert streams is not None
    total = sum(stream.samples for stream in streams)
    offered = np.bincount(ids[(ids >= 0) & (ids < total)], minlength=total)
    drawn = sum(stream.per_epoch or 0 for stream in streams)
    # A run may have been told to end its epochs early; then the rest is missing by intent.
    planned = facts.batches_per_epoch * batch if facts.batches_per_epoch is not None else drawn
    left_out = max(0, drawn - planned) + batch - 1
    tallies: list[_Tally] = []
    first = 0
    for stream in streams:
        tallies.append(_tally(stream, offered[first : first + stream.samples], first))
        first += stream.samples
    surplus = sum(tally.over for tally in tallies)
    # Samples that are repeated to divide an epoch evenly push as many others out of its last batches.
    nodes = facts.canonical_nodes or 1
    short_allowed = left_out + min(surplus, nodes - 1)
    over_allowed = max(batch, nodes) - 1
    strange = [tally for tally in tallies if tally.short > short_allowed or tally.over > over_allowed]
    padding = surplus < _PADDING and all(
        tally.most_over <= 1 and tally.short <= left_out + surplus for tally in tallies
    )
    if strange and facts.canonical_nodes is None and padding:
        ledger.skip(
            f"whether epoch {epoch} repeated {surplus} samples by intent: a data set of many canonical nodes does so to divide an epoch "
            "among them, and run.json does not say how many it had"
        )
        return
    for tally in strange:
        for what, number, allowed, which in (
            ("offered too seldom", tally.short, short_allowed, tally.seldom),
            ("offered too often", tally.over, over_allowed, tally.often),
        ):
            if number > allowed:
                named = ", ".join(map(str, which[:_LISTED].tolist())) + (", …" if len(which) > _LISTED else "")
                message = (
                    f"epoch {epoch} (from step {step}, {batches} steps), stream {tally.stream.name}: {number} of {tally.stream.per_epoch} "
                    f"samples were {what} ({named or 'no sample stands out'}); up to {allowed} can be explained by the last batch and by "
                    "padding"
                )
                sample = int(which[0]) if len(which) else None
                ledger.find(Finding(check="coverage", step=step, sample_id=sample, message=message))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tally:
    """How often an epoch offered the samples of a stream, against what is declared."""

    stream: StreamFacts
    short: int
    """Samples missing, each as often as it is."""
    over: int
    """Samples too many."""
    most_over: int
    """How often the most repeated sample was offered too often."""
    seldom: np.ndarray
    """Ids of the samples that were offered less often than any should be."""
    often: np.ndarray
    """Ids of the samples that were offered more often than any should be."""


def _tally(stream: StreamFacts, offered: np.ndarray, first: int) -> _Tally:
    """offered (samples,): how often each was; first: the id of the stream's first sample."""
    assert stream.per_epoch is not None
    least, rest = divmod(stream.per_epoch, stream.samples)
    most = least + (rest > 0)
    over = np.maximum(offered - most, 0)
    short, surplus = int(np.maximum(least - offered, 0).sum()), int(over.sum())
    if rest:  # which samples are drawn once more is the data set's choice, how many is not
        short = max(short, stream.per_epoch - int(offered.sum()))
        surplus = max(surplus, int(offered.sum()) - stream.per_epoch)
    return _Tally(
        stream=stream,
        short=short,
        over=surplus,
        most_over=int(over.max(initial=0)),
        seldom=first + np.flatnonzero(offered < least),
        often=first + np.flatnonzero(offered > most),
    )
