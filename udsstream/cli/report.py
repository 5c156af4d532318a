"""`udsstream report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from udsstream.cli.options import stream_places
from udsstream.untrusted_text import clean_line

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(help="A run's log folder.")],
    out: Annotated[Path | None, typer.Option(help="Where the page goes; RUN/report.html without it.")] = None,
    no_text: Annotated[bool, typer.Option("--no-text", help="Leave out what the samples say.")] = False,
    samples: Annotated[int, typer.Option(min=0, max=20, help="Samples shown of each kind.")] = 2,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A Composer checkpoint of the run: the audit compares the log with it.")
    ] = None,
    stream: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Where a stream is now (repeatable).")
    ] = None,
) -> None:
    """Write one offline HTML page about a run: figures, plots, samples and verdict.

    The page holds what the samples say, unlike the log: leave it out with --no-text before you hand it on.

    Example: udsstream report runs/a --out a.html --no-text
    """
    from udsstream.report.write import write_report

    places = stream_places(stream)
    written = write_report(run, out=out, text=not no_text, streams=places, per_kind=samples, checkpoint=checkpoint)
    print(clean_line(f"{written.path} ({written.bytes / 1000:,.0f} kB). Audit: {written.verdict}."))
