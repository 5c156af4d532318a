"""Is the record whole: chains, manifests, heads and the anchor; and the rows of whatever can still be read.

The digests are followed by `selection_log/verification.py`. What is added here: an audit goes on after a fault. A run.json that was
changed does not hide the rows that were written under another; a journal whose manifest is broken is read from its files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from udsstream.audit.report import Anchor, Finding, Ledger
from udsstream.audit.rows import Collector, Decisions, Pushes, View, rows_of, views
from udsstream.errors import LogCorruptError, LogError
from udsstream.selection_log import layout
from udsstream.selection_log.checkpoints import Heads
from udsstream.selection_log.digest import merkle_root, rank_head
from udsstream.selection_log.encoding import TableCodec
from udsstream.selection_log.files import map_file, read_small
from udsstream.selection_log.frames import FrameError, frames, record_batch
from udsstream.selection_log.manifest import MANIFEST_LIMIT, AttemptLine, SegmentLine, decode_line
from udsstream.selection_log.run_file import RunFile, read_run
from udsstream.selection_log.schema import PUSHES, SELECTION, TABLES
from udsstream.selection_log.sealing import open_segment
from udsstream.selection_log.state import Lineage, lineage
from udsstream.selection_log.verification import Chain, Examination, Fault, examine
from udsstream.selection_log.wal import FileIdentity, identity_of, scan_wal

__all__ = ["GivenAnchor", "Record", "check_anchor", "read_record"]

_SEGMENT = re.compile(r"a(\d{1,5})-(\d{6,12})\.arrow")
_SCHEMA_LIMIT = 1 << 20
_UNREADABLE = (LogError, FrameError, pa.ArrowException, OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True, kw_only=True)
class GivenAnchor:
    """What was kept elsewhere of the log as it stood before a step."""

    source: str
    step: int
    root: bytes
    heads: tuple[bytes, ...] | None = None
    """By rank; None when only the root was kept."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """What could be read of a log."""

    root: Path
    run: RunFile
    written_under: bytes = field(repr=False)
    """Digest of the run.json that the log's files name: the present one's unless that was changed."""
    decisions: Decisions = field(repr=False)
    pushes: Pushes = field(repr=False)
    from_steps: Mapping[int, int]
    """Attempt → the step at which it began."""
    lineages: Mapping[int, Sequence[Lineage]]
    """Attempt → what the run consisted of when it was the newest."""
    views: Sequence[View] = field(repr=False)
    heads: Sequence[Heads] = field(repr=False)
    chains: Mapping[tuple[str, int], Chain] = field(repr=False)
    closed: bool
    """Every rank of the newest attempt closed its log in order: nothing is still being written."""


def read_record(root: Path, ledger: Ledger, *, anchor: GivenAnchor | None) -> Record:
    """Follows the chains and reads all rows.

    Raises:
        LogError: there is no log in the folder, or its run.json cannot be read.
    """
    run = read_run(root)
    settings = run.settings
    written_under = _digest_named_by_files(root)
    if written_under is not None and written_under != run.sha256:
        message = (
            f"{layout.run_path(root)} has the SHA-256 {run.sha256.hex()[:16]}…, but the log's files were written under one with "
            f"{written_under.hex()[:16]}…: it was changed or exchanged after the run began. What follows was judged by what it says now"
        )
        ledger.find(Finding(check="run.json", message=message))
    written_under = written_under or run.sha256
    collect = Collector()

    def report(fault: Fault) -> None:
        ledger.find(Finding(check=fault.check, message=fault.message, step=fault.step, rank=fault.rank))

    points = () if anchor is None else (anchor.step,)
    try:
        seen = examine(root, settings, written_under, report=report, visit=collect, points_at=points)
    except OSError as error:
        raise LogError(f"{root} cannot be read: {error}") from error
    lines = list(seen.attempts)
    for table, rank in seen.unread:
        lines += _salvage(root, rank, settings.codec(table), written_under, collect, ledger)
    decisions = collect.decisions(settings.codec(SELECTION))
    pushes = collect.pushes(settings.codec(PUSHES))
    from_steps, lineages = _lineages(lines, decisions, ledger)
    if len(layout.ranks(root)) > 1:
        closed = max(lineages) if seen.summary.closed else None
        whole = _whole_before(seen, lineages, anchor)
        decisions, pushes = _without_unfinished(decisions, pushes, lineages, closed, whole, ledger)
    _say_what_was_checked(seen, ledger)
    return Record(
        root=root,
        run=run,
        written_under=written_under,
        decisions=decisions,
        pushes=pushes,
        from_steps=from_steps,
        lineages=lineages,
        views=views(decisions, [lineages[attempt] for attempt in sorted(lineages, reverse=True)]),
        heads=seen.heads,
        chains=seen.chains,
        closed=seen.summary.closed,
    )


def _say_what_was_checked(seen: Examination, ledger: Ledger) -> None:
    summary = seen.summary
    ranks = f"{summary.ranks} rank{'s' if summary.ranks != 1 else ''}"
    ledger.check(
        f"run.json, files, chain, attempts: the digests of {summary.rows:,} decisions and {summary.pushes:,} pushes, in "
        f"{summary.segments} sealed files and {summary.live_batches:,} unsealed steps, against the manifests of {ranks}"
    )
    if seen.heads:
        ledger.check(
            f"heads, vectors: {len(seen.heads)} heads files against the chains ({summary.heads} found there), kept vectors against them"
        )
    for note in summary.unchecked:
        # These two are the audit's own matter.
        if not note.startswith(("no head from outside", "the memory's own digests")):
            ledger.skip(note)


def _files_of(root: Path, table: str, rank: int) -> list[tuple[int, int, Path]]:
    """(attempt, segment, path) of the segments that are there, whatever the manifest says."""
    folder = layout.segment_path(root, table, rank, 0, 0).parent
    if not folder.is_dir():
        return []
    found = [(entry, _SEGMENT.fullmatch(entry.name)) for entry in folder.iterdir()]
    return sorted(((int(m[1]), int(m[2]), path) for path, m in found if m), key=lambda item: item[1])


def _identity(path: Path) -> dict[str, object]:
    """What a segment or a write-ahead file says of itself; empty when it cannot be read."""
    try:
        data = map_file(path)
        first = next(frames(data, 8 if path.suffix == ".arrow" else 0), None)
        if first is None or first.end - first.start > _SCHEMA_LIMIT:
            return {}
        return identity_of(pa.ipc.read_schema(pa.py_buffer(data[first.start : first.end])))
    except _UNREADABLE:
        return {}


def _digest_named_by_files(root: Path) -> bytes | None:
    """The digest of run.json that most journals' first files name; None when none does."""
    named: Counter[bytes] = Counter()
    for rank in layout.ranks(root):
        for table in TABLES:
            paths = [path for _, _, path in _files_of(root, table, rank)[:1]]
            paths += [layout.wal_path(root, table, rank, n) for n in layout.wal_numbers(root, table, rank)[:1]]
            for path in paths[:1]:
                digest = _identity(path).get("run_sha256")
                if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest):
                    named[bytes.fromhex(digest)] += 1
    return named.most_common(1)[0][0] if named else None


