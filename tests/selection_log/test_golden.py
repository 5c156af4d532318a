"""The logs of version 1 that are committed beside this file: every later version must read them, and give just this."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from udsstream.selection_log import recovery, verification
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.writer import SelectionLogWriter

GOLDEN = Path(__file__).parent / "golden_v1"

# They stand here so that no change of a digest rule can go unnoticed, be the files replaced or not.
ROOT_FULL = bytes.fromhex("c7bac9c5a04104a378cb340dfc275d57d875f64143f8ff1d6552a1cd107c954c")
HEAD_TAIL = bytes.fromhex("a0565e69b5e7a300f83891dba80b9ec9c654da0bac46fad0ad74830bb3e79881")


def expected(name: str) -> Any:
    return json.loads((GOLDEN / "expected.json").read_text())[name]


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["full", "tail"])
def test_rows_of_version_1(name: str) -> None:
    before = contents(GOLDEN)
    log = SelectionLog.open(GOLDEN / name)
    rows = log.table().to_pylist()
    want = expected(name)["rows"]
    assert len(rows) == len(want) > 0
    for found, row in zip(rows, want, strict=True):
        assert {key: found[key] for key in row} == row  # a later version may have more columns
    assert np.array_equal(log.buffer_at().embeddings.astype(np.float64), np.array(expected(name)["memory"]))
    assert log.run["run_id"] == "golden"
    assert log.run["log"]["schema_version"] == 1
    assert contents(GOLDEN) == before, "reading changes nothing"


def test_superseded_rows_of_version_1_are_there() -> None:
    log = SelectionLog.open(GOLDEN / "full")
    everything = log.table(all_attempts=True)
    assert everything.num_rows == 70
    assert log.table().num_rows == 50
    assert (
        log.selected(4)
        == log.table(filter=None)
        .filter((np.array(log.table().column("step")) == 4) & np.array(log.table().column("selected")))
        .sort_by("train_order")
        .column("sample_id")
        .to_pylist()
    )


def test_version_1_is_intact() -> None:
    report = SelectionLog.open(GOLDEN / "full").verify(anchor=(5, ROOT_FULL))
    assert (report.ranks, report.attempts, report.rows, report.segments, report.live_batches) == (2, 2, 70, 10, 4)
    report = SelectionLog.open(GOLDEN / "tail").verify()
    assert (report.heads, report.closed) == (2, True)


def test_another_pyarrow_reads_it_and_says_what_it_cannot_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "WRITER", "pyarrow 99")
    report = SelectionLog.open(GOLDEN / "full").verify()
    assert any("this is pyarrow 99" in note for note in report.unchecked)


def test_version_1_can_be_taken_up_again(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "tail", tmp_path / "log")
    import recorded

    with SelectionLogWriter.resume(tmp_path / "log", step=4, head=HEAD_TAIL) as writer:
        recorded.record(writer, 4, 6)
    log = SelectionLog.open(tmp_path / "log")
    assert log.steps().tolist() == list(range(6))
    log.verify()


def test_the_writer_named_in_the_golden_log_is_pyarrow() -> None:
    assert recovery.WRITER.startswith("pyarrow ")
