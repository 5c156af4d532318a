"""Encoded samples into MDS shards, stream by stream: where a shard ends, what waits for it, its layout, hashes and compression.

The layout, the hashes and the compression are Streaming's own code; where a shard ends follows `MDSWriter.write`, except that no empty
shard is written before a first sample that is larger than a shard.

Memory: samples wait here for their shard. When those of all streams together exceed `budget`, those of the stream with the most go
to a file in `spill/`. So it is bounded by `budget`, by what a shard takes while it is written (about three times its size, in at most
`threads` + 1 shards at a time), by some 200 bytes per sample of these, and by 4 per waiting sample and a few kilobytes per stream.
"""

from __future__ import annotations

import gzip
import os
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter
from streaming.base.compression import compress, get_compression_extension
from streaming.base.hashing import get_hash

from udsstream.errors import DataError
from udsstream.ingest.encode import Encoded, Samples
from udsstream.ingest.readers import Block, Position
from udsstream.job_folder import sync_file, write_errors

__all__ = ["BUDGET", "MAX_STREAMS", "FinishedShard", "Layout", "ShardSet"]

BUDGET = 256 << 20
MAX_STREAMS = 4096
_PART_OVERHEAD = 300
"""Bytes that a piece of waiting samples costs beside its data."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What MDSWriter is told."""

    columns: dict[str, str]
    hashes: tuple[str, ...]
    compression: str | None
    size_limit: int

    def writer(self) -> MDSWriter:
        """Streaming's writer, for its layout; it writes nothing."""
        with tempfile.TemporaryDirectory(prefix="udsstream-layout-") as empty:
            return MDSWriter(
                columns=self.columns,
                out=empty,
                hashes=list(self.hashes),
                compression=self.compression,
                size_limit=self.size_limit,
            )


@dataclass(frozen=True, kw_only=True)
class FinishedShard:
    """A shard on disk."""

    stream: str
    shard: dict[str, Any]
    """Its entry in the index."""
    last: int
    """The number of its last row in the source."""
    resume: Position
    """All rows before this place are in this shard or ones before it, or rejected."""
    rows: int
    """How many rows were before that place."""


@dataclass
class _Open:
    """The shard that a stream is at."""

    value: str
    folder: Path
    size: int
    done: int = -1
    """The number of the last row that is in a finished shard."""
    shards: int = 0
    samples: int = 0
    pieces: list[tuple[memoryview, np.ndarray]] = field(default_factory=list)
    waiting: int = 0
    """Bytes in memory."""
    count: int = 0
    last: int = -1
    oldest: tuple[Position, int] | None = None
    spilled: Path | None = None
    spilled_sizes: list[np.ndarray] = field(default_factory=list)