def _salvage(
    root: Path, rank: int, codec: TableCodec, run_sha256: bytes, collect: Collector, ledger: Ledger
) -> list[AttemptLine]:
    """Reads a journal whose manifest is broken from its files alone; the attempts that can still be read in the manifest."""
    where = f"rank {rank}'s {codec.table}"
    ledger.skip(
        f"{where}: the chain through its files, because its manifest is broken; the rows were judged as they are"
    )
    sealed: set[int] = set()
    for attempt, segment, path in _files_of(root, codec.table, rank):
        sealed.add(segment)
        try:
            line = _line_from_file(path, codec, attempt, segment)
            found = open_segment(root, line, rank, codec, run_sha256)
            collect(rank, codec, found.table(codec), found)
        except _UNREADABLE as error:
            ledger.skip(f"{where}: the rows of {path}, which cannot be read ({error})")
    for number in layout.wal_numbers(root, codec.table, rank):
        path = layout.wal_path(root, codec.table, rank, number)
        says = _identity(path)
        if number in sealed:
            continue
        try:
            identity = FileIdentity(
                table=codec.table,
                rank=rank,
                attempt=int(str(says["attempt"])),
                segment=number,
                prev=bytes.fromhex(str(says["prev"])),
                run_sha256=run_sha256,
            )
            scan = scan_wal(path, codec, identity)
            collect(rank, codec, scan.table(codec), scan)
        except _UNREADABLE as error:
            ledger.skip(f"{where}: the rows of {path}, which cannot be read ({error})")
    lines: list[AttemptLine] = []
    try:
        data = read_small(layout.manifest_path(root, codec.table, rank), MANIFEST_LIMIT)
    except (LogError, OSError):
        return lines
    for raw in data.split(b"\n"):
        try:
            line = decode_line(raw)
        except ValueError:
            continue
        if isinstance(line, AttemptLine):
            lines.append(line)
    return lines


