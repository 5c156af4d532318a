"""Whether a log is what its writers wrote: every digest recomputed from the rows, every link of every chain followed.

`verify` stops at the first thing that does not hold; `examine` is the walk beneath it, which tells of each and goes on.

It proves that the rows, the manifests, run.json and the heads agree with each other, and with an anchor when one is given.
It does not prove that the rows are true, and without an anchor not that the folder was not rewritten as a whole or cut.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from udsstream.errors import LogCorruptError, LogError
from udsstream.selection_log import layout
from udsstream.selection_log.checkpoints import Heads, buffer_codec, heads_files, read_buffer, read_heads
from udsstream.selection_log.digest import ATTEMPTS, batch_link, genesis, rank_head
from udsstream.selection_log.encoding import TableCodec, schema_message
from udsstream.selection_log.manifest import AttemptLine, SegmentLine
from udsstream.selection_log.recovery import WRITER, step_starts
from udsstream.selection_log.run_file import LogSettings, read_run
from udsstream.selection_log.schema import PUSHES, SELECTION, TABLES
from udsstream.selection_log.sealing import MARK_BYTES, Segment, open_segment
from udsstream.selection_log.state import JournalState, all_closed, lineage, read_state
from udsstream.selection_log.wal import WalScan

__all__ = ["Chain", "Examination", "Fault", "VerifyReport", "examine", "verify"]

_SETTLE_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that does not hold."""

    check: str  # "files", "chain", "heads", "vectors", "attempts" or "anchor"
    message: str
    rank: int | None = None
    step: int | None = None


Report = Callable[[Fault], None]
"""Takes a fault; may raise to end the walk."""
Visit = Callable[[int, TableCodec, pa.Table, Segment | WalScan], None]
"""Takes a file's rows: rank, table, rows, where they come from. Called for damaged files too, as long as Arrow can read them."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was verified. Whatever is not listed under `unchecked` held."""

    ranks: int
    attempts: int
    steps: int  # distinct steps with decisions, superseded ones included
    rows: int  # decisions of all attempts
    pushes: int  # embeddings pushed, of all attempts
    segments: int  # sealed files, both tables
    live_batches: int  # batches not yet sealed, both tables
    heads: int  # checkpoints whose heads were found in the chains
    closed: bool  # every rank of the newest attempt closed its log in order
    anchored: bool  # the head given from outside was found
    unchecked: tuple[str, ...]  # what could not be checked, and why


