"""From files to blocks: cheap raw pieces of a source, in order, each with the place to begin reading again from.

Runs in the main process alone, so that rows keep their order whatever the number of workers. What a block's rows mean is told by `rows.py`.
A row that cannot even be cut out of its file comes as a `Bad`.
"""

from __future__ import annotations

import csv
import re
import sys
import tarfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from udsstream.errors import ConfigError, DataError
from udsstream.ingest.sources import CHUNK, HFName, Source, SourceFile, chunks, open_file

__all__ = ["Bad", "Block", "Position", "arrow_schema", "csv_header", "end_of", "hf_dataset", "read_blocks"]

RAW_KEPT = 1000
"""How much of a bad row's raw text is kept, in bytes."""
_ROWS = 256
"""The rows of a block, where they are counted and not measured."""


class Position(NamedTuple):
    """Where a block begins."""

    file: int
    """The file's number in the source."""
    at: int
    """Where in its content: a byte (JSONL, CSV), or a row, sample or file before it (the others)."""
    first: int
    """The number of the block's first line or row in its file, from 1."""
    unit: int
    """How many rows, blank lines among them, lie before it in the whole source."""


class Bad(NamedTuple):
    """What cannot be cut out of its file as a row."""

    reason: str
    raw: bytes
    """As much of it as is kept."""
    size: int
    """The bytes of all of it."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows that follow each other in one file."""

    start: Position
    units: int
    payload: Any
    """jsonl: whole lines. csv: (line, cells). webdataset: (key, members). parquet, hf: Arrow IPC. text: (path, location, size). Or Bad."""
    consumed: int
    """Bytes of the source read when this block was, for the progress bar; 0 where unknown."""


def read_blocks(source: Source, start: Position, max_row: int) -> Iterator[Block]:
    """The source from `start` on.

    Raises:
        DataError: a file is truncated, corrupt or unreadable. The blocks before were good.
    """
    if source.kind == "hf":
        assert source.hf is not None
        yield from _hf_blocks(source.hf, start)
        return
    if source.kind == "text":
        yield from _text_blocks(source, start)
        return
    read = {"jsonl": _jsonl_blocks, "csv": _csv_blocks, "parquet": _parquet_blocks, "webdataset": _tar_blocks}[
        source.kind
    ]
    unit, before = start.unit, sum(file.bytes for file in source.files[: start.file])
    for number in range(start.file, len(source.files)):
        file = source.files[number]
        begin = start if number == start.file else Position(number, 0, 1, unit)
        for block in read(file, begin, max_row):
            unit = block.start.unit + block.units
            yield Block(block.start, block.units, block.payload, before + min(block.consumed, file.bytes))
        before += file.bytes


def end_of(source: Source, unit: int) -> Position:
    """Behind the last row."""
    return Position(max(1, len(source.files)), 0, 1, unit)


# Lines --------------------------------------------------------------------------------------------------------------------


def _jsonl_blocks(file: SourceFile, start: Position, max_row: int) -> Iterator[Block]:
    number, at, first, unit = start
    held: list[bytes] = []
    size = 0  # of the line that is not at its end yet
    for chunk, consumed in chunks(file, at):
        end = chunk.rfind(b"\n") + 1
        if not end:
            size += len(chunk)
            if size <= max_row + CHUNK or not held:
                held.append(chunk)
            continue
        if size + chunk.find(b"\n") > max_row + CHUNK:  # too long to be kept whole
            cut = chunk.find(b"\n") + 1
            yield Block(Position(number, at, first, unit), 1, _overlong(held[0], size + cut - 1, max_row), consumed)
            at, first, unit, held, size = at + size + cut, first + 1, unit + 1, [], 0
            chunk, end = chunk[cut:], end - cut
        payload = b"".join([*held, chunk[:end]])
        if payload:
            lines = payload.count(b"\n")
            yield Block(Position(number, at, first, unit), lines, payload, consumed)
            at, first, unit = at + len(payload), first + lines, unit + lines
        held, size = ([chunk[end:]], len(chunk) - end) if end < len(chunk) else ([], 0)
    if size:
        last = _overlong(held[0], size, max_row) if size > max_row + CHUNK else b"".join(held)
        yield Block(Position(number, at, first, unit), 1, last, file.bytes)


def _overlong(begin: bytes, size: int, max_row: int) -> Bad:
    return Bad(f"the line has {size} bytes, more than --max-row-size {max_row}", begin[:RAW_KEPT], size)


# CSV ----------------------------------------------------------------------------------------------------------------------


