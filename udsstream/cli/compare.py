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
    only: Annotated[
        list[str] | None, typer.Option(metavar="ENTRY", help="Run this entry alone for now; repeatable.")
    ] = None,
) -> None:
    """Run methods × seeds on one data set; write one table and one plot. Again: it goes on. See docs/comparing.md.

    Example: udsstream compare pipelines/compare.yaml out=runs/compare seeds='[1,2]'
    """
    from udsstream.compare.config import load_compare_config, plan_runs
    from udsstream.compare.run import do_runs
    from udsstream.errors import ConfigError

    settings = load_compare_config(config, overrides or [])
    runs = plan_runs(settings, where=str(config))
    unknown = sorted(set(only or ()) - set(settings.entries))
    if unknown:
        raise ConfigError(f"--only {unknown[0]}: there is no such entry; there are {', '.join(settings.entries)}")
    wanted = [run for run in runs if not only or run.entry in only]
    done = 0

    def began(run: Any) -> None:
        print(f"{run.entry}, seed {run.seed}: run {done + 1} of {len(wanted)}", flush=True)

    def ended(outcome: Any) -> None:
        nonlocal done
        done += 1
        if outcome.state != "taken":
            what = "done" if outcome.state == "done" else f"FAILED: {outcome.message}"
            print(f"{outcome.run.entry}, seed {outcome.run.seed}: {what} ({timedelta(seconds=round(outcome.seconds))})")

    outcomes = do_runs(wanted, began=began, ended=ended)
    if any(outcome.state == "failed" for outcome in outcomes):
        raise typer.Exit(1)
