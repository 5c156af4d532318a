"""Compaction to Parquet, for tools that do not read Arrow files, with everything needed to verify the chains again.

The rows of all attempts are kept, rank after rank in the order they were written, with a column `superseded`. The file's
metadata holds run.json and the manifests' attempts, so that `verify_parquet` can follow each chain from its genesis.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from udsstream.errors import LogCorruptError
from udsstream.plain_files import new_file
from udsstream.selection_log import layout
from udsstream.selection_log.digest import ATTEMPTS, attempt_link, batch_link, genesis
from udsstream.selection_log.encoding import TableCodec
from udsstream.selection_log.files import make_dirs, read_small, sync_dir, write_errors
from udsstream.selection_log.manifest import canonical_json
from udsstream.selection_log.recovery import step_starts
from udsstream.selection_log.run_file import RUN_LIMIT, decode_run, read_run
from udsstream.selection_log.schema import TABLES
from udsstream.selection_log.sealing import open_segment
from udsstream.selection_log.state import JournalState, Lineage, lineage, read_state

__all__ = ["ParquetReport", "verify_parquet", "write_parquet"]

_KEY = b"udsstream"


@dataclass(frozen=True, kw_only=True)
class ParquetReport:
    """What `verify_parquet` found to hold."""

    table: str
    rows: int
    batches: int
    ranks: int


def write_parquet(root: Path, out: Path) -> Path:
    """Write <table>.parquet for each table into `out`; existing ones are replaced. The folder."""
    run = read_run(root)
    run_json = read_small(layout.run_path(root), RUN_LIMIT)
    for table in TABLES:
        codec = run.settings.codec(table)
        states = [read_state(root, rank, codec, run.sha256) for rank in layout.ranks(root)]
        for state in states:
            if state.damaged:
                raise LogCorruptError(f"rank {state.rank}: {state.wrong}. Restore the file from a copy.")
        path = out / f"{table}.parquet"
        with write_errors("write Parquet", path):
            make_dirs(out)
            _write_table(root, path, codec, states, run.sha256, run_json)
    return out


def _write_table(
    root: Path, path: Path, codec: TableCodec, states: list[JournalState], run_sha256: bytes, run_json: bytes
) -> None:
    chains = [
        {
            "rank": state.rank,
            "attempts": [[a.attempt, a.from_step, a.parent] for a in state.manifest.attempts],
            "head": state.head.hex(),
        }
        for state in states
    ]
    about = canonical_json({"table": codec.table, "chains": chains})
    schema = codec.schema.append(pa.field("superseded", pa.bool_(), nullable=False))
    schema = schema.with_metadata({_KEY: about, b"run.json": run_json})
    floats = [
        c.name + ".list.element" if c.is_list else c.name
        for c in codec.columns
        if c.dtype is not None and c.dtype.kind == "f"
    ]
    others = [c.name for c in codec.columns if c.name + ".list.element" not in floats and c.name not in floats]
    current = {item.attempt: item for item in lineage(line for s in states for line in s.manifest.attempts)}
    temporary = path.with_name(f".{path.name}.tmp")
    with (
        os.fdopen(new_file(temporary), "wb") as file,
        pq.ParquetWriter(
            file,
            schema,
            compression="zstd",
            use_dictionary=others,  # pyright: ignore[reportArgumentType]  (pyarrow's stubs forget the list)
            use_byte_stream_split=floats,  # pyright: ignore[reportArgumentType]
            write_page_checksum=True,
            version="2.6",
        ) as writer,
    ):
        for state in states:
            for line in state.manifest.segments:
                segment = open_segment(root, line, state.rank, codec, run_sha256)
                writer.write_table(_with_superseded(segment.table(codec), line.attempt, current, schema))
            for scan in state.wals:
                if scan.batches:
                    writer.write_table(_with_superseded(scan.table(codec), scan.identity.attempt, current, schema))
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_dir(path.parent)


def _with_superseded(table: pa.Table, attempt: int, current: dict[int, Lineage], schema: pa.Schema) -> pa.Table:
    steps = table.column("step").to_numpy()
    item = current.get(attempt)
    superseded = np.ones(len(steps), bool)
    if item is not None:
        superseded[:] = False
        if item.first is not None:
            superseded |= steps < item.first
        if item.stop is not None:
            superseded |= steps >= item.stop
    table = table.append_column(schema.field("superseded"), pa.array(superseded))
    return table.replace_schema_metadata(schema.metadata)


def _attempt(recorded: Any) -> tuple[int, int, int | None]:
    """(attempt, from_step, parent) of the file's metadata; ValueError for what `attempt_link` cannot take."""
    attempt, from_step, parent = recorded
    for value, limit in ((attempt, ATTEMPTS), (from_step, 1 << 62), (0 if parent is None else parent, ATTEMPTS)):
        if type(value) is not int or not -1 <= value < limit:
            raise ValueError(f"{recorded!r} is no attempt")
    return attempt, from_step, parent


def verify_parquet(path: str | os.PathLike[str]) -> ParquetReport:
    """Recompute the chains of a file that `write_parquet` wrote; LogCorruptError at the first that does not hold."""
    path = Path(path)
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        metadata = file.schema_arrow.metadata or {}
        run = decode_run(metadata[b"run.json"], path)
        about: dict[str, Any] = json.loads(metadata[_KEY])
        codec = run.settings.codec(str(about["table"]))
        rows = file.read(columns=codec.schema.names).cast(codec.schema)
        chains = [(int(c["rank"]), [_attempt(a) for a in c["attempts"]], str(c["head"])) for c in about["chains"]]
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise LogCorruptError(f"{path} cannot be read as a compacted log: {error}") from error
    ranks = rows.column("rank").to_numpy()
    attempts = rows.column("attempt").to_numpy()
    steps = rows.column("step").to_numpy()
    done = batches = 0
    for rank, known, expected in chains:
        head = genesis(codec.table, rank, run.sha256)
        for attempt, from_step, parent in known:
            head = attempt_link(head, attempt, from_step, parent)
            count = 0
            while done + count < len(ranks) and (ranks[done + count], attempts[done + count]) == (rank, attempt):
                count += 1
            starts = step_starts(steps[done : done + count])
            for digest in codec.batch_digests(rows.slice(done, count), starts.tolist()):
                head = batch_link(head, digest)
            done, batches = done + count, batches + len(starts)
        if head.hex() != expected:
            raise LogCorruptError(f"{path}: the rows of rank {rank} do not give the chain that was recorded with them")
    if done != len(ranks):
        raise LogCorruptError(f"{path}: {len(ranks) - done} rows belong to no attempt of any rank")
    return ParquetReport(table=codec.table, rows=len(ranks), batches=batches, ranks=len(chains))
