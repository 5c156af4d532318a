"""A comparison small enough for tests: its configuration file, and finished runs out of numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from udsstream.compare.results import Choices, Curve, FinishedRun


def settings_of(out: Path, model: str, data: Path, **changes: Any) -> dict[str, Any]:
    """Two entries, seeds 1 and 2, six steps of 8 candidates."""
    settings = {
        "out": str(out),
        "seeds": [1, 2],
        "entries": {
            "random": {"selection.method": "random"},
            "longest": {"selection": {"method": "longest"}},
        },
        "run": {
            "max_duration": "6ba",
            "model": {"name": model, "lora": {"r": 4}},
            "data": {"streams_root": str(data / "train"), "batch_size": 8},
            "eval": {"local": str(data / "held_out"), "batch_size": 4, "interval": "2ba"},
            "selection": {"keep": 2, "projection_dims": [8, 4], "buffer_size": 16},
            "optimizer": {"lr": 1e-2},
            "max_seq_len": 32,
            "save_interval": "2ba",
            "device": "cpu",
        },
    }
    return settings | changes


def write_settings(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def finished_run(
    entry: str,
    seed: int,
    *,
    losses: list[float],
    tokens: list[int],
    steps: list[int] | None = None,
    seconds: float | None = 10.0,
    kept: list[list[int]] | None = None,
    candidates: int = 4,
    accuracy: float | None = None,
    ids: int = 0,
) -> FinishedRun:
    """A run of as many steps as the last evaluation says.

    Args:
        losses, tokens: at each evaluation.
        steps: of the evaluations; None: 0, 10, 20, …
        kept: places of the kept candidates, by step; None: the first one.
        ids: is added to the ids of the candidates.
    """
    at = np.array(steps if steps is not None else [10 * i for i in range(len(losses))])
    count = int(at[-1])
    kept = kept if kept is not None else [[0]] * count
    selected = np.zeros((count, candidates), bool)
    for step, places in enumerate(kept):
        selected[step, places] = True
    return FinishedRun(
        entry=entry,
        seed=seed,
        steps=count,
        candidates=count * candidates,
        kept=int(selected.sum()),
        candidate_tokens=100,
        kept_tokens=tokens[-1],
        seconds=seconds,
        length_correlation=None,
        curve=Curve(
            step=at,
            loss=np.array(losses),
            tokens=np.array(tokens),
            seconds=np.full(len(at), np.nan) if seconds is None else np.linspace(0, seconds, len(at)),
        ),
        choices=Choices(
            step=np.repeat(np.arange(count), candidates),
            sample_id=np.arange(count * candidates) + ids,
            selected=selected.ravel(),
        ),
        accuracy=accuracy,
    )
