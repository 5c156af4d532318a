"""The manifest of one journal: a line of JSON for each attempt, each sealed segment, and each clean end.

Lines are only ever appended. Each is canonical JSON (sorted keys, no spaces, ASCII) and carries a check over itself, so that
a line is either what was written or recognisably not. The lines form the journal's chain from its genesis on; `check_lines`
recomputes what can be known without opening a segment. Names of files are derived, never taken from a line.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from udsstream.errors import LogCorruptError
from udsstream.selection_log import layout
from udsstream.selection_log.digest import ATTEMPTS, attempt_link, genesis
from udsstream.selection_log.files import append_all, read_small

__all__ = [
    "AttemptLine",
    "ClosedLine",
    "Line",
    "Manifest",
    "SegmentLine",
    "append_line",
    "canonical_json",
    "checked_json",
    "parse_checked_json",
    "read_manifest",
]

MANIFEST_LIMIT = 64 << 20
_CHECK_LENGTH = 16
_SHA256 = re.compile(r"[0-9a-f]{64}")


def canonical_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def checked_json(value: Mapping[str, Any]) -> bytes:
    """Canonical JSON of `value` with a check over itself in the key "check"."""
    check = hashlib.sha256(canonical_json(value)).hexdigest()[:_CHECK_LENGTH]
    return canonical_json({**value, "check": check})


def parse_checked_json(data: bytes) -> dict[str, Any]:
    """The inverse; ValueError unless `data` is byte for byte what `checked_json` gives."""
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict) or "check" not in value:
        raise ValueError("not an object with a check")
    without = {key: item for key, item in value.items() if key != "check"}
    if checked_json(without) != data:
        raise ValueError("the check does not agree with the content")
    return without


@dataclass(frozen=True, kw_only=True)
class AttemptLine:
    """The run was started (attempt 0) or resumed at `from_step`, continuing the attempt `parent`."""

    kind: ClassVar[str] = "attempt"
    attempt: int
    from_step: int
    parent: int | None  # None: it continues nothing, or this rank had no part in what it continues
    writer: str  # library and version that encodes the rows
    head: str  # the chain after this line, hex


@dataclass(frozen=True, kw_only=True)
class SegmentLine:
    """A sealed segment."""

    kind: ClassVar[str] = "segment"
    segment: int
    attempt: int
    file: str  # for people; it must equal the derived name
    rows: int
    batches: int
    first_step: int
    last_step: int
    bytes: int  # size of the file
    sha256: str  # of the file's bytes
    prev: str  # the chain before and after its batches, hex
    head: str


@dataclass(frozen=True, kw_only=True)
class ClosedLine:
    """The writer was closed in order; nothing was left in a write-ahead file."""

    kind: ClassVar[str] = "closed"
    attempt: int
    head: str


Line = AttemptLine | SegmentLine | ClosedLine

_TYPES: dict[str, dict[str, tuple[type, ...]]] = {
    "attempt": {"attempt": (int,), "from_step": (int,), "parent": (int, type(None)), "writer": (str,), "head": (str,)},
    "segment": {
        **dict.fromkeys(("segment", "attempt", "rows", "batches", "first_step", "last_step", "bytes"), (int,)),
        **dict.fromkeys(("file", "sha256", "prev", "head"), (str,)),
    },
    "closed": {"attempt": (int,), "head": (str,)},
}


def encode_line(line: Line) -> bytes:
    return checked_json({"kind": line.kind, **asdict(line)}) + b"\n"


def decode_line(data: bytes) -> Line:
    """ValueError when the bytes are no line that `encode_line` gives."""
    value = parse_checked_json(data)
    kind = value.pop("kind", None)
    types = _TYPES.get(kind) if isinstance(kind, str) else None
    if types is None:
        raise ValueError(f"a line of unknown kind {kind!r}")
    if value.keys() != types.keys():
        raise ValueError(f"a line of kind {kind} with the fields {sorted(value)}")
    for name, allowed in types.items():
        item = value[name]
        if not isinstance(item, allowed) or isinstance(item, bool):
            raise ValueError(f"the field {name} is {item!r}")
        if isinstance(item, int) and not -1 <= item < 1 << 62:
            raise ValueError(f"the field {name} is out of range")
        if name in ("head", "prev", "sha256") and not _SHA256.fullmatch(str(item)):
            raise ValueError(f"the field {name} is no SHA-256 in hex")
    return {"attempt": AttemptLine, "segment": SegmentLine, "closed": ClosedLine}[kind](**value)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a manifest says, its chain checked from the genesis to the last line."""

    lines: tuple[Line, ...]
    head: bytes  # the chain after the last line
    next_segment: int
    size: int  # bytes of the good lines
    torn: int  # bytes after them: a line that was being written, or damage

    @property
    def attempts(self) -> list[AttemptLine]:
        return [line for line in self.lines if isinstance(line, AttemptLine)]

    @property
    def segments(self) -> list[SegmentLine]:
        return [line for line in self.lines if isinstance(line, SegmentLine)]

    @property
    def last_attempt(self) -> AttemptLine | None:
        attempts = self.attempts
        return attempts[-1] if attempts else None

    @property
    def closed(self) -> bool:
        return bool(self.lines) and isinstance(self.lines[-1], ClosedLine)


