"""The log's rows as numpy columns, grouped by step, and the run as each attempt saw it.

    n rows of a table, G groups: the rows of one step of one attempt, in position order

A nullable column is its values, zeros where null, and `has_<name>`. Everything is in memory at once, about 105 bytes a decision; only
the embeddings are read file by file (`memory.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from udsstream.selection_log.encoding import TableCodec
from udsstream.selection_log.manifest import SegmentLine
from udsstream.selection_log.schema import MEASURES, PUSHES, SELECTION
from udsstream.selection_log.sealing import Segment
from udsstream.selection_log.state import Lineage
from udsstream.selection_log.wal import WalScan

__all__ = ["Collector", "Decisions", "Pushes", "Source", "View", "ranges", "rows_of", "views"]

_MEASURES = tuple(name for name in MEASURES if name != "interaction")
_NULLABLE = ("stream", "shard", "shard_index", "loss", "intra", "inter", "score", "train_order", *MEASURES)
_LEFT_OUT = ("embedding",)

Source = tuple[int, SegmentLine | WalScan]
"""The rank and the file that rows of the pushes come from; a segment is opened again when its vectors are needed."""


class Collector:
    """Takes the rows of file after file (a `Visit` of `selection_log/verification.py`)."""

    def __init__(self) -> None:
        self._parts: dict[str, list[dict[str, np.ndarray]]] = {SELECTION: [], PUSHES: []}
        self._sources: list[Source] = []

    def __call__(self, rank: int, codec: TableCodec, table: pa.Table, source: Segment | WalScan) -> None:
        columns = _columns(table)
        if codec.table == PUSHES:
            columns["source"] = np.full(table.num_rows, len(self._sources), np.int32)
            columns["source_row"] = np.arange(table.num_rows, dtype=np.int32)
            # Not the segment itself: each would keep a file open.
            self._sources.append((rank, source.line if isinstance(source, Segment) else source))
        self._parts[codec.table].append(columns)

    def decisions(self, codec: TableCodec) -> Decisions:
        """All decisions, in the order (attempt, step, position)."""
        columns = self._joined(SELECTION, codec)
        order = _sorted(columns["attempt"], columns["step"], columns["position"])
        if order is not None:
            columns = {name: values[order] for name, values in columns.items()}
        return Decisions(columns=columns, starts=_starts(columns["attempt"], columns["step"]))

    def pushes(self, codec: TableCodec) -> Pushes:
        """All pushes, in the order (attempt, push_index)."""
        columns = self._joined(PUSHES, codec)
        order = _sorted(columns["attempt"], columns["push_index"])
        if order is not None:
            columns = {name: values[order] for name, values in columns.items()}
        return Pushes(columns=columns, sources=self._sources)

    def _joined(self, name: str, codec: TableCodec) -> dict[str, np.ndarray]:
        parts = self._parts.pop(name)
        if not parts:
            parts = [_columns(codec.schema.empty_table()) | {"source": _NONE, "source_row": _NONE}]
        return {column: np.concatenate([part.pop(column) for part in parts]) for column in list(parts[0])}


_NONE = np.empty(0, np.int32)


def _columns(table: pa.Table) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    for name in table.column_names:
        if name in _LEFT_OUT:
            continue
        array = pa.concat_arrays(table.column(name).chunks or [pa.array([], table.schema.field(name).type)])
        if name in _NULLABLE:
            columns["has_" + name] = array.is_valid().to_numpy(zero_copy_only=False)
            if name == "interaction":
                columns[name] = _matrix(array)
                continue
            array = array.fill_null(0)
        if name == "digest":
            flat = np.frombuffer(array.buffers()[1] or b"", np.uint8)
            columns[name] = flat[32 * array.offset :][: 32 * len(array)].reshape(-1, 32)
        else:
            columns[name] = array.to_numpy(zero_copy_only=False)
    if "selected" in columns:  # decisions, of a version without these
        for name in _MEASURES:
            if name not in columns:
                columns |= {name: np.zeros(table.num_rows, np.float32), "has_" + name: np.zeros(table.num_rows, bool)}
    return columns


def _matrix(array: pa.FixedSizeListArray) -> np.ndarray:
    """(n, numbers of a row) float32; what lies under a null is of no use."""
    size = array.type.list_size
    return array.values.slice(array.offset * size, len(array) * size).to_numpy(zero_copy_only=False).reshape(-1, size)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The places start, start + 1, …, of each range, one after the other."""
    total = int(counts.sum())
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(total)


