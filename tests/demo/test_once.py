"""A folder is made once, whole or not at all, and nothing of the user's is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from udsstream.demo.once import build_once
from udsstream.errors import ConfigError

MARKER = "made.json"


def write(folder: Path) -> dict:
    (folder / "sub").mkdir()
    (folder / "sub" / "data").write_bytes(b"12345")
    return {"rows": 5}


def never(folder: Path) -> dict:
    raise AssertionError("built although it was there")


def once(out: Path, build=write, **key) -> tuple[dict, bool]:
    return build_once(out, marker=MARKER, key=key, build=build)


def hidden(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}"))


def test_it_is_made_once_and_reused(tmp_path):
    out = tmp_path / "deep" / "out"
    assert once(out, a=(1, 2)) == ({"rows": 5}, False)
    assert (out / "sub" / "data").read_bytes() == b"12345"
    assert once(out, never, a=(1, 2)) == ({"rows": 5}, True)
    assert hidden(out) == [".out.lock"]


def test_another_key_makes_it_anew(tmp_path):
    out = tmp_path / "out"
    once(out, a=1)
    assert once(out, lambda folder: {"rows": 6}, a=2) == ({"rows": 6}, False)
    assert sorted(path.name for path in out.iterdir()) == [MARKER]
    assert hidden(out) == [".out.lock"]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"1234")])
def test_a_missing_or_shortened_file_makes_it_anew(tmp_path, damage):
    out = tmp_path / "out"
    once(out)
    damage(out / "sub" / "data")
    assert once(out) == ({"rows": 5}, False)
    assert (out / "sub" / "data").read_bytes() == b"12345"


def test_a_failed_build_leaves_no_folder(tmp_path):
    out = tmp_path / "out"

    def fail(folder: Path) -> dict:
        write(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        once(out, fail)
    assert not out.exists()
    assert once(out) == ({"rows": 5}, False)


def test_a_failed_rebuild_leaves_the_old_folder(tmp_path):
    out = tmp_path / "out"
    once(out, a=1)
    with pytest.raises(ZeroDivisionError):
        once(out, lambda folder: {"rows": 1 // 0}, a=2)
    assert once(out, never, a=1)[1]


def _killed(out: Path) -> None:
    def build(folder: Path) -> dict:
        write(folder)
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    once(out, build)


def test_a_killed_build_is_begun_anew(tmp_path):
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(out,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    assert hidden(out) == [".out.building", ".out.lock"]
    assert once(out) == ({"rows": 5}, False)
    assert hidden(out) == [".out.lock"]


def _slow(out: Path, calls: Path) -> None:
    def build(folder: Path) -> dict:
        with open(calls, "a") as file:
            file.write("x")
        time.sleep(0.3)
        return write(folder)

    assert once(out, build)[0] == {"rows": 5}


def test_builders_of_one_folder_wait_for_each_other(tmp_path):
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "out", tmp_path / "calls")
    processes = [context.Process(target=_slow, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "calls").read_text() == "x"


def test_a_folder_of_the_user_is_never_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(
        ConfigError, match=r"out has no readable made.json and holds files .*\(thesis.txt\); they would"
    ):
        once(out)
    assert (out / "thesis.txt").read_text() == "years of work"


def test_a_file_that_was_added_is_never_lost(tmp_path):
    out = tmp_path / "out"
    once(out, a=1)
    for i in range(5):
        (out / f"mine{i}").write_text("x")
    with pytest.raises(ConfigError, match=r"has a made.json of another build .*\(mine0, mine1, mine2 and 2 more\)"):
        once(out, a=2)
    assert (out / "mine4").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": {}}', '{"key": {}, "report": [], "files": {}}', "\udcff"])
def test_an_unreadable_marker_is_not_trusted(tmp_path, content):
    out = tmp_path / "out"
    once(out)
    (out / MARKER).write_text(content, errors="surrogateescape")
    with pytest.raises(ConfigError, match=r"has no readable made.json"):
        once(out)


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    assert once(tmp_path / "out") == ({"rows": 5}, False)


def test_a_file_in_its_place(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ConfigError, match=r"out is a file, but a folder is to be made there"):
        once(tmp_path / "out")


def test_the_marker_is_plain_json(tmp_path):
    once(tmp_path / "out", a=1)
    found = json.loads((tmp_path / "out" / MARKER).read_text())
    assert found == {"key": {"a": 1}, "report": {"rows": 5}, "files": {"sub/data": 5}}
