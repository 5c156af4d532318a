"""Is the data still the data: the streams' indexes against run.json, their shards against the indexes, the samples against both.

Reads indexes by `udsstream/stream_index.py` and shards as bytes; decodes no sample. Paths come from run.json
or the command line and, within a stream's folder, from its index: nothing outside of that folder is opened.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from udsstream.audit.report import Finding, Ledger
from udsstream.audit.rows import Decisions
from udsstream.audit.settings import RunFacts, StreamFacts
from udsstream.errors import ConfigError, DataError
from udsstream.plain_files import pieces
from udsstream.stream_index import (
    INDEX,
    INDEX_LIMIT,
    WEBDATASET_INDEX,
    Shard,
    ShardFile,
    check_file,
    parse_index,
)

__all__ = ["check_data"]


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
        if stream.format == "rows":
            ledger.skip(
                f"the data of {stream.name}: its rows were read from a data set of the format rows, which has no shards with digests"
            )
        elif "://" in location:
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
    index = folder / (WEBDATASET_INDEX if stream.format == "webdataset" else INDEX)
    try:
        data = b"".join(pieces(index, INDEX_LIMIT))
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
        shards = parse_index(data)
    except DataError as error:
        ledger.find(Finding(check="data-index", message=f"{where}: {index}: {error}"))
        return 0
    _check_samples(rows, mine, first, stream, where, shards, ledger)
    return _check_shards(rows, mine, first, where, folder, shards, ledger)


def _check_samples(
    rows: Decisions, mine: np.ndarray, first: int, stream: StreamFacts, where: str, shards: list[Shard], ledger: Ledger
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
    rows: Decisions, mine: np.ndarray, first: int, where: str, folder: Path, shards: list[Shard], ledger: Ledger
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


def _check_file(folder: Path, raw: ShardFile, zipped: ShardFile | None, ledger: Ledger) -> tuple[str | None, bool]:
    """What is wrong with a shard's file, the compressed one if the raw one is not there; and whether its content was digested."""
    found = check_file(folder, raw if zipped is None or os.path.lexists(folder / raw.name) else zipped)
    for name in found.unknown:
        ledger.skip(
            f"digests by {name[:40]!r} of shards: this Python has no such algorithm (xxh… needs the package xxhash)"
        )
    return found.wrong, found.digested
