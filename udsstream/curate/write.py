"""The job: chosen samples into shards in an output folder, resumable, with description and data card.

    out/
        data/part-00000.parquet …      the shards (MDS: shard.00000.mds … and index.json at the top, as Streaming wants them)
        croissant.json  README.md      where it comes from: `udsstream/curate/provenance.py`
        _job/                          only while it is unfinished: `udsstream/job_folder.py`

Which samples go into which shard follows from their sizes alone, so a shard that is finished is never made again: it is written under a
temporary name, synced, renamed, and then recorded. What was killed goes on with the first shard that has no record; where the samples lie
is looked up again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from udsstream.curate.chosen import Choice, Chosen, choose
from udsstream.curate.columns import AddedColumns, Column, check_clash, with_array_shapes
from udsstream.curate.formats import FORMATS, Compression, Format, Row, parse_compression
from udsstream.curate.provenance import Origin, Part, Used, croissant, data_card
from udsstream.curate.samples import Located, Samples, recorded_streams, whole_stream
from udsstream.errors import ConfigError, DataError, LogError, UdsstreamError
from udsstream.job_folder import JobFolder, replace_file, sync_file, write_errors
from udsstream.log_queries.queries import length_effect
from udsstream.selection_log import layout
from udsstream.selection_log.digest import merkle_root
from udsstream.selection_log.reader import SelectionLog

__all__ = ["Curated", "Output", "curate_log", "curate_stream", "shard_bounds"]

CARD, DESCRIPTION = "README.md", "croissant.json"
_CACHE, _RECORDS = "cache", "shards"
_ADDED_ROWS = 4096

Progress = Callable[[int, int], None]
"""Called with the samples written so far, and all that are to be written."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """How samples are written."""

    format: str
    """A key of `FORMATS`."""
    compression: str | None = None
    """See `parse_compression`; None: the format's default."""
    shard_bytes: int = 64 << 20
    """A shard takes the samples that come next while they have at most so many bytes together, as MDS stores them; at least one."""
    prefix: str = "uds_"
    """Of the names of the columns that are added."""
    scores: bool = True
    """Whether they are added."""
    language: tuple[str, ...] = ()
    """For the data card, as codes of ISO 639-1; empty: unknown."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"format={self.format!r}, expected one of {', '.join(FORMATS)}")
        if not 0 < self.shard_bytes < 1 << 32:
            raise ConfigError(f"shard_bytes={self.shard_bytes}, expected at least 1 and less than 2³² (4 GiB)")

    def resolved(self) -> tuple[Format, Compression]:
        """The format and its compression; ConfigError when they do not go together."""
        format = FORMATS[self.format]()
        return format, parse_compression(self.compression, format)


@dataclass(frozen=True, kw_only=True)
class Curated:
    """What was written."""

    out: str
    format: str
    compression: str
    samples: int
    shards: int
    bytes: int
    """Of all shards, compressed."""
    per_stream: dict[str, int]
    """Samples of each stream that any came from."""
    offered: int | None
    """Distinct samples in the log's steps considered; None without a log."""
    resumed: bool
    unverified_shards: int | None
    """With `verify`: shards whose index records no hash; None: no hash was asked for."""
    title: str

    def as_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return asdict(self)


