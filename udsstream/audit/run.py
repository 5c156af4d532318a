"""`audit`: every check of a log, in order."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from udsstream.audit.checkpoint import check_checkpoint, read_facts_of_checkpoint
from udsstream.audit.coverage import check_coverage, check_places
from udsstream.audit.data import check_data
from udsstream.audit.decisions import check_choices, check_positions, check_schedule, check_scores, check_steps
from udsstream.audit.memory import MemoryCheck
from udsstream.audit.record import GivenAnchor, check_anchor, read_record
from udsstream.audit.report import AuditReport, Ledger
from udsstream.audit.settings import read_facts
from udsstream.errors import ConfigError

__all__ = ["audit"]


def audit(
    root: str | os.PathLike[str],
    *,
    data: bool = False,
    streams: Mapping[str, str] | None = None,
    checkpoint: Path | None = None,
    anchor: tuple[int, bytes] | None = None,
) -> AuditReport:
    """Re-derives what can be re-derived of the log in a folder. Writes nothing; the run may still be going on.

    Args:
        root: the log's folder.
        data: also compare the streams' files with what run.json and their indexes record.
        streams: where streams are now, by their names in run.json; others are looked for where they were.
        checkpoint: a Composer checkpoint of the run, whose word on the log is taken as the anchor.
        anchor: (step, Merkle root) that was kept outside of the folder.

    Raises:
        LogError: there is no log in the folder, or its run.json cannot be read.
        ResumeError: the checkpoint cannot be read, or holds no word on a log.
        ConfigError: `streams` names a stream that the run did not have; or both a checkpoint and an anchor were given.
    """
    if checkpoint is not None and anchor is not None:
        raise ConfigError("a checkpoint and an anchor were given, but a report speaks of one: audit twice")
    kept = None if checkpoint is None else read_facts_of_checkpoint(Path(checkpoint))
    given = None if kept is None else kept.anchor
    if anchor is not None:
        given = GivenAnchor(source="the given root", step=anchor[0], root=anchor[1])

    ledger = Ledger()
    record = read_record(Path(root), ledger, anchor=given)
    found = None if given is None else check_anchor(record, given, ledger)
    facts = read_facts(record.run, ledger)
    rows, newest = record.decisions, record.views[0]
    memory = None
    if facts.config is not None:
        for view in record.views:
            check_steps(rows, view, record.from_steps, ledger)
        ledger.check(
            f"steps, epochs: whether {len(rows.starts):,} steps and their candidates follow each other without gap or overlap"
        )
        check_positions(rows, facts.config, ledger)
        check_scores(rows, facts, ledger)
        check_choices(rows, facts.config, ledger, equal_shares=facts.trains)
        resumed = len(record.lineages) > 1
        drawn = sum(check_schedule(rows, view, facts, ledger, resumed=resumed) for view in record.views)
        ledger.check("schedule: which steps were scored against start, end and interrupt")
        if facts.config.method in ("random", "selective_backprop"):
            ledger.check(f"random: the scores of {drawn:,} steps against the draw from the seed")
        memory = MemoryCheck(record=record, facts=facts, ledger=ledger)
        memory.match()
    if kept is not None and found is not None:
        check_checkpoint(record, kept, found, memory, ledger)
    if memory is not None:
        memory.recompute()
        check_places(rows, facts, ledger)
        check_coverage(rows, newest, facts, record.run.settings.world_size, ledger)
    if data:
        check_data(rows, facts, streams or {}, ledger)
    else:
        ledger.skip("the samples themselves: that needs the streams' files (--data)")
    if given is None:
        ledger.skip(
            "whether the log was cut at its end or rewritten as a whole: that needs an anchor (--checkpoint or --anchor)"
        )
    return AuditReport(
        run_id=facts.run_id,
        steps=len(np.unique(rows.group("step")[newest.groups])),
        rows=len(rows),
        attempts=len(record.lineages),
        findings=tuple(ledger.findings),
        found=dict(ledger.found),
        checked=tuple(ledger.checked),
        unchecked=tuple(ledger.unchecked),
        anchored=found is not None and found.found,
        anchor=found,
        chains={journal: chain.head.hex() for journal, chain in record.chains.items()},
    )
