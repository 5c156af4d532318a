"""`udsstream demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["demo"]


def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo's data, model and runs go.")] = Path("runs"),
    config: Annotated[
        Path | None, typer.Option(help="Another configuration than the demo's own, pipelines/demo.yaml.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, with dotted paths.")
    ] = None,
) -> None:
    """Fine-tune SmolLM2-135M on your Python's docstrings, offline; audit, replay, report.

    Example: udsstream demo max_duration=8ba
    """
    from udsstream.demo.main import recipe, run_demo

    run_demo(folder, config or recipe(), overrides or [])