class ShardSet:
    """All streams of a job."""

    def __init__(self, work: Path, layout: Layout, folders: Any, *, threads: int, budget: int = BUDGET) -> None:
        """`folders`: the stream's value -> the name of its folder below `work`. `threads`: 0 finishes shards at once, in this thread."""
        self._work, self._layout, self._folders, self._budget = work, layout, folders, budget
        self._writer = layout.writer()
        self._streams: dict[str, _Open] = {}
        self._pool = ThreadPoolExecutor(threads, "shards") if threads else None
        self._threads = threads
        self._pending: deque[tuple[Future[dict[str, Any]] | dict[str, Any], _Open, int, Position, int]] = deque()
        self._waiting = 0

    @property
    def streams(self) -> list[_Open]:
        return list(self._streams.values())

    def restore(self, finished: FinishedShard) -> None:
        """A shard that an earlier process finished."""
        stream = self._stream(finished.stream)
        stream.shards += 1
        stream.samples += finished.shard["samples"]
        stream.done = finished.last

    def add(self, block: Block, encoded: Encoded, rows_before: int) -> Iterator[FinishedShard]:
        """Takes a block's samples; yields the shards that were finished by now, in the order in which they were begun to be."""
        for value, samples in encoded.streams.items():
            yield from self._add(self._stream(value), block, samples, rows_before)
        while self._waiting > self._budget:
            self._spill(max(self._streams.values(), key=lambda stream: stream.waiting))
        yield from self._finished(self._threads)

    def finish(self, end: Position, rows: int) -> Iterator[FinishedShard]:
        """Ends every stream's last shard."""
        for stream in self._streams.values():
            if stream.count:
                self._cut(stream, end, rows)
                yield from self._finished(self._threads)
        yield from self._finished(0)

    def close(self) -> None:
        """Lets shards that are being written come to their end; nothing is recorded of them."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _stream(self, value: str) -> _Open:
        if (stream := self._streams.get(value)) is None:
            if len(self._streams) >= MAX_STREAMS:
                raise DataError(
                    f"--stream-by: the column has more than {MAX_STREAMS} values, one folder each; choose a column with fewer"
                )
            folder = self._work / self._folders(value)
            with write_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            stream = self._streams[value] = _Open(value, folder, self._writer.extra_bytes_per_shard)
        return stream

    def _add(self, stream: _Open, block: Block, samples: Samples, rows_before: int) -> Iterator[FinishedShard]:
        data, sizes = memoryview(samples.data), np.frombuffer(samples.sizes, np.uint32)
        units = np.frombuffer(samples.offsets, np.uint32).astype(np.int64) + block.start.unit
        if block.start.unit <= stream.done:
            skipped = int(np.searchsorted(units, stream.done, "right"))
            data, sizes, units = data[int(sizes[:skipped].sum(dtype=np.int64)) :], sizes[skipped:], units[skipped:]
        ends = sizes.cumsum(dtype=np.int64)
        grown = ends + self._writer.extra_bytes_per_sample * np.arange(1, len(sizes) + 1)
        begin = 0
        while begin < len(sizes):
            room = self._layout.size_limit - stream.size
            before = int(grown[begin - 1]) if begin else 0
            end = int(np.searchsorted(grown, before + room, "right"))
            if end <= begin and not stream.count:
                end = begin + 1  # larger than a shard: one of its own
            if end > begin:
                first = int(ends[begin - 1]) if begin else 0
                piece = data[first : int(ends[end - 1])]
                stream.pieces.append((piece, sizes[begin:end]))
                stream.oldest = stream.oldest or (block.start, rows_before)
                stream.size += int(grown[end - 1]) - before
                stream.count += end - begin
                stream.last = int(units[end - 1])
                stream.waiting += len(piece) + _PART_OVERHEAD
                self._waiting += len(piece) + _PART_OVERHEAD
                begin = end
            if begin < len(sizes):
                self._cut(stream, block.start, rows_before)
                yield from self._finished(self._threads)

    def _cut(self, stream: _Open, at: Position, rows_before: int) -> None:
        """The stream's shard is full."""
        running = [future for future, *_ in self._pending if isinstance(future, Future) and not future.done()]
        if self._pool is not None and len(running) >= self._threads:
            running[0].exception()  # waits: more of them would be more memory; what it raises is raised by `_finished`
        pieces, sizes = stream.pieces, [*stream.spilled_sizes, *(sizes for _, sizes in stream.pieces)]
        spilled, number = stream.spilled, stream.shards
        self._waiting -= stream.waiting
        stream.pieces, stream.spilled, stream.spilled_sizes, stream.waiting = [], None, [], 0
        stream.shards, stream.samples = number + 1, stream.samples + stream.count
        stream.count, stream.size, stream.oldest, stream.done = 0, self._writer.extra_bytes_per_shard, None, stream.last
        open_places = [other.oldest for other in self._streams.values() if other.oldest is not None]
        resume, rows = min([*open_places, (at, rows_before)], key=lambda place: place[0].unit)
        if self._pool is None:
            finished: Any = _write_shard(self._layout, stream.folder, number, spilled, pieces, sizes)
        else:
            finished = self._pool.submit(_write_shard, self._layout, stream.folder, number, spilled, pieces, sizes)
        self._pending.append((finished, stream, stream.last, resume, rows))

    def _finished(self, leave: int) -> Iterator[FinishedShard]:
        while self._pending:
            shard, stream, last, resume, rows = self._pending[0]
            if isinstance(shard, Future):
                if len(self._pending) <= leave and not shard.done():
                    return
                shard = shard.result()
            self._pending.popleft()
            yield FinishedShard(stream=stream.value, shard=shard, last=last, resume=resume, rows=rows)

    def _spill(self, stream: _Open) -> None:
        path = stream.spilled or self._work / "spill" / f"{list(self._streams).index(stream.value)}-{stream.shards}"
        with write_errors(path):
            path.parent.mkdir(exist_ok=True)
            with open(path, "ab") as file:
                for piece, _ in stream.pieces:
                    file.write(piece)
        stream.spilled = path
        stream.spilled_sizes += [sizes for _, sizes in stream.pieces]
        stream.spilled_sizes = [np.concatenate(stream.spilled_sizes)]
        self._waiting -= stream.waiting
        stream.pieces, stream.waiting = [], 0


def _write_shard(
    layout: Layout,
    folder: Path,
    number: int,
    spilled: Path | None,
    pieces: list[tuple[memoryview, np.ndarray]],
    sizes: list[np.ndarray],
) -> dict[str, Any]:
    """The shard's entry in the index, as `MDSWriter.flush_shard` makes it, once the shard is durable."""
    if spilled is not None:
        with write_errors(spilled):
            data = spilled.read_bytes()
        spilled_sizes = sizes[: len(sizes) - len(pieces)]
        pieces = [(memoryview(data), np.concatenate(spilled_sizes)), *pieces]
    writer = layout.writer()
    writer.new_samples = samples = []
    for piece, lengths in pieces:
        end = 0
        for length in lengths.tolist():
            samples.append(piece[end : end + length])
            end += length
    raw = writer.encode_joint_shard()
    writer.new_samples = []
    count = len(samples)
    del samples, pieces
    name = f"shard.{number:05}.{writer.format}"
    entry: dict[str, Any] = {"samples": count, "raw_data": _describe(layout, name, raw), "zip_data": None}
    if layout.compression:
        name = f"{name}.{get_compression_extension(layout.compression)}"
        raw = _compress(layout.compression, raw)
        entry["zip_data"] = _describe(layout, name, raw)
    path = folder / name
    with write_errors(path):
        with open(path, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        sync_file(folder)
        if spilled is not None:
            spilled.unlink()
    return entry | writer.get_config()


def _compress(how: str, data: bytes) -> bytes:
    name, _, level = how.partition(":")
    if name == "gz":  # Streaming's would have the time in its header, and so other bytes each time
        return gzip.compress(data, int(level or 9), mtime=0)
    return compress(how, data)


def _describe(layout: Layout, name: str, data: bytes) -> dict[str, Any]:
    return {
        "basename": name,
        "bytes": len(data),
        "hashes": {algorithm: get_hash(algorithm, data) for algorithm in layout.hashes},
    }
