"""The folder is something a user was sent: whatever it holds gives findings or an error of ours, never a crash, and runs no code."""

from __future__ import annotations

import ast
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy_run import NumpyRun, describe, finished, selection
from tampering import edited_run_json

import udsstream.audit
from udsstream.audit.run import audit
from udsstream.errors import UdsstreamError
from udsstream.selection_log import layout

HUGE = 10**400
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1 << 62,
    HUGE,
    1e308,
    -0.5,
    "",
    "x" * 5000,
    "1" * 5000 + "ba",
    [],
    [[]],
    {},
    {"a": 1},
]
SMALLEST, LARGEST = np.iinfo(np.int64).min, np.iinfo(np.int64).max


def outcome(root: Path, **how: Any) -> str:
    """ "intact", "found" or "error"; anything but an error of ours passes through and fails the test."""
    try:
        report = audit(root, **how)
    except UdsstreamError:
        return "error"
    json.dumps(report.as_dict(), allow_nan=False)
    return "found" if report.findings else "intact"


def small(root: Path, changes: dict[str, Any]) -> None:
    """A log of two steps whose run.json says what it likes, in an unbroken chain."""
    shutil.rmtree(root, ignore_errors=True)
    NumpyRun(root=root, changes=changes).begin().steps(0, 2).checkpoint(2).close()


@pytest.mark.parametrize("name", sorted(set(describe(selection())) - {"world_size"}))
def test_any_value_in_run_json(name: str, tmp_path: Path) -> None:
    for value in VALUES:
        small(tmp_path / "log", {name: value})
        outcome(tmp_path / "log", data=True)


@pytest.mark.parametrize("name", list(selection().as_dict()))
def test_any_selection_setting(name: str, tmp_path: Path) -> None:
    for value in VALUES:
        if value == selection().as_dict()[name]:
            continue
        settings = selection().as_dict() | {name: value}
        small(tmp_path / "log", {"selection": settings})
        assert outcome(tmp_path / "log") != "intact"


@pytest.mark.parametrize("name", ["name", "location", "samples", "per_epoch", "index_sha256"])
def test_any_description_of_a_stream(name: str, tmp_path: Path) -> None:
    for value in VALUES:
        streams = describe(selection())["streams"]
        streams[1][name] = value
        small(tmp_path / "log", {"streams": streams})
        outcome(tmp_path / "log", data=True)


@pytest.mark.parametrize("name", ["batch_size", "batches_per_epoch", "max_duration", "canonical_nodes"])
def test_any_description_of_the_loader(name: str, tmp_path: Path) -> None:
    for value in VALUES:
        small(tmp_path / "log", {"loader": describe(selection())["loader"] | {name: value}})
        outcome(tmp_path / "log")


@pytest.mark.parametrize("place", [b"1e999", b"-1e999", b"[" * 100_000, b"9" * 5000, b'"\\ud800"'])
def test_json_that_is_hard_to_read(place: bytes, tmp_path: Path) -> None:
    finished(tmp_path / "log")
    path = tmp_path / "log" / "run.json"
    path.write_bytes(path.read_bytes().replace(b'"0123456789abcdef"', place))
    assert outcome(tmp_path / "log") != "intact"
    path.write_bytes(place)
    assert outcome(tmp_path / "log") == "error"


@pytest.mark.parametrize(
    "name",
    ["epoch", "position", "epoch_position", "sample_id", "stream", "shard", "shard_index", "tokens", "train_order"],
)
def test_any_number_in_a_decision(name: str, tmp_path: Path) -> None:
    """In an unbroken chain."""
    for value in (SMALLEST, LARGEST, -1, -2):

        def forge(step: int, columns: dict[str, Any], kept: np.ndarray, value: int = value) -> None:
            if step in (1, 7):
                limits = np.iinfo(columns[name].dtype)
                columns[name] = columns[name].copy()
                columns[name][kept[0]] = max(limits.min, min(limits.max, value))

        for mode in ("full", "tail"):
            root = tmp_path / f"{value}{mode}"
            finished(root, forge=forge, embeddings=mode)
            assert outcome(root) == "found"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.0, 3e38, 1e-45])
