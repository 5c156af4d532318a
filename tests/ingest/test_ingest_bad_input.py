"""Each bad row is written down with its place and reason, each bad file is a clear error, and nothing half-written looks whole."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import resource
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from ingested import ANY, content, rejects_of, rows_of, run, write_lines

from udsstream.errors import ConfigError, DataError, OutputExistsError, OutputWriteError
from udsstream.ingest.run import IngestConfig, RejectLimit, ingest

GOOD = [{"s": f"row {i}", "n": i} for i in range(1100)]
"""More than the types are told from."""


def lines_of(*bad: bytes) -> bytes:
    """The good lines and then the bad ones, and a good one after them."""
    good = "".join(json.dumps(row) + "\n" for row in GOOD).encode()
    return good + b"\n".join(bad) + b'\n{"s": "after", "n": 1}\n'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes at character 2"),
        (b'{"s": "a", "n": 1} x', "not JSON: Extra data at character 20"),
        (b"[1]", "not a JSON object with named columns but a list"),
        (b"null", "not a JSON object with named columns but null"),
        (b'{"s": "a"}', "the column 'n' is missing; the row has 's'"),
        (b"{}", "the column 'n' is missing; the row has no columns"),
        (
            b'{"s": "a", "n": 1, "m": 2}',
            "it has the column 'm', which the first rows have not (--column m=json keeps it",
        ),
        (b'{"s": 1, "n": 1}', "column 's': an integer, expected a string"),
        (b'{"s": null, "n": 1}', "column 's': null, expected a string"),
        (b'{"s": "a", "n": "1"}', "column 'n': a string, expected an integer"),
        (b'{"s": "a", "n": true}', "column 'n': true or false, expected an integer"),
        (b'{"s": "a", "n": 1.0}', "column 'n': a float, expected an integer"),
        (b'{"s": "a", "n": 9223372036854775808}', "column 'n': 9223372036854775808 is no 64-bit integer"),
        (b'{"s": "a", "n": ' + b"9" * 5000 + b"}", "not JSON that can be kept: Exceeds the limit"),
        (b'{"s": "\\ud800", "n": 1}', "column 's': a lone surrogate '\\ud800' at character 1"),
        (b'{"s": "\xff", "n": 1}', "not UTF-8: byte 8 of the line is 0xff"),
        (b'{"s": "a\x00", "n": 1}', "not JSON: Invalid control character at at character 9"),
        (b"\x00" * 20, "not JSON: Expecting value at character 1"),
        (b'{"s": "a", "s": "b", "n": 1}', "not JSON that can be kept: the key 's' is there twice"),
        (b'{"s": ' + b"[" * 100000 + b"]" * 100000 + b', "n": 1}', "not JSON that can be read: nested too deep"),
        (
            json.dumps({"s": "x" * 300_000, "n": 1}).encode(),
            "the line has 300017 bytes, more than --max-row-size 204800",
        ),
        (
            json.dumps({"s": "x" * 3_000_000, "n": 1}).encode(),
            "the line has 3000017 bytes, more than --max-row-size 204800",
        ),
        ('{"s": "ü", "n": 1}'.encode("utf-16"), "not UTF-8: byte 1 of the line is 0xff"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("place", ["last", "middle"])
def test_bad_lines(tmp_path, line, reason, place):
    data = lines_of(line)
    if place == "last":
        data = data[: data.index(b'\n{"s": "after"')]
    (tmp_path / "a.jsonl").write_bytes(data)
    result = run(tmp_path / "a.jsonl", tmp_path / "out", rejects=ANY, max_row_size="200kb")
    (reject, *others) = rejects_of(result.out)
    assert reject["reason"].startswith(reason)
    assert (reject["row"], reject["line"], reject["source"]) == (1101, 1101, str(tmp_path / "a.jsonl"))
    raw = reject["raw"].encode("utf-8")
    if b"\xff" not in line:
        assert line.startswith(raw)
    assert (reject["raw_bytes"], reject.get("shortened", False)) == (len(line.split(b"\n")[0]), len(line) > 1000)
    assert rows_of(result.out) == GOOD + [{"s": "after", "n": 1}] * (place == "middle")
    rows = result.manifest["rows"]
    assert rows["read"] == rows["written"] + rows["rejected"]
    assert rows["rejected"] == 1 + len(others)


def test_a_lone_surrogate_in_nested_values_is_refused_and_a_pair_is_not(tmp_path):
    rows = ['{"d": {"a": "\\ud83d\\ude42"}}', '{"d": {"a": ["\\ude42"]}}', '{"d": {"\\ud83d": 1}}'] + ['{"d": {}}'] * 20
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    result = run(tmp_path / "a.jsonl", tmp_path / "out", rejects=ANY)
    assert rows_of(result.out) == [{"d": {"a": "🙂"}}] + [{"d": {}}] * 20
    assert [reject["line"] for reject in rejects_of(result.out)] == [2, 3]


def test_messages_are_held_to_what_training_reads(tmp_path):
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [1]}]
    part = [{"role": "user", "content": ["part"]}]
    bad = {
        "an empty list, expected": [],
        "null, expected a list": None,
        "not JSON: Expecting": "text",
        "message 0 is not": [{"role": "user"}],
        'message 1 is not {"role"': [good[0], {"role": 1, "content": "a"}],
        "message 0: 'content' is a list, expected a string": part,
        "an object, expected a list": {"role": "user"},
    }
    write_lines(tmp_path / "a.jsonl", [{"m": value} for value in [good, *bad.values()]])
    result = run(tmp_path / "a.jsonl", tmp_path / "out", rejects=ANY, messages="m")
    assert rows_of(result.out) == [{"messages": good}]
    for reject, reason in zip(rejects_of(result.out), bad, strict=True):
        assert reject["reason"].startswith(f"column 'm': {reason}")


# The limit ----------------------------------------------------------------------------------------------------------------


def test_too_many_bad_rows_stop_it_and_more_may_be_allowed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of(b"x", b"y", b"z"))
    out = tmp_path / "out"
    with pytest.raises(DataError) as error:
        run(tmp_path / "a.jsonl", out, rejects=RejectLimit(rows=2, share=None))
    assert (
        f"3 of 1104 rows are bad, more than 2 (--max-rejects):\n  {tmp_path / 'a.jsonl'}, line 1101: not JSON"
        in str(error.value)
    )
    assert f"all of them with their text: {out / '_job' / 'rejects.jsonl'}" in str(error.value)
    assert [reject["raw"] for reject in map(json.loads, (out / "_job" / "rejects.jsonl").read_text().splitlines())] == [
        "x",
        "y",
        "z",
    ]
    assert [path.name for path in out.iterdir()] == ["_job"]
    result = run(tmp_path / "a.jsonl", out, rejects=RejectLimit(rows=3, share=None))
    assert result.resumed
    assert result.manifest["rows"] == {"read": 1104, "written": 1101, "rejected": 3, "blank_lines": 0}
    assert [reject["raw"] for reject in rejects_of(out)] == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("limit", "rejected", "read", "at_end", "stops"),
    [
        ("100", 100, 100, True, False),
        ("100", 101, 10**9, False, True),
        ("0", 1, 10**9, False, True),
        ("1%", 5, 100, False, False),
        ("1%", 5, 100, True, True),
        ("1%", 1, 100, True, False),
        ("1%", 101, 10_000, False, True),
        ("0.5%", 100, 20_000, False, False),
        (None, 101, 10**6, False, True),
        (None, 100, 10**6, True, False),
        (None, 2, 100, True, True),
    ],
)
def test_the_limit(limit, rejected, read, at_end, stops):
    found = RejectLimit() if limit is None else RejectLimit.parse(limit)
    assert (found.exceeded(rejected, read, at_end=at_end) is not None) == stops


@pytest.mark.parametrize("text", ["", "-1", "many", "101%", "1.5", "%"])
def test_no_limit(text):
    with pytest.raises(ConfigError, match="neither a number of rows"):
        RejectLimit.parse(text)


def test_nothing_but_bad_rows_is_an_error_whatever_the_limit(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"a": 1}] * 3)
    with pytest.raises(DataError, match="3 of 3 rows are bad, all of them"):
        run(tmp_path / "a.jsonl", tmp_path / "out", rejects=ANY, encodings={"a": "str"})


# Columns ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prompt": "Question"},
            r"--prompt Question: there is no such column; the source has question, n; did you mean 'question'\?",
        ),
        ({"prompt": "quetion"}, r"did you mean 'question'"),
        ({"stream_by": "lang"}, r"--stream-by lang: there is no such column"),
        ({"drop": ("zzz",)}, r"--drop zzz: there is no such column"),
    ],
)
def test_a_missing_column(tmp_path, settings, message):
    write_lines(tmp_path / "a.jsonl", [{"question": "a", "n": 1}])
    with pytest.raises(DataError, match=message):
        run(tmp_path / "a.jsonl", tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "a"}, r"two columns would be named 'text'.*--drop text"),
        (
            {"encodings": {"a": "pkl"}},
            r"--column a=pkl: no encoding that can be chosen \(it would run code when it is read\)",
        ),
        ({"encodings": {"a": "strr"}}, r"did you mean 'str'"),
        ({"encodings": {"a": "ndarray:object"}}, r"no encoding that can be chosen"),
        ({"prompt": "a", "encodings": {"a": "json"}}, r"stored as str, but --column says json"),
        ({"drop": ("a", "text")}, r"no column would be left"),
        ({"compression": "zip"}, r"--compression 'zip' is unknown; it is one of br, bz2"),
        ({"hashes": ("md6",)}, r"--hash 'md6' is unknown"),
        ({"size_limit": "4gb"}, r"--size-limit 4gb: it is a number of bytes from 1 to 2 GiB"),
        ({"size_limit": "0"}, r"--size-limit 0"),
        ({"max_row_size": "much"}, r"--max-row-size much"),
        ({"kind": "xml"}, r"--kind 'xml' is none of jsonl"),
        ({"workers": 0}, r"--workers 0"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, message):
    write_lines(tmp_path / "a.jsonl", [{"a": "x", "text": "y"}])
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "a.jsonl", tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_mixed_types_are_an_error_with_both_places(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"x": 1}, {"x": 2}, {"x": "three"}])
    with pytest.raises(
        DataError,
        match=r"the column 'x' holds mixed types: int in 2 \(first: .*line 1\) and str in 1 \(first: .*line 3\)",
    ):
        run(tmp_path / "a.jsonl", tmp_path / "out")
    assert rows_of(run(tmp_path / "a.jsonl", tmp_path / "out", encodings={"x": "json"}).out) == [
        {"x": 1},
        {"x": 2},
        {"x": "three"},
    ]


def test_one_odd_value_among_many_is_a_reject(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"x": i if i != 50 else "odd"} for i in range(300)])
    result = run(tmp_path / "a.jsonl", tmp_path / "out")
    assert [(r["line"], r["reason"]) for r in rejects_of(result.out)] == [
        (51, "column 'x': a string, expected an integer")
    ]


def test_nulls_absent_keys_and_large_integers_in_the_first_rows(tmp_path):
    rows = [{"a": 1, "b": None, "c": 2**70, "d": 1, "e": True}, {"a": 2, "b": "x", "c": 1, "d": 0.5, "e": False}]
    write_lines(tmp_path / "a.jsonl", [rows[0] | {"o": 1}, rows[1], *[rows[1] | {"o": {"p": 1}}] * 3])
    result = run(tmp_path / "a.jsonl", tmp_path / "out")
    encodings = {column["name"]: column["encoding"] for column in result.manifest["columns"]}
    assert encodings == {"a": "int", "b": "json", "c": "str_int", "d": "float64", "e": "json", "o": "json"}
    assert rows_of(result.out) == [rows[0] | {"o": 1}, rows[1] | {"o": None}, *[rows[1] | {"o": {"p": 1}}] * 3]


def test_only_mapped_columns_and_forced_ones(tmp_path):
    write_lines(
        tmp_path / "a.jsonl",
        [{"q": "x", "ids": [1, 2], "b": 5, "other": None}] * 3 + [{"q": "x", "ids": [300, -1], "b": 256, "new": 1}],
    )
    result = run(
        tmp_path / "a.jsonl",
        tmp_path / "out",
        rejects=ANY,
        text="q",
        only_mapped=True,
        encodings={"ids": "ndarray:uint8", "b": "uint8"},
    )
    found = rows_of(result.out)
    assert [(row["text"], row["ids"].tolist(), row["b"]) for row in found] == [("x", [1, 2], 5)] * 3
    assert [reject["reason"] for reject in rejects_of(result.out)] == ["column 'b': 256 does not fit uint8"]
    result = run(
        tmp_path / "a.jsonl", tmp_path / "out2", rejects=ANY, only_mapped=True, encodings={"ids": "ndarray:uint8"}
    )
    assert "column 'ids': a number in it does not fit uint8" in rejects_of(result.out)[0]["reason"]


# Files --------------------------------------------------------------------------------------------------------------------


def no_result(out: Path) -> None:
    assert not out.exists() or [path.name for path in out.iterdir()] == ["_job"]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress], ids=["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "cut early", "flipped", "garbage", "cut between frames"])
def test_damaged_compression(tmp_path, pack, damage):
    draw = os.urandom(200_000).hex()
    rows = [{"s": draw[i : i + 200]} for i in range(0, len(draw), 200)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    packed = bytearray(pack(text))
    ending = "gz" if packed[:2] == b"\x1f\x8b" else "zst"
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    elif damage == "cut early":
        packed = packed[:9]
    elif damage == "flipped":
        packed[-3] ^= 0xFF if ending == "gz" else 0
        packed[len(packed) // 2] ^= 0xFF
        if ending == "zst":  # a frame without a checksum may hide a flip in a literal: break its header
            packed[0] ^= 0xFF
    elif damage == "garbage":
        packed = bytearray(b"this is no compressed file at all" * 10)
    else:
        packed += pack(text)[:10]
    (tmp_path / f"a.jsonl.{ending}").write_bytes(packed)
    with pytest.raises(DataError, match=r"a\.jsonl\.\w+ is (truncated|corrupt)") as error:
        run(tmp_path / f"a.jsonl.{ending}", tmp_path / "out", rejects=ANY)
    assert "begin anew" in str(error.value)
    no_result(tmp_path / "out")


def tar_of(*members: tuple[str, bytes], links: bool = False) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        if links:
            link = tarfile.TarInfo("z.txt")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    return made.getvalue()


@pytest.mark.parametrize("keep", [100, 600, 512 * 5, 512 * 4 + 100, 512 * 40, 512 * 41, 512 * 41 + 30])
def test_a_truncated_tar(tmp_path, keep):
    """Also where it is cut between two members, which tarfile and webdataset take for its end."""
    whole = tar_of(*((f"{i:03}.txt", b"x" * 100) for i in range(100)))
    (tmp_path / "a.tar").write_bytes(whole[:keep])
    with pytest.raises(DataError, match=r"a\.tar is no whole tar: .*; get it again"):
        run(tmp_path / "a.tar", tmp_path / "out", rejects=ANY)
    no_result(tmp_path / "out")


def test_a_damaged_tar_header(tmp_path):
    whole = bytearray(tar_of(*((f"{i:03}.txt", b"x" * 100) for i in range(100))))
    whole[1024 * 50 + 20 : 1024 * 50 + 150] = b"\xff" * 130
    (tmp_path / "a.tar").write_bytes(whole)
    with pytest.raises(DataError, match=r"a\.tar is no whole tar: a header is damaged"):
        run(tmp_path / "a.tar", tmp_path / "out", rejects=ANY)
    (tmp_path / "b.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(DataError, match=r"b\.tar is no whole tar"):
        run(tmp_path / "b.tar", tmp_path / "out", rejects=ANY)


def test_hostile_tar_members(tmp_path):
    """Names that point elsewhere stay text; nothing is extracted, followed or unpickled; what belongs to no sample is rejected."""

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    members = [
        ("../../evil.txt", b"a"),
        ("../../evil.pkl", pickle.dumps(Evil())),
        ("/abs/evil.txt", b"b"),
        ("/abs/evil.pkl", pickle.dumps(Evil())),
        ("twice.txt", b"a"),
        ("twice.txt", b"b"),
        ("twice.pkl", b"c"),
        ("noending", b"x"),
        ("latin.txt", b"\xff"),
        ("large.txt", b"x" * 3000),
        ("last.txt", b"z"),
        ("last.pkl", b""),
    ]
    (tmp_path / "a.tar").write_bytes(tar_of(*members, links=True))
    before = set(tmp_path.parent.rglob("*"))
    result = run(tmp_path / "a.tar", tmp_path / "out", rejects=ANY, max_row_size=2000)
    assert {
        path for path in set(tmp_path.parent.rglob("*")) - before if tmp_path / "out" not in (path, *path.parents)
    } == set()
    found = rows_of(result.out)
    assert [(row["__key__"], row["txt"]) for row in found] == [("../../evil", "a"), ("/abs/evil", "b"), ("last", "z")]
    assert found[0]["pkl"] == members[1][1]
    reasons = [(reject.get("key"), reject["reason"]) for reject in rejects_of(result.out)]
    assert [(key, reason.split(":")[0] if key == "twice" else reason[:40]) for key, reason in reasons] == [
        ("twice", "sample 'twice'"),
        (None, "the name has no ending, so that it belon"),
        ("latin", "sample 'latin', member .txt: not UTF-8 a"),
        ("large", "member .txt has 3000 bytes, more than --"),
        (None, "not a file but a link or device, which i"),
    ]
    assert "duplicate file name" in reasons[0][1]


@pytest.mark.parametrize("damage", ["no footer", "garbage", "empty", "page"])
def test_damaged_parquet(tmp_path, damage):
    pq.write_table(
        pa.table({"s": [os.urandom(50).hex() for _ in range(2000)]}), tmp_path / "a.parquet", compression="snappy"
    )
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    if damage == "page":
        data[4:200] = b"\xff" * 196
    data = {"no footer": data[:-20], "garbage": b"PAR1" + b"x" * 50, "empty": b"", "page": data}[damage]
    (tmp_path / "a.parquet").write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        run(tmp_path / "a.parquet", tmp_path / "out", rejects=ANY)
    no_result(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a\.csv is empty: a CSV file begins with a line of column names"),
        ("a,b,a\n1,2,3\n", r"the header has the column 'a' 2 times"),
        ("a,,c\n1,2,3\n", r"column 2 of the header has no name"),
        ('a,"b\n', r"the first line is no CSV header"),
        ("a,b\n", r"no row can be read from .*a\.csv: it is empty"),
        ("\n", r"column 1 of the header has no name"),
    ],
)
def test_bad_csv_files(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        run(tmp_path / "a.csv", tmp_path / "out", rejects=ANY)
    no_result(tmp_path / "out")


@pytest.mark.parametrize("chunk", [32, 1 << 20])
def test_bad_csv_rows(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("udsstream.ingest.sources.CHUNK", chunk)
    monkeypatch.setattr("udsstream.ingest.readers.CHUNK", chunk)
    long = "y" * 900
    data = (
        b'a,b\n1,2\n1\n1,2,3\n"open,2\n3,4\n"x"y,2\n5,6\n\xff,2\n'
        + f"{long},2\n{long[:400]},8\n".encode()
        + b'7,"nul\x00"\n"never closed,1\n'
    )
    (tmp_path / "a.csv").write_bytes(data)
    result = run(tmp_path / "a.csv", tmp_path / "out", rejects=ANY, max_row_size=800)
    nul = [{"a": "7", "b": "nul\x00"}]
    found = rows_of(result.out)
    assert [row for row in found if row not in nul] == [
        {"a": "1", "b": "2"}, {"a": "3", "b": "4"}, {"a": "5", "b": "6"}, {"a": long[:400], "b": "8"},
    ]  # fmt: skip
    assert result.manifest["rows"]["read"] == len(found) + result.manifest["rows"]["rejected"]
    rejects = {reject["line"]: reject for reject in rejects_of(result.out)}
    assert rejects.keys() - {12} == {3, 4, 5, 7, 9, 10, 13}
    assert (nul[0] in found) == (12 not in rejects)  # csv takes NUL from Python 3.11 on
    assert rejects[3]["reason"] == "1 cells, but the header has 2 columns"
    assert "a quote is opened on this line and not closed" in rejects[5]["reason"]
    assert rejects[5]["raw"] == '"open,2\n'
    assert "not UTF-8" in rejects[9]["reason"]
    assert "larger than --max-row-size 800" in rejects[10]["reason"]
    assert rejects[10]["raw_bytes"] == 903


def test_text_files_that_are_no_text(tmp_path):
    (tmp_path / "in").mkdir()
    for name, data in (("a.txt", b"good"), ("b.txt", b"\xff\xfe"), ("c.txt", b"x" * 3000), ("d.txt", b"")):
        (tmp_path / "in" / name).write_bytes(data)
    result = run(tmp_path / "in", tmp_path / "out", rejects=ANY, max_row_size=2000)
    assert rows_of(result.out) == [{"path": "a.txt", "text": "good"}, {"path": "d.txt", "text": ""}]
    assert [(reject["source"], reject["reason"][:30]) for reject in rejects_of(result.out)] == [
        ("b.txt", "not UTF-8: byte 1 is 0xff"),
        ("c.txt", "the file has 3000 bytes, more "),
    ]


# The output ---------------------------------------------------------------------------------------------------------------


def test_an_output_that_is_not_empty_is_not_touched(tmp_path):
    write_lines(tmp_path / "a.jsonl", GOOD)
    run(tmp_path / "a.jsonl", tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(OutputExistsError, match="out is not empty"):
        run(tmp_path / "a.jsonl", tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_an_output_within_the_source(tmp_path):
    write_lines(tmp_path / "in" / "a.jsonl", GOOD)
    with pytest.raises(ConfigError, match=r"--out .*in/out is within the source .*in, of which it would become a part"):
        run(tmp_path / "in", tmp_path / "in" / "out")
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["a.jsonl"]


def test_a_source_that_changes_meanwhile(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", GOOD)

    def touch(progress):
        with open(source, "a") as file:
            file.write("\n" if source.stat().st_size == size else "")

    size = source.stat().st_size

    with pytest.raises(DataError, match=r"a\.jsonl was changed while it was ingested \(from \d+ to \d+ bytes\)"):
        ingest(IngestConfig(source=(str(source),), out=tmp_path / "out"), on_progress=touch)
    no_result(tmp_path / "out")


def test_a_source_that_changes_is_not_gone_on_with(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of(b"x"))
    with pytest.raises(DataError, match="--max-rejects"):
        run(tmp_path / "a.jsonl", tmp_path / "out", rejects=RejectLimit(rows=0))
    (tmp_path / "a.jsonl").write_bytes(lines_of())
    with pytest.raises(OutputExistsError, match=r"other settings:\n  source .*a\.jsonl: was '\d+ bytes, changed"):
        run(tmp_path / "a.jsonl", tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_takes_no_more(tmp_path, workers):
    """The limit on a file's size stands for a full disk: the shard is written in part."""
    rows = [{"s": f"{i} " * 20} for i in range(1000)]
    write_lines(tmp_path / "a.jsonl", rows)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(
            OutputWriteError, match=r"cannot write .*File too large; raise the limit on the size of a file.*again"
        ):
            run(tmp_path / "a.jsonl", tmp_path / "out", size_limit=40_000, workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    no_result(tmp_path / "out")
    run(tmp_path / "a.jsonl", tmp_path / "out", size_limit=40_000)
    assert rows_of(tmp_path / "out") == rows


def test_a_full_disk_keeps_what_is_finished(tmp_path, monkeypatch):
    rows = [{"s": f"{i} " * 20} for i in range(1000)]
    write_lines(tmp_path / "a.jsonl", rows)
    calls = 0
    sync = os.fsync

    def full(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(28, "No space left on device")
        sync(fd)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OutputWriteError, match=r"No space left on device; free space on this file system"):
            run(tmp_path / "a.jsonl", tmp_path / "out", size_limit=10_000)
    no_result(tmp_path / "out")
    finished = (tmp_path / "out" / "_job" / "journal.jsonl").read_text().count("\n")
    assert finished > 2
    result = run(tmp_path / "a.jsonl", tmp_path / "out", size_limit=10_000)
    assert result.resumed
    assert content(result.out) == content(run(tmp_path / "a.jsonl", tmp_path / "whole", size_limit=10_000).out)
    assert rows_of(result.out) == rows