@dataclass
class Chain:
    """A journal's chain as it is recomputed: where it stood in each attempt before each step that somebody asks for."""

    head: bytes
    wanted: list[tuple[int, int]]  # the (attempt, step) asked for, descending
    points: dict[tuple[int, int], bytes] = field(
        default_factory=dict
    )  # (attempt, step) -> the chain just before that step
    lost: set[tuple[int, int]] = field(default_factory=set)  # asked for, but within a file that is damaged
    steps: set[int] = field(default_factory=set)
    rows: int = 0
    segments: int = 0
    live: int = 0
    current: int | None = None

    def _note(self, upto: tuple[int, int]) -> None:
        """The chain will not change any more before the wanted places up to this one."""
        while self.wanted and self.wanted[-1] <= upto:
            place = self.wanted.pop()
            if place[0] == self.current:
                self.points[place] = self.head

    def attempt(self, attempt: int, head: bytes) -> None:
        self._note((attempt, -2))  # steps begin at -1
        self.head, self.current = head, attempt

    def batch(self, attempt: int, step: int, link: bytes) -> None:
        self._note((attempt, step))
        self.head = link

    def resume_after(self, line: SegmentLine) -> None:
        """Goes on where the manifest says that a damaged segment ends."""
        self._note((line.attempt, line.first_step))
        while self.wanted and self.wanted[-1] <= (line.attempt, line.last_step):
            self.lost.add(self.wanted.pop())
        self.head = bytes.fromhex(line.head)

    def finish(self) -> None:
        self._note((ATTEMPTS, 0))


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What `examine` saw."""

    summary: VerifyReport
    chains: dict[tuple[str, int], Chain]  # by (table, rank); those whose manifest could be read
    attempts: list[AttemptLine]  # of all manifests
    heads: list[Heads]  # of all heads files that could be read
    held: list[Heads]  # those of them that were found in the chains
    unread: list[tuple[str, int]]  # (table, rank) of journals whose manifest could not be read


def verify(root: Path, *, anchor: tuple[int, bytes] | None = None) -> VerifyReport:
    """Check everything under `root`; LogCorruptError at the first thing that does not hold."""

    def stop(fault: Fault) -> None:
        raise LogCorruptError(fault.message)

    run = read_run(root)
    return examine(root, run.settings, run.sha256, report=stop, anchor=anchor).summary


def examine(
    root: Path,
    settings: LogSettings,
    run_sha256: bytes,
    *,
    report: Report,
    visit: Visit | None = None,
    anchor: tuple[int, bytes] | None = None,
    points_at: Sequence[int] = (),
) -> Examination:
    """Check everything under `root`, and give each fault to `report` and each file's rows to `visit`.

    After a fault the walk goes on behind it, with what the manifest says for what could not be recomputed.

    Args:
        run_sha256: digest of the run.json that the log's files were written with.
        points_at: steps before which every attempt's chains are wanted, beside those of the heads files.
    """
    unchecked: list[str] = []
    kept: list[tuple[Path, Heads]] = []
    for path in heads_files(root):
        try:
            kept.append((path, read_heads(path)))
        except (LogError, FileNotFoundError) as error:
            report(Fault(check="heads", message=str(error)))
    ranks = layout.ranks(root)
    if missing := sorted(set(range(settings.world_size)) - set(ranks)):
        report(
            Fault(
                check="files",
                rank=missing[0],
                message=f"rank {missing[0]} of {root}: there is no {layout.rank_dir(root, missing[0])}, but the run began with "
                f"{settings.world_size} ranks. Restore it from a copy.",
            )
        )
    _check_no_strangers(root, ranks, report)
    chains: dict[tuple[str, int], Chain] = {}
    states: list[JournalState] = []
    unread: list[tuple[str, int]] = []
    for rank in ranks:
        for table in TABLES:
            codec = settings.codec(table)
            try:
                state = _settled(root, rank, codec, run_sha256, report)
            except LogError as error:
                report(Fault(check="chain", rank=rank, message=str(error)))
                unread.append((table, rank))
                continue
            states.append(state)
            asked = {(heads.attempt, heads.step) for _, heads in kept}
            asked |= {(line.attempt, step) for line in state.manifest.attempts for step in points_at}
            chain = Chain(genesis(table, rank, run_sha256), sorted(asked, reverse=True))
            chains[table, rank] = chain
            _verify_journal(root, state, codec, run_sha256, chain, report, visit, unchecked)
            unchecked += [f"{path} was set aside by a recovery" for path in layout.torn_files(root, table, rank)]
    attempts = [line for state in states for line in state.manifest.attempts]
    try:
        lineage(attempts)
    except LogCorruptError as error:
        report(Fault(check="attempts", message=str(error)))
    held = [heads for path, heads in kept if _verify_heads(path, heads, chains, unread, report, unchecked)]
    _verify_buffers(root, settings, [heads for _, heads in kept], report, unchecked)
    if anchor is not None:
        _verify_anchor(root, anchor, [heads for _, heads in kept], report)
    else:
        unchecked.append("no head from outside was given: a folder cut at its end or rewritten as a whole would pass")
    selection = [chain for (table, _), chain in chains.items() if table == SELECTION]
    summary = VerifyReport(
        ranks=len(ranks),
        attempts=len({line.attempt for line in attempts}),
        steps=len(set().union(*(chain.steps for chain in selection))) if selection else 0,
        rows=sum(chain.rows for chain in selection),
        pushes=sum(chain.rows for (table, _), chain in chains.items() if table == PUSHES),
        segments=sum(chain.segments for chain in chains.values()),
        live_batches=sum(chain.live for chain in chains.values()),
        heads=len(held),
        closed=all_closed(state.manifest for state in states),
        anchored=anchor is not None,
        unchecked=tuple(unchecked),
    )
    return Examination(
        summary=summary,
        chains=chains,
        attempts=attempts,
        heads=[heads for _, heads in kept],
        held=held,
        unread=unread,
    )


def _check_no_strangers(root: Path, ranks: list[int], report: Report) -> None:
    """Segments of a rank without a folder in _state would be seen by other tools, but by no chain."""
    for table in TABLES:
        folder = root / table
        known = {layout.segment_path(root, table, rank, 0, 0).parent.name for rank in ranks}
        for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
            if entry.name not in known:
                report(
                    Fault(
                        check="files",
                        message=f"{entry} belongs to no rank of this log: it was put there, or _state/ was cut",
                    )
                )


def _settled(root: Path, rank: int, codec: TableCodec, run_sha256: bytes, report: Report) -> JournalState:
    """The journal's state; a bad end counts once it has stayed the same for half a second (a live writer moves on)."""
    state = read_state(root, rank, codec, run_sha256)
    end = time.monotonic() + _SETTLE_SECONDS
    while state.wrong and not state.damaged and time.monotonic() < end:
        time.sleep(_SETTLE_SECONDS / 5)
        state = read_state(root, rank, codec, run_sha256)
    if state.wrong is None:
        return state
    last = state.wals[-1] if state.wals else None
    step = "" if last is None else f", after step {last.steps[-1]}" if last.batches else ", before its first step"
    after = int(last.steps[-1]) if last is not None and last.batches else None
    if state.damaged:
        message = (
            f"rank {rank}: {state.wrong}{step}. Rows after it are intact, so this is damage and not a torn end. Restore the "
            "file from a copy."
        )
    else:
        message = (
            f"rank {rank}: {state.wrong}{step}. Either a crash tore what was never acknowledged, and resuming the run puts it in "
            "order, or the end was damaged afterwards."
        )
    report(Fault(check="chain", rank=rank, step=after, message=message))
    return state


