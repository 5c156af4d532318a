"""What is ingested: the files behind a path, glob, folder or `hf:` name, their kind, and their bytes, decompressed.

Knows nothing of rows. Nothing is unpacked to disk, and no code that comes with a data set is run.
"""

from __future__ import annotations

import glob
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO, Literal, get_args

from udsstream.errors import ConfigError, DataError

__all__ = [
    "CHUNK",
    "HFName",
    "Kind",
    "Source",
    "SourceFile",
    "check_unchanged",
    "chunks",
    "digest",
    "find_source",
    "open_file",
]

Kind = Literal["jsonl", "parquet", "csv", "webdataset", "hf", "text"]

CHUNK = 1 << 20
"""Bytes that are read at once."""

_COMPRESSED = (".gz", ".zst")
_ENDINGS: dict[Kind, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".ndjson", ".jsonlines"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "webdataset": (".tar", ".tgz"),
    "text": (".txt", ".text", ".md", ".rst"),
}
_HF_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")
# zstd can grow a block to 30,000 times its size; small bites bound what one of them becomes.
_BITE = 4096


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file, as it was when the job began."""

    name: str
    """As it is written into rejects and the manifest."""
    location: str
    """A path, or a URL that fsspec opens."""
    bytes: int
    stamp: str
    """Its time of change (of a URL: what the server says of its version): another one means another file."""


@dataclass(frozen=True, kw_only=True)
class HFName:
    """A Hugging Face data set."""

    path: str
    config: str | None
    split: str | None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Everything that one job reads, in order."""

    kind: Kind
    files: tuple[SourceFile, ...]
    hf: HFName | None = None

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def find_source(given: Sequence[str], kind: Kind | None = None) -> Source:
    """The files, in the order given; those of a folder or a glob by name.

    Raises:
        DataError: nothing is there, it cannot be read, or its kind cannot be told.
        ConfigError: `kind` is unknown.
    """
    if kind is not None and kind not in get_args(Kind):
        raise ConfigError(f"--kind {kind!r} is none of {', '.join(get_args(Kind))}")
    if not given:
        raise ConfigError("no source was given: name a file, a folder, a glob or hf:NAME")
    named = [text for text in given if text.startswith("hf:")]
    if named or kind == "hf":
        if len(given) > 1:
            raise ConfigError("a Hugging Face data set is ingested alone: give one source")
        return _hugging_face(given[0])
    files: list[SourceFile] = []
    for text in given:
        if kind is None and Path(text).is_dir() and any((Path(text) / mark).is_file() for mark in _HF_MARKS):
            if len(given) > 1:
                raise ConfigError(f"{text} is a Hugging Face data set, which is ingested alone: give one source")
            return _hugging_face(f"hf:{text}")
        files += _files(text, kind)
    names = [file.location for file in files]
    if twice := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        raise DataError(f"{twice[0]} is given twice, and would be ingested twice: name it once")
    if kind is None:
        kind = _kind(files, given)
    return Source(kind=kind, files=tuple(files))


def _hugging_face(text: str) -> Source:
    path, _, rest = text.removeprefix("hf:").partition(":")
    config, _, split = rest.partition(":")
    if not path:
        raise ConfigError(f"{text!r} names no data set: it is hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    files = tuple(_walk(Path(path))) if Path(path).is_dir() else ()
    return Source(kind="hf", files=files, hf=HFName(path=path, config=config or None, split=split or None))


def _files(text: str, kind: Kind | None) -> list[SourceFile]:
    if "://" in text:
        return _remote(text)
    path = Path(text)
    if path.is_dir():
        if not (found := _walk(path)):
            raise DataError(f"{path} holds no files (hidden ones are left out): name a folder with data")
        return found
    if path.exists():
        return [_local(path, text)]
    if glob.has_magic(text):
        if found := sorted(name for name in glob.glob(text, recursive=True) if os.path.isfile(name)):
            return [_local(Path(name), name) for name in found]
        raise DataError(f"no file matches {text!r} (in {Path.cwd()})")
    if "{" in text:
        from braceexpand import braceexpand  # as WebDataset writes shards

        if (names := list(braceexpand(text))) != [text]:
            return [file for name in names for file in _files(name, kind)]
    raise DataError(f"{text} does not exist (looked for in {Path.cwd()}); check the path")


def _walk(folder: Path) -> list[SourceFile]:
    found = []
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(base, name) for name in names if not name.startswith(".") and Path(base, name).is_file()]
    return [
        _local(path, path.relative_to(folder).as_posix())
        for path in sorted(found, key=lambda path: path.relative_to(folder).as_posix())
    ]


def _local(path: Path, name: str) -> SourceFile:
    try:
        info = path.stat()
        if not path.is_file():
            raise DataError(
                f"{path} is not a regular file: a pipe or device cannot be read twice; save it to a file first"
            )
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return SourceFile(name=name, location=str(path), bytes=info.st_size, stamp=str(info.st_mtime_ns))


def _remote(url: str) -> list[SourceFile]:
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
        if glob.has_magic(path) and not system.exists(path):
            paths = sorted(system.glob(path))
        elif not url.startswith(("http://", "https://")) and system.isdir(path):
            paths = sorted(system.find(path))
        else:
            paths = [path]
        found = []
        for name in paths:
            info = system.info(name)
            stamp = next(
                (str(info[key]) for key in ("ETag", "etag", "LastModified", "mtime", "created") if info.get(key)), ""
            )
            location = system.unstrip_protocol(name)
            found.append(SourceFile(name=location, location=location, bytes=info.get("size") or 0, stamp=stamp))
    except Exception as error:  # each file system has errors of its own
        raise _unreadable(url, error) from error
    if not found:
        raise DataError(f"no file matches {url!r}")
    return found


