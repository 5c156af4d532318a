"""The guides hold what they say: commands parse, examples run, and a page whose blocks nobody covers is noticed.

What holds for every page is checked here; a page's own test runs its blocks and compares what they print.
"""

from __future__ import annotations

import ast
import pydoc
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from streaming import MDSWriter

from udsstream.cli import app
from udsstream.run_config import parse_run_config

ROOT = Path(__file__).parent.parent
GUIDES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)
LANGUAGES = {"bash", "console", "python", "yaml", "text", ""}
TO_RUN = {"console", "python", "yaml"}
"""A test must run or read these; a line of `bash` is parsed, and `text` is looked at only."""


def blocks(path: Path, language: str) -> list[str]:
    return [text for _, found, text in FENCED.findall(path.read_text()) if found == language]


def of_all(language: str) -> list[tuple[str, str]]:
    return [(name, block) for name in GUIDES for block in blocks(ROOT / "docs" / name, language)]


LINES = [
    (name, line.split("  #")[0].strip())
    for name, block in of_all("bash")
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]


def check_line(line: str) -> None:
    """A command that exists, with options that exist; nothing is run."""
    words = shlex.split(line)
    while re.fullmatch(r"\w+=.*", words[0]):  # PYTHONPATH=. python …
        del words[0]
    program, *arguments = words
    if program == "udsstream":
        COMMANDS[arguments[0]].make_context(arguments[0], arguments[1:], resilient_parsing=False).close()
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), line
    elif program == "python" and arguments[:2] == ["-m", "pytest"]:
        assert (ROOT / arguments[2]).exists(), line
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), line
    elif program == "pip":
        assert arguments[0] == "install", line
        for extra in re.findall(r"udsstream\[(\w+)\]", line):
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE), line
    else:
        assert program == "openssl", f"{program}: no test knows what to make of it"  # tests/audit/test_attestation.py


@pytest.mark.parametrize(("guide", "line"), LINES)
def test_commands_parse(guide, line):
    check_line(line)


@pytest.mark.parametrize(
    "line", ["udsstream log runs/a --nothing", "udsstream nothing", "make nothing", "python nothing.py", "nothing"]
)
def test_a_command_that_does_not_exist_is_noticed(line):
    with pytest.raises((Exception, SystemExit)):
        check_line(line)


def test_there_are_commands_to_check():
    assert {line.split()[1] for _, line in LINES if line.startswith("udsstream")} >= {
        "replay",
        "train",
        "log",
        "curate",
    }


@pytest.mark.parametrize("guide", [*GUIDES, "../README.md"])
def test_commands_named_in_a_sentence_exist(guide):
    text = FENCED.sub("", (ROOT / "docs" / guide).read_text())
    for named in re.findall(r"`udsstream ([^`]+)`", text):
        command, *words = named.split()
        if not command.islower() or command.startswith("--"):  # `udsstream TABLE VERSION` is a text, not a command
            continue
        options = {option for parameter in COMMANDS[command].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options | {"--help"}, named
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"`make (\w+)", text)) <= targets


@pytest.mark.parametrize("guide", GUIDES)
def test_blocks_say_what_they_are_and_a_test_reads_them(guide):
    """A page with something to run is named in a test, and not only in what the test says of itself."""
    languages = {language for _, language, _ in FENCED.findall((ROOT / "docs" / guide).read_text())}
    assert languages <= LANGUAGES
    for language in ("text", ""):
        for block in blocks(ROOT / "docs" / guide, language):
            assert not re.search(r"^(\$ |udsstream |make |pip )", block, flags=re.MULTILINE), (
                "a command: use bash or console"
            )
    if languages & TO_RUN:
        assert guide in NAMED_BY_TESTS, f"{guide} has blocks of {languages & TO_RUN} that no test reads"


def named_by_tests() -> set[str]:
    """Names of pages among the strings of the tests' code, docstrings left out."""
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        tree = ast.parse(path.read_text())
        said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
                found |= {name for name in GUIDES if re.search(rf"(^|/){re.escape(name)}$", node.value)}
    return found


NAMED_BY_TESTS = named_by_tests()


@pytest.mark.parametrize(("guide", "block"), of_all("python"))
def test_examples_import_what_there_is(guide, block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("udsstream"):
            for alias in node.names:
                assert pydoc.locate(f"{node.module}.{alias.name}") is not None, alias.name


@pytest.mark.parametrize(("guide", "block"), of_all("yaml"))
def test_configurations_are_valid(guide, block):
    settings = yaml.safe_load(block)
    assert isinstance(settings, dict)
    if "save_folder" in settings and "train_loader" not in settings:  # with that it is llm-foundry's: tests/llm_foundry
        parse_run_config(settings, where=guide)


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
    seed, weights = names["replay"].differences  # type: ignore[attr-defined]
    assert seed.startswith("training seed: was ")  # which the script does not fix
    assert weights.startswith("trained weights before the first step: was ")
    names["selection"].close()  # type: ignore[attr-defined]
