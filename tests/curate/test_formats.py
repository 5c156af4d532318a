"""Each format written, and read back by the tools that people use: Streaming, webdataset, datasets, DuckDB, Polars, pyarrow, json."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curate_runs import COLUMNS, describe, sample, write_log, write_stream
from PIL import Image

from udsstream.curate.chosen import Choice, choose
from udsstream.curate.write import Output, curate_log, curate_stream
from udsstream.errors import DataError, ShardError
from udsstream.selection_log.reader import SelectionLog

SHARD = 400_000


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[Path, dict[int, dict[str, Any]]]:
    """A run over two streams, and every sample by its id."""
    root = tmp_path_factory.mktemp("source")
    rows = write_stream(root / "animals", [sample(i, "a") for i in range(40)], COLUMNS)
    rows += write_stream(root / "numbers", [sample(i, "b") for i in range(40, 66)], COLUMNS, compression="zstd:3")
    write_log(root / "run", [root / "animals", root / "numbers"], steps=26)
    return root / "run", dict(enumerate(rows))


@pytest.fixture(scope="module")
def expected(source) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What an output must hold, in order: (the sample's columns, the added ones)."""
    run, rows = source
    log = SelectionLog.open(run)
    table = log.table().to_pylist()
    out = []
    for sample_id in choose(log, Choice()).sample_id.tolist():
        offers = [row for row in table if row["sample_id"] == sample_id]
        taken = [row for row in offers if row["selected"]]
        scores = [row["score"] for row in offers]
        added = {
            "score": taken[0]["score"],
            "intra": taken[0]["intra"],
            "inter": taken[0]["inter"],
            "mean_score": pytest.approx(sum(scores) / len(scores), rel=1e-12),
            "times_chosen": len(taken),
            "times_offered": len(offers),
            "first_step": taken[0]["step"],
            "stream": ["animals", "numbers"][taken[0]["stream"]],
            "sample_id": sample_id,
        }
        out.append((rows[sample_id], {f"uds_{name}": value for name, value in added.items()}))
    assert len(out) > 20
    assert {added["uds_stream"] for _, added in out} == {"animals", "numbers"}
    return out


def written(source, tmp_path: Path, format: str, **settings: Any) -> Path:
    curate_log(
        source[0], tmp_path / "out", choice=Choice(), output=Output(format=format, shard_bytes=SHARD, **settings)
    )
    return tmp_path / "out"


def streaming(**settings: Any) -> Any:
    """A StreamingDataset; made anew when another job took the shared memory that it was about to take."""
    from streaming import StreamingDataset

    for _ in range(20):
        try:
            return StreamingDataset(batch_size=1, **settings)
        except FileExistsError:
            continue
    raise AssertionError("shared memory is always taken")


def test_mds_by_streaming(source, expected, tmp_path):
    out = written(source, tmp_path, "mds")
    assert len(list(out.glob("shard.*.mds"))) > 2
    dataset = streaming(local=str(out), validate_hash="sha1")
    assert len(dataset) == len(expected)
    for found, (row, added) in zip((dataset[i] for i in range(len(dataset))), expected, strict=True):
        for name, value in row.items():
            np.testing.assert_equal(found[name], value)
        for name, value in added.items():
            assert found[name] == value, name
    from streaming.base.hashing import get_hash

    for entry in json.loads((out / "index.json").read_bytes())["shards"]:
        assert entry["raw_data"]["hashes"]["xxh64"] == get_hash(
            "xxh64", (out / entry["raw_data"]["basename"]).read_bytes()
        )


@pytest.mark.parametrize("compression", ["zstd:5", "zstd"])
def test_compressed_mds_by_streaming(source, expected, tmp_path, compression):
    out = written(source, tmp_path, "mds", compression=compression)
    assert not list(out.glob("*.mds"))
    dataset = streaming(remote=str(out), local=str(tmp_path / "cache"), validate_hash="sha1")
    assert [dataset[i]["text"] for i in range(len(dataset))] == [row["text"] for row, _ in expected]


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_webdataset_by_webdataset(source, expected, tmp_path, compression):
    import webdataset

    out = written(source, tmp_path, "webdataset", compression=compression)
    shards = sorted(str(path) for path in (out / "data").iterdir())
    assert len(shards) > 2
    found = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    for sample_, (row, added) in zip(found, expected, strict=True):
        assert sample_["__key__"] == f"{added['uds_sample_id']:012d}"
        assert sample_["text.txt"] == row["text"]
        assert sample_["messages.json"] == row["messages"]
        assert sample_["blob"] == row["blob"]
        for name in ("number", "small", "ratio", "exact"):
            assert sample_[f"{name}.json"] == row[name]
        assert sample_["huge.json"] == str(row["huge"])
        assert Decimal(sample_["price.json"]) == row["price"]
        for name in ("tokens", "image", "any"):
            np.testing.assert_equal(sample_[f"{name}.npy"], row[name])
            assert sample_[f"{name}.npy"].dtype == row[name].dtype
        assert sample_["uds.json"] == added


