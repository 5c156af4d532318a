"""The report as one HTML page: no script, no request, nothing from outside.

A pure function of its arguments. Whatever comes from the log or its streams goes through `escape`; the page's own content security
policy forbids scripts and requests besides.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from udsstream import __version__
from udsstream.log_queries.texts import SampleText
from udsstream.report import plots
from udsstream.report.figures import BINS, QUANTILES, Figures, StreamChoice, bands, histogram
from udsstream.report.plots import Plot, short
from udsstream.report.samples import KINDS, Pick
from udsstream.untrusted_text import escape, shorten

if TYPE_CHECKING:
    from udsstream.audit.report import AuditReport

__all__ = ["BEGINNING", "Content", "flatten", "render", "top_streams"]

BEGINNING = "<!doctype html>\n<!-- udsstream report -->\n"
"""How every report begins, so that nothing else is ever overwritten by one."""

_FINDINGS = 4
_SENTENCES = 100
_STREAMS_DRAWN = 8
_STREAMS_LISTED = 300
_SETTINGS = 200
_TEXT_CHARACTERS, _TEXT_LINES = 700, 18
_WORDS = 60
_TEXTS = ("prompt", "response", "text", "system", "user", "assistant", "tool")
"""Columns and roles that are shown in a box even when they hold but a word."""
_VALUE_CHARACTERS = 300
_ALARMING_CORRELATION = 0.9
"""The same as that from which training warns (`udsstream/mosaicml/algorithm.py`)."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True, kw_only=True)
class Content:
    """All that a page shows."""

    run: Mapping[str, Any]
    """The content of run.json."""
    audit: AuditReport | str
    """What the audit found, or why there was none."""
    figures: Figures | str
    """The run in numbers, or why its decisions cannot be read."""
    held_out: tuple[float, float] | None = None
    """Loss on held-out data before and after training, nats per token."""
    picks: Sequence[Pick] = ()
    texts: Sequence[SampleText] | None = None
    """What the picked samples say, one for each; None: their text is left out."""


def render(content: Content) -> str:
    """The page."""
    run, figures = content.run, content.figures
    method = _at(run, "selection", "method")
    parts = [_verdict(content.audit)]
    if isinstance(figures, str):
        parts.append(f'<section><h2>In numbers</h2><p class="problem">{escape(figures)}</p></section>')
    elif not figures.steps:
        parts.append("<section><h2>In numbers</h2><p>The log has no decisions yet.</p></section>")
    else:
        parts += [
            _key_figures(content, figures),
            _chosen(figures, method),
            _over_the_run(figures, method),
            _samples(content, figures, method),
        ]
    parts.append(_settings(run))
    if not isinstance(figures, str) and figures.steps:
        parts.append(_method(figures))
    title = f"Selection report, run {_short_id(run)}"
    return (
        f"{BEGINNING}"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_style_sheet()}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>What was chosen, and why</h1>\n{_facts(run)}\n</header>\n"
        f"<main>\n{chr(10).join(parts)}\n</main>\n"
        f"<footer><p>Made by udsstream {escape(__version__)} from the run’s selection log.</p></footer>\n</body>\n</html>\n"
    )


def _style_sheet() -> str:
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")


# -- heading and verdict ---------------------------------------------------------------------------------------------------


def _facts(run: Mapping[str, Any]) -> str:
    streams = run.get("streams")
    facts = [
        ("Run", _short_id(run)),
        ("Model", _at(run, "model", "name")),
        ("Started", _date(run.get("created"))),
        ("Method", _at(run, "selection", "method")),
        ("Streams", f"{len(streams):,}" if isinstance(streams, list) else None),
        ("Ranks", run.get("world_size") or _at(run, "log", "world_size")),
    ]
    shown = "".join(
        f"<li>{label} <b>{escape(_brief(value, 100))}</b></li>" for label, value in facts if value is not None
    )
    return f'<ul class="facts">{shown}</ul>'


