"""The guides hold what they say: their commands parse, their examples run. (docs/reading_the_log.md: tests/selection_log/test_docs.py)"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from streaming import MDSWriter

from udsstream.cli import app

ROOT = Path(__file__).parent.parent
GUIDES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)


COMMANDS = [
    (name, line.split("  #")[0].strip())
    for name in GUIDES
    for block in blocks(ROOT / "docs" / name, "bash")
    for line in block.splitlines()
    if line.startswith("udsstream ")
]


@pytest.mark.parametrize(("guide", "line"), COMMANDS)
def test_commands_parse(guide, line):
    """Each is a command with options that exist; nothing is run."""
    name, *arguments = shlex.split(line)[1:]
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, arguments, resilient_parsing=False).close()


def test_there_are_commands_to_check():
    assert {line.split()[1] for _, line in COMMANDS} >= {"replay"}


def test_replaying_in_a_script_of_ones_own(tmp_path, monkeypatch):
    with MDSWriter(out=str(tmp_path / "streams" / "text"), columns={"text": "str"}) as writer:
        for number in range(40):
            writer.write({"text": "Ein Satz, noch ein Satz. " * (number % 5 + 1)})
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    (readme,) = blocks(ROOT / "README.md", "python")
    (replaying,) = blocks(ROOT / "docs" / "replaying.md", "python")
    exec(compile(readme, "README.md", "exec"), names)
    exec(compile(replaying, "docs/replaying.md", "exec"), names)
    (difference,) = names["replay"].differences  # type: ignore[attr-defined]
    assert difference.startswith("training seed: was ")
    names["selection"].close()  # type: ignore[attr-defined]