def _unreadable(url: str, error: BaseException) -> DataError:
    return DataError(
        f"{url} cannot be read: {type(error).__name__}: {error}; check the address, the credentials and the network, "
        "or download it and name the local file"
    )


def _kind(files: Sequence[SourceFile], given: Sequence[str]) -> Kind:
    kinds: dict[Kind | None, list[str]] = {}
    for file in files:
        kinds.setdefault(_kind_of(file.location), []).append(file.name)
    if len(kinds) == 1 and (kind := next(iter(kinds))) is not None:
        return kind
    seen = "; ".join(
        f"{kind or 'unknown'}: {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")
        for kind, names in kinds.items()
    )
    hint = (
        " (a .json file with one row per line: --kind jsonl)"
        if any(file.name.endswith(".json") for file in files)
        else ""
    )
    raise DataError(
        f"the kind of {' '.join(given)} cannot be told from the endings: {seen}; say it with --kind "
        f"{'|'.join(get_args(Kind))}{hint}, or name files of one kind"
    )


def _kind_of(name: str) -> Kind | None:
    stem = name.split("?")[0].lower()
    for ending in _COMPRESSED:
        stem = stem.removesuffix(ending)
    for kind, endings in _ENDINGS.items():
        if stem.endswith(endings):
            return kind
    return None


# Bytes --------------------------------------------------------------------------------------------------------------------


def open_file(file: SourceFile) -> BinaryIO:
    """The file's own bytes."""
    try:
        if "://" in file.location:
            from fsspec.core import url_to_fs

            system, path = url_to_fs(file.location)
            return system.open(path, "rb")
        return open(file.location, "rb")
    except Exception as error:
        raise _unreadable(file.location, error) from error


def chunks(file: SourceFile, at: int = 0) -> Iterator[tuple[bytes, int]]:
    """The content from byte `at`, decompressed by the file's ending, with how many of the file's own bytes were read.

    A compressed file is decompressed from its beginning, for it has no other entrance.

    Raises:
        DataError: the file cannot be read, or is truncated or corrupt.
    """
    name = file.location.lower()
    with open_file(file) as raw:
        try:
            if name.endswith((".gz", ".tgz")):
                yield from _skip(_decompressed(raw, lambda: zlib.decompressobj(31)), at)
            elif name.endswith(".zst"):
                import zstandard

                yield from _skip(_decompressed(raw, lambda: zstandard.ZstdDecompressor().decompressobj()), at)
            else:
                raw.seek(at)
                while chunk := raw.read(CHUNK):
                    at += len(chunk)
                    yield chunk, at
        except _Truncated as error:
            raise DataError(
                f"{file.name} is truncated: its last compressed frame does not end ({file.bytes} bytes); get it again, and begin anew"
            ) from error
        except zlib.error as error:
            raise _corrupt(file, "gzip", raw, error) from error
        except (DataError, GeneratorExit):
            raise
        except Exception as error:
            if type(error).__name__ == "ZstdError":
                raise _corrupt(file, "zstd", raw, error) from error
            raise _unreadable(file.location, error) from error


class _Truncated(Exception):
    pass


def _corrupt(file: SourceFile, what: str, raw: BinaryIO, error: Exception) -> DataError:
    return DataError(
        f"{file.name} is corrupt {what}: {error} (within its first {raw.tell()} of {file.bytes} bytes); get it again, and begin anew"
    )


def _decompressed(raw: BinaryIO, start: Any) -> Iterator[tuple[bytes, int]]:
    """Pieces of about CHUNK bytes; several frames after each other are one content."""
    frame, parts, size, used, begun = start(), [], 0, 0, False
    while bites := raw.read(CHUNK >> 4):
        for begin in range(0, len(bites), _BITE):
            bite = bites[begin : begin + _BITE]
            used += len(bite)
            while bite:
                begun = True
                piece = frame.decompress(bite)
                bite = b""
                if piece:
                    parts.append(piece)
                    size += len(piece)
                if frame.eof:
                    bite, frame, begun = frame.unused_data, start(), False
                    if bite.strip(b"\0") == b"":
                        bite = b""  # padding, as gzip itself skips it
            if size >= CHUNK:
                yield b"".join(parts), used
                parts, size = [], 0
    if parts:
        yield b"".join(parts), used
    if begun:
        raise _Truncated


def _skip(pieces: Iterator[tuple[bytes, int]], at: int) -> Iterator[tuple[bytes, int]]:
    for piece, used in pieces:
        if at >= len(piece):
            at -= len(piece)
            continue
        yield piece[at:], used
        at = 0


def digest(file: SourceFile, stop: Event) -> str | None:
    """SHA-256 of the file's own bytes; None for a URL, which would be fetched a second time. Ends early when `stop` is set."""
    if "://" in file.location:
        return None
    found = hashlib.sha256()
    try:
        with open_file(file) as raw:
            while (chunk := raw.read(CHUNK)) and not stop.is_set():
                found.update(chunk)
    except OSError as error:
        raise _unreadable(file.location, error) from error
    return found.hexdigest()


def check_unchanged(file: SourceFile) -> None:
    """Raises DataError when a file is not the one that the job began with. (Of a URL only its server could tell.)"""
    if "://" in file.location:
        return
    now = _local(Path(file.location), file.name)
    if now != file:
        raise DataError(
            f"{file.location} was changed while it was ingested (from {file.bytes} to {now.bytes} bytes): wait until it is finished, "
            "delete _job in the output folder, and begin anew"
        )
