"""One writer per rank: an flock on a file in the rank's folder, held for the writer's life.

The kernel releases it when the process ends, however it ends. It does not guard against writers on other machines when the
file system does not carry flock across them (some NFS mounts do not).
"""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path

from udsstream.errors import LogLockedError
from udsstream.selection_log.files import make_dirs, write_errors

__all__ = ["RankLock"]


class RankLock:
    """Taken on construction; `release()` gives it back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with write_errors("lock the selection log", path):
            make_dirs(path.parent)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 64, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise LogLockedError(
                f"{path.parent.parent.parent} is being written by process {holder} (lock {path}). "
                "Two writers would destroy the record: stop that process, or give this run another log directory."
            ) from error
        self._fd: int | None = fd
        self.pid = os.getpid()
        with write_errors("write the lock's holder", path):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{self.pid}\n".encode(), 0)
        _held.add(self)

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    @property
    def held(self) -> bool:
        return self._fd is not None


_held: weakref.WeakSet[RankLock] = weakref.WeakSet()


def _close_in_child() -> None:
    # A forked data-loader worker shares the open file and so the lock: one that outlives a killed trainer would
    # keep the resumed run out.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_close_in_child)
