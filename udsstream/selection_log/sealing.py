"""Sealed segments: how a write-ahead file becomes one, and how one is read back without trusting it.

A segment is an Arrow IPC file, zstd, in batches of up to 64Ki rows, and a line in the manifest. Every step of `seal` may be
interrupted and done again: the segment's bytes depend on the write-ahead file alone, and that file is removed last.
"""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from udsstream.errors import LogCorruptError
from udsstream.selection_log import layout
from udsstream.selection_log.encoding import TableCodec, row_bytes
from udsstream.selection_log.files import make_dirs, map_file, replace_file, sync_dir
from udsstream.selection_log.frames import SCHEMA, FrameError, footer_blocks, frames, record_batch
from udsstream.selection_log.manifest import SegmentLine, append_line
from udsstream.selection_log.wal import FileIdentity, WalScan, identity_of

__all__ = ["MARK_BYTES", "Pending", "Segment", "open_segment", "seal"]

MARKS_KEY = b"marks"
MARK_BYTES = 3  # of each step's link: enough to name the step at which a changed segment leaves its chain

_BATCH_ROWS = 1 << 16
_ZSTD_LEVEL = 6  # 3% smaller than the default level for twice the time, off the training thread
_BATCH_BYTES = 64 << 20
# A segment that unpacks to more than this is no record of decisions but a decompression bomb.
_UNPACKED_PER_BYTE, _UNPACKED_FREE = 4096, 16 << 20


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A write-ahead file that takes no more batches: what its segment will say."""

    identity: FileIdentity
    head: bytes
    rows: int
    batches: int
    first_step: int
    last_step: int
    good: int  # bytes of the intact prefix
    marks: bytes = field(repr=False)

    @staticmethod
    def of_scan(scan: WalScan) -> Pending:
        return Pending(
            identity=scan.identity,
            head=scan.head,
            rows=int(scan.rows.sum()),
            batches=scan.batches,
            first_step=int(scan.steps[0]),
            last_step=int(scan.steps[-1]),
            good=scan.good,
            marks=b"".join(link[:MARK_BYTES] for link in scan.links),
        )


def segment_bytes(wal: memoryview, pending: Pending, codec: TableCodec) -> bytes:
    """The segment's file, from the intact prefix of its write-ahead file."""
    try:
        with pa.ipc.open_stream(pa.py_buffer(wal[: pending.good])) as reader:
            table = reader.read_all()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise LogCorruptError(
            f"the write-ahead file of segment {pending.identity.segment} of {codec.table!r}, rank {pending.identity.rank}, "
            f"was changed after it was written: {error}"
        ) from error
    if table.num_rows != pending.rows:
        raise LogCorruptError(
            f"the write-ahead file of segment {pending.identity.segment} has {table.num_rows} rows, "
            f"but {pending.rows} were written to it"
        )
    table = table.combine_chunks()
    rows = max(256, min(_BATCH_ROWS, _BATCH_BYTES // row_bytes(codec.schema)))
    marks = base64.b64encode(pending.marks).decode()
    schema = pending.identity.schema(codec)
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", _ZSTD_LEVEL), use_threads=False)
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        for i, batch in enumerate(table.to_batches(max_chunksize=rows)):
            writer.write_batch(batch.cast(schema), custom_metadata={MARKS_KEY: marks} if i == 0 else None)
    return sink.getvalue().to_pybytes()


def seal(root: Path, pending: Pending, codec: TableCodec) -> None:
    """Turn a write-ahead file into a segment.

    OSError passes through. Whatever lies beyond the intact prefix is kept under the name torn-*.
    """
    who = pending.identity
    wal = layout.wal_path(root, who.table, who.rank, who.segment)
    target = layout.segment_path(root, who.table, who.rank, who.attempt, who.segment)
    make_dirs(target.parent)
    data = segment_bytes(map_file(wal), pending, codec)
    replace_file(target, data, wal.with_name(f"seal-{who.segment:06d}.tmp"))
    sync_dir(wal.parent)
    line = SegmentLine(
        segment=who.segment,
        attempt=who.attempt,
        file=target.relative_to(root).as_posix(),
        rows=pending.rows,
        batches=pending.batches,
        first_step=pending.first_step,
        last_step=pending.last_step,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        prev=who.prev.hex(),
        head=pending.head.hex(),
    )
    append_line(root, who.table, who.rank, line)
    if wal.stat().st_size > pending.good:
        os.replace(wal, layout.free_torn_path(root, who.table, who.rank, who.segment))
    else:
        wal.unlink()
    sync_dir(wal.parent)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A sealed file whose every length has been checked against its size, its schema and its manifest line."""

    path: Path
    line: SegmentLine
    data: memoryview = field(repr=False)
    marks: bytes = field(repr=False)

    def table(self, codec: TableCodec) -> pa.Table:
        """All its rows. LogCorruptError when they cannot be unpacked."""
        try:
            # An IPC file is a stream behind eight bytes; read as one, its footer is not needed.
            with pa.ipc.open_stream(pa.py_buffer(self.data[8:])) as reader:
                table = reader.read_all()
            table.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise LogCorruptError(
                f"{self.path}: the rows of steps {self.line.first_step} to {self.line.last_step} cannot be unpacked: "
                f"{error}. Restore the file from a copy."
            ) from error
        return table.replace_schema_metadata(None)


def open_segment(root: Path, line: SegmentLine, rank: int, codec: TableCodec, run_sha256: bytes) -> Segment:
    """Open a sealed file and check its shape; its content is checked by `verify` alone."""
    path = layout.segment_path(root, codec.table, rank, line.attempt, line.segment)
    steps = f"rank {rank}: {path} (steps {line.first_step} to {line.last_step})"
    try:
        data = map_file(path)
    except FileNotFoundError:
        raise LogCorruptError(f"{steps} is missing, but the manifest lists it. Restore it from a copy.") from None
    if len(data) != line.bytes:
        raise LogCorruptError(
            f"{steps} has {len(data)} bytes, expected {line.bytes}: it was cut or changed after it was sealed. "
            "Restore it from a copy."
        )
    identity = FileIdentity(
        table=codec.table,
        rank=rank,
        attempt=line.attempt,
        segment=line.segment,
        prev=bytes.fromhex(line.prev),
        run_sha256=run_sha256,
    )
    try:
        marks = _check_shape(data, identity.schema(codec), line, codec)
    except (FrameError, pa.ArrowException, OSError, ValueError) as error:
        raise LogCorruptError(f"{steps}: {error}. Restore it from a copy.") from error
    return Segment(path=path, line=line, data=data, marks=marks)


def _check_shape(data: memoryview, expected: pa.Schema, line: SegmentLine, codec: TableCodec) -> bytes:
    """The marks. The file must be a schema and record batches of the table, and its footer must list just these."""
    listed = footer_blocks(data)
    rows = unpacked = 0
    marks = b""
    blocks = []
    for i, frame in enumerate(frames(data, 8)):
        if i == 0:
            if frame.kind != SCHEMA:
                raise FrameError("the file does not begin with a schema")
            found = pa.ipc.read_schema(pa.py_buffer(data[frame.start : frame.end]))
            if not found.equals(expected, check_metadata=True):
                raise FrameError(f"the file says that it is {identity_of(found)}, expected {identity_of(expected)}")
            continue
        batch = record_batch(data, frame, codec, compression=True)
        if i == 1:
            marks = base64.b64decode(batch.metadata.get(MARKS_KEY, b""), validate=True)
        rows += batch.rows
        unpacked += batch.unpacked
        blocks.append((frame.start, frame.body - frame.start, frame.end - frame.body))
    if rows != line.rows:
        raise FrameError(f"the file has {rows} rows, expected {line.rows}")
    if unpacked > _UNPACKED_PER_BYTE * len(data) + _UNPACKED_FREE:
        raise FrameError(f"the file's {len(data)} bytes would unpack to {unpacked}")
    if blocks != listed:
        raise FrameError("the footer does not list the file's record batches")
    if not pa.ipc.open_file(pa.py_buffer(data)).schema.equals(expected, check_metadata=True):
        raise FrameError("the footer's schema is another than the file's")
    return marks
