"""A walk through the messages of an Arrow IPC stream that trusts nothing in them.

Before pyarrow may see a file, every length in it is checked against the file's size and against the schema that the log
must have: a hostile file is refused with LogCorruptError, in time and memory proportional to its size. Only what the log
writes is understood: one schema message, then record batches of fixed-width columns, no dictionaries.

Layouts: the Arrow columnar format, "IPC streaming format", Message.fbs and Schema.fbs; FlatBuffers' binary format.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from udsstream.selection_log.encoding import TableCodec

__all__ = ["Frame", "FrameError", "RecordBatchFrame", "footer_blocks", "frames", "record_batch"]

SCHEMA, RECORD_BATCH = 1, 3

_I32 = struct.Struct("<i")
_I64 = struct.Struct("<q")
_U16 = struct.Struct("<H")
_PREFIX = struct.Struct("<Ii")


class FrameError(Exception):
    """The bytes are no message that the log could have written; the text says why. Internal: callers say which file."""


class _Table:
    """A FlatBuffers table; every access is checked against the bytes that hold it."""

    __slots__ = ("data", "pos", "size", "vtable")

    def __init__(self, data: memoryview, pos: int) -> None:
        self.data, self.pos = data, pos
        self.vtable = pos - _read(_I32, data, pos)
        self.size = _read(_U16, data, self.vtable)

    def _at(self, index: int) -> int:
        slot = 4 + 2 * index
        if slot + 2 > self.size:
            return 0
        offset = _read(_U16, self.data, self.vtable + slot)
        return self.pos + offset if offset else 0

    def number(self, index: int, kind: struct.Struct) -> int:
        at = self._at(index)
        return _read(kind, self.data, at) if at else 0

    def _follow(self, index: int) -> int:
        at = self._at(index)
        return at + _read(_I32, self.data, at) if at else 0

    def table(self, index: int) -> _Table | None:
        at = self._follow(index)
        return _Table(self.data, at) if at else None

    def structs(self, index: int, width: int) -> memoryview:
        """The bytes of a vector of structs of `width` bytes."""
        at = self._follow(index)
        if not at:
            return self.data[:0]
        count = _read(_I32, self.data, at)
        start = at + 4
        if count < 0 or start + count * width > len(self.data):
            raise FrameError("a vector runs past the message")
        return self.data[start : start + count * width]

    def tables(self, index: int) -> Iterator[_Table]:
        at = self._follow(index)
        if at:
            offsets = self.structs(index, 4)
            for i in range(len(offsets) // 4):
                where = at + 4 + 4 * i
                yield _Table(self.data, where + _read(_I32, self.data, where))

    def text(self, index: int) -> bytes:
        return bytes(self.structs(index, 1))


def _read(kind: struct.Struct, data: memoryview, at: int) -> int:
    if at < 0 or at + kind.size > len(data):
        raise FrameError("an offset points outside the message")
    return kind.unpack_from(data, at)[0]


_U8 = struct.Struct("<B")


@dataclass(frozen=True, slots=True)
class Frame:
    """One encapsulated message: where it is and what kind it is."""

    start: int
    body: int  # where the body starts
    end: int  # where the next message starts
    kind: int
    message: _Table


def frames(data: memoryview, start: int = 0) -> Iterator[Frame]:
    """The messages from `start` on, up to the end-of-stream mark or the end of the data; FrameError at the first bad one."""
    size = len(data)
    while start < size:
        if start + 8 > size:
            raise FrameError("the data ends within a message's prefix")
        mark, length = _PREFIX.unpack_from(data, start)
        if mark != 0xFFFFFFFF:
            raise FrameError("no message begins here")
        if length == 0:
            return
        body = start + 8 + length
        if length < 8 or length % 8 or body > size:
            raise FrameError(f"a message's header claims {length} bytes")
        header = data[start + 8 : body]
        message = _Table(header, _read(_I32, header, 0))
        body_length = message.number(3, _I64)
        if body_length < 0 or body_length % 8 or body + body_length > size:
            raise FrameError(f"a message's body claims {body_length} bytes")
        end = body + body_length
        yield Frame(start, body, end, message.number(1, _U8), message)
        start = end


@dataclass(frozen=True, slots=True)
class RecordBatchFrame:
    """A checked record batch: n rows, where each column's bytes lie in its body, and its custom metadata."""

    rows: int
    buffers: np.ndarray  # (buffers, 2) int64: offset in the body, length as stored
    unpacked: int  # bytes after decompression
    compressed: bool
    metadata: dict[bytes, bytes]


