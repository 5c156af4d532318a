"""What goes in comes out: columns, nulls, order, ranks, attempts, live rows; and what the writer refuses."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import recorded

from udsstream.errors import ConfigError, LogError, LogExistsError, LogWriteError
from udsstream.selection_log import state
from udsstream.selection_log.digest import merkle_root
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.schema import DECISION_SCHEMA
from udsstream.selection_log.writer import SelectionLogWriter


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    return table.to_pylist()


def in_order(steps: range, **more: Any) -> list[dict[str, Any]]:
    names = DECISION_SCHEMA.names
    return [{name: row[name] for name in names} for step in steps for row in recorded.expected(step, **more)]


@pytest.mark.parametrize("sealed", ["live", "sealed", "both"])
@pytest.mark.parametrize("rows", [1, 5, 8, 13])
def test_every_value_comes_back(tmp_path: Path, sealed: str, rows: int) -> None:
    writer = recorded.create(tmp_path)
    recorded.record(writer, 0, 3, rows=rows) if rows > 1 else [
        writer.append(s, recorded.columns(s, 1)) for s in range(3)
    ]
    if sealed != "live":
        writer.seal()
    if sealed == "both":
        for step in range(3, 5):
            writer.append(step, recorded.columns(step, rows))
    log = SelectionLog.open(tmp_path)
    count = 5 if sealed == "both" else 3
    table = log.table()
    assert table.schema.equals(DECISION_SCHEMA)
    assert rows_of(table) == in_order(range(count), rows=rows)
    assert log.steps().tolist() == list(range(count))
    writer.release()


def test_selected_gives_the_ids_in_training_order(tmp_path: Path) -> None:
    with recorded.create(tmp_path) as writer:
        recorded.record(writer, 0, 4, rows=13)
        rows = recorded.expected(2, 13)
        kept = sorted((row for row in rows if row["selected"]), key=lambda row: row["train_order"])
        assert len(kept) == 6
        log = SelectionLog.open(tmp_path)
        assert log.selected(2) == [row["sample_id"] for row in kept]
        writer.seal()
        assert log.selected(2) == [row["sample_id"] for row in kept]
        with pytest.raises(LogError, match="no decisions of step 9; it has 4 steps from 0 to 3"):
            log.selected(9)


def test_columns_and_filter(tmp_path: Path) -> None:
    with recorded.create(tmp_path) as writer:
        recorded.record(writer, 0, 3)
        writer.seal()
        recorded.record(writer, 3, 5)
        log = SelectionLog.open(tmp_path)
        table = log.table(columns=["sample_id"], filter=pc.field("selected") & (pc.field("step") > 1))
        assert table.column_names == ["sample_id"]
        wanted = [row["sample_id"] for row in in_order(range(2, 5)) if row["selected"]]
        assert table.column("sample_id").to_pylist() == wanted
        with pytest.raises(ConfigError, match="no column nonsense; it has"):
            log.table(columns=["nonsense"])


def test_dataset_is_the_table(tmp_path: Path) -> None:
    with recorded.create(tmp_path) as writer:
        recorded.record(writer, 0, 3)
        writer.seal()
        recorded.record(writer, 3, 5)
        log = SelectionLog.open(tmp_path)
        dataset = log.dataset()
        assert dataset.schema.equals(DECISION_SCHEMA)
        assert dataset.to_table().sort_by([("step", "ascending"), ("position", "ascending")]).equals(log.table())
        assert dataset.count_rows(filter=pc.field("selected")) == 10


def test_ranks_are_merged_by_position(tmp_path: Path) -> None:
    writers: list[SelectionLogWriter] = []
    for rank in range(3):
        writers.append(recorded.create(tmp_path, rank=rank, world_size=3))
    for step in range(4):
        for writer in reversed(writers):
            recorded.log_step(writer, step, rank=writer.rank)
            if step == 1 and writer.rank == 2:
                writer.seal()
    heads = [writer.sync() for writer in writers]
    roots = {writer.checkpoint(4, heads=heads) for writer in writers}
    assert roots == {merkle_root(heads)}
    log = SelectionLog.open(tmp_path)
    names = DECISION_SCHEMA.names
    want = [{n: r[n] for n in names} for s in range(4) for rank in range(3) for r in recorded.expected(s, rank=rank)]
    assert rows_of(log.table()) == want
    memory = log.buffer_at(4)
    assert memory.pushed == 24
    flat = np.concatenate([recorded.vectors(3, rank) for rank in range(3)])
    assert np.array_equal(memory.embeddings, flat)
    for writer in writers:
        writer.close()
    report = log.verify(anchor=(4, roots.pop()))
    assert (report.ranks, report.steps, report.rows, report.heads, report.anchored) == (3, 4, 60, 1, True)


def test_memory_before_any_step_under_full(tmp_path: Path) -> None:
    with recorded.create(tmp_path) as writer:
        recorded.record(writer, 0, 4)
        writer.seal()
        recorded.record(writer, 4, 7)
        log = SelectionLog.open(tmp_path)
        for step in range(8):
            vectors, pushed = recorded.memory_before(step)
            memory = log.buffer_at(step)
            assert np.array_equal(memory.embeddings, vectors)
            assert memory.embeddings.dtype == np.float32
            assert memory.pushed == pushed
            assert memory.digest == (recorded.digest_after(step - 1) if step else None)
        assert log.buffer_at().pushed == 14
        assert len(log.buffer_at(7, capacity=3).embeddings) == 3


def test_memory_at_checkpoints_under_tail(tmp_path: Path) -> None:
    with recorded.create(tmp_path, embeddings="tail") as writer:
        log = SelectionLog.open(tmp_path)
        with pytest.raises(LogError, match="kept no vectors yet"):
            log.buffer_at(0)
        for step in (3, 6):
            recorded.record(writer, step - 3, step)
            recorded.checkpoint(writer, step)
        for step in (3, 6):
            vectors, pushed = recorded.memory_before(step)
            memory = log.buffer_at(step)
            assert np.array_equal(memory.embeddings, vectors)
            assert (memory.pushed, memory.digest) == (pushed, recorded.digest_after(step - 1))
        assert log.buffer_steps() == [3, 6]
        assert log.buffer_at().pushed == 12
        with pytest.raises(LogError, match="nearest are at step 3 and 6"):
            log.buffer_at(4)
        assert "embedding" not in log.pushes().column_names
        assert log.pushes().column("digest").to_pylist() == [
            recorded.digest_after(s) for s in range(6) for _ in range(2)
        ]


def test_no_memory_under_none(tmp_path: Path) -> None:
    with recorded.create(tmp_path, embeddings="none") as writer:
        recorded.record(writer, 0, 2)
        recorded.checkpoint(writer, 2)
    log = SelectionLog.open(tmp_path)
    assert log.pushes().num_rows == 4
    with pytest.raises(LogError, match='embeddings="none"'):
        log.buffer_at(2)


def test_float16_is_stored_as_float16(tmp_path: Path) -> None:
    with recorded.create(tmp_path, embedding_dtype="float16") as writer:
        recorded.record(writer, 0, 2)
    memory = SelectionLog.open(tmp_path).buffer_at(2)
    assert memory.embeddings.dtype == np.float16
    assert np.array_equal(memory.embeddings, recorded.memory_before(2)[0].astype(np.float16))


def test_a_memory_taken_over_is_pushed_before_the_first_step(tmp_path: Path) -> None:
    with recorded.create(tmp_path) as writer:
        start = recorded.vectors(99, count=3)
        none = np.full(3, -1)
        writer.push(
            -1, positions=none, sample_ids=none, push_index=0, embeddings=start, digest=recorded.digest_after(-1)
        )
        writer.append(0, recorded.columns(0))
        log = SelectionLog.open(tmp_path)
        assert np.array_equal(log.buffer_at(0).embeddings, start)
    log.verify()


def test_a_rank_that_pushed_nothing_records_nothing(tmp_path: Path) -> None:
    with recorded.create(tmp_path) as writer:
        head = writer.head
        empty = np.empty(0, np.int64)
        writer.push(0, positions=empty, sample_ids=empty, push_index=0, embeddings=np.empty((0, 4)), digest=bytes(32))
        assert writer.head == head


def test_reading_a_live_run_does_not_disturb_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that looks all the time, while the writer seals every few steps, always sees whole steps in a row."""
    monkeypatch.setattr(state, "_PAUSE", 0.01)
    writer = recorded.create(tmp_path, wal_bytes=20_000)
    stop, failures, looks = threading.Event(), [], []

    def look() -> None:
        log = SelectionLog.open(tmp_path)
        seen = 0
        while not stop.is_set():
            try:
                table = log.table(columns=["step", "position"])
                steps = table.column("step").to_numpy()
                assert np.array_equal(steps, np.repeat(np.arange(len(steps) // 5), 5)), steps
                assert len(steps) >= seen
                seen = len(steps)
                looks.append(seen)
            except Exception as error:
                failures.append(error)
                return

    thread = threading.Thread(target=look)
    thread.start()
    recorded.record(writer, 0, 400)
    writer.sync()
    stop.set()
    thread.join()
    assert not failures, failures[0]
    assert len(looks) > 3
    writer.close()
    report = SelectionLog.open(tmp_path).verify()
    assert (report.steps, report.closed) == (400, True)
    assert report.segments > 20


@pytest.mark.parametrize("sealings", [1, 3])
def test_a_reader_looks_again_when_rows_move_between_two_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sealings: int
) -> None:
    """Sealed right after the manifest was read: the write-ahead file is gone, and its segment is in no line that was seen."""
    writer = recorded.create(tmp_path)
    recorded.record(writer, 0, 2)
    real, done = state.read_manifest, []

    def read_then_seal(*args: Any) -> Any:
        manifest = real(*args)
        if len(done) < sealings:
            done.append(1)
            writer.append(1 + len(done), recorded.columns(1 + len(done)))
            writer.seal()
        return manifest

    monkeypatch.setattr(state, "read_manifest", read_then_seal)
    assert SelectionLog.open(tmp_path).steps().tolist() == list(range(2 + sealings))
    assert len(done) == sealings
    writer.release()


def test_run_json_keeps_what_was_given(tmp_path: Path) -> None:
    run = {"run_id": "ü", "streams": [{"name": "a", "licence": "unknown"}], "seeds": {"selection": 17}}
    recorded.create(tmp_path, run=run).close()
    log = SelectionLog.open(tmp_path)
    assert {key: log.run[key] for key in run} == run
    assert log.run["log"]["schema_version"] == 1
    assert log.run["log"]["embedding_dim"] == recorded.DIM


@pytest.mark.parametrize(
    ("run", "text"),
    [
        ({"log": 1}, "is the log's own part"),
        ({"a": {1, 2}}, "not plain JSON"),
        ({"a": float("nan")}, "not plain JSON"),
        ({"a": (1, 2)}, "changes when it is written"),
        ({"a": {1: 2}}, "changes when it is written"),
    ],
)
def test_a_run_that_is_not_json_is_refused(tmp_path: Path, run: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        recorded.create(tmp_path / "a", run=run)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tokens": None}, "needs the column 'tokens'"),
        ({"position": np.arange(4)}, r"'position' .* has shape \(4,\), expected \(5,\)"),
        ({"tokens": np.arange(5.0)}, "'tokens' .* cannot take float64"),
        ({"tokens": np.full(5, 1 << 31)}, "does not fit int32"),
        ({"score": np.array(["a"] * 5)}, "cannot take <U1"),
        ({"selected": np.arange(5)}, "must be boolean"),
        ({"tokens": np.ma.MaskedArray(np.arange(5), mask=[1, 0, 0, 0, 0])}, "may not be null"),
        ({"extra": np.arange(5)}, "no column extra"),
    ],
)
def test_wrong_columns_are_refused_and_nothing_is_written(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    with recorded.create(tmp_path) as writer:
        writer.append(0, recorded.columns(0))
        with pytest.raises(ConfigError, match=text):
            writer.append(1, {k: v for k, v in {**recorded.columns(1), **change}.items() if v is not None})
        writer.append(1, recorded.columns(1))
    assert rows_of(SelectionLog.open(tmp_path).table()) == in_order(range(2))


def test_steps_are_written_once_and_in_order(tmp_path: Path) -> None:
    with recorded.create(tmp_path) as writer:
        writer.append(3, recorded.columns(3))
        for step in (3, 2):
            with pytest.raises(LogError, match=f"step {step} cannot be logged.*next step is 4"):
                writer.append(step, recorded.columns(step))


def test_a_new_run_does_not_touch_a_log_that_is_there(tmp_path: Path) -> None:
    recorded.create(tmp_path).close()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(LogExistsError, match=r"already holds run\.json"):
        recorded.create(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_other_files_beside_the_log_are_fine(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "ep0.pt").write_text("x")
    recorded.create(tmp_path).close()


@pytest.mark.parametrize("name", ["selection/x", "_state/r00000/x", "_heads/x.json", "run.json"])
def test_a_strange_file_under_our_names_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(LogExistsError, match=name):
        recorded.create(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_other_ranks_refuse_an_older_log(tmp_path: Path) -> None:
    recorded.create(tmp_path).close()
    with pytest.raises(LogExistsError, match="older log"):
        recorded.create(tmp_path, rank=1, world_size=2)


def test_other_ranks_wait_for_rank_0_and_say_so(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="rank 0 did not write"):
        recorded.create(tmp_path, rank=1, world_size=2, wait_seconds=0.05)


def test_a_checkpoint_needs_the_heads_of_this_moment(tmp_path: Path) -> None:
    with recorded.create(tmp_path) as writer:
        recorded.record(writer, 0, 1)
        head = writer.sync()
        recorded.record(writer, 1, 2)
        with pytest.raises(LogError, match="has logged since"):
            writer.checkpoint(1, heads=[head])
        with pytest.raises(LogError, match="at step 1, but step 1 is already logged in 'selection'"):
            writer.checkpoint(1, heads=[writer.sync()])
        with pytest.raises(ConfigError, match="from each of the 1 ranks"):
            writer.checkpoint(1, heads=[])


def test_a_closed_writer_refuses(tmp_path: Path) -> None:
    writer = recorded.create(tmp_path)
    writer.close()
    writer.close()
    with pytest.raises(LogWriteError, match="is closed"):
        writer.append(0, recorded.columns(0))


def test_an_exception_leaves_the_log_open_ended(tmp_path: Path) -> None:
    def interrupted() -> None:
        with recorded.create(tmp_path) as writer:
            recorded.record(writer, 0, 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    report = SelectionLog.open(tmp_path).verify()
    assert (report.steps, report.closed) == (2, False)


def test_nothing_but_pyarrow_and_numpy_is_loaded() -> None:
    code = (
        "import sys, udsstream.selection_log.writer, udsstream.selection_log.reader;"
        "bad = {'torch', 'composer', 'streaming', 'pandas', 'pickle5'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
