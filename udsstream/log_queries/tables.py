"""The answers of `queries.py` and the steps of a log as tables for people. What they say is decided there; here it is only laid out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from udsstream.errors import LogError
from udsstream.log_queries.near_duplicates import NearDuplicates
from udsstream.log_queries.queries import (
    LengthEffect,
    SampleCount,
    SampleHistory,
    StreamChoice,
    Suppressed,
    TrainedOn,
    stream_name,
)
from udsstream.log_queries.texts import SampleText
from udsstream.selection_log.reader import SelectionLog
from udsstream.untrusted_text import clean, clean_line, in_markup, shorten

__all__ = [
    "ROWS",
    "number",
    "print_counts",
    "print_history",
    "print_length",
    "print_near_duplicates",
    "print_step",
    "print_streams",
    "print_suppressed",
    "print_texts",
    "print_trained_on",
    "share",
]

_TEXT_CHARACTERS, _TEXT_LINES = 600, 12
ROWS = 20
"""Lines of a long list that are shown; `--json` has them all."""


def print_step(log: SelectionLog, step: int, *, as_json: bool = False, console: Console | None = None) -> None:
    """Prints the decisions of one step, in canonical order.

    Raises:
        LogError: the log holds no such step.
    """
    table = log.table(filter=pc.field("step") == step)
    if table.num_rows == 0:
        steps = log.steps()
        held = f"steps {steps[0]} to {steps[-1]}" if len(steps) else "no steps yet"
        raise LogError(f"step {step} is not in the log; it holds {held}")
    if as_json:
        print(json.dumps(table.to_pylist(), indent=2))
        return
    console = console or Console()
    console.print(f"Step {step}, epoch {table['epoch'][0].as_py()}", highlight=False)
    rows = table.to_pylist()
    names = _shown(name for name in table.column_names if any(row[name] is not None for row in rows))
    shown = _table("place", "sample", "stream", "tokens", *names, "kept")
    for row in rows:
        shown.add_row(
            str(row["position"]),
            str(row["sample_id"]),
            "" if row["stream"] is None else in_markup(stream_name(log.run, row["stream"])),
            str(row["tokens"]),
            *(number(row[name]) for name in names),
            "" if row["train_order"] is None else f"no. {row['train_order'] + 1}",
        )
    console.print(shown)


def _shown(known: Iterable[str]) -> list[str]:
    """Of these columns those that a decision was made of, in the order in which they are read."""
    names = set(known)
    values = ("intra", "inter", "loss", "reference_loss", "grad_norm", "alignment", "score")
    return [name for name in values if name in names]


def print_history(history: SampleHistory, *, console: Console | None = None) -> None:
    """Each turn of a sample, and below the table why."""
    console = console or Console()
    name = f"Sample {history.sample_id}"
    if history.stream is not None:
        name += f" (number {history.number_in_stream} of stream {clean_line(history.stream)})"
    if not history.offers:
        text = f"{name} was never offered in the {history.steps_searched:,} steps looked at."
        if history.exists is False:
            text = f"{name} does not exist: the streams in run.json hold no such id, and it was never offered."
        elif history.exists is None:
            text += (
                " Whether there is such a sample is not known: run.json does not say how many samples the streams have."
            )
        _say(console, text)
        return
    turns = sum(not offer.superseded for offer in history.offers)
    chosen = f"chosen {_times(history.times_chosen)}" if history.times_chosen else "never chosen"
    _say(
        console,
        f"{name}: offered {_times(turns)}, {chosen}." if turns else f"{name}: never offered in the run as it stands.",
    )
    if history.exists is False:
        _say(console, "The streams in run.json hold no sample with this id: the log contradicts itself.")
    places = {
        (clean_line(offer.stream or ""), offer.shard, offer.shard_index)
        for offer in history.offers
        if offer.shard is not None
    }
    for stream, shard, index in sorted(places, key=str):
        _say(console, f"It lies in {f'stream {stream}, ' if stream else ''}shard {shard}, at index {index}.")
    lengths = sorted({offer.tokens for offer in history.offers})
    _say(console, f"It has {' or '.join(f'{tokens:,}' for tokens in lengths)} tokens.")
    attempts = ["attempt"] if any(offer.attempt for offer in history.offers) else []
    values = [
        {"intra": offer.intra, "inter": offer.inter, "score": offer.score, **offer.measured} for offer in history.offers
    ]
    names = _shown(name for row in values for name, value in row.items() if value is not None)
    shown = _table(*attempts, "step", "epoch", "place", *names, "rank", "chosen")
    for offer, row in zip(history.offers, values, strict=True):
        shown.add_row(
            *([f"({offer.attempt})" if offer.superseded else str(offer.attempt)] if attempts else []),
            str(offer.step),
            str(offer.epoch),
            str(offer.position),
            *(number(row.get(name)) for name in names),
            "" if offer.rank is None else f"{offer.rank} of {offer.candidates}",
            "yes" if offer.chosen else "no",
        )
    console.print(shown)
    if any(offer.superseded for offer in history.offers):
        _say(console, "Attempts in brackets: superseded by a later attempt, not part of the run as it stands.")
    for offer in history.offers:
        which = f"step {offer.step}" + (f", attempt {offer.attempt} (superseded)" if offer.superseded else "")
        _say(console, f"{which}: {'chosen' if offer.chosen else 'not chosen'}: {offer.reason}.")


def print_trained_on(trained: TrainedOn, *, console: Console | None = None) -> None:
    """How many samples were trained on (or, in a scoring pass, chosen) once, twice, …, and the first of them."""
    console = console or Console()
    if trained.trains:
        what = "The run has" if trained.until is None else f"Checkpoint ba{trained.until} had"
        _say(console, f"{what} been trained on {trained.samples:,} distinct samples, {trained.times:,} in all.")
    else:
        what = "The scoring pass" if trained.until is None else f"Before step {trained.until} the scoring pass"
        _say(console, f"{what} chose {trained.samples:,} samples.")
    shown = _table("times", "samples", "the first of them", left=("the first of them",))
    for times in np.unique(trained.counts)[::-1].tolist():
        ids = trained.sample_ids[trained.counts == times]
        first = ", ".join(map(str, ids[:8].tolist())) + (", …" if len(ids) > 8 else "")
        shown.add_row(f"{times:,}", f"{len(ids):,}", first)
    console.print(shown)


def print_streams(shares: Sequence[StreamChoice], *, console: Console | None = None) -> None:
    """One line for each stream."""
    shown = _table("stream", "offered", "chosen", "share", "of all chosen", "tokens offered", "chosen", "mean score")
    for item in shares:
        shown.add_row(
            in_markup(item.name),
            f"{item.offered:,}",
            f"{item.chosen:,}",
            _percent(item.share_chosen),
            _percent(item.share_of_chosen),
            f"{item.tokens_offered:,}",
            f"{item.tokens_chosen:,}",
            number(item.mean_score),
        )
    (console or Console()).print(shown)


def print_counts(counts: Sequence[SampleCount], title: str, *, console: Console | None = None) -> None:
    """One line for each sample."""
    console = console or Console()
    _say(console, title)
    shown = _table("sample", "stream", "offered", "chosen", "mean score", "mean rank")
    for item in counts:
        shown.add_row(
            str(item.sample_id),
            in_markup(item.stream or ""),
            f"{item.offered:,}",
            f"{item.chosen:,}",
            number(item.mean_score),
            number(item.mean_rank),
        )
    (console or Console()).print(shown)


def print_texts(sample_ids: Sequence[int], texts: Sequence[SampleText], *, console: Console | None = None) -> None:
    """The beginning of what each sample says, as plain characters: streams are not trusted with the terminal."""
    console = console or Console()
    for number, text in zip(sample_ids, texts, strict=True):
        console.rule(f"sample {number}", align="left")
        if text.problem is not None:
            _say(console, f"No text: {clean_line(text.problem)}")
        for label, value in text.fields:
            beginning = shorten(value, characters=_TEXT_CHARACTERS, lines=_TEXT_LINES)
            cut = f" … ({beginning.left_out:,} more characters)" if beginning.left_out else ""
            _say(console, f"{clean_line(label)}: {beginning}{cut}")


def print_suppressed(found: Suppressed, *, console: Console | None = None) -> None:
    """The candidates that diversity decided about, furthest below the median first."""
    console = console or Console()
    if not found.suppressed:
        _say(
            console,
            f"Nothing was suppressed: in {found.steps:,} scored steps intra alone would have kept what the score kept.",
        )
        return
    _say(
        console,
        f"{found.suppressed:,} candidates would have been kept by intra alone, but not by the score, in {found.steps:,} scored steps: "
        f"others took their place, {share(found.suppressed, found.chosen)} of what was chosen there. Furthest below the step's median "
        "inter first; rank: by intra → by score.",
    )
    headings = ("step", "sample", "intra", "inter", "median", "below by", "rank", "kept", "in its place")
    shown = _table(*headings, left=("in its place",))
    for item in found.items[:ROWS]:
        shown.add_row(
            str(item.step),
            str(item.sample_id),
            number(item.intra),
            number(item.inter),
            number(item.median_inter),
            _percent(item.below),
            f"{item.intra_rank} → {item.rank}",
            str(item.kept),
            ", ".join(map(str, item.in_its_place)),
        )
    console.print(shown)
    _more(console, found.suppressed)


def print_near_duplicates(found: NearDuplicates, *, console: Console | None = None) -> None:
    """The pairs of embeddings that lie close to each other, nearest first."""
    console = console or Console()
    if found.typical_distance is None:
        _say(console, "Near-duplicates that were chosen: there are no two embeddings to compare.")
        return
    _say(
        console,
        f"Near-duplicates that were chosen all the same: {found.found:,} pairs within {found.fraction:g} of the typical "
        f"distance, {number(found.typical_distance)} ({found.pushes:,} embeddings, each against the {found.window:,} before it).",
    )
    if found.same_sample:
        _say(
            console, f"And {found.same_sample:,} pairs of a sample with itself, chosen again while the memory held it."
        )
    if not found.pairs:
        return
    shown = _table("sample", "step", "is near to", "of step", "distance", "of the typical")
    for pair in found.pairs[:ROWS]:
        shown.add_row(
            str(pair.sample_id),
            str(pair.step),
            str(pair.earlier_sample_id),
            str(pair.earlier_step),
            number(pair.distance),
            _percent(pair.distance / found.typical_distance if found.typical_distance else None),
        )
    console.print(shown)
    _more(console, found.found)


def print_length(effect: LengthEffect, *, console: Console | None = None) -> None:
    """The correlations, and the choice by tenths of the lengths."""
    console = console or Console()
    _say(console, f"{effect.candidates:,} candidates of {effect.steps:,} scored steps.")
    shown = _table("correlation of", "overall", "within steps", left=("correlation of",))
    shown.add_row("score and tokens (Pearson)", _signed(effect.score_pearson), _signed(effect.within_score_pearson))
    shown.add_row("score and tokens (Spearman)", _signed(effect.score_spearman), _signed(effect.within_score_spearman))
    shown.add_row(
        "chosen and tokens (point-biserial)",
        _signed(effect.choice_point_biserial),
        _signed(effect.within_choice_point_biserial),
    )
    console.print(shown)
    _say(
        console,
        f"“Take the longest k” would have chosen {_percent(effect.longest_share)} of what was chosen; a choice that knows nothing of "
        f"length would share {_percent(effect.longest_share_by_chance)} with it.",
    )
    tenths = _table("tokens", "candidates", "chosen", "share", "mean score")
    for item in effect.deciles:
        tenths.add_row(
            f"{item.shortest:,} – {item.longest:,}",
            f"{item.candidates:,}",
            f"{item.chosen:,}",
            _percent(item.share_chosen),
            number(item.mean_score),
        )
    console.print(tenths)


def share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "–"


def number(value: float | None) -> str:
    """Five digits or more, without an exponent while it can be read without one."""
    if value is None:
        return ""
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.5g}"


def _table(*headings: str, left: Sequence[str] = ()) -> Table:
    """Numbers to the right and never broken; names, and the columns of `left`, to the left."""
    table = Table()
    for heading in headings:
        words = heading in left
        table.add_column(heading, justify="left" if words or heading == "stream" else "right", no_wrap=not words)
    return table


def _say(console: Console, text: str) -> None:
    console.print(clean(text), highlight=False, markup=False)


def _more(console: Console, count: int) -> None:
    if count > ROWS:
        _say(console, f"… and {count - ROWS:,} more: --json has them.")


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"
