"""What a kill, a power cut or a wrong checkpoint leaves: the exact acknowledged rows, or an error that says what is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recorded

from udsstream.errors import ConfigError, LogCorruptError, LogError, UdsstreamError
from udsstream.selection_log import layout
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.run_file import read_run
from udsstream.selection_log.schema import SELECTION, TABLES
from udsstream.selection_log.state import read_state
from udsstream.selection_log.writer import SelectionLogWriter


def assert_run(root: Path, stop: int, attempts: dict[int, int] | None = None, seed: int = 0) -> None:
    """The run as it stands is the steps 0 to stop - 1, intact; `attempts` gives the attempt of a step when it is not 0."""
    log = SelectionLog.open(root)
    found = log.table().to_pylist()
    names = log.table().column_names
    want = []
    for step in range(stop):
        attempt = (attempts or {}).get(step, 0)
        want += [{name: row[name] for name in names} for row in recorded.expected(step, seed=seed, attempt=attempt)]
    assert found == want


# -- torn files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("tail", ["cut", "zeros", "garbage"])
def test_a_write_ahead_file_torn_at_every_byte(memory_path: Path, table: str, tail: str) -> None:
    """Cut at each offset, alone or with what a power cut may leave behind it: the batches before the cut, no other row."""
    writer = recorded.create(memory_path)
    path = layout.wal_path(memory_path, table, 0, 0)
    ends = [path.stat().st_size]
    for step in range(3):
        recorded.log_step(writer, step)
        ends.append(path.stat().st_size)
    writer.release()
    whole = path.read_bytes()
    log = SelectionLog.open(memory_path)
    full = (log.table() if table == SELECTION else log.pushes()).to_pylist()
    per_step = len(full) // 3
    run = read_run(memory_path)
    codec = run.settings.codec(table)
    rng = np.random.default_rng(5)
    for cut in range(len(whole)):
        rest = b""
        if tail == "zeros":
            rest = bytes(len(whole) - cut)
        elif tail == "garbage":
            rest = rng.bytes(int(rng.integers(1, 200)))
        path.write_bytes(whole[:cut] + rest)
        state = read_state(memory_path, 0, codec, run.sha256, live=False)
        (scan,) = state.wals
        file = whole[:cut] + rest
        same = next(
            (i for i, (a, b) in enumerate(zip(file, whole, strict=False)) if a != b), min(len(file), len(whole))
        )
        batches = sum(end <= same for end in ends[1:])
        found = scan.table(codec).to_pylist()
        if tail == "garbage" and len(found) > batches * per_step:
            batches += 1  # the cut was in padding behind a batch: its values were all there
            same = ends[batches]
        assert found == full[: batches * per_step], cut
        # Garbage in the schema's padding is no reason to lose rows; `verify` still reports it.
        assert scan.good == ends[batches] if same >= ends[0] else scan.good in (0, ends[0])
        assert not scan.damaged
        assert (scan.wrong is None) == (cut + len(rest) in ends and same == cut + len(rest)), cut


@pytest.mark.parametrize("table", TABLES)
def test_a_sealed_file_torn_at_every_byte(memory_path: Path, table: str) -> None:
    with recorded.create(memory_path) as writer:
        recorded.record(writer, 0, 3)
    path = layout.segment_path(memory_path, table, 0, 0, 0)
    whole = path.read_bytes()
    log = SelectionLog.open(memory_path)
    read = log.table if table == SELECTION else log.pushes
    for cut in range(len(whole)):
        for rest in (b"", bytes(len(whole) - cut)):
            path.write_bytes(whole[:cut] + rest)
            with pytest.raises(LogCorruptError, match=r"rank 0: .*a0-000000.arrow \(steps 0 to 2\)"):
                read()


def test_a_hole_in_the_middle_is_damage_and_not_a_torn_end(tmp_path: Path) -> None:
    """A page that reads as zeros, with whole batches behind it: nobody may take the rows before it for all there is."""
    writer = recorded.create(tmp_path)
    path = layout.wal_path(tmp_path, SELECTION, 0, 0)
    ends = []
    for step in range(5):
        recorded.log_step(writer, step)
        ends.append(path.stat().st_size)
    head = recorded.checkpoint(writer, 5)
    writer.release()
    whole = path.read_bytes()
    for first, last in ((ends[1], ends[1] + 64), (ends[1] + 700, ends[2]), (ends[0] + 8, ends[2] - 8)):
        path.write_bytes(whole[:first] + bytes(last - first) + whole[last:])
        log = SelectionLog.open(tmp_path)
        for look in (log.table, log.verify):
            with pytest.raises(LogCorruptError, match=r"wal-000000.*not (the|a) torn end"):
                look()
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock"}
        with pytest.raises(
            LogCorruptError, match="the checkpoint is ahead of the log: it was made at step 5, the log ends after"
        ):
            SelectionLogWriter.resume(tmp_path, step=5, head=head)
        assert {p: p.read_bytes() for p in before} == before, "a resume that fails must change nothing"


def test_what_was_torn_is_set_aside_and_not_deleted(tmp_path: Path) -> None:
    writer = recorded.create(tmp_path)
    recorded.record(writer, 0, 3)
    head = recorded.checkpoint(writer, 3)
    recorded.record(writer, 3, 4)
    writer.release()
    path = layout.wal_path(tmp_path, SELECTION, 0, 0)
    torn = path.read_bytes()[:-100]
    path.write_bytes(torn)
    with pytest.raises(LogCorruptError, match="resuming the run puts it in order"):
        SelectionLog.open(tmp_path).verify()
    with SelectionLogWriter.resume(tmp_path, step=3, head=head) as again:
        recorded.record(again, 3, 5)
    (aside,) = layout.torn_files(tmp_path, SELECTION, 0)
    assert aside.read_bytes() == torn
    assert_run(tmp_path, 5, {3: 1, 4: 1})
    report = SelectionLog.open(tmp_path).verify()
    assert any("torn-000000" in note for note in report.unchecked)


def test_files_that_give_no_row_are_set_aside_too(tmp_path: Path) -> None:
    """A file whose start is lost, and the one after it that nothing leads to."""
    writer = recorded.create(tmp_path)
    recorded.record(writer, 0, 2)
    head = recorded.checkpoint(writer, 2)
    writer._hand_over = lambda pending, codec: None  # type: ignore[method-assign]
    writer._selection._hand_over = writer._hand_over
    recorded.record(writer, 2, 3)
    writer._selection.rotate()
    recorded.record(writer, 3, 4)
    writer._selection.rotate()
    recorded.record(writer, 4, 5)
    writer.release()
    assert SelectionLog.open(tmp_path).steps().tolist() == [0, 1, 2, 3, 4]
    lost, after = (layout.wal_path(tmp_path, SELECTION, 0, number) for number in (1, 2))
    lost.write_bytes(bytes(lost.stat().st_size))
    kept = {1: lost.read_bytes(), 2: after.read_bytes()}
    with pytest.raises(LogCorruptError, match="wal-000001"):
        SelectionLog.open(tmp_path).table()
    with SelectionLogWriter.resume(tmp_path, step=2, head=head) as again:
        recorded.record(again, 2, 5)
    assert {int(p.stem[5:]): p.read_bytes() for p in layout.torn_files(tmp_path, SELECTION, 0)} == kept
    assert_run(tmp_path, 5, dict.fromkeys(range(2, 5), 1))
    SelectionLog.open(tmp_path).verify()


# -- attempts --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_supersedes_and_never_deletes(tmp_path: Path) -> None:
    writer = recorded.create(tmp_path)
    recorded.record(writer, 0, 4)
    head = recorded.checkpoint(writer, 4)
    recorded.record(writer, 4, 7, seed=1)
    writer.release()
    again = SelectionLogWriter.resume(tmp_path, step=4, head=head)
    assert again.attempt == 1
    # From the resume on, and before a new row exists, the old rows are out of the run.
    assert_run(tmp_path, 4)
    recorded.record(again, 4, 6)
    again.close()
    assert_run(tmp_path, 6, {4: 1, 5: 1})
    log = SelectionLog.open(tmp_path)
    everything = log.table(all_attempts=True)
    assert everything.num_rows == 9 * 5
    old = [row for row in everything.to_pylist() if row["attempt"] == 0 and row["step"] >= 4]
    names = everything.column_names
    assert old == [{n: r[n] for n in names} for s in range(4, 7) for r in recorded.expected(s, seed=1)]
    vectors, pushed = recorded.memory_before(6)
    memory = log.buffer_at(6)
    assert np.array_equal(memory.embeddings, vectors)
    assert memory.pushed == pushed
    assert log.verify().attempts == 2


def test_resuming_an_older_checkpoint_follows_its_own_line(tmp_path: Path) -> None:
    """Checkpoints at 2 and 4; resumed at 2 (other choices), then from the old checkpoint at 4: the run is attempts 0 and 2."""
    writer = recorded.create(tmp_path)
    recorded.record(writer, 0, 2)
    at_2 = recorded.checkpoint(writer, 2)
    recorded.record(writer, 2, 4)
    at_4 = recorded.checkpoint(writer, 4)
    writer.close()
    with SelectionLogWriter.resume(tmp_path, step=2, head=at_2) as other:
        recorded.record(other, 2, 4, seed=9)
        recorded.checkpoint(other, 4, seed=9)
        recorded.record(other, 4, 6, seed=9)
    with SelectionLogWriter.resume(tmp_path, step=4, head=at_4) as last:
        recorded.record(last, 4, 5)
    assert_run(tmp_path, 5, {4: 2})
    log = SelectionLog.open(tmp_path)
    assert log.verify().heads == 3
    assert np.array_equal(log.buffer_at(5).embeddings, recorded.memory_before(5)[0])


def test_kept_memories_follow_the_attempts(tmp_path: Path) -> None:
    writer = recorded.create(tmp_path, embeddings="tail")
    recorded.record(writer, 0, 2)
    head = recorded.checkpoint(writer, 2)
    recorded.record(writer, 2, 4, seed=1)
    recorded.checkpoint(writer, 4, seed=1)
    writer.release()
    again = SelectionLogWriter.resume(tmp_path, step=2, head=head)
    log = SelectionLog.open(tmp_path)
    assert log.buffer_steps() == [2]
    recorded.record(again, 2, 4)
    recorded.checkpoint(again, 4)
    again.close()
    assert log.buffer_steps() == [2, 4]
    assert np.array_equal(log.buffer_at(4).embeddings, recorded.memory_before(4)[0])
    assert log.verify().heads == 3


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    writer = recorded.create(tmp_path)
    recorded.record(writer, 0, 3, seed=4)
    writer.release()
    with SelectionLogWriter.resume(tmp_path, step=0, head=None) as again:
        recorded.record(again, 0, 2)
    assert_run(tmp_path, 2, {0: 1, 1: 1})
    assert SelectionLog.open(tmp_path).table(all_attempts=True).num_rows == 25


def test_resuming_many_times_without_a_step(tmp_path: Path) -> None:
    writer = recorded.create(tmp_path)
    recorded.record(writer, 0, 2)
    head = recorded.checkpoint(writer, 2)
    writer.release()
    for attempt in range(1, 6):
        again = SelectionLogWriter.resume(tmp_path, step=2, head=head)
        assert again.attempt == attempt
        # A checkpoint made right after a resume names this attempt's place, and can be resumed too.
        head = again.sync()
        again.release()
    with SelectionLogWriter.resume(tmp_path, step=2, head=head) as last:
        recorded.record(last, 2, 3)
    assert_run(tmp_path, 3, {2: 6})
    SelectionLog.open(tmp_path).verify()


def test_more_ranks_then_fewer(tmp_path: Path) -> None:
    with recorded.create(tmp_path) as alone:
        recorded.record(alone, 0, 2)
        head = alone.sync()
    first = SelectionLogWriter.resume(tmp_path, step=2, head=head, world_size=2)
    with pytest.raises(ConfigError, match=r"broadcast its writer\.attempt"):
        SelectionLogWriter.resume(tmp_path, step=2, head=None, rank=1, world_size=2)
    second = SelectionLogWriter.resume(tmp_path, step=2, head=None, rank=1, world_size=2, attempt=first.attempt)
    for step in range(2, 5):
        for writer in (first, second):
            writer.append(step, recorded.columns(step, rank=writer.rank))
            if step == 3:
                writer.seal()
    heads = {3: [first.sync(), second.sync()]}
    first.checkpoint(5, heads=heads[3])
    first.release()
    second.release()
    with SelectionLogWriter.resume(tmp_path, step=5, head=heads[3][0]) as last:
        last.append(5, recorded.columns(5))
    log = SelectionLog.open(tmp_path)
    found = log.table(columns=["step", "rank", "attempt"])
    count = {(r["step"], r["rank"], r["attempt"]): 0 for r in found.to_pylist()}
    assert set(count) == {(0, 0, 0), (1, 0, 0)} | {(s, r, 1) for s in (2, 3, 4) for r in (0, 1)} | {(5, 0, 2)}
    assert log.verify().ranks == 2


# -- checkpoints that do not fit -------------------------------------------------------------------------------------


def test_a_checkpoint_ahead_of_the_log(tmp_path: Path) -> None:
    writer = recorded.create(tmp_path)
    recorded.record(writer, 0, 3)
    writer.close()
    shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    with SelectionLogWriter.resume(tmp_path, step=3, head=writer.head) as more:
        recorded.record(more, 3, 6)
        head = more.sync()
    with pytest.raises(LogCorruptError, match="ahead of the log: it was made at step 6, the log ends after step 2"):
        SelectionLogWriter.resume(tmp_path.with_name("copy"), step=6, head=head)


def test_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    heads = []
    for name, seed in (("a", 0), ("b", 1)):
        with recorded.create(tmp_path / name) as writer:
            recorded.record(writer, 0, 3, seed=seed)
            heads.append(writer.sync())
    with pytest.raises(
        LogCorruptError, match=r"reaches step 2 and so the checkpoint's step 3, but .* come from different runs"
    ):
        SelectionLogWriter.resume(tmp_path / "a", step=3, head=heads[1])
    with pytest.raises(LogCorruptError, match="come from different runs"):
        SelectionLogWriter.resume(tmp_path / "a", step=2, head=heads[0])  # right head, wrong step
    with pytest.raises(LogCorruptError, match="brings no head"):
        SelectionLogWriter.resume(tmp_path / "a", step=3, head=None)
    with pytest.raises(ConfigError, match="32 bytes"):
        SelectionLogWriter.resume(tmp_path / "a", step=3, head=b"x")
    with pytest.raises(LogError, match="there is no such folder"):
        SelectionLogWriter.resume(tmp_path / "c", step=0, head=None)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("left", [None, 100])
def test_a_log_that_lost_a_sealed_segment_is_not_taken_up_again(tmp_path: Path, table: str, left: int | None) -> None:
    """An old segment, which finding the checkpoint's place need not open."""
    writer = recorded.create(tmp_path)
    for stop in (2, 4):
        recorded.record(writer, stop - 2, stop)
        writer.seal()
    head = recorded.checkpoint(writer, 4)
    writer.release()
    path = layout.segment_path(tmp_path, table, 0, 0, 0)
    data = path.read_bytes()
    path.unlink() if left is None else path.write_bytes(data[:left])
    text = "is missing" if left is None else "has 100 bytes"
    with pytest.raises(
        LogCorruptError, match=rf"a0-000000.arrow \({table}, steps 0 to 1\) {text}, but the manifest records"
    ):
        SelectionLogWriter.resume(tmp_path, step=4, head=head)
    path.write_bytes(data)
    SelectionLogWriter.resume(tmp_path, step=4, head=head).close()
    SelectionLog.open(tmp_path).verify()


