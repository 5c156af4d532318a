"""The questions an auditor asks of a selection log, as functions from a SelectionLog to a frozen answer.

    sample_history   was this sample offered, chosen, when, and why not
    trained_on       which samples a checkpoint was trained on
    stream_shares    what share of each stream was chosen
    most_chosen, least_chosen
    suppressed       what the diversity term decided (the copies that were trained on all the same: `near_duplicates.py`)
    length_effect    how far the choice is a matter of length

`until=s` limits an answer to the steps below s, which is what a checkpoint made before step s was trained on. Answers are about the
run as it stands, unless they say otherwise. They repeat what the log says: whether it is intact and its choices are right is `udsstream
audit`'s to find out. They hold the columns that they need in memory (at most 2 GB for 10 million
candidates), never whole rows.

Ranks are within a step, 1 the best; of equal values the smaller position comes first, as in the choice itself.

    R rows (candidates), S steps
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udsstream.errors import ConfigError, LogError
from udsstream.selection_log.reader import SelectionLog

__all__ = [
    "DecidedByDiversity",
    "LengthDecile",
    "LengthEffect",
    "Offer",
    "SampleCount",
    "SampleHistory",
    "StreamChoice",
    "Suppressed",
    "TrainedOn",
    "candidates_of",
    "check_reaches",
    "least_chosen",
    "length_effect",
    "most_chosen",
    "sample_history",
    "stream_name",
    "stream_shares",
    "suppressed",
    "trained_on",
    "trains",
]


class _Answer:
    """What all answers can do."""

    def as_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON; a number that is not finite becomes None."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    if isinstance(value, _Answer):
        return value.as_dict()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# -- one sample --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Offer(_Answer):
    """A sample's turn as a candidate."""

    attempt: int
    superseded: bool
    """Whether a later attempt trained this step anew, so that this turn is not part of the run as it stands."""
    step: int
    epoch: int
    position: int
    """Place in the global candidate batch."""
    stream: str | None
    shard: int | None
    shard_index: int | None
    tokens: int
    intra: float | None
    inter: float | None
    score: float | None
    measured: dict[str, float]
    """What else the method measured of it, by the log's columns: loss, grad_norm, reference_loss, alignment."""
    candidates: int
    """How many were offered at this step."""
    kept: int
    """k: how many of them were trained on."""
    rank: int | None
    """Among the step's candidates by score; None when this one has no score."""
    kth_score: float | None
    """The score of the last place that was kept."""
    next_score: float | None
    """The best score that was not kept; None when all were."""
    margin: float | None
    """`score - kth_score`: negative by how much it fell short."""
    intra_rank: int | None
    chosen: bool
    chosen_by_intra: bool | None
    """Whether it would have been kept by intra alone; None when nothing was scored, or not by intra."""
    reason: str
    """Why it was chosen, or not, in words."""


@dataclass(frozen=True, kw_only=True)
class SampleHistory(_Answer):
    """All turns of one sample."""

    sample_id: int
    exists: bool | None
    """Whether the streams of run.json have such a sample; None when run.json does not say how many samples they have."""
    stream: str | None
    """The stream that holds the id, by the number of samples of each stream in run.json."""
    number_in_stream: int | None
    steps_searched: int
    """Steps in the log (below `until`)."""
    times_chosen: int
    """In the run as it stands, like all turns that are not marked as superseded."""
    offers: tuple[Offer, ...]
    """By step, then attempt, then position."""


