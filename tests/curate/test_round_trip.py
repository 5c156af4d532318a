"""What goes in comes out: a file → ingest → MDS → curate --all → the same rows, through the command line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs import udsstream


def rows(count: int) -> list[dict[str, Any]]:
    """Unicode, empty and very long texts, nested messages, nulls, booleans, integers, floats."""
    rng = random.Random(0)
    texts = ["", "plain", 'Grüße 你好 🌍 \u2028\u0000\t\n"\\', "ﷺ" * 50, "long " * 100_000]
    return [
        {
            "text": texts[i % 4] if i != 7 else texts[4],
            "messages": [
                {"role": "user", "content": texts[i % 4], "meta": {"n": i, "x": None, "deep": [[1], {"a": 0.1}]}}
            ]
            * (i % 3),
            "number": rng.randrange(-(1 << 63), 1 << 63),
            "ratio": rng.random() * 10 ** rng.randrange(-300, 300),
            "flag": rng.choice([True, False]),
            "maybe": rng.choice([None, "x", ""]),
        }
        for i in range(count)
    ]


def run(monkeypatch, capsys, *arguments: Any) -> None:
    code, _, err = udsstream(monkeypatch, capsys, *map(str, arguments))
    assert code == 0, err


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().split("\n")[:-1]]


def test_json_lines(tmp_path, monkeypatch, capsys):
    expected = rows(500)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in expected))
    run(monkeypatch, capsys, "ingest", tmp_path / "in.jsonl", "--out", tmp_path / "mds", "--size-limit", "64kb")
    arguments = ("--format", "jsonl", "--shard-size", "100kb")
    run(monkeypatch, capsys, "curate", "--all", tmp_path / "mds", "--out", tmp_path / "out", *arguments)
    assert len(list((tmp_path / "out" / "data").iterdir())) > 1
    assert read_lines(tmp_path / "out" / "data") == expected
    # And once more from there: the same MDS, the same lines, byte for byte.
    files = sorted((tmp_path / "out" / "data").glob("*.jsonl"))
    run(monkeypatch, capsys, "ingest", *files, "--out", tmp_path / "mds2", "--size-limit", "64kb")
    run(monkeypatch, capsys, "curate", "--all", tmp_path / "mds2", "--out", tmp_path / "out2", *arguments)
    for file in files:
        assert (tmp_path / "out2" / "data" / file.name).read_bytes() == file.read_bytes()


def test_parquet_with_binary_columns(tmp_path, monkeypatch, capsys):
    expected = pa.table(
        {"blob": [b"", bytes(range(256)), b"x" * 300_000], "text": ["a", "", "ü"], "n": pa.array([1, 2, 3], pa.int64())}
    )
    pq.write_table(expected, tmp_path / "in.parquet")
    run(monkeypatch, capsys, "ingest", tmp_path / "in.parquet", "--out", tmp_path / "mds")
    run(monkeypatch, capsys, "curate", "--all", tmp_path / "mds", "--out", tmp_path / "out", "--format", "parquet")
    found = pq.read_table(tmp_path / "out" / "data" / "part-00000.parquet")
    assert found.select(expected.column_names).to_pydict() == expected.to_pydict()
    assert {field.name: field.type for field in found.schema} == {field.name: field.type for field in expected.schema}


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_webdataset(tmp_path, monkeypatch, capsys, compression):
    """Both ways: the tar files that curate writes are a source of ingest, and give the same samples."""
    expected = [{"text": f"{i} ü", "blob": bytes([i, 0, 255])} for i in range(40)]
    table = pa.table({name: [row[name] for row in expected] for name in ("text", "blob")})
    pq.write_table(table, tmp_path / "in.parquet")
    run(monkeypatch, capsys, "ingest", tmp_path / "in.parquet", "--out", tmp_path / "mds")
    arguments = ("--format", "webdataset", "--compression", compression)
    run(monkeypatch, capsys, "curate", "--all", tmp_path / "mds", "--out", tmp_path / "tar", *arguments)
    files = sorted((tmp_path / "tar" / "data").iterdir())
    run(monkeypatch, capsys, "ingest", *files, "--out", tmp_path / "again")
    run(monkeypatch, capsys, "curate", "--all", tmp_path / "again", "--out", tmp_path / "out", "--format", "parquet")
    found = pq.read_table(tmp_path / "out" / "data" / "part-00000.parquet").to_pylist()
    text = next(name for name in found[0] if name.startswith("text"))
    assert [{"text": row[text], "blob": row["blob"]} for row in found] == expected
