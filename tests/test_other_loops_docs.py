"""docs/other_loops.md: its loops run, what they leave is a log that the commands beside them read, and a replay has the same weights."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from jobs import udsstream
from test_guides import blocks

from udsstream import SelectionLog
from udsstream.audit.run import audit

PAGE = Path(__file__).parent.parent / "docs" / "other_loops.md"
PLAIN, TRAINER = blocks(PAGE, "python")


def ran(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_a_plain_loop_leaves_a_log_that_audits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(PLAIN.splitlines()) <= 70
    names = ran(PLAIN)
    for line in blocks(PAGE, "bash")[0].splitlines():
        code, out, err = udsstream(monkeypatch, capsys, *shlex.split(line)[1:])
        assert code == 0, out + err
    report = audit(Path("runs/plain"))
    assert report.findings == ()
    assert any("after 16 of 16 pushes" in text for text in report.checked)
    assert SelectionLog.open("runs/plain").steps().tolist() == list(range(8))
    assert names["memory"].pushed == 16


def test_its_first_choice_is_that_of_the_definition(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun = ran(PLAIN.split("for step in range(8):")[0])
    head = begun["head"]
    with torch.no_grad():
        norms = [
            oracles.nuclear_norm(oracles.logits(begun["hidden"](row), head.weight, head.bias))
            for row in begun["rows"][:8]
        ]
    begun["log"].close()
    monkeypatch.chdir(tmp_path / "runs")
    ran(PLAIN)
    log = SelectionLog.open("runs/plain")
    assert sorted(log.selected(0)) == oracles.top_k(norms, 2)
    rows = log.table()
    first = rows.filter(np.equal(rows["step"].to_numpy(), 0))
    np.testing.assert_allclose(first["score"], norms, rtol=2e-5)


@pytest.mark.slow
def test_the_hugging_face_trainer_s_replay_has_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ran(TRAINER)
    ours, theirs = (names[name].model.state_dict() for name in ("trainer", "replay"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert names["replay"].differences == []
    assert audit(Path("runs/hf/log")).findings == ()
    assert (Path("runs/hf/checkpoint-4") / "udsstream_selection.safetensors").exists()
