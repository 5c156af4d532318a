"""Opening files in a folder that somebody may have sent: no pipe is waited for, and no link is written through."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["IrregularFileError", "OversizedFileError", "new_file", "open_regular", "pieces"]

_PIECE = 1 << 20


class IrregularFileError(OSError):
    """A pipe, device or folder stands where a file was expected."""


class OversizedFileError(OSError):
    """A file is larger than any that belongs in its place."""


def open_regular(path: Path) -> tuple[int, int]:
    """A read-only descriptor and the size in bytes.

    Raises:
        IrregularFileError: it is a pipe or device, on which a read could wait for ever, or a folder.
        OSError: it cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        raise IrregularFileError("it is not a regular file")
    return fd, info.st_size


def pieces(path: Path, limit: int | None) -> Iterator[bytes]:
    """The bytes of a regular file, a piece at a time.

    Args:
        limit: bytes that it may have; None: any number.

    Raises:
        IrregularFileError, OSError: as `open_regular`.
        OversizedFileError: it has more than `limit` bytes, or got them while it was read.
    """
    fd, size = open_regular(path)
    try:
        done = 0
        while limit is None or max(size, done) <= limit:
            if not (piece := os.read(fd, _PIECE)):
                return
            done += len(piece)
            yield piece
        raise OversizedFileError(
            f"it has {max(size, done)} bytes, more than the {limit} of any file that belongs there"
        )
    finally:
        os.close(fd)


def new_file(path: Path) -> int:
    """A descriptor of a file that was not there: what stands at `path` is taken away, and a link there is not followed.

    For temporary files of known names: a link there could name any file of the reader's.
    """
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
