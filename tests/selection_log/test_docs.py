"""The documents say what is true: the examples run, and the tables of the specification are the code's schemas."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import recorded

from udsstream.selection_log.schema import DECISION_SCHEMA, push_schema

REPOSITORY = Path(__file__).parents[2]
READING = (REPOSITORY / "docs" / "reading_the_log.md").read_text()
FORMAT = (REPOSITORY / "docs" / "log_format.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", READING, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A live run in runs/a: sealed and live rows, samples that come twice."""
    base = tmp_path_factory.mktemp("docs")
    writer = recorded.create(base / "runs" / "a")
    for step in range(6):
        columns = recorded.columns(step)
        columns["sample_id"] = columns["sample_id"] % 11
        writer.append(step, columns)
        if step == 3:
            writer.seal()
        writer.push(
            step,
            positions=columns["position"][:2],
            sample_ids=columns["sample_id"][:2],
            push_index=2 * step,
            embeddings=recorded.vectors(step),
            digest=recorded.digest_after(step),
        )
    writer.release()
    return base


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(folder: Path, number: int) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXAMPLES[number]],
        cwd=folder,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_examples_give_what_they_say(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", next(example for example in EXAMPLES if "GROUP BY step" in example)],
        cwd=folder,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = re.findall(r"│\s+(\d+) │\s+(\d+) │\s+(\d+) │", done.stdout)
    assert rows == [(str(step), "5", "2") for step in range(6)]


def test_there_are_examples_for_each_tool() -> None:
    assert len(EXAMPLES) >= 9
    for tool in ("to_pandas", "polars", "duckdb", "verify_parquet", "pyarrow.dataset"):
        assert any(tool in example for example in EXAMPLES)


def test_the_specification_lists_the_schema() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (yes)? ?\|", FORMAT.split("`pushes`: one row")[0], flags=re.MULTILINE)
    found = [(name, kind, bool(null)) for name, kind, null in rows]
    assert found == [(f.name, str(f.type), f.nullable) for f in DECISION_SCHEMA]
    order = re.search(r"in this order: `([^`]*)`", FORMAT)
    assert order
    assert order[1].split(", ") == push_schema("full", 4, "float32").names


def test_the_specification_lists_the_files() -> None:
    from udsstream.selection_log import layout

    root = Path()
    for path in (
        layout.run_path(root),
        layout.segment_path(root, "selection", 3, 0, 17),
        layout.segment_path(root, "pushes", 3, 0, 17),
        layout.lock_path(root, 3),
        layout.manifest_path(root, "selection", 3),
        layout.wal_path(root, "selection", 3, 18),
        layout.free_torn_path(root, "selection", 3, 18),
        layout.heads_path(root, 12000),
        layout.old_heads_path(root, 12000, 0),
        layout.buffer_path(root, 12000, 0),
    ):
        assert re.search(rf"^{re.escape(path.as_posix())} ", FORMAT, flags=re.MULTILINE), path
