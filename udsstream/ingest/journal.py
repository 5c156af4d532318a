"""What an ingest has finished, and which rows were refused: the two files that it is resumed from.

`journal.jsonl` has a line for each finished shard, appended once the shard and the rejects before it are durable. A line that a kill tore
off is dropped, with its shard. `rejects.jsonl` is in the order of the source, and is cut back to the place that reading begins again from.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from udsstream.errors import OutputExistsError
from udsstream.ingest.readers import Position
from udsstream.ingest.shards import FinishedShard
from udsstream.job_folder import sync_file, write_errors

__all__ = ["REJECTS", "Journal", "Rejects"]

REJECTS = "rejects.jsonl"
_JOURNAL = "journal.jsonl"


class _Lines:
    """A file of lines that is appended to."""

    def __init__(self, path: Path, keep: int) -> None:
        self._path = path
        with write_errors(path):
            new = not path.exists()
            self._file: BinaryIO = open(path, "ab", buffering=0)  # noqa: SIM115 (held)
            self._file.truncate(keep)
        if new:
            sync_file(path.parent)

    def append(self, lines: list[dict[str, Any]]) -> None:
        data = b"".join(
            json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n" for line in lines
        )
        with write_errors(self._path):
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) or 0 :]

    def sync(self) -> None:
        with write_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _read(path: Path) -> list[tuple[dict[str, Any], int]]:
    """The whole lines of a file, each with where it ends; from the first torn one on there are none."""
    found: list[tuple[dict[str, Any], int]] = []
    end = 0
    if path.exists():
        with open(path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    value = json.loads(line)
                except ValueError:
                    break
                end += len(line)
                found.append((value, end))
    return found


def _shard(line: dict[str, Any]) -> FinishedShard:
    fields: dict[str, Any] = line | {"resume": Position(*line["resume"])}
    return FinishedShard(**fields)


class Journal:
    """The finished shards, oldest first."""

    def __init__(self, work: Path) -> None:
        path = work / _JOURNAL
        lines = _read(path)
        try:
            self.finished = [_shard(line) for line, _ in lines]
        except (TypeError, KeyError) as error:
            raise OutputExistsError(
                f"{path} is not the journal of this version of udsstream ({error}): delete {work} to begin anew"
            ) from None
        self._lines = _Lines(path, lines[-1][1] if lines else 0)

    def append(self, shard: FinishedShard) -> None:
        self._lines.append([asdict(shard)])
        self._lines.sync()
        self.finished.append(shard)

    def close(self) -> None:
        self._lines.close()


class Rejects:
    """The refused rows, in order; the file is made with the first."""

    def __init__(self, work: Path, resume: Position) -> None:
        self.path = work / REJECTS
        kept = [(line, end) for line, end in _read(self.path) if line["row"] <= resume.unit]
        self.count = len(kept)
        self.first = [line for line, _ in kept[:3]]
        self._lines: _Lines | None = None
        self._dirty = False
        if kept:
            self._lines = _Lines(self.path, kept[-1][1])
        else:
            self.path.unlink(missing_ok=True)

    def add(self, rejects: list[dict[str, Any]]) -> None:
        if not rejects:
            return
        if self._lines is None:
            self._lines = _Lines(self.path, 0)
        self._lines.append(rejects)
        self._dirty = True
        self.count += len(rejects)
        self.first += rejects[: 3 - len(self.first)]

    def sync(self) -> None:
        if self._lines is not None and self._dirty:
            self._lines.sync()
            self._dirty = False

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
