"""The command line: `udsstream train | log | bench | demo`.

Parses arguments and prints; what a command does stands in the module it calls, imported only then, so that `--help` is quick. An error
of ours is printed without a traceback: exit 1, and 2 for a command that was typed wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from udsstream.errors import UdsstreamError

__all__ = ["app", "main"]

app = typer.Typer(
    name="udsstream",
    help="Utility-diversity aware data selection for MosaicML Composer, with a record of every choice.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The entry point of the `udsstream` command."""
    try:
        app()
    except UdsstreamError as error:
        print(f"udsstream: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, such as those in pipelines/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, with dotted paths.")
    ] = None,
) -> None:
    """Fine-tune a model on the part of a stream that is worth most, and record every choice."""
    from udsstream.run_config import load_run_config

    settings = load_run_config(config, overrides or [])
    from udsstream import pipeline
    from udsstream.run_summary import print_summary

    result = pipeline.train(settings)
    if settings.selection is not None:
        print_summary(Path(settings.save_folder), before=result.eval_loss_before, after=result.eval_loss_after)


@app.command()
def log(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    step: Annotated[int | None, typer.Option(help="Print the decisions of this step.")] = None,
    to_parquet: Annotated[
        bool, typer.Option("--to-parquet", help="Write the log as Parquet, for DuckDB or Spark.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read a run's selection log: a summary, one step's decisions, or a copy in Parquet."""
    from udsstream.run_summary import print_step, print_summary, summarize
    from udsstream.selection_log.reader import SelectionLog

    opened = SelectionLog.open(run)
    if to_parquet:
        written = str(opened.to_parquet())
        print(json.dumps({"parquet": written}) if as_json else written)
    elif step is not None:
        print_step(opened, step, as_json=as_json)
    elif as_json:
        print(json.dumps(summarize(opened).as_dict(), indent=2))
    else:
        print_summary(run)


@app.command()
def bench(
    model: Annotated[
        Path | None, typer.Option(help="Folder of a Hugging Face causal model; SmolLM2 without it.")
    ] = None,
    gsm8k: Annotated[
        Path | None, typer.Option(help="Folder with GSM8K's test.jsonl; synthetic tokens without it.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Counted turns; the medians are reported.")] = 5,
    shapes: Annotated[
        bool, typer.Option("--shapes", help="Also time random heads of larger models (8 GB, minutes).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what scoring costs on this machine, beside the forward it is added to and the SVD it replaces."""
    from udsstream.bench import SHAPES, render, run_bench

    result = run_bench(model=model, gsm8k=gsm8k, repeats=repeats, shapes=SHAPES if shapes else ())
    print(json.dumps(result.as_dict(), indent=2) if as_json else render(result))


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo's data, model and runs go.")] = Path("runs"),
    config: Annotated[Path, typer.Option(help="The demo's configuration.")] = Path("pipelines/demo.yaml"),
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Fine-tune SmolLM2-135M on the docstrings of this Python's standard library (needs no network)."""
    from udsstream.demo.main import run_demo

    run_demo(folder, config, overrides or [])
