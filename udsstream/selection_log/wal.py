"""The write-ahead file: how its bytes are made, and how they are read back without trusting them.

A write-ahead file is an Arrow IPC stream: a schema message, then one uncompressed record batch per step with the chain's
value after it in its custom metadata. It has no end mark. A scan gives the longest prefix whose chain holds; after a crash
that prefix contains every batch that was synced, and no row that was not written.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from udsstream.errors import LogCorruptError
from udsstream.selection_log.digest import batch_link, content_digest
from udsstream.selection_log.encoding import LINK_KEY, TableCodec, ones, schema_message
from udsstream.selection_log.files import map_file
from udsstream.selection_log.frames import SCHEMA, Frame, FrameError, RecordBatchFrame, frames, record_batch
from udsstream.selection_log.manifest import canonical_json

__all__ = ["FileIdentity", "WalScan", "scan_wal"]

_SCHEMA_LIMIT = 1 << 20
_SEARCH_LIMIT = 1 << 16
_SEARCH_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class FileIdentity:
    """What a write-ahead file or a segment says of itself in its schema's metadata."""

    table: str
    rank: int
    attempt: int
    segment: int
    prev: bytes  # the chain before its first batch
    run_sha256: bytes

    def schema(self, codec: TableCodec) -> pa.Schema:
        value = {
            "attempt": self.attempt,
            "prev": self.prev.hex(),
            "rank": self.rank,
            "run_sha256": self.run_sha256.hex(),
            "schema_version": codec.version,
            "segment": self.segment,
            "table": self.table,
        }
        return codec.schema.with_metadata({"udsstream": canonical_json(value)})


def identity_of(schema: pa.Schema) -> dict[str, object]:
    """The metadata of a file's schema, for messages about what was found; empty when there is none."""
    try:
        value = json.loads((schema.metadata or {})[b"udsstream"])
        return value if isinstance(value, dict) else {}
    except (KeyError, ValueError, RecursionError):
        return {}


@dataclass(frozen=True, kw_only=True)
class WalScan:
    """The intact prefix of a write-ahead file."""

    path: Path
    identity: FileIdentity
    data: memoryview = field(repr=False)
    good: int  # bytes of the intact prefix; 0 when not even the schema is there
    head: bytes  # the chain after it
    steps: np.ndarray  # (batches,) int64
    rows: np.ndarray  # (batches,) int64
    links: list[bytes] = field(repr=False)
    wrong: str | None  # why the scan stopped before the end of the file; None when it did not
    damaged: bool  # an intact batch lies beyond the first bad one: not torn by a crash but changed afterwards

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def batches(self) -> int:
        return len(self.links)

    def table(self, codec: TableCodec) -> pa.Table:
        """The rows of the intact prefix."""
        if not self.batches:
            return codec.schema.empty_table()
        try:
            with pa.ipc.open_stream(pa.py_buffer(self.data[: self.good])) as reader:
                return reader.read_all().replace_schema_metadata(None)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise LogCorruptError(
                f"{self.path}: the values are right but Arrow cannot read what frames them: {error}. Restore the file from "
                "a copy."
            ) from error


