"""The job: from a source to a folder of MDS shards that appears when it is whole, and can be killed at any moment before.

The main process reads blocks in order, workers turn them into encoded samples, and the main process appends these, again in order, to the
shard of their stream. So the bytes of the result depend on the source and the settings alone: not on the workers, not on kills.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import udsstream
from udsstream.errors import ConfigError, DataError, OutputExistsError, UdsstreamError
from udsstream.ingest.journal import REJECTS, Journal, Rejects
from udsstream.ingest.pool import Workers
from udsstream.ingest.readers import Position, end_of, read_blocks
from udsstream.ingest.schema import ColumnMap, make_plan
from udsstream.ingest.shards import BUDGET, Layout, ShardSet
from udsstream.ingest.sources import Kind, Source, check_unchanged, digest, find_source
from udsstream.job_folder import WORK, JobFolder, replace_file

__all__ = ["MANIFEST", "IngestConfig", "IngestResult", "Progress", "RejectLimit", "folder_name", "ingest"]

MANIFEST = "ingest.json"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RejectLimit:
    """How many bad rows are too many."""

    rows: int | None = 100
    """More than these stop the job at once. None: any number."""
    share: float | None = 0.01
    """More than this share of the rows stops it: when all are read, or from 10,000 rows on. None: any share."""

    @classmethod
    def parse(cls, text: str) -> RejectLimit:
        """`20` rows, or `2%` of the rows.

        Raises:
            ConfigError: it is neither.
        """
        if match := re.fullmatch(r"(\d{1,15})|(\d{1,3}(?:\.\d+)?)%", text.strip()):
            if match[1]:
                return cls(rows=int(match[1]), share=None)
            if float(match[2]) <= 100:
                return cls(rows=None, share=float(match[2]) / 100)
        raise ConfigError(
            f"--max-rejects {text!r} is neither a number of rows, such as 20, nor a share of them, such as 2%"
        )

    def exceeded(self, rejected: int, read: int, *, at_end: bool) -> str | None:
        """Which limit it was."""
        if self.rows is not None and rejected > self.rows:
            return f"more than {self.rows}"
        if self.share is not None and (at_end or read >= 10_000) and rejected > self.share * read:
            return f"more than {self.share * 100:g}%"
        return None


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Everything that decides the result."""

    source: tuple[str, ...]
    """Files, folders, globs, URLs, or one `hf:NAME[:CONFIG[:SPLIT]]`."""
    out: Path
    kind: Kind | None = None
    """None: told from the endings."""
    columns: ColumnMap = field(default_factory=ColumnMap)
    stream_by: str | None = None
    """A column: one MDS folder for each of its values."""
    hashes: tuple[str, ...] = ("sha1", "xxh64")
    compression: str | None = None
    size_limit: int | str = 1 << 26
    """Bytes of a shard before compression, or as "64mb"."""
    max_row_size: int | str = 1 << 26
    """Bytes of a row, raw and encoded; larger ones are rejected."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is."""

    rows: int
    rejected: int
    bytes: int
    """Of the source, as stored; 0 where unknown."""
    total_bytes: int
    """0 where unknown."""


@dataclass(frozen=True, kw_only=True)
class IngestResult:
    """What was made: the manifest."""

    out: Path
    manifest: dict[str, Any]
    resumed: bool


def ingest(
    config: IngestConfig,
    *,
    workers: int = 1,
    max_rejects: RejectLimit | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    budget: int = BUDGET,
) -> IngestResult:
    """Ingests, or goes on with an ingest that was interrupted.

    Args:
        config: what decides the result.
        workers: processes that parse and encode.
        max_rejects: None: the default limit.
        on_progress: called after each block.
        budget: bytes of samples that may wait in memory for their shards.

    Raises:
        UdsstreamError: see `udsstream.errors`. What is finished stays in `out/_job`, and the same call goes on from there.
    """
    if workers < 1:
        raise ConfigError(f"--workers {workers}: it is a number of processes, at least 1")
    size_limit, max_row = _bytes("--size-limit", config.size_limit), _bytes("--max-row-size", config.max_row_size)
    hashes = tuple(sorted(set(config.hashes)))
    _check_layout(hashes, config.compression)
    source = find_source(config.source, config.kind)
    plan = make_plan(source, config.columns, config.stream_by, max_row)
    layout = Layout(
        columns=plan.mds_columns(), hashes=hashes, compression=config.compression or None, size_limit=size_limit
    )
    settings = _settings(config, source, plan, layout, max_row)
    _check_place(config)
    job = JobFolder.claim(config.out, settings)
    with job:
        if not job.published:
            run = _Run(job, source, plan, layout, workers, max_rejects or RejectLimit(), on_progress, budget)
            try:
                run.go(settings)
            except UdsstreamError:
                if run.nothing_to_keep:
                    job.discard()
                raise
    manifest = json.loads((job.path / MANIFEST).read_text(encoding="utf-8"))
    return IngestResult(out=job.path, manifest=manifest, resumed=job.resumed)


