"""A row's bytes are those of `MDSWriter.encode_sample`, and its values come back equal, for whatever JSON can hold."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streaming import MDSWriter
from streaming.base.format.mds.encodings import mds_decode

from udsstream.ingest.encode import BadValueError, Column, Plan, RowEncoder, encoder, from_text
from udsstream.ingest.readers import Block, Position
from udsstream.ingest.rows import parse

ENCODINGS = {
    "text": "str",
    "number": "int",
    "float": "float64",
    "blob": "bytes",
    "large": "str_int",
    "deep": "json",
    "u": "uint64",
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
DEEP = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
ROW = st.fixed_dictionaries(
    {
        "text": TEXT,
        "number": st.integers(-(2**63), 2**63 - 1),
        "float": st.floats(),
        "blob": st.binary(max_size=30),
        "large": st.integers(),
        "deep": DEEP,
        "u": st.integers(0, 2**64 - 1),
    }
)


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> MDSWriter:
    return MDSWriter(columns=ENCODINGS, out=str(tmp_path_factory.mktemp("mds") / "out"))


def plan(**more: Any) -> Plan:
    columns = tuple(Column(name=name, source=(name,), encoding=ENCODINGS[name]) for name in sorted(ENCODINGS))
    return Plan(
        **(
            {"kind": "jsonl", "columns": columns, "known": frozenset(ENCODINGS), "stream_by": None, "max_row": 1 << 20}
            | more
        )
    )


ROWS = RowEncoder(plan())


def same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("<d", a) == struct.pack("<d", b) or (math.isnan(a) and math.isnan(b))
    return a == b and (type(a) is type(b) or isinstance(a, np.generic))


@given(ROW)
def test_the_bytes_are_those_of_mdswriter_and_come_back(writer, row):
    sample, stream = ROWS.encode(row)
    assert stream == ""
    assert sample == writer.encode_sample(row)
    sizes = list(struct.unpack_from("<4I", sample))
    at, found = 16, {}
    for name in sorted(ENCODINGS):
        size = 8 if ENCODINGS[name] in ("int", "float64", "uint64") else sizes.pop(0)
        found[name] = mds_decode(ENCODINGS[name], sample[at : at + size])
        at += size
    assert at == len(sample)
    for name, value in row.items():
        got = float(found[name]) if name == "float" else found[name]
        assert same(got, value), name


@given(DEEP)
def test_a_line_of_json_gives_what_json_gives(value):
    line = json.dumps({"deep": value}, ensure_ascii=False).encode() + b"\r\n"
    ((offset, row),) = parse("jsonl", Block(Position(0, 5, 1, 0), 1, line, 0), 1 << 20)
    assert offset == 0
    assert row == {"deep": value}


@given(st.text())
def test_text_is_stored_or_refused_as_utf8_says(text):
    encode, size = encoder("str")
    assert size is None
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        with pytest.raises(BadValueError, match="lone surrogate"):
            encode(text)
    else:
        assert encode(text) == text.encode()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_sized_integers_end_where_their_type_does(dtype):
    encode, size = encoder(dtype)
    limits = np.iinfo(dtype)
    assert size == limits.bits // 8
    for value in (int(limits.min), 0, int(limits.max)):
        assert mds_decode(dtype, encode(value)) == value
    for value in (int(limits.min) - 1, int(limits.max) + 1, 1.0, True, "1", None):
        with pytest.raises(BadValueError):
            encode(value)


@pytest.mark.parametrize(
    ("encoding", "good", "bad"),
    [
        ("float32", [1, 0.5], ["1", None, True]),
        ("str_float", [1.5, 2], ["x", None]),
        ("bytes", [b"", b"\x00"], ["x", None, bytearray(b"x")]),
        ("ndarray:int32", [[1, 2], [[1], [2]]], [[], [2**31], [1.5], ["a"], [[1], [1, 2]], "x", None]),
        ("ndarray:float32:2", [[1.0, 2.0]], [[1.0]]),
        ("json", [None, {"a": float("inf")}], [b"x", {1, 2}, "\ud800"]),
    ],
)
def test_other_encodings_take_and_refuse(encoding, good, bad):
    encode, _ = encoder(encoding)
    for value in good:
        assert isinstance(encode(value), bytes)
    for value in bad:
        with pytest.raises(BadValueError):
            encode(value)


@pytest.mark.parametrize(
    ("encoding", "text", "value"),
    [("int", " -7", -7), ("uint8", "5", 5), ("str_int", "9" * 30, int("9" * 30)), ("float64", "1e3", 1000.0), ("bytes", "é", "é".encode()),
     ("json", "[1]", [1]), ("ndarray:int32", "[1]", [1])],
)  # fmt: skip
def test_cells_are_converted(encoding, text, value):
    assert from_text(encoding)(text) == value


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("int", "1_000"), ("int", "1.0"), ("int", ""), ("float64", "a"), ("json", ""), ("str_decimal", "x")],
)
def test_cells_that_are_no_numbers_are_refused(encoding, text):
    with pytest.raises(BadValueError, match="is no"):
        from_text(encoding)(text)


def test_the_largest_row():
    limited = RowEncoder(plan(max_row=200))
    row = {"text": "x", "number": 1, "float": 1.0, "blob": b"", "large": 1, "deep": None, "u": 1}
    assert len(limited.encode(row | {"text": "x" * 155})[0]) == 200
    with pytest.raises(BadValueError, match="the row takes 201 bytes, more than --max-row-size 200"):
        limited.encode(row | {"text": "x" * 156})


def test_nothing_of_ours_is_pickled():
    for path in (Path(__file__).parents[2] / "udsstream" / "ingest").glob("*.py"):
        text = path.read_text()
        assert "pickle" not in text.replace("unpickled", "").replace("picklable", ""), path
        assert "torch" not in text, path
