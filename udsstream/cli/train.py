"""`udsstream train`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from udsstream.cli.options import is_rank_zero

__all__ = ["train"]


def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, such as those in pipelines/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, with dotted paths.")
    ] = None,
) -> None:
    """Fine-tune a model on the part of a stream that is worth most, and record every choice.

    Ctrl-C finishes the step and saves it. The same command with autoresume=true goes on with a run that was interrupted.

    Example: udsstream train pipelines/gsm8k.yaml save_folder=runs/a selection.keep=0.25
    """
    from udsstream.run_config import load_run_config

    settings = load_run_config(config, overrides or [])
    from udsstream import pipeline
    from udsstream.log_queries.summary import print_summary
    from udsstream.mosaicml.checkpoint import checkpoints_in
    from udsstream.mosaicml.interruption import Interruption

    interruption = Interruption()
    try:
        with interruption.on_ctrl_c():
            result = pipeline.train(settings, interruption)
    except KeyboardInterrupt:
        if is_rank_zero():
            arguments = [argument for argument in sys.argv[1:] if not argument.startswith("autoresume=")]
            saved = max(checkpoints_in(Path(settings.save_folder) / "checkpoints"), default=None)
            where = "nothing was saved yet, so it begins anew" if saved is None else f"it goes on at step {saved}"
            print(
                f"udsstream: interrupted; {where} with:\n  udsstream {shlex.join(arguments)} autoresume=true",
                file=sys.stderr,
            )
        raise typer.Exit(130) from None
    if settings.selection is not None and is_rank_zero():
        print_summary(Path(settings.save_folder), before=result.eval_loss_before, after=result.eval_loss_after)