def _verify_journal(
    root: Path,
    state: JournalState,
    codec: TableCodec,
    run_sha256: bytes,
    chain: Chain,
    report: Report,
    visit: Visit | None,
    unchecked: list[str],
) -> None:
    for line in state.manifest.lines:
        if isinstance(line, AttemptLine):
            chain.attempt(line.attempt, bytes.fromhex(line.head))  # recomputed when the manifest was read
        elif isinstance(line, SegmentLine):
            try:
                segment = open_segment(root, line, state.rank, codec, run_sha256)
                table = segment.table(codec)
            except LogError as error:
                report(Fault(check="chain", rank=state.rank, step=line.first_step, message=str(error)))
                chain.resume_after(line)
                continue
            if (fault := _verify_segment(state, segment, table, codec, chain)) is not None:
                report(fault)
                chain.resume_after(line)
            if visit is not None:
                visit(state.rank, codec, table, segment)
    for scan in state.wals:
        try:
            table = scan.table(codec)
        except LogError as error:
            report(Fault(check="chain", rank=state.rank, message=str(error)))
            continue
        if (fault := _verify_wal(state, scan, table, codec, chain, unchecked)) is not None:
            report(fault)
        if visit is not None:
            visit(state.rank, codec, table, scan)
    chain.finish()