def _verdict(audit: AuditReport | str) -> str:
    if isinstance(audit, str):
        return (
            '<section class="verdict bad" aria-labelledby="verdict"><h2 id="verdict"><strong>Not audited</strong></h2>'
            f"<p>{_prose(audit)}</p></section>"
        )
    total = sum(audit.found.values()) or len(audit.findings)
    if audit.exit_code:
        heading = f"{total:,} finding{'s' if total != 1 else ''}"
    elif audit.anchored:
        heading = "Intact relative to the anchor"
    else:
        heading = "Nothing was found"
    return (
        f'<section class="verdict{" bad" if audit.exit_code else ""}" aria-labelledby="verdict">'
        f'<h2 id="verdict">Audit: <strong>{heading}</strong></h2>'
        f"<p>{_prose(audit.verdict)}</p>{_findings(audit)}"
        + _sentences("What was not checked", audit.unchecked, open_=True)
        + _sentences("What was checked", audit.checked, open_=False)
        + "</section>"
    )


def _findings(audit: AuditReport) -> str:
    """The first few findings of each check, and how many more it had."""
    items = []
    for check in dict.fromkeys(finding.check for finding in audit.findings):
        found = [finding for finding in audit.findings if finding.check == check]
        items += [
            f"<li><code>{escape(check)}</code> {_prose(_brief(finding.message, 2 * _VALUE_CHARACTERS))}</li>"
            for finding in found[:_FINDINGS]
        ]
        more = audit.found.get(check, len(found)) - min(len(found), _FINDINGS)
        if more > 0:
            items.append(f'<li class="muted">… and {more:,} more of <code>{escape(check)}</code></li>')
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _sentences(title: str, sentences: Sequence[str], *, open_: bool) -> str:
    if not sentences:
        return ""
    items = [f"<li>{_prose(sentence)}</li>" for sentence in sentences[:_SENTENCES]]
    if len(sentences) > _SENTENCES:
        items.append(f"<li>… and {len(sentences) - _SENTENCES:,} more</li>")
    return (
        f'<details class="small"{" open" if open_ else ""}><summary>{title} ({len(sentences):,})</summary>'
        f"<ul>{''.join(items)}</ul></details>"
    )


# -- figures ---------------------------------------------------------------------------------------------------------------


def _key_figures(content: Content, figures: Figures) -> str:
    tiles = [
        (
            "Steps",
            f"{figures.steps:,}",
            (
                "all with a choice"
                if figures.scored_steps == figures.steps
                else f"{figures.scored_steps:,} with a choice, the others were trained on whole"
            )
            + (f", in {figures.epochs:,} epochs" if figures.epochs > 1 else ""),
        ),
        ("Candidates", *_count(figures.candidates, _not_finite(figures))),
        ("Chosen", *_count(figures.kept, f"{_percent(figures.kept, figures.candidates)} of the candidates")),
        (
            "Tokens saved",
            _percent(figures.saved_tokens, figures.candidate_tokens),
            f"trained on {figures.kept_tokens:,} of {figures.candidate_tokens:,}",
        ),
    ]
    if figures.times is not None and figures.times.selection_share is not None:
        times = figures.times
        tiles.append(
            (
                "Choosing took",
                f"{times.selection_share:.0%}",
                f"{_seconds(times.selection_total)} of {_seconds(times.step_total)}, {times.steps:,} steps",
            )
        )
    if figures.correlation is not None:
        tiles.append(("Score and length", f"{_signed(figures.correlation)}", _correlation_note(figures.correlation)))
    if content.held_out is not None:
        before, after = content.held_out
        tiles.append(("Held-out loss", f"{after:.3f}", f"nats per token, {before:.3f} before training"))
    shown = "".join(
        f'<div class="card"><dt>{label}</dt><dd><span class="value">{escape(value)}</span>'
        f'<div class="note">{escape(note)}</div></dd></div>'
        for label, value, note in tiles
    )
    notes = "".join(f'<p class="problem">{escape(note)}</p>' for note in figures.notes)
    return f'<section><h2>In numbers</h2><dl class="tiles">{shown}</dl>{notes}</section>'


