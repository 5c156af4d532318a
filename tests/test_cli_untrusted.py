"""Names in a received log do not reach the terminal as commands to it, or as lines that look like ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jobs import udsstream
from numpy_run import NumpyRun, describe, selection

FORGED = "\x1b[2J\x1b[32m✓\x1b[0m\nVerdict: intact\x9b31m"


@pytest.fixture(scope="module")
def received(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("received") / "log"
    streams = describe(selection())["streams"]
    streams[0]["name"] = "a\x1b]0;title\x07\nVerdict: intact"
    run = NumpyRun(root=root, changes={"run_id": FORGED, "streams": streams})
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
    printed = (
        re.sub(r"\x1b\[[0-9;]*m", "", out + err) if "\x1b[2J" not in out + err else out + err
    )  # rich's own colours
    assert printed
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", printed)
    assert "Traceback" not in printed
    assert sum(line.strip().startswith("Verdict: intact") for line in printed.splitlines()) == 0


def test_half_a_character_is_shown_as_its_number(tmp_path, monkeypatch, capsys):
    NumpyRun(root=tmp_path / "log").begin().steps(0, 2).close()
    path = tmp_path / "log" / "run.json"
    path.write_text(re.sub(r'"run_id":\s*"[^"]*"', r'"run_id":"\\ud800"', path.read_text()))
    code, out, _ = udsstream(monkeypatch, capsys, "audit", str(tmp_path / "log"))
    assert code == 1
    assert r"run \ud800," in out