def test_parquet_by_four_readers(source, expected, tmp_path):
    import datasets
    import duckdb
    import polars

    out = written(source, tmp_path, "parquet")
    files = sorted(str(path) for path in (out / "data").iterdir())
    assert len(files) > 2
    table = pa.concat_tables([pq.read_table(file, page_checksum_verification=True) for file in files])
    types = {field.name: str(field.type) for field in table.schema}
    assert types | {
        "text": "string", "messages": "string", "blob": "binary", "number": "int64", "small": "uint8", "ratio": "float",
        "exact": "double", "tokens": "list<element: int32>", "image": "list<element: list<element: float>>", "huge": "string",
        "any": "list<element: list<element: int16>>", "price": "string", "uds_score": "float", "uds_times_chosen": "int32",
        "uds_sample_id": "int64", "uds_stream": "string", "uds_mean_score": "double",
    } == types  # fmt: skip
    by_duckdb = duckdb.sql(f"SELECT * FROM read_parquet('{out}/data/*.parquet')")
    names = [column[0] for column in by_duckdb.description]
    readers = {
        "pyarrow": table.to_pylist(),
        "datasets": list(
            datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
        ),
        "polars": polars.read_parquet(files).to_dicts(),
        "duckdb": [dict(zip(names, row, strict=True)) for row in by_duckdb.fetchall()],
    }
    for reader, rows in readers.items():
        for found, (row, added) in zip(rows, expected, strict=True):
            assert found["text"] == row["text"], reader
            assert json.loads(found["messages"]) == row["messages"]
            assert bytes(found["blob"]) == row["blob"]
            for name in ("number", "small", "ratio", "exact"):
                assert found[name] == row[name], (reader, name)
            assert int(found["huge"]) == row["huge"]
            assert Decimal(found["price"]) == row["price"]
            for name in ("tokens", "image", "any"):
                assert np.array(found[name]).tolist() == row[name].tolist(), (reader, name)
            for name, value in added.items():
                assert found[name] == value, (reader, name)
    metadata = pq.ParquetFile(files[0]).metadata
    assert metadata.row_group(0).column(0).compression == "ZSTD"


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd:1"])
def test_jsonl_by_json(source, expected, tmp_path, compression):
    import zstandard

    out = written(source, tmp_path, "jsonl", compression=compression)
    lines = []
    for path in sorted((out / "data").iterdir()):
        data = path.read_bytes()
        if compression != "none":
            data = (
                gzip.decompress(data)
                if compression == "gzip"
                else zstandard.ZstdDecompressor().stream_reader(data).read()
            )
        lines += data.decode().split("\n")[:-1]
    for line, (row, added) in zip(lines, expected, strict=True):
        found = json.loads(line)
        assert {name: found[name] for name in added} == added
        for name in ("text", "messages", "number", "small", "ratio", "exact"):
            assert found[name] == row[name], name
        assert base64.b64decode(found["blob"]["base64"]) == row["blob"]
        assert (int(found["huge"]), Decimal(found["price"])) == (row["huge"], row["price"])
        assert found["tokens"] == row["tokens"].tolist()
        assert found["any"] == {"dtype": "int16", "values": row["any"].tolist()}
        assert list(found) == [*sorted(row), *added]


def test_jsonl_by_three_readers(source, expected, tmp_path):
    import datasets
    import duckdb
    import polars

    out = written(source, tmp_path, "jsonl")
    files = sorted(str(path) for path in (out / "data").iterdir())
    texts = [row["text"] for row, _ in expected]
    loaded = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["text"][:] == texts
    by_duckdb = duckdb.sql(
        f"SELECT text, uds_score FROM read_json_auto('{out}/data/*.jsonl', maximum_object_size=100000000)"
    )
    assert by_duckdb.fetchall() == [(row["text"], added["uds_score"]) for row, added in expected]
    assert polars.concat([polars.read_ndjson(file).select("text") for file in files])["text"].to_list() == texts


