"""Each kind of source becomes MDS and comes back equal, by Streaming itself; with the bytes that a plain MDSWriter loop writes."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import json
import math
import random
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import zstandard
from ingested import ANY, content, plain_loop, rejects_of, rows_of, run, shards, write_lines

from udsstream.errors import ConfigError, DataError
from udsstream.mosaicml.dataset import UDSStreamingDataset

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
TEXTS = [
    "",
    "plain",
    "Grüße, 世界 🙂 \U0010ffff",
    "a\x00b",
    "line\u2028break\nand another",
    "x" * 5000,
    "\\ \" ' \t",
    "\ufeffmark",
]
COLUMNS = {"n": "int", "s": "str", "f": "float64", "deep": "json"}


def make_rows(count: int, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)
    return [
        {
            "n": draw.choice([0, -1, 2**63 - 1, -(2**63), draw.randrange(10**6)]),
            "s": draw.choice(TEXTS) + str(i),
            "f": draw.choice([0.0, -0.0, 1e300, 0.1, math.inf, draw.random()]),
            "deep": draw.choice(
                [None, True, [1, [2, {"a": None}]], {"é": "🙂", "": []}, [{"role": "user", "content": "x\ny"}]]
            ),
        }
        for i in range(count)
    ]


ROWS = make_rows(300)


# JSONL --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("compression", [None, "zstd:3", "br:2"])
def test_jsonl_has_the_bytes_of_a_plain_loop(tmp_path, workers, compression):
    source = write_lines(tmp_path / "a.jsonl", ROWS)
    result = run(source, tmp_path / "out", workers=workers, compression=compression)
    assert shards(content(result.out)) == plain_loop(ROWS, COLUMNS, tmp_path / "plain", compression=compression)
    assert result.manifest["rows"] == {"read": 300, "written": 300, "rejected": 0, "blank_lines": 0}
    assert len(result.manifest["sources"][0]["sha256"]) == 64
    assert rows_of(result.out) == ROWS


def test_gzip_has_no_time_in_it(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "a.jsonl", ROWS)
    first = content(run(source, tmp_path / "a", compression="gz:6").out)
    monkeypatch.setattr("time.time", lambda: 1e9)
    assert content(run(source, tmp_path / "b", compression="gz:6").out) == first
    assert rows_of(tmp_path / "a") == ROWS


def test_twice_and_with_any_number_of_workers_the_whole_folder_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("udsstream.ingest.sources.CHUNK", 4096)
    monkeypatch.setattr("udsstream.ingest.readers.CHUNK", 4096)
    lines = [json.dumps(row) for row in make_rows(500)]
    lines[100:100] = ["not json", "", '{"n": 1}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    results = [content(run("a.jsonl", Path(f"out{i}"), workers=workers).out) for i, workers in enumerate([1, 1, 2, 4])]
    assert results[0] == results[1] == results[2] == results[3]
    assert len(results[0]) > 10
    assert json.loads(results[0]["ingest.json"])["rows"] == {
        "read": 502,
        "written": 500,
        "rejected": 2,
        "blank_lines": 1,
    }


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("chunk", [16, 1000, 1 << 20])
def test_lines_are_the_same_however_they_are_read(tmp_path, monkeypatch, ending, chunk):
    monkeypatch.setattr("udsstream.ingest.sources.CHUNK", chunk)
    monkeypatch.setattr("udsstream.ingest.readers.CHUNK", chunk)
    text = "\ufeff" + "\r\n".join(json.dumps({"s": text}, ensure_ascii=False) for text in TEXTS) + "\n\n \n"
    data = text.encode() + b'{"s": "no newline"}'
    halves = data[: len(data) // 2], data[len(data) // 2 :]
    packed = {
        "": data,
        ".gz": b"".join(map(gzip.compress, halves)),  # two members, two frames
        ".zst": b"".join(map(zstandard.ZstdCompressor().compress, halves)),
    }[ending]
    (tmp_path / f"a.jsonl{ending}").write_bytes(packed)
    result = run(tmp_path / f"a.jsonl{ending}", tmp_path / "out")
    assert [row["s"] for row in rows_of(result.out)] == [*TEXTS, "no newline"]
    assert result.manifest["rows"]["blank_lines"] == 2 + (chunk < 0)


def test_several_files_a_glob_and_a_folder_are_read_in_order(tmp_path, monkeypatch):
    for name, part in (("b", ROWS[100:200]), ("a", ROWS[:100]), ("sub/c", ROWS[200:])):
        write_lines(tmp_path / "in" / f"{name}.jsonl", part)
    (tmp_path / "in" / ".hidden").write_text("not data")
    monkeypatch.chdir(tmp_path)
    whole = shards(content(run("in", Path("folder")).out))
    assert whole == shards(content(run("in/**/*.jsonl", Path("glob")).out))
    assert whole == shards(content(run(["in/a.jsonl", "in/b.jsonl", "in/sub/c.jsonl"], Path("files"), workers=2).out))
    assert rows_of(Path("folder")) == ROWS
    names = [source["name"] for source in json.loads(Path("folder/ingest.json").read_text())["sources"]]
    assert names == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]


def test_a_url_is_read_through_fsspec(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for number in range(3):
        memory.pipe(
            f"/bucket/part{number}.jsonl",
            "".join(json.dumps(row) + "\n" for row in ROWS[number * 100 :][:100]).encode(),
        )
    result = run("memory://bucket/*.jsonl", tmp_path / "out", workers=2)
    assert rows_of(result.out) == ROWS
    assert [source["sha256"] for source in result.manifest["sources"]] == [None] * 3
    with pytest.raises(
        DataError, match=r"memory://bucket/none\.jsonl cannot be read.*FileNotFoundError.*check the address"
    ):
        run("memory://bucket/none.jsonl", tmp_path / "other")
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/a\.jsonl cannot be read"):
        run("http://127.0.0.1:9/a.jsonl", tmp_path / "other")
    assert not (tmp_path / "other").exists()


# Parquet ------------------------------------------------------------------------------------------------------------------


def arrow_table() -> pa.Table:
    return pa.table(
        {
            "i8": pa.array([1, -128, 127, 0], pa.int8()),
            "i64": pa.array([2**63 - 1, -(2**63), 0, 7], pa.int64()),
            "u64": pa.array([2**64 - 1, 0, 1, 2], pa.uint64()),
            "f32": pa.array([0.1, float("inf"), -0.0, 1e-40], pa.float32()),
            "f64": pa.array([float("nan"), 0.1, -0.0, 1e308], pa.float64()),
            "flag": pa.array([True, False, True, True]),
            "text": pa.array(["", "é🙂", "a\x00b", "x" * 3000]),
            "cat": pa.array(["a", "b", "a", "a"]).dictionary_encode(),
            "null": pa.array(["a", None, "", "b"]),
            "blob": pa.array([b"", b"\x00\xff", b"\n", b"x" * 3000]),
            "deep": pa.array([[{"role": "user", "content": "a"}], [], None, [{"role": "b", "content": None}]]),
            "when": pa.array([datetime.datetime(2024, 1, 2, 3, 4, 5, 678901)] * 4, pa.timestamp("us")),
            "price": pa.array([decimal.Decimal("1.10")] * 4, pa.decimal128(9, 2)),
        }
    )


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("group", [1, 3, 1000])
def test_parquet(tmp_path, workers, group):
    table = arrow_table()
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=group)
    result = run(tmp_path / "a.parquet", tmp_path / "out", workers=workers)
    found = rows_of(result.out)
    expected = table.to_pylist()
    for row in expected:
        row["when"] = "2024-01-02 03:04:05.678901"
    for row, wanted in zip(found, expected, strict=True):
        assert row.keys() == wanted.keys()
        for name, value in row.items():
            assert value == wanted[name] or (math.isnan(value) and math.isnan(wanted[name])), name
            if name not in ("f32", "f64", "u64"):  # NumPy scalars
                assert type(value) is type(wanted[name]), name
    encodings = {column["name"]: column["encoding"] for column in result.manifest["columns"]}
    assert encodings == {
        "i8": "int", "i64": "int", "u64": "uint64", "f32": "float64", "f64": "float64", "flag": "json", "text": "str", "cat": "str",
        "null": "json", "blob": "bytes", "deep": "json", "when": "str", "price": "str_decimal",
    }  # fmt: skip
    assert shards(content(result.out)) == plain_loop(expected, encodings, tmp_path / "plain")


def test_nulls_are_found_wherever_they_are(tmp_path):
    pq.write_table(pa.table({"s": ["a"] * 5000 + [None]}), tmp_path / "a.parquet", row_group_size=500)
    result = run(tmp_path / "a.parquet", tmp_path / "out")
    assert [column["encoding"] for column in result.manifest["columns"]] == ["json"]
    assert rows_of(result.out)[-1] == {"s": None}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            pa.array([{"bytes": b"x"}]),
            r"the column 'x' is of type struct<bytes: binary>, which MDS cannot store.*--drop",
        ),
        (pa.array([b"x", None]), r"the column 'x' holds nulls, which binary has no place for in MDS: --drop x"),
    ],
)
def test_what_mds_cannot_store_is_said_before_anything_is_written(tmp_path, column, message):
    table = pa.table({"x": column, "y": ["a"] * len(column)})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        run(tmp_path / "a.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert rows_of(run(tmp_path / "a.parquet", tmp_path / "out", drop=("x",)).out) == [{"y": "a"}] * len(column)


def test_parquet_files_of_different_columns_are_refused(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"b": [1]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"a\.parquet and b\.parquet differ in the column 'a'"):
        run(tmp_path, tmp_path / "out")


# CSV ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz"])
@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_csv(tmp_path, monkeypatch, ending, chunk):
    monkeypatch.setattr("udsstream.ingest.sources.CHUNK", chunk)
    monkeypatch.setattr("udsstream.ingest.readers.CHUNK", chunk)
    texts = [text for text in TEXTS if text] + ['"', ",", "\r\n in quotes \n\n", "007", "1.50", "a\tb"]
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t" if ending == "tsv" else ",")
    writer.writerow(["question", "answer"])
    for i, value in enumerate(texts):
        writer.writerow([value, f"{i}"])
    data = ("\ufeff" + text.getvalue() + "\r\n").encode()
    (tmp_path / f"a.{ending}").write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    result = run(tmp_path / f"a.{ending}", tmp_path / "out", workers=2, prompt="question", response="answer")
    assert rows_of(result.out) == [{"prompt": value, "response": f"{i}"} for i, value in enumerate(texts)]
    assert result.manifest["rows"]["blank_lines"] == 1


def test_csv_cells_are_text_unless_said_otherwise(tmp_path):
    (tmp_path / "a.csv").write_text(
        'id,score,tags,name\n007,0.5,"[1, ""a""]",x\n-8,nan,{},y\n1.0,1,[],z\n9,?,[],z\n9,1,[,z\n'
    )
    result = run(
        tmp_path / "a.csv", tmp_path / "out", rejects=ANY, encodings={"id": "int", "score": "float64", "tags": "json"}
    )
    found = rows_of(result.out)
    assert [row["id"] for row in found] == [7, -8]
    assert found[0]["tags"] == [1, "a"]
    assert math.isnan(found[1]["score"])
    reasons = [(reject["line"], reject["reason"]) for reject in rejects_of(result.out)]
    assert reasons == [
        (4, "column 'id': '1.0' is no int"),
        (5, "column 'score': '?' is no float64"),
        (6, "column 'tags': '[' is no json (not JSON: Expecting value at character 2)"),
    ]


# WebDataset ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_webdataset(tmp_path, workers):
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"s-{shard:03}.tar")) as writer:
            for i in range(300):
                writer.write(
                    {
                        "__key__": f"dir/{shard}-{i}",
                        "txt": TEXTS[i % len(TEXTS)],
                        "json": {"question": f"q{i}", "n": [i, None]},
                        "cls": i,
                        "pkl": b"\x80\x04not to be opened",
                        "img.bin": bytes([i % 256]) * 3,
                    }
                )
    result = run(
        str(tmp_path / "s-{000..001}.tar"), tmp_path / "out", workers=workers, prompt="json.question", text="txt"
    )
    found = rows_of(result.out)
    assert len(found) == 600
    assert [row["__key__"] for row in found[:2]] == ["dir/0-0", "dir/0-1"]
    assert found[301] == {
        "__key__": "dir/1-1",
        "text": TEXTS[1],
        "prompt": "q1",
        "json": {"question": "q1", "n": [1, None]},
        "cls": 1,
        "pkl": b"\x80\x04not to be opened",
        "img.bin": b"\x01\x01\x01",
    }
    # webdataset itself reads the same samples
    theirs = webdataset.WebDataset([str(tmp_path / "s-000.tar")], shardshuffle=False)
    assert [sample["__key__"] for sample in theirs] == [row["__key__"] for row in found[:300]]


# Hugging Face -------------------------------------------------------------------------------------------------------------


def hf_rows() -> list[dict]:
    return [{"question": f"q{i}", "answer": TEXTS[i % len(TEXTS)], "n": i, "tags": ["a"] * (i % 3)} for i in range(700)]


@pytest.mark.parametrize("form", ["saved", "saved with splits", "a folder of files, streamed"])
def test_hugging_face(tmp_path, form):
    data = datasets.Dataset.from_list(hf_rows())
    folder = tmp_path / "data"
    if form == "saved":
        data.save_to_disk(str(folder))
        source = str(folder)  # told by its files
    elif form == "saved with splits":
        datasets.DatasetDict({"train": data, "test": data.select(range(3))}).save_to_disk(str(folder))
        source = f"hf:{folder}"
    else:
        folder.mkdir()
        data.to_parquet(str(folder / "train-00000.parquet"))
        source = f"hf:{folder}"
    result = run(source, tmp_path / "out", prompt="question", response="answer", workers=2)
    expected = [
        {"prompt": row["question"], "response": row["answer"], "n": row["n"], "tags": row["tags"]} for row in hf_rows()
    ]
    assert rows_of(result.out) == expected
    if form == "saved with splits":
        assert len(rows_of(run(f"hf:{folder}::test", tmp_path / "test").out)) == 3
        with pytest.raises(ConfigError, match=r"has the splits train, test: name one, as in"):
            run(f"hf:{folder}::dev", tmp_path / "dev")


def test_no_code_of_a_hugging_face_data_set_is_run(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DataError, match=r"hf:.*data .*cannot be read"):
        run(f"hf:{tmp_path / 'data'}", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


# Text files ---------------------------------------------------------------------------------------------------------------


def test_a_folder_of_text_files(tmp_path):
    for i, text in enumerate(TEXTS):
        path = tmp_path / "in" / f"d{i % 2}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    result = run(tmp_path / "in", tmp_path / "out", workers=2)
    found = rows_of(result.out)
    assert [row["path"] for row in found] == sorted(f"d{i % 2}/{i}.txt" for i in range(len(TEXTS)))
    texts = {f"d{i % 2}/{i}.txt": text.removeprefix("\ufeff") for i, text in enumerate(TEXTS)}
    assert {row["path"]: row["text"] for row in found} == texts


# Kinds --------------------------------------------------------------------------------------------------------------------


def test_a_kind_can_be_forced_and_is_asked_for_where_it_is_not_clear(tmp_path):
    write_lines(tmp_path / "a.json", [{"x": 1}])
    with pytest.raises(
        DataError, match=r"cannot be told from the endings: unknown: .*a\.json; .*one row per line: --kind jsonl"
    ):
        run(tmp_path / "a.json", tmp_path / "out")
    assert rows_of(run(tmp_path / "a.json", tmp_path / "out", kind="jsonl").out) == [{"x": 1}]
    write_lines(tmp_path / "two" / "a.jsonl", [{"x": 1}])
    (tmp_path / "two" / "b.csv").write_text("x\n1\n")
    with pytest.raises(DataError, match=r"jsonl: a\.jsonl; csv: b\.csv; say it with --kind"):
        run(tmp_path / "two", tmp_path / "out2")
    for given, message in (
        (tmp_path / "none.jsonl", r"none\.jsonl does not exist"),
        (tmp_path / "*.nothing", r"no file matches"),
        ([tmp_path / "a.json", tmp_path / "a.json"], r"a\.json is given twice"),
    ):
        with pytest.raises(DataError, match=message):
            run(given, tmp_path / "out3", kind="jsonl")
    assert not (tmp_path / "out3").exists()


# Whole, real --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"needs GSM8K in {GSM8K}, which only the project's own workplace has")
def test_gsm8k_end_to_end(tmp_path):
    lines = [json.loads(line) for line in (GSM8K / "train.jsonl").read_text().splitlines()]
    rows = [{"prompt": line["question"], "response": line["answer"]} for line in lines]
    settings = {"size_limit": "500kb", "compression": "zstd"}
    result = run(GSM8K / "train.jsonl", tmp_path / "out", workers=2, prompt="question", response="answer", **settings)
    plain = plain_loop(rows, {"prompt": "str", "response": "str"}, tmp_path / "plain", **settings)
    assert shards(content(result.out)) == plain
    data = UDSStreamingDataset(local=str(result.out), shuffle=False, batch_size=1, validate_hash="sha1")
    assert len(data) == len(rows) == 7473
    assert [data[i] for i in range(len(data))] == [row | {"sample_id": i} for i, row in enumerate(rows)]


def test_a_tar_that_was_compressed_as_a_whole(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("k.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert rows_of(run(tmp_path / "a.tar.gz", tmp_path / "out").out) == [{"__key__": "k", "txt": "abc"}]
