"""`verify` finds every changed bit, row and file, and names it; and what it says it cannot find, it cannot."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import recorded

from udsstream.errors import LogCorruptError
from udsstream.selection_log import layout
from udsstream.selection_log.manifest import SegmentLine, decode_line, encode_line
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.schema import SELECTION
from udsstream.selection_log.writer import SelectionLogWriter


def record(root: Path, embeddings: str = "tail") -> bytes:
    """Two attempts, three segments a table, a live write-ahead file, two checkpoints; the Merkle root at step 6."""
    writer = recorded.create(root, embeddings=embeddings)
    recorded.record(writer, 0, 3)
    writer.seal()
    recorded.record(writer, 3, 4)
    head = recorded.checkpoint(writer, 4)
    recorded.record(writer, 4, 5)
    writer.release()
    again = SelectionLogWriter.resume(root, step=4, head=head)
    recorded.record(again, 4, 6)
    again.seal()
    head = again.sync()
    memory, pushed = recorded.memory_before(6)
    merkle = again.checkpoint(6, heads=[head], buffer=memory, pushed=pushed, buffer_digest=recorded.digest_after(5))
    recorded.record(again, 6, 8)
    again.release()
    return merkle


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and path.name != "lock")


def test_an_honest_log_passes_and_says_what_was_not_checked(tmp_path: Path) -> None:
    root = record(tmp_path)
    report = SelectionLog.open(tmp_path).verify()
    assert (report.attempts, report.steps, report.rows, report.pushes) == (2, 8, 45, 18)
    assert (report.segments, report.live_batches, report.heads, report.closed) == (6, 4, 2, False)
    assert any("no head from outside" in note for note in report.unchecked)
    anchored = SelectionLog.open(tmp_path).verify(anchor=(6, root))
    assert anchored.anchored
    assert not any("no head from outside" in note for note in anchored.unchecked)


@pytest.mark.parametrize("embeddings", ["full", "tail"])
def test_random_bit_flips_are_all_found(memory_path: Path, embeddings: str) -> None:
    record(memory_path, embeddings)
    paths = files(memory_path)
    assert len(paths) == 13 + 2 * (embeddings == "tail")
    rng = np.random.default_rng(17)
    for path in paths:
        whole = path.read_bytes()
        bits = rng.choice(8 * len(whole), size=60, replace=False)
        for bit in [0, 8 * len(whole) - 1, *bits.tolist()]:
            recorded.flip_bit(path, bit)
            with pytest.raises(LogCorruptError):
                SelectionLog.open(memory_path).verify()
            path.write_bytes(whole)
    SelectionLog.open(memory_path).verify()


@pytest.mark.slow
def test_a_flip_in_every_byte_of_a_write_ahead_file_is_found(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding and Arrow's own headers included."""
    from udsstream.selection_log import state, verification

    monkeypatch.setattr(state, "_PAUSE", 0.0)
    monkeypatch.setattr(verification, "_SETTLE_SECONDS", 0.0)
    writer = recorded.create(memory_path)
    recorded.record(writer, 0, 2)
    writer.release()
    rng = np.random.default_rng(3)
    for table in ("selection", "pushes"):
        path = layout.wal_path(memory_path, table, 0, 0)
        whole = path.read_bytes()
        for at in range(len(whole)):
            recorded.flip_bit(path, 8 * at + int(rng.integers(8)))
            with pytest.raises(LogCorruptError):
                SelectionLog.open(memory_path).verify()
            path.write_bytes(whole)


def reseal(root: Path, change: Callable[[pa.Table], pa.Table], segment: int = 0) -> None:
    """What a forger who knows Arrow, but not the chain, would do: change rows, rewrite the file, repair size and checksum."""
    path = layout.segment_path(root, SELECTION, 0, 0, segment)
    reader = pa.ipc.open_file(pa.py_buffer(path.read_bytes()))
    metadata = reader.get_batch_with_custom_metadata(0).custom_metadata
    table = change(reader.read_all()).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, reader.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for batch in table.to_batches():
            writer.write_batch(batch, custom_metadata=metadata)
    data = sink.getvalue().to_pybytes()
    path.write_bytes(data)
    manifest = layout.manifest_path(root, SELECTION, 0)
    lines = [decode_line(line) for line in manifest.read_bytes().splitlines()]
    for i, line in enumerate(lines):
        if isinstance(line, SegmentLine) and line.segment == segment:
            fields = {
                **vars(line),
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "rows": table.num_rows,
            }
            lines[i] = SegmentLine(**fields)
    manifest.write_bytes(b"".join(map(encode_line, lines)))


def set_value(table: pa.Table, name: str, row: int, value: object) -> pa.Table:
    values = table.column(name).to_pylist()
    values[row] = value
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))


