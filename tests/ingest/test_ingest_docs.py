"""`udsstream ingest` as it is typed: docs/ingesting.md shows what it prints, its help fits a screen, its mistakes are one line."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
from ingested import rows_of, write_lines
from jobs import udsstream

from udsstream.cli import app

DOCS = (Path(__file__).parents[2] / "docs" / "ingesting.md").read_text()
EXAMPLES = re.findall(
    r"^\$ (.*?)\n((?:(?!\$ ).*\n)*)",
    "".join(re.findall(r"```console\n(.*?)```", DOCS, flags=re.DOTALL)),
    flags=re.MULTILINE,
)


def write_examples(folder: Path) -> None:
    rows = [
        {
            "question": f"What is {i} + {i}?",
            "answer": f"{i} and {i} are {2 * i}.",
            "topic": "sum" if i % 2 == 0 else "odd",
        }
        for i in range(200)
    ]
    write_lines(folder / "train.jsonl", rows)
    (folder / "dirty.jsonl").write_text((folder / "train.jsonl").read_text() + "oops\n\n[]\n")


def test_the_examples_give_what_is_shown(tmp_path, monkeypatch, capsys):
    write_examples(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len(EXAMPLES) == 5
    for command, output in EXAMPLES:
        name, *arguments = shlex.split(command)
        if name == "udsstream":
            code, out, err = udsstream(monkeypatch, capsys, *arguments)
            assert (code, err) == (0, "")
        else:
            out = subprocess.run([name, *arguments], capture_output=True, text=True, check=True).stdout
        assert out.rstrip("\n") == output.rstrip("\n"), command


def test_the_table_of_encodings_is_what_can_be_chosen():
    from udsstream.ingest.schema import ENCODINGS

    sized = {name for name in ENCODINGS if re.fullmatch(r"u?int\d+|float(16|32)", name)}
    (listed,) = re.findall(r"`(str bytes json .*?)`", DOCS, flags=re.DOTALL)
    assert {name.split("[")[0] for name in listed.split()} == set(ENCODINGS) - sized


def test_streams_and_json_from_the_command_line(tmp_path, monkeypatch, capsys):
    write_examples(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = ["train.jsonl", "--out", "out", "--text", "question", "--stream-by", "topic", "--only-mapped", "--json"]
    more = [
        "--compression",
        "zstd:3",
        "--hash",
        "sha256",
        "--size-limit",
        "2kb",
        "--workers",
        "2",
        "--column",
        "answer=bytes",
    ]
    code, _, err = udsstream(monkeypatch, capsys, *["ingest", *arguments, *more])
    assert code == 1
    assert "202" not in err
    assert "200 of 200 rows are bad" in err  # the answers are strings
    code, out, _ = udsstream(monkeypatch, capsys, "ingest", *arguments[:1], "--out", "new", *arguments[3:], *more[:-2])
    assert code == 0
    manifest = json.loads(out)
    assert [(stream["folder"], stream["samples"]) for stream in manifest["streams"]] == [("odd", 100), ("sum", 100)]
    assert manifest == json.loads(Path("new/ingest.json").read_text())
    assert len(list(Path("new/odd").glob("*.mds.zstd"))) == manifest["streams"][0]["shards"] > 1
    index = json.loads(Path("new/sum/index.json").read_text())
    assert index["shards"][0]["column_names"] == ["text"]
    assert [*index["shards"][0]["zip_data"]["hashes"]] == ["sha256"]


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    write_examples(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = udsstream(monkeypatch, capsys, "ingest", "train.jsonl", "--out", "out", "--prompt", "questions")
    assert (code, out) == (1, "")
    assert err == (
        "udsstream: DataError: --prompt questions: there is no such column; the source has question, answer, topic; "
        "did you mean 'question'?\n"
    )
    assert udsstream(monkeypatch, capsys, "ingest", "train.jsonl", "--out", "out", "--column", "x")[0] == 2
    assert udsstream(monkeypatch, capsys, "ingest", "train.jsonl", "--out", "out", "--max-rejects", "x")[0] == 1
    assert not Path("out").exists()


def test_help_fits_a_screen_and_shows_an_example(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    _, out, _ = udsstream(monkeypatch, capsys, "ingest", "--help")
    assert len(out.splitlines()) <= 40
    (example,) = re.findall(r"Example: (udsstream ingest .*?)\s*$", out, flags=re.MULTILINE)
    name, *arguments = shlex.split(example)[1:]
    typer.main.get_command(app).commands[name].make_context(name, arguments).close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("rejected", [0, 3])
def test_the_bar_tells_rates_and_what_is_left(rejected, monkeypatch):
    from udsstream.cli.ingest import _Bar
    from udsstream.ingest.run import Progress

    with _Bar() as bar:
        bar.show(Progress(rows=10, rejected=0, bytes=1000, total_bytes=10_000))
        bar.show(Progress(rows=5000, rejected=rejected, bytes=9000, total_bytes=10_000))
        task = bar._progress.tasks[0]
        assert (task.completed, task.total) == (9000, 10_000)
        assert re.fullmatch(
            r"5,000 rows [\d,]+ rows/s [\d.]+ MB/s" + (" 3 rejected" if rejected else ""), task.fields["rates"]
        )


def test_a_row_survives_the_way_in(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\u0000b 🙂"}\n')
    udsstream(monkeypatch, capsys, "ingest", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"))
    assert rows_of(tmp_path / "out") == [{"text": "a\x00b 🙂"}]
