"""Which columns the result has and how MDS stores each: from the Arrow schema, or from the first rows, and from what the user says.

MDS has no null and no boolean: columns with either are stored as JSON, which gives None, True and False back.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from udsstream.errors import ConfigError, DataError
from udsstream.ingest.encode import Column, Plan, find
from udsstream.ingest.readers import Bad, Position, arrow_schema, csv_header, hf_dataset, read_blocks
from udsstream.ingest.rows import parse, where
from udsstream.ingest.sources import Source

__all__ = ["ENCODINGS", "WINDOW", "ColumnMap", "make_plan"]

WINDOW = 1000
"""Rows that the types are told from, where the source has no schema."""
_MINORITY = 0.01
"""The share of the first rows that may be of another type than the rest, and are rejects then; more is an error."""

ENCODINGS = (
    "str", "bytes", "json", "int", "float64", "str_int", "str_float", "str_decimal", "ndarray", "int8", "int16", "int32", "int64",
    "uint8", "uint16", "uint32", "uint64", "float16", "float32",
)  # fmt: skip
"""MDS encodings that `--column` takes. Not `pkl`, which runs code when it is read; images stay `bytes`."""

_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class ColumnMap:
    """What the user says of the columns."""

    prompt: str | None = None
    response: str | None = None
    messages: str | None = None
    text: str | None = None
    only_mapped: bool = False
    """Leave out every column that is not named here or in `encodings`."""
    drop: tuple[str, ...] = ()
    encodings: Mapping[str, str] = field(default_factory=dict)
    """Column of the source -> MDS encoding."""

    def __post_init__(self) -> None:
        for name, encoding in self.encodings.items():
            if not _allowed(encoding):
                near = (
                    f"; did you mean {near[0]!r}?"
                    if (near := difflib.get_close_matches(encoding, ENCODINGS, 1))
                    else ""
                )
                why = " (it would run code when it is read)" if encoding == "pkl" else ""
                raise ConfigError(
                    f"--column {name}={encoding}: no encoding that can be chosen{why}; it is one of {', '.join(ENCODINGS)}, "
                    f"or ndarray:DTYPE or ndarray:DTYPE:SHAPE{near}"
                )

    def roles(self) -> dict[str, str]:
        """Name in the result -> column of the source."""
        given = {"prompt": self.prompt, "response": self.response, "messages": self.messages, "text": self.text}
        return {role: name for role, name in given.items() if name is not None}


def _allowed(encoding: str) -> bool:
    from streaming.base.format.mds.encodings import is_mds_encoding

    name = encoding.split(":")[0]
    if name not in ENCODINGS or (":" in encoding and name != "ndarray"):
        return False
    try:
        return is_mds_encoding(encoding)
    except Exception:  # Streaming asserts on dtypes it does not know
        return False


def make_plan(source: Source, columns: ColumnMap, stream_by: str | None, max_row: int) -> Plan:
    """The plan of a job: the same for the same source and settings.

    Raises:
        DataError: a column is missing, holds mixed types, or cannot be stored; or there are no rows.
        ConfigError: two columns would have one name.
    """
    if source.kind in ("parquet", "hf"):
        found = _from_arrow(source)
    elif source.kind == "csv":
        found = _Found({name: "str" for name in csv_header(source.files[0], max_row)}, closed=True)
        _first_rows(source, max_row)  # a file of a header alone is no data
    else:
        found = _from_rows(_first_rows(source, max_row), source)
    return _plan(source, columns, stream_by, max_row, found)


@dataclass
class _Found:
    """The columns that a source has."""

    encodings: dict[str, str]
    """Their default encodings; or, with a blank first, why there is none."""
    closed: bool
    """Whether they are all that there can be."""
    optional: frozenset[str] = frozenset()
    rows: Sequence[tuple[str, dict[str, Any]]] = ()
    """The first rows, with their places."""


def _plan(source: Source, columns: ColumnMap, stream_by: str | None, max_row: int, found: _Found) -> Plan:
    plan: dict[str, Column] = {}
    renamed = set()
    for role, name in columns.roles().items():
        path = _path(name, found, f"--{role}")
        if len(path) == 1:
            renamed.add(name)
        encoding = _role_encoding(role, name, path, found, columns.encodings.get(name))
        plan[role] = Column(
            name=role, source=path, encoding=encoding, role="messages" if role == "messages" else "text"
        )
    for name in columns.drop:
        _path(name, found, "--drop")
    for name in columns.encodings:
        if name not in found.encodings and found.closed:
            _path(name, found, "--column")
    kept = [
        name
        for name in [*found.encodings, *(name for name in columns.encodings if name not in found.encodings)]
        if name not in renamed
    ]
    for name in kept:
        if name in columns.drop or (columns.only_mapped and name not in columns.encodings):
            continue
        if name in plan:
            raise ConfigError(
                f"two columns would be named {name!r}: the one mapped with --{name} {columns.roles()[name]}, and the source's own; "
                f"leave the latter out with --drop {name}, or map that one"
            )
        encoding = columns.encodings.get(name, found.encodings.get(name, "json"))
        if encoding.startswith(" "):
            raise DataError(f"the column {name!r} {encoding.strip()}")
        optional = encoding == "json" and (name in found.optional or name not in found.encodings)
        plan[name] = Column(name=name, source=(name,), encoding=encoding, optional=optional)
    if not plan:
        raise ConfigError(
            "no column would be left: map one with --prompt, --response, --messages or --text, or keep the others"
        )
    if "sample_id" in plan:
        raise DataError(
            "the source has a column 'sample_id', which UDSStreamingDataset adds by itself: leave it out with --drop sample_id"
        )
    left_out = bool(columns.only_mapped)
    return Plan(
        kind=source.kind,
        columns=tuple(plan[name] for name in sorted(plan)),
        known=None if left_out else frozenset(found.encodings) | frozenset(columns.encodings) | frozenset(columns.drop),
        stream_by=None if stream_by is None else _path(stream_by, found, "--stream-by"),
        max_row=max_row,
        names=tuple(file.name for file in source.files)
        if source.kind != "hf"
        else (f"hf:{source.hf.path}",)
        if source.hf
        else (),
    )


def _path(name: str, found: _Found, option: str) -> tuple[str, ...]:
    """A column, or a place within one: `json.question`."""
    if name in found.encodings:
        return (name,)
    path = tuple(name.split("."))
    if len(path) > 1 and path[0] in found.encodings:
        for _, row in found.rows[:WINDOW]:
            try:
                find(row, path)
                return path
            except KeyError:
                continue
        if not found.rows and found.encodings[path[0]] == "json":
            return path
    names = list(found.encodings)
    near = difflib.get_close_matches(name, names, 1, 0.5) or [other for other in names if other.lower() == name.lower()]
    shown = ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")
    raise DataError(
        f"{option} {name}: there is no such column; the source has {shown}"
        + (f"; did you mean {near[0]!r}?" if near else "")
    )


def _role_encoding(role: str, name: str, path: tuple[str, ...], found: _Found, forced: str | None) -> str:
    if role != "messages":
        if forced not in (None, "str"):
            raise ConfigError(f"--{role} {name}: it is text to train on and stored as str, but --column says {forced}")
        if len(path) == 1 and (have := found.encodings[name]) not in ("str", "json") and found.closed:
            raise DataError(f"--{role} {name}: the column holds {have.strip()}, expected strings")
        return "str"
    if len(path) == 1 and found.closed:
        return "str" if found.encodings[name] == "str" else "json"
    kinds = Counter(isinstance(_get(row, path), str) for _, row in found.rows)
    return "str" if kinds[True] > kinds[False] else "json"


def _get(row: dict[str, Any], path: tuple[str, ...]) -> Any:
    try:
        return find(row, path)
    except KeyError:
        return _ABSENT


# From the first rows ------------------------------------------------------------------------------------------------------


def _first_rows(source: Source, max_row: int) -> list[tuple[str, dict[str, Any]]]:
    """The first good ones, each with where it stands."""
    bad: list[str] = []

    def rows() -> Iterable[tuple[str, dict[str, Any]]]:
        for block in read_blocks(source, Position(0, 0, 1, 0), max_row):
            for offset, row in parse(source.kind, block, max_row):
                file = source.files[min(block.start.file, len(source.files) - 1)].name
                at = (
                    ""
                    if isinstance(block.payload, Bad) and source.kind != "jsonl"
                    else _place(where(source.kind, block, offset))
                )
                if isinstance(row, Bad):
                    bad.append(f"{file}{at}: {row.reason}")
                    if len(bad) > WINDOW:
                        return
                else:
                    yield f"{file}{at}", row

    found = list(islice(rows(), WINDOW))
    if not found:
        reasons = "; ".join(bad[:3])
        raise DataError(
            f"no row can be read from {source.files[0].name}"
            + (f" and {len(source.files) - 1} more files" if source.files[1:] else "")
            + (f": {reasons}" if bad else ": it is empty")
            + f" (read as {source.kind}; --kind says otherwise)"
        )
    return found


def _place(place: dict[str, Any]) -> str:
    return "".join(f" {name} {value}" for name, value in place.items())


def _from_rows(rows: list[tuple[str, dict[str, Any]]], source: Source) -> _Found:
    types: dict[str, dict[str, list[str]]] = {}  # column -> type -> places
    present: Counter[str] = Counter()
    for place, row in rows:
        for name, value in row.items():
            types.setdefault(name, {}).setdefault(_type(value), []).append(place)
            present[name] += 1
    encodings, optional = {}, set()
    for name, places in types.items():
        encodings[name] = _encoding(name, places, present[name])
        if present[name] < len(rows):
            if present[name] < len(rows) * (1 - _MINORITY) or source.kind == "webdataset":
                encodings[name] = (
                    "json"
                    if encodings[name] != "bytes"
                    else " has no value in some rows, and binary has no null: --drop it"
                )
            if encodings[name] == "json":
                optional.add(name)
    return _Found(encodings, closed=False, optional=frozenset(optional), rows=rows)


def _type(value: Any) -> str:
    if value is None:
        return "null"
    if type(value) is int:
        return "int" if -(1 << 63) <= value < 1 << 63 else "str_int"
    return {str: "str", float: "float64", bytes: "bytes", bool: "bool"}.get(type(value), "nested")


def _encoding(name: str, places: dict[str, list[str]], count: int) -> str:
    kinds = {kind: len(at) for kind, at in places.items()}
    if "null" in kinds:
        return "json" if "bytes" not in kinds else " is binary and null in turn, and binary has no null: --drop it"
    if kinds.keys() <= {"int", "str_int"}:
        return "int" if kinds.keys() == {"int"} else "str_int"
    if kinds.keys() == {"int", "float64"}:
        return "float64"
    main = max(kinds, key=lambda kind: kinds[kind])
    if count - kinds[main] > count * _MINORITY:
        examples = " and ".join(
            f"{kind} in {len(at)} (first: {at[0]})"
            for kind, at in sorted(places.items(), key=lambda item: -len(item[1]))
        )
        return f" holds mixed types: {examples}; store it as it is with --column {name}=json, or leave it out with --drop {name}"
    return {"bool": "json", "nested": "json"}.get(main, main)


# From an Arrow schema -----------------------------------------------------------------------------------------------------


def _from_arrow(source: Source) -> _Found:
    if source.kind == "parquet":
        schema, full = arrow_schema(source.files[0])
        for file in source.files[1:]:
            other, more = arrow_schema(file)
            full = {name: value and more.get(name, False) for name, value in full.items()}
            if missing := [name for name in schema.names if name not in other.names] + [
                n for n in other.names if n not in schema.names
            ]:
                raise DataError(
                    f"{source.files[0].name} and {file.name} differ in the column {missing[0]!r}: ingest files of one schema together"
                )
        nulls = {name: not value for name, value in full.items()}
    else:
        assert source.hf is not None
        dataset = hf_dataset(source.hf)
        features = getattr(dataset, "features", None)
        try:
            first = next(iter(dataset.iter(batch_size=WINDOW)), None)
        except Exception as error:
            raise DataError(f"hf:{source.hf.path} cannot be read: {type(error).__name__}: {error}") from error
        if first is None or not first.num_rows:
            raise DataError(f"hf:{source.hf.path} has no rows")
        schema = features.arrow_schema if features else first.schema
        nulls = {name: bool(first[name].null_count) if name in first.column_names else True for name in schema.names}
    if len(set(schema.names)) < len(schema.names):
        twice = next(name for name in schema.names if schema.names.count(name) > 1)
        raise DataError(f"{source.files[0].name} has the column {twice!r} twice: rename it")
    encodings = {}
    for column in schema:
        encoding = _arrow_encoding(column.type)
        if nulls[column.name] and not encoding.startswith(" "):
            binary = encoding in ("bytes", "str_decimal")
            encoding = (
                f" holds nulls, which {column.type} has no place for in MDS: --drop {column.name}" if binary else "json"
            )
        encodings[column.name] = encoding
    return _Found(encodings, closed=True)


def _arrow_encoding(kind: Any) -> str:
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        return _arrow_encoding(kind.value_type)
    if (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_temporal(kind)
        or re.match("string_view", str(kind))
    ):
        return "str"
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return "bytes"
    if types.is_uint64(kind):
        return "uint64"
    if types.is_integer(kind):
        return "int"
    if types.is_floating(kind):
        return "float64"
    if types.is_decimal(kind):
        return "str_decimal"
    if types.is_boolean(kind) or types.is_null(kind) or _is_json(kind):
        return "json"
    return f" is of type {kind}, which MDS cannot store as it is: --only-mapped or --drop leaves it out"


def _is_json(kind: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_json(kind.value_type)
    if types.is_struct(kind):
        return all(_is_json(kind.field(i).type) for i in range(kind.num_fields))
    return (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_boolean(kind)
        or types.is_null(kind)
    )