class _Lines:
    """Lines for `csv.reader`, with their place, and a way back when a record turns out bad."""

    def __init__(self, file: SourceFile, at: int, line: int, max_row: int) -> None:
        self.at, self.line, self.consumed = at, line, 0
        self.record: list[bytes] = []
        self.size = 0
        """Bytes of the record so far, those that were not kept among them."""
        self._max_row = max_row
        self._again: deque[bytes] = deque()
        self._source = self._read(file, at)

    def _read(self, file: SourceFile, at: int) -> Iterator[bytes]:
        rest = b""
        for chunk, self.consumed in chunks(file, at):
            whole, newline, after = chunk.rpartition(b"\n")
            if not newline:
                rest += chunk
                if len(rest) > self._max_row:  # in pieces; the record is refused below
                    yield rest
                    rest = b""
                continue
            for line in (rest + whole).split(b"\n"):
                yield line + b"\n"
            rest = after
        if rest:
            yield rest

    def begin(self) -> None:
        """The next record begins here."""
        self.at += self.size
        self.line += sum(line.endswith(b"\n") for line in self.record)
        self.record, self.size = [], 0

    def give_back(self) -> None:
        """The record was bad: the lines after its first are read anew, and its first to its end."""
        self._again.extendleft(reversed(self.record[1:]))
        self.record = self.record[:1]
        self.size = len(self.record[0])
        while not self.record[-1].endswith(b"\n") and (piece := self._next()):
            self.record[1:] = [piece]
            self.size += len(piece)

    def _next(self) -> bytes:
        return self._again.popleft() if self._again else next(self._source, b"")

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if not (line := self._next()):
            raise StopIteration
        self.record.append(line)
        self.size += len(line)
        if self.size > self._max_row:
            raise _TooLong
        if self.at == 0 and line.startswith(b"\xef\xbb\xbf") and len(self.record) == 1:
            line = line[3:]
        return line.decode("utf-8", "surrogateescape")


class _TooLong(Exception):
    pass


def _delimiter(file: SourceFile) -> str:
    return "\t" if ".tsv" in file.location.lower()[-8:] else ","


def csv_header(file: SourceFile, max_row: int) -> list[str]:
    """The column names, from the first record."""
    return _csv_open(file, max_row)[1]


def _csv_open(file: SourceFile, max_row: int) -> tuple[_Lines, list[str]]:
    csv.field_size_limit(min(sys.maxsize, max(max_row, 131072)))
    lines = _Lines(file, 0, 1, max_row)
    try:
        header = next(csv.reader(lines, strict=True, delimiter=_delimiter(file)))
    except StopIteration:
        raise DataError(f"{file.name} is empty: a CSV file begins with a line of column names") from None
    except (csv.Error, _TooLong) as error:
        raise DataError(f"{file.name}: the first line is no CSV header ({error})") from None
    names = [name for name in header if header.count(name) > 1]
    if names:
        raise DataError(
            f"{file.name}: the header has the column {names[0]!r} {header.count(names[0])} times, one would overwrite another: rename it"
        )
    if any("\udc80" <= letter <= "\udcff" for name in header for letter in name):
        raise DataError(f"{file.name}: the header is not UTF-8; convert the file first")
    if not header or "" in header:
        raise DataError(
            f"{file.name}: column {header.index('') + 1 if header else 1} of the header has no name; name it"
        )
    return lines, header


def _csv_blocks(file: SourceFile, start: Position, max_row: int) -> Iterator[Block]:
    lines, header = _csv_open(file, max_row)
    number, at, first, unit = start
    if at:
        lines = _Lines(file, at, first, max_row)
    else:
        lines.begin()
    delimiter = _delimiter(file)
    payload: list[Any] = []
    begin, size = Position(number, lines.at, lines.line, unit), 0
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            break
        except (csv.Error, _TooLong) as error:
            large = f"the row is larger than --max-row-size {max_row}" if isinstance(error, _TooLong) else ""
            reason = f"not CSV: {large or error}"
            if len(lines.record) > 1:
                reason = f"not CSV: a quote is opened on this line and not closed as it should ({large or error})"
            lines.give_back()
            row: Any = _bad_record(lines, reason)
            reader = csv.reader(lines, strict=True, delimiter=delimiter)
        else:
            row = cells
            if cells and len(cells) != len(header):
                row = _bad_record(lines, f"{len(cells)} cells, but the header has {len(header)} columns")
        payload.append((lines.line, row))
        size += min(lines.size, CHUNK)
        lines.begin()
        if size >= CHUNK >> 1:
            yield Block(begin, len(payload), (header, payload), lines.consumed)
            unit += len(payload)
            payload, size, begin = [], 0, Position(number, lines.at, lines.line, unit)
    if payload:
        yield Block(begin, len(payload), (header, payload), file.bytes)


def _bad_record(lines: _Lines, reason: str) -> Bad:
    return Bad(reason, b"".join(lines.record)[:RAW_KEPT], lines.size)


# Arrow --------------------------------------------------------------------------------------------------------------------


