"""Ctrl-C in a command that goes on where it was: it says so, without a traceback. (Training: tests/mosaicml/test_interruption.py.)"""

from __future__ import annotations

import pytest
from jobs import udsstream


@pytest.mark.parametrize(
    ("job", "arguments"),
    [
        ("udsstream.demo.main.run_demo", ("demo",)),
        ("udsstream.ingest.run.ingest", ("ingest", "rows.jsonl", "--out", "streams")),
        ("udsstream.replay.replay", ("replay", "runs/a")),
    ],
)
def test_it_says_how_to_go_on(monkeypatch, capsys, tmp_path, job, arguments):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setattr(job, interrupted)
    code, out, err = udsstream(monkeypatch, capsys, *arguments)
    assert (code, out) == (130, "")
    assert err == "\nudsstream: interrupted; the same command goes on with it\n"
    monkeypatch.setenv("RANK", "1")
    assert udsstream(monkeypatch, capsys, *arguments) == (130, "", "")
