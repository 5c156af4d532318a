"""The columns of an output, and what the bytes of an MDS column mean.

Samples travel as MDS bytes from a stream's shards to the writers, so that MDS to MDS is a copy. Other formats decode them here, by
Streaming's encodings; pickles are refused, images stay the bytes that they are.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Literal

import numpy as np

from udsstream.curate.chosen import Chosen
from udsstream.errors import ConfigError, DataError, ShardError

__all__ = [
    "ADDED",
    "AddedColumns",
    "Column",
    "Kind",
    "check_clash",
    "decode",
    "decoder",
    "parse_columns",
    "with_array_shapes",
]

Kind = Literal["text", "json", "integer", "float", "number", "bytes", "jpeg", "png", "array", "image list"]
"""What a column holds. `number`: an integer or a decimal without limit, kept as its digits. `image list`: what only MDS can hold."""

_STRUCT = {
    "int": "<q", "int8": "<b", "int16": "<h", "int32": "<i", "int64": "<q",
    "uint8": "<B", "uint16": "<H", "uint32": "<I", "uint64": "<Q",
    "float16": "<e", "float32": "<f", "float64": "<d",
}  # fmt: skip
_KINDS: dict[str, Kind] = {
    "str": "text", "json": "json", "bytes": "bytes", "jpeg": "jpeg", "png": "png", "ndarray": "array",
    "str_int": "number", "str_decimal": "number", "str_float": "float",
    "pil": "image list", "jpeg_array": "image list", "jpegarray": "image list",
    "list[pil]": "image list", "list[jpeg]": "image list", "list[png]": "image list",
}  # fmt: skip
_ARRAY_TYPES = (
    "uint8",
    "int8",
    "uint16",
    "int16",
    "float16",
    "uint32",
    "int32",
    "float32",
    "uint64",
    "int64",
    "float64",
)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of an output, in the terms of MDS."""

    name: str
    encoding: str
    size: int | None
    """Bytes of each value; None: they vary, and each is preceded by its size."""
    added: bool = False
    """Whether it tells of the choice; not a column of the source."""
    dtype: str | None = None
    """Of an array: the type of its numbers."""
    shape: tuple[int, ...] | None = None
    """Of an array: its shape, −1 where that varies. None until `with_array_shapes` has seen a value."""

    @property
    def kind(self) -> Kind:
        """What it holds."""
        base = self.encoding.partition(":")[0]
        return _KINDS.get(base) or ("float" if base.startswith("float") else "integer")

    @property
    def fixed_dtype(self) -> bool:
        """Of an array: whether the encoding fixes the type of its numbers."""
        return ":" in self.encoding


def parse_columns(entry: Mapping[str, Any], where: str) -> tuple[Column, ...]:
    """The columns of an MDS shard, from its object in the index.

    Raises:
        DataError: it is no MDS shard, has an unsafe column, or one with an encoding that is not known.
    """
    if entry.get("format") != "mds":
        raise DataError(
            f"{where} is of the format {entry.get('format')!r}, and only MDS can be read; convert the stream with `udsstream ingest`"
        )
    names, encodings, sizes = (entry.get(f"column_{part}") for part in ("names", "encodings", "sizes"))
    if not (isinstance(names, list) and isinstance(encodings, list) and isinstance(sizes, list)):
        raise DataError(f"{where}: the index does not say its columns; rebuild the stream")
    if not len(names) == len(encodings) == len(sizes) or len(set(map(str, names))) != len(names):
        raise DataError(f"{where}: the index contradicts itself about its columns; rebuild the stream")
    columns = []
    for name, encoding, size in zip(names, encodings, sizes, strict=True):
        if not isinstance(name, str) or not isinstance(encoding, str):
            raise DataError(f"{where}: a column's name or encoding is no text; rebuild the stream")
        columns.append(_column(name, encoding, size, where))
    return tuple(columns)


def _column(name: str, encoding: str, size: Any, where: str) -> Column:
    base, _, config = encoding.partition(":")
    if base == "pkl":
        raise DataError(
            f"{where}: column {name!r} holds pickles, which can run code when they are read, and is refused; write the stream anew with a "
            "safe encoding such as json or ndarray"
        )
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    if base == "ndarray":
        dtype, _, dims = config.partition(":")
        shape = tuple(int(dim) for dim in dims.split(",")) if dims and dims.replace(",", "").isdecimal() else None
        if (config and dtype not in _ARRAY_TYPES) or (dims and shape is None):
            raise DataError(f"{where}: column {name!r} has the encoding {encoding!r}, which is not known")
    elif encoding not in _KINDS and encoding not in _STRUCT:
        raise DataError(f"{where}: column {name!r} has the encoding {encoding!r}, which is not known")
    expected: int | None = struct.calcsize(_STRUCT[base]) if base in _STRUCT else None
    if shape is not None:
        expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size != expected:
        raise DataError(
            f"{where}: column {name!r} of encoding {encoding!r} should have the size {expected}, the index says {size!r}"
        )
    return Column(name=name, encoding=encoding, size=expected, dtype=dtype or None, shape=shape)