def _parquet(file: SourceFile) -> Any:
    import pyarrow.parquet as pq

    raw = open_file(file)
    try:
        return pq.ParquetFile(raw, pre_buffer=False, buffer_size=CHUNK)
    except Exception as error:
        raw.close()
        raise DataError(
            f"{file.name} cannot be read as Parquet ({file.bytes} bytes): {error}; a file without its end was not copied whole"
        ) from error


def arrow_schema(file: SourceFile) -> tuple[Any, dict[str, bool]]:
    """The schema of a Parquet file, and for each column whether its statistics say that it has no null."""
    parquet = _parquet(file)
    with parquet:
        schema, meta = parquet.schema_arrow, parquet.metadata
        full = {}
        paths = {meta.schema.column(i).path: i for i in range(len(meta.schema))}
        for name in schema.names:
            index = paths.get(name)
            stats = (
                [meta.row_group(g).column(index).statistics for g in range(meta.num_row_groups)]
                if index is not None
                else [None]
            )
            full[name] = all(s is not None and s.has_null_count and s.null_count == 0 for s in stats)
    return schema, full


def _parquet_blocks(file: SourceFile, start: Position, max_row: int) -> Iterator[Block]:
    number, at, _, unit = start
    parquet, passed = _parquet(file), 0
    try:
        with parquet:
            meta = parquet.metadata
            for group in range(meta.num_row_groups):
                rows = meta.row_group(group).num_rows
                if passed + rows <= at:
                    passed += rows
                    continue
                size = max(1, min(4096, rows * (CHUNK >> 1) // max(1, meta.row_group(group).total_byte_size)))
                for batch in parquet.iter_batches(batch_size=size, row_groups=[group], use_threads=False):
                    row, passed = passed, passed + batch.num_rows
                    if passed <= at:
                        continue
                    batch, row = (batch.slice(at - row), at) if row < at else (batch, row)
                    yield Block(
                        Position(number, row, row + 1, unit),
                        batch.num_rows,
                        _ipc(batch),
                        file.bytes * passed // meta.num_rows,
                    )
                    unit += batch.num_rows
    except (DataError, GeneratorExit):
        raise
    except Exception as error:
        raise DataError(
            f"{file.name} cannot be read after row {passed}: {error}; get it again, and begin anew"
        ) from error


def _ipc(batch: Any) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema.remove_metadata()) as writer:
        writer.write_batch(batch.replace_schema_metadata(None))
    return sink.getvalue().to_pybytes()


def hf_dataset(name: HFName) -> Any:
    """A `Dataset` or `IterableDataset` that yields Arrow tables; code that comes with a data set is not run.

    Raises:
        DataError: it cannot be had.
    """
    import datasets

    folder = Path(name.path)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found: Any = datasets.load_from_disk(name.path)
        else:
            safe: dict[str, Any] = {"trust_remote_code": False} if int(datasets.__version__.split(".")[0]) < 4 else {}
            found = datasets.load_dataset(name.path, name.config, split=name.split, streaming=True, **safe)
        if isinstance(found, dict):
            split = name.split or ("train" if "train" in found else next(iter(found)) if len(found) == 1 else None)
            if split not in found:
                raise ConfigError(
                    f"hf:{name.path} has the splits {', '.join(found)}: name one, as in "
                    f"hf:{name.path}:{name.config or ''}:{next(iter(found))}"
                )
            found = found[split]
        return found.with_format("arrow")
    except ConfigError:
        raise
    except Exception as error:
        raise DataError(
            f"hf:{name.path} (config {name.config or 'default'}, split {name.split or 'train'}) cannot be read: "
            f"{type(error).__name__}: {error}; check the name and the network, or name a local folder"
        ) from error


def _hf_blocks(name: HFName, start: Position) -> Iterator[Block]:
    if start.file:
        return
    dataset = hf_dataset(name)
    at, unit = start.at, start.unit
    try:
        if at:
            dataset = dataset.select(range(at, len(dataset))) if hasattr(dataset, "select") else dataset.skip(at)
        for table in dataset.iter(batch_size=_ROWS):
            for batch in table.combine_chunks().to_batches():
                yield Block(Position(0, at, at + 1, unit), batch.num_rows, _ipc(batch), 0)
                at, unit = at + batch.num_rows, unit + batch.num_rows
    except (DataError, GeneratorExit):
        raise
    except Exception as error:
        raise DataError(
            f"hf:{name.path} cannot be read after row {at}: {type(error).__name__}: {error}; run the same command again to go on from there"
        ) from error


# Tar ----------------------------------------------------------------------------------------------------------------------


class _Content:
    """The decompressed tar as tarfile's stream mode reads it; remembers its end, to see whether an end marker was there."""

    def __init__(self, file: SourceFile) -> None:
        self._pieces, self._rest, self._last = chunks(file), memoryview(b""), b""
        self.position = self.consumed = 0

    def read(self, size: int) -> bytes:
        parts = []
        while size:
            if not self._rest:
                piece, self.consumed = next(self._pieces, (b"", self.consumed))
                if not piece:
                    break
                self._rest = memoryview(piece)
            parts.append(bytes(self._rest[:size]))
            self._rest = self._rest[size:]
            size -= len(parts[-1])
        data = b"".join(parts)
        self.position += len(data)
        self._last = (self._last + data)[-(1 << 16) :]
        return data

    def block_at(self, offset: int) -> bytes:
        begin = offset - (self.position - len(self._last))
        return self._last[begin : begin + 512] if begin >= 0 else b""


def _tar_members(file: SourceFile, max_row: int, loose: list[Bad], content: _Content) -> Iterator[dict[str, Any]]:
    from webdataset.tariterators import base_plus_ext

    try:
        with tarfile.open(fileobj=content, mode="r|", bufsize=512 * 64) as tar:  # type: ignore[call-overload]
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                name = member.name
                if member.isdir() or ("/" not in name and name.startswith("__")) or re.match(r"__[^/]*__($|/)", name):
                    continue  # metadata, as webdataset has it
                if not member.isreg():
                    loose.append(
                        Bad(
                            "not a file but a link or device, which is not followed", name.encode("utf-8", "replace"), 0
                        )
                    )
                elif base_plus_ext(name)[0] is None:
                    loose.append(
                        Bad(
                            "the name has no ending, so that it belongs to no sample",
                            name.encode("utf-8", "replace"),
                            member.size,
                        )
                    )
                elif member.size > max_row:
                    yield {"fname": name, "data": member.size, "__url__": file.name}
                else:
                    extracted = tar.extractfile(member)
                    assert extracted is not None
                    data = extracted.read()
                    if len(data) != member.size:
                        raise tarfile.ReadError("unexpected end of data")
                    yield {"fname": name, "data": data, "__url__": file.name}
            end = content.block_at(tar.offset)  # type: ignore[attr-defined]
        if len(end) < 512 or end.strip(b"\0"):
            what = "a header is damaged" if len(end) == 512 else "it has no end marker, so that members may be missing"
            raise tarfile.ReadError(what)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{file.name} is no whole tar: {error} (at byte {content.position} of its content); get it again, and begin anew"
        ) from error


