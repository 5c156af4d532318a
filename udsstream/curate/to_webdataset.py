"""Samples as WebDataset shards: tar files without times and owners, the members of a sample named KEY.COLUMN[.EXTENSION].

The key is the sample's id in 12 digits. Text is .txt, a JSON value or a number .json, an array .npy, an image .jpg or .png; bytes lie
under their column's own name. A column whose name ends in its extension already keeps it. The added columns are one member, uds.json.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from udsstream.curate.columns import Column, decoder
from udsstream.curate.formats import Compression, Row, compressed
from udsstream.errors import DataError

__all__ = ["check", "member", "write"]

_EXTENSIONS = {"text": "txt", "json": "json", "integer": "json", "float": "json", "number": "json"}
_EXTENSIONS |= {"array": "npy", "jpeg": "jpg", "png": "png", "bytes": ""}
_KEPT = {"jpg": ("jpg", "jpeg")}


def member(column: Column) -> str:
    """What follows the key and a dot in the name of the member that holds a column."""
    if column.added:
        return "uds.json"
    extension = _EXTENSIONS[column.kind]
    kept = _KEPT.get(extension, (extension,))
    return column.name if not extension or column.name.rpartition(".")[2] in kept else f"{column.name}.{extension}"


def check(columns: Sequence[Column]) -> None:
    """Raises DataError for a column that has no form here, or whose name a reader would not give back."""
    taken: dict[str, str] = {}
    for column in columns:
        if column.kind == "image list":
            raise DataError(
                f"column {column.name!r} of encoding {column.encoding} has no form in WebDataset; use --format mds"
            )
        name = member(column)
        parts = name.split(".")
        if "/" in name or not all(parts) or name.startswith("__") or len(name.encode()) > 200:
            raise DataError(
                f"column {column.name!r} cannot be the name of a file in WebDataset; use --format parquet, jsonl or mds"
            )
        other = taken.setdefault(name.lower(), column.name)  # `webdataset` reads names in small letters
        if other != column.name and not column.added:
            raise DataError(
                f"columns {other!r} and {column.name!r} would both be {name.lower()!r} in WebDataset; use --format parquet, jsonl or mds"
            )


def write(path: Path, columns: Sequence[Column], rows: Iterable[Row], compression: Compression) -> None:
    """Writes one tar file."""
    from webdataset.writer import TarWriter

    forms = [(column, member(column), _form(column), decoder(column)) for column in columns]
    with compressed(path, compression) as file:
        writer = TarWriter(
            cast(BinaryIO, file),
            user="",
            group="",
            mode=0o444,
            mtime=0,
            compress=False,
            encoder=False,
            keep_meta=True,
            format="PAX_FORMAT",
        )
        with writer:
            for row in rows:
                sample: dict[str, Any] = {"__key__": f"{row.sample_id:012d}"}
                added = {}
                for (column, name, form, decoded), raw in zip(forms, row.values, strict=True):
                    if column.added:
                        added[column.name] = None if raw is None else decoded(raw, row.sample_id)
                    elif raw is not None:
                        sample[name] = form(raw, row.sample_id)
                if added:
                    sample["uds.json"] = json.dumps(added, ensure_ascii=False).encode()
                writer.write(sample)


def _form(column: Column) -> Callable[[bytes, int], bytes]:
    if column.kind in ("text", "json", "bytes", "jpeg", "png"):
        return lambda raw, sample_id: raw
    decoded = decoder(column)
    if column.kind == "array":
        return lambda raw, sample_id: _npy(decoded(raw, sample_id))
    if column.kind == "number":
        return lambda raw, sample_id: json.dumps(str(decoded(raw, sample_id))).encode()
    return lambda raw, sample_id: json.dumps(decoded(raw, sample_id)).encode()


def _npy(value: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, value, allow_pickle=False)
    return file.getvalue()