# -- a crash at every operation --------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process is gone."""


class Disk:
    """Counts what changes the disk, and stops the process before the n-th change (a write: in its middle)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.stop_at, self.dead = 0, 0, False
        for name in ("write", "replace", "unlink", "mkdir", "fsync", "fdatasync", "open"):
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not (len(args) > 1 and args[1] & (os.O_CREAT | os.O_WRONLY)):
                return real(*args, **kwargs)
            if self.stop_at and not self.dead:
                self.count += 1
                if self.count == self.stop_at:
                    self.dead = True
                    if name == "write" and not isinstance(args[0], str):
                        real(args[0], bytes(args[1])[: len(args[1]) // 2])
            if self.dead:
                raise Crash
            return real(*args, **kwargs)

        return call

    @contextmanager
    def crash_at(self, operation: int) -> Iterator[None]:
        self.count, self.stop_at, self.dead = 0, operation, False
        try:
            yield
        finally:
            self.stop_at, self.dead = 0, False


@pytest.mark.parametrize("embeddings", ["full", "tail"])
def test_a_crash_at_every_operation_on_the_disk(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch, embeddings: str
) -> None:
    """Create, log, checkpoint, seal, close: stopped before each change of the disk in turn, then resumed, and stopped again."""
    disk = Disk(monkeypatch)
    operation, finished = 0, False
    while not finished:
        operation += 1
        root = memory_path / f"{operation}"
        done = {"step": 0, "head": None, "logged": 0}
        writers: list[SelectionLogWriter] = []

        def life(start: int, root: Path = root, done: dict[str, Any] = done, writers: list[Any] = writers) -> None:
            if (root / "run.json").exists():
                writer = SelectionLogWriter.resume(root, step=done["step"], head=done["head"])
            else:
                writer = recorded.create(root, embeddings=embeddings)
            writers.append(writer)
            for step in range(start, 6):
                recorded.log_step(writer, step)
                done["logged"] = step + 1
                if step in (1, 3):
                    head = recorded.checkpoint(writer, step + 1)
                    done.update(step=step + 1, head=head)
                if step in (2, 4):
                    writer.seal()
            writer.close()

        def bury(writers: list[Any] = writers) -> None:
            for writer in writers:
                writer.release()
            writers.clear()

        try:
            with disk.crash_at(operation):
                try:
                    life(0)
                    finished = True
                finally:
                    bury()
        except (Crash, UdsstreamError):
            pass
        if finished:
            break
        # What was acknowledged is there before anyone repairs anything (sealing may have been under way).
        if (root / "run.json").exists() and done["logged"]:
            log = SelectionLog.open(root)
            found = log.steps().tolist()
            assert found[: done["logged"]] == list(range(done["logged"])), (operation, found)
        # A second crash while recovering from the first, at another place each time.
        try:
            with disk.crash_at(1 + operation % 17):
                try:
                    life(done["step"])
                finally:
                    bury()
        except (Crash, UdsstreamError):
            pass
        life(done["step"])
        log = SelectionLog.open(root)
        table = log.table().drop_columns(["attempt"])
        want = [
            {name: row[name] for name in table.column_names} for step in range(6) for row in recorded.expected(step)
        ]
        assert table.to_pylist() == want, operation
        report = log.verify()
        assert report.closed
        left = [path for path in (root / "_state").rglob("*") if path.suffix == ".tmp" or path.name.startswith("wal-")]
        assert not left, "a recovery leaves no half-made file behind"
        if embeddings == "full":
            assert np.array_equal(log.buffer_at(6).embeddings, recorded.memory_before(6)[0])
        else:
            assert np.array_equal(log.buffer_at(4).embeddings, recorded.memory_before(4)[0])
        shutil.rmtree(root)
    assert operation > 60


def test_power_cuts_lose_nothing_that_was_synced(memory_path: Path) -> None:
    """Everything after the last sync may be gone, zeroed or garbage, in each file on its own: the synced steps come back."""
    rng = np.random.default_rng(11)
    for trial in range(60):
        root = memory_path / f"{trial}"
        writer = recorded.create(root)
        synced = int(rng.integers(1, 6))
        recorded.record(writer, 0, synced)
        head = recorded.checkpoint(writer, synced)
        paths = [layout.wal_path(root, table, 0, 0) for table in TABLES]
        safe = [path.stat().st_size for path in paths]
        recorded.record(writer, synced, synced + int(rng.integers(0, 4)))
        writer.release()
        for path, size in zip(paths, safe, strict=True):
            data = path.read_bytes()
            cut = int(rng.integers(size, len(data) + 1))
            kind = rng.integers(4)
            rest = [b"", bytes(len(data) - cut), rng.bytes(len(data) - cut), data[cut:]][kind]
            path.write_bytes(data[:cut] + rest)
        again = SelectionLogWriter.resume(root, step=synced, head=head)
        recorded.record(again, synced, 8)
        again.close()
        assert_run(root, 8, dict.fromkeys(range(synced, 8), 1))
        assert SelectionLog.open(root).verify().closed
