"""`udsstream log`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from udsstream.untrusted_text import clean_line

__all__ = ["log"]


def log(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    step: Annotated[int | None, typer.Option(help="Print the decisions of this step.")] = None,
    sample: Annotated[
        int | None, typer.Option(help="When was this sample offered, what was it worth, was it chosen, and why not?")
    ] = None,
    all_attempts: Annotated[
        bool, typer.Option("--all-attempts", help="With --sample: also what a resumed run superseded, marked.")
    ] = False,
    streams: Annotated[bool, typer.Option("--streams", help="What share of each stream was chosen?")] = False,
    most: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="The N samples chosen most often; then those of the better mean rank."),
    ] = None,
    least: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Of the samples offered, the N chosen least often; then those of the worse mean rank.",
        ),
    ] = None,
    suppressed: Annotated[
        bool,
        typer.Option(
            "--suppressed",
            help="What did the diversity term decide? With embeddings='full' also: which near-duplicates were chosen all the same?",
        ),
    ] = False,
    length: Annotated[bool, typer.Option("--length", help="How far is the choice a matter of length?")] = False,
    until: Annotated[
        str | None,
        typer.Option(
            metavar="baN",
            help="Only what checkpoint baN was trained on, the steps below N. With no other question: the summary, and which samples.",
        ),
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="With --step, --sample, --most or --least: also what the samples say.")
    ] = False,
    to_parquet: Annotated[
        bool, typer.Option("--to-parquet", help="Write the log as Parquet, for DuckDB or Spark.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask a run's selection log: a summary, one step, one sample, or another question.

    Example: udsstream log runs/a --sample 17
    """
    questions = {
        "--step": step is not None,
        "--sample": sample is not None,
        "--streams": streams,
        "--most": most is not None,
        "--least": least is not None,
        "--suppressed": suppressed,
        "--length": length,
        "--to-parquet": to_parquet,
    }
    if len(asked := [name for name, given in questions.items() if given]) > 1:
        raise typer.BadParameter(f"{' and '.join(asked)} are different questions: ask one at a time")
    if text and (as_json or not any(questions[name] for name in ("--step", "--sample", "--most", "--least"))):
        raise typer.BadParameter(
            "it goes with --step, --sample, --most or --least, without --json", param_hint="--text"
        )
    if all_attempts and sample is None:
        raise typer.BadParameter("it goes with --sample alone", param_hint="--all-attempts")
    below = None if until is None else _batches(until)
    if below is not None and to_parquet:
        raise typer.BadParameter("a copy in Parquet is of the whole log", param_hint="--until")
    if below is not None and step is not None and step >= below:
        raise typer.BadParameter(f"ba{below} was made before step {step}", param_hint="--until")

    from udsstream.log_queries import queries, tables
    from udsstream.selection_log.reader import SelectionLog

    opened = SelectionLog.open(run)
    if below is not None:
        queries.check_reaches(opened, below)

    def answer(found: Any, show: Any, *more: Any) -> None:
        if as_json:
            several = isinstance(found, tuple)
            print(json.dumps([item.as_dict() for item in found] if several else found.as_dict(), indent=2))
        else:
            show(found, *more)

    shown: list[int] = []  # samples
    if to_parquet:
        written = str(opened.to_parquet())
        print(json.dumps({"parquet": written}) if as_json else clean_line(written))
    elif step is not None:
        tables.print_step(opened, step, as_json=as_json)
        shown = queries.candidates_of(opened, step) if text else []
    elif sample is not None:
        history = queries.sample_history(opened, sample, until=below, all_attempts=all_attempts)
        answer(history, tables.print_history)
        shown = [sample] if history.offers else []
    elif streams:
        answer(queries.stream_shares(opened, until=below), tables.print_streams)
    elif most is not None:
        counts = queries.most_chosen(opened, most, until=below)
        answer(counts, tables.print_counts, "Chosen most often")
        shown = [count.sample_id for count in counts]
    elif least is not None:
        counts = queries.least_chosen(opened, least, until=below)
        answer(counts, tables.print_counts, "Chosen least often")
        shown = [count.sample_id for count in counts]
    elif suppressed:
        _print_suppressed(opened, below, as_json=as_json)
    elif length:
        answer(queries.length_effect(opened, until=below), tables.print_length)
    else:
        _print_summary(run, opened, below, as_json=as_json)
    if text:
        from udsstream.log_queries import texts

        tables.print_texts(shown, texts.read_text(texts.places_of(opened, shown), opened.run))


def _print_suppressed(opened: Any, below: int | None, *, as_json: bool) -> None:
    from udsstream.log_queries import queries, tables
    from udsstream.log_queries.near_duplicates import near_duplicates

    found = queries.suppressed(opened, until=below, limit=None if as_json else tables.ROWS)
    near = near_duplicates(opened, until=below) if opened.run["log"]["embeddings"] == "full" else None
    if as_json:
        print(json.dumps(found.as_dict() | {"near_duplicates": None if near is None else near.as_dict()}, indent=2))
        return
    tables.print_suppressed(found)
    if near is not None:
        tables.print_near_duplicates(near)
    else:
        typer.echo("Near-duplicates that were chosen cannot be told: that needs a run with embeddings=full.")


def _print_summary(run: Path, opened: Any, below: int | None, *, as_json: bool) -> None:
    from udsstream.log_queries import queries, tables
    from udsstream.log_queries.summary import print_summary, summarize

    trained = None if below is None else queries.trained_on(opened, until=below)
    if as_json:
        more = {} if trained is None else trained.as_dict()
        print(json.dumps(summarize(opened, until=below).as_dict() | more, indent=2))
        return
    print_summary(run, until=below)
    if trained is not None:
        tables.print_trained_on(trained)


def _batches(text: str) -> int:
    """The batches trained before a checkpoint, from its name."""
    match = re.fullmatch(r"ba(\d{1,18})", text)
    if match is None:
        raise typer.BadParameter(
            f"{text!r} is not baN: give the batches in the checkpoint's name, such as ba120 for ep0-ba120-rank0.pt",
            param_hint="--until",
        )
    return int(match[1])