def _tar_blocks(file: SourceFile, start: Position, max_row: int) -> Iterator[Block]:
    from webdataset.tariterators import group_by_keys

    number, at, _, unit = start
    content, loose, twice = _Content(file), [], []
    samples = group_by_keys(
        _tar_members(file, max_row, loose, content), handler=lambda error: not twice.append(str(error.args[0]))
    )
    payload: list[Any] = []
    size, seen = 0, 0
    begin = Position(number, at, at + 1, unit)

    def rows() -> Iterator[Any]:
        for sample in samples:
            key = sample.pop("__key__")
            sample.pop("__url__", None)
            large = next(((ext, data) for ext, data in sample.items() if isinstance(data, int)), None)
            if twice:
                yield (key, Bad(f"sample {key!r}: {twice[0].split(' dict_keys')[0]}", b"", 0))
                twice.clear()
            elif large:
                yield (
                    key,
                    Bad(f"member .{large[0]} has {large[1]} bytes, more than --max-row-size {max_row}", b"", large[1]),
                )
            else:
                yield (key, sample)
            while loose:
                yield (None, loose.pop(0))
        while loose:
            yield (None, loose.pop(0))

    for row in rows():
        seen += 1
        if seen <= at:
            continue
        payload.append(row)
        size += 0 if isinstance(row[1], Bad) else sum(map(len, row[1].values()))
        if size >= CHUNK >> 1 or len(payload) >= _ROWS:
            yield Block(begin, len(payload), payload, content.consumed)
            unit += len(payload)
            payload, size, begin = [], 0, Position(number, seen, seen + 1, unit)
    if payload:
        yield Block(begin, len(payload), payload, file.bytes)


# Text files ---------------------------------------------------------------------------------------------------------------


def _text_blocks(source: Source, start: Position) -> Iterator[Block]:
    payload: list[tuple[str, str, int]] = []
    size, consumed = 0, sum(file.bytes for file in source.files[: start.file])
    begin = start
    for number in range(start.file, len(source.files)):
        file = source.files[number]
        payload.append((file.name, file.location, file.bytes))
        size += file.bytes
        consumed += file.bytes
        if size >= CHUNK >> 1 or len(payload) >= _ROWS:
            yield Block(begin, len(payload), payload, consumed)
            payload, size, begin = [], 0, Position(number + 1, 0, 1, begin.unit + len(payload))
    if payload:
        yield Block(begin, len(payload), payload, consumed)