def test_resealing_without_a_change_passes(tmp_path: Path) -> None:
    """The forger's tool is sound: what it is caught at below is the change."""
    record(tmp_path)
    reseal(tmp_path, lambda table: table)
    SelectionLog.open(tmp_path).verify()


@pytest.mark.parametrize(
    ("change", "step"),
    [
        (lambda t: set_value(t, "score", 7, 0.5), 1),
        (lambda t: set_value(t, "selected", 12, not t.column("selected")[12].as_py()), 2),
        (lambda t: set_value(t, "loss", 0, 0.0), 0),  # a null made a zero
        (lambda t: set_value(t, "intra", 14, None), 2),  # a value made a null
        (lambda t: t.take([0, 1, 2, 3, 4, 6, 5, *range(7, 15)]), 1),  # two rows of a step exchanged
        (lambda t: pa.concat_tables([t.slice(0, 8), t.slice(9)]), 1),  # a row dropped
        (lambda t: pa.concat_tables([t.slice(0, 8), t.slice(7)]), 1),  # a row repeated
    ],
)
def test_a_changed_row_is_found_and_its_step_named(
    tmp_path: Path, change: Callable[[pa.Table], pa.Table], step: int
) -> None:
    record(tmp_path)
    reseal(tmp_path, change)
    with pytest.raises(
        LogCorruptError, match=rf"rank 0: .*a0-000000.arrow, step {step}: the rows do not give the digest"
    ):
        SelectionLog.open(tmp_path).verify()


def test_a_step_dropped_or_moved_is_found(tmp_path: Path) -> None:
    for name, change, text in (
        ("drop", lambda t: pa.concat_tables([t.slice(0, 5), t.slice(10)]), "2 steps .* expected 3: steps were dropped"),
        ("move", lambda t: t.take([*range(5, 10), *range(5), *range(10, 15)]), "step 0 follows step 1"),
        ("other", lambda t: set_value(t, "attempt", 3, 1), "row 3: attempt is 1, expected 0"),
    ):
        record(tmp_path / name)
        reseal(tmp_path / name, change)
        with pytest.raises(LogCorruptError, match=text):
            SelectionLog.open(tmp_path / name).verify()


def test_a_changed_live_row_is_found_and_its_step_named(tmp_path: Path) -> None:
    record(tmp_path)
    path = layout.wal_path(tmp_path, SELECTION, 0, 3)
    data = path.read_bytes()
    sample = recorded.columns(6)["sample_id"][2].item().to_bytes(8, "little")
    assert data.count(sample) == 1
    path.write_bytes(data.replace(sample, bytes(8)))
    with pytest.raises(LogCorruptError, match=r"rank 0: .*wal-000003.arrows.*rows of step 6 do not give the digest"):
        SelectionLog.open(tmp_path).verify()


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("selection/r00000/a0-000001.arrow", "is missing, but the manifest lists it"),
        (
            "_state/r00000/selection/manifest.jsonl",
            "neither the manifest nor a write-ahead file knows|found the write-ahead",
        ),
        ("_state/r00000/selection/wal-000003.arrows", None),
        ("_state/r00000", "there is no .*r00000, but the run began with 1 ranks"),
    ],
)
def test_a_file_that_was_removed(tmp_path: Path, what: str, text: str | None) -> None:
    record(tmp_path)
    path = tmp_path / what
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    log = SelectionLog.open(tmp_path)
    if text is None:
        # The live file had nothing that a kept head speaks of: that its rows are gone cannot be seen, and the report says so.
        assert any("no head from outside" in note for note in log.verify().unchecked)
    else:
        with pytest.raises(LogCorruptError, match=text):
            log.verify()


def test_a_segment_that_the_manifest_forgot(tmp_path: Path) -> None:
    """A closed log has no write-ahead file to tell of it."""
    with recorded.create(tmp_path) as writer:
        recorded.record(writer, 0, 2)
        writer.seal()
        recorded.record(writer, 2, 3)
    manifest = layout.manifest_path(tmp_path, SELECTION, 0)
    manifest.write_bytes(b"".join(manifest.read_bytes().splitlines(keepends=True)[:-2]))
    for look in (SelectionLog.open(tmp_path).verify, SelectionLog.open(tmp_path).table):
        with pytest.raises(
            LogCorruptError, match="segment 1 is sealed but neither the manifest nor a write-ahead file knows"
        ):
            look()


def cut_last_segments(root: Path) -> None:
    """Remove the last attempt's segment, its lines and the live files: a shorter folder that agrees with itself."""
    for table in ("selection", "pushes"):
        manifest = layout.manifest_path(root, table, 0)
        lines = manifest.read_bytes().splitlines(keepends=True)
        manifest.write_bytes(b"".join(lines[:-1]))
        for path in (layout.segment_path(root, table, 0, 1, 2), layout.wal_path(root, table, 0, 3)):
            path.unlink()