def sample_history(
    log: SelectionLog, sample_id: int, *, until: int | None = None, all_attempts: bool = False
) -> SampleHistory:
    """Every turn of a sample, with the reason for what became of it. Of the other candidates only those steps are read."""
    below = _below(until)
    found = log.table(columns=["attempt", "step"], filter=_and(pc.field("sample_id") == sample_id, below))
    current = set(zip(found["attempt"].to_pylist(), found["step"].to_pylist(), strict=True))
    if all_attempts:
        found = log.table(
            all_attempts=True, columns=["attempt", "step"], filter=_and(pc.field("sample_id") == sample_id, below)
        )
    offers: tuple[Offer, ...] = ()
    if found.num_rows:
        steps = pc.field("step").isin(found["step"].unique())
        columns = ["attempt", "step", "epoch", "position", "sample_id", "stream", "shard", "shard_index", "tokens"]
        columns += ["intra", "inter", "score", "selected", *other_measures(log.run)]
        offers = tuple(
            _offers(log, log.table(all_attempts=all_attempts, columns=columns, filter=steps), sample_id, current)
        )
    exists, stream, number = _place(log.run, sample_id)
    return SampleHistory(
        sample_id=sample_id,
        exists=exists,
        stream=stream,
        number_in_stream=number,
        steps_searched=len(_Steps.of(log.table(columns=["step"], filter=below)).starts),
        times_chosen=sum(offer.chosen and not offer.superseded for offer in offers),
        offers=offers,
    )


def other_measures(run: Mapping[str, Any]) -> list[str]:
    """Columns of numbers that the decisions of this log may have beside intra and inter."""
    later = (run.get("log") or {}).get("measures") or []
    return ["loss", *(name for name in later if name != "interaction")]


def _offers(log: SelectionLog, table: pa.Table, sample_id: int, current: set[tuple[int, int]]) -> Iterator[Offer]:
    table = table.sort_by([("step", "ascending"), ("attempt", "ascending"), ("position", "ascending")])
    steps = _Steps.of(table)
    score, intra = _floats(table, "score"), _floats(table, "intra")
    selected = _booleans(table, "selected")
    kept = steps.total(selected)
    rank, intra_rank = steps.ranks(score), steps.ranks(intra)
    kth, following = steps.value_at_rank(score, rank, kept), steps.value_at_rank(score, rank, kept + 1)
    scored = steps.total(~np.isnan(score)) > 0
    by_intra = steps.total(np.isnan(intra)) == 0
    method, others = _method(log.run), other_measures(log.run)
    for row in np.flatnonzero(table["sample_id"].to_numpy() == sample_id).tolist():
        step = int(steps.of_row[row])
        values = table.slice(row, 1).to_pylist()[0]
        has_score = not math.isnan(score[row])
        has_intra = bool(scored[step] and by_intra[step])
        offer = Offer(
            attempt=values["attempt"],
            superseded=(values["attempt"], values["step"]) not in current,
            step=values["step"],
            epoch=values["epoch"],
            position=values["position"],
            stream=None if values["stream"] is None else stream_name(log.run, values["stream"]),
            shard=values["shard"],
            shard_index=values["shard_index"],
            tokens=values["tokens"],
            intra=values["intra"],
            inter=values["inter"],
            score=values["score"],
            measured={name: values[name] for name in others if values[name] is not None},
            candidates=int(steps.counts[step]),
            kept=int(kept[step]),
            rank=int(rank[row]) if has_score else None,
            kth_score=_number(float(kth[step])),
            next_score=_number(float(following[step])),
            margin=_number(float(score[row] - kth[step])),
            intra_rank=int(intra_rank[row]) if has_intra else None,
            chosen=bool(selected[row]),
            chosen_by_intra=bool(intra_rank[row] <= kept[step]) if has_intra else None,
            reason="",
        )
        yield dataclasses.replace(offer, reason=_reason(offer, scored=bool(scored[step]), method=method))


