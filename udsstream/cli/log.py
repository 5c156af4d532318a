"""`udsstream log`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["log"]


def log(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    step: Annotated[int | None, typer.Option(help="Print the decisions of this step.")] = None,
    to_parquet: Annotated[
        bool, typer.Option("--to-parquet", help="Write the log as Parquet, for DuckDB or Spark.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read a run's selection log: a summary, one step's decisions, or a copy in Parquet."""
    from udsstream.run_summary import print_step, print_summary, summarize
    from udsstream.selection_log.reader import SelectionLog

    opened = SelectionLog.open(run)
    if to_parquet:
        written = str(opened.to_parquet())
        print(json.dumps({"parquet": written}) if as_json else written)
    elif step is not None:
        print_step(opened, step, as_json=as_json)
    elif as_json:
        print(json.dumps(summarize(opened).as_dict(), indent=2))
    else:
        print_summary(run)
