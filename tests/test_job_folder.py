"""The folder of a job that may be killed at any moment: taken once, gone on with, published whole, and never over something else."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from udsstream import job_folder
from udsstream.errors import OutputExistsError, OutputWriteError
from udsstream.job_folder import WORK, JobFolder, replace_file

JOB = {"source": "a.jsonl", "limit": 64, "columns": ["x", "y"]}


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_result(folder: JobFolder) -> None:
    (folder.work / "a").mkdir(exist_ok=True)
    (folder.work / "a" / "shard").write_bytes(b"a")
    (folder.work / "shard").write_bytes(b"b")
    (folder.work / "state.json").write_bytes(b"{}")
    (folder.work / "index.json").write_bytes(b"{}")


RESULT = {"a/shard": b"a", "shard": b"b", "index.json": b"{}"}


def test_a_result_appears_and_nothing_else_stays(tmp_path):
    out = tmp_path / "deep" / "out"
    with JobFolder.claim(out, JOB) as folder:
        assert (folder.path, folder.work, folder.resumed, folder.published) == (out, out / WORK, False, False)
        write_result(folder)
        assert [path.name for path in out.iterdir()] == [WORK]
        folder.publish(["a", "shard", "index.json"], last="index.json")
        assert folder.published
    assert files_in(out) == RESULT


def test_an_unfinished_job_is_gone_on_with(tmp_path):
    with JobFolder.claim(tmp_path / "out", JOB) as folder:
        (folder.work / "state.json").write_bytes(b"half way")
    with JobFolder.claim(tmp_path / "out", JOB | {"columns": ("x", "y")}) as folder:  # as JSON holds it
        assert folder.resumed
        assert (folder.work / "state.json").read_bytes() == b"half way"


def test_other_settings_are_named(tmp_path):
    JobFolder.claim(tmp_path / "out", JOB).close()
    before = files_in(tmp_path)
    with pytest.raises(
        OutputExistsError, match=r"other settings:\n  limit: was 64, is 32\n  new: was '\(absent\)', is 1\n"
    ):
        JobFolder.claim(tmp_path / "out", JOB | {"limit": 32, "new": 1})
    assert files_in(tmp_path) == before


def test_a_finished_result_is_not_touched(tmp_path):
    with JobFolder.claim(tmp_path / "out", JOB) as folder:
        write_result(folder)
        folder.publish(["a", "shard"], last="index.json")
    with pytest.raises(OutputExistsError, match=r"out is not empty: it holds a, index\.json, shard, a finished result"):
        JobFolder.claim(tmp_path / "out", JOB)
    assert files_in(tmp_path / "out") == RESULT


@pytest.mark.parametrize("beside_a_job", [False, True])
def test_files_of_someone_else_are_not_touched(tmp_path, beside_a_job):
    if beside_a_job:
        JobFolder.claim(tmp_path, JOB).close()
    for number in range(7):
        (tmp_path / f"file{number}").write_bytes(b"mine")
    before = files_in(tmp_path)
    with pytest.raises(OutputExistsError, match=r"it holds file0, file1, file2, file3, file4 and 2 more"):
        JobFolder.claim(tmp_path, JOB)
    assert files_in(tmp_path) == before


def test_what_appears_while_the_job_runs_is_not_overwritten(tmp_path):
    with JobFolder.claim(tmp_path, JOB) as folder:
        write_result(folder)
        (tmp_path / "index.json").write_bytes(b"mine")
        with pytest.raises(OutputExistsError, match=r"index\.json is there already, and is not overwritten"):
            folder.publish(["a", "shard"], last="index.json")
    assert (tmp_path / "index.json").read_bytes() == b"mine"
    (tmp_path / "index.json").unlink()
    with JobFolder.claim(tmp_path, JOB) as folder:
        assert folder.published
    assert files_in(tmp_path) == RESULT


@pytest.mark.parametrize(
    "text", ["", "[]", '{"job": 1}', "\x00", '{"job": {}, "names": ["../x"]}', '{"job": {}, "names": ["/x"]}']
)
def test_a_damaged_record_is_an_error(tmp_path, text):
    (tmp_path / WORK).mkdir()
    for name in ("job.json", "publish.json"):
        (tmp_path / WORK / name).write_text(text)
    with pytest.raises(OutputExistsError, match=r"cannot be read|outside the folder"):
        JobFolder.claim(tmp_path, JOB)


def test_a_job_that_came_to_nothing_leaves_nothing(tmp_path):
    JobFolder.claim(tmp_path / "out", JOB).discard()
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_begins_anew_finds_nothing_of_the_interrupted_one(tmp_path):
    with JobFolder.claim(tmp_path, JOB) as folder:
        assert folder.contents() == []
        (folder.work / "half").write_text("x")
        (folder.work / "parts").mkdir()
        (folder.work / "parts" / "a").write_text("y")
        assert folder.contents() == ["half", "parts"]
    with JobFolder.claim(tmp_path, JOB) as folder:
        assert folder.resumed
        folder.clear()
        assert folder.contents() == []
        (folder.work / "whole").write_text("z")
        folder.publish(folder.contents(), last="whole")
    assert [entry.name for entry in tmp_path.iterdir()] == ["whole"]


# Several processes --------------------------------------------------------------------------------------------------------

HOLDER = textwrap.dedent("""
    import os, sys, time
    from udsstream.job_folder import JobFolder
    folder = JobFolder.claim(sys.argv[1], {"a": 1})
    if os.fork() == 0:
        print(os.getpid(), flush=True)  # by then it has let go of the lock
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
""")


def test_one_process_at_a_time_and_a_killed_one_lets_go(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(OutputExistsError, match=rf"another process \({holder.pid}\) is at work in {tmp_path}"):
            JobFolder.claim(tmp_path, {"a": 1})
        holder.kill()
        holder.wait()
        # The child that it had forked lives on, without the lock.
        with JobFolder.claim(tmp_path, {"a": 1}) as folder:
            assert folder.resumed
    finally:
        os.kill(child, signal.SIGKILL)
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_two_claims_in_one_process(tmp_path):
    with JobFolder.claim(tmp_path, JOB), pytest.raises(OutputExistsError, match="at work"):
        JobFolder.claim(tmp_path, JOB)


KILLED = textwrap.dedent("""
    import os, sys
    from udsstream import job_folder
    from udsstream.job_folder import JobFolder

    calls, limit = 0, int(sys.argv[2])
    def counted(function):
        def call(*args, **kwargs):
            global calls
            calls += 1
            if calls > limit:
                os.kill(os.getpid(), 9)
            return function(*args, **kwargs)
        return call
    for name in ("replace", "unlink", "rmdir", "fsync", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    folder = JobFolder.claim(sys.argv[1], {"a": 1})
    if not folder.published:
        work = folder.work
        if not (work / "publish.json").exists():
            (work / "a").mkdir(exist_ok=True)
            for name, data in (("a/shard", b"a"), ("shard", b"b"), ("index.json", b"{}"), ("state.json", b"{}")):
                (work / name).write_bytes(data)
        folder.publish(["a", "shard"], last="index.json")
""")


def test_a_kill_at_each_system_call_is_gone_on_from(tmp_path):
    """The result is whole or `_job/` is there, whichever call is the last; then it is completed, or refused as finished."""
    kills = 0
    for limit in range(200):
        out = tmp_path / str(limit)
        done = subprocess.run([sys.executable, "-c", KILLED, str(out), str(limit)], check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        kills += 1
        if (out / "index.json").exists():
            assert files_in(out).items() >= RESULT.items()
        elif out.exists() and any(out.iterdir()):
            assert (out / WORK).is_dir()
        whole = (out / "index.json").exists()
        refused = contextlib.suppress(OutputExistsError) if whole else contextlib.nullcontext()
        with refused, JobFolder.claim(out, {"a": 1}) as folder:
            if not folder.published:
                assert not whole
                write_result(folder)
                folder.publish(["a", "shard"], last="index.json")
        assert files_in(out) == RESULT
        with pytest.raises(OutputExistsError, match="is not empty"):
            JobFolder.claim(out, {"a": 1})
    else:
        pytest.fail("never came to an end")
    assert kills > 20


# Disks --------------------------------------------------------------------------------------------------------------------


def failing(call: str, code: int, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)


@pytest.mark.parametrize(
    ("call", "code", "remedy"),
    [("fsync", errno.ENOSPC, "free space"), ("replace", errno.EACCES, "permission"), ("fsync", errno.EIO, "dmesg")],
)
def test_a_disk_that_refuses_is_our_error_and_the_job_goes_on_later(tmp_path, monkeypatch, call, code, remedy):
    with JobFolder.claim(tmp_path, JOB) as folder:
        write_result(folder)
        with monkeypatch.context() as patched:
            failing(call, code, patched)
            with pytest.raises(
                OutputWriteError, match=rf"cannot write {tmp_path}.*{remedy}.*run the same command again"
            ):
                folder.publish(["a", "shard"], last="index.json")
    assert not (tmp_path / "index.json").exists()
    with JobFolder.claim(tmp_path, JOB) as folder:
        if not folder.published:
            folder.publish(["a", "shard"], last="index.json")
    assert files_in(tmp_path) == RESULT


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputWriteError, match="a part of this path is a file"):
        JobFolder.claim(tmp_path / "file" / "out", JOB)


def test_replace_file_leaves_the_old_content_when_it_fails(tmp_path, monkeypatch):
    replace_file(tmp_path / "state", b"old")
    failing("fsync", errno.ENOSPC, monkeypatch)
    with pytest.raises(OutputWriteError, match="free space"):
        replace_file(tmp_path / "state", b"new")
    assert (tmp_path / "state").read_bytes() == b"old"


def test_it_needs_the_standard_library_alone():
    code = f"import sys, json\nimport {job_folder.__name__}\nprint(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert {name for name in loaded if "." not in name} & {
        "torch",
        "numpy",
        "pyarrow",
        "streaming",
        "omegaconf",
    } == set()
