"""Reading a log, finished or live: tables, data sets, the memory, and whether the record is intact.

No lock is taken and nothing is written (but by `to_parquet`). A SelectionLog holds no state of the files: every call looks
anew, so that a live run's newest rows are there. `table` and `dataset` check that every file has the shape and size that
the manifest says, and every row that is not yet sealed by its digest; only `verify` recomputes the digests of sealed rows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udsstream.errors import ConfigError, LogCorruptError, LogError
from udsstream.selection_log import layout, parquet, verification
from udsstream.selection_log.checkpoints import Heads, Memory, buffer_codec, heads_files, read_buffer, read_heads
from udsstream.selection_log.digest import rank_head
from udsstream.selection_log.encoding import TableCodec
from udsstream.selection_log.run_file import RunFile, read_run
from udsstream.selection_log.schema import PUSHES, SELECTION
from udsstream.selection_log.sealing import open_segment
from udsstream.selection_log.state import JournalState, Lineage, all_closed, lineage, read_state
from udsstream.selection_log.verification import VerifyReport

if TYPE_CHECKING:
    import pyarrow.dataset as ds

__all__ = ["Memory", "SelectionLog", "VerifyReport"]

_ORDER = {SELECTION: ("step", "position"), PUSHES: ("push_index",)}


@dataclass(frozen=True)
class SelectionLog:
    """A log in a folder. Make it with `open`."""

    root: Path
    _file: RunFile

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> SelectionLog:
        """LogError when there is no log, LogCorruptError when its run.json is not what udsstream writes."""
        return cls(Path(root), read_run(Path(root)))

    @property
    def run(self) -> dict[str, Any]:
        """The content of run.json; the log's own settings are under "log"."""
        return self._file.run

    # -- rows ----------------------------------------------------------------------------------------------------

    def table(
        self, *, all_attempts: bool = False, columns: list[str] | None = None, filter: pc.Expression | None = None
    ) -> pa.Table:
        """The decisions, ordered by (step, position): those of the run as it stands, or of all attempts."""
        return self._table(SELECTION, all_attempts=all_attempts, columns=columns, filter=filter)

    def pushes(
        self, *, all_attempts: bool = False, columns: list[str] | None = None, filter: pc.Expression | None = None
    ) -> pa.Table:
        """The embeddings that were pushed into the memory, ordered by push_index."""
        return self._table(PUSHES, all_attempts=all_attempts, columns=columns, filter=filter)

    def dataset(self, *, all_attempts: bool = False) -> ds.Dataset:
        """The decisions for DuckDB, Polars or a scan that should not load everything. Rows come in no particular order.

        Sealed segments are read lazily from their files, live rows are held in memory as they were at the call.
        """
        return self._dataset(SELECTION, all_attempts=all_attempts)

    def steps(self) -> np.ndarray:
        """The steps that have decisions, ascending, (steps,) int64."""
        return np.unique(self.table(columns=["step"]).column("step").to_numpy())

    def selected(self, step: int) -> list[int]:
        """The ids of the samples kept at a step, in training order; LogError when the step is not in the log."""
        data = self._dataset(SELECTION, steps=(step, step))
        columns = ["step", "sample_id", "selected", "train_order"]
        found = self._scan(data, columns, pc.field("step") == step)
        if not found.num_rows:
            steps = self.steps()
            known = f"it has {len(steps)} steps from {steps[0]} to {steps[-1]}" if len(steps) else "it has none"
            raise LogError(f"{self.root} has no decisions of step {step}; {known}")
        kept = found.filter(pc.field("selected")).sort_by("train_order")
        return kept.column("sample_id").to_pylist()

    def _table(
        self, name: str, *, all_attempts: bool, columns: list[str] | None, filter: pc.Expression | None
    ) -> pa.Table:
        schema = self._codec(name).schema
        columns = schema.names if columns is None else list(columns)
        if unknown := set(columns) - set(schema.names):
            raise ConfigError(f"the table {name!r} has no column {', '.join(sorted(unknown))}; it has {schema.names}")
        order = _ORDER[name] + (("attempt",) if all_attempts else ())
        wanted = list(dict.fromkeys([*columns, *order]))
        data = self._scan(self._dataset(name, all_attempts=all_attempts), wanted, filter)
        keys = [data.column(key).to_numpy() for key in order]
        if not _is_sorted(keys):
            data = data.take(pa.array(np.lexsort(keys[::-1])))
        return data.select(columns)

    def _scan(self, data: ds.Dataset, columns: list[str], filter: pc.Expression | None) -> pa.Table:
        try:
            return data.to_table(columns=columns, filter=filter)
        except OSError as error:
            raise LogCorruptError(
                f"{self.root}: a sealed file cannot be unpacked: {error}. SelectionLog.verify() names it; restore it from a copy."
            ) from error

    def _dataset(self, name: str, *, all_attempts: bool = False, steps: tuple[int, int] | None = None) -> ds.Dataset:
        """`steps`: only files that may hold a step between these two are needed."""
        import pyarrow.dataset as ds  # here, because it loads pandas where that is installed

        codec = self._codec(name)
        states = self._states(name)
        for state in states:
            if state.damaged:
                raise LogCorruptError(
                    f"rank {state.rank}: {state.wrong}. Rows after it are still intact, so this is damage and not the torn "
                    "end of a killed run. Restore the file from a copy, or resume the run from its last checkpoint."
                )
        current = _lineage(states)
        keep = {item.attempt: item for item in current}
        paths, live, partial = [], [], False

        def wanted(attempt: int, first: int, last: int) -> bool:
            nonlocal partial
            if steps is not None and (last < steps[0] or first > steps[1]):
                return False
            if all_attempts:
                return True
            if attempt not in keep or not keep[attempt].touches(first, last):
                return False
            partial |= not keep[attempt].covers(first, last)
            return True

        for state in states:
            for line in state.manifest.segments:
                if wanted(line.attempt, line.first_step, line.last_step):
                    segment = open_segment(self.root, line, state.rank, codec, self._file.sha256)
                    paths.append(str(segment.path))
            for scan in state.wals:
                if scan.batches and wanted(scan.identity.attempt, int(scan.steps[0]), int(scan.steps[-1])):
                    live.append(scan.table(codec))
        parts: list[ds.Dataset] = []
        if paths:
            parts.append(ds.dataset(paths, schema=codec.schema, format="ipc"))
        if live or not paths:
            parts.append(ds.dataset(pa.concat_tables([codec.schema.empty_table(), *live]).combine_chunks()))
        data = parts[0] if len(parts) == 1 else ds.dataset(parts)
        return data.filter(_expression(current)) if partial else data

    def _states(self, name: str) -> list[JournalState]:
        codec = self._codec(name)
        return [read_state(self.root, rank, codec, self._file.sha256) for rank in layout.ranks(self.root)]

    def _codec(self, name: str) -> TableCodec:
        return self._file.settings.codec(name)

    # -- the memory ----------------------------------------------------------------------------------------------

    def buffer_at(self, step: int | None = None, *, capacity: int | None = None) -> Memory:
        """The memory as it was before `step` (None: the newest state that was recorded).

        Under "full" any step; under "tail" the steps of kept checkpoints. `capacity`: how many embeddings the memory holds,
        when run.json does not say.
        """
        mode = self._file.settings.embeddings
        if mode == "full":
            return self._replayed_buffer(step, capacity)
        if mode == "tail":
            return self._kept_buffer(step)
        raise LogError(f'{self.root} was written with embeddings="none": it has no vectors. Use "tail" or "full".')

    def buffer_steps(self) -> list[int]:
        """The steps for which `buffer_at` has kept vectors (mode "tail"), ascending."""
        return sorted(self._kept())

    @property
    def closed(self) -> bool:
        """Whether every rank of the newest attempt closed the log in order: nothing is going on, and nothing was cut short."""
        return all_closed(state.manifest for name in (SELECTION, PUSHES) for state in self._states(name))

    def anchors(self) -> list[Heads]:
        """What was kept at the checkpoints of the run as it stands, by step; of attempts that stood at one step the newest comes last."""
        keep = {item.attempt: item for item in _lineage(self._states(SELECTION))}
        found = []
        for path in heads_files(self.root):
            heads = read_heads(path)
            item = keep.get(heads.attempt)
            if item is None or (item.first is not None and heads.step < item.first):
                continue
            if item.stop is not None and heads.step > item.stop:
                continue
            found.append(heads)
        return sorted(found, key=lambda heads: (heads.step, heads.attempt))

    def _kept(self) -> dict[int, Heads]:
        # Of attempts that stood at the same step, the newer one resumed from the older one's checkpoint.
        return {
            heads.step: heads
            for heads in self.anchors()
            if heads.buffer_rows is not None and layout.buffer_path(self.root, heads.step, heads.attempt).exists()
        }

    def _kept_buffer(self, step: int | None) -> Memory:
        kept = self._kept()
        if not kept:
            raise LogError(f"{self.root} has kept no vectors yet: the first are written at the first checkpoint")
        step = max(kept) if step is None else step
        if step not in kept:
            below = max((s for s in kept if s < step), default=None)
            above = min((s for s in kept if s > step), default=None)
            nearest = " and ".join(str(s) for s in (below, above) if s is not None)
            raise LogError(
                f'{self.root} kept no vectors at step {step} (embeddings="tail" keeps them at checkpoints); the nearest are at '
                f'step {nearest}. Every step needs embeddings="full".'
            )
        settings = self._file.settings
        assert settings.embedding_dim is not None
        return read_buffer(self.root, buffer_codec(settings.embedding_dim, settings.embedding_dtype), kept[step])

    def _replayed_buffer(self, step: int | None, capacity: int | None) -> Memory:
        capacity = capacity or self._file.settings.buffer_capacity
        if capacity is None:
            raise ConfigError(f"{self.root} does not say how many embeddings the memory holds: give capacity=")
        before = None if step is None else pc.field("step") < step
        index = self.pushes(columns=["push_index"], filter=before).column("push_index").to_numpy()
        dim = self._file.settings.embedding_dim
        assert dim is not None
        if not len(index):
            return Memory(embeddings=np.empty((0, dim), self._file.settings.embedding_dtype), pushed=0, digest=None)
        pushed = int(index[-1]) + 1
        first = max(0, pushed - capacity)
        last = pc.field("push_index") >= first
        rows = self.pushes(filter=last if before is None else before & last)
        values = {column.name: array for column, array, _ in self._codec(PUSHES).canonical(rows)}
        if not np.array_equal(values["push_index"], np.arange(first, pushed)):
            raise LogCorruptError(
                f"{self.root}: before step {step} the memory held the pushes {first} to {pushed - 1}, but the log has "
                f"{len(rows)} of these {pushed - first}. A rank's files are missing, or pushes were not logged."
            )
        return Memory(embeddings=values["embedding"].copy(), pushed=pushed, digest=values["digest"][-1].tobytes())

    # -- integrity and export ------------------------------------------------------------------------------------

    def verify(self, *, anchor: tuple[int, bytes] | None = None) -> VerifyReport:
        """Recompute every digest; LogCorruptError at the first link that does not hold, naming rank, file and step.

        `anchor`: a (step, Merkle root) that was kept outside the folder, from the checkpoint or the run's logger. Without
        one, a folder that was cut at its end, or rewritten as a whole, cannot be told from an honest one.
        """
        return verification.verify(self.root, anchor=anchor)

    def heads(self) -> list[bytes]:
        """Each rank's head as the log stands: all that it has written. `digest.merkle_root` of them is the log's root."""
        states = zip(self._states(SELECTION), self._states(PUSHES), strict=True)
        return [rank_head(selection.head, pushes.head) for selection, pushes in states]

    def to_parquet(self, out: str | os.PathLike[str] | None = None) -> Path:
        """Write selection.parquet and pushes.parquet into a folder (default: parquet/ in the log), all attempts included.

        Raises:
            LogError: the log cannot be read, or its parquet/ leads elsewhere: whoever sent the log would choose what is overwritten.
        """
        if out is not None:
            return parquet.write_parquet(self.root, Path(out))
        folder = layout.parquet_dir(self.root)
        if folder.is_symlink():
            raise LogError(f"{folder} is a link to {os.readlink(folder)}: remove it, or name the folder to write to")
        return parquet.write_parquet(self.root, folder)


def _lineage(states: list[JournalState]) -> list[Lineage]:
    return lineage(line for state in states for line in state.manifest.attempts)


def _expression(current: list[Lineage]) -> pc.Expression:
    out = None
    for item in current:
        part = pc.field("attempt") == item.attempt
        if item.first is not None:
            part &= pc.field("step") >= item.first
        if item.stop is not None:
            part &= pc.field("step") < item.stop
        out = part if out is None else out | part
    assert out is not None
    return out


def _is_sorted(keys: list[np.ndarray]) -> bool:
    """Whether the rows are ordered by the keys, the first being the most significant."""
    if len(keys[0]) < 2:
        return True
    undecided = np.ones(len(keys[0]) - 1, bool)
    for key in keys:
        if (undecided & (key[1:] < key[:-1])).any():
            return False
        undecided &= key[1:] == key[:-1]
    return True
