"""`write_report`: from a run's folder to a page on disk."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from udsstream.audit.run import audit
from udsstream.errors import ConfigError, LogCorruptError, LogError
from udsstream.log_queries.texts import read_text
from udsstream.plain_files import new_file
from udsstream.report.figures import Figures, measure
from udsstream.report.page import BEGINNING, Content, render
from udsstream.report.samples import pick
from udsstream.selection_log.files import read_small
from udsstream.selection_log.reader import SelectionLog

__all__ = ["WrittenReport", "write_report"]

_SUMMARY_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class WrittenReport:
    """What was written."""

    path: Path
    bytes: int
    verdict: str


def write_report(
    root: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    text: bool = True,
    streams: Mapping[str, str] | None = None,
    per_kind: int = 2,
    checkpoint: Path | None = None,
) -> WrittenReport:
    """Writes the report of the run in a folder; the same log gives the same bytes.

    Args:
        out: where the page goes. None: `report.html` in the folder.
        text: show what a few samples say, read from the streams.
        streams: local folders of streams, by their names in run.json, where they are not where they were.
        per_kind: samples shown of each kind.
        checkpoint: a Composer checkpoint of the run, whose word on the log the audit takes as its anchor.

    Raises:
        LogError: there is no log in the folder, or its run.json cannot be read.
        ResumeError: the checkpoint cannot be read, or holds no word on a log.
        ConfigError: `streams` names a stream that the run does not have; or the page cannot be written to `out`, or would replace
            something that is no report.
    """
    log = SelectionLog.open(root)
    path = Path(out) if out is not None else log.root / "report.html"
    _check_place(path)
    try:
        verdict = audit(root, checkpoint=checkpoint)
    except LogError as error:
        verdict = f"{type(error).__name__}: {error}"
    figures: Figures | str
    picks = []
    try:
        figures = measure(log)
        picks = pick(log, per_kind=per_kind)
    except LogCorruptError as error:
        figures = f"The decisions cannot be read: {error}"
    page = render(
        Content(
            run=log.run,
            audit=verdict,
            figures=figures,
            held_out=_held_out(log.root),
            picks=picks,
            texts=read_text(picks, log.run, places=streams) if text else None,
        )
    ).encode("utf-8")
    _replace(path, page)
    return WrittenReport(path=path, bytes=len(page), verdict=verdict if isinstance(verdict, str) else verdict.verdict)


def _check_place(path: Path) -> None:
    """Raises ConfigError when something other than a report stands there: a slip of `--out` must not cost a log."""
    beginning = BEGINNING.encode()
    try:
        if not path.exists():
            return
        if not path.is_file():
            raise OSError("it is not a regular file")
        with open(path, "rb") as file:
            found = file.read(len(beginning))
    except OSError as error:
        raise ConfigError(f"{path} is not a place for a report ({error}); name a file with --out") from error
    if found not in (beginning, b""):
        raise ConfigError(
            f"{path} exists and is no report of udsstream, so it is not replaced; name another file with --out"
        )


def _replace(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(new_file(scratch), "wb") as file:
            file.write(content)
        os.replace(scratch, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise ConfigError(f"the report cannot be written to {path} ({error}); name another file with --out") from error


def _held_out(root: Path) -> tuple[float, float] | None:
    """Held-out loss before and after training from the pipeline's summary.json, which a run of one's own script does not have."""
    try:
        summary = json.loads(read_small(root / "summary.json", _SUMMARY_BYTES))
        losses = float(summary["eval_loss_before"]), float(summary["eval_loss_after"])
    except (LogError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return losses if all(map(math.isfinite, losses)) else None
