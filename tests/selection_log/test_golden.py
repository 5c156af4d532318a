"""The logs of each version that are committed beside this file: every later version must read them, and give just this."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from udsstream.errors import LogError
from udsstream.selection_log import recovery, verification
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.schema import MEASURES
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


# Version 2 ----------------------------------------------------------------------------------------------------------------

GOLDEN_2 = Path(__file__).parent / "golden_v2" / "measured"
HEAD_MEASURED = bytes.fromhex("b06684fff639b2872c98440ea2b8b61e437e14802c59f65100a3c5184077788e")


def test_rows_of_version_2() -> None:
    want = json.loads((GOLDEN_2.parent / "expected.json").read_text())["measured"]["rows"]
    log = SelectionLog.open(GOLDEN_2)
    assert log.run["log"]["schema_version"] == 2
    assert log.run["log"]["measures"] == list(MEASURES)
    found = log.table().to_pylist()
    assert len(found) == len(want) == 20
    assert [{key: row[key] for key in expected_row} for row, expected_row in zip(found, want, strict=True)] == want
    assert found[2]["grad_norm"] is None
    assert found[5]["interaction"] is None
    assert len(found[0]["interaction"]) == 5
    assert log.verify().rows == 20


def test_version_2_can_be_taken_up_again_and_becomes_parquet(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN_2, tmp_path / "log")
    import recorded

    with SelectionLogWriter.resume(tmp_path / "log", step=4, head=HEAD_MEASURED) as writer:
        assert writer.interactions == 5
        writer.append(4, recorded.columns(4) | recorded.measured(4))
    log = SelectionLog.open(tmp_path / "log")
    assert log.verify().rows == 25
    table = pq.read_table(log.to_parquet() / "selection.parquet").drop_columns(["superseded"])
    assert table.to_pylist() == log.table().to_pylist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 1}, "does not follow from the line before it"),
        ({"measures": []}, "measures|interactions"),
        (
            {"measures": ["interaction", "grad_norm"]},
            "measures=.*, expected some of grad_norm, reference_loss, alignment, interaction",
        ),
        ({"measures": ["beauty"]}, "measures=.*'beauty'"),
        ({"measures": "grad_norm"}, "measures='grad_norm'"),
        ({"interactions": None}, "interactions=None, expected a positive whole number with the measure"),
        ({"interactions": 1 << 40}, "interactions=1099511627776"),
        ({"interactions": -5}, "interactions=-5"),
        ({"measures": ["grad_norm"]}, "interactions=5, expected .* null without"),
    ],
    ids=str,
)
def test_a_run_file_of_version_2_that_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    shutil.copytree(GOLDEN_2, tmp_path / "log")
    path = tmp_path / "log" / "run.json"
    run = json.loads(path.read_text())
    run["log"] |= changes
    path.write_text(json.dumps(run))
    with pytest.raises(LogError, match=message):
        SelectionLog.open(tmp_path / "log").table()
