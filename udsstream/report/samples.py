"""A few samples that tell what the choice was like, and their text from the streams.

Which ones: `pick` reads the log twice and holds a handful of rows. What they say: `read_text` opens only the shards that they lie in,
with Streaming's own readers and no StreamingDataset (which would take shared memory and download). It shows no text unless the
stream's index is, byte for byte, the one that the run was trained on. A shard must have the size that the index records; whether its
content is still the same is `udsstream audit --data`'s to say. No pickle is ever unpacked, and no file outside of the folder is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from udsstream.errors import ConfigError, UdsstreamError
from udsstream.report.figures import logged_steps, scan_rows, stream_names
from udsstream.selection_log.reader import SelectionLog

if TYPE_CHECKING:
    from streaming.base.format import Reader

__all__ = ["KINDS", "Pick", "SampleText", "pick", "read_text", "show_row"]

_COLUMNS = ["step", "position", "sample_id", "stream", "shard", "shard_index", "tokens", "intra", "inter", "score"]
_INDEX_BYTES = 256 << 20
_READABLE = ("str", "json", "int", "bytes", "ndarray", "str_int", "str_float", "str_decimal")
"""MDS encodings that are decoded: their decoders run nothing that is in the data. Pickles and images are not."""
_FIRST = ("messages", "system", "prompt", "instruction", "question", "input", "response", "output", "answer", "text")
_FIELDS = 8

KINDS = {
    "highest": "Chosen: the highest scores",
    "short": "Chosen although short",
    "narrow": "Rejected by the narrowest margin",
    "long": "Rejected although long",
    "lowest": "Rejected: the lowest scores",
}
"""The kinds of samples that are picked, in their order. `short`: many tokens fewer than the longest rejected candidate of the same step;
`long`: many more than the longest that was chosen; `narrow`: a score just below that of the last one chosen."""


@dataclass(frozen=True, kw_only=True)
class Pick:
    """One decision that is worth a look."""

    kind: str
    """A key of KINDS."""
    step: int
    position: int
    sample_id: int
    stream: int
    """Number of the stream in run.json; −1 when there is none."""
    shard: int
    shard_index: int
    tokens: int
    intra: float
    """NaN where the method has none, and `inter` too."""
    inter: float
    score: float
    selected: bool
    threshold: float
    """The lowest score that was chosen at this step; NaN when none was."""
    other_tokens: int
    """Tokens of the step's longest candidate that met the other fate; 0 when there was none."""


@dataclass(frozen=True, kw_only=True)
class SampleText:
    """What a sample says, or why that cannot be shown."""

    fields: tuple[tuple[str, str], ...] = ()
    """(column or role, text), whole."""
    problem: str | None = None


def pick(log: SelectionLog, *, per_kind: int = 2) -> list[Pick]:
    """The most telling decisions of the run as it stands, `per_kind` of each kind (fewer where there are not so many), no sample twice.

    Only decisions with a finite score count: where nothing was scored, nothing was chosen either.
    """
    if per_kind < 1:
        return []
    steps, _ = logged_steps(log)
    lowest_kept = np.full(len(steps), np.inf)
    longest = {True: np.zeros(len(steps), np.int64), False: np.zeros(len(steps), np.int64)}
    for batch in scan_rows(log, ["step", "tokens", "score", "selected"]):
        batch = _scored(batch, steps)
        place = np.searchsorted(steps, batch["step"])
        kept = batch["selected"]
        np.minimum.at(lowest_kept, place[kept], batch["score"][kept])
        np.maximum.at(longest[True], place[kept], batch["tokens"][kept])
        np.maximum.at(longest[False], place[~kept], batch["tokens"][~kept])
    pools = {kind: _Pool(per_kind * len(KINDS)) for kind in KINDS}
    for batch in scan_rows(log, [*_COLUMNS, "selected"]):
        batch = _scored(batch, steps)
        place = np.searchsorted(steps, batch["step"])
        kept, score, tokens = batch["selected"], batch["score"].astype(np.float64), batch["tokens"].astype(np.int64)
        batch["threshold"] = np.where(np.isfinite(lowest_kept[place]), lowest_kept[place], np.nan)
        batch["other_tokens"] = np.where(kept, longest[False][place], longest[True][place])
        for kind, eligible, worth in (
            ("highest", kept, score),
            ("short", kept & (tokens < batch["other_tokens"]), batch["other_tokens"] - tokens),
            ("narrow", ~kept & np.isfinite(batch["threshold"]), score - batch["threshold"]),
            (
                "long",
                ~kept & (batch["other_tokens"] > 0) & (tokens > batch["other_tokens"]),
                tokens - batch["other_tokens"],
            ),
            ("lowest", ~kept, -score),
        ):
            pools[kind].offer({name: values[eligible] for name, values in batch.items()}, worth[eligible])
    picks: list[Pick] = []
    for kind, pool in pools.items():
        taken = {found.sample_id for found in picks}
        fresh = [row for row in pool.rows if row["sample_id"] not in taken]
        picks += [Pick(kind=kind, **row) for row in fresh[:per_kind]]
    return picks


class _Pool:
    """The rows of most worth among those offered, best first: each sample once, ties to the earlier step and position."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._least = -np.inf
        self._rows: list[tuple[tuple[float, int, int], dict[str, Any]]] = []

    def offer(self, batch: dict[str, np.ndarray], worth: np.ndarray) -> None:
        worth = worth.astype(np.float64)
        better = np.flatnonzero(worth >= self._least)
        order = better[np.lexsort((batch["position"][better], batch["step"][better], -worth[better]))]
        _, first = np.unique(batch["sample_id"][order], return_index=True)
        for i in order[np.sort(first)][: self._size].tolist():
            row = {name: values[i].item() for name, values in batch.items() if name != "has_score"}
            self._rows.append(((-float(worth[i]), row["step"], row["position"]), row))
        best: dict[int, tuple[tuple[float, int, int], dict[str, Any]]] = {}
        for key, row in sorted(self._rows, key=lambda item: item[0]):
            best.setdefault(row["sample_id"], (key, row))
        self._rows = list(best.values())[: self._size]
        if len(self._rows) == self._size:
            self._least = -self._rows[-1][0][0]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for _, row in self._rows]


def _scored(batch: dict[str, np.ndarray], steps: np.ndarray) -> dict[str, np.ndarray]:
    """The batch's rows with a finite score (of steps that were there when the steps were looked up: the run may be live)."""
    here = np.isfinite(batch["score"]) & np.isin(batch["step"], steps)
    return {name: values[here] for name, values in batch.items()}


# -- text ----------------------------------------------------------------------------------------------------------------


class _Unreadable(UdsstreamError):
    """Why the text of a sample cannot be shown; never leaves this module."""


def read_text(
    picks: Sequence[Pick], run: Mapping[str, Any], *, places: Mapping[str, str | os.PathLike[str]] | None = None
) -> list[SampleText]:
    """What each of the picked samples says, in their order.

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
    for found in picks:
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
