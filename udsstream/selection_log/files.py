"""The few operations on files that the log relies on: durable writes, atomic replacement, bounded reads.

Every failure to write is a LogWriteError that says what was being written, where, and what to do. Durability is what
fsync of the file system gives; a disk that acknowledges writes it has not made is beyond us.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from udsstream.errors import LogCorruptError, LogError, LogWriteError
from udsstream.plain_files import IrregularFileError, new_file, open_regular

__all__ = [
    "append_all",
    "make_dirs",
    "map_file",
    "read_small",
    "replace_file",
    "sync_dir",
    "write_error",
    "write_errors",
]

_REMEDY = {
    errno.ENOSPC: "Free space on this file system",
    errno.EDQUOT: "Raise the quota or free space",
    errno.EROFS: "The file system is read-only: remount it or choose another log directory",
    errno.EACCES: "Give this user permission to write there or choose another log directory",
    errno.EPERM: "Give this user permission to write there or choose another log directory",
    errno.EIO: "The disk reports an error: check it (dmesg) before going on",
}


def write_error(what: str, where: Path, error: OSError) -> LogWriteError:
    """The error that says what could not be written, where, and what to do."""
    remedy = _REMEDY.get(error.errno or 0, "Check the disk and the permissions")
    return LogWriteError(
        f"cannot {what}: {where}: {error.strerror or error}. {remedy}, then resume from the last checkpoint; "
        "nothing that was acknowledged before is lost."
    )


@contextmanager
def write_errors(what: str, where: Path) -> Iterator[None]:
    """Turn an OSError within the block into `write_error`."""
    try:
        yield
    except OSError as error:
        raise write_error(what, where, error) from error


def append_all(fd: int, data: bytes | memoryview) -> None:
    """One write; anything less than all of it is an error (a regular file takes all or is full)."""
    written = os.write(fd, data)
    if written != len(data):
        raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes were written")


def sync_dir(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dirs(path: Path) -> None:
    """Create a folder and its parents, each durably."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync_dir(folder.parent)


def replace_file(path: Path, data: bytes, temporary: Path | None = None) -> None:
    """Put `data` at `path` so that a crash leaves the old content or the new, never a mixture."""
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    fd = new_file(temporary)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(temporary, path)
    sync_dir(path.parent)


def _open_regular(path: Path) -> tuple[int, int]:
    """A read-only descriptor and the size. FileNotFoundError passes through."""
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise
    except IrregularFileError as error:
        raise LogCorruptError(f"{path} is not a regular file: this is no log that udsstream wrote") from error
    except OSError as error:
        raise LogError(f"cannot read {path}: {error.strerror or error}") from error


def read_small(path: Path, limit: int) -> bytes:
    """The whole of a file of at most `limit` bytes. FileNotFoundError passes through."""
    fd, size = _open_regular(path)
    try:
        if size > limit:
            raise LogCorruptError(
                f"{path} has {size} bytes; at most {limit} are expected there: it is damaged or forged"
            )
        parts = []
        while part := os.read(fd, 1 << 20):
            parts.append(part)
            if sum(map(len, parts)) > limit:
                raise LogCorruptError(f"{path} grew past {limit} bytes while it was read")
        return b"".join(parts)
    finally:
        os.close(fd)


def map_file(path: Path) -> memoryview:
    """The file's bytes at this moment, mapped and not copied. FileNotFoundError passes through."""
    fd, size = _open_regular(path)
    try:
        if size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ))
    except (OSError, ValueError, OverflowError) as error:
        raise LogError(f"cannot map {path} of {size} bytes: {error}") from error
    finally:
        os.close(fd)
