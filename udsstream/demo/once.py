"""A folder that takes a while to make is made once, whole or not at all.

Owns the marker file, the lock and the swap that the demo's data set and model share. A build goes into a hidden sibling
(`.NAME.building`), gets its marker last and takes its name by a rename, so that a folder under its own name is complete;
what an interrupted build left is removed by the next. Builders of the same folder wait for each other (`.NAME.lock`).

A finished folder is checked by its files' names and sizes: a changed byte is not seen here (shards carry hashes for
that). Needs `fcntl`, so no Windows, where Composer does not run either.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from udsstream.errors import ConfigError

__all__ = ["build_once"]


def build_once(
    out: Path, *, marker: str, key: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]]
) -> tuple[dict[str, Any], bool]:
    """The report that `build` returned for `out`, and whether it was reused rather than made now.

    `build` fills the empty folder that it is given. It is called when `out` is not there, when its marker holds another
    `key`, or when one of its files is missing or of another size. `key` and the report are JSON objects; both are kept
    in the file `marker` inside `out`, beside the list of files.

    Raises `ConfigError` when `out` is a file, or a folder that holds anything that no build put there: nothing of the
    user's is ever deleted.
    """
    out = Path(os.path.abspath(out))
    key = json.loads(json.dumps(key))
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.parent / f".{out.name}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by a kill
        building, old = (out.parent / f".{out.name}.{suffix}" for suffix in ("building", "old"))
        for leftover in (building, old):
            shutil.rmtree(leftover, ignore_errors=True)
        found = _read_marker(out, marker)
        if found is not None and found["key"] == key and found["files"] == _files(out, marker):
            return found["report"], True
        _refuse_what_is_not_ours(out, found, marker)

        building.mkdir()
        report = json.loads(json.dumps(build(building)))
        with open(building / marker, "w", encoding="utf-8") as file:
            json.dump({"key": key, "report": report, "files": _files(building, marker)}, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        if out.exists():
            os.replace(out, old)
        os.replace(building, out)
        shutil.rmtree(old, ignore_errors=True)
        return report, False


def _files(folder: Path, marker: str) -> dict[str, int]:
    """Bytes of each file below `folder`, by its relative path, without the marker."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path != folder / marker)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _read_marker(out: Path, marker: str) -> dict[str, Any] | None:
    try:
        found = json.loads((out / marker).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and all(isinstance(found.get(name), dict) for name in ("key", "report", "files"))
    return found if whole else None


def _refuse_what_is_not_ours(out: Path, found: Mapping[str, Any] | None, marker: str) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, but a folder is to be made there; choose another path")
    strange = sorted(set(_files(out, marker)) - set(found["files"] if found else {}))
    if strange:
        kind = f"has a {marker} of another build" if found else f"has no readable {marker}"
        shown = ", ".join(strange[:3]) + (f" and {len(strange) - 3} more" if len(strange) > 3 else "")
        raise ConfigError(
            f"{out} {kind} and holds files that udsstream did not put there ({shown}); they would be lost: move them, "
            "delete the folder yourself, or choose another path"
        )
