"""Which samples a report shows, found again by plain Python; and their text: from the right row, or a reason, never a pickle's code."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
import shutil
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import pytest
import uds_log
from streaming import JSONWriter, MDSWriter
from text_runs import pairs, write_run, write_stream
from typer.testing import CliRunner

from udsstream.cli import app
from udsstream.errors import ConfigError
from udsstream.log_queries import queries
from udsstream.log_queries.tables import print_texts
from udsstream.log_queries.texts import SampleText, read_text, show_row
from udsstream.report.samples import KINDS, Pick, pick
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.writer import SelectionLogWriter


@pytest.fixture
def streams(tmp_path) -> dict[str, Path]:
    return {name: write_stream(tmp_path / name, pairs(name, count)) for name, count in (("cats", 30), ("dogs", 17))}


def expected(rows: list[dict], per_kind: int) -> dict[str, list[tuple[int, int]]]:
    """(step, position) of the picks of each kind, from the rules as the page states them."""
    of_step: dict[int, list[dict]] = {}
    for row in rows:
        if row["score"] is not None:
            of_step.setdefault(row["step"], []).append(row)
    worth: dict[str, list[tuple[float, int, int, int]]] = {kind: [] for kind in KINDS}
    for step, candidates in of_step.items():
        kept = [row for row in candidates if row["selected"]]
        rejected = [row for row in candidates if not row["selected"]]
        for row in candidates:
            key = (step, row["position"], row["sample_id"])
            if row["selected"]:
                worth["highest"].append((-row["score"], *key))
                longest = max((other["tokens"] for other in rejected), default=0)
                if row["tokens"] < longest:
                    worth["short"].append((row["tokens"] - longest, *key))
            else:
                worth["lowest"].append((row["score"], *key))
                worth["narrow"].append((min(other["score"] for other in kept) - row["score"], *key))
                longest = max(other["tokens"] for other in kept)
                if row["tokens"] > longest:
                    worth["long"].append((longest - row["tokens"], *key))
    found, seen = {}, set()
    for kind in KINDS:
        found[kind] = []
        for _, step, position, sample in sorted(worth[kind]):
            if sample not in seen and len(found[kind]) < per_kind:
                found[kind].append((step, position))
                seen.add(sample)
    return found


@pytest.mark.parametrize("per_kind", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "settings", [{}, {"ranks": 2}, {"off": (0, 2)}, {"method": "random"}, {"resume_at": 4, "checkpoints": ()}]
)
def test_the_picks_are_those_that_the_rules_name(tmp_path, settings, per_kind):
    log = SelectionLog.open(uds_log.write(tmp_path / "run", steps=15, **dict(settings)))
    picks = pick(log, per_kind=per_kind)
    by_kind = {kind: [(p.step, p.position) for p in picks if p.kind == kind] for kind in KINDS}
    assert by_kind == expected(log.table().to_pylist(), per_kind)
    assert len({p.sample_id for p in picks}) == len(picks)
    if per_kind:
        assert picks
    for found in picks:
        kept = [r["score"] for r in log.table().to_pylist() if r["step"] == found.step and r["selected"]]
        assert found.threshold == min(kept)


def test_nothing_is_picked_where_nothing_was_scored(tmp_path):
    assert pick(SelectionLog.open(uds_log.write(tmp_path / "run", steps=3, off=(0, 1, 2)))) == []


def test_the_text_is_that_of_the_sample(tmp_path, streams):
    rows = write_run(tmp_path / "run", streams)
    log = SelectionLog.open(tmp_path / "run")
    picks = pick(log, per_kind=3)
    texts = read_text(picks, log.run)
    for found, text in zip(picks, texts, strict=True):
        assert text.problem is None
        # ids count the samples of the streams in their order
        name, number = ("cats", found.sample_id) if found.sample_id < 30 else ("dogs", found.sample_id - 30)
        assert dict(text.fields) == pairs(name, 30)[number]
        (row,) = [r for r in rows if (r["step"], r["position"]) == (found.step, found.position)]
        assert (row["score"], row["tokens"], row["selected"]) == (found.score, found.tokens, found.selected)


def test_streams_that_moved(tmp_path, streams):
    write_run(tmp_path / "run", streams)
    log = SelectionLog.open(tmp_path / "run")
    picks = pick(log)
    shutil.move(streams["cats"], tmp_path / "elsewhere")
    before = read_text(picks, log.run)
    gone = [t for p, t in zip(picks, before, strict=True) if p.stream == 0]
    assert gone
    assert all("cats/index.json cannot be read" in t.problem and "--stream NAME=PATH" in t.problem for t in gone)
    after = read_text(picks, log.run, places={"cats": str(tmp_path / "elsewhere")})
    assert all(t.problem is None for t in after)
    with pytest.raises(ConfigError, match=r"the run has no stream named 'cows'; it has 'cats', 'dogs'"):
        read_text(picks, log.run, places={"cows": "/tmp"})


def one(tmp_path: Path, folder: Path, *, shard: int = 0, index: int = 0, **changes) -> tuple[Pick, dict]:
    digest = hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()
    run = {"streams": [{"name": "s", "location": str(folder), "index_sha256": digest} | changes]}
    chosen = Pick(
        kind="highest", step=0, position=0, sample_id=0, stream=0, shard=shard, shard_index=index, tokens=3, intra=1.0,
        inter=math.nan, score=1.0, selected=True, threshold=1.0, other_tokens=0,
    )  # fmt: skip
    return chosen, run


def problem(found: Pick, run: dict) -> str:
    (text,) = read_text([found], run)
    assert text.fields == ()
    assert text.problem is not None
    return text.problem


def edit_index(folder: Path, **changes) -> None:
    index = json.loads((folder / "index.json").read_text())
    for key, value in changes.items():
        index["shards"][0][key] = value
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "changes", "message"),
    [
        (lambda f: (f / "index.json").write_text("{}"), {"index_sha256": "0" * 64}, "is not the index that the run was trained on"),
        (lambda f: None, {"index_sha256": None}, "run.json records None"),
        (lambda f: None, {"location": "s3://bucket/s"}, "is remote (s3://bucket/s); --stream NAME=PATH"),
        (lambda f: None, {"location": None}, "does not say where the stream 's' is"),
        (lambda f: None, {"location": "/nowhere\0"}, "cannot be read"),
        (lambda f: (f / "index.json").write_text("{}"), {}, "is not an index of a stream"),
        (lambda f: (f / "index.json").write_text('{"shards": [3]}'), {}, "it lists no shards"),
        (lambda f: (f / "index.json").write_text("[" * 100_000), {}, "is not an index of a stream"),
        (lambda f: (f / "shard.00000.mds").unlink(), {}, "shard.00000.mds is not there, or only compressed"),
        (lambda f: (f / "shard.00000.mds").write_bytes(b"x"), {}, "has 1 bytes, but the stream's index records"),
        (lambda f: edit_index(f, format="zip"), {}, "cannot be read (KeyError"),
        (lambda f: edit_index(f, version=3), {}, "cannot be read (AssertionError"),
        (lambda f: edit_index(f, raw_data={"basename": "../../etc/passwd", "bytes": 1, "hashes": {}}), {}, "not a file in that folder"),
        (lambda f: edit_index(f, raw_data={"basename": "..", "bytes": 1, "hashes": {}}), {}, "not a file in that folder"),
        (lambda f: edit_index(f, column_encodings=["json", "json"]), {}, "cannot be read (JSONDecodeError"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)  # fmt: skip
def test_why_a_text_is_not_shown(tmp_path, damage, changes, message):
    folder = write_stream(tmp_path / "s", pairs("s", 4))
    damage(folder)
    assert message in problem(*one(tmp_path, folder, **changes))


def test_places_that_the_stream_does_not_have(tmp_path):
    folder = write_stream(tmp_path / "s", pairs("s", 4))
    assert "but that has" in problem(*one(tmp_path, folder, index=99))
    assert "but that has" in problem(*one(tmp_path, folder, index=-1))
    assert "places it in shard 7" in problem(*one(tmp_path, folder, shard=7))
    assert "places it in shard -1" in problem(*one(tmp_path, folder, shard=-1))
    found, run = one(tmp_path, folder)
    assert "run.json has no stream 0" in problem(found, run | {"streams": []})
    assert "run.json has no stream 0" in problem(found, run | {"streams": "x"})


class _Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/udsstream-report-ran-a-pickle"),))


def test_a_pickle_is_never_unpacked(tmp_path):
    trace = Path("/tmp/udsstream-report-ran-a-pickle")
    trace.unlink(missing_ok=True)
    folder = write_stream(tmp_path / "s", [{"text": "kept", "bad": _Bomb()}] * 3, {"text": "str", "bad": "pkl"})
    found, run = one(tmp_path, folder)
    (text,) = read_text([found], run)
    assert not trace.exists()
    assert text.fields == (("text", "kept"), ("bad", f"{len(pickle.dumps(_Bomb()))} bytes"))


def test_columns_of_all_kinds(tmp_path):
    row = {
        "answer": "42", "input_ids": np.arange(100), "n": 3, "x": 0.5, "raw": b"\0\1", "meta": {"a": [1, "ü"]},
        "messages": json.dumps([{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]),
    }  # fmt: skip
    columns = {
        "answer": "str",
        "input_ids": "ndarray",
        "n": "int",
        "x": "float64",
        "raw": "bytes",
        "meta": "json",
        "messages": "str",
    }
    found, run = one(tmp_path, write_stream(tmp_path / "s", [row], columns))
    (text,) = read_text([found], run)
    assert text.problem is None
    fields = dict(text.fields)
    assert [label for label, _ in text.fields][:3] == ["user", "assistant", "answer"]
    assert (fields["user"], fields["answer"], fields["n"], fields["x"], fields["raw"]) == (
        "hi",
        "42",
        "3",
        "0.5",
        "2 bytes",
    )
    assert fields["input_ids"].startswith("int64 (100,): [ 0  1")
    assert "ü" in fields["meta"]


def test_streams_of_json_lines(tmp_path):
    with JSONWriter(out=str(tmp_path / "s"), columns={"text": "str"}) as writer:
        for number in range(5):
            writer.write({"text": f"line {number}"})
    found, run = one(tmp_path, tmp_path / "s", index=3)
    assert read_text([found], run)[0].fields == (("text", "line 3"),)


def test_a_split_is_part_of_the_location(tmp_path):
    write_stream(tmp_path / "s" / "train", pairs("s", 3))
    found, run = one(tmp_path, tmp_path / "s" / "train", index=2)
    assert dict(read_text([found], run)[0].fields) == pairs("s", 3)[2]


def test_compressed_shards_are_said_to_be_so(tmp_path):
    with MDSWriter(out=str(tmp_path / "s"), columns={"text": "str"}, compression="zstd") as writer:
        writer.write({"text": "packed"})
    assert "only compressed" in problem(*one(tmp_path, tmp_path / "s"))


@pytest.mark.parametrize("messages", ["no json", "[1]", '{"role": "x"}', "[" * 50_000, "3", [["role"]], "[]"])
def test_what_is_no_conversation_is_shown_as_it_is(messages):
    shown = show_row({"messages": messages})
    assert all(isinstance(text, str) for _, text in shown)
    assert len(shown) <= 1


def test_many_columns_are_counted():
    shown = show_row({f"c{i}": "x" for i in range(30)})
    assert len(shown) == 9
    assert shown[-1] == ("…", "and 22 more")


def test_reading_makes_no_shared_memory(tmp_path, streams, monkeypatch):
    write_run(tmp_path / "run", streams)
    log = SelectionLog.open(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(SharedMemory, "__init__", None)
        with pytest.raises(TypeError):
            SharedMemory(create=True, size=1)
        assert all(text.problem is None for text in read_text(pick(log), log.run))


def test_a_tie_goes_to_the_earlier_place_in_whatever_order_rows_are_read(tmp_path):
    """Rank 0 is read first, but brings the later positions; all scores are alike."""
    for rank in (0, 1):
        writer = SelectionLogWriter.create(tmp_path, run=uds_log.run(), rank=rank, world_size=2, embeddings="none")
        for step in range(30):
            columns = uds_log.candidates(step, rows=4, method="uds", scored=True)
            columns |= {
                "position": np.arange(4, dtype=np.int32) + 4 * (1 - rank),
                "sample_id": np.arange(4, dtype=np.int64) + 8 * step + 4 * (1 - rank),
                "score": np.ones(4, np.float32),
            }
            writer.append(step, columns)
        writer.close()
    log = SelectionLog.open(tmp_path)
    picks = pick(log, per_kind=1)
    by_kind = {kind: [(p.step, p.position) for p in picks if p.kind == kind] for kind in KINDS}
    assert by_kind == expected(log.table().to_pylist(), 1)
    assert all(p.step == 0 for p in picks if p.kind in ("highest", "narrow", "lowest"))


# At the command line ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["--least=3", "--most=2", "--sample=31", "--step=0"])
def test_the_log_s_samples_are_shown_with_what_they_say(tmp_path, streams, question):
    write_run(tmp_path / "run", streams)
    done = CliRunner().invoke(app, ["log", str(tmp_path / "run"), question, "--text"], env={"COLUMNS": "400"})
    assert done.exit_code == 0
    log = SelectionLog.open(tmp_path / "run")
    expected = {
        "--least=3": [count.sample_id for count in queries.least_chosen(log, 3)],
        "--most=2": [count.sample_id for count in queries.most_chosen(log, 2)],
        "--sample=31": [31],
        "--step=0": [row["sample_id"] for row in log.table().sort_by("position").to_pylist() if row["step"] == 0],
    }[question]
    shown = re.split(r"^sample (\d+) ─+$", done.stdout, flags=re.MULTILINE)[1:]
    assert [int(number) for number in shown[::2]] == expected
    for number, said in zip(expected, shown[1::2], strict=True):
        row = pairs("cats", 30)[number] if number < 30 else pairs("dogs", 17)[number - 30]
        assert said.strip() == f"prompt: {row['prompt']}\nresponse: {row['response']}"


def test_a_text_does_not_reach_the_terminal_as_it_is(tmp_path):
    rows = [{"text": "\x1b[31mred [bold]no markup[/bold] " + "long " * 300}]
    stream = write_stream(tmp_path / "s", rows * 8)
    write_run(tmp_path / "run", {"s": stream}, steps=1)
    done = CliRunner().invoke(app, ["log", str(tmp_path / "run"), "--most=1", "--text"], env={"COLUMNS": "4000"})
    assert "\x1b" not in done.stdout
    assert "text: \\u001b[31mred [bold]no markup[/bold] long long" in done.stdout
    assert re.search(r"… \(\d+ more characters\)", done.stdout)


def test_why_there_is_no_text_is_said(tmp_path, streams):
    write_run(tmp_path / "run", streams)
    shutil.rmtree(streams["cats"])
    done = CliRunner().invoke(app, ["log", str(tmp_path / "run"), "--most=30", "--text"], env={"COLUMNS": "4000"})
    assert done.exit_code == 0
    assert re.search(r"No text: \S+cats/index.json cannot be read", done.stdout)


def test_a_column_s_name_and_a_reason_are_on_one_line(capsys):
    print_texts([3, 4], [SampleText(fields=(("a\nb\x07", "c\nd\x07"),)), SampleText(problem="e\nf")])
    shown = capsys.readouterr().out
    assert "a\\u000ab\\u0007: c\nd\\u0007\n" in shown
    assert "No text: e\\u000af\n" in shown


def test_nor_does_the_reason_why_there_is_no_text(tmp_path, capsys):
    """The reason quotes run.json and Streaming, which quote whoever wrote the log and the stream."""
    reason = problem(*one(tmp_path, write_stream(tmp_path / "s", pairs("s", 4)), location="s3://\x1b[31mred\u202e"))
    print_texts([3], [SampleText(problem=reason)])
    shown = capsys.readouterr().out
    assert "(s3://\\u001b[31mred\\u202e)" in shown.replace("\n", "")
    assert "\x1b" not in shown
    assert "\u202e" not in shown