class _Run:
    """One process's part of a job."""

    def __init__(
        self,
        job: JobFolder,
        source: Source,
        plan: Any,
        layout: Layout,
        workers: int,
        limit: RejectLimit,
        on_progress: Callable[[Progress], None] | None,
        budget: int,
    ) -> None:
        self._job, self._source, self._plan, self._layout, self._workers = job, source, plan, layout, workers
        self._limit, self._on_progress, self._budget = limit, on_progress, budget
        self.nothing_to_keep = not job.resumed

    def go(self, settings: dict[str, Any]) -> None:
        work = self._job.work
        shutil.rmtree(work / "spill", ignore_errors=True)
        with ExitStack() as stack:
            workers = stack.enter_context(Workers(self._plan, self._workers))  # before there are threads
            threads = self._workers if self._workers > 1 else 0
            shards = ShardSet(work, self._layout, self._folder, threads=threads, budget=self._budget)
            stack.callback(shards.close)
            journal = Journal(work)
            stack.callback(journal.close)
            for finished in journal.finished:
                shards.restore(finished)
            last = journal.finished[-1] if journal.finished else None
            resume, rows = (last.resume, last.rows) if last else (Position(0, 0, 1, 0), 0)
            rejects = Rejects(work, resume)
            stack.callback(rejects.close)
            hasher, stop = ThreadPoolExecutor(1, "digests"), Event()
            stack.callback(hasher.shutdown, cancel_futures=True)
            stack.callback(stop.set)
            digests = [hasher.submit(digest, file, stop) for file in self._source.files]

            def record(finished: Any) -> None:
                rejects.sync()
                journal.append(finished)
                self.nothing_to_keep = False

            unit = resume.unit
            for block, encoded in workers.encode(read_blocks(self._source, resume, self._plan.max_row)):
                rejects.add(encoded.rejects)
                self.nothing_to_keep = self.nothing_to_keep and not rejects.count
                for finished in shards.add(block, encoded, rows):
                    record(finished)
                rows += encoded.rows
                unit = block.start.unit + block.units
                self._check(rejects, rows, at_end=False)
                self._report(rows, rejects.count, block.consumed)
            self._check(rejects, rows, at_end=True)
            for finished in shards.finish(end_of(self._source, unit), rows):
                record(finished)
            self._report(rows, rejects.count, self._source.bytes)
            rejects.sync()
            names = self._describe(settings, shards, journal, rejects, rows, unit, digests)
        self._job.publish(names[:-1], last=names[-1])

    def _folder(self, value: str) -> str:
        return folder_name(value) if self._plan.stream_by is not None else "."

    def _check(self, rejects: Rejects, rows: int, *, at_end: bool) -> None:
        which = self._limit.exceeded(rejects.count, rows, at_end=at_end)
        nothing = at_end and rejects.count == rows
        if which is None and not nothing:
            return
        rejects.sync()
        examples = "".join(f"\n  {_place(reject)}: {reject['reason']}" for reject in rejects.first)
        raise DataError(
            f"{rejects.count} of {rows} rows are bad, "
            + (f"{which} (--max-rejects)" if which else "all of them")
            + f":{examples}\nall of them with their text: {rejects.path}; correct the source, say how its columns are stored (--column), "
            "or allow more with --max-rejects 500 or 5% and run the same command again"
        )

    def _report(self, rows: int, rejected: int, consumed: int) -> None:
        if self._on_progress is not None:
            total = self._source.bytes if self._source.kind != "hf" else 0
            self._on_progress(Progress(rows=rows, rejected=rejected, bytes=consumed, total_bytes=total))

    def _describe(
        self,
        settings: dict[str, Any],
        shards: ShardSet,
        journal: Journal,
        rejects: Rejects,
        rows: int,
        units: int,
        digests: list[Future[str | None]],
    ) -> list[str]:
        """Writes the indexes and the manifest; the names to publish, the one that makes the result look whole last."""
        hashed = [future.result() for future in digests]
        for file in self._source.files:
            check_unchanged(file)
        by_stream: dict[str, list[dict[str, Any]]] = {}
        for finished in journal.finished:
            by_stream.setdefault(finished.stream, []).append(finished.shard)
        streams, names = [], []
        for stream in sorted(shards.streams, key=lambda stream: self._folder(stream.value)):
            folder, entries = self._folder(stream.value), by_stream.get(stream.value, [])
            if not entries:
                continue
            # As MDSWriter writes it.
            index = json.dumps({"version": 2, "shards": entries}, sort_keys=True).encode()
            replace_file(stream.folder / "index.json", index)
            named = {"value": stream.value, "folder": folder} if self._plan.stream_by is not None else {}
            streams.append(
                named
                | {"samples": stream.samples, "shards": len(entries), "index_sha256": hashlib.sha256(index).hexdigest()}
            )
            if self._plan.stream_by is not None:
                names.append(folder)
            else:
                names += [(entry["zip_data"] or entry["raw_data"])["basename"] for entry in entries]
        written = sum(stream["samples"] for stream in streams)
        counts = f"{rows} rows were read, but {written} written and {rejects.count} rejected"
        if self._job.resumed and rows != written + rejects.count:
            raise OutputExistsError(
                f"{self._job.work} does not hold what its journal says, something else has changed it ({counts}): delete it to begin anew"
            )
        assert rows == written + rejects.count, counts
        manifest = {
            "format_version": _VERSION,
            "rows": {"read": rows, "written": written, "rejected": rejects.count, "blank_lines": units - rows},
            "sources": [
                {"name": file.name, "bytes": file.bytes, "sha256": sha256}
                for file, sha256 in zip(self._source.files, hashed, strict=True)
            ],
            "streams": streams,
            "settings": {key: value for key, value in settings.items() if not key.startswith("source ")},
            "columns": [
                {"name": column.name, "source": ".".join(column.source), "encoding": column.encoding}
                for column in self._plan.columns
            ],
            "rejects": hashlib.sha256(rejects.path.read_bytes()).hexdigest() if rejects.count else None,
        }
        replace_file(
            self._job.work / MANIFEST,
            (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"),
        )
        more = [MANIFEST, *([REJECTS] if rejects.count else [])]
        return [*more, *names, "index.json"] if self._plan.stream_by is None else [*more, *names]


def _settings(config: IngestConfig, source: Source, plan: Any, layout: Layout, max_row: int) -> dict[str, Any]:
    """What a job that goes on must share with the one that began; flat, so that a difference is named."""
    versions = {
        "udsstream": udsstream.__version__,
        "mosaicml-streaming": importlib.metadata.version("mosaicml-streaming"),
    }
    more = {"parquet": ["pyarrow"], "webdataset": ["webdataset"], "hf": ["datasets", "pyarrow"]}.get(source.kind, [])
    settings: dict[str, Any] = {
        "source": list(config.source),
        "kind": source.kind,
        "stream_by": config.stream_by,
        "hashes": list(layout.hashes),
        "compression": layout.compression,
        "size_limit": layout.size_limit,
        "max_row_size": max_row,
        "other_columns": "left out" if plan.known is None else "kept",
        "dropped": sorted(config.columns.drop),
        "versions": versions | {name: importlib.metadata.version(name) for name in more},
    }
    for column in plan.columns:
        settings[f"column {column.name}"] = f"{column.encoding} of {'.'.join(column.source)}"
    for file in source.files:
        settings[f"source {file.name}"] = f"{file.bytes} bytes, changed {file.stamp}"
    return settings


def _check_place(config: IngestConfig) -> None:
    for text in config.source:
        folder = Path(text.removeprefix("hf:"))
        if folder.is_dir() and config.out.absolute().resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"--out {config.out} is within the source {folder}, of which it would become a part: choose another folder"
            )


