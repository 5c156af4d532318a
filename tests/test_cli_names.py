"""Names that others chose, of folders, runs, streams and columns, reach no terminal as commands to it, nor as lines like ours."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from curate import curate_runs
from jobs import udsstream
from numpy_run import NumpyRun, describe, finished, selection

from udsstream.replay import ReplayResult
from udsstream.replay_summary import print_replay

HOSTILE = "a\x1b]0;title\x07\nVerdict: intact [red]\x9b31m"
SHOWN = r"a\u001b]0;title\u0007\u000aVerdict: intact [red]\u009b31m"


def printed(monkeypatch, capsys, *arguments: str) -> str:
    """All that the command prints, once no line and no character of it is theirs."""
    monkeypatch.setenv("COLUMNS", "1000")
    _, out, err = udsstream(monkeypatch, capsys, *arguments)
    return checked(out + err)


def checked(text: str) -> str:
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)
    assert not any(line.startswith("Verdict: intact") for line in text.splitlines())
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("command", ["audit", "log", "log --to-parquet", "report --no-text"])
def test_a_folder_s_name(tmp_path, monkeypatch, capsys, command):
    finished(tmp_path / HOSTILE)
    first, *options = command.split()
    text = printed(monkeypatch, capsys, first, str(tmp_path / HOSTILE), *options)
    expected = {"log": 1 + 1 + 3}.get(command, 1)  # a title, which is broken anywhere, a sentence and three commands
    assert "".join(text.split()).count(SHOWN.replace(" ", "")) == expected


@pytest.mark.parametrize("command", ["audit", "log --to-parquet"])
def test_a_folder_s_name_that_is_not_utf_8(tmp_path, monkeypatch, capsys, command):
    root = tmp_path / os.fsdecode(b"not \xff UTF-8")
    finished(root)
    first, *options = command.split()
    assert r"not \udcff UTF-8" in printed(monkeypatch, capsys, first, str(root), *options)


@pytest.mark.parametrize("command", ["audit", "log", "report"])
def test_a_folder_that_is_none(tmp_path, monkeypatch, capsys, command):
    text = printed(monkeypatch, capsys, command, str(tmp_path / HOSTILE))
    assert "LogError: " in text
    assert r"a\u001b]0;title\u0007" in text


def test_streams_that_were_curated(tmp_path, monkeypatch, capsys):
    folders = [tmp_path / "animals", tmp_path / "numbers"]
    for folder in folders:
        curate_runs.write_stream(folder, [{"text": f"{folder.name} {number}"} for number in range(30)])
    run = curate_runs.describe(folders)
    run["streams"][0]["name"] = HOSTILE
    curate_runs.write_log(tmp_path / "run", folders, run=run)
    options = ["--from-log", str(tmp_path / "run"), "--format", "jsonl", "--out", str(tmp_path / "out [red]")]
    text = printed(monkeypatch, capsys, "curate", *options)
    assert f"from {SHOWN}" in text
    assert "out[red]" in "".join(text.split())  # a title is as wide as its table, and broken anywhere


def test_what_a_replay_tells_of_the_run(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    told = ReplayResult(
        run=HOSTILE,
        run_id="a",
        save_folder=HOSTILE,
        first=0,
        stop=1,
        differences=[HOSTILE],
        weights=None,
        verification=None,
        step_seconds=None,
        eval_loss_after=None,
    )
    print_replay(told)
    text = checked(capsys.readouterr().out)
    assert "".join(text.split()).count(SHOWN.replace(" ", "")) == 3


def test_columns_that_were_ingested(tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a", HOSTILE: "b"}) + "\n")
    text = printed(monkeypatch, capsys, "ingest", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out"))
    assert SHOWN in text


def test_json_holds_the_names_as_they_are(tmp_path, monkeypatch, capsys):
    root: Path = tmp_path / HOSTILE
    finished(root)
    assert json.loads(printed(monkeypatch, capsys, "log", str(root), "--to-parquet", "--json")) == {
        "parquet": str(root / "parquet")
    }


@pytest.fixture(scope="module")
def received(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("received") / "log"
    streams = describe(selection())["streams"]
    streams[0]["name"] = HOSTILE
    run = NumpyRun(root=root, changes={"run_id": "\x1b[2J\x1b[32m✓\x1b[0m\nVerdict: intact\x9b31m", "streams": streams})
    run.begin().steps(0, 2).checkpoint(2).close()
    return root


@pytest.mark.parametrize(
    "command",
    [
        ["audit", "--data"],
        ["log"],
        ["log", "--sample", "1"],
        ["log", "--step", "1"],
        ["log", "--streams"],
        ["log", "--least", "2"],
        ["log", "--most", "2"],
        ["log", "--suppressed"],
        ["log", "--length"],
        ["replay"],
        ["report", "--out", "/dev/null/nowhere"],
    ],
    ids=" ".join,
)
def test_no_control_character_of_theirs_is_printed(received, monkeypatch, capsys, command):
    name, *options = command
    _, out, err = udsstream(monkeypatch, capsys, name, str(received), *options)
    text = checked(out + err)
    assert text
    assert not any(line.strip().startswith("Verdict: intact") for line in text.splitlines())


def test_half_a_character_is_shown_as_its_number(tmp_path, monkeypatch, capsys):
    NumpyRun(root=tmp_path / "log").begin().steps(0, 2).close()
    path = tmp_path / "log" / "run.json"
    path.write_text(re.sub(r'"run_id":\s*"[^"]*"', r'"run_id":"\\ud800"', path.read_text()))
    code, out, _ = udsstream(monkeypatch, capsys, "audit", str(tmp_path / "log"))
    assert code == 1
    assert r"run \ud800," in out