def decode(column: Column, raw: bytes, sample_id: int) -> Any:
    """The value of a column: str, a JSON value, int, float, Decimal, bytes, or an array. Raises as what `decoder` gives."""
    return decoder(column)(raw, sample_id)


def decoder(column: Column) -> Callable[[bytes, int], Any]:
    """`decode` of one column, for many samples.

    Raises (the function that it gives):
        ShardError: the bytes are no such value; it names the sample.
    """
    plain = _decoder(column)

    def decoded(raw: bytes, sample_id: int) -> Any:
        try:
            return plain(raw)
        except (ValueError, KeyError, IndexError, TypeError, struct.error, ArithmeticError, RecursionError) as error:
            raise ShardError(
                f"sample {sample_id}: column {column.name!r} cannot be decoded as {column.encoding} ({type(error).__name__}: {error}); "
                "the shard that holds it is corrupt: fetch it again, or rebuild the stream"
            ) from error

    return decoded


def _decoder(column: Column) -> Callable[[bytes], Any]:
    base = column.encoding.partition(":")[0]
    if base == "str":
        return _text
    if base in _STRUCT:
        unpack = struct.Struct(_STRUCT[base]).unpack
        return lambda raw: unpack(raw)[0]
    if base == "json":
        return json.loads
    if base == "ndarray":
        return lambda raw: _array(column.encoding, raw)
    if base == "str_float":
        return lambda raw: float(raw.decode())
    if base == "str_int":
        return lambda raw: int(raw.decode())
    if base == "str_decimal":
        return lambda raw: Decimal(raw.decode())
    return lambda raw: raw


def _text(raw: bytes) -> str:
    return raw.decode()


def _array(encoding: str, raw: bytes) -> np.ndarray:
    from streaming.base.format.mds.encodings import mds_decode  # here, because it loads torch

    return mds_decode(encoding, raw)


def with_array_shapes(columns: Sequence[Column], first: Sequence[bytes | None], sample_id: int) -> tuple[Column, ...]:
    """The columns, with type and number of dimensions of arrays filled in from the first sample where the encoding leaves them open."""
    out = []
    for column, raw in zip(columns, first, strict=True):
        if column.kind == "array" and raw is not None and column.shape is None:
            value = decode(column, raw, sample_id)
            column = replace(column, dtype=value.dtype.name, shape=(-1,) * value.ndim)
        out.append(column)
    return tuple(out)


# -- what is added ---------------------------------------------------------------------------------------------------------

ADDED = {
    "score": ("float32", "what the choice was made by, at the sample's first turn; empty where nothing was scored"),
    "intra": ("float32", "value of the sample alone, in the method's units, at its first turn"),
    "inter": ("float32", "mean distance to the memory, in the method's units, at its first turn"),
    "mean_score": ("float64", "mean of its scores over all its offers"),
    "times_chosen": ("int32", "how often it was chosen"),
    "times_offered": ("int32", "how often it was a candidate"),
    "first_step": ("int64", "steps before its first turn"),
    "stream": ("str", "name of the stream it comes from"),
    "sample_id": ("int64", "its id over the run's ordered streams"),
}
"""What is said of each sample: name without prefix → (MDS encoding, meaning). A sample's first turn is its first choice, or its first
offer if it was never chosen."""


@dataclass(frozen=True, kw_only=True)
class AddedColumns:
    """The columns of ADDED, as MDS bytes."""

    columns: tuple[Column, ...]
    chosen: Chosen
    names: Sequence[str]
    """Of the streams, by their numbers."""

    @classmethod
    def of(cls, chosen: Chosen, names: Sequence[str], prefix: str) -> AddedColumns:
        """All of them, their names beginning with `prefix`."""
        columns = tuple(
            Column(
                name=prefix + name,
                encoding=encoding,
                size=struct.calcsize(_STRUCT[encoding]) if encoding in _STRUCT else None,
                added=True,
            )
            for name, (encoding, _) in ADDED.items()
        )
        return cls(columns=columns, chosen=chosen, names=names)

    def rows(self, first: int, stop: int) -> list[list[bytes | None]]:
        """The values of these samples; None where there is no score."""
        part = slice(first, stop)
        lists = []
        for name, (encoding, _) in ADDED.items():
            values = getattr(self.chosen, name)[part]
            if name == "stream":
                encoded = [name.encode() for name in self.names]
                lists.append([encoded[number] for number in values.tolist()])
                continue
            values = values.astype(f"<{np.dtype(encoding).str[1:]}")
            width, data = values.itemsize, values.tobytes()
            cut = [data[at : at + width] for at in range(0, len(data), width)]
            if values.dtype.kind == "f":
                cut = [raw if there else None for raw, there in zip(cut, np.isfinite(values).tolist(), strict=True)]
            lists.append(cut)
        return [list(row) for row in zip(*lists, strict=True)]


def check_clash(source: Sequence[Column], added: Sequence[Column]) -> None:
    """Raises ConfigError when a column that is added has the name of one of the source's."""
    if clash := sorted({column.name for column in source} & {column.name for column in added}):
        raise ConfigError(
            f"the samples have a column {clash[0]!r} already; give the added columns another --prefix, or leave them out: --no-scores"
        )
