"""Ctrl-C: the step is finished and saved, and the run that goes on is the one that was not interrupted."""

from __future__ import annotations

import functools
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import launch
import pytest
import torch
import yaml

from udsstream.mosaicml.checkpoint import checkpoints_in
from udsstream.selection_log.reader import SelectionLog

STEPS = 400


def train(config: Path, out: Path, overrides: tuple[str, ...] = ()) -> None:
    from udsstream import cli

    os.setsid()  # a process group, which a terminal's Ctrl-C reaches as a whole
    sys.argv = ["udsstream", "train", str(config), *overrides]
    with open(out, "w") as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        cli.main()


def begun(processes, config: Path, out: Path, steps: int, overrides: tuple[str, ...] = (), job=train):
    """A job that has made some steps."""
    process = processes.Process(target=functools.partial(job, config, out, overrides))
    process.start()
    timings = config.parent / "run" / "timings.jsonl"
    end = time.monotonic() + 120
    while not timings.exists() or timings.read_bytes().count(b"\n") < steps:
        assert process.exitcode is None, out.read_text()
        assert time.monotonic() < end
        time.sleep(0.005)
    return process


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(checkpoints_in(run / "checkpoints")[step], weights_only=False)["state"]["model"]


@pytest.fixture
def config(config_file) -> Path:
    settings = yaml.safe_load(config_file.read_text())
    settings |= {"max_duration": f"{STEPS}ba", "save_interval": f"{STEPS}ba", "eval": None}
    settings["scheduler"] = {"name": "constant"}  # so that the same run may be told to end earlier
    config_file.write_text(yaml.safe_dump(settings))
    return config_file


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_the_step_is_saved_and_the_run_goes_on_as_if_nothing_had_been(config, tmp_path, workers):
    processes = launch.forkserver()
    given = (f"data.num_workers={workers}",)
    process = begun(processes, config, tmp_path / "said", 3, given)
    os.killpg(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    run = tmp_path / "run"
    ((step, _),) = checkpoints_in(run / "checkpoints").items()
    log = SelectionLog.open(run)
    assert 3 < step < STEPS
    assert log.steps().tolist() == list(range(step)), "no step was begun that is not saved"
    said = (tmp_path / "said").read_text()
    assert "finishing this step and saving; Ctrl-C again to end at once" in said
    assert f"udsstream: interrupted; it goes on at step {step} with:" in said
    assert "Traceback" not in said
    command = shlex.split(said.split("with:")[1].strip())
    assert command == ["udsstream", "train", str(config), *given, "autoresume=true"]

    going_on = (*command[3:], f"max_duration={step + 3}ba")
    resumed = processes.Process(target=functools.partial(train, config, tmp_path / "more", going_on))
    resumed.start()
    resumed.join(60)
    assert resumed.exitcode == 0, (tmp_path / "more").read_text()
    whole = (f"save_folder={tmp_path / 'whole'}", f"max_duration={step + 3}ba", *given)
    reference = processes.Process(target=functools.partial(train, config, tmp_path / "ref", whole))
    reference.start()
    reference.join(60)
    assert reference.exitcode == 0, (tmp_path / "ref").read_text()
    expected = weights(tmp_path / "whole", step + 3)
    assert all(torch.equal(value, expected[name]) for name, value in weights(run, step + 3).items())
    assert (
        SelectionLog.open(run)
        .table(columns=["step", "sample_id", "score", "selected"])
        .equals(SelectionLog.open(tmp_path / "whole").table(columns=["step", "sample_id", "score", "selected"]))
    )


def train_with_slow_saving(config: Path, out: Path, overrides: tuple[str, ...]) -> None:
    from composer.callbacks import CheckpointSaver

    CheckpointSaver._save_checkpoint = lambda *_: time.sleep(100)  # type: ignore[method-assign]
    train(config, out, overrides)


def test_a_second_one_ends_it_at_once(config, tmp_path):
    """Here while it saves, which is made to last."""
    process = begun(launch.forkserver(), config, tmp_path / "said", 3, job=train_with_slow_saving)
    os.kill(process.pid, signal.SIGINT)
    while "finishing this step" not in (tmp_path / "said").read_text():
        time.sleep(0.01)
    time.sleep(0.5)
    assert process.exitcode is None, "it waits for what is being saved"
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130
    said = (tmp_path / "said").read_text()
    assert "udsstream: interrupted; nothing was saved yet, so it begins anew with:" in said
    assert "Traceback" not in said
