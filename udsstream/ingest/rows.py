"""From blocks to rows: what each row of a block holds, as Python values, or why it cannot be told.

Runs in the workers. Nothing is unpickled: members of a WebDataset with such endings stay bytes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from udsstream.ingest.readers import RAW_KEPT, Bad, Block
from udsstream.ingest.sources import Kind

__all__ = ["parse", "raw_of", "where"]

Row = dict[str, Any]

_TEXT = frozenset({"txt", "text", "transcript"})
_JSON = frozenset({"json", "jsn"})
_INT = frozenset({"cls", "cls2", "class", "count", "index", "inx", "id"})
"""WebDataset's endings, with webdataset's meaning of them."""


def parse(kind: Kind, block: Block, max_row: int) -> Iterator[tuple[int, Row | Bad]]:
    """The block's rows with their offsets in it; blank lines are no rows."""
    if isinstance(block.payload, Bad):
        yield 0, block.payload
    elif kind == "jsonl":
        yield from _jsonl(block, max_row)
    elif kind == "csv":
        yield from _csv(block)
    elif kind == "webdataset":
        yield from _samples(block)
    elif kind == "text":
        yield from _texts(block, max_row)
    else:
        yield from _arrow(block)


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return row


_decode = json.JSONDecoder(object_pairs_hook=_unique).decode


def parse_json(text: str) -> Any:
    """JSON whose objects have each key once.

    Raises:
        ValueError: with a reason that can be shown.
    """
    try:
        return _decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON that can be kept: {error}") from None


def _jsonl(block: Block, max_row: int) -> Iterator[tuple[int, Row | Bad]]:
    payload: bytes = block.payload
    if block.start.at == 0:
        payload = payload.removeprefix(b"\xef\xbb\xbf")
    for offset, line in enumerate(payload.split(b"\n")):
        if not line or line.isspace():
            continue
        if len(line) > max_row:
            yield (
                offset,
                Bad(f"the line has {len(line)} bytes, more than --max-row-size {max_row}", line[:RAW_KEPT], len(line)),
            )
            continue
        try:
            row = parse_json(line.decode())
            if type(row) is not dict:
                raise ValueError(f"not a JSON object with named columns but {_kind_of(row)}")
        except UnicodeDecodeError as error:
            yield (
                offset,
                Bad(
                    f"not UTF-8: byte {error.start + 1} of the line is {line[error.start]:#04x}",
                    line[:RAW_KEPT],
                    len(line),
                ),
            )
        except ValueError as error:
            yield offset, Bad(str(error), line[:RAW_KEPT], len(line))
        else:
            yield offset, row


def _kind_of(value: Any) -> str:
    return {list: "a list", str: "a string", type(None): "null", bool: "true or false"}.get(type(value), "a number")


def _csv(block: Block) -> Iterator[tuple[int, Row | Bad]]:
    header, records = block.payload
    for offset, (_, cells) in enumerate(records):
        if isinstance(cells, Bad):
            yield offset, cells
        elif cells:
            joined = "".join(cells)
            if not joined.isascii() and any("\udc80" <= letter <= "\udcff" for letter in joined):
                raw = joined.encode("utf-8", "surrogateescape")
                yield offset, Bad("not UTF-8: convert the file first", raw[:RAW_KEPT], len(raw))
            else:
                yield offset, dict(zip(header, cells, strict=True))


def _samples(block: Block) -> Iterator[tuple[int, Row | Bad]]:
    for offset, (key, members) in enumerate(block.payload):
        if isinstance(members, Bad):
            yield offset, members
            continue
        row: Row = {"__key__": key}
        try:
            for ending, data in members.items():
                kind = ending.rpartition(".")[2]
                try:
                    if kind in _TEXT:
                        row[ending] = data.decode()
                    elif kind in _JSON:
                        row[ending] = parse_json(data.decode())
                    elif kind in _INT:
                        row[ending] = int(data)
                    else:
                        row[ending] = data
                except ValueError as error:
                    why = f"not UTF-8 at byte {error.start + 1}" if isinstance(error, UnicodeDecodeError) else error
                    raise ValueError(f"member .{ending}: {why}") from None
        except ValueError as error:
            yield offset, Bad(f"sample {key!r}, {error}", *_shown(members))
        else:
            yield offset, row


def _texts(block: Block, max_row: int) -> Iterator[tuple[int, Row | Bad]]:
    for offset, (name, location, size) in enumerate(block.payload):
        if size > max_row:
            yield offset, Bad(f"the file has {size} bytes, more than --max-row-size {max_row}", b"", size)
            continue
        data = b""
        try:
            if "://" in location:
                from fsspec.core import url_to_fs

                system, path = url_to_fs(location)
                opened: Any = system.open(path, "rb")
            else:
                opened = open(location, "rb")  # noqa: SIM115 (closed below)
            with opened as file:
                data = file.read(max_row + 1)
            yield offset, {"path": name, "text": data.decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            yield (
                offset,
                Bad(f"not UTF-8: byte {error.start + 1} is {data[error.start]:#04x}", data[:RAW_KEPT], len(data)),
            )
        except OSError as error:
            yield offset, Bad(f"cannot be read: {error.strerror or error}", b"", size)


def _arrow(block: Block) -> Iterator[tuple[int, Row | Bad]]:
    import pyarrow as pa
    import pyarrow.compute as pc

    table = pa.ipc.open_stream(block.payload).read_all()
    columns = []
    for column in table.columns:
        if pa.types.is_temporal(column.type):  # as ISO 8601 text, to the last digit
            column = pc.cast(column, pa.string())
        columns.append(column.to_pylist())
    names = table.column_names
    for offset, values in enumerate(zip(*columns, strict=True)):
        yield offset, dict(zip(names, values, strict=True))


# Where a row stands, and its raw text, for rejects ------------------------------------------------------------------------


def where(kind: Kind, block: Block, offset: int) -> dict[str, Any]:
    """What finds the row in its source again, beside the file's name."""
    if kind == "jsonl":
        return {"line": block.start.first + offset}
    if kind == "csv":
        return {"line": block.payload[1][offset][0]}
    if kind == "webdataset":
        return {"sample": block.start.first + offset, "key": block.payload[offset][0]}
    if kind == "text":
        return {}
    return {"source_row": block.start.first + offset}


def raw_of(kind: Kind, block: Block, offset: int, row: Row) -> tuple[bytes, int]:
    """The beginning of the row's raw text, and the bytes of all of it. Of CSV and Arrow: its values, written anew."""
    if kind == "jsonl":
        line = block.payload.split(b"\n")[offset]
        return line[:RAW_KEPT], len(line)
    if kind == "csv":
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="").writerow(row.values())
        raw = text.getvalue().encode("utf-8", "surrogateescape")
        return raw[:RAW_KEPT], len(raw)
    return _shown(row)


def _shown(row: Row) -> tuple[bytes, int]:
    raw = json.dumps(row, ensure_ascii=False, default=repr).encode("utf-8", "backslashreplace")
    return raw[:RAW_KEPT], len(raw)