def test_any_number_for_a_score(value: float, tmp_path: Path) -> None:
    for name in ("intra", "inter", "score"):

        def forge(step: int, columns: dict[str, Any], kept: np.ndarray, name: str = name) -> None:
            columns[name] = np.full_like(columns[name], value)

        finished(tmp_path / name, forge=forge)
        assert outcome(tmp_path / name) == "found"


@pytest.mark.parametrize("value", [SMALLEST, LARGEST - 1, -1])
def test_any_number_of_a_push(value: int, tmp_path: Path) -> None:
    for name in ("push_index", "sample_ids", "positions"):

        def forge(step: int, push: dict[str, Any], name: str = name) -> None:
            if step in (0, 7):
                limits = np.iinfo(push[name].dtype)
                push[name] = np.full_like(push[name], max(limits.min, min(limits.max, value)))

        finished(tmp_path / name, forge_push=forge)
        assert outcome(tmp_path / name) == "found"


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38, 0.0])
def test_any_vector(value: float, tmp_path: Path) -> None:
    for mode in ("full", "tail"):
        finished(tmp_path / mode, embeddings=mode, forge_rows=lambda step, rows: np.full_like(rows, value))
        with np.errstate(all="ignore"):
            assert outcome(tmp_path / mode) == "found"


def test_bits_flipped_anywhere_are_found(tmp_path: Path) -> None:
    finished(tmp_path / "log", embeddings="tail")
    rng = np.random.default_rng(5)
    for path in sorted(path for path in (tmp_path / "log").rglob("*") if path.is_file() and path.name != "lock"):
        whole = path.read_bytes()
        for bit in rng.choice(8 * len(whole), size=6, replace=False).tolist():
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bytes(changed))
            assert outcome(tmp_path / "log") != "intact", path
        for length in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            assert outcome(tmp_path / "log") != "intact", path
        path.write_bytes(whole)
    assert outcome(tmp_path / "log") == "intact"


def test_files_that_are_none(tmp_path: Path) -> None:
    """Pipes would make a reader wait for ever, folders and dangling links are no files."""
    root = tmp_path / "log"
    finished(root, embeddings="tail")
    paths = [
        layout.segment_path(root, "selection", 0, 0, 1),
        layout.manifest_path(root, "pushes", 0),
        layout.heads_path(root, 12),
        layout.buffer_path(root, 12, 0),
        layout.run_path(root),
    ]
    for path in paths:
        whole = path.read_bytes()
        for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/nonexistent")):
            path.unlink()
            make(path)
            result = outcome(root)
            # Kept vectors may be deleted; a link that leads nowhere is as good as none.
            assert result != "intact" or (path == paths[3] and path.is_symlink()), (path, make)
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            path.write_bytes(whole)
    shutil.rmtree(root / "_state")
    assert outcome(root) == "found"
    shutil.rmtree(root / "_heads")
    (root / "_heads").write_text("no folder")
    assert outcome(root) == "found"


def test_a_stream_of_a_run_json_that_leads_elsewhere(tmp_path: Path) -> None:
    """An index may name no file outside of its folder, and no pipe is read."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    folder = tmp_path / "stream"
    folder.mkdir()
    os.mkfifo(folder / "index.json")
    streams = describe(selection())["streams"]
    streams[0]["location"] = str(folder)
    small(tmp_path / "log", {"streams": streams})
    assert outcome(tmp_path / "log", data=True) == "found"
    (folder / "index.json").unlink()
    for name in ("../secret", str(secret), "a/../../secret", "", ".", "\0", "a\nb"):
        shard = {"samples": 50, "raw_data": {"basename": name, "bytes": 6, "hashes": {"sha1": "00"}}}
        (folder / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))
        report = audit(tmp_path / "log", data=True)
        assert report.exit_code == 1
        assert not any("has the sha1" in finding.message for finding in report.findings), name


def test_a_run_json_of_other_keys_is_judged_by_what_it_says(tmp_path: Path) -> None:
    finished(tmp_path / "log")
    edited_run_json(tmp_path / "log", lambda run: run.clear() or run.update(log=describe(selection())))
    assert outcome(tmp_path / "log") == "error"


def test_nothing_in_the_audit_unpickles_or_evaluates() -> None:
    for path in Path(udsstream.audit.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not any(name.split(".")[0] in ("pickle", "marshal", "shelve", "subprocess") for name in names)
            if isinstance(node, ast.Call):
                assert getattr(node.func, "id", "") not in ("eval", "exec", "compile", "__import__")
