"""The samples themselves, from the shards of the streams that a run was trained on, as MDS bytes.

A stream's index must be, byte for byte, the one that the log records, and a shard must have the size (and, if asked, the hashes) that
the index records. Then only the offsets of the wanted samples are read, and later their bytes: in the order asked for, a block of at
most 64 MiB in memory, within a block shard by shard. What is remote, or only compressed, is fetched by Streaming into a cache folder, a
sub-folder for each location, which comes to hold every shard that a wanted sample lies in. No StreamingDataset is made and no shared
memory taken.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from udsstream.curate.columns import Column, parse_columns
from udsstream.errors import ConfigError, DataError, ShardError
from udsstream.job_folder import replace_file, write_errors
from udsstream.plain_files import pieces
from udsstream.stream_index import INDEX, INDEX_LIMIT, Shard, check_file, parse_index

__all__ = ["Located", "Samples", "SourceStream", "recorded_streams", "whole_stream"]

_BLOCK = 64 << 20
_BLOCK_ROWS = 1 << 16
_OPEN_FILES = 64
_DOWNLOAD_TRIES, _DOWNLOAD_SECONDS = 2, 600.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True, kw_only=True)
class SourceStream:
    """A stream that samples come from."""

    name: str
    location: str
    """As the run recorded it."""
    samples: int | None
    index_sha256: str | None
    """Of the index that the run saw; None: nobody recorded it."""
    licence: str = "unknown"
    date: str = "unknown"


@dataclass(frozen=True, kw_only=True, eq=False)
class Located:
    """Where n wanted samples lie, in the order in which they are wanted."""

    file: np.ndarray
    """int32: number of the shard among those in use."""
    begin: np.ndarray
    """int64: first byte in it."""
    size: np.ndarray
    """int64: bytes of the sample as MDS stores it."""

    def __len__(self) -> int:
        return len(self.file)


def recorded_streams(run: Mapping[str, Any]) -> tuple[SourceStream, ...]:
    """The streams of a run.json.

    Raises:
        DataError: it names none, or does not say enough of them.
    """
    listed = run.get("streams")
    if not isinstance(listed, list) or not listed:
        raise DataError(
            "run.json names no streams, so that it is not known where the samples are: this run was not made from a stream"
        )
    streams = []
    for number, item in enumerate(listed):
        fields = item if isinstance(item, dict) else {}
        name, location, samples, digest = (fields.get(key) for key in ("name", "location", "samples", "index_sha256"))
        if not (isinstance(name, str) and isinstance(location, str) and isinstance(digest, str)) or not (
            isinstance(samples, int) and 0 <= samples < 1 << 40
        ):
            raise DataError(f"run.json: streams[{number}] does not say its name, location, samples and index_sha256")
        if (format := fields.get("format", "mds")) != "mds":
            raise DataError(
                f"the run was trained on the stream {name!r} of the format {str(format)[:40]!r}, and samples are copied from MDS alone: "
                "the log names the chosen ones, by shard and place in it (udsstream log RUN --to-parquet)"
            )
        streams.append(
            SourceStream(
                name=name,
                location=location,
                samples=samples,
                index_sha256=digest,
                licence=str(fields.get("licence", "unknown")),
                date=str(fields.get("date", "unknown")),
            )
        )
    return tuple(streams)


def whole_stream(location: str) -> SourceStream:
    """A stream that no run recorded."""
    return SourceStream(
        name=location.rstrip("/").rpartition("/")[2] or location, location=location, samples=None, index_sha256=None
    )


@dataclass(kw_only=True)
class _Opened:
    """A stream whose index was read."""

    name: str
    folder: Path | None
    """None: it is remote."""
    index: bytes
    digest: str
    shards: list[Shard]
    cache: Path
    remote: str
    fetcher: Any = None
    """Streaming's Stream and its readers, once something had to be fetched."""


