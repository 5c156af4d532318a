"""Taking a log up again: find the place the checkpoint speaks of, then put the files in order and begin a new attempt.

The search reads and changes nothing. Putting in order may be interrupted anywhere and done again. Nothing that was written is
deleted: rows of an older attempt stay, and a write-ahead file with a damaged end is set aside under another name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from udsstream.errors import LogCorruptError, LogError
from udsstream.selection_log import layout
from udsstream.selection_log.digest import ATTEMPTS, attempt_link, batch_link, rank_head
from udsstream.selection_log.encoding import TableCodec
from udsstream.selection_log.files import replace_file, sync_dir
from udsstream.selection_log.manifest import AttemptLine, SegmentLine, append_line, encode_line
from udsstream.selection_log.sealing import Pending, open_segment, seal
from udsstream.selection_log.state import JournalState, lineage

__all__ = ["Place", "begin_attempt", "chain_before", "check_segments", "find_place", "put_in_order", "step_starts"]

WRITER = f"pyarrow {pa.__version__}"


@dataclass(frozen=True, kw_only=True)
class Place:
    """The attempt whose chain passed through the checkpoint's head; None when nothing is continued."""

    parent: int | None


def step_starts(steps: np.ndarray) -> np.ndarray:
    """The rows at which a new step begins."""
    if not len(steps):
        return np.empty(0, np.int64)
    return np.concatenate([[0], np.flatnonzero(steps[1:] != steps[:-1]) + 1])


def chain_before(
    root: Path, state: JournalState, codec: TableCodec, run_sha256: bytes, attempt: int, step: int
) -> bytes | None:
    """The chain's value in `attempt` just before `step` was written; None when the journal does not know the attempt."""
    head = None
    for line in state.manifest.lines:
        if line.attempt != attempt:
            continue
        if isinstance(line, AttemptLine):
            head = bytes.fromhex(line.head)
        elif isinstance(line, SegmentLine) and line.first_step < step:
            if line.last_step < step:
                head = bytes.fromhex(line.head)
                continue
            table = open_segment(root, line, state.rank, codec, run_sha256).table(codec)
            steps = table.column("step").to_numpy()
            starts = step_starts(steps)
            before = int(np.searchsorted(steps[starts], step))
            rows = int(starts[before]) if before < len(starts) else len(steps)
            head = bytes.fromhex(line.prev)
            for digest in codec.batch_digests(table.slice(0, rows), starts[:before].tolist()):
                head = batch_link(head, digest)
    for scan in state.wals:
        if scan.identity.attempt == attempt:
            before = int(np.searchsorted(scan.steps, step))
            if before:
                head = scan.links[before - 1]
    return head


def _attempts(states: list[JournalState]) -> list[int]:
    return sorted({line.attempt for state in states for line in state.manifest.attempts}, reverse=True)


def _last_step(state: JournalState, attempt: int) -> int | None:
    ends = [line.last_step for line in state.manifest.segments if line.attempt == attempt]
    ends += [int(scan.steps[-1]) for scan in state.wals if scan.identity.attempt == attempt and scan.batches]
    return max(ends, default=None)


def find_place(
    root: Path, states: list[JournalState], codecs: list[TableCodec], run_sha256: bytes, *, step: int, head: bytes
) -> Place:
    """The attempt in which this rank's head was `head` before `step`; LogCorruptError when there is none, saying which is ahead."""
    candidates = _attempts(states)
    for attempt in candidates:
        heads = [chain_before(root, s, c, run_sha256, attempt, step) for s, c in zip(states, codecs, strict=True)]
        if None not in heads and rank_head(*[h for h in heads if h is not None]) == head:
            return Place(parent=attempt)
    rank = states[0].rank
    where = f"rank {rank}: {root}"
    if not candidates:
        raise LogCorruptError(
            f"{where} is empty, but the checkpoint is at step {step}: the checkpoint is ahead of the log. "
            "Give the log directory of the run that made this checkpoint."
        )
    ends = [_last_step(states[0], line.attempt) for line in lineage(states[0].manifest.attempts)]
    last = max((end for end in ends if end is not None), default=None)
    if last is None or last + 1 < step:
        upto = "holds no step" if last is None else f"ends after step {last}"
        broken = f" ({states[0].wrong})" if states[0].wrong else ""
        raise LogCorruptError(
            f"{where}: the checkpoint is ahead of the log: it was made at step {step}, the log {upto}{broken}. Steps that were "
            "synced are missing: restore the log from a copy, or resume from a checkpoint that the log reaches."
        )
    raise LogCorruptError(
        f"{where}: the log reaches step {last} and so the checkpoint's step {step}, but what it records before that step is "
        "not what the checkpoint was made with: they come from different runs, or the log was changed. Give the checkpoint "
        "and the log of one run, and see `udsstream log RUN` and SelectionLog.verify() for the first broken link."
    )


def check_segments(root: Path, states: list[JournalState]) -> None:
    """Whether every sealed segment is there and has its size; their content is verify()'s. LogCorruptError names the first that is not."""
    for state in states:
        for line in state.manifest.segments:
            path = layout.segment_path(root, state.table, state.rank, line.attempt, line.segment)
            found = path.stat().st_size if path.is_file() else None
            if found != line.bytes:
                raise LogCorruptError(
                    f"rank {state.rank}: {path} ({state.table}, steps {line.first_step} to {line.last_step}) "
                    f"{'is missing' if found is None else f'has {found} bytes'}, but the manifest records {line.bytes} bytes: steps that "
                    "were synced are lost. Restore the file from a copy, or begin a new run in another log directory."
                )


def put_in_order(root: Path, state: JournalState, codec: TableCodec) -> None:
    """Seal what the write-ahead files hold and clear away what an interrupted sealing left. OSError passes through."""
    manifest, table, rank = state.manifest, state.table, state.rank
    if manifest.torn:
        data = b"".join(map(encode_line, manifest.lines))
        replace_file(layout.manifest_path(root, table, rank), data)
    for number in state.stale:
        layout.wal_path(root, table, rank, number).unlink()
    for number in state.unreachable:
        _set_aside(root, table, rank, number)
    for scan in state.wals:
        number = scan.identity.segment
        if scan.batches:
            seal(root, Pending.of_scan(scan), codec)
        elif scan.wrong and scan.size:
            _set_aside(root, table, rank, number)
        else:
            scan.path.unlink()
    folder = layout.journal_dir(root, table, rank)
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    sync_dir(folder)


def _set_aside(root: Path, table: str, rank: int, number: int) -> None:
    os.replace(layout.wal_path(root, table, rank, number), layout.free_torn_path(root, table, rank, number))


def begin_attempt(
    root: Path, table: str, rank: int, *, head: bytes, attempt: int, from_step: int, parent: int | None
) -> bytes:
    """Write the attempt's line; the chain after it. OSError passes through."""
    if not 0 <= attempt < ATTEMPTS:
        raise LogError(f"attempt {attempt} of {root}: at most {ATTEMPTS} attempts fit a log; start a new one")
    link = attempt_link(head, attempt, from_step, parent)
    line = AttemptLine(attempt=attempt, from_step=from_step, parent=parent, writer=WRITER, head=link.hex())
    append_line(root, table, rank, line)
    return link
