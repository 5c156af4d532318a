"""What samples of a log say: their rows, read from the streams. (The log holds no text.)

Only the shards that they lie in are opened, with Streaming's own readers and no StreamingDataset (which would take shared memory and
download). No text is shown unless the stream's index is, byte for byte, the one that the run was trained on. A shard must have the size
that the index records; whether its content is still the same is `udsstream audit --data`'s to say. No pickle is ever unpacked, and no
file outside of the folder is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow.compute as pc

from udsstream.errors import ConfigError, UdsstreamError
from udsstream.selection_log.reader import SelectionLog

if TYPE_CHECKING:
    from streaming.base.format import Reader

__all__ = ["Place", "SampleText", "places_of", "read_text", "show_row", "stream_names"]

_INDEX_BYTES = 256 << 20
_READABLE = ("str", "json", "int", "bytes", "ndarray", "str_int", "str_float", "str_decimal")
"""MDS encodings that are decoded: their decoders run nothing that is in the data. Pickles and images are not."""
_FIRST = ("messages", "system", "prompt", "instruction", "question", "input", "response", "output", "answer", "text")
_FIELDS = 8


class Placed(Protocol):
    """Where a sample lies."""

    @property
    def stream(self) -> int: ...
    @property
    def shard(self) -> int: ...
    @property
    def shard_index(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a sample lies: number of the stream in run.json (−1: none), shard, and index within the shard."""

    stream: int
    shard: int
    shard_index: int


@dataclass(frozen=True, kw_only=True)
class SampleText:
    """What a sample says, or why that cannot be shown."""

    fields: tuple[tuple[str, str], ...] = ()
    """(column or role, text), whole."""
    problem: str | None = None


def places_of(log: SelectionLog, sample_ids: Sequence[int]) -> list[Place]:
    """Where these samples lie, in their order; one that the log does not have lies in no stream."""
    columns = ["sample_id", "stream", "shard", "shard_index"]
    table = log.table(columns=columns, filter=pc.field("sample_id").isin(list(sample_ids)))
    rows = zip(*(table[name].to_pylist() for name in columns), strict=True)
    found = {number: Place(stream=stream, shard=shard, shard_index=index) for number, stream, shard, index in rows}
    return [found.get(number, Place(stream=-1, shard=-1, shard_index=-1)) for number in sample_ids]


class _Unreadable(UdsstreamError):
    """Why the text of a sample cannot be shown; never leaves this module."""


def read_text(
    placed: Sequence[Placed], run: Mapping[str, Any], *, places: Mapping[str, str | os.PathLike[str]] | None = None
) -> list[SampleText]:
    """What each of these samples says, in their order.

    Args:
        run: the content of run.json.
        places: local folders of streams, by their names in run.json, where they are not at the location that run.json names.

    Raises:
        ConfigError: a name in `places` is not that of a stream.
    """
    names = stream_names(run)
    if unknown := set(places or {}) - set(names):
        raise ConfigError(
            f"the run has no stream named {', '.join(map(repr, sorted(unknown)))}; it has {', '.join(map(repr, names[:20])) or 'none'}"
            + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        )
    streams: dict[int, _Stream | _Unreadable] = {}
    texts = []
    for found in placed:
        if found.stream not in streams:
            try:
                streams[found.stream] = _open_stream(found.stream, run, places or {})
            except _Unreadable as problem:
                streams[found.stream] = problem
        try:
            stream = streams[found.stream]
            if isinstance(stream, _Unreadable):
                raise stream
            texts.append(SampleText(fields=tuple(show_row(stream.row(found.shard, found.shard_index)))))
        except _Unreadable as problem:
            texts.append(SampleText(problem=str(problem)))
    return texts


