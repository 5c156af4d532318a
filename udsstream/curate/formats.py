"""The formats that samples are written in: what each is called, can hold, and is compressed by. One file per format does the writing.

A writer writes one whole shard from an iterator of rows. The same rows, settings and library versions give the same bytes; it neither
syncs nor renames, which is `udsstream/curate/write.py`'s to do.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from udsstream.curate.columns import Column
from udsstream.errors import ConfigError

__all__ = ["FORMATS", "Compression", "Format", "Row", "compressed", "parse_compression"]


class Row(NamedTuple):
    """A sample on its way out."""

    sample_id: int
    values: Sequence[bytes | None]
    """Of each column its MDS bytes; None: there is no value (only in columns that are added)."""


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How shards are compressed."""

    kind: str
    """none, gzip or zstd"""
    level: int | None = None

    def __str__(self) -> str:
        return self.kind if self.level is None else f"{self.kind}:{self.level}"


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format that samples can be written in."""

    name: str
    folder: str
    """Where shards lie in the output; empty: at its top."""
    suffixes: dict[str, str]
    """Kinds of compression that it takes, each with the end of a shard's name. The first is the default."""
    check: Callable[[Sequence[Column]], None]
    """Raises DataError for columns that it cannot hold."""
    write: Callable[[Path, Sequence[Column], Iterable[Row], Compression], Any]
    """Writes a shard. What it returns, plain JSON, is given to `finish` later."""
    finish: Callable[[Path, Sequence[Any]], list[str]]
    """Given what each shard's `write` returned, writes what else belongs into the folder; the names of these files."""

    def shard_name(self, number: int, compression: Compression) -> str:
        """The path of a shard within the output."""
        name = f"{'shard.' if self.name == 'mds' else 'part-'}{number:05d}{self.suffixes[compression.kind]}"
        return f"{self.folder}/{name}" if self.folder else name


def _mds() -> Format:
    from udsstream.curate import to_mds as to

    suffixes = {"none": ".mds", "zstd": ".mds.zstd"}  # (Streaming's gzip writes the time into each shard)
    return Format(name="mds", folder="", suffixes=suffixes, check=to.check, write=to.write, finish=to.finish)


def _webdataset() -> Format:
    from udsstream.curate import to_webdataset as to

    suffixes = {"none": ".tar", "gzip": ".tar.gz"}
    return Format(name="webdataset", folder="data", suffixes=suffixes, check=to.check, write=to.write, finish=_nothing)


def _parquet() -> Format:
    from udsstream.curate import to_parquet as to

    suffixes = {"zstd": ".parquet", "none": ".parquet", "gzip": ".parquet"}
    return Format(name="parquet", folder="data", suffixes=suffixes, check=to.check, write=to.write, finish=_nothing)


def _jsonl() -> Format:
    from udsstream.curate import to_jsonl as to

    suffixes = {"none": ".jsonl", "gzip": ".jsonl.gz", "zstd": ".jsonl.zst"}
    return Format(name="jsonl", folder="data", suffixes=suffixes, check=to.check, write=to.write, finish=_nothing)


FORMATS: dict[str, Callable[[], Format]] = {
    "mds": _mds,
    "webdataset": _webdataset,
    "parquet": _parquet,
    "jsonl": _jsonl,
}
"""By name; called when it is needed, for each loads a library."""


def _nothing(folder: Path, shards: Sequence[Any]) -> list[str]:
    del folder, shards
    return []


def parse_compression(text: str | None, format: Format) -> Compression:
    """`none`, `gzip`, `zstd`, or one of the latter with a level, as in `zstd:9`. None: the format's default.

    Raises:
        ConfigError: the format does not take it.
    """
    if text is None:
        text = next(iter(format.suffixes))
    kind, colon, level = text.partition(":")
    limits = {"gzip": (1, 9), "zstd": (1, 22)}
    if kind not in format.suffixes:
        raise ConfigError(f"compression={text!r}: {format.name} takes {', '.join(format.suffixes)}")
    if not colon:
        return Compression(kind=kind, level={"gzip": 6, "zstd": 3}.get(kind))
    least, most = limits.get(kind, (1, 0))
    if not level.isdecimal() or not least <= int(level) <= most:
        raise ConfigError(
            f"compression={text!r}: " + (f"a level of {kind} is {least} to {most}" if most else "none has no level")
        )
    return Compression(kind=kind, level=int(level))


@contextmanager
def compressed(path: Path, compression: Compression) -> Iterator[IO[bytes]]:
    """A file to write to, compressed as a whole: no name and no time in its header."""
    with open(path, "wb") as file:
        if compression.kind == "gzip":
            with gzip.GzipFile(
                filename="", mode="wb", fileobj=file, compresslevel=compression.level or 6, mtime=0
            ) as out:
                yield out  # pyright: ignore[reportReturnType]
        elif compression.kind == "zstd":
            import zstandard

            compressor = zstandard.ZstdCompressor(level=compression.level or 3, write_checksum=True)
            with compressor.stream_writer(file, closefd=False) as out:
                yield out  # pyright: ignore[reportReturnType]
        else:
            yield file