def _reason(offer: Offer, *, scored: bool, method: str | None) -> str:
    """Why this became of a candidate, from the numbers of its step."""
    k = offer.kept
    if not scored:
        if offer.chosen and method == "full":
            return f"the method full trains on every candidate ({k} of {offer.candidates})"
        if offer.chosen:
            return (
                f"selection was off at this step: {k} of {offer.candidates} candidates were trained on without a score"
            )
        return "selection was off at this step, yet it was not trained on: the log contradicts itself (see `udsstream audit`)"
    if k == 0:
        return "nothing was kept at this step: the log contradicts itself (see `udsstream audit`)"
    if offer.score is None or offer.rank is None or offer.kth_score is None or offer.margin is None:
        return (
            f"its score, or that of place {k}, is no finite number at a step that was scored: the log contradicts itself "
            "(see `udsstream audit`)"
        )
    place = f"rank {offer.rank} of {offer.candidates}, {k} were kept"
    if offer.chosen != (offer.rank <= k):
        became = "chosen" if offer.chosen else "not chosen"
        return f"{became} against its score ({place}): the log contradicts itself (see `udsstream audit`)"
    if method == "random":
        return f"{'drawn' if offer.chosen else 'not drawn'} at random: {place}"
    if method == "selective_backprop":
        drawn = "drawn" if offer.chosen else "not drawn"
        return f"{drawn}, by a chance that grows with the percentile of its loss among the candidates: {place}"
    if method in ("greats", "divbs"):
        order = f"number {offer.rank} of {offer.candidates} in the order in which {method} takes candidates beside each other"
        return f"{order}, and {k} were kept"
    if offer.chosen:
        text = f"score {offer.score:.6g}, {place}"
        if offer.next_score is not None:
            gap = offer.score - offer.next_score
            less = f"{gap:.3g} less" if gap > 0 else "no less, but a larger position"
            text += f"; the best that was not kept had {offer.next_score:.6g}, {less}"
        if offer.chosen_by_intra is False:
            text += f"; by intra alone it would not have been chosen (rank {offer.intra_rank}): diversity lifted it in"
        return text
    text = f"score {offer.score:.6g} against {offer.kth_score:.6g} of place {k} (margin {offer.margin:+.3g}): {place}"
    if offer.margin == 0:
        text = f"score {offer.score:.6g} is that of place {k} too, which went to the smaller position: {place}"
    if method == "uds_intra":
        return text
    if offer.chosen_by_intra:
        return f"{text}; by intra alone it would have been chosen (rank {offer.intra_rank}): others were further from what the memory held"
    if offer.chosen_by_intra is False:
        return f"{text}; nor would it have been by intra alone (rank {offer.intra_rank})"
    return text


def _place(run: Mapping[str, Any], sample_id: int) -> tuple[bool | None, str | None, int | None]:
    """Whether the id exists, its stream and its number there: ids count through the ordered streams."""
    streams = _streams(run)
    sizes = [size for stream in streams if isinstance(size := stream.get("samples"), int)]
    if not streams or len(sizes) < len(streams):
        return None, None, None
    first = 0
    for number, size in enumerate(sizes):
        if first <= sample_id < first + size:
            return True, stream_name(run, number), sample_id - first
        first += size
    return False, None, None


# -- what a checkpoint was trained on ----------------------------------------------------------------------------