def _starts(*keys: np.ndarray) -> np.ndarray:
    """(G,) rows at which any key changes, the first row included."""
    if not len(keys[0]):
        return np.empty(0, np.int64)
    changed = np.zeros(len(keys[0]), bool)
    changed[0] = True
    for key in keys:
        changed[1:] |= key[1:] != key[:-1]
    return np.flatnonzero(changed)


def _sorted(*keys: np.ndarray) -> np.ndarray | None:
    """The order by the keys, the first being the most significant; None when the rows have it already (they mostly do)."""
    undecided = np.ones(max(0, len(keys[0]) - 1), bool)
    for key in keys:
        if (undecided & (key[1:] < key[:-1])).any():
            return np.lexsort(keys[::-1])
        undecided &= key[1:] == key[:-1]
    return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Decisions:
    """The decisions of all attempts, by (attempt, step, position)."""

    columns: dict[str, np.ndarray] = field(repr=False)
    starts: np.ndarray = field(repr=False)
    """(G,) first row of each group."""

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.columns["step"])

    def group(self, name: str) -> np.ndarray:
        """(G,) a column's value at each group's first row."""
        return self.columns[name][self.starts]

    @property
    def counts(self) -> np.ndarray:
        """(G,) rows of each group."""
        return np.diff(np.append(self.starts, len(self)))

    @property
    def group_of(self) -> np.ndarray:
        """(n,) the group of each row."""
        return np.repeat(np.arange(len(self.starts)), self.counts)

    def kept(self, keep: np.ndarray) -> Decisions:
        """Some of the rows."""
        columns = {name: values[keep] for name, values in self.columns.items()}
        return Decisions(columns=columns, starts=_starts(columns["attempt"], columns["step"]))

    def rows_in(self, groups: np.ndarray) -> np.ndarray:
        """The rows of some groups, one group after the other."""
        return ranges(self.starts[groups], self.counts[groups])

    def any_in(self, flags: np.ndarray) -> np.ndarray:
        """(G,) whether a row's flag is set in each group; flags (n,) bool."""
        return np.logical_or.reduceat(flags, self.starts) if len(self.starts) else np.empty(0, bool)

    def sum_in(self, values: np.ndarray) -> np.ndarray:
        """(G,) sum over each group; values (n,)."""
        return np.add.reduceat(values.astype(np.int64), self.starts) if len(self.starts) else np.empty(0, np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pushes:
    """The pushes of all attempts, by (attempt, push_index), without their vectors."""

    columns: dict[str, np.ndarray] = field(repr=False)
    sources: list[Source] = field(repr=False)
    """`source` and `source_row` of a push say where its vector lies."""

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def kept(self, keep: np.ndarray) -> Pushes:
        """Some of the rows."""
        return Pushes(columns={name: values[keep] for name, values in self.columns.items()}, sources=self.sources)

    def __len__(self) -> int:
        return len(self.columns["step"])


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """The run as it stood when an attempt was the newest: its own steps and those of the attempts that it continues."""

    attempt: int
    parts: tuple[Lineage, ...]
    groups: np.ndarray = field(repr=False)
    """Groups of decisions, by step."""
    fresh: np.ndarray = field(repr=False)
    """Which of them stand in no newer view, and are to be judged in this one."""

    def rows_of(self, attempt: np.ndarray, step: np.ndarray) -> np.ndarray:
        """The rows, of any table that is ordered by attempt, that belong to this view; older attempts' first."""
        return rows_of(self.parts, attempt, step)


def rows_of(parts: Sequence[Lineage], attempt: np.ndarray, step: np.ndarray) -> np.ndarray:
    """The rows, of a table that is ordered by attempt, that belong to a lineage; older attempts' first."""
    found = [np.empty(0, np.int64)]
    for part in sorted(parts, key=lambda part: part.attempt):
        low, high = np.searchsorted(attempt, [part.attempt, part.attempt + 1])
        steps = step[low:high]
        keep = np.ones(len(steps), bool)
        if part.first is not None:
            keep &= steps >= part.first
        if part.stop is not None:
            keep &= steps < part.stop
        found.append(low + np.flatnonzero(keep))
    return np.concatenate(found)


def views(decisions: Decisions, lineages: Sequence[Sequence[Lineage]]) -> list[View]:
    """A view for each lineage (newest attempt first) that adds groups to those before it; the first one always."""
    attempt, step = decisions.group("attempt"), decisions.group("step")
    seen = np.zeros(len(step), bool)
    out: list[View] = []
    for parts in lineages:
        groups = rows_of(parts, attempt, step)
        groups = groups[np.argsort(step[groups], kind="stable")]
        fresh = ~seen[groups]
        if fresh.any() or not out:
            out.append(View(attempt=parts[0].attempt, parts=tuple(parts), groups=groups, fresh=fresh))
            seen[groups] = True
    return out