def _count(count: int, note: str) -> tuple[str, str]:
    """A number as it fits a tile, and the note beneath it, which has all of its digits."""
    return (f"{count:,}", note) if count < 10_000_000 else (short(count), f"{count:,}; {note}")


def _not_finite(figures: Figures) -> str:
    if figures.not_finite:
        return f"{figures.scored:,} scored; {figures.not_finite:,} scores are not finite numbers"
    return "all scored" if figures.scored == figures.candidates else f"{figures.scored:,} of them scored"


def _correlation_note(correlation: float) -> str:
    if abs(correlation) <= _ALARMING_CORRELATION:
        return "Pearson correlation"
    return f"Pearson correlation: close to taking the {'longest' if correlation > 0 else 'shortest'}"


def _chosen(figures: Figures, method: Any) -> str:
    found = histogram(figures.rows.score, figures.rows.selected)
    cards = []
    if found is not None:
        beyond = f" {found.outside:,} beyond the edges are in the outermost bars." if found.outside else ""
        chance = " With the method “random” a score is a random number." if method == "random" else ""
        cards.append(
            _card(
                "Scores, chosen against rejected",
                plots.score_plot(found),
                [("kept", "chosen"), ("rejected", "rejected")],
                "Where the two overlap, the other candidates of the step decided." + chance + beyond,
            )
        )
    by_length = plots.length_plot(figures)
    if by_length is not None:
        dense = int(np.isfinite(figures.rows.score).sum()) > plots.POINTS
        known = "undefined" if figures.correlation is None else _signed(figures.correlation)
        cards.append(
            _card(
                "Length against score",
                by_length,
                [("kept", "mostly chosen"), ("rejected", "mostly rejected")]
                if dense
                else [("kept", "chosen"), ("rejected", "rejected")],
                f"Correlation {known}. "
                + (
                    "The stronger the colour, the more candidates, by orders of magnitude."
                    if dense
                    else "One mark for each candidate."
                ),
            )
        )
    cards.append(_streams_card(figures))
    scores = "" if found is not None else "<p>No step was scored: every candidate was trained on.</p>"
    return f'<section><h2>What was chosen</h2>{scores}<div class="plots">{"".join(cards)}</div>{_all_streams(figures)}</section>'


def _over_the_run(figures: Figures, method: Any) -> str:
    legend = [
        ("pale", "5 to 95% and 25 to 75% of the candidates"),
        ("line", "their median"),
        ("dashed", "median of the chosen"),
    ]
    units = {
        "score": ("Score", "What the choice was made by."),
        "intra": ("Intra", "The value of a sample alone."),
        "inter": ("Inter", "How far a sample is from the memory, while there is something in it."),
    }
    cards = [
        _card(title, drawn, legend, says)
        for column, (title, says) in units.items()
        if (drawn := plots.band_plot(figures, column, title)) is not None
    ]
    if (novelty := plots.novelty_plot(figures)) is not None:
        cards.append(
            _card(
                "Novelty",
                novelty,
                [("line", "mean of all candidates"), ("dashed", "mean of the chosen")],
                f"Falling lines: the stream brings less that the memory does not know.{_memory(figures)}",
            )
        )
    cards.append(
        _card(
            "Tokens saved",
            plots.token_plot(figures),
            [("line", "offered"), ("dashed", "trained on"), ("pale", "saved")],
            "Saved tokens are read once, by the forward pass that scores them, and not trained on."
            if method not in ("random", "longest")
            else "Saved tokens are not trained on.",
        )
    )
    times = figures.times
    if times is not None:
        without = figures.steps - times.steps
        missing = f" {without:,} step{'s have' if without > 1 else ' has'} no times." if without else ""
        cards.append(
            _card(
                "Time of a step",
                plots.time_plot(figures, times),
                [("line", "whole step"), ("dashed", "choosing")],
                f"Choosing is the forward pass of all candidates, their scores and the memory; writing the decisions down took "
                f"{_seconds(times.log_total)} in all.{missing}",
            )
        )
    missing = []
    if not np.isfinite(figures.rows.inter).any():
        missing.append(
            "The log has no distances to a memory"
            + (f", which the method “{method}” does not use." if method in ("random", "longest", "max_loss") else ".")
        )
    if times is None:
        missing.append("There are no times of steps beside this log.")
    told = "".join(f'<p class="muted">{text}</p>' for text in missing)
    return f'<section><h2>Over the run</h2><div class="plots">{"".join(cards)}</div>{told}{_numbers(figures)}</section>'


