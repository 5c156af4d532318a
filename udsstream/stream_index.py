"""`index.json` of a stream (Streaming's format, version 2): read without trust, and a shard's file held against it.

Knows no Streaming: the index is read with `json`, files as bytes. What a shard's rows mean is not its matter. Names of files are kept
only when they stay within the stream's folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from udsstream.errors import DataError
from udsstream.plain_files import pieces

__all__ = [
    "INDEX",
    "INDEX_LIMIT",
    "WEBDATASET_INDEX",
    "FileCheck",
    "Shard",
    "ShardFile",
    "check_file",
    "parse_index",
]

INDEX = "index.json"
WEBDATASET_INDEX = "udsstream-index.json"
"""Of a folder of tar shards, in the same form (`udsstream/mosaicml/webdataset_index.py` writes it)."""
INDEX_LIMIT = 1 << 30
_FILES = ("raw_data", "raw_meta")


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """A file of a shard, as the index describes it."""

    name: str
    size: int
    hashes: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard, as the index describes it: each file raw, and compressed if it is that too."""

    samples: int
    files: tuple[tuple[ShardFile, ShardFile | None], ...]
    entry: Mapping[str, Any]
    """The whole of the index's object, of which nothing else was checked."""


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """What comparing a file with the index gave."""

    wrong: str | None
    """What is wrong with it, in words that begin with its path; None: nothing was found."""
    digested: bool
    """Whether a recorded digest of its content was computed. Only then does "nothing" mean more than its size."""
    unknown: tuple[str, ...] = ()
    """Algorithms of recorded digests that this Python does not have."""


def parse_index(data: bytes) -> list[Shard]:
    """The shards of an index; DataError when it is none that Streaming writes."""

    def fail(what: str) -> DataError:
        return DataError(f"it is no index of Streaming, version 2: {what}")

    def file_of(value: Any) -> ShardFile:
        hashes = value.get("hashes", {}) if isinstance(value, dict) else None
        if not (
            isinstance(value, dict)
            and isinstance(value.get("basename"), str)
            and isinstance(value.get("bytes"), int)
            and isinstance(hashes, dict)
            and all(isinstance(item, str) for pair in hashes.items() for item in pair)
        ):
            raise fail("a shard's file has no basename, bytes or hashes")
        name = PurePosixPath(value["basename"])
        if name.is_absolute() or ".." in name.parts or not name.parts or "\0" in str(name):
            raise fail(f"a shard lies at {value['basename']!r}, outside of its stream's folder")
        return ShardFile(name=str(name), size=value["bytes"], hashes=hashes)

    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise fail(str(error)) from error
    if not isinstance(content, dict) or content.get("version") != 2 or not isinstance(content.get("shards"), list):
        raise fail("it has no version 2 or no list of shards")
    shards = []
    for item in content["shards"]:
        samples = item.get("samples") if isinstance(item, dict) else None
        if not isinstance(samples, int) or isinstance(samples, bool) or not 0 <= samples < 1 << 40:
            raise fail("a shard has no number of samples")
        pairs = []
        for raw in _FILES:
            if item.get(raw) is not None:
                zipped = item.get(raw.replace("raw", "zip"))
                pairs.append((file_of(item[raw]), None if zipped is None else file_of(zipped)))
        if not pairs:
            raise fail("a shard has no raw_data")
        shards.append(Shard(samples=samples, files=tuple(pairs), entry=item))
    return shards


def check_file(folder: Path, file: ShardFile) -> FileCheck:
    """Holds a file's size and content against the index; it is read once, a piece at a time."""
    path = folder / file.name
    digests: dict[str, Any] = {}
    unknown = []
    for name in file.hashes:
        digest = _hasher(name)
        if digest is None:
            unknown.append(name)
        else:
            digests[name] = digest
    size = 0
    try:
        for piece in pieces(path, None):
            size += len(piece)
            for digest in digests.values():
                digest.update(piece)
    except OSError as error:
        return FileCheck(
            wrong=f"{path} cannot be read ({error.strerror or error})", digested=True, unknown=tuple(unknown)
        )
    wrong = None
    if size != file.size:
        wrong = f"{path} has {size} bytes, but the index records {file.size}"
    else:
        for name, digest in digests.items():
            if digest.hexdigest() != file.hashes[name]:
                wrong = (
                    f"{path} has the {name} {digest.hexdigest()[:16]}…, but the index records {file.hashes[name][:16]}…"
                )
                break
    return FileCheck(wrong=wrong, digested=wrong is not None or bool(digests), unknown=tuple(unknown))


def _hasher(name: str) -> Any:
    """An object with update and hexdigest; None when there is none of that name."""
    if name in hashlib.algorithms_available and not name.startswith("shake"):
        return hashlib.new(name, usedforsecurity=False)
    if name in ("xxh32", "xxh64", "xxh128", "xxh3_64", "xxh3_128"):
        try:
            import xxhash
        except ImportError:
            return None
        make: Callable[[], Any] = getattr(xxhash, name)
        return make()
    return None