def curate_log(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    choice: Choice,
    output: Output,
    places: Mapping[str, str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> Curated:
    """Writes the samples that a run's log chose into `out`.

    Args:
        places: where streams are now, by their names, if not where the run read them.
        cache: where shards are fetched to that are remote or compressed. None: into `out`, until it is finished.
        verify: check the shards in use against the hashes in their indexes.

    Raises:
        ConfigError: a setting is wrong, a stream is unknown, nothing meets the choice, or an added column clashes with one of the samples.
        LogError: the log cannot be read.
        DataError: the streams are not those of the run, or cannot be read (ShardError: a shard), or the format cannot hold a column.
        OutputExistsError: `out` holds something else.
        OutputWriteError: it cannot be written; the same call goes on.
    """
    log = SelectionLog.open(run)
    streams = recorded_streams(log.run)
    format, compression = output.resolved()
    root = merkle_root(log.heads()).hex()
    job = _settings(output, compression) | {"log": root, "choice": choice.as_dict()}
    with JobFolder.claim(out, job) as folder:
        if folder.published:
            return _already(folder, output, compression)
        with _undone_if_nothing_came(folder):
            chosen = choose(log, choice)
            if not len(chosen):
                raise ConfigError(
                    f"no sample of {log.root} meets the choice: {chosen.offered} were offered and {chosen.ever_chosen} chosen in the steps "
                    "considered; ask for less"
                )
            with Samples(streams, cache=_cache(folder, cache), places=places, verify=verify) as samples:
                located = samples.locate(
                    chosen.stream, chosen.sample_id, shard=chosen.shard, shard_index=chosen.shard_index
                )
                added = (
                    AddedColumns.of(chosen, [stream.name for stream in streams], output.prefix)
                    if output.scores
                    else None
                )
                origin = _log_origin(log, root, choice, chosen, samples)
                if merkle_root(log.heads()).hex() != root:
                    raise LogError(
                        f"the run in {log.root} wrote to its log while it was read, so that nobody could tell later what this output was "
                        "chosen from; run the command again, best when the run has ended"
                    )
                return _write(
                    folder, samples, located, chosen.sample_id, added, origin, output, format, compression, progress
                )


def curate_stream(
    stream: str,
    out: str | os.PathLike[str],
    *,
    output: Output,
    cache: str | os.PathLike[str] | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> Curated:
    """Writes the whole of an MDS stream, a folder or a remote, into `out`: its samples in their order, without added columns.

    Raises: as `curate_log`, but for what concerns a log.
    """
    source = whole_stream(stream)
    format, compression = output.resolved()
    with JobFolder.claim(out, _settings(output, compression) | {"stream": stream}) as folder:
        if folder.published:
            return _already(folder, output, compression)
        with (
            _undone_if_nothing_came(folder),
            Samples([source], cache=_cache(folder, cache), verify=verify) as samples,
        ):
            count = samples.counts(0)
            if not count:
                raise DataError(f"the stream {stream} holds no samples, so there is nothing to write")
            # A resumed job must read what the killed one did.
            _same_index(folder, samples.index_sha256(0), stream)
            ids = np.arange(count)
            located = samples.locate(np.zeros(count, np.int64), ids)
            origin = Origin(used=(Used(stream=source, index_sha256=samples.index_sha256(0), written=count),))
            return _write(folder, samples, located, ids, None, origin, output, format, compression, progress)


def _settings(output: Output, compression: Compression) -> dict[str, Any]:
    described = asdict(output) | {"compression": str(compression), "language": list(output.language)}
    if not output.scores:
        del described["prefix"]
    return {"job": "curate", **described}


def _cache(folder: JobFolder, given: str | os.PathLike[str] | None) -> Path:
    return folder.work / _CACHE if given is None else Path(given)


class _undone_if_nothing_came:
    """Removes the folder again when an error of ours comes before anything was written or fetched: a mistyped command leaves no trace."""

    def __init__(self, folder: JobFolder) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, UdsstreamError) or self._folder.published:
            return
        if not any((self._folder.work / name).exists() for name in (_CACHE, _RECORDS)):
            self._folder.discard()


def _same_index(folder: JobFolder, digest: str, stream: str) -> None:
    path = folder.work / "index.sha256"
    if path.exists() and path.read_text() != digest:
        raise DataError(
            f"the stream {stream} changed since this job began: its index has another SHA-256; delete {folder.work} to begin anew"
        )
    if (folder.work / _RECORDS).exists() or not path.exists():
        replace_file(path, digest.encode())


def _log_origin(log: SelectionLog, root: str, choice: Choice, chosen: Chosen, samples: Samples) -> Origin:
    run = log.run
    model, selection = run.get("model"), run.get("selection")
    written = np.bincount(chosen.stream, minlength=len(samples.streams))
    used = tuple(
        Used(stream=samples.streams[number], index_sha256=samples.index_sha256(number), written=int(written[number]))
        for number in np.flatnonzero(written).tolist()
    )
    steps = log.steps()
    return Origin(
        used=used,
        choice=choice.as_dict(),
        run_id=str(run.get("run_id", "unknown")),
        created=str(run["created"]) if "created" in run else None,
        log_root=root,
        run_sha256=hashlib.sha256(layout.run_path(log.root).read_bytes()).hexdigest(),
        last_step=int(steps[-1]),
        selection=selection if isinstance(selection, dict) else None,
        model=str(model.get("name")) if isinstance(model, dict) else None,
        candidates=chosen.candidates,
        offered=chosen.offered,
        ever_chosen=chosen.ever_chosen,
        length_correlation=length_effect(log, until=choice.until).score_pearson,
    )


def shard_bounds(sizes: np.ndarray, limit: int) -> list[int]:
    """Where shards begin, and at last where the last one ends: each takes what comes next while it fits, at least one sample."""
    ends = np.cumsum(sizes)
    bounds = [0]
    while bounds[-1] < len(sizes):
        full = int(ends[bounds[-1] - 1]) if bounds[-1] else 0
        bounds.append(max(bounds[-1] + 1, int(np.searchsorted(ends, full + limit, side="right"))))
    return bounds


def _write(
    folder: JobFolder,
    samples: Samples,
    located: Located,
    ids: np.ndarray,
    added: AddedColumns | None,
    origin: Origin,
    output: Output,
    format: Format,
    compression: Compression,
    progress: Progress | None,
) -> Curated:
    """Writes the shards that are not there yet, then what describes them, and publishes all of it."""
    extra = () if added is None else added.columns
    check_clash(samples.columns, extra)
    rows = _Rows(samples=samples, located=located, ids=ids, added=added)
    first = next(rows.between(0, 1))
    columns = with_array_shapes((*samples.columns, *extra), first.values, first.sample_id)
    format.check(columns)

    records = folder.work / _RECORDS
    with write_errors(records):
        records.mkdir(exist_ok=True)
        if format.folder:
            (folder.work / format.folder).mkdir(exist_ok=True)
    bounds = shard_bounds(located.size, output.shard_bytes)
    parts: list[Part] = []
    written: list[Any] = []
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        name = format.shard_name(number, compression)
        record = _read_record(records / f"{number:05d}.json")
        if record is None:
            report = _every(progress, begin, len(ids))
            record = _write_shard(folder.work / name, columns, rows, begin, end, format, compression, report)
            replace_file(records / f"{number:05d}.json", json.dumps(record).encode())
        parts.append(Part(name=name, bytes=record["bytes"], sha256=record["sha256"], rows=end - begin))
        written.append(record["entry"])
        if progress is not None:
            progress(end, len(ids))

    others = format.finish(folder.work, written)
    described = croissant(origin, columns, parts, format, compression, output.prefix)
    replace_file(folder.work / DESCRIPTION, (json.dumps(described, indent=2, ensure_ascii=False) + "\n").encode())
    card = data_card(origin, columns, parts, format, compression, prefix=output.prefix, language=output.language)
    replace_file(folder.work / CARD, card.encode())
    names = [format.folder] if format.folder else [part.name for part in parts]
    resumed = folder.resumed
    folder.publish([*names, CARD, DESCRIPTION, *others], last=others[-1] if others else DESCRIPTION)
    return Curated(
        out=str(folder.path),
        format=format.name,
        compression=str(compression),
        samples=len(ids),
        shards=len(parts),
        bytes=sum(part.bytes for part in parts),
        per_stream={item.stream.name: item.written for item in origin.used},
        offered=origin.offered,
        resumed=resumed,
        unverified_shards=samples.unhashed if samples.verifies else None,
        title=origin.title,
    )


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """All samples of the output, in their order."""

    samples: Samples
    located: Located
    ids: np.ndarray
    added: AddedColumns | None

    def between(self, first: int, stop: int) -> Iterator[Row]:
        """The samples `first` to before `stop`."""
        read = self.samples.read(self.located, first, stop)
        ids = self.ids[first:stop].tolist()
        if self.added is None:
            for sample_id, values in zip(ids, read, strict=True):
                yield Row(sample_id, values)
            return
        at = first
        more: Iterator[list[bytes | None]] = iter(())
        for sample_id, values in zip(ids, read, strict=True):
            if (at - first) % _ADDED_ROWS == 0:  # a few at a time: of small samples a shard holds millions
                more = iter(self.added.rows(at, min(at + _ADDED_ROWS, stop)))
            at += 1
            yield Row(sample_id, [*values, *next(more)])


def _every(
    progress: Progress | None, begin: int, total: int, step: int = 1000
) -> Callable[[Iterator[Row]], Iterator[Row]]:
    """Reports every `step` samples that pass."""

    def counted(rows: Iterator[Row]) -> Iterator[Row]:
        for done, row in enumerate(rows, begin):
            if progress is not None and done % step == 0:
                progress(done, total)
            yield row

    return counted


def _write_shard(
    path: Path,
    columns: Sequence[Column],
    rows: _Rows,
    begin: int,
    end: int,
    format: Format,
    compression: Compression,
    report: Callable[[Iterator[Row]], Iterator[Row]],
) -> dict[str, Any]:
    """Makes a shard whole and durable; what is recorded of it."""
    temporary = path.with_name(f".{path.name}")
    with write_errors(path):
        entry = format.write(temporary, columns, report(rows.between(begin, end)), compression)
        with open(temporary, "rb") as file:
            digest = hashlib.sha256()
            while piece := file.read(1 << 20):
                digest.update(piece)
            size = file.tell()
        sync_file(temporary)
        os.replace(temporary, path)
        sync_file(path.parent)
    return {"bytes": size, "sha256": digest.hexdigest(), "entry": entry}


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def _already(folder: JobFolder, output: Output, compression: Compression) -> Curated:
    """What a job had written that was killed in publishing: by its description, for the rest is gone."""
    described = json.loads((folder.path / DESCRIPTION).read_bytes())
    files = [item for item in described["distribution"] if item["@type"] == "cr:FileObject"]
    samples = int(described["size"].split()[0])
    return Curated(
        out=str(folder.path),
        format=output.format,
        compression=str(compression),
        samples=samples,
        shards=len(files),
        bytes=sum(int(item["contentSize"].split()[0]) for item in files),
        per_stream={
            item["name"]: int(item["description"].rpartition(" of its samples")[0].rpartition(" ")[2])
            for item in described["isBasedOn"]
        },
        offered=None,
        resumed=True,
        unverified_shards=None,
        title=described["name"],
    )
