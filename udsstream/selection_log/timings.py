"""What each step took: `timings.jsonl` beside the log, one line per finished step, for people and reports.

Not evidence: no digest covers it, a crash may cost its last lines, and losing it costs no decision. It is kept apart from the
decisions because two runs that decide alike never take the same time.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import TextIO

import numpy as np

from udsstream.errors import LogCorruptError
from udsstream.selection_log import layout
from udsstream.selection_log.files import read_small

__all__ = ["TIMINGS", "TimingsWriter", "read_timings"]

TIMINGS = ("step_seconds", "selection_seconds", "log_seconds")
"""The whole step after its batch was loaded; in it, choosing (trunk forward, scores, memory); in it, writing the decision down."""

_LIMIT = 128 << 20  # bytes: more than a million steps
_STEPS = 1 << 62


class TimingsWriter:
    """Appends to the file; opened at the first step, flushed line by line."""

    def __init__(self, root: Path) -> None:
        self._path = layout.timings_path(root)
        self._file: TextIO | None = None

    def append(self, step: int, *, step_seconds: float, selection_seconds: float, log_seconds: float) -> None:
        """One step's times, in seconds. OSError passes through."""
        if self._file is None:
            torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
            self._file = open(self._path, "a", buffering=1, encoding="ascii")  # noqa: SIM115 (closed in close())
            if torn:
                self._file.write("\n")
        values = {"step_seconds": step_seconds, "selection_seconds": selection_seconds, "log_seconds": log_seconds}
        line = {"step": step} | {name: round(value, 6) for name, value in values.items()}
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def close(self) -> None:
        """May be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_timings(root: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """`step` (n,) int64, ascending, and each of `TIMINGS` (n,) float64 in seconds; where a step was repeated, its last time.

    Empty arrays when there is no file. A line that a crash tore is left out.

    Raises:
        LogCorruptError: a whole line does not hold a step and its times; or the file is no regular one, or larger than any run's.
        LogError: the file cannot be read.
    """
    path = layout.timings_path(Path(root))
    found: dict[int, list[float]] = {}
    try:
        data = read_small(path, _LIMIT)
    except FileNotFoundError:
        data = b""
    for number, line in enumerate(io.BytesIO(data), start=1):
        whole = line.rstrip(b"\n")
        if not whole.endswith(b"}"):
            continue
        try:
            value = json.loads(whole)
            step, seconds = int(value["step"]), [float(value[name]) for name in TIMINGS]
            if not 0 <= step < _STEPS:
                raise ValueError("the step is out of range")
            found[step] = seconds
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise LogCorruptError(
                f"{path}, line {number}: holds no step with {', '.join(TIMINGS)} ({error}). No decision depends on this file: "
                "restore it, or remove it and do without the times"
            ) from error
    steps = sorted(found)
    values = np.array([found[step] for step in steps], dtype=np.float64).reshape(len(steps), len(TIMINGS))
    return {"step": np.array(steps, dtype=np.int64)} | {name: values[:, i] for i, name in enumerate(TIMINGS)}