def test_a_cut_end_is_found_by_the_heads_that_were_kept(tmp_path: Path) -> None:
    root = record(tmp_path)
    cut_last_segments(tmp_path)
    with pytest.raises(LogCorruptError, match="before step 6 in attempt 1 is not what the checkpoint"):
        SelectionLog.open(tmp_path).verify()
    # The forger removes the heads file too: only an anchor from outside tells.
    layout.heads_path(tmp_path, 6).unlink()
    assert SelectionLog.open(tmp_path).verify().steps == 5
    with pytest.raises(LogCorruptError, match="no heads of step 6, for which a Merkle root was kept"):
        SelectionLog.open(tmp_path).verify(anchor=(6, root))


def test_a_wrong_anchor_is_refused(tmp_path: Path) -> None:
    record(tmp_path)
    with pytest.raises(LogCorruptError, match="was kept outside: the log was rewritten"):
        SelectionLog.open(tmp_path).verify(anchor=(6, bytes(32)))


def test_an_edited_run_json_breaks_the_chain(tmp_path: Path) -> None:
    record(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(path.read_text().replace('"r"', '"s"'))
    with pytest.raises(LogCorruptError, match=r"manifest\.jsonl, line 1: attempt 0 does not follow"):
        SelectionLog.open(tmp_path).verify()


@pytest.mark.parametrize("field", ["rows", "batches", "first_step", "last_step", "head", "attempt", "segment", "file"])
def test_an_edited_manifest_line_is_found(tmp_path: Path, field: str) -> None:
    """With its check repaired."""
    record(tmp_path)
    manifest = layout.manifest_path(tmp_path, SELECTION, 0)
    lines = [decode_line(line) for line in manifest.read_bytes().splitlines()]
    old = vars(lines[1])[field]
    new = "00" * 32 if field == "head" else "../x" if field == "file" else old + 1
    lines[1] = SegmentLine(**{**vars(lines[1]), field: new})
    manifest.write_bytes(b"".join(map(encode_line, lines)))
    with pytest.raises(LogCorruptError):
        SelectionLog.open(tmp_path).verify()


def test_lines_dropped_or_exchanged_in_the_manifest(tmp_path: Path) -> None:
    record(tmp_path)
    manifest = layout.manifest_path(tmp_path, SELECTION, 0)
    lines = manifest.read_bytes().splitlines(keepends=True)
    for changed in (lines[1:], lines[:1] + lines[2:], [lines[0], lines[2], lines[1], *lines[3:]], lines[:-1]):
        manifest.write_bytes(b"".join(changed))
        with pytest.raises(LogCorruptError):
            SelectionLog.open(tmp_path).verify()


def test_steps_out_of_order_are_found_though_the_chain_holds(tmp_path: Path) -> None:
    """What a writer with a fault of its own would leave."""
    for seal in (False, True):
        root = tmp_path / f"{seal}"
        writer = recorded.create(root)
        recorded.record(writer, 0, 3)
        writer._selection.next_step = 0
        writer.append(1, recorded.columns(1))
        if seal:
            writer.seal()
        writer.release()
        if not seal:
            assert SelectionLog.open(root).table().num_rows == 15, "no step is given twice"
        with pytest.raises(LogCorruptError, match="step 1 follows step 2"):
            SelectionLog.open(root).verify()


def test_a_strangers_segment_is_found(tmp_path: Path) -> None:
    record(tmp_path)
    (tmp_path / "selection" / "r00007").mkdir()
    with pytest.raises(LogCorruptError, match="belongs to no rank"):
        SelectionLog.open(tmp_path).verify()


def test_a_kept_memory_may_be_deleted_but_not_changed(tmp_path: Path) -> None:
    record(tmp_path)
    path = layout.buffer_path(tmp_path, 4, 0)
    data = path.read_bytes()
    path.unlink()
    assert any("step 4" in note for note in SelectionLog.open(tmp_path).verify().unchecked)
    path.write_bytes(data[:-1])
    with pytest.raises(LogCorruptError, match="not those that the heads of step 4 speak of"):
        SelectionLog.open(tmp_path).verify()


def test_the_heads_file_is_plain_json_that_others_can_check(tmp_path: Path) -> None:
    merkle = record(tmp_path)
    value = json.loads(layout.heads_path(tmp_path, 6).read_text())
    assert value["root"] == merkle.hex() == hashlib.sha256(b"\0" + bytes.fromhex(value["heads"][0])).hexdigest()
    assert re.fullmatch("[0-9a-f]{16}", value.pop("check"))
