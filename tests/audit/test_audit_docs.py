"""docs/auditing.md says what is true: its commands give what is shown, its tables have every check and every tampering."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from numpy_run import finished
from tampering import TAMPERINGS, cut_end, exchange_choice

import udsstream.audit

DOCS = (Path(__file__).parents[2] / "docs" / "auditing.md").read_text()
EXAMPLES = [
    (command, output)
    for block in re.findall(r"```console\n(.*?)```", DOCS, flags=re.DOTALL)
    for command, output in re.findall(r"^\$ (.*?)\n((?:(?!\$ ).*\n)*)", block, flags=re.MULTILINE)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The logs that the examples are of, and the root that was kept."""
    base = tmp_path_factory.mktemp("docs")
    run = finished(base / "runs" / "a")
    finished(
        base / "runs" / "forged",
        forge=lambda step, columns, kept: exchange_choice(columns, kept, pushes_too=False) if step == 7 else None,
    )
    finished(base / "runs" / "cut")
    cut_end(base / "runs" / "cut", heads_too=True)
    return base, run.roots[20].hex()


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_commands_give_what_is_shown(number: int, folder: tuple[Path, str]) -> None:
    command, output = EXAMPLES[number]
    base, root = folder
    # The chain holds the writer's version, so that the root shown is that of one of them.
    (shown,) = set(re.findall(r"\b[0-9a-f]{64}\b", DOCS))
    command = command.replace(shown, root)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, shell=True, cwd=base, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == output.replace(shown[:16], root[:16]), done.stderr


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 4


def test_the_tables_have_every_tampering() -> None:
    rows = re.findall(
        r"^\| (.*?) \| (?:`(.*?)`|an anchor only) \|$", DOCS.split("## Ways to tamper")[1], flags=re.MULTILINE
    )
    assert rows == [(tampering.name, tampering.check or "") for tampering in TAMPERINGS]


def test_the_table_of_checks_has_every_check() -> None:
    """Every name that the audit's code, or the verification beneath it, gives a finding."""
    table = DOCS.split("## What each check proves")[1].split("## ")[0]
    listed = {
        name for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE) for name in re.findall("`(.*?)`", row)
    }
    folder = Path(udsstream.audit.__file__).parent
    given = set()
    for path in [*folder.glob("*.py"), folder.parent / "selection_log" / "verification.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                for keyword in node.keywords:
                    if keyword.arg == "check" and isinstance(keyword.value, ast.Constant):
                        given.add(keyword.value.value)
                name = getattr(node.func, "attr", "")
                if name == "find_each" and isinstance(node.args[0], ast.Constant):
                    given.add(node.args[0].value)
    assert "top-k" in given
    assert given - {True, False} == listed
