"""The job as a whole: killed anywhere and run again, streams that moved or changed, shards that are not what they were, bad requests."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uds_log
from curate_runs import COLUMNS, describe, sample, write_log, write_stream
from jobs import udsstream

from udsstream.curate.chosen import Choice
from udsstream.curate.samples import Samples, SourceStream
from udsstream.curate.write import Curated, Output, curate_log, curate_stream, shard_bounds
from udsstream.errors import ConfigError, DataError, LogError, OutputExistsError, OutputWriteError, ShardError
from udsstream.selection_log.reader import SelectionLog


def make(root: Path, **settings: Any) -> Path:
    """Two streams of pairs, and a run over them."""
    for name, first in (("animals", 0), ("numbers", 40)):
        rows = [{"prompt": f"{name} {i}?", "response": "so " * (i % 9)} for i in range(first, first + 30)]
        write_stream(root / name, rows, size_limit=700)
    return write_log(root / "run", [root / "animals", root / "numbers"], steps=25, **settings)


def contents(folder: Path) -> dict[str, str]:
    """Every file's digest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def curated(run: Path, out: Path, *, choice: Choice | None = None, **settings: Any) -> Curated:
    given = {"format": "jsonl", "shard_bytes": 300} | settings
    places = given.pop("places", None)
    verify = given.pop("verify", False)
    return curate_log(run, out, choice=choice or Choice(), output=Output(**given), places=places, verify=verify)


# Killed ---------------------------------------------------------------------------------------------------------------------


def killed_at(action: Callable[[], Any], number: int, *, after: bool) -> bool:
    """Runs the action in a forked process that is killed at its `number`th rename; whether it came so far."""
    child = os.fork()
    if child == 0:
        try:
            original, count = os.replace, 0

            def replace(source: Any, target: Any) -> None:
                nonlocal count
                count += 1
                if after:
                    original(source, target)
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                if not after:
                    original(source, target)

            os.replace = replace
            action()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.mark.parametrize(
    ("format", "step"),
    [
        ("jsonl", 2),
        ("mds", 5),
        pytest.param("jsonl", 1, marks=pytest.mark.soak),
        pytest.param("mds", 1, marks=pytest.mark.soak),
        pytest.param("parquet", 1, marks=pytest.mark.soak),
        pytest.param("webdataset", 1, marks=pytest.mark.soak),
    ],
)
def test_killed_at_any_rename_and_run_again(tmp_path, format, step):
    """(Before or after each, in turn; under `soak` at every one.)"""
    run = make(tmp_path)
    settings = {"format": format, "shard_bytes": 400}
    whole = curated(run, tmp_path / "whole", **settings)
    expected = contents(tmp_path / "whole")
    assert whole.shards > 2
    out = tmp_path / "out"
    number = 1
    for turn in range(1000):
        if not killed_at(lambda: curated(run, out, **settings), number, after=turn % 2 == 1):
            break
        seen = contents(out) if out.exists() else {}
        # What stands outside of the work folder is whole.
        assert all(expected[name] == digest for name, digest in seen.items() if not name.startswith("_job"))
        if (out / "_job").exists() or not seen:
            again = curated(run, out, **settings)
            assert (again.samples, again.shards, again.bytes) == (whole.samples, whole.shards, whole.bytes)
            assert again.per_stream == whole.per_stream
        assert contents(out) == expected
        shutil.rmtree(out)
        number += step if step > 1 or turn % 2 else 0
    assert contents(out) == expected
    assert number > 2 * whole.shards


def test_killed_within_a_shard(tmp_path):
    """The half that was written is not taken for a shard."""
    run = make(tmp_path)
    curated(run, tmp_path / "whole")
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        from udsstream.curate import to_jsonl

        original, count = to_jsonl.decoder, 0

        def decoder(column: Any) -> Any:
            def decoded(raw: bytes, sample_id: int) -> Any:
                nonlocal count
                count += 1
                if count == 115:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(column)(raw, sample_id)

            return decoded

        to_jsonl.decoder = decoder
        curated(run, out)
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    finished = sorted(path.name for path in (out / "_job" / "data").iterdir())
    assert finished[0].startswith(".part-")  # the torn one
    assert len(finished) > 1
    result = curated(run, out)
    assert result.resumed
    assert contents(out) == contents(tmp_path / "whole")


