"""Killed at any moment, an ingest goes on to the same bytes; streams by a column; what waits in memory is bounded."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import datasets
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml
import zstandard
from ingested import content, plain_loop, rejects_of, rows_of, run, shards, write_lines

from udsstream.errors import DataError, OutputExistsError
from udsstream.ingest import shards as shards_module
from udsstream.ingest.readers import read_blocks
from udsstream.ingest.run import IngestConfig, folder_name, ingest

fork = multiprocessing.get_context("fork")
SETTINGS = {"size_limit": 6000, "stream_by": "lang"}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr("udsstream.ingest.sources.CHUNK", 4096)
    monkeypatch.setattr("udsstream.ingest.readers.CHUNK", 4096)


def language_rows(count: int) -> list[dict]:
    draw = random.Random(5)
    rows = [
        {"text": f"{i} " * draw.randrange(1, 40), "lang": draw.choices(["de", "en", "pt/BR"], [10, 5, 1])[0], "n": i}
        for i in range(count)
    ]
    rows[1]["lang"] = "rare"
    rows[-1]["lang"] = "rare"
    return rows


def write_source(folder: Path, kind: str, rows: list[dict]) -> Path:
    """Some of the rows are bad, and some lines blank."""
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=300)
        return folder / "a.parquet"
    if kind == "hf":
        datasets.Dataset.from_list(rows).save_to_disk(str(folder / "a"))
        return folder / "a"
    if kind == "zst":
        text = "".join(json.dumps(row) + "\n" for row in rows) + "oops\n"
        (folder / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(text.encode()))
        return folder / "a.jsonl.zst"
    if kind == "webdataset":
        with webdataset.TarWriter(str(folder / "a.tar")) as writer:
            for row in rows:
                writer.write({"__key__": f"{row['n']:05}", "txt": row["text"], "lang.txt": row["lang"]})
        return folder / "a.tar"
    if kind == "csv":
        lines = ["text,lang,n"] + [f'"{row["text"]}\n",{row["lang"]},{row["n"]}' for row in rows]
        (folder / "a.csv").write_text("\n".join([*lines[:700], "bad", "", *lines[700:]]))
        return folder / "a.csv"
    if kind == "text":
        for row in rows[:400]:
            (folder / "a").mkdir(exist_ok=True)
            (folder / "a" / f"{row['n']:05}.txt").write_text(row["text"])
        return folder / "a"
    lines = [json.dumps(row) for row in rows]
    lines[1100:1100] = ["{", "", '{"text": 1}']
    lines[1300:1300] = ["[]"]
    for number in range(2):
        (folder / f"{number}.jsonl").write_text("\n".join(lines[number * 700 :][: 700 if number == 0 else None]))
    return folder / "*.jsonl"  # type: ignore[return-value]


def settings_for(kind: str) -> dict:
    return SETTINGS | (
        {"webdataset": {"stream_by": "lang.txt"}, "text": {"stream_by": None, "size_limit": 3000}}.get(kind, {})
    )


def child(source: Path, out: Path, workers: int, settings: dict, calls: int | None) -> None:
    """An ingest that kills itself at the given call to the disk."""
    if calls is not None:
        left = [calls]

        def counted(function):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for name in ("fsync", "replace", "unlink", "rmdir", "truncate"):
            setattr(os, name, counted(getattr(os, name)))
    run(source, out, workers=workers, **settings)


def looks_whole(out: Path) -> bool:
    return any((path / "index.json").exists() for path in [out, *out.glob("[!_]*/")])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "zst", "csv", "parquet", "webdataset", "hf", "text"])
def test_a_kill_at_any_call_to_the_disk_and_again_while_resuming(tmp_path, kind):
    source, settings = write_source(tmp_path, kind, language_rows(1500)), settings_for(kind)
    whole = content(run(source, tmp_path / "whole", **settings).out)
    draw = random.Random(kind)
    kills = finished = resumed_later = 0
    for attempt in range(3):
        out = tmp_path / f"out{attempt}"
        calls = draw.randrange(3, 120)
        for turn in range(40):
            process = fork.Process(target=child, args=(source, out, 1 + (turn + attempt) % 2, settings, calls))
            process.start()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            journal = out / "_job" / "journal.jsonl"
            resumed_later += journal.exists() and journal.stat().st_size > 0
            if not (out / "_job").exists() and out.exists() and looks_whole(out):
                break  # killed after the last removal
            calls = draw.randrange(20, 200)
        else:
            pytest.fail("never came to an end")
        assert content(out) == whole, attempt
        finished += 1
        with pytest.raises(OutputExistsError):
            run(source, out, **settings)
    assert finished == 3
    assert kills >= 3
    assert resumed_later > 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_kills_at_random_moments(tmp_path, workers):
    source = write_source(tmp_path, "jsonl", language_rows(2000))
    begun = time.monotonic()
    whole = content(run(source, tmp_path / "whole", workers=workers, **SETTINGS).out)
    took = time.monotonic() - begun
    draw = random.Random(workers)
    out, kills = tmp_path / "out", 0
    for turn in range(30):
        process = fork.Process(target=child, args=(source, out, workers, SETTINGS, None))
        process.start()
        process.join(draw.uniform(0.1, 0.6) * took * (1 + turn / 4))
        if process.exitcode is None:
            below = psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            _, alive = psutil.wait_procs(below, timeout=10)
            assert not alive, "workers outlived their parent"
            if out.exists():
                assert (out / "_job").exists() or content(out) == whole
                found = content(out)
                for index in out.glob("[!_]*/index.json"):  # streams appear one after another, each of them whole
                    stream = f"{index.parent.relative_to(out)}/"
                    own = {name: data for name, data in shards(whole).items() if name.startswith(stream)}
                    assert own
                    assert found.items() >= own.items(), stream
                last = max(name for name in whole if name.endswith("/index.json"))
                assert last not in found or found.items() >= shards(whole).items()
        if process.exitcode == 0 or (out.exists() and not (out / "_job").exists()):
            break
    assert kills > 0
    assert content(out) == whole


def test_what_is_finished_is_not_done_again(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "a.jsonl", language_rows(2000))
    process = fork.Process(target=child, args=(source, tmp_path / "out", 1, {"size_limit": 6000}, 90))
    process.start()
    process.join()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "_job").glob("shard*")}
    journal = [json.loads(line) for line in (tmp_path / "out" / "_job" / "journal.jsonl").read_text().splitlines()]
    assert len(journal) > 10
    read = []

    def watched(source, start, max_row):
        read.append(start)
        return read_blocks(source, start, max_row)

    monkeypatch.setattr("udsstream.ingest.run.read_blocks", watched)
    result = run(source, tmp_path / "out", size_limit=6000)
    assert read[0].unit == journal[-1]["resume"][3] > 0
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard*")}
    kept = [path for path in before if after[path.name] == before[path]]
    assert len(kept) >= len(journal)
    assert rows_of(result.out) == language_rows(2000)


@pytest.mark.parametrize("torn", ["a line begun", "a line without its end"])
def test_a_torn_journal_and_torn_rejects_are_cut_back(tmp_path, torn):
    source = write_source(tmp_path, "jsonl", language_rows(1500))
    whole = content(run(source, tmp_path / "whole", **SETTINGS).out)
    process = fork.Process(target=child, args=(source, tmp_path / "out", 1, SETTINGS, 130))
    process.start()
    process.join()
    work = tmp_path / "out" / "_job"
    for name in ("journal.jsonl", "rejects.jsonl"):
        if torn == "a line begun":
            with open(work / name, "ab") as file:
                file.write(b'{"row": 3, "sour')
        else:
            os.truncate(work / "journal.jsonl", (work / "journal.jsonl").stat().st_size - 1)
            break
    (work / "spill").mkdir(exist_ok=True)
    (work / "spill" / "0-0").write_bytes(b"left over")
    assert content(run(source, tmp_path / "out", **SETTINGS).out) == whole
    assert len(rejects_of(tmp_path / "out")) == 3


def test_a_reject_that_was_lost_is_noticed(tmp_path):
    source = write_source(tmp_path, "jsonl", language_rows(1500))
    process = fork.Process(target=child, args=(source, tmp_path / "out", 1, SETTINGS, 130))
    process.start()
    process.join()
    (tmp_path / "out" / "_job" / "rejects.jsonl").unlink()
    with pytest.raises(
        OutputExistsError, match=r"_job does not hold what its journal says.*1503 rows were read.*begin anew"
    ):
        run(source, tmp_path / "out", **SETTINGS)
    assert not looks_whole(tmp_path / "out")


# Streams ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("budget", [1, 4000, 1 << 28])
def test_streams_have_the_bytes_of_a_plain_loop_each(tmp_path, workers, budget):
    rows = language_rows(800)
    source = write_lines(tmp_path / "a.jsonl", rows)
    config = IngestConfig(source=(str(source),), out=tmp_path / "out", **SETTINGS)
    result = ingest(config, workers=workers, budget=budget)
    assert [stream["folder"] for stream in result.manifest["streams"]] == ["de", "en", "pt%2FBR", "rare"]
    columns = {"text": "str", "lang": "str", "n": "int"}
    for stream in result.manifest["streams"]:
        mine = [row for row in rows if row["lang"] == stream["value"]]
        plain = plain_loop(mine, columns, tmp_path / "plain" / stream["folder"], size_limit=6000)
        assert content(result.out / stream["folder"]) == plain
        assert (stream["samples"], stream["shards"]) == (len(mine), len(plain) - 1)
    assert sum(stream["samples"] for stream in result.manifest["streams"]) == 800
    assert {path.name for path in result.out.iterdir()} == {"de", "en", "pt%2FBR", "rare", "ingest.json"}


def test_a_spill_is_used_when_memory_is_short(tmp_path, monkeypatch):
    spilled = []
    original = shards_module.ShardSet._spill
    monkeypatch.setattr(
        shards_module.ShardSet, "_spill", lambda self, stream: (spilled.append(stream.value), original(self, stream))
    )
    source = write_lines(tmp_path / "a.jsonl", language_rows(800))
    ingest(IngestConfig(source=(str(source),), out=tmp_path / "out", **SETTINGS), budget=4000)
    assert len(spilled) > 10


def test_rows_larger_than_a_shard_have_one_of_their_own(tmp_path):
    rows = [{"s": "x" * size} for size in (9000, 1, 9000, 9000, 1, 1, 5900, 1)]
    result = run(write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out", size_limit=6000)
    assert rows_of(result.out) == rows
    plain = plain_loop(rows[1:], {"s": "str"}, tmp_path / "plain", size_limit=6000)
    # MDSWriter would begin with an empty shard, over which Streaming divides by zero when it reads.
    assert [entry["samples"] for entry in json.loads(plain["index.json"])["shards"]] == [1, 1, 1, 2, 1, 1]
    index = json.loads((result.out / "index.json").read_text())
    assert [entry["samples"] for entry in index["shards"]] == [1, 1, 1, 1, 2, 1, 1]


def test_a_shard_ends_at_the_same_row_whatever_the_limit(tmp_path):
    """One of these limits is met to the byte."""
    rows = [{"s": "x" * 5}] * 60
    source = write_lines(tmp_path / "a.jsonl", rows)
    for limit in range(600, 613):  # a row takes 4 + 5 + 4 bytes
        result = run(source, tmp_path / f"out{limit}", size_limit=limit)
        plain = plain_loop(rows, {"s": "str"}, tmp_path / f"plain{limit}", size_limit=limit)
        assert shards(content(result.out)) == plain, limit


def test_training_reads_the_streams(tmp_path, config_file):
    from udsstream import pipeline
    from udsstream.run_config import load_run_config

    rows = [
        {"q": "what is two", "a": "four it is " * (i % 3 + 1), "topic": ["math", "words"][i % 2]} for i in range(32)
    ]
    source = write_lines(tmp_path / "a.jsonl", rows)
    run(source, tmp_path / "streams", prompt="q", response="a", stream_by="topic")
    settings = yaml.safe_load(config_file.read_text())
    settings["data"] = {"streams_root": str(tmp_path / "streams"), "batch_size": 8}
    config_file.write_text(yaml.safe_dump(settings | {"max_duration": "2ba", "eval": None}))
    assert pipeline.train(load_run_config(config_file)).batches == 2


def test_too_many_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_STREAMS", 3)
    with pytest.raises(DataError, match="--stream-by: the column has more than 3 values"):
        run(write_lines(tmp_path / "a.jsonl", language_rows(100)), tmp_path / "out", **SETTINGS)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("plain-1.0", "plain-1.0"),
        ("a_b", "a_b"),
        ("", "%"),
        (".", "%2E"),
        ("..", "%2E."),
        ("../x", "%2E.%2Fx"),
        ("/etc", "%2Fetc"),
        ("_job", "%5Fjob"),
        ("index.json", "%69ndex.json"),
        ("Ingest.JSON", "%49ngest.JSON"),
        ("a%2Fb", "a%252Fb"),
        ("ä\x00", "%C3%A4%00"),
        ("%", "%25"),
    ],
)
def test_folder_names(value, name):
    assert folder_name(value) == name


def test_folder_names_differ():
    values = ["a" * n for n in range(90, 130)] + ["ä" * n for n in range(10, 60)] + [chr(i) for i in range(1, 300)]
    names = [folder_name(value) for value in values]
    assert len(set(names)) == len(values)
    assert max(map(len, names)) <= 100
    assert all("/" not in name and not name.startswith(("_", ".")) for name in names)


# Memory -------------------------------------------------------------------------------------------------------------------


def peak(source: Path, out: Path, workers: int, queue) -> None:
    import resource

    before = psutil.Process().memory_info().rss
    largest = [before]

    def watch(_):
        largest[0] = max(largest[0], psutil.Process().memory_info().rss)

    ingest(IngestConfig(source=(str(source),), out=out, size_limit="4mb"), workers=workers, on_progress=watch)
    queue.put((largest[0] - before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024))


def grown(tmp_path: Path, rows: int, workers: int) -> int:
    source = tmp_path / f"{rows}.jsonl"
    with open(source, "w") as file:
        for number in range(rows):
            file.write(f'{{"id": {number}, "text": "row {number} and some more words to fill it"}}\n')
    queue = fork.Queue()
    process = fork.Process(target=peak, args=(source, tmp_path / f"out{rows}", workers, queue))
    process.start()
    found, _ = queue.get(timeout=550)
    process.join()
    return found


@pytest.mark.slow
def test_memory_does_not_grow_with_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr("udsstream.ingest.sources.CHUNK", 1 << 20)
    monkeypatch.setattr("udsstream.ingest.readers.CHUNK", 1 << 20)
    small, large = grown(tmp_path, 50_000, 2), grown(tmp_path, 300_000, 2)
    assert large < small + (40 << 20), (small, large)


@pytest.mark.soak
def test_a_million_rows_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("udsstream.ingest.sources.CHUNK", 1 << 20)
    monkeypatch.setattr("udsstream.ingest.readers.CHUNK", 1 << 20)
    found = grown(tmp_path, 1_000_000, 2)
    print(f"1,000,000 rows: the main process grew by {found / 1e6:.0f} MB")
    assert found < 150 << 20
    assert json.loads((tmp_path / "out1000000" / "ingest.json").read_text())["rows"]["written"] == 1_000_000