def trains(log: SelectionLog) -> bool:
    """Whether what was chosen was trained on: not in a scoring pass."""
    job = log.run.get("job")
    return not (isinstance(job, dict) and job.get("kind") == "scoring")


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedOn(_Answer):
    """The distinct samples that were trained on."""

    until: int | None
    """Only steps below it; None: all that the log has."""
    trains: bool
    """False: the log of a scoring pass, which only chose them."""
    steps: int
    samples: int
    times: int
    """Trainings, repeats counted."""
    sample_ids: np.ndarray
    """(samples,) int64, ascending."""
    counts: np.ndarray
    """(samples,) int64: how often each was trained on."""

    def as_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON; the samples as a list of {sample_id, times}."""
        pairs = zip(self.sample_ids.tolist(), self.counts.tolist(), strict=True)
        return {
            "until": self.until,
            "steps": self.steps,
            "samples": self.samples,
            "times": self.times,
            "trained_on": [{"sample_id": sample_id, "times": times} for sample_id, times in pairs],
        }


def trained_on(log: SelectionLog, *, until: int | None = None) -> TrainedOn:
    """Which samples, and how often: the whole of what the weights before step `until` have seen."""
    table = log.table(columns=["step", "sample_id"], filter=_and(pc.field("selected"), _below(until)))
    ids, counts = np.unique(table["sample_id"].to_numpy(), return_counts=True)
    return TrainedOn(
        until=until,
        trains=trains(log),
        steps=len(np.unique(table["step"].to_numpy())),
        samples=len(ids),
        times=table.num_rows,
        sample_ids=ids,
        counts=counts,
    )


def check_reaches(log: SelectionLog, until: int) -> None:
    """Raises LogError unless the log has the last step before `until`: an answer about half of a checkpoint would mislead."""
    if until == 0 or log.table(columns=["step"], filter=pc.field("step") == until - 1).num_rows:
        return
    steps = log.steps()
    if len(steps) and steps[-1] >= until:
        raise LogError(f"{log.root} has no step {until - 1}, but later ones: it is incomplete (see `udsstream audit`)")
    held = f"it holds steps {steps[0]} to {steps[-1]}" if len(steps) else "it holds no steps yet"
    reach = f"; the newest state that it can speak of is ba{steps[-1] + 1}" if len(steps) else ""
    raise LogError(f"{log.root} does not reach ba{until}: {held}{reach}")


# -- streams -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StreamChoice(_Answer):
    """How one stream fared."""

    name: str
    offered: int
    chosen: int
    share_chosen: float | None
    """Of its own candidates; None when it offered none."""
    share_of_chosen: float | None
    """Of all that was trained on."""
    tokens_offered: int
    tokens_chosen: int
    mean_score: float | None
    """Over its scored candidates; None when none was scored."""


def stream_shares(log: SelectionLog, *, until: int | None = None) -> tuple[StreamChoice, ...]:
    """Every stream of run.json, and any other that the rows name, most offered first. Steps without scores count as chosen."""
    table = log.table(columns=["stream", "tokens", "selected", "score"], filter=_below(until))
    numbers = pc.fill_null(table["stream"], -1).to_numpy().astype(np.int64)
    selected = _booleans(table, "selected")
    tokens = table["tokens"].to_numpy().astype(np.float64)
    score = _floats(table, "score")
    known = len(_streams(log.run))
    lowest = min(0, int(numbers.min(initial=0)))
    bins = max(known, int(numbers.max(initial=-1)) + 1) - lowest

    def count(weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(numbers - lowest, weights, minlength=bins)

    offered, chosen = count(), count(selected.astype(np.float64))
    tokens_offered, tokens_chosen = count(tokens), count(tokens * selected)
    scored = ~np.isnan(score)
    scores, score_sum = count(scored.astype(np.float64)), count(np.where(scored, score, 0).astype(np.float64))
    shares = [
        StreamChoice(
            name=stream_name(log.run, at + lowest),
            offered=int(offered[at]),
            chosen=int(chosen[at]),
            share_chosen=_ratio(chosen[at], offered[at]),
            share_of_chosen=_ratio(chosen[at], selected.sum()),
            tokens_offered=int(tokens_offered[at]),
            tokens_chosen=int(tokens_chosen[at]),
            mean_score=_ratio(score_sum[at], scores[at]),
        )
        for at in range(bins)
        if offered[at] or 0 <= at + lowest < known
    ]
    return tuple(sorted(shares, key=lambda share: -share.offered))


# -- the most and the least chosen -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SampleCount(_Answer):
    """How one sample fared over the run."""

    sample_id: int
    stream: str | None
    offered: int
    chosen: int
    """Times it was trained on, steps without scores included."""
    mean_score: float | None
    mean_rank: float | None
    """Over its scored turns; 1 is the best. None when it was never scored."""


def candidates_of(log: SelectionLog, step: int) -> list[int]:
    """The ids of a step's candidates, in canonical order; none when the log has no such step."""
    table = log.table(columns=["position", "sample_id"], filter=pc.field("step") == step)
    return table.sort_by("position")["sample_id"].to_pylist()