def _verify_segment(
    state: JournalState, segment: Segment, table: pa.Table, codec: TableCodec, chain: Chain
) -> Fault | None:
    """Follows the chain through a segment; the first thing that does not hold, after which its later links are not known."""
    line = segment.line
    intact = hashlib.sha256(segment.data).hexdigest() == line.sha256
    where = f"rank {state.rank}: {segment.path}"
    span = f"{where}, steps {line.first_step} to {line.last_step}"

    def fault(message: str, step: int = line.first_step) -> Fault:
        return Fault(check="chain", rank=state.rank, step=step, message=message)

    steps = table.column("step").to_numpy()
    starts = step_starts(steps)
    if (wrong := _wrong_rows(where, table, starts, line.attempt, state.rank)) is not None:
        return wrong
    links = len(segment.marks) // MARK_BYTES
    if len(segment.marks) != links * MARK_BYTES or links != line.batches or len(starts) != line.batches:
        return fault(
            f"{where}: {len(starts)} steps (marks of {links}), expected {line.batches}: steps were dropped or added between "
            f"step {line.first_step} and step {line.last_step}. Restore the file from a copy."
        )
    for i, digest in enumerate(codec.batch_digests(table, starts.tolist())):
        step = int(steps[starts[i]])
        link = batch_link(chain.head, digest)
        if link[:MARK_BYTES] != segment.marks[i * MARK_BYTES : (i + 1) * MARK_BYTES]:
            return fault(
                f"{where}, step {step}: the rows do not give the digest that was written with them. A row of this step was "
                "changed, dropped or reordered. Restore the file from a copy.",
                step,
            )
        chain.batch(line.attempt, step, link)
    if chain.head.hex() != line.head or (int(steps[0]), int(steps[-1])) != (line.first_step, line.last_step):
        return fault(f"{span}: the rows do not give the chain that the manifest records. Restore the file from a copy.")
    if not intact:
        return fault(
            f"{span}: the rows are right but the file's bytes are not those that were sealed. Restore the file from a copy."
        )
    chain.steps.update(steps[starts].tolist())
    chain.rows += table.num_rows
    chain.segments += 1
    return None


def _verify_wal(
    state: JournalState, scan: WalScan, table: pa.Table, codec: TableCodec, chain: Chain, unchecked: list[str]
) -> Fault | None:
    where = f"rank {state.rank}: {scan.path}"
    fault = _wrong_rows(where, table, step_starts(table.column("step").to_numpy()), scan.identity.attempt, state.rank)
    last = state.manifest.last_attempt
    if last is not None and last.writer == WRITER:
        fault = fault or _wrong_bytes(where, state.rank, scan, codec)
    elif scan.batches:
        writer = last.writer if last else "?"
        unchecked.append(f"{where}: padding between values was not compared ({writer} wrote it, this is {WRITER})")
    for step, link in zip(scan.steps.tolist(), scan.links, strict=True):
        chain.batch(scan.identity.attempt, step, link)  # the scan has recomputed the links
    chain.steps.update(scan.steps.tolist())
    chain.rows += table.num_rows
    chain.live += scan.batches
    return fault


def _wrong_rows(where: str, table: pa.Table, starts: np.ndarray, attempt: int, rank: int) -> Fault | None:
    """Rows of another attempt or rank, or steps that do not increase."""
    steps = table.column("step").to_numpy()
    for name, expected in (("attempt", attempt), ("rank", rank)):
        values = table.column(name).to_numpy()
        if (values != expected).any():
            row = int(np.flatnonzero(values != expected)[0])
            return Fault(
                check="chain",
                rank=rank,
                step=int(steps[row]),
                message=f"{where}, row {row}: {name} is {values[row]}, expected {expected}",
            )
    order = steps[starts]
    if (np.diff(order) <= 0).any():
        at = int(np.flatnonzero(np.diff(order) <= 0)[0])
        return Fault(
            check="chain",
            rank=rank,
            step=int(order[at + 1]),
            message=f"{where}: step {order[at + 1]} follows step {order[at]}; the rows were reordered",
        )
    return None