def frame_digest(data: memoryview, frame: Frame, batch: RecordBatchFrame, codec: TableCodec) -> bytes:
    """The content digest of an uncompressed batch, straight from its bytes."""
    pieces: list[bytes | memoryview] = []
    at = 0
    for column in codec.columns:
        if column.nullable:
            offset, length = batch.buffers[at].tolist()
            start = frame.body + offset
            pieces.append(data[start : start + (batch.rows + 7) // 8] if length else ones(batch.rows))
        at += 2 if column.is_list else 1  # an embedding's numbers have validity bits of their own, never used
        start = frame.body + int(batch.buffers[at, 0])
        pieces.append(data[start : start + column.value_bytes(batch.rows)])
        at += 1
    return content_digest(codec.schema_digest, batch.rows, pieces)


@dataclass(frozen=True, slots=True)
class _Batch:
    end: int
    rows: int
    step: int
    content: bytes
    link: bytes


def _read_batch(data: memoryview, frame: Frame, codec: TableCodec) -> _Batch:
    batch = record_batch(data, frame, codec, compression=False)
    try:
        link = bytes.fromhex(batch.metadata.get(LINK_KEY, b"").decode("ascii"))
    except ValueError as error:
        raise FrameError("the batch's link is not hex") from error
    if len(link) != 32 or batch.metadata.keys() != {LINK_KEY}:
        raise FrameError("the batch carries no link")
    if batch.rows == 0:
        raise FrameError("a batch without rows")
    offset = frame.body + int(batch.buffers[codec.step_buffer, 0])
    step = int.from_bytes(data[offset : offset + 8], "little", signed=True)
    return _Batch(frame.end, batch.rows, step, frame_digest(data, frame, batch, codec), link)


def scan_wal(path: Path, codec: TableCodec, identity: FileIdentity) -> WalScan:
    """Scan a write-ahead file from its start. FileNotFoundError passes through."""
    data = map_file(path)
    good, head, wrong, damaged = 0, identity.prev, None, False
    batches: list[_Batch] = []
    last_step: int | None = None
    walk = frames(data)
    try:
        first = next(walk, None)
        if first is None:
            raise FrameError("the file has no schema")
        _check_schema(data[: first.end], first, codec, identity)
        good = first.end
        for frame in walk:
            batch = _read_batch(data, frame, codec)
            if batch_link(head, batch.content) != batch.link:
                raise FrameError(f"the rows of step {batch.step} do not give the digest that was written with them")
            if last_step is not None and batch.step <= last_step:
                raise FrameError(f"step {batch.step} follows step {last_step}")
            head, last_step, good = batch.link, batch.step, batch.end
            batches.append(batch)
        if good != len(data):
            raise FrameError("an end-of-stream mark, which the log never writes")
    except FrameError as error:
        wrong = f"at byte {good} of {len(data)}: {error}"
        damaged = _intact_batch_after(data, good, codec)
    return WalScan(
        path=path,
        identity=identity,
        data=data,
        good=good,
        head=head,
        steps=np.array([b.step for b in batches], np.int64),
        rows=np.array([b.rows for b in batches], np.int64),
        links=[b.link for b in batches],
        wrong=wrong,
        damaged=damaged,
    )


def _check_schema(data: memoryview, frame: Frame, codec: TableCodec, identity: FileIdentity) -> None:
    if frame.kind != SCHEMA or frame.end != frame.body or len(data) > _SCHEMA_LIMIT:
        raise FrameError("the file does not begin with a schema")
    expected = identity.schema(codec)
    if bytes(data) == schema_message(expected):
        return
    try:
        found = pa.ipc.read_schema(pa.py_buffer(data))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise FrameError(f"the schema cannot be read: {error}") from error
    if not found.equals(expected, check_metadata=True):
        raise FrameError(f"the file says that it is {identity_of(found)}, expected {identity_of(expected)}")


def _intact_batch_after(data: memoryview, bad: int, codec: TableCodec) -> bool:
    """Whether a well-formed batch of this table lies anywhere after the message at `bad`.

    A crash tears the end of a file: nothing whole follows. A whole batch beyond says that the bad place was good once.
    """
    starts = []
    try:
        frame = next(frames(data, bad), None)
        if frame is not None:
            starts.append(frame.end)
    except FrameError:
        pass
    raw = data.obj
    if isinstance(raw, (mmap.mmap, bytes)):
        at = bad
        for _ in range(_SEARCH_LIMIT):
            at = raw.find(b"\xff\xff\xff\xff", at + 1, bad + _SEARCH_BYTES)
            if at < 0:
                break
            if at % 8 == 0:
                starts.append(at)
    for start in starts:
        try:
            frame = next(frames(data, start), None)
            if frame is not None:
                _read_batch(data, frame, codec)
                return True
        except FrameError:
            continue
    return False
