"""Names of folders, streams and columns that others chose, where a command says what it wrote or why it did not."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from curate import curate_runs
from jobs import udsstream
from numpy_run import finished

HOSTILE = "a\x1b]0;title\x07\nVerdict: intact [red]\x9b31m"
SHOWN = r"a\u001b]0;title\u0007\u000aVerdict: intact [red]\u009b31m"


def printed(monkeypatch, capsys, *arguments: str) -> str:
    """All that the command prints, without line breaks, once no line and no character of it is theirs."""
    monkeypatch.setenv("COLUMNS", "1000")
    _, out, err = udsstream(monkeypatch, capsys, *arguments)
    text = out + err
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)
    assert not any(line.startswith("Verdict: intact [red]") for line in text.splitlines())
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
