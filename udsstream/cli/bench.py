"""`udsstream bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["bench"]


def bench(
    model: Annotated[
        Path | None, typer.Option(help="Folder of a Hugging Face causal model; SmolLM2 without it.")
    ] = None,
    gsm8k: Annotated[
        Path | None, typer.Option(help="Folder with GSM8K's test.jsonl; synthetic tokens without it.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Counted turns; the medians are reported.")] = 5,
    shapes: Annotated[
        bool,
        typer.Option(
            "--shapes", help="Also time heads of larger models, with random weights (12 GB, a quarter to half an hour)."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what scoring costs here, beside the forward and the SVD that it replaces.

    Example: udsstream bench --repeats 3 --json
    """
    from udsstream.bench import SHAPES, render, run_bench

    result = run_bench(model=model, gsm8k=gsm8k, repeats=repeats, shapes=SHAPES if shapes else ())
    print(json.dumps(result.as_dict(), indent=2) if as_json else render(result))
