"""kill -9 of a real writer, again and again, and the log it ends with: the same as if nothing had happened."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import recorded

from udsstream.selection_log.reader import SelectionLog

HERE = Path(__file__).parent
STOP, EVERY = 1_500, 7


def start(root: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(HERE / "killed_writer.py"), str(root), str(STOP), str(EVERY)],
        stdout=subprocess.PIPE,
        cwd=HERE.parent.parent,
        env={"PYTHONPATH": f"{HERE.parent.parent}:{HERE}", "PATH": "/usr/bin:/bin"},
    )


def kill_and_resume(root: Path, kills: int, seed: int) -> tuple[int, int]:
    """Steps that were acknowledged and lost over all kills (must be none), and kills that hit a writer at work."""
    rng = random.Random(seed)
    lost = hits = 0
    for _ in range(kills):
        writer = start(root)
        assert writer.stdout is not None
        first = writer.stdout.readline()  # it is under way
        time.sleep(rng.random() * 0.1)
        writer.kill()
        said = [first, *writer.stdout.readlines()]
        writer.wait()
        steps = [int(word) for line in said for word in line.split() if word.isdigit()]
        hits += b"closed\n" not in said
        if steps:
            there = set(SelectionLog.open(root).steps().tolist())
            lost += len(set(range(steps[0], steps[-1] + 1)) - there)
    return lost, hits


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "seed"), [(22, 1), pytest.param(400, 2, marks=pytest.mark.soak)])
def test_kill_9_at_random_moments(tmp_path: Path, kills: int, seed: int) -> None:
    root = tmp_path / "log"
    lost, hits = kill_and_resume(root, kills, seed)
    assert lost == 0
    assert hits >= kills // 3, "the writer finished before it could be killed: the test proves little"
    last = start(root)
    out, _ = last.communicate(timeout=120)
    assert last.returncode == 0
    assert out.endswith(b"closed\n")
    with recorded.create(tmp_path / "plain") as plain:
        recorded.record(plain, 0, STOP)
    log, other = SelectionLog.open(root), SelectionLog.open(tmp_path / "plain")
    report = log.verify()
    assert report.closed
    assert report.attempts > 1
    assert log.table().drop_columns(["attempt"]).equals(other.table().drop_columns(["attempt"]))
    assert log.pushes().drop_columns(["attempt"]).equals(other.pushes().drop_columns(["attempt"]))
    assert np.array_equal(log.buffer_at(STOP).embeddings, recorded.memory_before(STOP)[0])
