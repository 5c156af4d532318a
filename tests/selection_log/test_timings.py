"""The times beside the log: what is read is what was written, torn and repeated lines included."""

from __future__ import annotations

import os

import numpy as np
import pytest

from udsstream.errors import LogCorruptError
from udsstream.selection_log.timings import TIMINGS, TimingsWriter, read_timings


def write(root, steps, seconds=1.0):
    writer = TimingsWriter(root)
    for step in steps:
        writer.append(step, step_seconds=seconds, selection_seconds=seconds / 4, log_seconds=seconds / 100)
    writer.close()
    writer.close()


def test_what_is_read_is_what_was_written(tmp_path):
    write(tmp_path, [0, 1, 2])
    found = read_timings(tmp_path)
    assert found["step"].tolist() == [0, 1, 2]
    assert [found[name].tolist() for name in TIMINGS] == [[1.0] * 3, [0.25] * 3, [0.01] * 3]


def test_a_step_that_a_resumed_run_repeated_has_its_last_time(tmp_path):
    write(tmp_path, [0, 1, 2])
    write(tmp_path, [1, 2, 3], seconds=2.0)
    found = read_timings(tmp_path)
    assert found["step"].tolist() == [0, 1, 2, 3]
    assert found["step_seconds"].tolist() == [1.0, 2.0, 2.0, 2.0]


def test_a_torn_line_costs_that_line_alone(tmp_path):
    write(tmp_path, [0, 1])
    path = tmp_path / "timings.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert read_timings(tmp_path)["step"].tolist() == [0]
    write(tmp_path, [5])
    assert read_timings(tmp_path)["step"].tolist() == [0, 5]


def test_without_a_file_there_are_no_times(tmp_path):
    found = read_timings(tmp_path)
    assert all(len(found[name]) == 0 for name in ("step", *TIMINGS))
    assert found["step"].dtype == np.int64


@pytest.mark.parametrize("line", ["{}", '{"step":1}', '{"step":"x","step_seconds":1}', '{"step":[1]}', "{nonsense}"])
def test_a_whole_line_of_something_else_is_named(tmp_path, line):
    (tmp_path / "timings.jsonl").write_text(
        '{"step":0,"step_seconds":1,"selection_seconds":1,"log_seconds":1}\n' + line + "\n"
    )
    with pytest.raises(LogCorruptError, match=r"timings.jsonl, line 2: "):
        read_timings(tmp_path)


@pytest.mark.parametrize("step", ["1e999", "9" * 23, "-1", '{"a":' * 100_000 + "1" + "}" * 100_000])
def test_numbers_that_are_none_are_named(tmp_path, step):
    (tmp_path / "timings.jsonl").write_text(
        f'{{"step":{step},"step_seconds":1,"selection_seconds":1,"log_seconds":1}}\n'
    )
    with pytest.raises(LogCorruptError, match=r"timings.jsonl, line 1: holds no step"):
        read_timings(tmp_path)


def test_seconds_beyond_any_number(tmp_path):
    text = f'{{"step":0,"step_seconds":{"9" * 400},"selection_seconds":1,"log_seconds":1}}\n'
    (tmp_path / "timings.jsonl").write_text(text)
    with pytest.raises(LogCorruptError, match=r"timings.jsonl, line 1: holds no step"):
        read_timings(tmp_path)


def test_what_is_no_file_or_too_large_is_not_read(tmp_path):
    path = tmp_path / "timings.jsonl"
    os.mkfifo(path)
    with pytest.raises(LogCorruptError, match=r"timings.jsonl is not a regular file"):
        read_timings(tmp_path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(LogCorruptError, match=r"timings.jsonl has \d+ bytes; at most"):
        read_timings(tmp_path)
