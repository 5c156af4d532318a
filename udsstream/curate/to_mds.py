"""Samples as MDS shards: the source's columns byte for byte, through Streaming's MDSWriter. MDS has no empty value: NaN stands for it."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from udsstream.curate.columns import Column
from udsstream.curate.formats import Compression, Row
from udsstream.job_folder import replace_file
from udsstream.stream_index import INDEX

__all__ = ["HASHES", "check", "finish", "write"]

HASHES = ["sha1", "xxh64"]
"""Digests of each shard in the index; Streaming checks them on request (`validate_hash`)."""

_NAN = {4: struct.pack("<f", float("nan")), 8: struct.pack("<d", float("nan"))}


def check(columns: Sequence[Column]) -> None:
    """It holds whatever a source of MDS can hold."""
    del columns


def write(path: Path, columns: Sequence[Column], rows: Iterable[Row], compression: Compression) -> dict[str, Any]:
    """Writes one shard; its object for the index."""
    from streaming import MDSWriter

    folder = path.with_name(f"{path.name}.d")
    shutil.rmtree(folder, ignore_errors=True)
    names = [column.name for column in columns]
    missing = [_NAN[column.size or 4] if column.size in _NAN else b"" for column in columns]
    kind = None if compression.kind == "none" else str(compression)
    encodings = {column.name: column.encoding for column in columns}
    # `write` takes what is bytes already as it is (`mds_encode`), so that this is a copy.
    writer = MDSWriter(out=str(folder), columns=encodings, compression=kind, hashes=HASHES, size_limit=None)
    with writer:
        for row in rows:
            pairs = zip(names, row.values, missing, strict=True)
            writer.write({name: empty if value is None else value for name, value, empty in pairs})
    (entry,) = json.loads((folder / INDEX).read_bytes())["shards"]
    number = path.name.lstrip(".").split(".")[1]  # of shard.00017.mds, or of a hidden name for it
    os.replace(folder / (entry["zip_data"] or entry["raw_data"])["basename"], path)
    for part in ("raw_data", "zip_data"):
        if entry[part] is not None:
            entry[part]["basename"] = entry[part]["basename"].replace(".00000.", f".{number}.")
    shutil.rmtree(folder)
    return entry


def finish(folder: Path, shards: Sequence[Any]) -> list[str]:
    """Writes the index."""
    replace_file(folder / INDEX, json.dumps({"shards": list(shards), "version": 2}, sort_keys=True).encode())
    return [INDEX]