@pytest.mark.parametrize("format", ["mds", "webdataset", "parquet", "jsonl"])
@pytest.mark.parametrize("compression", ["gzip", None])
def test_the_same_bytes_again(source, tmp_path, format, compression):
    """Also under another name, at another time."""
    if (format, compression) == ("mds", "gzip"):
        compression = "zstd"
    output = Output(format=format, shard_bytes=SHARD, compression=compression)
    contents = []
    for name in ("one", "another"):
        curate_log(source[0], tmp_path / name, choice=Choice(), output=output)
        found = {p.relative_to(tmp_path / name): p for p in sorted((tmp_path / name).rglob("*")) if p.is_file()}
        contents.append({str(name): hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()})
        if format == "webdataset" and compression is None:
            import tarfile

            with tarfile.open(next(p for p in found.values() if p.suffix == ".tar")) as tar:
                members = tar.getmembers()
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert contents[0] == contents[1]


def test_a_whole_stream_round_trip(tmp_path):
    """MDS → JSONL holds every row in order with its columns alone; MDS → MDS the same bytes for each sample, an image's too."""
    picture = io.BytesIO()
    Image.new("RGB", (5, 4), (200, 10, 60)).save(picture, format="JPEG", quality=50)
    rows = [
        {
            "text": f"{i} ü",
            "photo": Image.open(io.BytesIO(picture.getvalue())),
            "json": {"k": [i, None, "😀"]},
        }
        for i in range(50)
    ]
    columns = {"text": "str", "photo": "jpeg", "json": "json"}
    write_stream(tmp_path / "in", rows, columns, hashes=["sha1"])
    result = curate_stream(str(tmp_path / "in"), tmp_path / "jsonl", output=Output(format="jsonl"))
    assert (result.samples, result.title) == (50, "in")
    (file,) = (tmp_path / "jsonl" / "data").iterdir()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [{"text": row["text"], "json": row["json"]} for row in found] == [
        {"text": row["text"], "json": row["json"]} for row in rows
    ]
    assert set(found[0]) == set(columns)

    from streaming.base.format import reader_from_json

    def raw(folder: Path) -> list[bytes]:
        shards = json.loads((folder / "index.json").read_bytes())["shards"]
        readers = [reader_from_json(str(folder), None, shard) for shard in shards]
        return [reader.get_sample_data(i) for reader in readers for i in range(len(reader))]

    curate_stream(str(tmp_path / "in"), tmp_path / "mds", output=Output(format="mds", shard_bytes=500))
    assert raw(tmp_path / "mds") == raw(tmp_path / "in")
    assert base64.b64decode(found[7]["photo"]["base64"]) in raw(tmp_path / "in")[7]

    import webdataset

    curate_stream(str(tmp_path / "in"), tmp_path / "tar", output=Output(format="webdataset"))
    first = next(
        iter(webdataset.WebDataset(str(tmp_path / "tar/data/part-00000.tar"), shardshuffle=False).decode("pil"))
    )
    assert first["photo.jpg"].size == (5, 4)
    assert first["json"] == {"k": [0, None, "😀"]}  # named as its extension: not json.json


def test_unscored_samples_have_no_score(tmp_path):
    """None in Parquet, null in JSON, NaN in MDS."""
    import uds_log

    for name, count in uds_log.STREAMS:
        write_stream(tmp_path / name, [{"text": f"{name} {i}"} for i in range(count)], size_limit=None)
    folders = [tmp_path / name for name, _ in uds_log.STREAMS]
    from udsstream.curate.columns import AddedColumns
    from udsstream.curate.samples import Samples, recorded_streams

    run = describe(folders)
    log = SelectionLog.open(uds_log.write(tmp_path / "run", steps=4, off=(0, 1), run={"streams": run["streams"]}))
    chosen = choose(log, Choice())
    added = AddedColumns.of(chosen, [name for name, _ in uds_log.STREAMS], "uds_")
    scores = [row[0] for row in added.rows(0, len(chosen))]
    assert [value is None for value in scores] == np.isnan(chosen.score).tolist()
    assert any(value is None for value in scores)
    with Samples(recorded_streams(run), cache=tmp_path / "cache") as samples:
        located = samples.locate(chosen.stream, chosen.sample_id)  # (the log's shards are made up)
        from udsstream.curate.formats import FORMATS, Row, parse_compression

        columns = (*samples.columns, *added.columns)
        rows = [
            Row(sample_id, [*values, *more])
            for sample_id, values, more in zip(
                chosen.sample_id.tolist(),
                samples.read(located, 0, len(located)),
                added.rows(0, len(chosen)),
                strict=True,
            )
        ]
        for name in ("parquet", "jsonl", "mds"):
            format = FORMATS[name]()
            (tmp_path / name).mkdir()
            path = tmp_path / name / format.shard_name(0, parse_compression("none", format)).rpartition("/")[2]
            entry = format.write(path, columns, rows, parse_compression("none", format))
            format.finish(tmp_path / name, [entry])
    expected = [None if math.isnan(score) else score for score in chosen.score.tolist()]
    assert pq.read_table(tmp_path / "parquet" / "part-00000.parquet")["uds_score"].to_pylist() == expected
    lines = (tmp_path / "jsonl" / "part-00000.jsonl").read_text().splitlines()
    assert [json.loads(line)["uds_score"] for line in lines] == expected
    dataset = streaming(local=str(tmp_path / "mds"))
    np.testing.assert_array_equal([dataset[i]["uds_score"] for i in range(len(dataset))], chosen.score)