class Samples:
    """Reads samples of some streams. A context manager: it keeps files open.

    Args:
        streams: by their numbers; only those that a wanted sample lies in are opened.
        places: where a stream is now, by its name.
        cache: for what has to be fetched; made when it is needed.
        verify: check each shard in use against the hashes in its index.

    Raises:
        ConfigError: `places` names a stream that is not there.
    """

    def __init__(
        self,
        streams: Sequence[SourceStream],
        *,
        cache: Path,
        places: Mapping[str, str] | None = None,
        verify: bool = False,
    ) -> None:
        self.streams = tuple(streams)
        self.columns: tuple[Column, ...] = ()
        """Of the shards in use, once `locate` has opened them."""
        self._first_where = ""
        self.unhashed = 0
        """With `verify`: shards in use that no hash is recorded of."""
        self._places = dict(places or {})
        known = [stream.name for stream in streams]
        if unknown := sorted(set(self._places) - set(known)):
            shown = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
            raise ConfigError(f"--stream {unknown[0]}: there is no such stream; there is {shown}")
        self._cache, self.verifies = cache, verify
        self._opened: dict[int, _Opened] = {}
        self._paths: list[Path] = []
        self._files: OrderedDict[int, int] = OrderedDict()

    def __enter__(self) -> Samples:
        return self

    def __exit__(self, *error: object) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    # -- where they are ----------------------------------------------------------------------------------------------------

    def counts(self, number: int) -> int:
        """How many samples a stream holds, by its index."""
        return sum(shard.samples for shard in self._open(number).shards)

    def index_sha256(self, number: int) -> str:
        """Of the stream's index, as it was read."""
        return self._open(number).digest

    def first_ids(self) -> np.ndarray:
        """(streams,) int64: the id of each stream's first sample; ids count through the streams in their order."""
        counts = [
            self.counts(at) if stream.samples is None else stream.samples for at, stream in enumerate(self.streams)
        ]
        return np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)

    def locate(
        self,
        stream: np.ndarray,
        sample_id: np.ndarray,
        *,
        shard: np.ndarray | None = None,
        shard_index: np.ndarray | None = None,
    ) -> Located:
        """Looks the samples up, and opens every shard that one of them lies in.

        Args:
            stream: (n,) their streams' numbers.
            sample_id: (n,) their ids.
            shard, shard_index: (n,) where the log says that they are; −1: it does not say.

        Raises:
            DataError: a stream is not the one that was recorded, cannot be read here, or does not hold a sample where the log says;
                or two streams have different columns.
            ShardError: a shard is missing or corrupt.
        """
        file, begin, size = (np.zeros(len(stream), dtype) for dtype in (np.int32, np.int64, np.int64))
        first_ids = self.first_ids()
        for number in np.unique(stream).tolist():
            if not 0 <= number < len(self.streams):
                raise DataError(f"the log names a stream {number}, but there are {len(self.streams)}")
            opened = self._open(number)
            mine = np.flatnonzero(stream == number)
            within = sample_id[mine] - first_ids[number]
            ends = np.cumsum([item.samples for item in opened.shards], dtype=np.int64)
            if not len(ends) or within.min() < 0 or within.max() >= ends[-1]:
                wrong = int(sample_id[mine[np.argmax((within < 0) | (within >= (ends[-1] if len(ends) else 0)))]])
                raise DataError(
                    f"sample {wrong} does not exist in stream {opened.name!r}: its index has {ends[-1] if len(ends) else 0} samples"
                )
            at = np.searchsorted(ends, within, side="right")
            row = within - np.concatenate([[0], ends])[at]
            self._check_logged(opened.name, sample_id[mine], at, row, shard, shard_index, mine)
            order = np.argsort(at, kind="stable")
            used, starts = np.unique(at[order], return_index=True)
            for k, part in zip(used.tolist(), np.split(order, starts[1:]), strict=True):
                self._columns_of(opened, k)
                offsets = self._offsets(opened, k)
                file[mine[part]] = len(self._paths) - 1
                begin[mine[part]] = offsets[row[part]]
                size[mine[part]] = offsets[row[part] + 1] - offsets[row[part]]
        return Located(file=file, begin=begin, size=size)

    def _check_logged(
        self,
        name: str,
        ids: np.ndarray,
        at: np.ndarray,
        row: np.ndarray,
        shard: np.ndarray | None,
        shard_index: np.ndarray | None,
        mine: np.ndarray,
    ) -> None:
        if shard is None or shard_index is None:
            return
        said = (shard[mine] >= 0) & (shard_index[mine] >= 0)
        wrong = np.flatnonzero(said & ((shard[mine] != at) | (shard_index[mine] != row)))
        if len(wrong):
            i = int(wrong[0])
            raise DataError(
                f"the log places sample {ids[i]} in row {shard_index[mine[i]]} of shard {shard[mine[i]]}, but by the index of stream "
                f"{name!r} it is row {row[i]} of shard {at[i]}: the log and the stream do not belong together (see `udsstream audit "
                "--data`)"
            )

    def _columns_of(self, opened: _Opened, number: int) -> None:
        where = f"shard {number} of stream {opened.name!r}"
        columns = parse_columns(opened.shards[number].entry, where)
        if not self.columns:
            self.columns, self._first_where = columns, where
        if columns != self.columns:
            mine, first = ({c.name: c.encoding for c in some} for some in (columns, self.columns))
            name = next(name for name in sorted({*mine, *first}) if mine.get(name) != first.get(name))
            raise DataError(
                f"{where} has other columns than {self._first_where}: {name!r} is {mine.get(name, 'missing')} here and "
                f"{first.get(name, 'missing')} there, and an output has one set of columns; write the streams apart: --only STREAM"
            )

    def _offsets(self, opened: _Opened, number: int) -> np.ndarray:
        """(rows + 1,) int64: where the rows of a shard begin and end. The shard's path is appended to those in use."""
        shard = opened.shards[number]
        path = self._shard_path(opened, number)
        raw = shard.files[0][0]

        def corrupt(what: str) -> ShardError:
            return ShardError(
                f"shard {path} of stream {opened.name!r} is corrupt: {what}; fetch it again from its remote, or rebuild the stream"
            )

        try:
            found = path.stat().st_size
            if found != raw.size:
                raise corrupt(f"it has {found} bytes, but the stream's index records {raw.size}")
            if self.verifies:
                check = check_file(path.parent, raw)
                self.unhashed += not check.digested
                if check.wrong is not None:
                    raise corrupt(check.wrong)
            with open(path, "rb") as file:
                head = file.read(4 * (shard.samples + 2))
        except OSError as error:
            raise ShardError(
                f"shard {path} of stream {opened.name!r} cannot be read ({error.strerror or error})"
            ) from error
        if len(head) < 4 * (shard.samples + 2) or struct.unpack_from("<I", head)[0] != shard.samples:
            raise corrupt(f"it does not hold the {shard.samples} samples that the index records")
        offsets = np.frombuffer(head, "<u4")[1:].astype(np.int64)
        if (np.diff(offsets) < 0).any() or offsets[0] < len(head) or offsets[-1] != raw.size:
            raise corrupt("its samples do not follow one another")
        self._paths.append(path)
        return offsets

    # -- streams -----------------------------------------------------------------------------------------------------------

    def _open(self, number: int) -> _Opened:
        if number in self._opened:
            return self._opened[number]
        stream = self.streams[number]
        location = self._places.get(stream.name, stream.location)
        cache = self._cache / hashlib.sha256(location.encode()).hexdigest()[:16]
        folder = None if "://" in location else Path(location)
        index = self._read_index(stream, location, folder, cache)
        digest = hashlib.sha256(index).hexdigest()
        if stream.index_sha256 not in (None, digest):
            raise DataError(
                f"stream {stream.name!r} at {location} is not the one that the run was trained on: its index has the SHA-256 "
                f"{digest[:16]}…, run.json records {str(stream.index_sha256)[:16]}…, so that ids would name other samples; say where the "
                f"old one is: --stream {stream.name}=PATH"
            )
        try:
            shards = parse_index(index)
        except DataError as error:
            raise DataError(f"stream {stream.name!r}: {location}/{INDEX}: {error}") from error
        count = sum(shard.samples for shard in shards)
        if stream.samples not in (None, count):
            raise DataError(
                f"stream {stream.name!r} at {location} has {count} samples by its index, run.json says {stream.samples}"
            )
        opened = _Opened(
            name=stream.name, folder=folder, index=index, digest=digest, shards=shards, cache=cache, remote=location
        )
        self._opened[number] = opened
        return opened

    def _read_index(self, stream: SourceStream, location: str, folder: Path | None, cache: Path) -> bytes:
        hint = f"if it moved, say where it is: --stream {stream.name}=PATH"
        if folder is None:
            try:
                _fetch_index(location, cache)
            except Exception as error:  # whatever a cloud's client raises
                _raise_if_full(error, cache)
                raise DataError(
                    f"the index of stream {stream.name!r} cannot be fetched from {location} ({type(error).__name__}: {error}); {hint}"
                ) from error
            folder = cache
        try:
            return b"".join(pieces(folder / INDEX, INDEX_LIMIT))
        except OSError as error:
            raise DataError(
                f"stream {stream.name!r}: {folder / INDEX} cannot be read ({error.strerror or error}); {hint}"
            ) from error

    def _shard_path(self, opened: _Opened, number: int) -> Path:
        """Where the shard lies uncompressed; it is fetched if need be."""
        raw, zipped = opened.shards[number].files[0]
        if opened.folder is not None:
            path = opened.folder / raw.name
            if os.path.lexists(path):
                return path
            if zipped is None or not os.path.lexists(opened.folder / zipped.name):
                raise ShardError(
                    f"shard {path} of stream {opened.name!r} is missing; put it back, or say where the stream is: --stream "
                    f"{opened.name}=PATH"
                )
        if opened.folder is not None and opened.fetcher is None:
            _keep_index(opened.index, opened.cache)
        path = opened.cache / raw.name
        if path.exists() and path.stat().st_size != raw.size:
            path.unlink()  # of a job that was killed while it wrote it
        if path.exists():
            return path
        try:
            if opened.fetcher is None:
                opened.fetcher = _fetcher(opened.remote, opened.cache)
            stream, readers = opened.fetcher
            for _, part in readers[number].file_pairs:
                if part is not None:
                    (opened.cache / part.basename).unlink(missing_ok=True)
            stream.prepare_shard(readers[number])
        except Exception as error:
            _raise_if_full(error, path)
            raise ShardError(
                f"shard {raw.name} of stream {opened.name!r} cannot be fetched from {opened.remote} or unpacked "
                f"({type(error).__name__}: {error}); it is missing or corrupt there"
            ) from error
        return path

    # -- what they say -----------------------------------------------------------------------------------------------------

    def read(self, located: Located, first: int, stop: int) -> Iterator[list[bytes]]:
        """The samples `first` to before `stop`, each as the bytes of its columns, in the order of `columns`.

        Raises:
            ShardError: a shard changed or cannot be read any more, or a sample in it is not what its columns say.
        """
        ends = np.cumsum(located.size[first:stop])
        done = 0
        while done < stop - first:
            limit = (int(ends[done - 1]) if done else 0) + _BLOCK
            until = max(done + 1, int(np.searchsorted(ends, limit, side="right")))
            until = min(until, done + _BLOCK_ROWS)
            yield from self._block(located, first + done, first + until)
            done = until

    def _block(self, located: Located, first: int, stop: int) -> Iterator[list[bytes]]:
        file, begin, size = (array[first:stop] for array in (located.file, located.begin, located.size))
        order = np.lexsort((begin, file))
        end = begin + size
        follows = (file[order][1:] == file[order][:-1]) & (begin[order][1:] == end[order][:-1])
        rows: list[bytes] = [b""] * (stop - first)
        for run in np.split(order, np.flatnonzero(~follows) + 1):
            number, start = int(file[run[0]]), int(begin[run[0]])
            data = self._pread(number, start, int(end[run[-1]]) - start)
            for i in run.tolist():
                rows[i] = data[begin[i] - start : end[i] - start]
        for i in range(stop - first):
            row, rows[i] = rows[i], b""
            yield self._split(row, int(file[i]))

    def _pread(self, number: int, begin: int, size: int) -> bytes:
        path = self._paths[number]
        parts = []
        try:
            if number not in self._files:
                if len(self._files) >= _OPEN_FILES:
                    os.close(self._files.popitem(last=False)[1])
                self._files[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._files.move_to_end(number)
            while size > 0 and (part := os.pread(self._files[number], size, begin)):
                parts.append(part)
                begin, size = begin + len(part), size - len(part)
        except OSError as error:
            raise ShardError(f"shard {path} cannot be read any more ({error.strerror or error})") from error
        if size:
            raise ShardError(
                f"shard {path} became shorter while it was read; run the same command again when it is whole"
            )
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _split(self, row: bytes, number: int) -> list[bytes]:
        varying = [column.size is None for column in self.columns].count(True)
        at = 4 * varying
        if len(row) >= at:
            sizes = iter(struct.unpack_from(f"<{varying}I", row))
            values = []
            for column in self.columns:
                size = next(sizes) if column.size is None else column.size
                values.append(row[at : at + size])
                at += size
            if at == len(row):
                return values
        raise ShardError(
            f"shard {self._paths[number]} is corrupt: a sample of {len(row)} bytes is not what its columns say; fetch it again from its "
            "remote, or rebuild the stream"
        )


def _fetch_index(remote: str, cache: Path) -> None:
    """Puts the remote's index, as it is now, into the cache; shards that an older one listed are removed from it."""
    older = (cache / INDEX).read_bytes() if (cache / INDEX).exists() else None
    for name in (INDEX, f"{INDEX}.tmp"):  # Streaming would take either for the index, and one of them may be half
        (cache / name).unlink(missing_ok=True)
    _fetcher(remote, cache)
    newer = (cache / INDEX).read_bytes()
    if older not in (None, newer):
        _keep_index(newer, cache, older=older)


def _keep_index(index: bytes, cache: Path, older: bytes | None = None) -> None:
    """Makes `index` the cache's; what is there of another is removed."""
    if older is None and (cache / INDEX).exists():
        older = (cache / INDEX).read_bytes()
    if older == index:
        return
    with write_errors(cache):
        if older is not None:
            shutil.rmtree(cache)
        cache.mkdir(parents=True, exist_ok=True)
        replace_file(cache / INDEX, index)


def _fetcher(remote: str, cache: Path) -> tuple[Any, Any]:
    """Streaming's Stream from a remote (or a folder) to the cache, and its shard readers."""
    from streaming import Stream
    from streaming.base.world import World

    stream = Stream(
        remote=remote,
        local=str(cache),
        download_retry=_DOWNLOAD_TRIES,
        download_timeout=_DOWNLOAD_SECONDS,
        keep_zip=False,
    )
    world = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)
    # Pickles are refused by `parse_columns`, column by column, before a shard is fetched.
    return stream, stream.get_shards(world, allow_unsafe_types=True)


def _raise_if_full(error: BaseException, path: Path) -> None:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            with write_errors(path):
                raise cause
        cause = cause.__cause__ or cause.__context__
