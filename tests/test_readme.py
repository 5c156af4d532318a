"""The README holds what it says: its example runs as it is written, its commands and paths exist, its tree is the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from streaming import MDSWriter
from typer.testing import CliRunner

from udsstream import SelectionLog
from udsstream.cli import app
from udsstream.run_config import load_run_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_example_runs_as_written(tmp_path, monkeypatch):
    with MDSWriter(out=str(tmp_path / "streams" / "text"), columns={"text": "str"}) as writer:
        for number in range(40):
            writer.write({"text": "Ein Satz, noch ein Satz. " * (number % 5 + 1)})
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    log = SelectionLog.open("runs/mine")
    assert len(log.steps()) == 20
    assert len(log.selected(0)) == 2
    names["selection"].close()


def test_commands_exist():
    commands = {
        line.split()[1] for block in blocks("bash") for line in block.splitlines() if line.startswith("udsstream ")
    }
    assert commands >= {"train", "log", "bench"}
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"`?make ([a-z]+)", README)
    assert set(named) <= set(targets)


def test_overrides_shown_are_valid():
    (line,) = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("udsstream train")]
    config, *overrides = line.split("#")[0].split()[2:]
    assert load_run_config(ROOT / config, overrides).selection_config().keep == 0.5


@pytest.mark.parametrize(
    "path",
    sorted(
        set(re.findall(r"\]\(((?:docs|udsstream)/[\w/.]+)\)|`((?:tests|udsstream|docs|pipelines)/[\w/.]*)`", README))
    ),
)
def test_paths_exist(path):
    assert (ROOT / next(filter(None, path))).exists()


def test_the_tree_is_the_tree():
    tree = README.split("## Where things are")[1].split("```")[1]
    for name in re.findall(r"([\w/]+\.py|[\w]+/)", tree):
        assert any((ROOT / folder / name).exists() for folder in ("", "udsstream", "tests")), name
    for path in (ROOT / "udsstream").iterdir():
        if path.name not in ("__init__.py", "__pycache__", "py.typed"):
            assert path.name in tree, f"{path.name} is missing from the README's tree"
