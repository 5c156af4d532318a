"""Whether a log is what its writers wrote: every digest recomputed from the rows, every link of every chain followed.

It proves that the rows, the manifests, run.json and the heads agree with each other, and with an anchor when one is given.
It does not prove that the rows are true, and without an anchor not that the folder was not rewritten as a whole or cut.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from udsstream.errors import LogCorruptError
from udsstream.selection_log import layout
from udsstream.selection_log.checkpoints import Heads, buffer_codec, heads_files, read_buffer, read_heads
from udsstream.selection_log.digest import batch_link, genesis, rank_head
from udsstream.selection_log.encoding import TableCodec, schema_message
from udsstream.selection_log.manifest import AttemptLine, SegmentLine
from udsstream.selection_log.recovery import WRITER, step_starts
from udsstream.selection_log.run_file import RunFile, read_run
from udsstream.selection_log.schema import PUSHES, SELECTION, TABLES
from udsstream.selection_log.sealing import MARK_BYTES, open_segment
from udsstream.selection_log.state import JournalState, lineage, read_state
from udsstream.selection_log.wal import WalScan

__all__ = ["VerifyReport", "verify"]

_SETTLE_SECONDS = 0.5


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
    closed: bool  # every rank's log was closed in order
    anchored: bool  # the head given from outside was found
    unchecked: tuple[str, ...]  # what could not be checked, and why


@dataclass
class _Chain:
    """A journal's chain as it is recomputed: where it stood in each attempt before each step that some heads file names."""

    head: bytes
    wanted: list[tuple[int, int]]  # the (attempt, step) that heads files name, descending
    points: dict[tuple[int, int], bytes] = field(
        default_factory=dict
    )  # (attempt, step) -> the chain just before that step
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

    def finish(self) -> None:
        self._note((1 << 15, 0))


def verify(root: Path, *, anchor: tuple[int, bytes] | None = None) -> VerifyReport:
    """Check everything under `root`; LogCorruptError at the first thing that does not hold."""
    run = read_run(root)
    unchecked: list[str] = []
    kept = [(path, read_heads(path)) for path in heads_files(root)]
    wanted = sorted({(heads.attempt, heads.step) for _, heads in kept})
    ranks = layout.ranks(root)
    if missing := sorted(set(range(run.settings.world_size)) - set(ranks)):
        raise LogCorruptError(
            f"rank {missing[0]} of {root}: there is no {layout.rank_dir(root, missing[0])}, but the run began with "
            f"{run.settings.world_size} ranks. Restore it from a copy."
        )
    _check_no_strangers(root, ranks)
    chains: dict[tuple[str, int], _Chain] = {}
    states: list[JournalState] = []
    for rank in ranks:
        for table in TABLES:
            codec = run.settings.codec(table)
            state = _settled(root, rank, codec, run.sha256)
            states.append(state)
            chains[table, rank] = _verify_journal(root, state, codec, run, wanted, unchecked)
            unchecked += [f"{path} was set aside by a recovery" for path in layout.torn_files(root, table, rank)]
    attempts = [line for state in states for line in state.manifest.attempts]
    lineage(attempts)  # raises when the ranks disagree
    checked = sum(_verify_heads(path, heads, chains, unchecked) for path, heads in kept)
    _verify_buffers(root, run, [heads for _, heads in kept], unchecked)
    if anchor is not None:
        _verify_anchor(root, anchor, [heads for _, heads in kept])
    else:
        unchecked.append("no head from outside was given: a folder cut at its end or rewritten as a whole would pass")
    selection = [chain for (table, _), chain in chains.items() if table == SELECTION]
    return VerifyReport(
        ranks=len(ranks),
        attempts=len({line.attempt for line in attempts}),
        steps=len(set().union(*(chain.steps for chain in selection))) if selection else 0,
        rows=sum(chain.rows for chain in selection),
        pushes=sum(chain.rows for (table, _), chain in chains.items() if table == PUSHES),
        segments=sum(chain.segments for chain in chains.values()),
        live_batches=sum(chain.live for chain in chains.values()),
        heads=checked,
        closed=bool(states) and all(state.manifest.closed for state in states),
        anchored=anchor is not None,
        unchecked=tuple(unchecked),
    )


