"""Every command's help fits one screen and shows an example that can be typed; `--version` is the package's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest
import typer
from jobs import udsstream

import udsstream as package
from udsstream.cli import app

GROUP = typer.main.get_command(app)
COMMANDS: dict = GROUP.commands  # type: ignore[attr-defined]
LINES, WIDTH = 40, 100


def help_of(*command: str) -> str:
    """As it is printed on a terminal of that width, in a process of its own: rich asks for the width once."""
    environment = os.environ | {"COLUMNS": str(WIDTH), "TERM": "dumb", "NO_COLOR": "1"}
    line = [sys.executable, "-c", "from udsstream.cli import main; main()", *command, "--help"]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout


def parse(example: str) -> None:
    program, name, *arguments = shlex.split(example)
    assert program == "udsstream"
    COMMANDS[name].make_context(name, arguments).close()


@pytest.mark.parametrize("command", ["", *sorted(COMMANDS)])
def test_help_fits_a_screen_and_shows_an_example(command):
    printed = help_of(*([command] if command else []))
    lines = printed.splitlines()
    assert len(lines) <= LINES, f"{len(lines)} lines; shorten the help of an option that takes more than one"
    assert max(map(len, lines)) <= WIDTH
    examples = re.findall(r"^ *Example: (udsstream .*?) *$", printed, flags=re.MULTILINE)
    assert len(examples) == 1, "the command's docstring ends with one line 'Example: udsstream …'"
    assert not command or examples[0].split()[1] == command
    parse(examples[0])


def test_an_example_that_cannot_be_typed_is_noticed():
    with pytest.raises(Exception, match="No such option"):
        parse("udsstream audit runs/a --nothing")


def test_each_command_has_one_line_in_the_list_of_commands():
    """The first sentence of its docstring: it wraps, and the list is for looking through."""
    listed = help_of().split("Commands ")[1]
    for name in COMMANDS:
        (after,) = re.findall(rf"^│ {name} +\S.*\n│ (\S| )", listed, flags=re.MULTILINE) or [("╰",)]
        assert after != " ", f"{name}'s sentence takes a second line; shorten it"


def test_version(monkeypatch, capsys):
    assert udsstream(monkeypatch, capsys, "--version") == (0, f"udsstream {package.__version__}\n", "")
