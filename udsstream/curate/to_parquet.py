"""Samples as Parquet: row groups of at most 16 MiB of samples, with checksums on pages.

Text, integers, floats and bytes have their types. A JSON value is a string of JSON, its bytes as the stream has them. An array is a list
of numbers, nested by its dimensions, whose number must be the same in all samples. A number without limit is a string of its digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from udsstream.curate.columns import Column, decode, decoder
from udsstream.curate.formats import Compression, Row
from udsstream.errors import DataError

__all__ = ["arrow_type", "check", "write"]

_GROUP_BYTES = 16 << 20
_GROUP_ROWS = 1 << 16


def check(columns: Sequence[Column]) -> None:
    """Raises DataError for lists of images."""
    for column in columns:
        if column.kind == "image list":
            raise DataError(
                f"column {column.name!r} of encoding {column.encoding} has no type in Parquet; use --format mds"
            )


def arrow_type(column: Column) -> pa.DataType:
    """The type of a column; of an array, once type and dimensions are known."""
    kind = column.kind
    if kind == "array":
        assert column.dtype is not None
        assert column.shape is not None
        out = pa.from_numpy_dtype(np.dtype(column.dtype))
        for _ in column.shape:
            out = pa.list_(out)
        return out
    if kind in ("bytes", "jpeg", "png"):
        return pa.binary()
    if column.encoding == "int":
        return pa.int64()
    if column.encoding == "str_float":
        return pa.float64()
    if kind in ("integer", "float"):
        return pa.from_numpy_dtype(np.dtype(column.encoding))
    return pa.string()


def write(path: Path, columns: Sequence[Column], rows: Iterable[Row], compression: Compression) -> None:
    """Writes one file.

    Raises:
        DataError: an array is of another type or number of dimensions than the first.
    """
    import pyarrow.parquet as pq

    schema = pa.schema([pa.field(c.name, arrow_type(c), metadata={"udsstream.encoding": c.encoding}) for c in columns])
    settings: Any = {"compression": compression.kind, "compression_level": compression.level}
    settings |= {"write_page_checksum": True, "version": "2.6"}
    with open(path, "wb") as file, pq.ParquetWriter(file, schema, **settings) as writer:
        group: list[Row] = []
        held = 0
        for row in rows:
            group.append(row)
            held += sum(len(raw) for raw in row.values if raw is not None)
            if held >= _GROUP_BYTES or len(group) >= _GROUP_ROWS:
                writer.write_table(_table(columns, group, schema))
                group, held = [], 0
        if group:
            writer.write_table(_table(columns, group, schema))


def _table(columns: Sequence[Column], rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    arrays = []
    for at, column in enumerate(columns):
        try:
            arrays.append(_array(column, [(row.sample_id, row.values[at]) for row in rows], schema.field(at).type))
        except pa.ArrowException as error:
            raise DataError(
                f"column {column.name!r} of samples {rows[0].sample_id} and the {len(rows) - 1} after it does not fit into Parquet's "
                f"{schema.field(at).type} ({error}); use --format mds"
            ) from error
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(column: Column, cells: Sequence[tuple[int, bytes | None]], type: pa.DataType) -> pa.Array:
    if column.kind in ("text", "json", "bytes", "jpeg", "png", "number") and column.encoding != "str_float":
        # The bytes as they are; that text is UTF-8 is checked as it is viewed as such.
        binary = pa.array([raw for _, raw in cells], pa.binary())
        if pa.types.is_binary(type):
            return binary
        try:
            return binary.cast(pa.string())
        except pa.ArrowInvalid:
            for sample_id, raw in cells:
                if raw is not None:
                    decode(Column(name=column.name, encoding="str", size=None), raw, sample_id)
            raise
    if column.kind == "array":
        return _nested(column, cells, type)
    decoded = decoder(column)
    return pa.array([None if raw is None else decoded(raw, sample_id) for sample_id, raw in cells], type)


def _nested(column: Column, cells: Sequence[tuple[int, bytes | None]], type: pa.DataType) -> pa.Array:
    values: list[np.ndarray] = []
    decoded = decoder(column)
    for sample_id, raw in cells:
        assert raw is not None
        value = decoded(raw, sample_id)
        assert column.shape is not None
        if value.dtype.name != column.dtype or value.ndim != len(column.shape):
            raise DataError(
                f"sample {sample_id}: column {column.name!r} has a {value.ndim}-dimensional array of {value.dtype.name}, the first "
                f"sample's was {len(column.shape)}-dimensional of {column.dtype}, and a column "
                "of Parquet has one type; use --format mds or webdataset"
            )
        values.append(value)
    shapes = np.array([value.shape for value in values], np.int64).reshape(len(values), -1)
    out: Any = pa.array(np.concatenate([value.ravel() for value in values]))
    for axis in range(shapes.shape[1] - 1, -1, -1):
        lengths = np.repeat(shapes[:, axis], shapes[:, :axis].prod(axis=1))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        if offsets[-1] >= 1 << 31:
            raise DataError(f"column {column.name!r} has more than 2³¹ numbers in one row group; use --format mds")
        out = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), out)
    return out.cast(type)