# What a format cannot hold --------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, rows: list[dict[str, Any]], columns: dict[str, str], format: str) -> str:
    write_stream(tmp_path / "in", rows, columns)
    with pytest.raises(DataError) as caught:
        curate_stream(str(tmp_path / "in"), tmp_path / "out", output=Output(format=format))
    assert not list((tmp_path / "out").glob("*")) or {p.name for p in (tmp_path / "out").iterdir()} == {"_job"}
    return str(caught.value)


def test_a_number_that_is_not_finite_in_json(tmp_path):
    message = refused(tmp_path, [{"x": 1.0}, {"x": math.inf}], {"x": "float64"}, "jsonl")
    assert message.startswith(
        "sample 1: column 'x' holds a number that is not finite, and JSON has none; use --format parquet or mds"
    )


def test_arrays_of_several_shapes_in_parquet(tmp_path):
    rows = [{"x": np.zeros(3, np.int32)}, {"x": np.zeros((1, 2), np.int32)}]
    message = refused(tmp_path, rows, {"x": "ndarray:int32"}, "parquet")
    assert (
        "sample 1: column 'x' has a 2-dimensional array of int32, the first sample's was 1-dimensional of int32"
        in message
    )
    rows = [{"x": np.zeros(3, np.int32)}, {"x": np.zeros(3, np.int64)}]
    message = refused(tmp_path / "types", rows, {"x": "ndarray"}, "parquet")
    assert "has a 1-dimensional array of int64" in message


def test_images_that_only_mds_holds(tmp_path):
    picture = Image.new("RGB", (2, 2))
    for format in ("webdataset", "parquet", "jsonl"):
        message = refused(tmp_path / format, [{"x": picture}], {"x": "pil"}, format)
        assert "column 'x' of encoding pil has no" in message
    curate_stream(str(tmp_path / "jsonl" / "in"), tmp_path / "mds", output=Output(format="mds"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a/b": "str"}, "column 'a/b' cannot be the name of a file"),
        ({"x.": "str"}, "column 'x.' cannot be the name of a file"),
        ({"__key__": "str"}, "column '__key__' cannot be the name of a file"),
        ({"Text": "str", "text": "str"}, "columns 'Text' and 'text' would both be 'text.txt'"),
        ({"x": "str", "x.txt": "str"}, "columns 'x' and 'x.txt' would both be 'x.txt'"),
    ],
)
def test_names_that_webdataset_would_not_give_back(tmp_path, columns, message):
    assert message in refused(tmp_path, [dict.fromkeys(columns, "a")], columns, "webdataset")


def test_pickles_are_refused(tmp_path):
    for format in ("mds", "jsonl"):
        message = refused(tmp_path / format, [{"x": {1: 2}}], {"x": "pkl"}, format)
        assert "column 'x' holds pickles, which can run code when they are read, and is refused" in message


def test_text_that_is_no_utf8(tmp_path):
    write_stream(tmp_path / "in", [{"x": b"\xff\xfe"}], {"x": "bytes"}, hashes=[])
    index = json.loads((tmp_path / "in" / "index.json").read_bytes())
    index["shards"][0]["column_encodings"] = ["str"]
    (tmp_path / "in" / "index.json").write_text(json.dumps(index))
    for format in ("jsonl", "parquet"):
        with pytest.raises(ShardError, match="sample 0: column 'x' cannot be decoded as str"):
            curate_stream(str(tmp_path / "in"), tmp_path / format, output=Output(format=format))
