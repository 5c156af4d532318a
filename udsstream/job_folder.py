"""The output folder of a job that may be killed at any moment: whose it is, what is unfinished, and how a result appears in it.

    DIR/
        _job/            while the job runs, and until its result is whole
            job.json         the settings; a job with others does not go on with this one
            lock             flocked by the process that works here
            publish.json     from the moment that the result is being moved out: what is moved, in which order
            …                the job's own state and unfinished files
        …                the result, moved here when all of it is finished

What is guaranteed, on a local file system:

- Only one process works in the folder, as far as flock reaches (some network file systems do not carry it between machines).
- Until `publish` nothing stands outside `_job/`. Each file is synced before it is moved, so that one outside is complete even after
  the machine lost power, if the disk keeps what it acknowledged.
- `publish` is not one atomic step for several files: a reader in that moment, or after a kill in it, can see some of them. The one that
  makes the result look whole comes last, and `_job/` is there until it has. The next `claim` with the same settings completes the moves.
- A folder that holds anything else is left as it was.

What the job's own state means, and whether it was written in an order that can be resumed, is the job's affair; `replace_file`
and `write_errors` help with it. Not for remote folders.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from udsstream.config import config_difference
from udsstream.errors import OutputExistsError, OutputWriteError

__all__ = ["WORK", "JobFolder", "replace_file", "sync_file", "write_errors"]

WORK = "_job"
"""The sub-folder with what is unfinished."""

_JOB, _LOCK, _PUBLISH = "job.json", "lock", "publish.json"
_REMEDY = {
    errno.ENOSPC: "free space on this file system",
    errno.EDQUOT: "raise the quota or free space",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or ask for smaller files",
    errno.EROFS: "the file system is read-only: remount it, or choose another output folder",
    errno.EACCES: "give this user permission to write there, or choose another output folder",
    errno.EPERM: "give this user permission to write there, or choose another output folder",
    errno.ENOTDIR: "a part of this path is a file: choose another output folder",
    errno.ENAMETOOLONG: "the name is too long for the file system: choose a shorter one",
    errno.EIO: "the disk reports an error: check it (dmesg)",
}
_NAMED = 5


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns an OSError within the block into an OutputWriteError with the path and what to do."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDY.get(error.errno or 0, "check the disk and the permissions")
        raise OutputWriteError(
            f"cannot write {error.filename or path}: {error.strerror or error}; {remedy}, and run the same command again: "
            "it goes on from what is finished"
        ) from error


def replace_file(path: Path, data: bytes) -> None:
    """Puts `data` at `path`, durably: a crash leaves the old content or the new, never a mixture."""
    temporary = path.with_name(f".{path.name}.tmp")
    with write_errors(path):
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_file(path.parent)


def sync_file(path: Path) -> None:
    """Makes the content of a file, or the names in a folder, durable."""
    with write_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class JobFolder:
    """A folder that this process holds, from `claim` to `close` or the process's end; a context manager."""

    path: Path
    """The output folder."""
    work: Path
    """`path/_job`: for the job's state and unfinished files. The names `job.json`, `lock` and `publish.json` are taken."""
    resumed: bool
    """Whether an unfinished job with the same settings was here before."""
    published: bool
    """Whether the result is in place: after `publish`, or because `claim` completed a publication that had been interrupted."""

    def __init__(self, path: Path, job: dict[str, Any], lock: int) -> None:
        self.path, self.work, self._job = path, path / WORK, job
        self.resumed = self.published = False
        self._lock: int | None = lock
        _held.add(self)

    @classmethod
    def claim(cls, path: str | os.PathLike[str], job: Mapping[str, Any]) -> JobFolder:
        """Makes the folder, or takes over the unfinished job in it.

        Args:
            path: the output folder; it and its parents are made.
            job: every setting that decides the result, as JSON can hold it. Settings that cannot change it (how many workers) stay out.

        Raises:
            OutputExistsError: the folder holds something else than this job, unfinished: a finished result, other files, a job with
                other settings, or one that another process works on.
            OutputWriteError: it cannot be written.
        """
        folder, settings = Path(path), json.loads(json.dumps(dict(job)))
        work = folder / WORK
        while True:
            with write_errors(folder):
                if not work.is_dir() and folder.exists() and (found := _others(folder)):
                    raise _not_empty(folder, found)
                work.mkdir(parents=True, exist_ok=True)
            if (lock := _take_lock(work / _LOCK, folder)) is not None:
                break
        claimed = cls(folder, settings, lock)
        try:
            claimed._take_over()
        except BaseException:
            claimed.close()
            raise
        return claimed

    def _take_over(self) -> None:
        with write_errors(self.work):
            recorded = _read(self.work / _PUBLISH) or _read(self.work / _JOB)
            publishing = (self.work / _PUBLISH).exists()
            others = _others(self.path)
        if recorded is None:
            if others:
                with contextlib.suppress(OSError):  # of a job that was killed in removing `_job`
                    (self.work / _LOCK).unlink()
                    self.work.rmdir()
                raise _not_empty(self.path, others)
            self._write(_JOB, {"job": self._job})
            sync_file(self.path)
            sync_file(self.path.absolute().parent)
            return
        if changes := config_difference(recorded["job"], self._job):
            raise OutputExistsError(
                f"{self.path} holds an unfinished job with other settings:\n  "
                + "\n  ".join(changes)
                + f"\ngo on with the old settings, choose another folder, or delete {self.work} to begin anew"
            )
        if others and not publishing:
            raise _not_empty(self.path, others)
        self.resumed = True
        if publishing:
            self._move(recorded["names"])

    def publish(self, names: Sequence[str], *, last: str) -> None:
        """Moves finished files and folders from `_job/` to the same names in the output folder, then removes `_job/`.

        Args:
            names: what belongs to the result beside `last`, as paths below `_job/`. A folder is moved whole.
            last: what makes the result look whole.

        Raises:
            OutputExistsError: such a name has appeared in the output folder in the meantime; nothing is overwritten.
            OutputWriteError: the disk does not take it; the next `claim` with the same settings goes on.
        """
        order = [*(name for name in names if name != last), last]
        for name in order:
            parts = PurePosixPath(name).parts
            assert parts, "a name is empty"
            assert {"..", "/"}.isdisjoint(parts), name
            assert parts[0] not in (WORK, _JOB, _LOCK, _PUBLISH), name
            _sync_all(self.work / name)
        self._write(_PUBLISH, {"job": self._job, "names": order})
        self._move(order)

    def _move(self, names: Sequence[str]) -> None:
        for name in names:
            source, target = self.work / name, self.path / name
            with write_errors(target):
                if not os.path.lexists(source):
                    continue  # moved before a kill
                if os.path.lexists(target):
                    raise OutputExistsError(
                        f"{target} is there already, and is not overwritten: move it away, then run the same command again"
                    )
                target.parent.mkdir(parents=True, exist_ok=True)
                if name == names[-1]:
                    for folder in {(self.path / other).parent for other in names}:
                        sync_file(folder)
                os.replace(source, target)
            sync_file(target.parent)
        self.published = True
        with write_errors(self.work):  # what tells an interrupted removal from an unfinished job goes last
            for entry in sorted(self.work.iterdir(), key=lambda entry: entry.name in (_PUBLISH, _LOCK)):
                if entry.name not in (_PUBLISH, _LOCK):
                    _remove(entry)
            (self.work / _PUBLISH).unlink()
            (self.work / _LOCK).unlink()
            self.work.rmdir()
        sync_file(self.path)
        self.close()

    def contents(self) -> list[str]:
        """The names of what the job itself has put into `_job/`, sorted."""
        with write_errors(self.work):
            return sorted({entry.name for entry in self.work.iterdir()} - {_JOB, _LOCK, _PUBLISH})

    def clear(self) -> None:
        """Removes what an interrupted job left in `_job/`: for a job that begins anew."""
        for name in self.contents():
            with write_errors(self.work / name):
                _remove(self.work / name)

    def discard(self) -> None:
        """Removes `_job/` with all that is in it, and the output folder when nothing is left: for a job that came to nothing."""
        with write_errors(self.work):
            shutil.rmtree(self.work)
            if not any(self.path.iterdir()):
                self.path.rmdir()
        self.close()

    def close(self) -> None:
        """Lets another process take the folder; what is unfinished stays."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _write(self, name: str, content: dict[str, Any]) -> None:
        replace_file(self.work / name, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())

    def __enter__(self) -> JobFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _take_lock(path: Path, folder: Path) -> int | None:
    """A locked descriptor; None when the file was removed while we waited for it, with its job finished."""
    try:
        with write_errors(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OutputWriteError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(fd)
        raise OutputExistsError(
            f"another process ({holder}) is at work in {folder}: wait for it, stop it, or choose another folder"
        ) from None
    except OSError as error:
        os.close(fd)
        raise OutputWriteError(
            f"cannot lock {path}: {error.strerror or error}; choose a folder on a local disk"
        ) from error
    try:
        current = os.stat(path).st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        current = False
    if not current:
        os.close(fd)
        return None
    with write_errors(path):
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content["job"], dict) or not isinstance(content.get("names", []), list):
            raise ValueError("not the record of a job")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OutputExistsError(
            f"{path} cannot be read ({error}): this is no job of udsstream that can be gone on with; choose another folder"
        ) from None
    for name in content.get("names", []):  # what a hand-made file says must not reach outside
        parts = PurePosixPath(str(name)).parts
        if not parts or ".." in parts or parts[0] == "/":
            raise OutputExistsError(
                f"{path} names {name!r}, which is outside the folder: it was not written by udsstream"
            )
    return content


def _others(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name != WORK)


def _not_empty(folder: Path, found: Sequence[str]) -> OutputExistsError:
    names = ", ".join(found[:_NAMED]) + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
    return OutputExistsError(
        f"{folder} is not empty: it holds {names}, a finished result or files of someone else; nothing was changed. "
        "Choose another folder, or empty this one"
    )


def _sync_all(path: Path) -> None:
    if path.is_dir():
        for entry in path.iterdir():
            _sync_all(entry)
    sync_file(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


_held: weakref.WeakSet[JobFolder] = weakref.WeakSet()


def _close_in_child() -> None:
    # A forked worker shares the open file and so the lock: one that outlives its killed parent would keep the resumed job out.
    for folder in list(_held):
        folder.close()


os.register_at_fork(after_in_child=_close_in_child)
