"""From a row to the bytes of its MDS sample: which column is stored how, and why a value does not fit.

The bytes are those of `streaming.MDSWriter.encode_sample` (compared in tests); values are checked first, because MDS would store some of
another type without a word. Everything here is a pure function of the plan and the row, and runs in the workers.
"""

from __future__ import annotations

import json
import re
import struct
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from udsstream.ingest.readers import Bad, Block
from udsstream.ingest.rows import parse, parse_json, raw_of, where
from udsstream.ingest.sources import Kind

__all__ = ["BadValueError", "Column", "Encoded", "Plan", "RowEncoder", "encode_block", "stream_value"]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the result."""

    name: str
    source: tuple[str, ...]
    """Where its value stands in a row: a key, or keys of objects in objects."""
    encoding: str
    """As MDS names it."""
    role: str = ""
    """`text` or `messages` where `udsstream.sft` will read it; its values are held to that."""
    optional: bool = False
    """A row without it has null."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How rows become samples; picklable."""

    kind: Kind
    columns: tuple[Column, ...]
    """By name, as MDS orders them."""
    known: frozenset[str] | None
    """Keys that a row may have. None: others are left out, as was asked for."""
    stream_by: tuple[str, ...] | None
    max_row: int
    """Bytes of a row, raw and encoded."""
    names: tuple[str, ...] = ()
    """The files' names."""

    def mds_columns(self) -> dict[str, str]:
        return {column.name: column.encoding for column in self.columns}


class BadValueError(ValueError):
    """Why a row cannot be stored; not for users, whom rejects and `DataError` reach."""


# Values -------------------------------------------------------------------------------------------------------------------