def _line_from_file(path: Path, codec: TableCodec, attempt: int, segment: int) -> SegmentLine:
    """What the manifest would say of a sealed file, as far as opening it needs; nothing of it is proof."""
    data = map_file(path)
    rows = sum(record_batch(data, frame, codec, compression=True).rows for frame in list(frames(data, 8))[1:])
    return SegmentLine(
        segment=segment,
        attempt=attempt,
        file="",
        rows=rows,
        batches=0,
        first_step=0,
        last_step=0,
        bytes=len(data),
        sha256="",
        prev=str(_identity(path)["prev"]),
        head="",
    )


def _lineages(
    lines: Sequence[AttemptLine], decisions: Decisions, ledger: Ledger
) -> tuple[dict[int, int], dict[int, list[Lineage]]]:
    """Where each attempt began, and what the run consisted of when it was the newest."""
    known: dict[int, AttemptLine] = {}
    for line in lines:
        # A rank that joined later does not know the parent.
        if line.attempt not in known or known[line.attempt].parent is None:
            known[line.attempt] = line
    present, first = np.unique(decisions["attempt"], return_index=True)
    for attempt, row in zip(present.tolist(), first.tolist(), strict=True):
        if attempt not in known:
            ledger.skip(f"where attempt {attempt} began: no manifest tells, so it was taken from its first row")
            earlier = max((other for other in known if other < attempt), default=None)
            begun = int(decisions["step"][row])
            known[attempt] = AttemptLine(attempt=attempt, from_step=begun, parent=earlier, writer="", head="")
    if not known:
        known[0] = AttemptLine(attempt=0, from_step=0, parent=None, writer="", head="")
    lineages: dict[int, list[Lineage]] = {}
    for attempt in known:
        try:
            lineages[attempt] = lineage(line for line in known.values() if line.attempt <= attempt)
        except LogCorruptError as error:
            ledger.find(Finding(check="attempts", message=str(error)))
            lineages[attempt] = [Lineage(attempt=attempt, first=None, stop=None)]
    return {attempt: line.from_step for attempt, line in known.items()}, lineages


def _whole_before(seen: Examination, attempts: Iterable[int], anchor: GivenAnchor | None) -> dict[int, int]:
    """Attempt → the step before which all ranks had written everything, as heads tell that were found in the chains."""
    whole: dict[int, int] = {}
    for heads in seen.held:
        whole[heads.attempt] = max(heads.step, whole.get(heads.attempt, heads.step))
    if anchor is not None:
        for attempt in attempts:
            found = _heads_at(seen.chains, (attempt, anchor.step))
            if found and merkle_root(found) == anchor.root:
                whole[attempt] = max(anchor.step, whole.get(attempt, anchor.step))
    return whole


def _without_unfinished(
    decisions: Decisions,
    pushes: Pushes,
    lineages: Mapping[int, Sequence[Lineage]],
    closed: int | None,
    whole: Mapping[int, int],
    ledger: Ledger,
) -> tuple[Decisions, Pushes]:
    """Leaves out the end of each attempt that was not closed, from the first step that a rank has not written both tables of.

    A kill stops the ranks at different steps, and while a run goes on they are read one after the other. What another attempt continues
    is complete, the ranks had agreed on it; and so is what comes before a checkpoint (`whole`).
    """
    continued: dict[int, int] = {}
    for parts in lineages.values():
        for part in parts:
            if part.stop is not None:
                continued[part.attempt] = max(part.stop, continued.get(part.attempt, part.stop))
    keep = np.ones(len(decisions), bool)
    keep_pushes = np.ones(len(pushes), bool)
    for attempt in lineages:
        mine = decisions["attempt"] == attempt
        if attempt == closed or not mine.any():
            continue
        ranks = np.unique(decisions["rank"][mine])
        ends = [int(decisions["step"][mine & (decisions["rank"] == rank)].max()) for rank in ranks]
        # The last step that all have is left out as well: its pushes may be there in part.
        stop = max(min(ends), continued.get(attempt, 0), whole.get(attempt, 0))
        later = mine & (decisions["step"] >= stop)
        if later.any():
            last = int(decisions["step"][mine].max())
            ledger.skip(
                f"the steps {stop} to {last} of attempt {attempt}: it was not closed, and not all ranks may have written them whole"
            )
        keep &= ~later
        keep_pushes &= ~((pushes["attempt"] == attempt) & (pushes["step"] >= stop))
    return decisions.kept(keep), pushes.kept(keep_pushes)


