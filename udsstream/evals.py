"""The held-out losses of a run: `evals.jsonl` in its folder, one line per evaluation, for people, comparisons and reports.

    {"step": 20, "loss": 0.91372, "seconds": 8.1}     batches trained before it; nats per token; what the evaluation took
    {"resumed_at": 15}                                what was measured after step 15 belongs to an interrupted attempt

Not evidence, like `timings.jsonl`: no digest covers it, and losing it costs no decision. Nothing is ever removed from it; who reads it
takes the newest line of each step and leaves out what a resumed run has measured anew.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np

from udsstream.errors import LogCorruptError
from udsstream.plain_files import IrregularFileError, OversizedFileError, pieces

__all__ = ["EVALS", "append_eval", "append_resumption", "read_evals"]

EVALS = "evals.jsonl"
_LIMIT = 16 << 20  # bytes: some hundred thousand evaluations
_STEPS = 1 << 62


def append_eval(folder: Path, *, step: int, loss: float, seconds: float | None) -> None:
    """One evaluation after `step` batches: nats per token, and what it took (None: unknown). OSError passes through."""
    _append(folder, {"step": step, "loss": loss, "seconds": None if seconds is None else round(seconds, 6)})


def append_resumption(folder: Path, step: int) -> None:
    """Training begins at `step`: what an earlier attempt measured later than that is superseded. OSError passes through."""
    if (folder / EVALS).exists():
        _append(folder, {"resumed_at": step})


def read_evals(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """`step` (n,) int64, ascending; `loss` (n,) float64, nats per token; `seconds` (n,) float64, NaN where unknown.

    Empty arrays when there is no file. A last line that a crash tore is left out.

    Raises:
        LogCorruptError: a whole line holds neither an evaluation nor a resumption; or the file is no regular one, or larger than any run's.
    """
    path = Path(folder) / EVALS
    found: dict[int, tuple[float, float]] = {}
    for number, line in enumerate(_read(path).split(b"\n"), start=1):
        if not line.endswith(b"}"):
            continue
        try:
            value = json.loads(line)
            if "resumed_at" in value:
                resumed = int(value["resumed_at"])
                found = {step: measured for step, measured in found.items() if step <= resumed}
            else:
                step, seconds = int(value["step"]), value.get("seconds")
                if not 0 <= step < _STEPS:
                    raise ValueError("the step is out of range")
                found[step] = (float(value["loss"]), math.nan if seconds is None else float(seconds))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise LogCorruptError(
                f"{path}, line {number}: holds neither an evaluation (step, loss) nor a resumption ({error}). No decision depends on this "
                "file: restore it, or remove it and do without the losses along the run"
            ) from error
    steps = sorted(found)
    return {
        "step": np.array(steps, dtype=np.int64),
        "loss": np.array([found[step][0] for step in steps], dtype=np.float64),
        "seconds": np.array([found[step][1] for step in steps], dtype=np.float64),
    }


def _read(path: Path) -> bytes:
    """The file's bytes, or none; what a folder that was received may have in its place is not waited for, nor read without end."""
    try:
        return b"".join(pieces(path, _LIMIT))
    except FileNotFoundError:
        return b""
    except IrregularFileError as error:
        raise LogCorruptError(
            f"{path} is not a regular file: remove it and do without the losses along the run"
        ) from error
    except OversizedFileError as error:
        raise LogCorruptError(
            f"{path} has more than {_LIMIT} bytes, which no run's evaluations take: remove it and do without them"
        ) from error


def _append(folder: Path, line: dict[str, int | float | None]) -> None:
    path = folder / EVALS
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="ascii") as file:
        file.write("\n" * torn + json.dumps(line, separators=(",", ":")) + "\n")
        file.flush()
        os.fsync(file.fileno())
