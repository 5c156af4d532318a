"""What the files of one journal say when they are read together: the manifest, then the write-ahead files after it.

Reading takes no lock and changes nothing. A live writer may move rows from a write-ahead file to a segment between two
looks; `read_state` then looks again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from udsstream.errors import LogCorruptError
from udsstream.selection_log import layout
from udsstream.selection_log.encoding import TableCodec
from udsstream.selection_log.manifest import AttemptLine, Manifest, read_manifest
from udsstream.selection_log.wal import FileIdentity, WalScan, scan_wal

__all__ = ["JournalState", "Lineage", "all_closed", "lineage", "read_state"]

_TRIES, _PAUSE = 40, 0.01
_SEGMENT = re.compile(r"a(\d+)-(\d{6,})\.arrow")


@dataclass(frozen=True, kw_only=True)
class JournalState:
    """One table of one rank."""

    table: str
    rank: int
    manifest: Manifest
    wals: tuple[WalScan, ...]  # those whose rows are in no segment, in order; only the last may end in a bad place
    unreachable: tuple[int, ...]  # write-ahead files after a bad place
    stale: tuple[int, ...]  # write-ahead files whose segment is sealed: removing them was interrupted

    @property
    def head(self) -> bytes:
        return self.wals[-1].head if self.wals else self.manifest.head

    @property
    def wrong(self) -> str | None:
        """What is wrong with the end of the journal, None when nothing is."""
        if self.manifest.torn:
            return f"the manifest ends in {self.manifest.torn} bytes that are no line"
        if self.wals and self.wals[-1].wrong:
            return f"{self.wals[-1].path}: {self.wals[-1].wrong}"
        if self.unreachable:
            return f"write-ahead file {self.unreachable[0]} does not follow"
        return None

    @property
    def damaged(self) -> bool:
        """Rows that were once readable are not: more than a crash's torn end."""
        return any(scan.damaged for scan in self.wals) or bool(self.unreachable)


def _segments_on_disk(root: Path, table: str, rank: int) -> list[int]:
    folder = layout.segment_path(root, table, rank, 0, 0).parent
    if not folder.is_dir():
        return []
    return sorted(int(m[2]) for entry in folder.iterdir() if (m := _SEGMENT.fullmatch(entry.name)))


def _read_once(root: Path, rank: int, codec: TableCodec, run_sha256: bytes) -> JournalState:
    table = codec.table
    manifest = read_manifest(root, table, rank, run_sha256)
    numbers = layout.wal_numbers(root, table, rank)
    stale = tuple(n for n in numbers if n < manifest.next_segment)
    waiting = [n for n in numbers if n >= manifest.next_segment]
    where = f"rank {rank}: {layout.journal_dir(root, table, rank)}"
    if unlisted := [n for n in _segments_on_disk(root, table, rank) if n >= manifest.next_segment and n not in waiting]:
        raise LogCorruptError(
            f"{where}: segment {unlisted[0]} is sealed but neither the manifest nor a write-ahead file knows of it. "
            "The manifest was cut: restore it from a copy."
        )
    last = manifest.last_attempt
    if waiting and (
        last is None or waiting != list(range(manifest.next_segment, manifest.next_segment + len(waiting)))
    ):
        raise LogCorruptError(
            f"{where}: found the write-ahead files {waiting}, expected them from {manifest.next_segment} on. "
            "A file or a line of the manifest was removed: restore it from a copy."
        )
    scans: list[WalScan] = []
    head = manifest.head
    for number in waiting:
        assert last is not None
        identity = FileIdentity(
            table=table, rank=rank, attempt=last.attempt, segment=number, prev=head, run_sha256=run_sha256
        )
        scan = scan_wal(layout.wal_path(root, table, rank, number), codec, identity)
        scans.append(scan)
        head = scan.head
        if scan.wrong:
            break
    unreachable = tuple(waiting[len(scans) :])
    return JournalState(
        table=table, rank=rank, manifest=manifest, wals=tuple(scans), unreachable=unreachable, stale=stale
    )


def read_state(root: Path, rank: int, codec: TableCodec, run_sha256: bytes, *, live: bool = True) -> JournalState:
    """Read a journal. With `live`, what looks wrong counts only once a second look finds it unchanged: a writer may be at work."""
    before = None
    for _ in range(_TRIES):
        state = None
        try:
            state = _read_once(root, rank, codec, run_sha256)
            if state.wrong is None or not live:
                return state
            found = f"{state.wrong} {[scan.size for scan in state.wals]}"
        except FileNotFoundError as error:
            found = f"rank {rank}: {error.filename} was listed but is not there"
        except LogCorruptError as error:
            if not live:
                raise
            found = str(error)
        if found == before:
            if state is not None:
                return state
            raise LogCorruptError(found)
        before = found
        time.sleep(_PAUSE)
    raise LogCorruptError(f"rank {rank}: {layout.journal_dir(root, codec.table, rank)} never came to rest: {before}")


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The steps of one attempt that belong to the run as it stands: `first` (None: from the beginning) up to before `stop`."""

    attempt: int
    first: int | None
    stop: int | None  # None: to its end

    def covers(self, first: int, last: int) -> bool:
        return (self.first is None or first >= self.first) and (self.stop is None or last < self.stop)

    def touches(self, first: int, last: int) -> bool:
        return (self.first is None or last >= self.first) and (self.stop is None or first < self.stop)


def lineage(lines: Iterable[AttemptLine]) -> list[Lineage]:
    """Which steps of which attempts make up the run, newest attempt first.

    An attempt that resumed at step s continues its parent's steps before s; what the parent or any other attempt wrote from
    s on is superseded. The lines may come from several ranks; a rank that joined later does not know an attempt's parent.
    """
    known: dict[int, tuple[int, int | None]] = {}
    for line in lines:
        from_step, parent = known.get(line.attempt, (line.from_step, None))
        if from_step != line.from_step or (parent is not None and line.parent not in (None, parent)):
            raise LogCorruptError(
                f"the ranks do not agree on attempt {line.attempt}: one says it began at step {from_step} "
                f"continuing {parent}, rank files also say step {line.from_step} continuing {line.parent}"
            )
        known[line.attempt] = (from_step, parent if parent is not None else line.parent)
    out: list[Lineage] = []
    attempt = max(known, default=None)
    stop: int | None = None
    while attempt is not None:
        if attempt not in known:
            raise LogCorruptError(f"an attempt continues attempt {attempt}, which no manifest knows")
        first, parent = known[attempt]
        out.append(Lineage(attempt=attempt, first=None if parent is None else first, stop=stop))
        # A parent that itself began later than its child contributes nothing, but its own parent may.
        stop = first if stop is None else min(first, stop)
        attempt = parent
    return out


def all_closed(manifests: Iterable[Manifest]) -> bool:
    """Whether every rank of the newest attempt closed its log in order; ranks that an earlier attempt had left do not count."""
    known = [(manifest, manifest.last_attempt) for manifest in manifests]
    newest = max((last.attempt for _, last in known if last is not None), default=None)
    return newest is not None and all(
        manifest.closed for manifest, last in known if last is not None and last.attempt == newest
    )