def check_anchor(record: Record, given: GivenAnchor, ledger: Ledger) -> Anchor:
    """Compares what was kept elsewhere with the chains: did they pass through it, in any attempt?"""
    stood: dict[int, list[bytes]] = {}
    for attempt in record.from_steps:
        heads = _heads_at(record.chains, (attempt, given.step))
        if heads:
            stood[attempt] = heads
    matching = [
        attempt
        for attempt, heads in stood.items()
        if merkle_root(heads) == given.root and _reaches(record, attempt, given.step)
    ]
    ledger.check(f"anchor: the Merkle root of {given.source} against the chains before step {given.step}")
    anchor = Anchor(
        source=given.source,
        step=given.step,
        root=given.root.hex(),
        found=bool(matching),
        attempt=max(matching, default=None),
        covers=_covered(record, max(matching), given.step) if matching else 0,
    )
    if matching:
        return anchor
    if any((attempt, given.step) in chain.lost for chain in record.chains.values() for attempt in record.from_steps):
        ledger.skip(f"the anchor before step {given.step}: the files before it are damaged")
        return anchor
    steps = record.decisions["step"]
    last = int(steps.max()) if len(steps) else -1
    rank = None
    if last + 1 < given.step:
        what = f"the log ends after step {last}: its end was cut off"
    else:
        found = {attempt: merkle_root(heads).hex()[:16] for attempt, heads in stood.items()}
        named = ", ".join(f"{root}… (attempt {attempt})" for attempt, root in sorted(found.items(), reverse=True)[:4])
        what = f"before that step the log's root is {named or 'not known'}: it was rewritten, or it is another run's"
        rank = _rank_that_differs(stood, given)
        what += "" if rank is None else f"; the head of rank {rank} differs"
    message = (
        f"the Merkle root before step {given.step} should be {given.root.hex()[:16]}… ({given.source}), but {what}"
    )
    ledger.find(Finding(check="anchor", message=message, step=given.step, rank=rank))
    return anchor


def _reaches(record: Record, attempt: int, step: int) -> bool:
    """Whether the run got to the step in this attempt: behind its end the chain stands still."""
    decisions = record.decisions
    groups = rows_of(record.lineages[attempt], decisions.group("attempt"), decisions.group("step"))
    return step == 0 or bool((decisions.group("step")[groups] == step - 1).any())


def _covered(record: Record, attempt: int, step: int) -> int:
    """Steps of the run as it stands that were written before the anchor was taken in `attempt` before `step`."""
    groups = record.views[0].groups
    attempts, steps = record.decisions.group("attempt")[groups], record.decisions.group("step")[groups]
    return int(((attempts < attempt) | ((attempts == attempt) & (steps < step))).sum())


def _heads_at(chains: Mapping[tuple[str, int], Chain], place: tuple[int, int]) -> list[bytes]:
    """The heads, by rank, of the ranks that took part in the attempt; empty when one of them is not known."""
    heads = []
    for rank in sorted({rank for _, rank in chains}):
        points = [chains[table, rank].points.get(place) if (table, rank) in chains else None for table in TABLES]
        if any(point is None for point in points):
            break
        heads.append(rank_head(*[point for point in points if point is not None]))
    return heads


def _rank_that_differs(stood: Mapping[int, list[bytes]], given: GivenAnchor) -> int | None:
    if given.heads is None:
        return None
    for heads in stood.values():
        differing = [rank for rank, (a, b) in enumerate(zip(heads, given.heads, strict=False)) if a != b]
        if len(differing) == 1 and len(heads) == len(given.heads):
            return differing[0]
    return None
