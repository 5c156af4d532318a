"""The index of a folder of WebDataset shards: which shards, of what content, and where each sample begins.

    udsstream-index.json            shards by name: size, SHA-256, samples; in the form of Streaming's index (`stream_index.py` reads it)
    udsstream-index.offsets.npy     int64, for each shard of n samples n + 1 numbers: where they begin, and where the last one ends

Members are grouped as `webdataset` does: those that follow each other with one key, the name up to its first dot, are a sample. Made by
reading each shard once; equal folders give equal files. The JSON file comes last and binds the other by its SHA-256. Its own SHA-256 is
the stream's identity in a log, so that neither shards nor ids can change unnoticed.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from webdataset.tariterators import base_plus_ext

from udsstream.errors import DataError, ShardError
from udsstream.job_folder import replace_file
from udsstream.plain_files import pieces
from udsstream.stream_index import INDEX_LIMIT, WEBDATASET_INDEX, parse_index

__all__ = [
    "INDEX",
    "OFFSETS",
    "IndexedShard",
    "WebIndex",
    "build_index",
    "ensure_index",
    "read_index",
    "sample_member",
]

INDEX = WEBDATASET_INDEX
OFFSETS = "udsstream-index.offsets.npy"

_BLOCK = 512
_META = re.compile(r"__[^/]*__($|/)")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True, kw_only=True)
class IndexedShard:
    """A shard, as the index describes it."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True, kw_only=True, eq=False)
class WebIndex:
    """A folder's index."""

    shards: tuple[IndexedShard, ...]
    sha256: str
    """Of the JSON file."""
    all_offsets: np.ndarray = field(repr=False)
    firsts: np.ndarray = field(repr=False)
    """(shards,) where the offsets of each shard begin in them."""

    @property
    def samples(self) -> int:
        """Of all shards."""
        return sum(shard.samples for shard in self.shards)

    def offsets(self, shard: int) -> np.ndarray:
        """(samples + 1,) where the samples of a shard begin, and where the last one ends."""
        first = int(self.firsts[shard])
        return self.all_offsets[first : first + self.shards[shard].samples + 1]


def ensure_index(folder: Path) -> WebIndex:
    """The index in the folder, made now if there is none.

    Raises:
        DataError, ShardError: as `build_index` and `read_index`.
        OutputWriteError: it cannot be written.
    """
    if not (folder / INDEX).exists():
        build_index(folder)
    return read_index(folder)


def sample_member(info: tarfile.TarInfo) -> tuple[str, str] | None:
    """(key, field) of a member of a tar, as `webdataset` reads its name; None for what it would not take for a part of a sample."""
    name = info.name
    meta = _META.match(name) is not None or ("/" not in name and name.startswith("__") and name.endswith("__"))
    key, field = base_plus_ext(name)
    if meta or not info.isreg() or key is None or field is None:
        return None
    return key, field.lower()


