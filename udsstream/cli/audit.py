"""`udsstream audit`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["audit"]

_UNREADABLE = 2


def audit(
    run: Annotated[Path, typer.Argument(help="A run's log folder.")],
    data: Annotated[bool, typer.Option("--data", help="Also check the streams' shards against their digests.")] = False,
    stream: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Where a stream is now (with --data; repeatable)."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A Composer checkpoint of the run: the log is compared with it.")
    ] = None,
    anchor: Annotated[
        str | None, typer.Option(metavar="STEP:HEXROOT", help="A Merkle root that was kept elsewhere.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Re-derive every decision from the log, without the scoring code.

    Exit code 0: nothing was found. 1: something was. 2: the log cannot be read.
    """
    from udsstream.audit.report import render
    from udsstream.audit.run import audit as run_audit
    from udsstream.errors import UdsstreamError

    places = dict(_stream(text) for text in stream or [])
    if places and not data:
        raise typer.BadParameter("only with --data are streams looked at", param_hint="--stream")
    kept = None if anchor is None else _anchor(anchor)
    try:
        report = run_audit(run, data=data, streams=places, checkpoint=checkpoint, anchor=kept)
    except UdsstreamError as error:
        message = f"{type(error).__name__}: {error}"
        if as_json:
            print(json.dumps({"error": message, "exit_code": _UNREADABLE}, indent=2))
        else:
            typer.echo(f"udsstream: {message}", err=True)
        raise typer.Exit(_UNREADABLE) from error
    print(json.dumps(report.as_dict(), indent=2) if as_json else render(report, str(run)))
    raise typer.Exit(report.exit_code)


def _stream(text: str) -> tuple[str, str]:
    name, found, path = text.partition("=")
    if not (name and found and path):
        raise typer.BadParameter(f"{text!r} is not NAME=PATH", param_hint="--stream")
    return name, path


def _anchor(text: str) -> tuple[int, bytes]:
    match = re.fullmatch(r"(\d+):([0-9a-fA-F]{64})", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not STEP:HEXROOT, such as 120:5fe1… (64 digits)", param_hint="--anchor")
    return int(match[1]), bytes.fromhex(match[2])
