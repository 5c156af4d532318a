"""The picture in docs/CONTRIBUTING.md is the package: each import goes down, or to the right within a row, and never across a bar."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest

import udsstream

PACKAGE = Path(udsstream.__file__).parent
GUIDE = (PACKAGE.parent / "docs" / "CONTRIBUTING.md").read_text()


def picture(text: str) -> list[list[list[str]]]:
    """Rows from the top, each of groups between bars, each of names from the left."""
    (drawn,) = re.findall(
        r"^## The architecture in one picture\n\n```text\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL
    )
    rows = [line for line in drawn.splitlines() if not set(line) <= set(" ─")]
    return [[group.split() for group in re.split("│", row[21:])] for row in rows]


def units() -> set[str]:
    """What the package consists of: its folders and its modules."""
    return {
        path.stem
        for path in PACKAGE.iterdir()
        if (path.suffix == ".py" and path.name != "__init__.py") or (path / "__init__.py").exists()
    }


def imports() -> dict[tuple[str, str], str]:
    """(who, whom) among the units, with one place of each; imports for type checking alone are left out."""
    found: dict[tuple[str, str], str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        who = path.relative_to(PACKAGE).with_suffix("").parts[0]
        tree = ast.parse(path.read_text())
        guarded = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if id(node) in guarded or who == "__init__":
                continue
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            for module in modules:
                package, _, whom = module.partition(".")
                whom = whom.partition(".")[0]
                if package == "udsstream" and whom in units() - {who}:
                    found.setdefault((who, whom), f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}")
    return found


def violations(edges: dict[tuple[str, str], str], rows: list[list[list[str]]]) -> list[str]:
    place = {
        name: (row, group, number)
        for row, groups in enumerate(rows)
        for group, names in enumerate(groups)
        for number, name in enumerate(names)
    }

    def allowed(who: str, whom: str) -> bool:
        (row, group, number), (row_below, other, further) = place[who], place[whom]
        return row_below > row or (row_below == row and other == group and further > number)

    return [f"{who} imports {whom} ({where})" for (who, whom), where in edges.items() if not allowed(who, whom)]


def test_the_picture_has_every_unit_once():
    names = [name for row in picture(GUIDE) for group in row for name in group]
    assert sorted(names) == sorted(units())


def test_every_import_follows_the_picture():
    assert violations(imports(), picture(GUIDE)) == []


def test_every_row_is_needed():
    """Something in each row imports something of the row beneath, so that no two could be one."""
    rows = [{name for group in row for name in group} for row in picture(GUIDE)]
    edges = imports()
    for upper, lower in itertools.pairwise(rows):
        assert any(who in upper and whom in lower for who, whom in edges), f"nothing in {upper} imports of {lower}"


@pytest.mark.parametrize(
    "edge", [("scoring", "selection_log"), ("selection_log", "mosaicml"), ("errors", "config"), ("audit", "report")]
)
def test_what_the_picture_forbids_is_noticed(edge):
    assert violations({edge: "here"}, picture(GUIDE)) == [f"{edge[0]} imports {edge[1]} (here)"]


def test_imports_within_functions_are_seen():
    assert imports()["audit", "mosaicml"].startswith("audit/checkpoint.py:")
    assert ("cli", "pipeline") in imports()
