"""Compaction to Parquet: the same rows, floats split by byte, and digests that still prove them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import recorded

from udsstream.errors import LogCorruptError, LogError
from udsstream.selection_log.parquet import verify_parquet
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.writer import SelectionLogWriter


def record(root: Path, embeddings: str = "full") -> SelectionLog:
    writer = recorded.create(root, embeddings=embeddings)
    recorded.record(writer, 0, 3)
    head = recorded.checkpoint(writer, 3)
    recorded.record(writer, 3, 5, seed=1)
    writer.release()
    again = SelectionLogWriter.resume(root, step=3, head=head)
    recorded.record(again, 3, 4)
    again.seal()
    recorded.record(again, 4, 6)
    again.release()
    return SelectionLog.open(root)


@pytest.mark.parametrize("embeddings", ["full", "tail"])
def test_the_rows_come_back_and_can_be_verified(tmp_path: Path, embeddings: str) -> None:
    log = record(tmp_path / "log", embeddings)
    out = log.to_parquet()
    assert out == tmp_path / "log" / "parquet"
    selection = pq.read_table(out / "selection.parquet")
    run = selection.filter(pc.field("superseded") == pa.scalar(False)).drop_columns(["superseded"])
    assert run.sort_by([("step", "ascending"), ("position", "ascending")]).equals(log.table())
    assert selection.num_rows == log.table(all_attempts=True).num_rows == 40
    report = verify_parquet(out / "selection.parquet")
    assert (report.rows, report.batches, report.ranks) == (40, 8, 1)
    assert verify_parquet(out / "pushes.parquet").batches == 8
    log.verify()  # the folder parquet/ does not count as part of the log


def test_floats_are_split_by_byte_and_pages_have_checksums(tmp_path: Path) -> None:
    out = record(tmp_path / "log").to_parquet(tmp_path / "out")
    for name, column in (("selection", "score"), ("pushes", "embedding.list.element")):
        group = pq.ParquetFile(out / f"{name}.parquet").metadata.row_group(0)
        by_name = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
        assert "BYTE_STREAM_SPLIT" in by_name[column].encodings
        assert by_name[column].compression == "ZSTD"


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path, row_group_size=7)


def test_a_changed_parquet_file_is_found(tmp_path: Path) -> None:
    log = record(tmp_path / "log")
    path = log.to_parquet(tmp_path / "out") / "selection.parquet"
    rewrite(path, lambda table: table)
    assert verify_parquet(path).rows == 40  # other row groups, the same rows
    changes: list[Callable[[pa.Table], pa.Table]] = [
        lambda t: t.slice(1),
        lambda t: t.slice(0, 39),
        lambda t: pa.concat_tables([t, t.slice(39)]),
        lambda t: t.take([1, 0, *range(2, 40)]),
        lambda t: t.set_column(6, t.schema.field(6), pa.array(np.arange(40), pa.int64())),
        lambda t: t.set_column(13, t.schema.field(13), pa.nulls(40, pa.float32())),
    ]
    for change in changes:
        log.to_parquet(tmp_path / "out")
        rewrite(path, change)
        with pytest.raises(LogCorruptError, match=r"selection\.parquet: (the rows of rank 0|1 rows belong)"):
            verify_parquet(path)


def test_a_file_that_is_no_compacted_log(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(LogCorruptError, match="cannot be read as a compacted log"):
        verify_parquet(path)
    path.write_bytes(b"PAR1" * 100)
    with pytest.raises(LogCorruptError, match="cannot be read as a compacted log"):
        verify_parquet(path)


@pytest.mark.parametrize(
    "attempts",
    [[[40000, 0, None]], [[0, 0, 40000]], [[0, 1 << 70, None]], [[0, "0", None]], [[0, 0]], [5], 5],
    ids=repr,
)
def test_metadata_with_attempts_that_are_none(tmp_path: Path, attempts: object) -> None:
    path = record(tmp_path / "log").to_parquet() / "selection.parquet"
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"udsstream"])
    about["chains"][0]["attempts"] = attempts
    metadata = {**table.schema.metadata, b"udsstream": json.dumps(about).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(LogCorruptError, match="cannot be read as a compacted log"):
        verify_parquet(path)


def test_links_in_a_received_log_are_not_written_through(tmp_path: Path) -> None:
    log, victim = record(tmp_path / "log"), tmp_path / "victim"
    victim.write_text("precious")
    (log.root / "parquet").mkdir()
    for name in (".selection.parquet.tmp", "pushes.parquet"):
        (log.root / "parquet" / name).symlink_to(victim)
    out = log.to_parquet()
    assert victim.read_text() == "precious"
    assert not any(path.is_symlink() for path in out.iterdir())
    assert verify_parquet(out / "selection.parquet").rows > 0
    out.rename(tmp_path / "elsewhere")
    out.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LogError, match=r"parquet is a link to .*elsewhere: remove it"):
        log.to_parquet()
    log.to_parquet(tmp_path / "elsewhere")
