"""From columns to Arrow bytes and digests, and back: the one place that knows how a value is laid out for hashing.

A column's canonical bytes (docs/log_format.md, "Digests"): values little-endian and contiguous, booleans as bits from the
lowest, a zero wherever the value is null; a nullable column's validity as bits from the lowest, set where the value is there.
These are also Arrow's own buffers, so that a batch is hashed and written from the same bytes.

Legend: n rows of a batch, d numbers of an embedding.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from udsstream.errors import ConfigError
from udsstream.selection_log.digest import content_digest, schema_digest

__all__ = ["EOS", "LINK_KEY", "Column", "Layout", "TableCodec", "ones", "row_bytes", "schema_message"]

assert sys.byteorder == "little", "the log is written and read on little-endian machines only"

LINK_KEY = b"link"
EOS = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True, kw_only=True)
class Column:
    """How one column of a schema is laid out."""

    name: str
    type: pa.DataType
    nullable: bool
    dtype: np.dtype | None  # of one number; None for booleans and for fixed-size binary
    width: int  # bytes of one value; 0 for booleans, which take a bit
    dim: int  # numbers per value: d for embeddings, else 1
    is_list: bool

    @staticmethod
    def of(field: pa.Field) -> Column:
        kind, dim = field.type, 1
        if pa.types.is_fixed_size_list(kind):
            kind, dim = field.type.value_type, field.type.list_size
        if pa.types.is_boolean(kind):
            dtype, width = None, 0
        elif pa.types.is_fixed_size_binary(kind):
            dtype, width = None, kind.byte_width
        else:
            dtype = np.dtype(kind.to_pandas_dtype())
            width = dtype.itemsize * dim
        return Column(
            name=field.name,
            type=field.type,
            nullable=field.nullable,
            dtype=dtype,
            width=width,
            dim=dim,
            is_list=pa.types.is_fixed_size_list(field.type),
        )

    @property
    def type_text(self) -> str:
        """The type's name in the schema digest."""
        if self.is_list:
            return f"{self.type.value_type}[{self.dim}]"
        return str(self.type)

    def value_bytes(self, rows: int) -> int:
        return (rows + 7) // 8 if self.width == 0 else rows * self.width


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a record batch of so many rows must look like in an IPC message."""

    nodes: list[int]  # each field node's length
    needs: np.ndarray  # (buffers,) int64: bytes that each buffer must hold
    validity: np.ndarray  # (buffers,) bool: which buffers are validity bits, left out when nothing is null
    node_of: np.ndarray  # (buffers,) int64: the field node that each buffer belongs to


def _layout(columns: tuple[Column, ...], rows: int) -> Layout:
    nodes: list[int] = []
    buffers: list[tuple[int, bool, int]] = []
    bits = (rows + 7) // 8
    for column in columns:
        nodes.append(rows)
        buffers.append((bits, True, len(nodes) - 1))
        if column.is_list:
            nodes.append(rows * column.dim)
            buffers.append(((rows * column.dim + 7) // 8, True, len(nodes) - 1))
        buffers.append((column.value_bytes(rows), False, len(nodes) - 1))
    needs, validity, node_of = zip(*buffers, strict=True)
    return Layout(
        nodes=nodes, needs=np.array(needs, np.int64), validity=np.array(validity), node_of=np.array(node_of, np.int64)
    )


def row_bytes(schema: pa.Schema) -> int:
    """Bytes of one row before compression, without validity and Arrow's framing."""
    return sum(max(Column.of(field).width, 1) for field in schema)