def show_row(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A row as (label, text): the turns of `messages` each with its role; columns that are mostly text come first."""
    names = sorted(row, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    shown: list[tuple[str, str]] = []
    for name in names:
        turns = _turns(row[name]) if name == "messages" else None
        shown += turns if turns is not None else [(str(name), _show(row[name]))]
    if len(shown) > _FIELDS:
        shown = [*shown[:_FIELDS], ("…", f"and {len(shown) - _FIELDS} more")]
    return shown


def _turns(value: Any) -> list[tuple[str, str]] | None:
    """The turns of a conversation, given as a list or as JSON; None when it is no such thing."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not all(isinstance(turn, dict) and "role" in turn for turn in value):
        return None
    return [(str(turn["role"]), _show(turn.get("content", ""))) for turn in value]


def _show(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}: {np.array2string(value, threshold=24, edgeitems=10)}"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False, indent=1, default=str)
    return str(value)


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """A stream's folder whose index is the one that run.json recorded."""

    folder: Path
    shards: list[dict[str, Any]]

    def row(self, shard: int, index: int) -> Mapping[str, Any]:
        if not 0 <= shard < len(self.shards):
            raise _Unreadable(f"the log places it in shard {shard}, but {self.folder} has {len(self.shards)} shards.")
        try:
            reader = self._reader(self.shards[shard])
            if not 0 <= index < reader.samples:
                raise _Unreadable(
                    f"the log places it in row {index} of shard {shard}, but that has {reader.samples} rows."
                )
            return reader[index]
        except _Unreadable:
            raise
        except Exception as error:  # whatever a damaged or hostile file makes Streaming's readers raise
            raise _Unreadable(
                f"shard {shard} of {self.folder} cannot be read ({type(error).__name__}: {error})."
            ) from error

    def _reader(self, entry: dict[str, Any]) -> Reader:
        from streaming.base.format import reader_from_json  # here, because it loads torch

        reader = reader_from_json(str(self.folder), None, entry)
        for raw, _ in reader.file_pairs:
            path = self.folder / raw.basename
            if os.path.basename(raw.basename) != raw.basename or raw.basename in ("", ".", ".."):
                raise _Unreadable(
                    f"the index of {self.folder} names {raw.basename!r}, which is not a file in that folder."
                )
            if not path.is_file():
                raise _Unreadable(
                    f"{path} is not there, or only compressed; --stream NAME=PATH names an unpacked copy of the stream."
                )
            if path.stat().st_size != raw.bytes:
                raise _Unreadable(
                    f"{path} has {path.stat().st_size} bytes, but the stream's index records {raw.bytes}."
                )
        encodings = getattr(reader, "column_encodings", None)
        if entry["format"] == "mds" and encodings is not None:
            reader.column_encodings = [e if _is_readable(e) else "bytes" for e in encodings]  # pyright: ignore[reportAttributeAccessIssue]
        return reader


def _is_readable(encoding: str) -> bool:
    kind = encoding.partition(":")[0]
    return kind in _READABLE or kind.rstrip("0123456789") in ("int", "uint", "float")


def _open_stream(number: int, run: Mapping[str, Any], places: Mapping[str, str | os.PathLike[str]]) -> _Stream:
    if number < 0:
        raise _Unreadable("the log names no stream for it.")
    streams = run.get("streams")
    if not isinstance(streams, list) or number >= len(streams) or not isinstance(streams[number], dict):
        raise _Unreadable(f"run.json has no stream {number}.")
    name, recorded = stream_names(run)[number], streams[number].get("index_sha256")
    location = places.get(name, streams[number].get("location"))
    if not isinstance(location, (str, os.PathLike)):
        raise _Unreadable(f"run.json does not say where the stream {name!r} is; --stream NAME=PATH does.")
    if "://" in str(location):
        raise _Unreadable(f"the stream {name!r} is remote ({location}); --stream NAME=PATH names a local copy.")
    if (format := streams[number].get("format", "mds")) != "mds":
        raise _Unreadable(
            f"the stream {name!r} is of the format {str(format)[:40]!r}, and text is shown from MDS alone."
        )
    folder = Path(location)
    index = folder / "index.json"
    try:
        if not index.is_file():
            raise FileNotFoundError
        if index.stat().st_size > _INDEX_BYTES:
            raise _Unreadable(f"{index} has {index.stat().st_size} bytes; at most {_INDEX_BYTES} are read.")
        content = index.read_bytes()
    except (OSError, ValueError) as error:
        raise _Unreadable(
            f"{index} cannot be read ({type(error).__name__}); --stream NAME=PATH says where the stream {name!r} is now."
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != recorded:
        raise _Unreadable(
            f"{index} is not the index that the run was trained on: its SHA-256 is {digest[:16]}…, run.json records "
            f"{str(recorded)[:16]}…, so the text there may be that of another sample."
        )
    try:
        shards = json.loads(content)["shards"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Unreadable(f"{index} is not an index of a stream ({type(error).__name__}).") from error
    if not isinstance(shards, list) or not all(isinstance(entry, dict) for entry in shards):
        raise _Unreadable(f"{index} is not an index of a stream: it lists no shards.")
    return _Stream(folder=folder, shards=shards)


def stream_names(run: Mapping[str, Any]) -> list[str]:
    """The streams' names as run.json has them, by number. Whatever run.json holds: nothing of it is trusted."""
    streams = run.get("streams")
    if not isinstance(streams, list):
        return []
    return [
        str(stream.get("name", number)) if isinstance(stream, dict) else "" for number, stream in enumerate(streams)
    ]
