"""One table of one rank while it is being written: the live write-ahead file, the chain, and the hand-over to sealing.

It owns the file descriptor. It does not hold the lock, choose the attempt or recover: the writer and `recovery` do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from udsstream.errors import LogError
from udsstream.selection_log import layout
from udsstream.selection_log.digest import batch_link
from udsstream.selection_log.encoding import TableCodec, schema_message
from udsstream.selection_log.files import append_all, sync_dir, write_error, write_errors
from udsstream.selection_log.sealing import MARK_BYTES, Pending
from udsstream.selection_log.wal import FileIdentity

__all__ = ["Journal"]


class Journal:
    """Appends batches to a table's write-ahead file; one `os.write` each."""

    def __init__(
        self,
        root: Path,
        codec: TableCodec,
        *,
        rank: int,
        attempt: int,
        segment: int,
        head: bytes,
        run_sha256: bytes,
        first_step: int,
        wal_bytes: int,
        hand_over: Callable[[Pending, TableCodec], None],
    ) -> None:
        self.codec = codec
        self.head = head
        self._root, self._rank, self._attempt = root, rank, attempt
        self._run_sha256, self._wal_bytes, self._hand_over = run_sha256, wal_bytes, hand_over
        self._segment = segment
        self.next_step = first_step
        self._dirty = False
        self._fd: int | None = None
        self._open()

    def _open(self) -> None:
        self._identity = FileIdentity(
            table=self.codec.table,
            rank=self._rank,
            attempt=self._attempt,
            segment=self._segment,
            prev=self.head,
            run_sha256=self._run_sha256,
        )
        self.path = layout.wal_path(self._root, self.codec.table, self._rank, self._segment)
        self._rows = self._batches = 0
        self._first_step = self._last_step = 0
        self._marks = bytearray()
        start = schema_message(self._identity.schema(self.codec))
        with write_errors("start a write-ahead file", self.path):
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
            append_all(self._fd, start)
            os.fsync(self._fd)
            sync_dir(self.path.parent)
        self._size = len(start)

    def append(self, step: int, columns: Mapping[str, Any], rows: int) -> None:
        """Write one batch; it survives the process from here on, and the machine from the next `sync` on."""
        if step < self.next_step:
            raise LogError(
                f"step {step} cannot be logged in {self.codec.table!r}: the next step is {self.next_step} at least "
                f"(attempt {self._attempt}). Each step is written once, in order."
            )
        if rows == 0:
            return
        if self._size >= self._wal_bytes:
            self.rotate()
        assert self._fd is not None
        batch, content = self.codec.encode(
            {**columns, "attempt": self._attempt, "step": step, "rank": self._rank}, rows
        )
        link = batch_link(self.head, content)
        message = self.codec.message(batch, link)
        try:
            append_all(self._fd, message)
        except OSError as error:
            raise write_error(f"record step {step}", self.path, error) from error
        self.head = link
        self._dirty = True
        self._size += len(message)
        self._rows += rows
        if not self._batches:
            self._first_step = step
        self._batches += 1
        self._last_step = step
        self.next_step = step + 1
        self._marks += link[:MARK_BYTES]

    def sync(self) -> None:
        """Make every batch durable."""
        if self._dirty and self._fd is not None:
            with write_errors("make the log durable", self.path):
                os.fdatasync(self._fd)
            self._dirty = False

    def rotate(self) -> None:
        """Begin a new write-ahead file and hand the old one to be sealed. Nothing happens while it has no batch."""
        if self._batches:
            pending = self._finish()
            self._segment += 1
            self._open()
            self._hand_over(pending, self.codec)

    def finish(self) -> None:
        """Hand over the last write-ahead file, or remove it when it has no batch; no append may follow."""
        if self._batches:
            self._hand_over(self._finish(), self.codec)
        else:
            self.release()
            with write_errors("remove an empty write-ahead file", self.path):
                self.path.unlink()
                sync_dir(self.path.parent)

    def _finish(self) -> Pending:
        # Durable before a later file may hold a batch: a hole in the middle could not be told from damage.
        self.sync()
        self.release()
        return Pending(
            identity=self._identity,
            head=self.head,
            rows=self._rows,
            batches=self._batches,
            first_step=self._first_step,
            last_step=self._last_step,
            good=self._size,
            marks=bytes(self._marks),
        )

    def release(self) -> None:
        """Close the file without a claim about it."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