def schema_message(schema: pa.Schema) -> bytes:
    """The message that opens an IPC stream of this schema (with its metadata)."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema):
        pass
    data = sink.getvalue().to_pybytes()
    return data[: -len(EOS)] if data.endswith(EOS) else data


def _bits(flags: np.ndarray) -> bytes:
    return np.packbits(flags, bitorder="little").tobytes()


@functools.lru_cache(maxsize=64)
def ones(rows: int) -> bytes:
    """The validity bits of `rows` values that are all there."""
    whole, rest = divmod(rows, 8)
    return b"\xff" * whole + (bytes([(1 << rest) - 1]) if rest else b"")


class TableCodec:
    """Encodes and digests batches of one table. Holds the schema and a small cache; owns no file."""

    def __init__(self, table: str, schema: pa.Schema, version: int = 1) -> None:
        self.table = table
        self.version = version
        self.schema = schema
        self.columns = tuple(Column.of(field) for field in schema)
        self.schema_digest = schema_digest(table, version, [(c.name, c.type_text, c.nullable) for c in self.columns])
        # Which buffer of a record batch holds the steps: none of the columns before it is a list.
        self.step_buffer = 2 * schema.get_field_index("step") + 1
        self._names = {c.name for c in self.columns}
        self._prefix = len(schema_message(schema))
        self._absent_cache: dict[tuple[str, int], tuple[pa.Array, bytes, bytes]] = {}
        self._layouts: dict[int, Layout] = {}

    def layout(self, rows: int) -> Layout:
        """The lengths that the Arrow message of a batch of `rows` rows must have."""
        if rows not in self._layouts:
            if len(self._layouts) > 64:
                self._layouts.clear()
            self._layouts[rows] = _layout(self.columns, rows)
        return self._layouts[rows]

    # -- writing -------------------------------------------------------------------------------------------------

    def encode(self, columns: Mapping[str, Any], rows: int) -> tuple[pa.RecordBatch, bytes]:
        """A record batch of `rows` rows and its content digest. A nullable column that is not given is null throughout."""
        if unknown := columns.keys() - self._names:
            raise ConfigError(
                f"the table {self.table!r} has no column {', '.join(sorted(unknown))}; it has "
                f"{', '.join(c.name for c in self.columns)}"
            )
        arrays: list[pa.Array] = []
        pieces: list[bytes] = []
        for column in self.columns:
            given = columns.get(column.name)
            if given is None:
                array, validity, values = self._absent(column, rows)
            elif isinstance(given, int):
                assert column.dtype is not None
                value = given.to_bytes(column.width, "little", signed=True)
                array, validity, values = self._build(column, rows, value * rows, None)
            else:
                array, validity, values = self._from_numpy(column, given, rows)
            arrays.append(array)
            if column.nullable:
                pieces.append(validity)
            pieces.append(values)
        batch = pa.RecordBatch.from_arrays(arrays, schema=self.schema)
        return batch, content_digest(self.schema_digest, rows, pieces)

    def message(self, batch: pa.RecordBatch, link: bytes) -> memoryview:
        """The batch as one encapsulated IPC message that carries the chain's value after it."""
        sink = pa.BufferOutputStream()
        writer = pa.ipc.new_stream(sink, self.schema)
        writer.write_batch(batch, custom_metadata={LINK_KEY: link.hex()})
        return memoryview(sink.getvalue())[self._prefix :]

    def _absent(self, column: Column, rows: int) -> tuple[pa.Array, bytes, bytes]:
        if not column.nullable:
            raise ConfigError(f"the table {self.table!r} needs the column {column.name!r}, which was not given")
        key = (column.name, rows)
        if key not in self._absent_cache:
            if len(self._absent_cache) > 64:
                self._absent_cache.clear()
            self._absent_cache[key] = self._build(
                column, rows, bytes(column.value_bytes(rows)), np.zeros(rows, dtype=bool)
            )
        return self._absent_cache[key]

    def _from_numpy(self, column: Column, given: Any, rows: int) -> tuple[pa.Array, bytes, bytes]:
        valid = None
        if isinstance(given, np.ma.MaskedArray):
            mask = np.ma.getmaskarray(given)
            if mask.ndim == 2:
                mask = mask.any(axis=1)
            if mask.any():
                if not column.nullable:
                    raise ConfigError(f"column {column.name!r} of {self.table!r} may not be null, but rows are masked")
                valid = ~mask
            given = given.data
        if column.dtype is None and column.width > 0:
            data = b"".join(given)
            if len(given) != rows or len(data) != rows * column.width:
                raise ConfigError(f"column {column.name!r} needs {rows} values of {column.width} bytes")
            return self._build(column, rows, data, valid)
        values = np.asarray(given)
        shape = (rows, column.dim) if column.is_list else (rows,)
        if values.shape != shape:
            raise ConfigError(
                f"column {column.name!r} of {self.table!r} has shape {values.shape}, expected {shape}: "
                "every column has one value per row"
            )
        if column.dtype is None:
            if values.dtype != np.bool_:
                raise ConfigError(f"column {column.name!r} must be boolean, not {values.dtype}")
            if valid is not None:
                values = values & valid
            return self._build(column, rows, _bits(values), valid)
        if values.dtype != column.dtype:
            values = self._cast(column, values, valid)
        if valid is not None:
            values = np.where(valid if values.ndim == 1 else valid[:, None], values, column.dtype.type(0))
        return self._build(column, rows, values.tobytes(), valid)

    def _cast(self, column: Column, values: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
        assert column.dtype is not None
        kinds = "iuf" if column.dtype.kind == "f" else "iu"
        if values.dtype.kind not in kinds:
            raise ConfigError(
                f"column {column.name!r} of {self.table!r} holds {column.dtype}, and cannot take {values.dtype}"
            )
        if column.dtype.kind == "f":
            return values.astype(column.dtype)
        if valid is not None:  # what lies under a null may be anything
            values = np.where(valid, values, 0)
        cast = values.astype(column.dtype)
        if not np.array_equal(cast, values):
            raise ConfigError(f"column {column.name!r} of {self.table!r} has a value that does not fit {column.dtype}")
        return cast

    def _build(
        self, column: Column, rows: int, values: bytes, valid: np.ndarray | None
    ) -> tuple[pa.Array, bytes, bytes]:
        validity, buffer, nulls = b"", None, 0
        if valid is not None:
            validity = _bits(valid)
            buffer = pa.py_buffer(validity)
            nulls = rows - int(np.count_nonzero(valid))
        elif column.nullable:
            validity = ones(rows)
        data = pa.py_buffer(values)
        if column.is_list:
            child = pa.Array.from_buffers(column.type.value_type, rows * column.dim, [None, data])
            array = pa.Array.from_buffers(column.type, rows, [buffer], nulls, children=[child])
        else:
            array = pa.Array.from_buffers(column.type, rows, [buffer, data], nulls)
        return array, validity, values

    # -- reading -------------------------------------------------------------------------------------------------

    def canonical(self, table: pa.Table | pa.RecordBatch) -> list[tuple[Column, np.ndarray, np.ndarray | None]]:
        """Each column as (column, values with zeros at nulls, validity or None when all are there). Values are (n,) or (n, d)."""
        out = []
        for column in self.columns:
            array = table.column(column.name)
            if isinstance(array, pa.ChunkedArray):
                array = array.combine_chunks()
                if isinstance(array, pa.ChunkedArray):
                    array = pa.concat_arrays(array.chunks)
            out.append((column, *_to_numpy(column, array)))
        return out

    def batch_digests(self, table: pa.Table | pa.RecordBatch, starts: Sequence[int]) -> list[bytes]:
        """Content digests of the batches that begin at the rows `starts` (the first is 0) and end where the next begins."""
        columns = self.canonical(table)
        bounds = [*starts, table.num_rows]
        digests = []
        for start, stop in itertools.pairwise(bounds):
            pieces: list[bytes | memoryview] = []
            rows = stop - start
            for column, values, valid in columns:
                if column.nullable:
                    pieces.append(ones(rows) if valid is None else _bits(valid[start:stop]))
                part = values[start:stop]
                pieces.append(_bits(part) if column.width == 0 else part.tobytes())
            digests.append(content_digest(self.schema_digest, rows, pieces))
        return digests

    def reencode(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch as this codec would have written it: the same rows in canonical buffers."""
        columns: dict[str, Any] = {}
        for column, values, valid in self.canonical(batch):
            if column.dtype is None and column.width > 0:
                columns[column.name] = [row.tobytes() for row in values]
            elif valid is not None:
                mask = ~valid if values.ndim == 1 else np.broadcast_to(~valid[:, None], values.shape)
                columns[column.name] = np.ma.MaskedArray(values, mask=mask)
            else:
                columns[column.name] = values
        return self.encode(columns, batch.num_rows)[0]


def _to_numpy(column: Column, array: pa.Array) -> tuple[np.ndarray, np.ndarray | None]:
    valid = None
    if array.null_count:
        valid = array.is_valid().to_numpy(zero_copy_only=False)
    n, offset = len(array), array.offset
    if column.is_list:
        assert column.dtype is not None
        child = array.values.slice(offset * column.dim, n * column.dim)
        values = child.to_numpy(zero_copy_only=False).reshape(n, column.dim)
        if valid is not None:
            values = np.where(valid[:, None], values, column.dtype.type(0))
    elif column.dtype is None and column.width > 0:
        data = array.buffers()[1]
        flat = np.frombuffer(data, np.uint8, n * column.width, offset * column.width) if n else np.empty(0, np.uint8)
        values = flat.reshape(n, column.width)
        if valid is not None:
            values = np.where(valid[:, None], values, np.uint8(0))
    else:
        if valid is not None:
            array = array.fill_null(False if column.dtype is None else 0)
        values = array.to_numpy(zero_copy_only=False)
    return values, valid
