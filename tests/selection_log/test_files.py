"""Files are replaced whole, and never through a link that stands where the temporary one goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from udsstream.report import write as report
from udsstream.run_folder import write_atomically
from udsstream.selection_log.files import replace_file

WRITERS: dict[str, Callable[[Path, bytes], None]] = {
    "the log's": replace_file,
    "a run's folder": lambda path, data: write_atomically(path, data.decode()),
    "the report's": report._replace,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path: Path, writer: str, monkeypatch) -> None:
    monkeypatch.setattr("os.getpid", lambda: 7)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in (".file.tmp", ".file.7"):
        (tmp_path / name).symlink_to(victim)
    WRITERS[writer](tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert victim.read_text() == "precious"


def test_what_a_crash_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".file.tmp").write_bytes(b"half of something lon")
    replace_file(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"new"
