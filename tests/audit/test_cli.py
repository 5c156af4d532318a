"""`udsstream audit`: exit codes, JSON, and words for what was typed wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from numpy_run import finished
from tampering import edited_run_json
from typer.testing import CliRunner, Result

from udsstream.audit.run import audit
from udsstream.cli import app


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["audit", *map(str, arguments)])


def test_intact_is_0_and_findings_are_1(tmp_path: Path) -> None:
    run = finished(tmp_path / "log")
    done = call(tmp_path / "log", "--anchor", f"20:{run.roots[20].hex()}")
    assert done.exit_code == 0
    assert "Verdict: intact relative to this anchor" in done.stdout
    edited_run_json(tmp_path / "log", lambda content: content.update(run_id="another"))
    done = call(tmp_path / "log")
    assert done.exit_code == 1
    assert "✗ [run.json]" in done.stdout


def test_json_is_the_report(tmp_path: Path) -> None:
    finished(tmp_path / "log")
    done = call(tmp_path / "log", "--json")
    assert json.loads(done.stdout) == audit(tmp_path / "log").as_dict()
    edited_run_json(tmp_path / "log", lambda content: content.update(run_id="another"))
    done = call(tmp_path / "log", "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert (found["exit_code"], found["found"], found["anchored"]) == (1, {"run.json": 1}, False)


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_what_cannot_be_read_is_2(option: list[str], tmp_path: Path) -> None:
    done = call(tmp_path / "none", *option)
    assert done.exit_code == 2
    if option:
        assert json.loads(done.stdout) == {
            "error": f"LogError: {tmp_path / 'none'} is not a selection log: there is no such folder",
            "exit_code": 2,
        }
    else:
        assert done.stdout == ""
        assert "LogError" in done.stderr
    finished(tmp_path / "log")
    assert call(tmp_path / "log", "--checkpoint", tmp_path / "none.pt", *option).exit_code == 2
    (tmp_path / "log" / "run.json").write_text("{")
    assert call(tmp_path / "log", *option).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--anchor", "20"],
        ["--anchor", "20:abc"],
        ["--anchor", f"x:{'0' * 64}"],
        ["--anchor", f"{'9' * 5000}:{'0' * 64}"],
        ["--stream", "one=/data"],
        ["--data", "--stream", "one"],
        ["--data", "--stream", "=x"],
        ["--nothing"],
    ],
)
def test_what_is_typed_wrong_is_2(arguments: list[str], tmp_path: Path) -> None:
    finished(tmp_path / "log")
    assert call(tmp_path / "log", *arguments).exit_code == 2


def test_a_stream_that_the_run_did_not_have_is_named(tmp_path: Path) -> None:
    finished(tmp_path / "log")
    done = call(tmp_path / "log", "--data", "--stream", "three=/data")
    assert done.exit_code == 2
    assert "run.json names no such stream; it has one, two" in done.stderr
