"""`udsstream compare`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["compare"]


def compare(
    config: Annotated[Path, typer.Argument(help="A YAML file, such as pipelines/compare.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, with dotted paths.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="ENTRY", help="Run this entry alone; repeatable.")] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Train nothing: table and plot of what is finished.")
    ] = False,
) -> None:
    """Run methods × seeds on one data set; write a table and a plot.

    Given again, the command goes on: what is finished is taken as it is. See docs/comparing.md.

    Example: udsstream compare pipelines/compare.yaml out=runs/compare --only uds --only random
    """
    from udsstream.compare import job
    from udsstream.compare.config import load_compare_config
    from udsstream.compare.table import print_table

    def began(run: Any, number: int, of: int) -> None:
        print(f"run {number} of {of}: {run.entry}, seed {run.seed} …", flush=True)

    def ended(outcome: Any) -> None:
        took = timedelta(seconds=round(outcome.seconds))
        if outcome.state == "done":
            print(f"  done in {took}", flush=True)
        elif outcome.state == "failed":
            print(f"  FAILED after {took}: {outcome.message}", flush=True)

    settings = load_compare_config(config, overrides or [])
    made = job.compare(settings, where=str(config), only=only or (), train=not report_only, began=began, ended=ended)
    print_table(made.comparison)
    print("Written: " + ", ".join(map(str, made.files)))
    if made.failed:
        raise typer.Exit(1)