def _memory(figures: Figures) -> str:
    memory = figures.memory
    if memory is None:
        return ""
    if memory.pushed < memory.capacity:
        return f" The memory has {memory.pushed:,} of {memory.capacity:,} rows filled; none was replaced yet."
    return f" The memory’s {memory.capacity:,} rows were written {memory.turnovers:.1f} times over ({memory.pushed:,} embeddings)."


def _card(title: str, plot: Plot, legend: Iterable[tuple[str, str]], caption: str) -> str:
    keys = "".join(f'<li class="{kind}"><i></i>{escape(label)}</li>' for kind, label in legend)
    return (
        f'<figure class="card"><figcaption><h3>{title}</h3><ul class="legend">{keys}</ul></figcaption>'
        f'<div class="drawing">{plot.svg}</div><p class="caption">{escape(caption)}</p></figure>'
    )


def top_streams(streams: Sequence[StreamChoice], count: int) -> list[StreamChoice]:
    """The first `count` streams, and the rest put together as one (when it is more than one)."""
    if len(streams) <= count + 1:
        return list(streams)
    rest = streams[count:]
    others = StreamChoice(
        name=f"{len(rest):,} others", candidates=sum(s.candidates for s in rest), kept=sum(s.kept for s in rest)
    )
    return [*streams[:count], others]


def _streams_card(figures: Figures) -> str:
    drawn = top_streams(figures.streams, _STREAMS_DRAWN)
    shares = [(_ratio(s.candidates, figures.candidates), _ratio(s.kept, figures.kept)) for s in drawn]
    # The others together would leave the streams that have names no room.
    named = len(drawn) if len(drawn) == len(figures.streams) else len(drawn) - 1
    widest = max((max(pair) for pair in shares[:named]), default=0.0) or 1.0
    rows = ""
    for i, (s, (offered, kept)) in enumerate(zip(drawn, shares, strict=True)):
        bars = (
            f'<span class="bar" style="--share:{100 * offered / widest:.1f}%" title="{offered:.1%} of the candidates"></span>'
            f'<span class="bar" style="--share:{100 * kept / widest:.1f}%" title="{kept:.1%} of the chosen"></span>'
            if i < named
            else f'<span class="muted">{offered:.0%}, {kept:.0%}</span>'
        )
        rows += (
            f'<tr><th scope="row" title="{escape(_brief(s.name))}">{escape(_brief(s.name, 60))}</th><td>{bars}</td>'
            f'<td class="kept-share">{_percent(s.kept, s.candidates)}</td></tr>'
        )
    return (
        '<figure class="card"><figcaption><h3>By stream</h3><ul class="legend">'
        '<li class="pale"><i></i>share of the candidates</li><li class="kept"><i></i>share of the chosen</li></ul></figcaption>'
        '<div class="drawing"><table class="shares"><thead><tr><th scope="col" class="name">stream</th><th scope="col">shares</th>'
        f'<th scope="col" class="kept-share">chosen</th></tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="caption">The longest bar is {widest:.1%}. “Chosen” is how much of a stream’s own candidates was: '
        f"{_percent(figures.kept, figures.candidates)} over all streams.</p></figure>"
    )


