"""Samples as JSON Lines: one object a line, UTF-8, columns in the source's order.

What JSON has no value for: bytes are {"base64": "…"} (an image too), an array is its numbers in nested lists, or {"dtype": …, "values": …}
where the column does not fix the type; a number without limit (str_int, str_decimal) is a string of its digits, as most readers have only
64 bits for one. A number that is not finite is refused.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from udsstream.curate.columns import Column, decoder
from udsstream.curate.formats import Compression, Row, compressed
from udsstream.errors import DataError

__all__ = ["check", "write"]


def check(columns: Sequence[Column]) -> None:
    """Raises DataError for lists of images."""
    for column in columns:
        if column.kind == "image list":
            raise DataError(
                f"column {column.name!r} of encoding {column.encoding} has no form in JSON; use --format mds"
            )


def write(path: Path, columns: Sequence[Column], rows: Iterable[Row], compression: Compression) -> None:
    """Writes one file.

    Raises:
        DataError: a number is not finite.
    """
    steps = [(column.name, decoder(column), _form(column)) for column in columns]
    dump = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
    with compressed(path, compression) as file:
        for row in rows:
            line = {}
            for (name, decoded, form), raw in zip(steps, row.values, strict=True):
                value = None if raw is None else decoded(raw, row.sample_id)
                line[name] = value if form is None or raw is None else form(value)
            try:
                text = dump(line)
            except ValueError as error:
                name = next(name for name, value in line.items() if not _is_json(value, dump))
                raise DataError(
                    f"sample {row.sample_id}: column {name!r} holds a number that is not finite, and JSON has none; "
                    "use --format parquet or mds"
                ) from error
            try:
                data = text.encode()
            except UnicodeEncodeError:  # half of a surrogate pair, from an escape in a JSON column
                data = json.dumps(line, separators=(",", ":")).encode()
            file.write(data + b"\n")


def _is_json(value: Any, dump: Callable[[Any], str]) -> bool:
    try:
        dump(value)
    except ValueError:
        return False
    return True


def _form(column: Column) -> Callable[[Any], Any] | None:
    """What a value becomes; None: it is JSON as it is."""
    if column.kind in ("bytes", "jpeg", "png"):
        return lambda value: {"base64": base64.b64encode(value).decode()}
    if column.kind == "array" and column.fixed_dtype:
        return lambda value: value.tolist()
    if column.kind == "array":
        return lambda value: {"dtype": value.dtype.name, "values": value.tolist()}
    if column.kind == "number":
        return str
    return None