def test_finished_shards_are_not_made_again(tmp_path, monkeypatch):
    run = make(tmp_path)
    out = tmp_path / "out"
    assert killed_at(lambda: curated(run, out), 5, after=True)
    kept = {path.name: path.stat().st_ino for path in (out / "_job" / "data").glob("part-*")}
    assert len(kept) == 2
    curated(run, out)
    assert {name: (out / "data" / name).stat().st_ino for name in kept} == kept


def test_other_settings_do_not_go_on(tmp_path):
    run = make(tmp_path)
    assert killed_at(lambda: curated(run, tmp_path / "out"), 9, after=True)
    with pytest.raises(OutputExistsError, match=r"choice: was \{'times': 1\}, is \{'times': 2\}"):
        curated(run, tmp_path / "out", choice=Choice(times=2))


def test_a_log_that_grew_does_not_go_on(tmp_path):
    run = make(tmp_path)
    assert killed_at(lambda: curated(run, tmp_path / "out"), 9, after=True)
    shutil.rmtree(run)
    make(tmp_path / "more", seed=1)
    shutil.copytree(tmp_path / "more" / "run", run)
    with pytest.raises(OutputExistsError, match=r"log: was .*, is "):
        curated(run, tmp_path / "out")


def test_a_log_that_grows_meanwhile(tmp_path, monkeypatch):
    run = make(tmp_path)
    monkeypatch.setattr(SelectionLog, "heads", lambda self: [os.urandom(32)])
    with pytest.raises(LogError, match="wrote to its log while it was read"):
        curated(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_takes_no_more(tmp_path):
    """The limit on a file's size stands for a full disk: the same path, another errno."""
    for format in ("jsonl", "parquet", "webdataset", "mds"):
        root = tmp_path / format
        write_stream(root / "in", [{"text": os.urandom(20_000).hex()} for _ in range(20)])
        settings = Output(format=format, shard_bytes=1 << 18, compression="none")
        curate_stream(str(root / "in"), root / "whole", output=settings)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(
                OutputWriteError, match=r"cannot write .*File too large; raise the limit .*run the same command again"
            ):
                curate_stream(str(root / "in"), root / "out", output=settings)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path.name for path in (root / "out").iterdir()] == ["_job"]
        curate_stream(str(root / "in"), root / "out", output=settings)
        assert contents(root / "out") == contents(root / "whole")


# Streams --------------------------------------------------------------------------------------------------------------------


