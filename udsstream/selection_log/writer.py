"""The writer of one rank: it takes decisions and pushes as they are made and turns them into a record that survives a kill.

    with SelectionLogWriter.create("runs/a", run={...}, embedding_dim=1024) as log:
        log.append(step, {"sample_id": ids, ...})       # one os.write; survives kill -9
        log.push(step, positions=..., ...)              # likewise
        head = log.sync()                               # survives a power cut; 32 bytes stand for all of it
        root = log.checkpoint(step + 1, heads=[head], ...)

Each rank has its own writer and files; there is no communication here, and none is needed but for the attempt's number on a
resume with several ranks. A write that fails leaves the writer refusing: training must not go on unrecorded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from udsstream.errors import ConfigError, LogCorruptError, LogError, LogExistsError, LogWriteError
from udsstream.selection_log import layout, recovery
from udsstream.selection_log.checkpoints import Heads, buffer_codec, write_buffer, write_heads
from udsstream.selection_log.digest import genesis, merkle_root, rank_head
from udsstream.selection_log.encoding import TableCodec
from udsstream.selection_log.files import make_dirs, replace_file, write_errors
from udsstream.selection_log.journal import Journal
from udsstream.selection_log.lock import RankLock
from udsstream.selection_log.manifest import ClosedLine, append_line, read_manifest
from udsstream.selection_log.run_file import LogSettings, RunFile, encode_run, read_run
from udsstream.selection_log.schema import PUSHES, SELECTION, TABLES, EmbeddingDtype, EmbeddingMode
from udsstream.selection_log.sealing import Pending, seal
from udsstream.selection_log.state import read_state

__all__ = ["SelectionLogWriter"]

WAL_BYTES = 64 << 20
_POLL = 0.02


class SelectionLogWriter:
    """Made by `create` or `resume`. Not safe for use from several threads; useless in a forked child."""

    def __init__(
        self,
        root: Path,
        run: RunFile,
        lock: RankLock,
        *,
        rank: int,
        world_size: int,
        attempt: int,
        from_step: int,
        starts: Mapping[str, tuple[int, bytes]],
        wal_bytes: int,
    ) -> None:
        self.root, self.rank, self.world_size, self.attempt = root, rank, world_size, attempt
        self._run, self._lock = run, lock
        self._failure: BaseException | None = None
        self._closed = False
        self._seals: list[Future[None]] = []
        self._thread: ThreadPoolExecutor | None = None

        def journal(table: str, first_step: int) -> Journal:
            segment, head = starts[table]
            return Journal(
                root,
                run.settings.codec(table),
                rank=rank,
                attempt=attempt,
                segment=segment,
                head=head,
                run_sha256=run.sha256,
                first_step=first_step,
                wal_bytes=wal_bytes,
                hand_over=self._hand_over,
            )

        self._selection = journal(SELECTION, from_step)
        try:
            # A memory taken over from another run is pushed before the first step, as step -1.
            self._pushes = journal(PUSHES, from_step if from_step else -1)
        except BaseException:
            self._selection.release()
            raise

    # -- opening -------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        root: str | os.PathLike[str],
        *,
        run: Mapping[str, Any],
        rank: int = 0,
        world_size: int = 1,
        embeddings: EmbeddingMode = "tail",
        embedding_dim: int | None = None,
        embedding_dtype: EmbeddingDtype = "float32",
        buffer_capacity: int | None = None,
        measures: Sequence[str] = (),
        interactions: int | None = None,
        wal_bytes: int = WAL_BYTES,
        wait_seconds: float = 60.0,
    ) -> SelectionLogWriter:
        """Begin a log in a folder that holds none. Rank 0 writes run.json; the others wait for it.

        `buffer_capacity` is the number of embeddings that the memory holds; without it `buffer_at` must be told under "full".
        `measures`: columns that the decisions have beside those of version 1 (`schema.MEASURES`); `interactions`: numbers of `interaction`.
        `wal_bytes`: size at which a write-ahead file is sealed in the background.
        """
        path = Path(root)
        _check_rank(rank, world_size)
        settings = LogSettings(
            embeddings=embeddings,
            embedding_dim=embedding_dim,
            embedding_dtype=embedding_dtype,
            buffer_capacity=buffer_capacity,
            world_size=world_size,
            measures=tuple(measures),
            interactions=interactions,
        )
        data = encode_run(run, settings)
        _refuse_existing(path, rank)
        lock = RankLock(layout.lock_path(path, rank))
        try:
            _refuse_existing(path, rank)
            if rank == 0:
                with write_errors("write run.json", layout.run_path(path)):
                    replace_file(layout.run_path(path), data, path / "_state" / "run.json.tmp")
                found = read_run(path)
            else:
                found = _wait_for_run(path, run, settings, wait_seconds)
            starts = {table: (0, genesis(table, rank, found.sha256)) for table in TABLES}
            return cls._begin(
                path, found, lock, rank, world_size, starts, attempt=0, from_step=0, parent=None, wal_bytes=wal_bytes
            )
        except BaseException:
            lock.release()
            raise

    @classmethod
    def resume(
        cls,
        root: str | os.PathLike[str],
        *,
        step: int,
        head: bytes | None,
        rank: int = 0,
        world_size: int = 1,
        attempt: int | None = None,
        wal_bytes: int = WAL_BYTES,
    ) -> SelectionLogWriter:
        """Take a log up again at `step` as the next attempt; what was written from `step` on is superseded, not deleted.

        `head` is what `sync` returned on this rank at the checkpoint. None is right for a run that begins again from step 0,
        and for a rank above 0 that had no part in the checkpoint (more ranks than before).
        `attempt`: rank 0 finds the next number; with several ranks, give the others rank 0's `writer.attempt`, because
        ranks that each looked for themselves could find different ones.
        """
        path = Path(root)
        _check_rank(rank, world_size)
        if step < 0:
            raise ConfigError(f"cannot resume at step {step}")
        if head is not None and len(head) != 32:
            raise ConfigError(f"a head has 32 bytes, this one {len(head)}")
        if rank > 0 and attempt is None:
            raise ConfigError(
                f"rank {rank} must be told the attempt: resume rank 0 first and broadcast its writer.attempt"
            )
        if head is None and step > 0 and rank == 0:
            raise LogCorruptError(
                f"the checkpoint is at step {step} but brings no head of {path}: it was made without this log. Give the log "
                "directory that belongs to the checkpoint, or a new one."
            )
        run = read_run(path)
        lock = RankLock(layout.lock_path(path, rank))
        try:
            codecs = [run.settings.codec(table) for table in TABLES]
            states = [read_state(path, rank, codec, run.sha256, live=False) for codec in codecs]
            recovery.check_segments(path, states)
            parent = None
            if head is not None:
                parent = recovery.find_place(path, states, codecs, run.sha256, step=step, head=head).parent
            if attempt is None:
                attempt = 1 + _last_attempt(path, run)
            if any(line.attempt >= attempt for state in states for line in state.manifest.attempts):
                raise LogError(
                    f"rank {rank} of {path} is past attempt {attempt} already: the ranks were resumed with different numbers"
                )
            starts = {}
            with write_errors("put the log in order", layout.rank_dir(path, rank)):
                for state, codec in zip(states, codecs, strict=True):
                    make_dirs(layout.journal_dir(path, state.table, rank))
                    recovery.put_in_order(path, state, codec)
                    manifest = read_manifest(path, state.table, rank, run.sha256)
                    starts[state.table] = (manifest.next_segment, manifest.head)
            return cls._begin(
                path,
                run,
                lock,
                rank,
                world_size,
                starts,
                attempt=attempt,
                from_step=step,
                parent=parent,
                wal_bytes=wal_bytes,
            )
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _begin(
        cls,
        root: Path,
        run: RunFile,
        lock: RankLock,
        rank: int,
        world_size: int,
        starts: Mapping[str, tuple[int, bytes]],
        *,
        attempt: int,
        from_step: int,
        parent: int | None,
        wal_bytes: int,
    ) -> SelectionLogWriter:
        begun = {}
        with write_errors(f"begin attempt {attempt}", layout.rank_dir(root, rank)):
            for table, (segment, head) in starts.items():
                make_dirs(layout.journal_dir(root, table, rank))
                link = recovery.begin_attempt(
                    root, table, rank, head=head, attempt=attempt, from_step=from_step, parent=parent
                )
                begun[table] = (segment, link)
        return cls(
            root,
            run,
            lock,
            rank=rank,
            world_size=world_size,
            attempt=attempt,
            from_step=from_step,
            starts=begun,
            wal_bytes=wal_bytes,
        )

    # -- writing -------------------------------------------------------------------------------------------------

    def append(self, step: int, columns: Mapping[str, np.ndarray]) -> None:
        """Record a step's candidates of this rank: all columns of the decisions but attempt, step and rank.

        A nullable column may be left out (null throughout) or be a masked array; a NaN is a value, not a null.
        """
        rows = len(columns["sample_id"]) if "sample_id" in columns else 0
        self._write(lambda: self._selection.append(step, columns, rows))

    def push(
        self,
        step: int,
        *,
        positions: np.ndarray,
        sample_ids: np.ndarray,
        push_index: int | np.ndarray,
        embeddings: np.ndarray | None,
        digest: bytes,
    ) -> None:
        """Record the embeddings that this rank contributed to the memory at `step`, and the memory's digest after the step.

        `push_index`: of each, or of the first when they follow each other. The vectors are stored under "full" alone. A rank
        that contributed none records nothing: the digest is in the rows of those that did.
        """
        rows = len(positions)
        if len(digest) != 32:
            raise ConfigError(f"the memory's digest has 32 bytes, this one {len(digest)}")
        index = np.asarray(push_index, dtype=np.int64)
        if index.ndim == 0:
            index = np.arange(index, index + rows)
        columns: dict[str, Any] = {
            "position": np.asarray(positions),
            "sample_id": np.asarray(sample_ids),
            "push_index": index,
            "digest": [digest] * rows,
        }
        if self._run.settings.embeddings == "full":
            if embeddings is None:
                raise ConfigError('embeddings="full" needs the vectors of every push')
            columns["embedding"] = np.asarray(embeddings)
        self._write(lambda: self._pushes.append(step, columns, rows))

    def sync(self) -> bytes:
        """Make all that was handed over durable; the rank's head."""
        self._write(self._selection.sync)
        self._write(self._pushes.sync)
        return self.head

    @property
    def interactions(self) -> int | None:
        """Numbers of the column `interaction`; None: the log has none."""
        return self._run.settings.interactions

    @property
    def head(self) -> bytes:
        """The 32 bytes that stand for all that this rank has written, durable or not."""
        return rank_head(self._selection.head, self._pushes.head)

    def checkpoint(
        self,
        step: int,
        *,
        heads: Sequence[bytes],
        buffer: np.ndarray | None = None,
        pushed: int = 0,
        buffer_digest: bytes = b"",
    ) -> bytes:
        """Keep the ranks' heads (what `sync` gave on each, by rank) for the checkpoint before `step`; their Merkle root.

        `buffer`: the memory's vectors, oldest first, kept in mode "tail". Call it on every rank; rank 0 writes.
        """
        if len(heads) != self.world_size or any(len(head) != 32 for head in heads):
            raise ConfigError(f"a checkpoint needs a head of 32 bytes from each of the {self.world_size} ranks")
        if bytes(heads[self.rank]) != self.head:
            raise LogError(
                f"rank {self.rank} has logged since the heads for the checkpoint at step {step} were taken: call sync() and "
                "gather the heads right before"
            )
        for journal in (self._selection, self._pushes):
            if journal.next_step > step:
                raise LogError(
                    f"the checkpoint is at step {step}, but step {journal.next_step - 1} is already logged in "
                    f"{journal.codec.table!r}: a run resumed from it could not be told from one that changed its past"
                )
        root = merkle_root([bytes(head) for head in heads])
        if self.rank == 0:
            self._write(lambda: self._keep(step, tuple(map(bytes, heads)), root, buffer, pushed, buffer_digest))
        return root

    def _keep(
        self, step: int, heads: tuple[bytes, ...], root: bytes, buffer: np.ndarray | None, pushed: int, digest: bytes
    ) -> None:
        settings = self._run.settings
        rows = sha256 = None
        with write_errors(f"keep the heads of the checkpoint at step {step}", layout.heads_path(self.root, step)):
            if settings.embeddings == "tail" and buffer is not None:
                assert settings.embedding_dim is not None
                if len(buffer) > pushed:
                    raise ConfigError(f"the memory has {len(buffer)} vectors, but only {pushed} were pushed")
                codec = buffer_codec(settings.embedding_dim, settings.embedding_dtype)
                sha256 = write_buffer(self.root, codec, step=step, attempt=self.attempt, buffer=buffer, pushed=pushed)
                rows = len(buffer)
            kept = Heads(
                step=step,
                attempt=self.attempt,
                heads=heads,
                root=root,
                pushed=pushed,
                buffer_digest=digest,
                buffer_rows=rows,
                buffer_sha256=sha256,
            )
            write_heads(self.root, kept)

    # -- sealing -------------------------------------------------------------------------------------------------

    def seal(self, *, wait: bool = True) -> None:
        """Seal what has been written so far, and wait for it. Without `wait` it is done behind the next rows; see `sealing`."""
        self._write(self._selection.rotate)
        self._write(self._pushes.rotate)
        if wait:
            self._wait()

    @property
    def sealing(self) -> bool:
        """Whether a segment is being sealed."""
        return not all(future.done() for future in self._seals)

    def _hand_over(self, pending: Pending, codec: TableCodec) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="selection-log-seal")
        try:
            self._seals.append(self._thread.submit(self._seal, pending, codec))
        except RuntimeError:  # the interpreter is ending, and no thread takes work any more
            self._seal(pending, codec)

    def _seal(self, pending: Pending, codec: TableCodec) -> None:
        # Segments follow each other in the manifest: after one that failed, none may be sealed.
        if self._failure is not None:
            return
        try:
            seal(self.root, pending, codec)
        except BaseException as error:
            self._failure = error
            raise

    def _wait(self) -> None:
        for future in self._seals:
            future.exception()
        self._seals.clear()
        self._check()

    def close(self) -> None:
        """Seal everything, state in the manifests that the log ends here in order, and give the lock back."""
        if self._closed:
            return
        try:
            self._check()
            self._write(self._selection.sync)
            self._write(self._pushes.sync)
            self._write(self._selection.finish)
            self._write(self._pushes.finish)
            self._wait()
            for journal in (self._selection, self._pushes):
                table = journal.codec.table
                with write_errors("close the log", layout.manifest_path(self.root, table, self.rank)):
                    append_line(self.root, table, self.rank, ClosedLine(attempt=self.attempt, head=journal.head.hex()))
        finally:
            self.release()

    def release(self) -> None:
        """Give the lock back without a claim that the log is complete; what was appended stays."""
        if self._closed:
            return
        self._closed = True
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self._selection.release()
        self._pushes.release()
        self._lock.release()

    def __enter__(self) -> SelectionLogWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.release()

    # -- refusing ------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._failure is not None:
            raise LogWriteError(
                f"the selection log {self.root} takes no more rows since a write failed: {self._failure} "
                "Training must not go on unrecorded; resume from the last checkpoint once the cause is gone."
            ) from self._failure
        if self._closed:
            raise LogWriteError(f"the selection log {self.root} is closed")
        if self._lock.pid != os.getpid():
            raise LogWriteError(
                f"the writer of {self.root} belongs to process {self._lock.pid}, not to its child {os.getpid()}"
            )

    def _write(self, operation: Callable[[], None]) -> None:
        self._check()
        try:
            operation()
        except (LogWriteError, OSError, MemoryError) as error:
            self._failure = error
            raise


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size <= 1 << 16:
        raise ConfigError(f"rank {rank} of world size {world_size}")