def shards_of(folder: Path) -> list[Path]:
    """The folder's shards, by name.

    Raises:
        DataError: it is no folder, has no shards, or compressed ones.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; a WebDataset stream is a folder of .tar shards")
    names = sorted(entry.name for entry in folder.iterdir())
    if compressed := [name for name in names if name.endswith(_COMPRESSED)]:
        raise DataError(
            f"{folder / compressed[0]} is compressed, so that no sample can be reached in it; decompress the shards, or make an "
            "MDS stream of them: udsstream ingest"
        )
    shards = [folder / name for name in names if name.endswith(".tar")]
    if not shards:
        raise DataError(f"{folder} has no .tar shard; a WebDataset stream is a folder of such")
    return shards


def build_index(folder: Path) -> None:
    """Reads every shard once, and writes the index.

    Raises:
        DataError: see `shards_of`; or a shard holds no samples, one key or field twice, or a link.
        ShardError: a shard is truncated or no tar, or cannot be read.
    """
    described, offsets = [], []
    for path in shards_of(folder):
        begins = _scan(path)
        offsets.append(np.array(begins, dtype="<i8"))
        digest, size = hashlib.sha256(), 0
        with open(path, "rb") as file:
            for piece in iter(lambda: file.read(1 << 20), b""):
                digest.update(piece)
                size += len(piece)
        raw = {"basename": path.name, "bytes": size, "hashes": {"sha256": digest.hexdigest()}}
        described.append({"format": "webdataset", "samples": len(begins) - 1, "raw_data": raw})
    data = _npy(np.concatenate(offsets))
    content = {
        "version": 2,
        "offsets": {"basename": OFFSETS, "bytes": len(data), "hashes": {"sha256": hashlib.sha256(data).hexdigest()}},
        "shards": described,
    }
    replace_file(folder / OFFSETS, data)
    replace_file(folder / INDEX, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def _scan(path: Path) -> list[int]:
    """Where each sample of a shard begins, and where the last one ends."""

    def wrong(what: str) -> DataError:
        return DataError(f"shard {path}: {what}")

    begins: list[int] = []
    keys: set[str] = set()
    key, fields, end = None, set(), 0
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue] (the list of all members would grow with the shard)
                if info.islnk() or info.issym():
                    raise wrong(f"member {info.name!r} is a link, which is not followed; write the file itself")
                if (member := sample_member(info)) is None:
                    continue
                found, name = member
                if found != key:
                    if found in keys:
                        raise wrong(
                            f"the key {found!r} comes twice, apart from each other; each sample needs a key of its own"
                        )
                    keys.add(found)
                    begins.append(info.offset)
                    key, fields = found, set()
                if name in fields:
                    raise wrong(f"the sample {key!r} has the member .{name} twice; each sample needs a key of its own")
                fields.add(name)
                end = info.offset_data + -(-info.size // _BLOCK) * _BLOCK
            # tarfile stops without a word at a header that it cannot read. Only zeros are the end.
            file.seek(tar.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError(
                    f"no end-of-archive mark at byte {tar.offset}, where the last readable member ends"
                )
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _truncated(path, str(error)) from error
    if not begins:
        raise wrong("it holds no samples (members named KEY.FIELD); leave it out")
    return [*begins, end]


def _truncated(path: Path, why: str) -> ShardError:
    return ShardError(f"shard {path} is truncated or no tar ({why}); fetch it again, or write it anew")


def read_index(folder: Path) -> WebIndex:
    """Reads the index without trust, and checks that the folder has its shards, with their recorded sizes, and no others.

    Raises:
        DataError: the index is none, or the folder has other shards.
        ShardError: a shard is missing or has another size.
    """
    again = f"delete {INDEX} in {folder} for a new one (a new stream: its ids may name other samples)"
    try:
        data = b"".join(pieces(folder / INDEX, INDEX_LIMIT))
        described = parse_index(data)
        recorded = json.loads(data)["offsets"]["hashes"]["sha256"]
        shards = tuple(
            IndexedShard(name=raw.name, bytes=raw.size, sha256=raw.hashes["sha256"], samples=item.samples)
            for item in described
            for raw, _ in item.files[:1]
        )
        if not shards or any("/" in shard.name for shard in shards):
            raise DataError("it names no shards of this folder")
    except (OSError, KeyError, TypeError, DataError) as error:
        raise DataError(f"{folder / INDEX} is no index of WebDataset shards ({error}); {again}") from error
    names = [path.name for path in shards_of(folder)]
    if missing := [shard.name for shard in shards if shard.name not in names]:
        raise ShardError(
            f"shard {folder / missing[0]} is missing ({len(missing)} of {len(shards)} are); put it back, or {again}"
        )
    if more := sorted(set(names) - {shard.name for shard in shards}):
        raise DataError(
            f"{folder / more[0]} is not in the index ({len(more)} more shards than it names); take it away, or {again}"
        )
    for shard in shards:
        found = (folder / shard.name).stat().st_size
        if found != shard.bytes:
            raise ShardError(
                f"shard {folder / shard.name} has {found} bytes, but the index records {shard.bytes}: it is truncated, or was "
                f"changed; put it back, or {again}"
            )
    return WebIndex(
        shards=shards,
        sha256=hashlib.sha256(data).hexdigest(),
        all_offsets=_read_offsets(folder, shards, recorded, again),
        firsts=np.cumsum([0, *(shard.samples + 1 for shard in shards[:-1])]),
    )


def _read_offsets(folder: Path, shards: Sequence[IndexedShard], sha256: str, again: str) -> np.ndarray:
    path = folder / OFFSETS
    try:
        digest = hashlib.sha256()
        for piece in pieces(path, None):
            digest.update(piece)
        if digest.hexdigest() != sha256:
            raise ValueError("it is not the one that the index speaks of")
        offsets = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); {again}") from error
    if offsets.dtype != np.dtype("<i8") or offsets.shape != (sum(shard.samples + 1 for shard in shards),):
        raise DataError(f"{path} does not hold the places of the samples that the index names; {again}")
    return offsets


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()
