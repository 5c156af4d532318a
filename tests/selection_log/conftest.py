"""Shortens waits and offers a folder in memory, so that tests of thousands of broken files take seconds."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from udsstream.selection_log import state, verification


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(state, "_PAUSE", 0.0)
        monkeypatch.setattr(verification, "_SETTLE_SECONDS", 0.0)


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder that no disk is behind, where there is one: rewriting a file thousands of times flushes it each time."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="udsstream-test-", dir=memory))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