def test_a_stream_that_moved(tmp_path):
    run = make(tmp_path)
    curated(run, tmp_path / "before")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "animals").rename(tmp_path / "elsewhere" / "pets")
    with pytest.raises(
        DataError,
        match=r"stream 'animals': .*/animals/index\.json cannot be read \(No such file.*--stream animals=PATH",
    ):
        curated(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()  # nothing came of it, nothing is left
    curated(run, tmp_path / "out", places={"animals": str(tmp_path / "elsewhere" / "pets")})
    assert contents(tmp_path / "out") == contents(tmp_path / "before")
    with pytest.raises(ConfigError, match="--stream pets: there is no such stream; there is animals, numbers"):
        curated(run, tmp_path / "again", places={"pets": str(tmp_path)})


def test_a_stream_that_changed(tmp_path):
    run = make(tmp_path)
    shutil.rmtree(tmp_path / "numbers")
    write_stream(tmp_path / "numbers", [{"prompt": "x", "response": "y"}] * 30, size_limit=700)
    with pytest.raises(
        DataError, match=r"stream 'numbers' at .* is not the one that the run was trained on: its index has the SHA-256"
    ):
        curated(run, tmp_path / "out")
    curated(run, tmp_path / "out", choice=Choice(only=("animals",)))  # it is not needed for these


def shard_in_use(run: Path) -> Path:
    return run.parent / "animals" / "shard.00000.mds"


def test_a_shard_that_is_missing(tmp_path):
    run = make(tmp_path)
    shard_in_use(run).unlink()
    with pytest.raises(
        ShardError, match=rf"shard {shard_in_use(run)} of stream 'animals' is missing; put it back, or say where"
    ):
        curated(run, tmp_path / "out")


def test_shards_that_are_corrupt(tmp_path):
    run = make(tmp_path)
    whole = shard_in_use(run).read_bytes()
    begin = int.from_bytes(whole[4:8], "little")
    for name, content, message in (
        (
            "truncated",
            whole[:-7],
            f"is corrupt: it has {len(whole) - 7} bytes, but the stream's index records {len(whole)}",
        ),
        ("other samples", b"\x09" + whole[1:], "does not hold the"),
        ("offsets", whole[:8] + b"\xff\xff\xff\x7f" + whole[12:], "its samples do not follow one another"),
        ("sizes", whole[:begin] + b"\xee" + whole[begin + 1 :], "a sample of [0-9]+ bytes is not what its columns say"),
    ):
        shard_in_use(run).write_bytes(content)
        with pytest.raises(
            ShardError, match=rf"shard .*animals/shard\.00000\.mds.* is corrupt: .*{message}|.*{message}"
        ):
            curated(run, tmp_path / name, choice=Choice(times=0))
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    shard_in_use(run).write_bytes(flipped)
    curated(run, tmp_path / "flipped", choice=Choice(times=0))  # a letter of a text: nobody asked
    with pytest.raises(ShardError, match=r"is corrupt: .*shard\.00000\.mds has the sha1 .*, but the index records"):
        curated(run, tmp_path / "out", choice=Choice(times=0), verify=True)
    shard_in_use(run).write_bytes(whole)
    assert curated(run, tmp_path / "verified", verify=True).unverified_shards == 0


def test_shards_without_hashes_are_counted(tmp_path):
    write_stream(tmp_path / "in", [{"text": "a"}] * 5, hashes=[])
    result = curate_stream(str(tmp_path / "in"), tmp_path / "out", output=Output(format="jsonl"), verify=True)
    assert result.unverified_shards == 1


def test_a_log_that_places_a_sample_elsewhere(tmp_path):
    run = make(tmp_path)
    description = describe([tmp_path / "animals", tmp_path / "numbers"])
    other = tmp_path / "other"
    write_stream(other / "animals", [{"prompt": "", "response": ""}] * 30, size_limit=400)
    write_stream(other / "numbers", [{"prompt": "", "response": ""}] * 30, size_limit=400)
    write_log(other / "run", [other / "animals", other / "numbers"], run=description)
    with pytest.raises(
        DataError,
        match=r"the log places sample \d+ in row \d+ of shard \d+, but by the index of stream '\w+' it is row",
    ):
        curated(other / "run", tmp_path / "out")
    assert curated(run, tmp_path / "out").samples > 0


def test_streams_of_different_columns(tmp_path):
    write_stream(tmp_path / "a", [{"text": "x"}] * 20)
    write_stream(tmp_path / "b", [{"text": "x", "more": "y"}] * 20)
    run = write_log(tmp_path / "run", [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(
        DataError,
        match=r"has other columns than .*: 'more' is (str|missing) here and (str|missing) there.*--only STREAM",
    ):
        curated(run, tmp_path / "out")
    for name in "ab":
        curated(run, tmp_path / f"out-{name}", choice=Choice(only=(name,)))


def test_a_compressed_stream_is_unpacked_beside(tmp_path):
    rows = [{"text": f"{i} " * 50} for i in range(60)]
    write_stream(tmp_path / "in", rows, compression="zstd:3", size_limit=1000)
    before = contents(tmp_path / "in")
    for cache in (None, tmp_path / "cache"):
        out = tmp_path / f"out-{cache is None}"
        curate_stream(str(tmp_path / "in"), out, output=Output(format="jsonl"), cache=cache)
        assert [json.loads(line) for line in (out / "data/part-00000.jsonl").read_text().splitlines()] == rows
        assert {path.name for path in out.iterdir()} == {"README.md", "croissant.json", "data"}
    assert contents(tmp_path / "in") == before
    assert len(list((tmp_path / "cache").glob("*/*.mds"))) > 1


def remote(monkeypatch, root: Path) -> None:
    """s3://bucket/… is a folder: what Streaming's own downloader for S3 would fetch is copied."""
    from streaming.base.storage.download import LocalDownloader

    class Bucket(LocalDownloader):
        def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
            super()._download_file_impl(remote.replace("s3://bucket", str(root)), local, timeout)

        def _validate_remote_path(self, *arguments: Any) -> None:
            pass

    from streaming.base import stream

    monkeypatch.setattr(stream.CloudDownloader, "get", classmethod(lambda cls, remote: Bucket()))


def test_a_remote_stream(tmp_path, monkeypatch):
    remote(monkeypatch, tmp_path)
    run = make(tmp_path)
    curated(run, tmp_path / "local")
    there = {name: f"s3://bucket/{name}" for name in ("animals", "numbers")}
    curated(run, tmp_path / "out", places=there)
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    with pytest.raises(
        DataError, match=r"the index of stream 'animals' cannot be fetched from s3://bucket/nowhere \(FileNotFoundError"
    ):
        curated(run, tmp_path / "again", places=there | {"animals": "s3://bucket/nowhere"})
    shutil.rmtree(tmp_path / "again")
    shard_in_use(run).unlink()
    with pytest.raises(
        ShardError, match=r"shard shard\.00000\.mds of stream 'animals' cannot be fetched from s3://bucket/animals"
    ):
        curated(run, tmp_path / "again", places=there)
    assert (tmp_path / "again" / "_job" / "cache").is_dir()  # what was fetched stays for the next try


def test_a_download_that_was_killed_is_fetched_again(tmp_path, monkeypatch):
    remote(monkeypatch, tmp_path)
    run = make(tmp_path)
    curated(run, tmp_path / "local")
    cache = tmp_path / "cache"
    there = {name: f"s3://bucket/{name}" for name in ("animals", "numbers")}
    folder = cache / hashlib.sha256(there["animals"].encode()).hexdigest()[:16]
    folder.mkdir(parents=True)
    for index in (b"half", (tmp_path / "animals" / "index.json").read_bytes()):
        for name, content in (("shard.00000.mds", b"half"), ("index.json", index), ("index.json.tmp", b"half")):
            (folder / name).write_bytes(content)
        curate_log(
            run,
            tmp_path / f"out-{len(index)}",
            choice=Choice(),
            output=Output(format="jsonl", shard_bytes=300),
            places=there,
            cache=cache,
        )
        assert contents(tmp_path / f"out-{len(index)}") == contents(tmp_path / "local")


def test_a_cache_is_not_taken_for_another_stream(tmp_path, monkeypatch):
    """The stream at a location was rebuilt, with a shard of the same name and size."""
    remote(monkeypatch, tmp_path)
    for compression, there in ((None, "s3://bucket/in"), ("zstd:3", str(tmp_path / "in"))):
        for text in ("one", "two"):
            shutil.rmtree(tmp_path / "in", ignore_errors=True)
            write_stream(tmp_path / "in", [{"text": text}] * 3, compression=compression)
            out = tmp_path / f"{text}-{compression}"
            curate_stream(there, out, output=Output(format="jsonl"), cache=tmp_path / "cache")
            assert json.loads((out / "data/part-00000.jsonl").read_text().splitlines()[0]) == {"text": text}


def test_samples_come_in_the_order_asked_for(tmp_path, monkeypatch):
    """Whatever the blocks: also with a block of a few samples, and one that is larger than a block."""
    from udsstream.curate import samples as module

    rows = [{"text": f"{i} " * (i % 40)} for i in range(500)]
    write_stream(tmp_path / "in", rows, size_limit=3000)
    stream = SourceStream(name="in", location=str(tmp_path / "in"), samples=None, index_sha256=None)
    ids = np.random.default_rng(0).permutation(500)
    for block, most in ((1, 1), (100, 1000), (1 << 20, 1000), (1 << 20, 7)):
        monkeypatch.setattr(module, "_BLOCK", block)
        monkeypatch.setattr(module, "_BLOCK_ROWS", most)
        monkeypatch.setattr(module, "_OPEN_FILES", 2)
        with Samples([stream], cache=tmp_path / "cache") as opened:
            located = opened.locate(np.zeros(500, np.int64), ids)
            assert [value[0].decode() for value in opened.read(located, 0, 500)] == [rows[i]["text"] for i in ids]
            assert [value[0].decode() for value in opened.read(located, 7, 19)] == [rows[i]["text"] for i in ids[7:19]]


def test_what_is_added_belongs_to_its_sample(tmp_path, monkeypatch):
    """Whatever is made of it at a time."""
    from udsstream.curate import write as module

    run = make(tmp_path)
    curated(run, tmp_path / "whole")
    monkeypatch.setattr(module, "_ADDED_ROWS", 3)
    curated(run, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_shard_bounds():
    for sizes, limit, expected in (
        ([5, 5, 5], 10, [0, 2, 3]),
        ([5, 5, 5], 9, [0, 1, 2, 3]),
        ([50, 1, 1, 50], 10, [0, 1, 3, 4]),
        ([1], 1, [0, 1]),
        ([3, 3, 3, 3], 100, [0, 4]),
    ):
        assert shard_bounds(np.array(sizes), limit) == expected


# Requests that cannot be met --------------------------------------------------------------------------------------------------


def test_an_output_folder_that_is_not_empty(tmp_path):
    run = make(tmp_path)
    curated(run, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(OutputExistsError, match=r"is not empty: it holds README\.md, croissant\.json, data"):
        curated(run, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_column_that_is_there_already(tmp_path):
    write_stream(tmp_path / "in", [{"text": "x", "uds_score": "mine"}] * 20)
    run = write_log(tmp_path / "run", [tmp_path / "in"])
    with pytest.raises(ConfigError, match=r"the samples have a column 'uds_score' already; .*--prefix.*--no-scores"):
        curated(run, tmp_path / "out")
    curated(run, tmp_path / "out", prefix="sel_")
    line = json.loads((tmp_path / "out/data/part-00000.jsonl").read_text().splitlines()[0])
    assert line["uds_score"] == "mine"
    assert isinstance(line["sel_score"], float)
    curated(run, tmp_path / "plain", scores=False)
    line = json.loads((tmp_path / "plain/data/part-00000.jsonl").read_text().splitlines()[0])
    assert line == {"text": "x", "uds_score": "mine"}


def test_requests_that_cannot_be_met(tmp_path):
    run = make(tmp_path)
    for settings, message in (
        ({"format": "csv"}, r"format='csv', expected one of mds, webdataset, parquet, jsonl"),
        ({"format": "mds", "compression": "gzip"}, r"compression='gzip': mds takes none, zstd"),
        ({"format": "webdataset", "compression": "zstd"}, r"compression='zstd': webdataset takes none, gzip"),
        ({"compression": "zstd:99"}, r"a level of zstd is 1 to 22"),
        ({"compression": "none:3"}, r"none has no level"),
        ({"shard_bytes": 1 << 32}, r"less than 2³²"),
        ({"choice": Choice(times=1000)}, r"no sample of .* meets the choice: \d+ were offered and \d+ chosen"),
    ):
        with pytest.raises(ConfigError, match=message):
            curated(run, tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()
    with pytest.raises(LogError, match="there is no such folder"):
        curated(tmp_path / "nowhere", tmp_path / "out")
    bare = uds_log.write(tmp_path / "bare", streams=False)
    with pytest.raises(DataError, match=r"run\.json names no streams"):
        curated(bare, tmp_path / "out")


# The command line -----------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, monkeypatch, capsys):
    run = make(tmp_path)
    common = ("--from-log", str(run), "--format", "jsonl")
    arguments = (
        "--times",
        "2",
        "--quota",
        "animals=3",
        "--quota-share",
        "numbers=1/2",
        "--shard-size",
        "1KB",
        "--json",
    )
    code, out, _ = udsstream(monkeypatch, capsys, "curate", *common, "--out", str(tmp_path / "a"), *arguments)
    assert code == 0
    found = json.loads(out)
    assert found["per_stream"]["animals"] <= 3
    assert found["per_stream"]["numbers"] * 2 <= found["samples"]
    code, out, _ = udsstream(
        monkeypatch, capsys, "curate", *common, "--out", str(tmp_path / "b"), "--top-quantile", "0.2"
    )
    assert code == 0
    assert "samples" in out
    assert "12 of 60 offered" in out
    code, out, _ = udsstream(
        monkeypatch,
        capsys,
        "curate",
        "--all",
        str(tmp_path / "animals"),
        "--format",
        "parquet",
        "--out",
        str(tmp_path / "c"),
        "--json",
    )
    assert json.loads(out)["samples"] == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give exactly one source"),
        (("--from-log", "x", "--all", "y"), "got --from-log and --all"),
        (("--all", "y", "--times", "2"), "it goes with --from-log alone"),
        (("--from-log", "x", "--until", "120"), "is not baN"),
        (("--from-log", "x", "--quota", "a"), "is not STREAM=VALUE"),
        (("--from-log", "x", "--quota", "a=1", "--quota", "a=2"), "is given twice"),
        (("--from-log", "x", "--quota-share", "a=20%"), "is no part"),
        (("--from-log", "x", "--top-quantile", "2"), "is not more than 0 and at most 1"),
        (("--from-log", "x", "--shard-size", "5GB"), "is no size up to 4 GB"),
        (("--from-log", "x", "--stream", "a"), "is not NAME=PATH"),
        (("--from-log", "x", "--format", "csv"), "is none of mds, webdataset, parquet, jsonl"),
    ],
)
def test_commands_that_were_typed_wrong(arguments, message, tmp_path, monkeypatch, capsys):
    format = () if "--format" in arguments else ("--format", "jsonl")
    code, _, err = udsstream(monkeypatch, capsys, "curate", "--out", str(tmp_path / "out"), *format, *arguments)
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_bar_is_drawn_only_where_it_is_seen(tmp_path, monkeypatch, capsys):
    """(Nothing but the table on stdout, nothing at all on a stderr that is no terminal.)"""
    run = make(tmp_path)
    code, out, err = udsstream(
        monkeypatch, capsys, "curate", "--from-log", str(run), "--format", "mds", "--out", str(tmp_path / "out")
    )
    assert (code, err.strip()) == (0, "")
    assert "writing" not in out


def test_samples_of_every_kind_survive_a_kill(tmp_path):
    """(The other tests of kills have text alone.)"""
    write_stream(tmp_path / "in", [sample(i) for i in range(20)], COLUMNS)
    settings = Output(format="parquet", shard_bytes=100_000)
    curate_stream(str(tmp_path / "in"), tmp_path / "whole", output=settings)
    assert killed_at(lambda: curate_stream(str(tmp_path / "in"), tmp_path / "out", output=settings), 7, after=False)
    curate_stream(str(tmp_path / "in"), tmp_path / "out", output=settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