def _wrong_bytes(where: str, rank: int, scan: WalScan, codec: TableCodec) -> Fault | None:
    """Any byte that is not what this encoder writes for these rows, padding included."""
    if not scan.good:
        return None
    schema = schema_message(scan.identity.schema(codec))
    if bytes(scan.data[: len(schema)]) != schema:
        return Fault(
            check="chain",
            rank=rank,
            message=f"{where}: bytes of the schema were changed. Restore the file from a copy.",
        )
    at = len(schema)
    with pa.ipc.open_stream(pa.py_buffer(scan.data[: scan.good])) as reader:
        for batch, step, link in zip(reader, scan.steps.tolist(), scan.links, strict=True):
            message = codec.message(codec.reencode(batch), link)
            if bytes(scan.data[at : at + len(message)]) != bytes(message):
                return Fault(
                    check="chain",
                    rank=rank,
                    step=step,
                    message=f"{where}, step {step}: the values are right but bytes between them were changed. Restore the file from "
                    "a copy.",
                )
            at += len(message)
    if at != scan.good:
        return Fault(check="chain", rank=rank, message=f"{where}: {scan.good} bytes, expected {at}")
    return None


def _verify_heads(
    path: Path,
    heads: Heads,
    chains: dict[tuple[str, int], Chain],
    unread: list[tuple[str, int]],
    report: Report,
    unchecked: list[str],
) -> bool:
    """Whether all heads of a checkpoint were found in the chains."""
    place = (heads.attempt, heads.step)
    found = True
    for rank, head in enumerate(heads.heads):
        journals = [(table, rank) for table in TABLES]
        if any(journal in unread or (journal in chains and place in chains[journal].lost) for journal in journals):
            unchecked.append(f"{path}: the head of rank {rank}, because the files before it are damaged")
            found = False
            continue
        message = None
        points = [chains[journal].points.get(place) if journal in chains else None for journal in journals]
        if journals[0] not in chains:
            message = f"{path} has a head of rank {rank}, of which the log has no files"
        elif any(point is None for point in points):
            message = f"{path}: rank {rank} has no attempt {heads.attempt}: its manifest was cut"
        elif rank_head(*[point for point in points if point is not None]) != head:
            message = (
                f"rank {rank}: what is recorded before step {heads.step} in attempt {heads.attempt} is not what the checkpoint "
                f"at that step was made with ({path}). Steps before it are missing or were replaced. Restore the log from a copy."
            )
        if message is not None:
            found = False
            report(Fault(check="heads", rank=rank, step=heads.step, message=message))
    return found


def _verify_buffers(root: Path, settings: LogSettings, kept: list[Heads], report: Report, unchecked: list[str]) -> None:
    for heads in kept:
        if heads.buffer_rows is None:
            continue
        if settings.embedding_dim is None:
            message = f"the heads of step {heads.step} speak of vectors, but run.json says that none are kept"
            report(Fault(check="vectors", step=heads.step, message=message))
            continue
        codec = buffer_codec(settings.embedding_dim, settings.embedding_dtype)
        try:
            read_buffer(root, codec, heads)
        except FileNotFoundError:
            unchecked.append(f"the vectors of step {heads.step} (attempt {heads.attempt}) are no longer there")
        except LogError as error:
            report(Fault(check="vectors", step=heads.step, message=str(error)))
    if kept or settings.embeddings == "full":
        unchecked.append(
            "the memory's own digests: their rule belongs to who pushed, the log records them as they came"
        )


def _verify_anchor(root: Path, anchor: tuple[int, bytes], kept: list[Heads], report: Report) -> None:
    step, expected = anchor
    found = [heads for heads in kept if heads.step == step]
    message = None
    if not found:
        message = f"{root} has no heads of step {step}, for which a Merkle root was kept: the log was cut"
    elif expected not in {heads.root for heads in found}:
        message = (
            f"{root}: the Merkle root at step {step} is {found[0].root.hex()}, but {expected.hex()} was kept outside: the log "
            "was rewritten, or it is another run's"
        )
    if message is not None:
        report(Fault(check="anchor", step=step, message=message))
