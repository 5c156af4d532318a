"""Is the data still the data: the streams' indexes against run.json, their shards against the indexes, the samples against both.

Reads MDS, JSON and CSV indexes of Streaming (version 2) with `json` and the shards as bytes; decodes no sample. Paths come from run.json
or the command line and, within a stream's folder, from its index: nothing outside of that folder is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from udsstream.audit.report import Finding, Ledger
from udsstream.audit.rows import Decisions
from udsstream.audit.settings import RunFacts, StreamFacts
from udsstream.errors import ConfigError, DataError

__all__ = ["check_data"]

_INDEX_LIMIT = 1 << 30
_CHUNK = 1 << 20
_FILES = ("raw_data", "raw_meta")


@dataclass(frozen=True, kw_only=True)
class _ShardFile:
    """A file of a shard, as the index describes it."""

    name: str
    size: int
    hashes: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """A shard, as the index describes it: each file raw, and compressed if it is that too."""

    samples: int
    files: tuple[tuple[_ShardFile, _ShardFile | None], ...]


def check_data(rows: Decisions, facts: RunFacts, streams: Mapping[str, str], ledger: Ledger) -> None:
    """Compares what lies in the streams' folders.

    Raises:
        ConfigError: `streams` names a stream that run.json does not.
    """
    if facts.streams is None:
        ledger.skip("the data: run.json names no streams")
        return
    known = [stream.name for stream in facts.streams]
    if unknown := sorted(set(streams) - set(known)):
        raise ConfigError(f"--stream {unknown[0]}: run.json names no such stream; it has {', '.join(known)}")
    first, looked_at, files = 0, 0, 0
    for number, stream in enumerate(facts.streams):
        mine = np.flatnonzero((rows["sample_id"] >= first) & (rows["sample_id"] < first + stream.samples))
        location = streams.get(stream.name, stream.location)
        if "://" in location:
            ledger.skip(
                f"the data of stream {stream.name}: it is at {location}; give a local copy with --stream {stream.name}=PATH"
            )
        else:
            files += _check_stream(rows, mine, number, first, stream, Path(location), ledger)
            looked_at += 1
        first += stream.samples
    if looked_at:
        ledger.check(
            f"data-index, data-shards, data-samples: {looked_at:,} of {len(facts.streams):,} streams, their indexes and the {files:,} "
            "shard files that samples were offered from"
        )


def _check_stream(
    rows: Decisions, mine: np.ndarray, number: int, first: int, stream: StreamFacts, folder: Path, ledger: Ledger
) -> int:
    """How many shard files were looked at."""
    where = f"stream {number} ({stream.name})"
    index = folder / "index.json"
    try:
        data = b"".join(_pieces(index, _INDEX_LIMIT))
    except OSError as error:
        hint = f"its data moved? give --stream {stream.name}=PATH"
        message = f"{where}: {index} cannot be read ({error.strerror or error}); {hint}"
        ledger.find(Finding(check="data-index", message=message))
        return 0
    found = hashlib.sha256(data).hexdigest()
    if found != stream.index_sha256:
        message = (
            f"{where}: {index} has the SHA-256 {found[:16]}…, but the run was made with {stream.index_sha256[:16]}…: the stream was "
            "rebuilt, or its index was edited"
        )
        ledger.find(Finding(check="data-index", message=message))
    try:
        shards = _parse(data)
    except DataError as error:
        ledger.find(Finding(check="data-index", message=f"{where}: {index}: {error}"))
        return 0
    _check_samples(rows, mine, first, stream, where, shards, ledger)
    return _check_shards(rows, mine, first, where, folder, shards, ledger)


def _parse(data: bytes) -> list[_Shard]:
    """The shards of an index; DataError when it is none that Streaming writes."""

    def fail(what: str) -> DataError:
        return DataError(f"it is no index of Streaming, version 2: {what}")

    def file_of(value: Any) -> _ShardFile:
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
        return _ShardFile(name=str(name), size=value["bytes"], hashes=hashes)

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
        shards.append(_Shard(samples=samples, files=tuple(pairs)))
    return shards


def _check_samples(
    rows: Decisions, mine: np.ndarray, first: int, stream: StreamFacts, where: str, shards: list[_Shard], ledger: Ledger
) -> None:
    """Every offered sample exists, where the log says that it lies."""
    ends = np.cumsum([shard.samples for shard in shards]) if shards else np.zeros(1, np.int64)
    if int(ends[-1]) != stream.samples:
        message = f"{where}: its index has {ends[-1]} samples, but run.json says {stream.samples}"
        ledger.find(Finding(check="data-index", message=message))
    within = rows["sample_id"][mine] - first
    shard = np.searchsorted(ends, within, side="right")
    index = within - np.append(0, ends)[np.minimum(shard, len(ends))]
    gone = shard >= len(shards)
    named = rows["has_shard"][mine] & rows["has_shard_index"][mine]
    moved = ~gone & named & ((rows["shard"][mine] != shard) | (rows["shard_index"][mine] != index))

    def found(i: int, what: str) -> Finding:
        row = mine[i]
        return Finding(
            check="data-samples",
            step=int(rows["step"][row]),
            rank=int(rows["rank"][row]),
            sample_id=int(rows["sample_id"][row]),
            row=int(rows["position"][row]),
            message=f"step {rows['step'][row]}: sample {rows['sample_id'][row]} {what}",
        )

    ledger.find_each("data-samples", np.flatnonzero(gone), lambda i: found(i, f"does not exist in {where}"))
    ledger.find_each(
        "data-samples",
        np.flatnonzero(moved),
        lambda i: found(
            i,
            f"is logged as row {rows['shard_index'][mine[i]]} of shard {rows['shard'][mine[i]]}, but by the index of {where} it is row "
            f"{index[i]} of shard {shard[i]}",
        ),
    )


def _check_shards(
    rows: Decisions, mine: np.ndarray, first: int, where: str, folder: Path, shards: list[_Shard], ledger: Ledger
) -> int:
    """The files of all shards that a sample was offered from; how many these are."""
    ends = np.cumsum([shard.samples for shard in shards]) if shards else np.zeros(1, np.int64)
    of_row = np.searchsorted(ends, rows["sample_id"][mine] - first, side="right")
    used, first_use, uses = np.unique(of_row, return_index=True, return_counts=True)
    checked = unhashed = 0
    for number, at, count in zip(used.tolist(), first_use.tolist(), uses.tolist(), strict=True):
        if number >= len(shards):
            continue
        row = mine[at]
        for raw, zipped in shards[number].files:
            wrong, hashed = _check_file(folder, raw, zipped, ledger)
            checked += 1
            unhashed += not hashed
            if wrong is not None:
                message = f"{where}, shard {number}: {wrong}. {count} candidates came from it, the first at step {rows['step'][row]}"
                ledger.find(
                    Finding(
                        check="data-shards",
                        step=int(rows["step"][row]),
                        sample_id=int(rows["sample_id"][row]),
                        message=message,
                    )
                )
    if unhashed:
        ledger.skip(
            f"the content of {unhashed} shard files of {where}: no digest that could be computed here is recorded for them, only sizes"
        )
    return checked


def _check_file(folder: Path, raw: _ShardFile, zipped: _ShardFile | None, ledger: Ledger) -> tuple[str | None, bool]:
    """What is wrong with a shard's file, the compressed one if the raw one is not there; and whether its content was digested."""
    file = raw if zipped is None or os.path.lexists(folder / raw.name) else zipped
    path = folder / file.name
    digests: dict[str, Any] = {}
    for name in file.hashes:
        digest = _hasher(name)
        if digest is None:
            ledger.skip(
                f"digests by {name[:40]!r} of shards: this Python has no such algorithm (xxh… needs the package xxhash)"
            )
        else:
            digests[name] = digest
    size = 0
    try:
        for piece in _pieces(path, None):
            size += len(piece)
            for digest in digests.values():
                digest.update(piece)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error})", True
    if size != file.size:
        return f"{path} has {size} bytes, but the index records {file.size}", True
    for name, digest in digests.items():
        if digest.hexdigest() != file.hashes[name]:
            return (
                f"{path} has the {name} {digest.hexdigest()[:16]}…, but the index records {file.hashes[name][:16]}…",
                True,
            )
    return None, bool(digests)


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


def _pieces(path: Path, limit: int | None) -> Iterator[bytes]:
    """The bytes of a regular file, a piece at a time; OSError for anything else, or for more than `limit`."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError("it is not a regular file")
        if limit is not None and info.st_size > limit:
            raise OSError(f"it has {info.st_size} bytes, more than the {limit} of any index")
        while piece := os.read(fd, _CHUNK):
            yield piece
    finally:
        os.close(fd)