def read_manifest(root: Path, table: str, rank: int, run_sha256: bytes) -> Manifest:
    """Read and check a journal's manifest; a missing file is one without lines."""
    path = layout.manifest_path(root, table, rank)
    start = genesis(table, rank, run_sha256)
    try:
        data = read_small(path, MANIFEST_LIMIT)
    except FileNotFoundError:
        data = b""
    raw = data.split(b"\n")
    good = 0
    lines: list[Line] = []
    for number, item in enumerate(raw[:-1], 1):
        try:
            lines.append(decode_line(item))
        except ValueError as error:
            # Only the end of a file can be torn; anything after the line shows that it was once whole.
            if number < len(raw) - 1 or raw[-1].strip(b"\0"):
                raise LogCorruptError(
                    f"rank {rank}: {path}, line {number}: {error}. The manifest was changed or damaged after it was "
                    "written; restore it from a copy."
                ) from error
            break
        good += len(item) + 1
    head, segment = _check_lines(root, table, rank, path, lines, start)
    return Manifest(lines=tuple(lines), head=head, next_segment=segment, size=good, torn=len(data) - good)


def _check_lines(root: Path, table: str, rank: int, path: Path, lines: list[Line], head: bytes) -> tuple[bytes, int]:
    """The chain after the lines and the next segment's number; LogCorruptError at the first line that does not follow."""
    segment, attempt = 0, -1
    for number, line in enumerate(lines, 1):
        wrong = None
        if isinstance(line, AttemptLine):
            if line.attempt <= attempt or (line.parent is not None and not 0 <= line.parent < line.attempt):
                wrong = f"attempt {line.attempt} continuing {line.parent} comes after attempt {attempt}"
            elif line.attempt >= ATTEMPTS or line.head != _after(head, line):
                wrong = f"attempt {line.attempt} does not follow from the line before it"
            attempt = line.attempt
        elif isinstance(line, SegmentLine):
            expected = layout.segment_path(root, table, rank, line.attempt, line.segment).relative_to(root).as_posix()
            if line.attempt != attempt or line.segment != segment:
                wrong = f"segment {line.segment} of attempt {line.attempt}, expected {segment} of attempt {attempt}"
            elif line.file != expected:
                wrong = f"it names the file {line.file!r}, expected {expected!r}"
            elif line.prev != head.hex():
                wrong = f"segment {line.segment} does not follow from the line before it"
            elif not (0 < line.batches <= line.rows and line.first_step <= line.last_step):
                wrong = f"segment {line.segment} has an impossible number of rows or steps"
            segment += 1
        elif line.attempt != attempt or line.head != head.hex():
            wrong = "the log was closed at another place than this line stands at"
        if wrong:
            raise LogCorruptError(
                f"rank {rank}: {path}, line {number}: {wrong}. A line was changed, dropped or reordered; restore the "
                "manifest from a copy."
            )
        if not isinstance(line, ClosedLine):
            head = bytes.fromhex(line.head)
    return head, segment


def _after(head: bytes, line: AttemptLine) -> str:
    return attempt_link(head, line.attempt, line.from_step, line.parent).hex()


def append_line(root: Path, table: str, rank: int, line: Line) -> None:
    """Append a line durably. OSError passes through."""
    fd = os.open(layout.manifest_path(root, table, rank), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        append_all(fd, encode_line(line))
        os.fsync(fd)
    finally:
        os.close(fd)
