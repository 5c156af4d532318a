"""Shortens the wait for a live writer, so that hundreds of broken logs take seconds."""

from __future__ import annotations

import pytest

from udsstream.selection_log import state, verification


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_PAUSE", 0.0)
    monkeypatch.setattr(verification, "_SETTLE_SECONDS", 0.0)
