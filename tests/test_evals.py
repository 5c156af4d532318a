"""The held-out losses along a run: what is written, what a resumed run supersedes, what a crash tears."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest

from udsstream import SelectionLog, pipeline
from udsstream.errors import LogCorruptError
from udsstream.evals import EVALS, append_eval, append_resumption, read_evals
from udsstream.run_config import load_run_config


def test_what_was_appended_is_read_by_step(tmp_path):
    append_eval(tmp_path, step=4, loss=1.5, seconds=0.25)
    append_eval(tmp_path, step=0, loss=2.5, seconds=None)
    append_eval(tmp_path, step=4, loss=1.25, seconds=0.5)  # anew
    found = read_evals(tmp_path)
    assert found["step"].tolist() == [0, 4]
    assert found["loss"].tolist() == [2.5, 1.25]
    assert math.isnan(found["seconds"][0])
    assert found["seconds"][1] == 0.5


def test_a_resumed_run_supersedes_what_was_measured_later(tmp_path):
    append_resumption(tmp_path, 0)  # a run begins: there is nothing to supersede
    assert not (tmp_path / EVALS).exists()
    for step in (0, 2, 4, 6):
        append_eval(tmp_path, step=step, loss=float(step), seconds=1.0)
    append_resumption(tmp_path, 4)
    assert read_evals(tmp_path)["step"].tolist() == [0, 2, 4]
    append_eval(tmp_path, step=5, loss=9.0, seconds=1.0)
    assert read_evals(tmp_path)["loss"].tolist() == [0.0, 2.0, 4.0, 9.0]


def test_a_torn_line_is_left_out_and_does_not_spoil_the_next(tmp_path):
    append_eval(tmp_path, step=0, loss=2.0, seconds=1.0)
    with open(tmp_path / EVALS, "a") as file:
        file.write('{"step":2,"lo')
    append_eval(tmp_path, step=4, loss=1.0, seconds=1.0)
    assert read_evals(tmp_path)["step"].tolist() == [0, 4]


@pytest.mark.parametrize("line", ['{"loss":1.0}', '{"step":"x","loss":1.0}', "[1]}", '{"step":1,"loss":null}'])
def test_a_whole_line_that_says_nothing_is_an_error(tmp_path, line):
    (tmp_path / EVALS).write_text(f'{{"step":0,"loss":2.0}}\n{line}\n')
    with pytest.raises(LogCorruptError, match=r"evals\.jsonl, line 2: holds neither an evaluation"):
        read_evals(tmp_path)


@pytest.mark.parametrize("step", ["1e999", "9" * 23, "-1", '{"a":' * 100_000 + "1" + "}" * 100_000])
@pytest.mark.parametrize("line", ['{"step":%s,"loss":1}', '{"resumed_at":%s}'])
def test_numbers_that_are_none_are_named(tmp_path, line, step):
    (tmp_path / EVALS).write_text(line % step + "\n")
    if "resumed_at" in line and not step.startswith(("1e", "{")):
        assert len(read_evals(tmp_path)["step"]) == 0
        return
    with pytest.raises(LogCorruptError, match=r"evals\.jsonl, line 1: holds neither an evaluation"):
        read_evals(tmp_path)


def test_what_is_no_file_or_too_large_is_not_read(tmp_path):
    path = tmp_path / EVALS
    os.mkfifo(path)
    with pytest.raises(LogCorruptError, match=r"evals\.jsonl is not a regular file"):
        read_evals(tmp_path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(LogCorruptError, match=r"evals\.jsonl has more than"):
        read_evals(tmp_path)


def test_no_file_gives_nothing(tmp_path):
    assert [len(values) for values in read_evals(tmp_path).values()] == [0, 0, 0]


def test_a_run_writes_its_losses_down(config_file, tmp_path):
    result = pipeline.train(load_run_config(config_file, ["eval.interval=2ba"]))
    found = read_evals(tmp_path / "run")
    assert found["step"].tolist() == [0, 2, 4, 5]
    assert found["loss"][0] == result.eval_loss_before
    assert found["loss"][-1] == result.eval_loss_after
    assert (found["seconds"] > 0).all()


def test_evaluating_oftener_changes_nothing_else(config_file, tmp_path):
    often = pipeline.train(load_run_config(config_file, ["eval.interval=1ba", f"save_folder={tmp_path / 'often'}"]))
    seldom = pipeline.train(load_run_config(config_file, [f"save_folder={tmp_path / 'seldom'}"]))
    assert often.eval_loss_after == seldom.eval_loss_after
    logs = [SelectionLog.open(tmp_path / name) for name in ("often", "seldom")]
    assert [logs[0].selected(step) for step in range(5)] == [logs[1].selected(step) for step in range(5)]


def test_a_run_that_goes_on_measures_what_an_unbroken_one_does(config_file, tmp_path):
    """It was broken off after step 4 with the checkpoint of step 2 in hand: as a kill between checkpoints leaves it."""
    overrides = ["eval.interval=1ba", "autoresume=true", "scheduler.name=constant"]
    pipeline.train(load_run_config(config_file, overrides))
    run = tmp_path / "run"
    unbroken = read_evals(run)
    for name in ("ep0-ba4-rank0.pt", "ep0-ba5-rank0.pt"):
        (run / "checkpoints" / name).unlink()
    latest = run / "checkpoints" / "latest-rank0.pt"
    latest.unlink()
    latest.symlink_to("ep0-ba2-rank0.pt")
    (run / "summary.json").unlink()
    pipeline.train(load_run_config(config_file, overrides))
    lines = [json.loads(line) for line in (run / EVALS).read_text().splitlines()]
    assert {"resumed_at": 2} in lines
    assert len(lines) == 6 + 1 + 3  # steps 0 to 5, the resumption, steps 3 to 5 again
    again = read_evals(run)
    assert np.array_equal(again["step"], unbroken["step"])
    assert np.array_equal(again["loss"], unbroken["loss"])


def test_a_measured_loss_that_was_given_is_taken_and_written_down(config_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "initial_eval.json").write_text('{"loss": 1.25}')
    assert pipeline.train(load_run_config(config_file)).eval_loss_before == 1.25
    found = read_evals(tmp_path / "run")
    assert (found["step"][0], found["loss"][0]) == (0, 1.25)
