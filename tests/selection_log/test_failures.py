"""Disks that fill, fail or forbid, and two writers: an error that says what, where and what to do, and no row lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recorded

from udsstream.errors import LogExistsError, LogLockedError, LogWriteError
from udsstream.selection_log import layout
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.schema import SELECTION
from udsstream.selection_log.writer import SelectionLogWriter


def failing(monkeypatch: pytest.MonkeyPatch, name: str, error: int, when: Any = None, part: int = 0) -> None:
    """Make os.<name> fail with `error`; a write may take `part` bytes first."""
    real = getattr(os, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if when is None or when(*args):
            if part:
                return real(args[0], bytes(args[1])[:part])
            raise OSError(error, os.strerror(error))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize(
    ("name", "error", "part", "text"),
    [
        ("write", errno.ENOSPC, 0, "No space left on device. Free space"),
        ("write", errno.ENOSPC, 100, "only 100 of .* bytes were written. Free space"),
        ("write", errno.EIO, 0, "Input/output error. The disk reports an error"),
        ("fdatasync", errno.EIO, 0, "cannot make the log durable: .* The disk reports an error"),
    ],
)
def test_a_write_that_fails_stops_the_run_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: int, part: int, text: str
) -> None:
    writer = recorded.create(tmp_path)
    recorded.record(writer, 0, 3)
    head = recorded.checkpoint(writer, 3)
    with monkeypatch.context() as patch:
        failing(patch, name, error, part=part)

        def log_on() -> None:
            for step in range(3, 5):
                recorded.log_step(writer, step)
                writer.sync()

        with pytest.raises(LogWriteError, match=text):
            log_on()
    # The disk is well again, but a row is missing: nothing may follow.
    for attempt in (
        lambda: writer.append(5, recorded.columns(5)),
        writer.sync,
        writer.seal,
        lambda: writer.checkpoint(9, heads=[writer.head]),
        writer.close,
    ):
        with pytest.raises(LogWriteError, match=r"takes no more rows since a write failed: .*Training must not go on"):
            attempt()
    assert SelectionLog.open(tmp_path).steps().tolist()[:3] == [0, 1, 2]
    with SelectionLogWriter.resume(tmp_path, step=3, head=head) as again:
        recorded.record(again, 3, 6)
    log = SelectionLog.open(tmp_path)
    assert log.steps().tolist() == list(range(6))
    log.verify()


def test_a_sealing_that_fails_in_its_thread_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = recorded.create(tmp_path, wal_bytes=4_000)
    with monkeypatch.context() as patch:
        failing(patch, "replace", errno.ENOSPC)
        deadline = time.monotonic() + 10
        step = 0

        def log_until_it_fails() -> None:
            nonlocal step
            while time.monotonic() < deadline:
                recorded.log_step(writer, step)
                step += 1
                time.sleep(0.002)

        with pytest.raises(LogWriteError, match="No space left on device"):
            log_until_it_fails()
    writer.release()
    log = SelectionLog.open(tmp_path)
    # The failure may be noticed between a step's decisions and its pushes: the decisions are there then.
    written = log.steps().tolist()
    assert written in (list(range(step)), list(range(step + 1)))
    log.verify()
    with SelectionLogWriter.resume(tmp_path, step=0, head=None) as again:
        recorded.record(again, 0, 2)
    assert log.table(all_attempts=True).num_rows == 5 * (len(written) + 2)
    log.verify()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", mount], capture_output=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    root = small_disk / "log"
    writer = recorded.create(root, wal_bytes=20_000)
    recorded.record(writer, 0, 4)
    head = recorded.checkpoint(writer, 4)
    step = 4

    def fill() -> None:
        nonlocal step
        while step < 10_000:
            recorded.log_step(writer, step)
            step += 1

    with pytest.raises(LogWriteError, match=r"No space left on device|bytes were written"):
        fill()
    writer.release()
    log = SelectionLog.open(root)
    assert log.steps().tolist()[:step] == list(range(step))
    assert log.table(columns=["step"]).num_rows >= 5 * step
    with pytest.raises(LogWriteError, match="Free space on this file system"):
        SelectionLogWriter.resume(root, step=4, head=head)
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    with SelectionLogWriter.resume(root, step=4, head=head) as again:
        recorded.record(again, 4, 6)
    assert log.steps().tolist() == list(range(6))
    log.verify()


def test_a_read_only_disk(small_disk: Path) -> None:
    with recorded.create(small_disk / "a") as writer:
        recorded.record(writer, 0, 2)
        head = writer.sync()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(LogWriteError, match="The file system is read-only: remount it or choose another"):
        recorded.create(small_disk / "b")
    with pytest.raises(LogWriteError, match="The file system is read-only"):
        SelectionLogWriter.resume(small_disk / "a", step=2, head=head)
    log = SelectionLog.open(small_disk / "a")
    assert log.verify().rows == 10
    with pytest.raises(LogWriteError, match="cannot write Parquet"):
        log.to_parquet()


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "mkdir", errno.EACCES)
    with pytest.raises(LogWriteError, match=r"Permission denied\. Give this user permission"):
        recorded.create(tmp_path / "a")


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(LogExistsError, match="is a file, not a folder"):
        recorded.create(tmp_path / "a")


_HOLD = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import recorded
writer = recorded.create(Path({root!r}))
recorded.record(writer, 0, 2)
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_cannot_write_one_log(tmp_path: Path) -> None:
    root = tmp_path / "log"
    code = _HOLD.format(tests=str(Path(__file__).parent), root=str(root))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        with pytest.raises(LogLockedError, match=f"written by process {holder.pid} .*another log directory"):
            SelectionLogWriter.resume(root, step=0, head=None)
        with pytest.raises(LogExistsError):
            recorded.create(root)
        assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
        assert SelectionLog.open(root).steps().tolist() == [0, 1]  # reading is free
        holder.kill()
    SelectionLogWriter.resume(root, step=0, head=None).close()  # the kernel gave the lock back


def test_one_process_cannot_open_a_log_twice(tmp_path: Path) -> None:
    with recorded.create(tmp_path), pytest.raises(LogLockedError, match=f"by process {os.getpid()}"):
        SelectionLogWriter.resume(tmp_path, step=0, head=None)


def test_a_forked_worker_neither_writes_nor_keeps_the_lock(tmp_path: Path) -> None:
    """A data-loader worker that outlives a killed trainer would otherwise keep the resumed run out."""
    writer = recorded.create(tmp_path)
    read, write = os.pipe()
    ready, child_is_ready = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.write(child_is_ready, b"!")
        try:
            writer.append(0, recorded.columns(0))
        except LogWriteError as error:
            status = 7 if "belongs to process" in str(error) else 8
        else:
            status = 9
        os.read(read, 1)  # until the parent is done
        os._exit(status)
    os.close(read)
    os.read(ready, 1)
    writer.release()
    SelectionLogWriter.resume(tmp_path, step=0, head=None).close()
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_the_writer_holds_no_row_back(tmp_path: Path) -> None:
    """Each step is in the file when `append` returns: one more batch, and no buffer in between."""
    with recorded.create(tmp_path) as writer:
        path = layout.wal_path(tmp_path, SELECTION, 0, 0)
        sizes = [path.stat().st_size]
        for step in range(3):
            writer.append(step, recorded.columns(step))
            sizes.append(path.stat().st_size)
            assert SelectionLog.open(tmp_path).steps().tolist() == list(range(step + 1))
        assert sizes == sorted(set(sizes))


def test_each_step_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded.create(tmp_path) as writer:
        calls = []
        real = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: calls.append(len(data)) or real(fd, data))
        writer.append(0, recorded.columns(0))
        assert len(calls) == 1
