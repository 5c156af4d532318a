"""Digests against known answers and against an implementation of the specification written here, without ours."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import recorded
from hypothesis import given, settings
from hypothesis import strategies as st

from udsstream.selection_log.digest import attempt_link, batch_link, genesis, merkle_root, rank_head
from udsstream.selection_log.encoding import TableCodec
from udsstream.selection_log.schema import DECISION_SCHEMA, push_schema

# The tree of Certificate Transparency's own tests (google/certificate-transparency, merkletree): eight leaves, and the
# root over the first n of them.
LEAVES = [
    bytes.fromhex(text)
    for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


@pytest.mark.parametrize("count", range(9))
def test_merkle_root_of_rfc_6962(count: int) -> None:
    assert merkle_root(LEAVES[:count]).hex() == ROOTS[count]


@given(st.lists(st.binary(max_size=40), max_size=40))
def test_merkle_root_equals_the_rfcs_recursion(leaves: list[bytes]) -> None:
    def tree(part: list[bytes]) -> bytes:
        if not part:
            return hashlib.sha256().digest()
        if len(part) == 1:
            return hashlib.sha256(b"\0" + part[0]).digest()
        k = 1
        while k * 2 < len(part):
            k *= 2
        return hashlib.sha256(b"\1" + tree(part[:k]) + tree(part[k:])).digest()

    assert merkle_root(leaves) == tree(leaves)


def test_links_are_those_of_the_specification() -> None:
    sha = lambda data: hashlib.sha256(data).digest()  # noqa: E731
    run, content, first, second = (bytes([i]) * 32 for i in range(4))
    assert genesis("pushes", 3, run) == sha(b"udsstream log 1\0pushes\0" + b"\3\0\0\0" + run)
    assert attempt_link(first, 2, 70, 1) == sha(first + b"\1" + b"\2\0" + struct.pack("<q", 70) + b"\1\0")
    assert attempt_link(first, 0, 0, None) == sha(first + b"\1" + bytes(10) + b"\xff\xff")
    assert batch_link(first, content) == sha(first + b"\2" + content)
    assert rank_head(first, second) == sha(b"udsstream head 1\0" + first + second)


# Written from docs/log_format.md, "Digests", in the slowest and plainest way: value by value.
_NAMES = {
    "int16": ("<h", 0),
    "int32": ("<i", 0),
    "int64": ("<q", 0),
    "float": ("<f", 0.0),
    "halffloat": ("<e", 0.0),
}


def specified_digest(table: str, schema: pa.Schema, rows: list[dict[str, Any]]) -> bytes:
    text = f"udsstream {table} 1\n"
    out = b""
    for field in schema:
        kind = str(field.type)
        if kind.startswith("fixed_size_list"):
            kind = f"{field.type.value_type}[{field.type.list_size}]"
        text += f"{field.name} {kind} {'nullable' if field.nullable else 'required'}\n"
        values = [row[field.name] for row in rows]
        if field.nullable:
            out += _pack_bits([value is not None for value in values])
        if kind == "bool":
            out += _pack_bits([bool(value) for value in values])
            continue
        for value in values:
            if kind.startswith("fixed_size_binary"):
                out += value
            elif "[" in kind:
                code = _NAMES[kind.split("[")[0]][0]
                numbers = [0.0] * field.type.list_size if value is None else value
                out += b"".join(struct.pack(code, number) for number in numbers)
            else:
                code, zero = _NAMES[kind]
                out += struct.pack(code, zero if value is None else value)
    return hashlib.sha256(hashlib.sha256(text.encode()).digest() + struct.pack("<Q", len(rows)) + out).digest()


def _pack_bits(flags: list[bool]) -> bytes:
    out = bytearray((len(flags) + 7) // 8)
    for i, flag in enumerate(flags):
        out[i // 8] |= flag << (i % 8)
    return bytes(out)


@pytest.mark.parametrize("rows", [1, 5, 8, 9, 17])
def test_content_digest_is_that_of_the_specification(rows: int) -> None:
    codec = TableCodec("selection", DECISION_SCHEMA)
    given_columns = {**recorded.columns(3, rows), "attempt": 2, "step": 3, "rank": 1}
    batch, digest = codec.encode(given_columns, rows)
    assert digest == specified_digest("selection", DECISION_SCHEMA, batch.to_pylist())
    assert digest == codec.batch_digests(batch, [0])[0]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_digest_of_pushes_is_that_of_the_specification(dtype: Any) -> None:
    schema = push_schema("full", recorded.DIM, dtype)
    codec = TableCodec("pushes", schema)
    given_columns = {
        "attempt": 0,
        "step": 4,
        "rank": 0,
        "position": np.array([1, 7, 9]),
        "sample_id": np.array([5, 6, 1 << 40]),
        "push_index": np.array([8, 9, 10]),
        "digest": [recorded.digest_after(4)] * 3,
        "embedding": recorded.vectors(4, count=3),
    }
    batch, digest = codec.encode(given_columns, 3)
    assert digest == specified_digest("pushes", schema, batch.to_pylist())
    assert digest == codec.batch_digests(batch, [0])[0]


def test_digest_does_not_depend_on_arrows_buffers() -> None:
    """Offsets, chunks, what lies under a null and a round trip through a sliced table change nothing."""
    codec = TableCodec("selection", DECISION_SCHEMA)
    parts = [codec.encode({**recorded.columns(s, 5), "attempt": 0, "step": s, "rank": 0}, 5) for s in range(4)]
    table = pa.Table.from_batches([batch for batch, _ in parts])
    assert codec.batch_digests(table, [0, 5, 10, 15]) == [digest for _, digest in parts]
    assert codec.batch_digests(table.combine_chunks().slice(5, 10), [0, 5]) == [digest for _, digest in parts[1:3]]
    shard = table.column("shard").combine_chunks()
    assert shard.null_count
    if isinstance(shard, pa.ChunkedArray):
        shard = shard.chunk(0)
    rubbish = np.where(shard.is_null().to_numpy(zero_copy_only=False), 77, shard.fill_null(0).to_numpy()).astype(
        np.int32
    )
    dirty = pa.Array.from_buffers(pa.int32(), len(shard), [shard.buffers()[0], pa.py_buffer(rubbish.tobytes())])
    index = table.schema.get_field_index("shard")
    changed = table.set_column(index, table.schema.field("shard"), dirty)
    assert codec.batch_digests(changed, [0, 5, 10, 15]) == [digest for _, digest in parts]


@settings(max_examples=60)
@given(st.data())
def test_every_change_of_a_value_changes_the_digest(data: st.DataObject) -> None:
    codec = TableCodec("selection", DECISION_SCHEMA)
    base = {**recorded.columns(3, 5), "attempt": 0, "step": 3, "rank": 0}
    batch, digest = codec.encode(base, 5)
    rows = batch.to_pylist()
    name = data.draw(st.sampled_from(DECISION_SCHEMA.names))
    i = data.draw(st.integers(0, 4))
    value = rows[i][name]
    if value is None:
        rows[i][name] = 0
    elif DECISION_SCHEMA.field(name).nullable and data.draw(st.booleans()):
        rows[i][name] = None
    else:
        rows[i][name] = not value if isinstance(value, bool) else value + 1
    changed = pa.RecordBatch.from_pylist(rows, schema=DECISION_SCHEMA)
    assert codec.batch_digests(changed, [0])[0] != digest


def test_a_nan_is_a_value_and_not_a_null() -> None:
    codec = TableCodec("selection", DECISION_SCHEMA)
    base = {**recorded.columns(3, 5), "attempt": 0, "step": 3, "rank": 0}
    nan, _ = codec.encode({**base, "loss": np.array([np.nan, 1, 2, 3, 4], np.float32)}, 5)
    assert nan.column("loss").null_count == 0
    null = np.ma.MaskedArray(np.array([np.nan, 1, 2, 3, 4], np.float32), mask=[True, False, False, False, False])
    masked, _ = codec.encode({**base, "loss": null}, 5)
    assert masked.column("loss").to_pylist()[0] is None
    assert codec.batch_digests(nan, [0]) != codec.batch_digests(masked, [0])