def _check_no_strangers(root: Path, ranks: list[int]) -> None:
    """Segments of a rank without a folder in _state would be seen by other tools, but by no chain."""
    for table in TABLES:
        folder = root / table
        known = {layout.segment_path(root, table, rank, 0, 0).parent.name for rank in ranks}
        for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
            if entry.name not in known:
                raise LogCorruptError(f"{entry} belongs to no rank of this log: it was put there, or _state/ was cut")


def _settled(root: Path, rank: int, codec: TableCodec, run_sha256: bytes) -> JournalState:
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
    if state.damaged:
        raise LogCorruptError(
            f"rank {rank}: {state.wrong}{step}. Rows after it are intact, so this is damage and not a torn end. Restore the "
            "file from a copy."
        )
    raise LogCorruptError(
        f"rank {rank}: {state.wrong}{step}. Either a crash tore what was never acknowledged, and resuming the run puts it in "
        "order, or the end was damaged afterwards."
    )


def _verify_journal(
    root: Path,
    state: JournalState,
    codec: TableCodec,
    run: RunFile,
    wanted: list[tuple[int, int]],
    unchecked: list[str],
) -> _Chain:
    chain = _Chain(genesis(state.table, state.rank, run.sha256), wanted[::-1])
    for line in state.manifest.lines:
        if isinstance(line, AttemptLine):
            chain.attempt(line.attempt, bytes.fromhex(line.head))  # recomputed when the manifest was read
        elif isinstance(line, SegmentLine):
            _verify_segment(root, state, line, codec, run.sha256, chain)
    for scan in state.wals:
        _verify_wal(state, scan, codec, chain, unchecked)
    chain.finish()
    return chain


def _verify_segment(
    root: Path,
    state: JournalState,
    line: SegmentLine,
    codec: TableCodec,
    run_sha256: bytes,
    chain: _Chain,
) -> None:
    segment = open_segment(root, line, state.rank, codec, run_sha256)
    intact = hashlib.sha256(segment.data).hexdigest() == line.sha256
    table = segment.table(codec)
    where = f"rank {state.rank}: {segment.path}"
    steps = table.column("step").to_numpy()
    starts = step_starts(steps)
    _check_rows(where, table, steps[starts], line.attempt, state.rank)
    links = len(segment.marks) // MARK_BYTES
    if len(segment.marks) != links * MARK_BYTES or links != line.batches or len(starts) != line.batches:
        raise LogCorruptError(
            f"{where}: {len(starts)} steps (marks of {links}), expected {line.batches}: steps were dropped or added between "
            f"step {line.first_step} and step {line.last_step}. Restore the file from a copy."
        )
    for i, digest in enumerate(codec.batch_digests(table, starts.tolist())):
        step = int(steps[starts[i]])
        link = batch_link(chain.head, digest)
        if link[:MARK_BYTES] != segment.marks[i * MARK_BYTES : (i + 1) * MARK_BYTES]:
            raise LogCorruptError(
                f"{where}, step {step}: the rows do not give the digest that was written with them. A row of this step was "
                "changed, dropped or reordered. Restore the file from a copy."
            )
        chain.batch(line.attempt, step, link)
    if chain.head.hex() != line.head or (int(steps[0]), int(steps[-1])) != (line.first_step, line.last_step):
        raise LogCorruptError(
            f"{where}, steps {line.first_step} to {line.last_step}: the rows do not give the chain that the manifest records. "
            "Restore the file from a copy."
        )
    if not intact:
        raise LogCorruptError(
            f"{where}, steps {line.first_step} to {line.last_step}: the rows are right but the file's bytes are not those that "
            "were sealed. Restore the file from a copy."
        )
    chain.steps.update(steps[starts].tolist())
    chain.rows += table.num_rows
    chain.segments += 1


def _verify_wal(
    state: JournalState,
    scan: WalScan,
    codec: TableCodec,
    chain: _Chain,
    unchecked: list[str],
) -> None:
    where = f"rank {state.rank}: {scan.path}"
    table = scan.table(codec)
    _check_rows(where, table, scan.steps, scan.identity.attempt, state.rank)
    last = state.manifest.last_attempt
    if last is not None and last.writer == WRITER:
        _check_bytes(where, scan, codec)
    elif scan.batches:
        writer = last.writer if last else "?"
        unchecked.append(f"{where}: padding between values was not compared ({writer} wrote it, this is {WRITER})")
    for step, link in zip(scan.steps.tolist(), scan.links, strict=True):
        chain.batch(scan.identity.attempt, step, link)  # the scan has recomputed the links
    chain.steps.update(scan.steps.tolist())
    chain.rows += table.num_rows
    chain.live += scan.batches


