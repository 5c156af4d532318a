"""`udsstream demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["demo"]


def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo's data, model and runs go.")] = Path("runs"),
    config: Annotated[Path, typer.Option(help="The demo's configuration.")] = Path("pipelines/demo.yaml"),
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Fine-tune SmolLM2-135M on the docstrings of this Python's standard library (needs no network)."""
    from udsstream.demo.main import run_demo

    run_demo(folder, config, overrides or [])