def _refuse_existing(root: Path, rank: int) -> None:
    """LogExistsError when something that a new log would write is there; a creation that was cut short leaves nothing such."""
    if root.exists() and not root.is_dir():
        raise LogExistsError(f"{root} is a file, not a folder for a selection log")
    if rank == 0:
        names = [root / name for name in layout.OUR_NAMES]
        harmless = {layout.lock_path(root, 0), root / "_state" / "run.json.tmp"}
    else:
        names = [layout.rank_dir(root, rank), *(layout.segment_path(root, t, rank, 0, 0).parent for t in TABLES)]
        harmless = {layout.lock_path(root, rank)}
    for name in names:
        found = [name] if name.is_file() else [p for p in name.rglob("*") if not p.is_dir()] if name.is_dir() else []
        # Other ranks may have taken their locks already; a lock alone is no log.
        found = [p for p in found if p not in harmless and not (p.name == "lock" and p.parent.parent.name == "_state")]
        if found:
            raise LogExistsError(
                f"{root} already holds {found[0].relative_to(root)}: give a new run another log directory, or resume "
                "the run that is there"
            )


def _wait_for_run(root: Path, run: Mapping[str, Any], settings: LogSettings, seconds: float) -> RunFile:
    end = time.monotonic() + seconds
    while not layout.run_path(root).exists():
        if time.monotonic() > end:
            raise LogError(f"rank 0 did not write {layout.run_path(root)} within {seconds:g} s: has it failed?")
        time.sleep(_POLL)
    found = read_run(root)
    if found.settings != settings or found.run.get("run_id") != run.get("run_id"):
        raise LogExistsError(
            f"{layout.run_path(root)} describes another run or other log settings than this rank was given: the ranks differ, "
            "or the folder holds an older log"
        )
    return found


def _last_attempt(root: Path, run: RunFile) -> int:
    """The highest attempt that any rank knows; -1 when there is none."""
    attempts = [
        line.attempt
        for rank in layout.ranks(root)
        for table in TABLES
        for line in read_manifest(root, table, rank, run.sha256).attempts
    ]
    return max(attempts, default=-1)