def record_batch(data: memoryview, frame: Frame, codec: TableCodec, *, compression: bool) -> RecordBatchFrame:
    """Check that the frame is a record batch of this table whose buffers are inside it and of the right lengths."""
    if frame.kind != RECORD_BATCH:
        raise FrameError(f"a message of kind {frame.kind} where a record batch is expected")
    header = frame.message.table(2)
    if header is None:
        raise FrameError("a record batch without a header")
    rows = header.number(0, _I64)
    body = frame.end - frame.body
    if not 0 <= rows < 1 << 31:
        raise FrameError(f"a record batch claims {rows} rows")
    compressed = header.table(3) is not None
    if compressed and not compression:
        raise FrameError("a compressed record batch where none is expected")
    layout = codec.layout(rows)
    nodes = np.frombuffer(header.structs(1, 16), np.int64).reshape(-1, 2)
    if nodes[:, 0].tolist() != layout.nodes:
        raise FrameError("the columns' lengths do not fit the schema")
    if (nodes[:, 1] < 0).any() or (nodes[:, 1] > nodes[:, 0]).any():
        raise FrameError("a column's count of nulls is impossible")
    buffers = np.frombuffer(header.structs(2, 16), np.int64).reshape(-1, 2)
    if len(buffers) != len(layout.needs):
        raise FrameError("the number of buffers does not fit the schema")
    offsets, stored = buffers[:, 0], buffers[:, 1]
    if (
        (offsets < 0).any()
        or (offsets % 8).any()
        or (stored < 0).any()
        or (offsets > body).any()
        or (stored > body - offsets).any()
    ):
        raise FrameError("a buffer lies outside the message")
    actual = stored
    if compressed:
        actual = stored.copy()
        for i in np.flatnonzero(stored):
            at = frame.body + int(offsets[i])
            if stored[i] < 8:
                raise FrameError("a compressed buffer is too short")
            claimed = _I64.unpack_from(data, at)[0]
            actual[i] = stored[i] - 8 if claimed == -1 else claimed
    # Arrow may round a buffer up to 64 bytes; a validity buffer is left out when nothing is null.
    exact = (actual >= layout.needs) & (actual <= layout.needs + 64)
    absent = layout.validity & (actual == 0)
    if not (exact | absent).all():
        raise FrameError("a buffer's length does not fit the number of rows")
    if (nodes[layout.node_of[absent], 1] > 0).any():
        raise FrameError("a column has nulls but does not say where")
    metadata = {pair.text(0): pair.text(1) for pair in frame.message.tables(4)}
    return RecordBatchFrame(rows, buffers, int(actual.sum()), compressed, metadata)


def footer_blocks(data: memoryview) -> list[tuple[int, int, int]]:
    """The record batches that an IPC file's footer lists: (offset, header length with its prefix, body length)."""
    if len(data) < 24 or bytes(data[:8]) != b"ARROW1\0\0" or bytes(data[-6:]) != b"ARROW1":
        raise FrameError("the file does not begin and end with Arrow's mark")
    length = _I32.unpack_from(data, len(data) - 10)[0]
    start = len(data) - 10 - length
    if length < 8 or start < 8:
        raise FrameError(f"the footer claims {length} bytes")
    footer_bytes = data[start : len(data) - 10]
    footer = _Table(footer_bytes, _read(_I32, footer_bytes, 0))
    if len(footer.structs(2, 24)):
        raise FrameError("the file has dictionaries")
    blocks = footer.structs(3, 24)
    return [struct.unpack_from("<qi4xq", blocks, 24 * i) for i in range(len(blocks) // 24)]