def _check_rows(where: str, table: pa.Table, steps: np.ndarray, attempt: int, rank: int) -> None:
    for name, expected in (("attempt", attempt), ("rank", rank)):
        values = table.column(name).to_numpy()
        if (values != expected).any():
            row = int(np.flatnonzero(values != expected)[0])
            raise LogCorruptError(f"{where}, row {row}: {name} is {values[row]}, expected {expected}")
    if (np.diff(steps) <= 0).any():
        at = int(np.flatnonzero(np.diff(steps) <= 0)[0])
        raise LogCorruptError(f"{where}: step {steps[at + 1]} follows step {steps[at]}; the rows were reordered")


def _check_bytes(where: str, scan: WalScan, codec: TableCodec) -> None:
    """Every byte is what this encoder writes for these rows, padding included."""
    if not scan.good:
        return
    schema = schema_message(scan.identity.schema(codec))
    if bytes(scan.data[: len(schema)]) != schema:
        raise LogCorruptError(f"{where}: bytes of the schema were changed. Restore the file from a copy.")
    at = len(schema)
    with pa.ipc.open_stream(pa.py_buffer(scan.data[: scan.good])) as reader:
        for batch, step, link in zip(reader, scan.steps.tolist(), scan.links, strict=True):
            message = codec.message(codec.reencode(batch), link)
            if bytes(scan.data[at : at + len(message)]) != bytes(message):
                raise LogCorruptError(
                    f"{where}, step {step}: the values are right but bytes between them were changed. Restore the file from "
                    "a copy."
                )
            at += len(message)
    if at != scan.good:
        raise LogCorruptError(f"{where}: {scan.good} bytes, expected {at}")


def _verify_heads(path: Path, heads: Heads, chains: dict[tuple[str, int], _Chain], unchecked: list[str]) -> bool:
    """Whether all heads of a checkpoint were found in the chains."""
    for rank, head in enumerate(heads.heads):
        if (SELECTION, rank) not in chains:
            raise LogCorruptError(f"{path} has a head of rank {rank}, of which the log has no files")
        points = [chains[table, rank].points.get((heads.attempt, heads.step)) for table in TABLES]
        if any(point is None for point in points):
            raise LogCorruptError(f"{path}: rank {rank} has no attempt {heads.attempt}: its manifest was cut")
        if rank_head(*[point for point in points if point is not None]) != head:
            raise LogCorruptError(
                f"rank {rank}: what is recorded before step {heads.step} in attempt {heads.attempt} is not what the checkpoint "
                f"at that step was made with ({path}). Steps before it are missing or were replaced. Restore the log from a copy."
            )
    return True


def _verify_buffers(root: Path, run: RunFile, kept: list[Heads], unchecked: list[str]) -> None:
    settings = run.settings
    for heads in kept:
        if heads.buffer_rows is None:
            continue
        if settings.embedding_dim is None:
            raise LogCorruptError(
                f"the heads of step {heads.step} speak of vectors, but run.json says that none are kept"
            )
        codec = buffer_codec(settings.embedding_dim, settings.embedding_dtype)
        try:
            read_buffer(root, codec, heads)
        except FileNotFoundError:
            unchecked.append(f"the vectors of step {heads.step} (attempt {heads.attempt}) are no longer there")
    if kept or settings.embeddings == "full":
        unchecked.append(
            "the memory's own digests: their rule belongs to who pushed, the log records them as they came"
        )


def _verify_anchor(root: Path, anchor: tuple[int, bytes], kept: list[Heads]) -> None:
    step, expected = anchor
    found = [heads for heads in kept if heads.step == step]
    if not found:
        raise LogCorruptError(f"{root} has no heads of step {step}, for which a Merkle root was kept: the log was cut")
    if expected not in {heads.root for heads in found}:
        raise LogCorruptError(
            f"{root}: the Merkle root at step {step} is {found[0].root.hex()}, but {expected.hex()} was kept outside: the log "
            "was rewritten, or it is another run's"
        )
