"""The command line, one file per command.

A command parses its arguments and prints; what it does stands in the module that it calls, imported only then, so that `--help` is
quick. An error of ours is printed without a traceback: exit 1, and 2 for a command that was typed wrong.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

import udsstream
from udsstream.cli.audit import audit
from udsstream.cli.bench import bench
from udsstream.cli.compare import compare
from udsstream.cli.curate import curate
from udsstream.cli.demo import demo
from udsstream.cli.export import export
from udsstream.cli.ingest import ingest
from udsstream.cli.log import log
from udsstream.cli.options import complaint, is_rank_zero
from udsstream.cli.replay import replay
from udsstream.cli.report import report
from udsstream.cli.train import train
from udsstream.errors import UdsstreamError

__all__ = ["app", "main"]

app = typer.Typer(
    name="udsstream",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"udsstream {udsstream.__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Utility-diversity aware data selection for MosaicML Composer, with a record of every choice.

    Example: udsstream train pipelines/gsm8k.yaml save_folder=runs/a selection.keep=0.25
    """


def _goes_on(command: Callable[..., None]) -> Callable[..., None]:
    """Says after Ctrl-C that nothing was lost."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            if is_rank_zero():
                print("\nudsstream: interrupted; the same command goes on with it", file=sys.stderr)
            raise typer.Exit(130) from None

    return run


for command in (
    train,
    log,
    _goes_on(replay),
    audit,
    report,
    _goes_on(compare),
    _goes_on(curate),
    _goes_on(export),
    bench,
    _goes_on(demo),
    _goes_on(ingest),
):
    app.command()(command)


def main() -> None:
    """The entry point of the `udsstream` command."""
    try:
        app()
    except UdsstreamError as error:
        print(complaint(error), file=sys.stderr)
        sys.exit(1)