def _type_name(value: Any) -> str:
    names = {
        str: "a string",
        bool: "true or false",
        int: "an integer",
        float: "a float",
        bytes: "binary",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _other(value: Any, expected: str) -> BadValueError:
    return BadValueError(f"{_type_name(value)}, expected {expected}")


def _str(value: Any) -> bytes:
    if type(value) is not str:
        raise _other(value, "a string")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise BadValueError(
            f"a lone surrogate {value[error.start]!a} at character {error.start + 1}: no Unicode text, and UTF-8 has no form for it"
        ) from None


def _bytes(value: Any) -> bytes:
    if type(value) is not bytes:
        raise _other(value, "binary")
    return value


def _int(value: Any) -> bytes:
    if type(value) is not int:
        raise _other(value, "an integer")
    try:
        return struct.pack("<q", value)
    except struct.error:
        raise BadValueError(f"{_brief(value)} is no 64-bit integer (--column NAME=str_int stores any)") from None


def _float64(value: Any) -> bytes:
    if type(value) is not float and (type(value) is not int or abs(value) > 1 << 53):
        raise _other(value, "a float")
    return struct.pack("<d", value)


def _str_int(value: Any) -> bytes:
    if type(value) is not int:
        raise _other(value, "an integer")
    return str(value).encode()


def _json(value: Any) -> bytes:
    try:
        text = json.dumps(value)
    except TypeError as error:
        raise BadValueError(f"it holds what JSON cannot ({error})") from None
    except RecursionError:
        raise BadValueError("nested too deep") from None
    if "\\ud" in text:  # most are halves of a pair
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadValueError("it holds a lone surrogate, which is no Unicode text") from None
    return text.encode()


def _messages(value: Any) -> bytes:
    if type(value) is str:
        try:
            _check_messages(parse_json(value))
        except ValueError as error:
            raise BadValueError(str(error)) from None
        return _str(value)
    _check_messages(value)
    return _json(value)


def _check_messages(value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise BadValueError(
            f'{"an empty list" if value == [] else _type_name(value)}, expected a list of {{"role": …, "content": …}}'
        )
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise BadValueError(f'message {i} is not {{"role": …, "content": …}}')
        if not isinstance(message["content"], str) and not (message["content"] is None and message.get("tool_calls")):
            raise BadValueError(f"message {i}: 'content' is {_type_name(message['content'])}, expected a string")


def _brief(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 200 else "an integer of more than 200 bits"
    return text if len(text) <= 60 else text[:60] + "…"


_FAST: dict[str, Callable[[Any], bytes]] = {
    "str": _str, "bytes": _bytes, "int": _int, "float64": _float64, "str_int": _str_int, "json": _json,
}  # fmt: skip
_SIZES = {"int": 8, "float64": 8}
_NUMBER = re.compile(r"(u?int|float)(8|16|32|64)|str_float|str_decimal")


def encoder(encoding: str) -> tuple[Callable[[Any], bytes], int | None]:
    """value -> its bytes, and their number where it is fixed."""
    if encoding in _FAST:
        return _FAST[encoding], _SIZES.get(encoding)
    import numpy as np
    from streaming.base.format.mds.encodings import get_mds_encoded_size, mds_encode

    dtype = np.dtype(encoding) if _NUMBER.fullmatch(encoding) and not encoding.startswith("str") else None

    def encode(value: Any) -> bytes:
        if dtype is not None:
            integer = dtype.kind in "iu"
            if type(value) is not int and (integer or type(value) is not float):
                raise _other(value, "an integer" if integer else "a number")
            if integer and not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
                raise BadValueError(f"{_brief(value)} does not fit {encoding}")
        try:
            if encoding.startswith("ndarray"):
                value = _array(value, encoding)
            elif encoding == "str_float" and type(value) is int:
                value = float(value)
            return mds_encode(encoding, value)
        except BadValueError:
            raise
        except Exception as error:  # whatever Streaming's encodings raise is about this value
            raise BadValueError(f"{_type_name(value)} cannot be stored as {encoding}: {error}") from None

    return encode, get_mds_encoded_size(encoding)


def _array(value: Any, encoding: str) -> Any:
    import numpy as np

    if not isinstance(value, list):
        raise _other(value, "a list of numbers")
    dtype = encoding.split(":")[1] if ":" in encoding else None
    array = np.array(value)
    if array.dtype.kind not in "iuf":
        raise BadValueError("expected a list of numbers of one length")
    converted = array if dtype is None else array.astype(dtype)
    if not np.array_equal(converted, array, equal_nan=array.dtype.kind == "f") and np.dtype(dtype).kind in "iu":
        raise BadValueError(f"a number in it does not fit {dtype}")
    return converted


def from_text(encoding: str) -> Callable[[str], Any]:
    """The cell of a CSV file -> the value that its encoding takes."""

    def convert(text: str) -> Any:
        try:
            if encoding == "bytes":
                return text.encode()
            if encoding in ("int", "str_int") or re.fullmatch(r"u?int\d+", encoding):
                if not re.fullmatch(r"\s*[+-]?\d+\s*", text):
                    raise ValueError
                return int(text)
            if encoding.startswith("float") or encoding == "str_float":
                return float(text)
            if encoding == "str_decimal":
                from decimal import Decimal, InvalidOperation

                try:
                    return Decimal(text)
                except InvalidOperation:
                    raise ValueError from None
            return parse_json(text) if encoding == "json" or encoding.startswith("ndarray") else text
        except ValueError as error:
            raise BadValueError(
                f"{_brief(text)} is no {encoding}" + (f" ({error})" if encoding == "json" else "")
            ) from None

    return convert


# Rows ---------------------------------------------------------------------------------------------------------------------


def stream_value(value: Any) -> str:
    """The stream that a row belongs to, by the value of its column."""
    if type(value) is str:
        return value
    if type(value) is int or type(value) is bool:
        return json.dumps(value)
    raise BadValueError(f"{_type_name(value)}, and no string, integer or true and false that could name a stream")


def find(row: dict[str, Any], path: tuple[str, ...]) -> Any:
    """The value at a path of keys; KeyError where there is none."""
    value: Any = row
    for key in path:
        if type(value) is not dict:
            raise KeyError(key)
        value = value[key]
    return value


class RowEncoder:
    """A plan, made ready."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._columns = []
        variable = 0
        for column in plan.columns:
            encode, size = encoder(column.encoding)
            variable += size is None
            if column.role == "messages":
                encode = _messages
            elif plan.kind == "csv" and column.encoding != "str":
                encode = _converted(from_text(column.encoding), encode)
            key = column.source[0] if len(column.source) == 1 else None
            self._columns.append((column, key, encode, size is None))
        self._head = struct.Struct(f"<{variable}I").pack
        self._known = plan.known

    def encode(self, row: dict[str, Any]) -> tuple[bytes, str]:
        """The sample's bytes and its stream.

        Raises:
            BadValueError: the row does not fit the plan.
        """
        if self._known is not None and not row.keys() <= self._known:
            extra = sorted(row.keys() - self._known)
            raise BadValueError(
                f"it has the column {extra[0]!r}, which the first rows have not "
                f"(--column {extra[0]}=json keeps it, --drop or --only-mapped leaves it out)"
            )
        data, sizes = [], []
        for column, key, encode, variable in self._columns:
            try:
                datum = encode(row[key] if key is not None else find(row, column.source))
            except BadValueError as error:
                raise BadValueError(f"column {'.'.join(column.source)!r}: {error}") from None
            except KeyError:
                if not column.optional:
                    raise BadValueError(
                        f"the column {'.'.join(column.source)!r} is missing; the row has {_keys(row)}"
                    ) from None
                datum = encode(None)
            if variable:
                sizes.append(len(datum))
            data.append(datum)
        try:
            sample = self._head(*sizes) + b"".join(data)
        except struct.error:
            raise BadValueError("a value has more bytes than MDS can count") from None
        if len(sample) > self._plan.max_row:
            raise BadValueError(f"the row takes {len(sample)} bytes, more than --max-row-size {self._plan.max_row}")
        stream = ""
        if self._plan.stream_by is not None:
            try:
                stream = stream_value(find(row, self._plan.stream_by))
            except KeyError:
                raise BadValueError(
                    f"the column {'.'.join(self._plan.stream_by)!r}, naming its stream, is missing"
                ) from None
            except BadValueError as error:
                raise BadValueError(f"column {'.'.join(self._plan.stream_by)!r} names its stream: {error}") from None
        return sample, stream


def _converted(convert: Callable[[str], Any], encode: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    return lambda value: encode(convert(value))


def _keys(row: dict[str, Any]) -> str:
    names = [repr(name) for name in row]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "no columns"


class Samples(NamedTuple):
    """Encoded samples of one stream, in order."""

    data: bytes
    sizes: array[int]
    """Bytes of each."""
    offsets: array[int]
    """Of each its row's offset in the block."""


@dataclass
class Encoded:
    """What became of a block."""

    streams: dict[str, Samples] = field(default_factory=dict)
    """By the stream's value, in the order of first appearance."""
    rows: int = 0
    rejects: list[dict[str, Any]] = field(default_factory=list)


def encode_block(encoder: RowEncoder, plan: Plan, block: Block) -> Encoded:
    """All rows of a block, each in its stream or among the rejects."""
    found = Encoded()
    streams: dict[str, tuple[list[bytes], array[int], array[int]]] = {}
    encode = encoder.encode
    for offset, row in parse(plan.kind, block, plan.max_row):
        found.rows += 1
        if type(row) is dict:
            try:
                sample, stream = encode(row)
            except BadValueError as error:
                row = Bad(str(error), *raw_of(plan.kind, block, offset, row))
            else:
                if (held := streams.get(stream)) is None:
                    held = streams[stream] = ([], array("I"), array("I"))
                held[0].append(sample)
                held[1].append(len(sample))
                held[2].append(offset)
                continue
        assert isinstance(row, Bad)
        found.rejects.append(_reject(plan, block, offset, row))
    found.streams = {
        stream: Samples(b"".join(data), sizes, offsets) for stream, (data, sizes, offsets) in streams.items()
    }
    return found


def _reject(plan: Plan, block: Block, offset: int, bad: Bad) -> dict[str, Any]:
    if plan.kind == "text":
        source = block.payload[offset][0]
    else:
        source = plan.names[block.start.file]
    reject = {"row": block.start.unit + offset + 1, "source": source}
    if plan.kind == "jsonl" or not isinstance(block.payload, Bad):
        reject |= where(plan.kind, block, offset)
    reject |= {"reason": bad.reason, "raw": bad.raw.decode("utf-8", "backslashreplace"), "raw_bytes": bad.size}
    return reject | ({"shortened": True} if bad.size > len(bad.raw) else {})
