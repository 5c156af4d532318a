"""Doing the runs of a comparison, one after the other, each in a process of its own.

    OUT/<entry>/seed-<seed>/      a run's folder (run_folder.py), and beside what every run leaves there
        output.txt                    what the run's process printed, of all attempts

A finished run with the same settings is taken as it is, a half one goes on, and a folder with another run is an error before anything
begins. A run that fails does not stop the others.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from udsstream.compare.answers import answers_are_there
from udsstream.compare.config import AnswersConfig, PlannedRun
from udsstream.errors import LogExistsError, ResumeError
from udsstream.run_config import RunConfig, config_changes, load_run_config
from udsstream.run_folder import CONFIG, INITIAL_EVAL, claim_folder, is_finished, write_atomically

__all__ = ["OUTPUT", "Outcome", "check_folders", "do_runs"]

OUTPUT = "output.txt"

_NEUTRAL = ("autoresume", "progress_bar", "save_folder", "save_interval", "save_num_checkpoints_to_keep")
"""Settings that change nothing of what a run shows: fewer than those that may change where a run is only gone on with."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one run."""

    run: PlannedRun
    state: Literal["taken", "done", "failed"]
    """`taken`: it was finished before. `failed`: see `message`."""
    seconds: float
    message: str = ""


def check_folders(runs: Sequence[PlannedRun]) -> None:
    """Raises ResumeError when a folder holds a run with other settings, and names every difference."""
    lines = []
    for run in runs:
        recorded = run.folder / CONFIG
        if recorded.exists():
            lines += [
                f"{run.folder}: {line}"
                for line in config_changes(load_run_config(recorded), run.config, may_change=_NEUTRAL)
            ]
        elif (run.folder / "run.json").exists():
            raise LogExistsError(
                f"{run.folder} holds the log of a run that was not started from a configuration; choose another out="
            )
    if lines:
        raise ResumeError(
            "there are runs that were started with other settings than this comparison's:\n  "
            + "\n  ".join(lines)
            + "\ngo on with the old settings, choose another out=, or remove these folders"
        )


def do_runs(
    runs: Sequence[PlannedRun],
    *,
    answers: AnswersConfig | None = None,
    began: Callable[[PlannedRun], Any] = lambda run: None,
    ended: Callable[[Outcome], Any] = lambda outcome: None,
) -> list[Outcome]:
    """Does, or goes on with, every run that is not finished, and generates its answers if they are asked for.

    Args:
        runs: in the order in which they are to be done.
        answers: what is asked of the trained models. None: nothing.
        began: is told of each run as its process starts; not of those that were finished before.
        ended: is told of each run as it ends.

    Raises:
        ResumeError: a folder holds a run with other settings; nothing was started.
        LogExistsError: a folder holds another run's log.
    """
    check_folders(runs)
    outcomes = []
    for run in runs:
        trained = is_finished(run.folder)
        if trained and (answers is None or answers_are_there(run.folder, answers)):
            outcome = Outcome(run=run, state="taken", seconds=0.0)
        else:
            began(run)
            outcome = _do(run, runs, train=not trained, answers=answers)
        outcomes.append(outcome)
        ended(outcome)
    return outcomes


def _do(run: PlannedRun, runs: Sequence[PlannedRun], *, train: bool, answers: AnswersConfig | None) -> Outcome:
    start = time.monotonic()
    if train:
        claim_folder(run.folder, run.config)
        _share_initial_loss(run, runs)
    task = {
        "run": run.config.model_dump(mode="json"),
        "answers": None if answers is None else answers.model_dump(),
        "train": train,
    }
    output = run.folder / OUTPUT
    with open(output, "ab") as file:
        from_here = file.tell()
        command = [sys.executable, "-m", "udsstream.compare.child"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT) as process:
            assert process.stdin is not None
            try:
                # Kept open: its end tells the process that nobody waits for it any more.
                process.stdin.write(json.dumps(task).encode() + b"\n")
                process.stdin.flush()
                code = process.wait()
            except BaseException:
                process.kill()
                raise
    seconds = time.monotonic() - start
    if code == 0:
        return Outcome(run=run, state="done", seconds=seconds)
    return Outcome(run=run, state="failed", seconds=seconds, message=_complaint(output, from_here, code))


def _complaint(output: Path, from_here: int, code: int) -> str:
    """What a failed process said last: an error of ours whole, otherwise the last line."""
    with open(output, "rb") as file:
        file.seek(from_here)
        said = file.read().decode(errors="replace").strip()
    _, mark, ours = said.rpartition("\nudsstream: ")
    if not mark and said.startswith("udsstream: "):
        mark, ours = "yes", said.removeprefix("udsstream: ")
    last = said.splitlines()[-1] if said else ""
    return (ours if mark else f"{last} (exit code {code})").strip() + f"; see {output}"


def _share_initial_loss(run: PlannedRun, runs: Sequence[PlannedRun]) -> None:
    """The held-out loss before training is that of the model as it is loaded: what one run has measured serves all with the same model and
    held-out data. (Adapters begin as zero.)"""
    own = run.folder / INITIAL_EVAL
    if run.config.eval is None or own.exists():
        return
    for other in runs:
        measured = other.folder / INITIAL_EVAL
        if measured.exists() and _of_initial_loss(other.config) == _of_initial_loss(run.config):
            loss = json.loads(measured.read_text())["loss"]
            if isinstance(loss, float) and math.isfinite(loss):
                write_atomically(own, json.dumps({"loss": loss}) + "\n")
                return


def _of_initial_loss(config: RunConfig) -> dict[str, Any]:
    """All that the held-out loss before training depends on."""
    settings = config.model_dump(include={"model", "eval", "max_seq_len", "precision", "device", "load_path"})
    if config.eval is not None:
        del settings["eval"]["interval"]
    return settings | {"data": config.data.tokenising()}
