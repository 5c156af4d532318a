"""Names of files and folders in a log, and nothing else: no file is opened here, and no name is ever read from a file.

    run.json                                     what the run is; never rewritten
    selection/r00003/a0-000017.arrow             sealed segments: table / rank / attempt - segment
    pushes/r00003/a0-000017.arrow
    _state/r00003/lock                           held by the rank's writer
    _state/r00003/selection/manifest.jsonl       one line per attempt and per sealed segment
    _state/r00003/selection/wal-000018.arrows    write-ahead files, not yet sealed
    _state/r00003/selection/torn-000018.arrows   a write-ahead file with a damaged end, set aside by a recovery
    _heads/ba00012000.json                       the ranks' heads at a checkpoint
    _buffers/ba00012000-a0.arrow                 the memory's vectors at a checkpoint (mode "tail")
    timings.jsonl                                what each step took; no digest covers it
    parquet/                                     derived, may be rebuilt

pyarrow.dataset ignores folders with a leading underscore, so that `selection/` and `pushes/` alone look like data to it.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = [
    "OUR_NAMES",
    "buffer_path",
    "free_torn_path",
    "heads_path",
    "journal_dir",
    "lock_path",
    "manifest_path",
    "old_heads_path",
    "parquet_dir",
    "rank_dir",
    "ranks",
    "run_path",
    "segment_path",
    "timings_path",
    "torn_files",
    "wal_numbers",
    "wal_path",
]

OUR_NAMES = ("run.json", "selection", "pushes", "_state", "_heads", "_buffers")

_RANK = re.compile(r"r(\d{5})")
_WAL = re.compile(r"wal-(\d{6,})\.arrows")


def run_path(root: Path) -> Path:
    return root / "run.json"


def rank_dir(root: Path, rank: int) -> Path:
    return root / "_state" / f"r{rank:05d}"


def lock_path(root: Path, rank: int) -> Path:
    return rank_dir(root, rank) / "lock"


def journal_dir(root: Path, table: str, rank: int) -> Path:
    return rank_dir(root, rank) / table


def manifest_path(root: Path, table: str, rank: int) -> Path:
    return journal_dir(root, table, rank) / "manifest.jsonl"


def wal_path(root: Path, table: str, rank: int, segment: int) -> Path:
    return journal_dir(root, table, rank) / f"wal-{segment:06d}.arrows"


def free_torn_path(root: Path, table: str, rank: int, segment: int) -> Path:
    """A name, not yet taken, under which a damaged write-ahead file is set aside."""
    folder = journal_dir(root, table, rank)
    path, count = folder / f"torn-{segment:06d}.arrows", 0
    while path.exists():
        count += 1
        path = folder / f"torn-{segment:06d}.{count}.arrows"
    return path


def torn_files(root: Path, table: str, rank: int) -> list[Path]:
    """The write-ahead files that recoveries have set aside."""
    folder = journal_dir(root, table, rank)
    return sorted(folder.glob("torn-*.arrows")) if folder.is_dir() else []


def segment_path(root: Path, table: str, rank: int, attempt: int, segment: int) -> Path:
    return root / table / f"r{rank:05d}" / f"a{attempt}-{segment:06d}.arrow"


def heads_path(root: Path, step: int) -> Path:
    return root / "_heads" / f"ba{step:08d}.json"


def old_heads_path(root: Path, step: int, attempt: int) -> Path:
    """Where the heads of a superseded attempt go when a later one reaches the same step."""
    return root / "_heads" / f"ba{step:08d}-a{attempt}.json"


def buffer_path(root: Path, step: int, attempt: int) -> Path:
    return root / "_buffers" / f"ba{step:08d}-a{attempt}.arrow"


def timings_path(root: Path) -> Path:
    return root / "timings.jsonl"


def parquet_dir(root: Path) -> Path:
    return root / "parquet"


def ranks(root: Path) -> list[int]:
    """The ranks that have a folder, ascending."""
    state = root / "_state"
    if not state.is_dir():
        return []
    return sorted(int(m[1]) for entry in state.iterdir() if (m := _RANK.fullmatch(entry.name)))


def wal_numbers(root: Path, table: str, rank: int) -> list[int]:
    """The segment numbers of the write-ahead files that are there, ascending."""
    folder = journal_dir(root, table, rank)
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for entry in folder.iterdir() if (m := _WAL.fullmatch(entry.name)))