def most_chosen(log: SelectionLog, count: int, *, until: int | None = None) -> tuple[SampleCount, ...]:
    """The samples trained on most often; then the better mean rank, then the smaller id."""
    return _sample_counts(log, count, until=until, most=True)


def least_chosen(log: SelectionLog, count: int, *, until: int | None = None) -> tuple[SampleCount, ...]:
    """Of the samples that were offered, those trained on least often; then the worse mean rank, then the smaller id."""
    return _sample_counts(log, count, until=until, most=False)


def _sample_counts(log: SelectionLog, count: int, *, until: int | None, most: bool) -> tuple[SampleCount, ...]:
    table = log.table(columns=["step", "sample_id", "stream", "score", "selected"], filter=_below(until))
    if not table.num_rows:
        return ()
    encoded = table["sample_id"].combine_chunks().dictionary_encode()
    ids, codes = encoded.dictionary.to_numpy(), encoded.indices.to_numpy()
    score = _floats(table, "score")
    scored = ~np.isnan(score)

    def total(weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(codes, weights, minlength=len(ids))

    offered, chosen = total(), total(_booleans(table, "selected").astype(np.float64)).astype(np.int64)
    times_scored = total(scored.astype(np.float64))
    rank = _Steps.of(table).ranks(score)
    with np.errstate(invalid="ignore"):
        mean_rank = total(np.where(scored, rank, 0).astype(np.float64)) / times_scored
        mean_score = total(np.where(scored, score, 0).astype(np.float64)) / times_scored
    # lexsort puts NaN, a sample that was never scored, last either way.
    keys = (ids, mean_rank, -chosen) if most else (ids, -mean_rank, chosen)
    best = np.lexsort(keys)[:count]
    stream = np.full(len(ids), -1, np.int64)
    stream[codes] = pc.fill_null(table["stream"], -1).to_numpy()
    return tuple(
        SampleCount(
            sample_id=int(ids[at]),
            stream=None if stream[at] < 0 else stream_name(log.run, int(stream[at])),
            offered=int(offered[at]),
            chosen=int(chosen[at]),
            mean_score=_number(float(mean_score[at])),
            mean_rank=_number(float(mean_rank[at])),
        )
        for at in best.tolist()
    )


# -- what the diversity term decided -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DecidedByDiversity(_Answer):
    """A candidate that intra alone would have kept."""

    step: int
    sample_id: int
    intra: float
    inter: float
    score: float
    rank: int
    """By score."""
    intra_rank: int
    """By intra alone: within the kept."""
    kept: int
    """k: how many were kept at this step."""
    median_inter: float
    """Of the step's candidates."""
    below: float | None
    """`1 - inter / median_inter`: how far it lay below the step's median, as a part of it. None when the median is 0."""
    in_its_place: tuple[int, ...]
    """The samples kept at this step that intra alone would not have kept. As many as were suppressed there; which one took whose
    place is not defined."""


@dataclass(frozen=True, kw_only=True)
class Suppressed(_Answer):
    """What the diversity term decided over the run."""

    steps: int
    """Steps that were scored by intra and inter."""
    chosen: int
    """Samples chosen at these steps."""
    suppressed: int
    """Candidates that intra alone would have kept, but the score did not."""
    items: tuple[DecidedByDiversity, ...]
    """Of these, furthest below the median first."""


def suppressed(log: SelectionLog, *, until: int | None = None, limit: int | None = None) -> Suppressed:
    """The candidates that the diversity term decided about; at most `limit` of them one by one.

    A low `inter` says that a candidate was near to much of what the memory held, for it is a mean over the memory: not that it was a
    copy of one sample in it.

    Raises:
        ConfigError: the run did not choose by the method uds.
    """
    method = _method(log.run)
    if method not in (None, "uds"):
        raise ConfigError(
            f"{log.root} chose by the method {method!r}, which does not weigh diversity against utility: only a run of method "
            "'uds' can suppress near-duplicates"
        )
    columns = ["step", "sample_id", "intra", "inter", "score", "selected"]
    table = log.table(columns=columns, filter=_below(until))
    steps = _Steps.of(table)
    values = {name: _floats(table, name) for name in ("intra", "inter", "score")}
    complete = steps.total(np.isnan(values["intra"]) | np.isnan(values["inter"]) | np.isnan(values["score"])) == 0
    if not complete.all():
        table = table.filter(pa.array(complete[steps.of_row]))
        steps = _Steps.of(table)
        values = {name: _floats(table, name) for name in values}
    selected = _booleans(table, "selected")
    kept = steps.total(selected)
    intra_rank = steps.ranks(values["intra"])
    by_intra = intra_rank <= kept[steps.of_row]
    out = np.flatnonzero(by_intra & ~selected)
    lifted = np.flatnonzero(~by_intra & selected)
    ids, step_numbers = table["sample_id"].to_numpy(), table["step"].to_numpy()
    median = steps.median(values["inter"])[steps.of_row[out]]
    inter = values["inter"][out].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.where(median > 0, 1 - inter / median, np.nan)
    order = np.argsort(-below, kind="stable")[:limit]  # NaN last
    out, median, below = out[order], median[order], below[order]
    rank = steps.ranks(values["score"]) if len(out) else intra_rank
    lifted_steps = steps.of_row[lifted]
    first, stop = (np.searchsorted(lifted_steps, steps.of_row[out], side=side) for side in ("left", "right"))
    items = tuple(
        DecidedByDiversity(
            step=int(step_numbers[row]),
            sample_id=int(ids[row]),
            intra=float(values["intra"][row]),
            inter=float(values["inter"][row]),
            score=float(values["score"][row]),
            rank=int(rank[row]),
            intra_rank=int(intra_rank[row]),
            kept=int(kept[steps.of_row[row]]),
            median_inter=float(median[at]),
            below=_number(below[at]),
            in_its_place=tuple(ids[lifted[first[at] : stop[at]]].tolist()),
        )
        for at, row in enumerate(out.tolist())
    )
    return Suppressed(
        steps=len(steps.starts),
        chosen=int(selected.sum()),
        suppressed=int((by_intra & ~selected).sum()),
        items=items,
    )


# -- length ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LengthDecile(_Answer):
    """The candidates of one tenth of the lengths."""

    shortest: int
    longest: int
    candidates: int
    chosen: int
    share_chosen: float | None
    mean_score: float | None


@dataclass(frozen=True, kw_only=True)
class LengthEffect(_Answer):
    """How far score and choice are a matter of length. Only scored steps; a correlation is None where it is undefined."""

    steps: int
    candidates: int
    score_pearson: float | None
    score_spearman: float | None
    choice_point_biserial: float | None
    """Pearson correlation of chosen (1 or 0) and tokens, over the steps where something was rejected."""
    within_score_pearson: float | None
    """The same with each step's means taken off, as `within_…` throughout: only differences between candidates that met count."""
    within_score_spearman: float | None
    """Of the ranks within the step."""
    within_choice_point_biserial: float | None
    longest_share: float | None
    """Share of the chosen that "take the longest k" would have chosen too, over the steps where something was rejected."""
    longest_share_by_chance: float | None
    """The same for a choice that knows nothing of length."""
    deciles: tuple[LengthDecile, ...]
    """Candidates by length, shortest first; equal lengths are in one decile, so that they may differ in size."""


def length_effect(log: SelectionLog, *, until: int | None = None) -> LengthEffect:
    """Correlations of score and choice with the number of tokens."""
    columns = ["step", "tokens", "score", "selected"]
    table = log.table(columns=columns, filter=_and(pc.field("score").is_valid(), _below(until)))
    if not (finite := np.isfinite(_floats(table, "score"))).all():
        table = table.filter(pa.array(finite))
    steps = _Steps.of(table)
    tokens = table["tokens"].to_numpy().astype(np.float64)
    score = _floats(table, "score").astype(np.float64)
    selected = _booleans(table, "selected")
    kept = steps.total(selected)
    contested = (kept < steps.counts)[steps.of_row]
    chosen_of, tokens_of = selected[contested].astype(np.float64), tokens[contested]
    longest = steps.ranks(tokens) <= kept[steps.of_row]
    among, of = float((longest & selected & contested).sum()), float((selected & contested).sum())
    rejecting = kept < steps.counts
    by_chance = float((kept[rejecting] ** 2 / steps.counts[rejecting]).sum())
    return LengthEffect(
        steps=len(steps.starts),
        candidates=len(tokens),
        score_pearson=_pearson(score, tokens),
        score_spearman=_pearson(_average_ranks(score), _average_ranks(tokens)),
        choice_point_biserial=_pearson(chosen_of, tokens_of),
        within_score_pearson=_pearson(steps.demeaned(score), steps.demeaned(tokens)),
        within_score_spearman=_pearson(
            steps.demeaned(_average_ranks(score, steps)), steps.demeaned(_average_ranks(tokens, steps))
        ),
        within_choice_point_biserial=_pearson(
            steps.demeaned(selected.astype(np.float64))[contested], steps.demeaned(tokens)[contested]
        ),
        longest_share=_ratio(among, of),
        longest_share_by_chance=_ratio(by_chance, of),
        deciles=_deciles(tokens, score, selected),
    )


def _deciles(tokens: np.ndarray, score: np.ndarray, selected: np.ndarray) -> tuple[LengthDecile, ...]:
    if not len(tokens):
        return ()
    edges = np.unique(np.quantile(tokens, np.arange(1, 10) / 10, method="lower"))
    decile = np.searchsorted(edges, tokens, side="left")
    out = []
    for number in range(len(edges) + 1):
        lengths, scores = tokens[decile == number], score[decile == number]
        if not len(lengths):
            continue
        chosen = int(selected[decile == number].sum())
        out.append(
            LengthDecile(
                shortest=int(lengths.min()),
                longest=int(lengths.max()),
                candidates=len(lengths),
                chosen=chosen,
                share_chosen=_ratio(chosen, len(lengths)),
                mean_score=_number(scores.mean()),
            )
        )
    return tuple(out)


# -- arithmetic over steps ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Steps:
    """R rows cut into S steps (of one attempt each). The rows must be ordered by step, and by position within it."""

    of_row: np.ndarray
    """(R,) the number of its step, from 0."""
    starts: np.ndarray
    """(S,) the first row of each step."""
    counts: np.ndarray
    """(S,) rows of each step."""

    @classmethod
    def of(cls, table: pa.Table) -> _Steps:
        rows = table.num_rows
        begins = np.ones(rows, bool)
        begins[1:] = False
        for name in {"step", "attempt"} & set(table.column_names):
            values = table[name].to_numpy()
            begins[1:] |= values[1:] != values[:-1]
        starts = np.flatnonzero(begins)
        return cls(of_row=np.cumsum(begins) - 1, starts=starts, counts=np.diff(np.append(starts, rows)))

    def total(self, values: np.ndarray) -> np.ndarray:
        """(R,) booleans → (S,) int64: how many of each step."""
        return np.bincount(self.of_row[values], minlength=len(self.starts))

    def ranks(self, values: np.ndarray) -> np.ndarray:
        """(R,) → (R,) int64: 1 for the largest of its step; of equal values the earlier row; NaN last."""
        ranks = np.empty(len(values), np.int64)
        ranks[self.order(-values)] = np.arange(1, len(values) + 1) - self.starts[self.of_row]
        return ranks

    def order(self, values: np.ndarray) -> np.ndarray:
        """(R,) → (R,) int64: the rows, step by step, ascending by value within each; equal values in row order, NaN last.

        What `np.lexsort((values, of_row))` gives, several times faster: steps of one size are sorted together as the rows of a matrix.
        """
        order = np.empty(len(values), np.int64)
        for size in np.unique(self.counts).tolist():
            first = self.starts[self.counts == size][:, None]
            rows = first + np.arange(size)
            order[rows] = first + np.argsort(values[rows], axis=1, kind="stable")
        return order

    def value_at_rank(self, values: np.ndarray, ranks: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """(S,) float64: of each step the value with the wanted rank (S,); NaN where there is none."""
        out = np.full(len(self.starts), np.nan)
        rows = np.flatnonzero(ranks == wanted[self.of_row])
        out[self.of_row[rows]] = values[rows]
        return out

    def median(self, values: np.ndarray) -> np.ndarray:
        """(S,) float64: the median of each step."""
        ordered = values[self.order(values)].astype(np.float64)
        return (ordered[self.starts + (self.counts - 1) // 2] + ordered[self.starts + self.counts // 2]) / 2

    def demeaned(self, values: np.ndarray) -> np.ndarray:
        """(R,) float64: each value less the mean of its step."""
        return _centred(
            values, (np.bincount(self.of_row, values, minlength=len(self.starts)) / self.counts)[self.of_row]
        )


def _average_ranks(values: np.ndarray, steps: _Steps | None = None) -> np.ndarray:
    """(R,) → (R,) float64: the rank from the smallest up, equal values sharing their mean rank; over all rows, or within each step.

    Within steps the ranks go on from one step to the next: only differences within a step mean something.
    """
    order = np.argsort(values, kind="stable") if steps is None else steps.order(values)
    ordered = values[order]
    begins = np.ones(len(values), bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    if steps is not None:
        begins[steps.starts] = True
    first = np.flatnonzero(begins)
    counts = np.diff(np.append(first, len(values)))
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(first + (counts - 1) / 2, counts)
    return ranks


def _pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    """In [-1, 1]; None while it is undefined (fewer than two, or all alike)."""
    if len(a) < 2:
        return None
    a, b = _centred(a, a.mean()), _centred(b, b.mean())
    spread = math.sqrt(float(a @ a) * float(b @ b))
    return _number(min(1.0, max(-1.0, float(a @ b) / spread))) if spread > 0 else None


def _centred(values: np.ndarray, means: np.ndarray | float) -> np.ndarray:
    """The values less their means, without what rounding leaves of a constant."""
    rest = values - means
    return np.where(np.abs(rest) > 1e-12 * np.abs(means), rest, 0.0)


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# -- reading -----------------------------------------------------------------------------------------------------


def stream_name(run: Mapping[str, Any], number: int) -> str:
    """The name of a stream in run.json."""
    streams = _streams(run)
    if 0 <= number < len(streams):
        return str(streams[number].get("name"))
    return "(no stream)" if number < 0 else f"(stream {number}, not in run.json)"


def _streams(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The streams of run.json, whose form the log does not vouch for."""
    streams = run.get("streams")
    return [stream if isinstance(stream, dict) else {} for stream in streams] if isinstance(streams, list) else []


def _method(run: Mapping[str, Any]) -> str | None:
    """How the run chose; None when run.json does not say."""
    selection = run.get("selection")
    return selection.get("method") if isinstance(selection, dict) else None


def _floats(table: pa.Table, name: str) -> np.ndarray:
    """(R,) float32, NaN where there is no value."""
    return pc.fill_null(table[name], math.nan).to_numpy()


def _booleans(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy(zero_copy_only=False).astype(bool, copy=False)


def _below(until: int | None) -> pc.Expression | None:
    return None if until is None else pc.field("step") < until


def _and(left: pc.Expression, right: pc.Expression | None) -> pc.Expression:
    return left if right is None else left & right