def _check_layout(hashes: tuple[str, ...], compression: str | None) -> None:
    from streaming.base.compression import get_compressions, is_compression
    from streaming.base.hashing import get_hashes, is_hash

    for name in hashes:
        if not is_hash(name):
            raise ConfigError(f"--hash {name!r} is unknown; it is one of {', '.join(sorted(get_hashes()))}")
    if compression and not is_compression(compression):
        names = sorted({name.split(":")[0] for name in get_compressions()})
        raise ConfigError(
            f"--compression {compression!r} is unknown; it is one of {', '.join(names)}, or one with its level, as zstd:3"
        )


def _bytes(option: str, value: int | str) -> int:
    from streaming.base.util import bytes_to_int

    try:
        found = bytes_to_int(int(value) if isinstance(value, str) and value.isdecimal() else value)
    except (ValueError, TypeError, AttributeError):
        found = 0
    if not 1 <= found < 1 << 31:
        raise ConfigError(
            f"{option} {value}: it is a number of bytes from 1 to 2 GiB (which MDS can address), such as 64mb"
        )
    return found


def _place(reject: dict[str, Any]) -> str:
    more = "".join(
        f", {name.replace('_', ' ')} {reject[name]}"
        for name in ("line", "source_row", "sample", "key")
        if name in reject
    )
    return f"{reject['source']}{more}"


_SAFE = re.compile(rb"[A-Za-z0-9.-]")
_LONGEST = 100


def folder_name(value: str) -> str:
    """A stream's value as the name of a folder: itself where it is plain, otherwise with %XX for each other byte.

    Different values have different names; one of more than 100 characters ends in its digest. On a file system that ignores case, "A"
    and "a" would meet.
    """
    raw = value.encode("utf-8", "surrogatepass")
    name = "".join(
        chr(byte) if _SAFE.match(bytes([byte])) or (byte == ord("_") and i) else f"%{byte:02X}"
        for i, byte in enumerate(raw)
    )
    if name.startswith(".") or name.lower() in (
        MANIFEST,
        REJECTS,
        "index.json",
        WORK,
        "journal.jsonl",
        "job.json",
        "lock",
        "publish.json",
        "spill",
    ):
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if len(name) > _LONGEST:
        name = f"{name[: _LONGEST - 17].rstrip('%')}-{hashlib.sha256(raw).hexdigest()[:16]}"
    return name or "%"
