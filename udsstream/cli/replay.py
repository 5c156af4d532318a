"""`udsstream replay`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from udsstream.cli.options import is_rank_zero, stream_places

__all__ = ["replay"]


def replay(
    run: Annotated[Path, typer.Argument(help="Folder of a run that `udsstream train` made. It is only read.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change; then it is a re-use of the chosen data."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the replay goes. Default: RUN-replay.")] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="FIRST:STOP", help="Steps FIRST to before STOP; either may be left out.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The run's checkpoint before FIRST. Default: the one in RUN, if it is there.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Score again, and compare each decision with the log.")
    ] = False,
    stream: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Where a stream of the run lies now (repeatable).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train again from a run's log, without scoring: the same weights, bit for bit.

    Exit 0; 1 when a decision diverged, or the weights differ although nothing is known to have changed.

    Example: udsstream replay runs/a --steps :100 --verify
    """
    between = _steps(steps)
    places = stream_places(stream)
    from udsstream.replay import replay as run_replay
    from udsstream.replay_summary import print_replay

    result = run_replay(
        run,
        out=out,
        steps=between,
        checkpoint=checkpoint,
        verify=verify,
        streams=places,
        overrides=overrides or [],
    )
    if not is_rank_zero():
        pass
    elif as_json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        print_replay(result)
    if result.verdict in ("diverged", "different"):
        sys.exit(1)


def _steps(given: str | None) -> tuple[int | None, int | None]:
    if given is None:
        return None, None
    first, colon, stop = given.partition(":")
    if not colon or not all(part == "" or part.isdecimal() for part in (first, stop)):
        raise typer.BadParameter(f"{given!r}: is written FIRST:STOP, as in 0:100, :100 or 100:", param_hint="--steps")
    return int(first) if first else None, int(stop) if stop else None
