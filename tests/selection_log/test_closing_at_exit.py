"""A log that is closed as the interpreter ends, when a run died of an error: sealed all the same, and no second error hides the first."""

from __future__ import annotations

import subprocess
import sys

from udsstream import SelectionLog

SCRIPT = """
import atexit, sys
import numpy as np
from udsstream.selection_log.writer import SelectionLogWriter

writer = SelectionLogWriter.create(sys.argv[1], run={"run_id": "x"}, embeddings="none")
atexit.register(writer.close)
for step in range(3):
    row = np.zeros(1, dtype=np.int64)
    kinds = {"epoch": np.int32, "position": np.int32, "epoch_position": np.int64, "sample_id": np.int64, "tokens": np.int32}
    writer.append(step, {name: row.astype(kind) for name, kind in kinds.items()} | {"selected": np.ones(1, dtype=bool)})
raise RuntimeError("the model broke")
"""


def test_a_log_that_is_closed_as_the_interpreter_ends_is_sealed(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "log")], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("RuntimeError: the model broke")
    log = SelectionLog.open(tmp_path / "log")
    assert log.steps().tolist() == [0, 1, 2]
    assert len(list((tmp_path / "log" / "selection").rglob("*.arrow"))) == 1
    log.verify()
