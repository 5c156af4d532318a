"""`udsstream export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["export"]


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a job of `udsstream train`.")],
    out: Annotated[Path, typer.Option(help="Folder to write; new or empty.")],
    step: Annotated[
        int | None, typer.Option(min=0, help="Of the checkpoint after this many steps; the newest without it.")
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="LoRA's matrices alone, as peft reads them.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; as it was trained without it.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model, if the run did.")
    ] = False,
) -> None:
    """Write the model that a run trained as a Hugging Face folder.

    Adapters are merged into the weights, unless --adapter asks for them alone.

    Example: udsstream export runs/a --out models/a
    """
    from udsstream.trained_model import export_model

    written = export_model(run, out, step=step, adapter=adapter, dtype=dtype, trust_remote_code=trust_remote_code)
    what = "the adapter" if adapter else "the model"
    print(f"{out}: {what} after {written.step} steps, {written.dtype}, weights {written.weights_sha256[:12]}")