def _all_streams(figures: Figures) -> str:
    rows = [
        (
            _brief(s.name),
            f"{s.candidates:,}",
            f"{s.kept:,}",
            _percent(s.kept, s.candidates),
            _percent(s.candidates, figures.candidates, digits=1),
            _percent(s.kept, figures.kept, digits=1),
        )
        for s in figures.streams[:_STREAMS_LISTED]
    ]
    heads = ("stream", "candidates", "chosen", "of its candidates", "share of candidates", "share of chosen")
    title = f"All {len(figures.streams):,} streams that offered candidates"
    if len(figures.streams) > _STREAMS_LISTED:
        title = f"The first {_STREAMS_LISTED:,} of {len(figures.streams):,} streams that offered candidates"
    return _table(title, heads, rows)


def _numbers(figures: Figures) -> str:
    """The figures behind the plots over the steps, for those who cannot see them or want to compute."""
    bins, rows, times = figures.bins, figures.rows, figures.times
    score = bands(rows.score, rows.bin, len(bins))
    table = [
        (
            f"{first:,}" if first == last else f"{first:,} to {last:,}",
            f"{bins.candidates[i]:,}",
            f"{bins.kept[i]:,}",
            f"{bins.candidate_tokens[i]:,}",
            f"{bins.kept_tokens[i]:,}",
            *(_number(score[q, i]) for q in (0, len(QUANTILES) // 2, -1)),
            _number(bins.inter_candidates[i]),
            _number(bins.inter_kept[i]),
            *((_number(times.step[i]), _number(times.selection[i])) if times is not None else ()),
        )
        for i, (first, last) in enumerate(zip(bins.first.tolist(), bins.last.tolist(), strict=True))
    ]
    heads = (
        "steps",
        "candidates",
        "chosen",
        "tokens",
        "trained on",
        "score 5%",
        "median",
        "95%",
        "inter",
        "inter, chosen",
    )
    return _table(
        "The numbers behind these plots", heads + (("seconds", "choosing") if times is not None else ()), table
    )


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in a fold and in a box of its own, first column as the rows' heads, the others as numbers."""
    head = "".join(
        f'<th scope="col"{"" if i == 0 else " class=number"}>{escape(text)}</th>' for i, text in enumerate(heads)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f'<td class="number">{escape(value)}</td>' for value in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<details><summary>{escape(title)}</summary><div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


# -- samples ---------------------------------------------------------------------------------------------------------------


def _samples(content: Content, figures: Figures, method: Any) -> str:
    if not content.picks:
        why = "none was rejected" if figures.scored else "nothing was scored"
        return f"<section><h2>Samples</h2><p>There is nothing to show: {why}.</p></section>"
    texts: Sequence[SampleText | None] = content.texts if content.texts is not None else [None] * len(content.picks)
    random = method == "random"
    parts = []
    for kind, title in KINDS.items():
        of_kind = [(p, t) for p, t in zip(content.picks, texts, strict=True) if p.kind == kind]
        if random and kind not in ("highest", "lowest"):  # the others mean nothing where chance decides
            continue
        if of_kind:
            heading = title.split(":")[0] + ", by chance" if random else title
            cards = "".join(_sample(found, text, content.run, random) for found, text in of_kind)
            parts.append(f'<div class="kind"><h3>{heading}</h3><div class="samples">{cards}</div></div>')
    note = (
        "The text of the samples was left out."
        if content.texts is None
        else "The log holds no text: it was read from the streams as they are now. Their indexes are those of the run; whether each "
        "shard is, <code>udsstream audit --data</code> tells."
    )
    if not random:
        note += " A step’s cut-off is the lowest score that was chosen."
    return f'<section><h2>Samples</h2><p class="muted">{note}</p>{"".join(parts)}</section>'


def _sample(found: Pick, text: SampleText | None, run: Mapping[str, Any], random: bool) -> str:
    streams = run.get("streams")
    entry = streams[found.stream] if isinstance(streams, list) and 0 <= found.stream < len(streams) else None
    stream = entry.get("name") if isinstance(entry, dict) else None
    facts = [f"score {_number(found.score)}"]
    if not random:
        if math.isfinite(found.threshold):
            gap = found.score - found.threshold
            facts.append(
                f"{_number(abs(gap))} {'above' if found.selected else 'below'} the cut-off"
                if gap
                else "just the cut-off"
            )
        if math.isfinite(found.intra):
            facts.append(f"intra {_number(found.intra)}")
        if math.isfinite(found.inter):
            facts.append(f"inter {_number(found.inter)}")
        if found.kind in ("short", "long"):
            other = "longest rejected" if found.selected else "longest chosen"
            facts.append(f"{other} of the step: {found.other_tokens:,} tokens")
    body = ""
    if text is not None and text.problem is not None:
        body = f'<p class="problem">No text: {escape(text.problem)}</p>'
    elif text is not None:
        body = _fields(text.fields)
    return (
        f'<article class="card sample{" kept" if found.selected else ""}">'
        f'<h4><span class="fate">{"Chosen" if found.selected else "Rejected"}</span> '
        f"{'' if stream is None else f'from {escape(_brief(stream, 80))}, '}{found.tokens:,} tokens</h4>"
        f'<p class="numbers">Step {found.step:,}, sample {found.sample_id}: {escape(", ".join(facts))}.</p>{body}</article>'
    )


def _fields(fields: Sequence[tuple[str, str]]) -> str:
    """What a sample says: texts in boxes, what is only a word or two beside them on one line."""
    boxes, words = [], []
    for label, value in fields:
        name = escape(_brief(label, 60))
        if not value:
            continue
        if label not in _TEXTS and len(value) <= _WORDS and "\n" not in value:
            words.append(f"<span>{name} <bdi><code>{escape(value)}</code></bdi></span>")
            continue
        shown = shorten(value, characters=_TEXT_CHARACTERS, lines=_TEXT_LINES)
        cut = f'… <span class="cut">({shown.left_out:,} more characters)</span>' if shown.left_out else ""
        boxes.append(f'<dt>{name}</dt><dd><pre dir="auto">{escape(shown)}{cut}</pre></dd>')
    return (f"<dl>{''.join(boxes)}</dl>" if boxes else "") + (
        f'<p class="words">{" ".join(words)}</p>' if words else ""
    )


# -- settings ----------------------------------------------------------------------------------------------------------------


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A JSON value as (dotted path, text), in its own order; lists of plain values on one line."""
    if isinstance(value, Mapping) and value:
        return [
            row for key, inner in value.items() for row in flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list) and any(isinstance(inner, (dict, list)) for inner in value):
        return [row for number, inner in enumerate(value) for row in flatten(inner, f"{prefix}.{number}")]
    if isinstance(value, list):
        return [(prefix, ", ".join(_brief(inner) for inner in value) or "none")]
    return [(prefix, _brief(value) if not isinstance(value, Mapping) else "none")]


_GROUPS = (
    ("Selection", ("selection", "resolved_alpha", "selection_fingerprint", "warm_start")),
    ("Model and training", ("model", "weights", "tokenizer", "vocab_size", "loader", "seeds", "world_size")),
    ("Versions", ("versions", "git_revision")),
)


def _settings(run: Mapping[str, Any]) -> str:
    named = {key for _, keys in _GROUPS for key in keys} | {"streams"}
    groups = [(title, {key: run[key] for key in keys if key in run}) for title, keys in _GROUPS]
    groups.append(("Record", {key: value for key, value in run.items() if key not in named}))
    tables = []
    for title, values in groups:
        # "selection.keep" is "keep" under the heading Selection.
        own = title.lower()
        rows = [(name.removeprefix(f"{own}."), value) for name, value in flatten(values)] if values else []
        if not rows:
            continue
        body = "".join(
            f'<tr><th scope="row">{_path(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows[:_SETTINGS]
        )
        more = f'<p class="muted">… and {len(rows) - _SETTINGS:,} more</p>' if len(rows) > _SETTINGS else ""
        tables.append(
            f'<div class="card"><h3>{title}</h3><table class="small"><tbody>{body}</tbody></table>{more}</div>'
        )
    return f'<section><h2>Settings</h2><div class="columns">{"".join(tables)}</div>{_recorded_streams(run)}</section>'


def _path(name: str) -> str:
    """A dotted path that is broken behind its dots and underscores rather than within a word."""
    return re.sub(r"(?<=[._])(?=\w)", "<wbr>", escape(_brief(name, 80)))


def _recorded_streams(run: Mapping[str, Any]) -> str:
    streams = run.get("streams")
    if not isinstance(streams, list) or not streams:
        return "<p class=muted>The run names no streams.</p>"
    keys = ("name", "samples", "per_epoch", "licence", "date", "location", "index_sha256")
    rows = [
        tuple(_brief(stream.get(key, "")) for key in keys)
        for stream in streams[:_STREAMS_LISTED]
        if isinstance(stream, dict)
    ]
    listed = f"The first {_STREAMS_LISTED:,} of the " if len(streams) > _STREAMS_LISTED else "The "
    return _table(
        f"{listed}{len(streams):,} streams, as they were recorded",
        ("stream", "samples", "per epoch", "licence", "date", "location", "SHA-256 of its index"),
        rows,
    )


def _method(figures: Figures) -> str:
    rule = (
        "all candidates"
        if figures.rows.one_in == 1
        else f"one candidate in {figures.rows.one_in:,} ({len(figures.rows):,} in all), taken by a hash of its step and position, so "
        "that the same log gives the same page"
    )
    bins = (
        f"{len(figures.bins):,} bins of equally many logged steps" if figures.steps > BINS else "each step for itself"
    )
    return (
        "<section><h2>How the figures were made</h2>"
        f"<p>They are of the run as it stands: what was superseded by a resume is left out. Counts, sums, means and the correlation are "
        f"over all candidates. Quantiles, the distribution of scores and the plot of lengths are over {rule}. "
        f"Plots over steps show {bins}.</p></section>"
    )


# -- words -------------------------------------------------------------------------------------------------------------------


def _at(value: Any, *keys: str) -> Any:
    """A value deep in JSON; None where the path ends early."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _short_id(run: Mapping[str, Any]) -> str:
    return _brief(run.get("run_id", "unknown"))[:12]


def _date(value: Any) -> Any:
    """A time as run.json has it, to the minute; whatever else it is, as it is."""
    try:
        time = datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return value
    zone = {None: "", datetime.timedelta(0): " UTC"}.get(time.utcoffset(), f" {time:%z}")
    return f"{time:%Y-%m-%d %H:%M}{zone}"


def _brief(value: Any, characters: int = _VALUE_CHARACTERS) -> str:
    """A value in one line of bounded length."""
    text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    shown = shorten(text, characters=characters)
    return f"{shown}…" if shown.left_out else shown


def _prose(text: str) -> str:
    """A sentence as HTML: with a capital letter and a full stop as far as they fit, `commands` set as such."""
    first = text.partition(" ")[0]
    # "run.json" and "embedding_dim" begin with a small letter wherever they stand.
    begun = text[0].upper() + text[1:] if first.isalpha() else text
    ended = begun if begun[-1:] in (".", "!", "?", "…") else f"{begun}."
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(ended))


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−") if abs(value) >= 0.005 else "0.00"


def _seconds(value: float) -> str:
    if value < 600:
        return f"{value:.3g} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _percent(part: int, whole: int, digits: int = 0) -> str:
    return f"{part / whole:.{digits}%}" if whole else "–"
