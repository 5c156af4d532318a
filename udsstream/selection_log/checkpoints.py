"""What is kept at a checkpoint: the ranks' heads under one Merkle root, and in mode "tail" the memory's vectors.

The heads file is a convenience for auditors; what makes it evidence is the same root in the checkpoint and the run's logger.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from udsstream.errors import LogCorruptError
from udsstream.selection_log import layout
from udsstream.selection_log.digest import merkle_root
from udsstream.selection_log.encoding import TableCodec
from udsstream.selection_log.files import make_dirs, map_file, read_small, replace_file
from udsstream.selection_log.frames import FrameError, footer_blocks, frames, record_batch
from udsstream.selection_log.manifest import checked_json, parse_checked_json
from udsstream.selection_log.schema import EmbeddingDtype, embedding_type

__all__ = ["Heads", "Memory", "buffer_codec", "heads_files", "read_buffer", "read_heads", "write_buffer", "write_heads"]

HEADS_LIMIT = 16 << 20
_HEADS = re.compile(r"ba(\d{8,})(?:-a(\d+))?\.json")


@dataclass(frozen=True, kw_only=True, eq=False)
class Memory:
    """The embedding memory before a step."""

    embeddings: np.ndarray = field(repr=False)  # (m, d), oldest first, in the type that was stored
    pushed: int  # embeddings pushed over the whole run, so that the i-th here has push_index pushed - m + i
    digest: bytes | None  # as the writer was given it; None when nothing had been pushed


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The content of a heads file."""

    step: int
    attempt: int
    heads: tuple[bytes, ...]  # by rank
    root: bytes
    pushed: int
    buffer_digest: bytes
    buffer_rows: int | None  # None: no vectors were kept
    buffer_sha256: str | None


def heads_files(root: Path) -> list[Path]:
    """All heads files, those of superseded attempts included, by name."""
    folder = root / "_heads"
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if _HEADS.fullmatch(entry.name))


def write_heads(root: Path, heads: Heads) -> None:
    """Put the heads file; one of an older attempt at the same step is moved aside. OSError passes through."""
    path = layout.heads_path(root, heads.step)
    make_dirs(path.parent)
    if path.exists():
        old = read_heads(path)
        if old.attempt != heads.attempt:
            os.replace(path, layout.old_heads_path(root, heads.step, old.attempt))
    value: dict[str, Any] = {
        "step": heads.step,
        "attempt": heads.attempt,
        "heads": [head.hex() for head in heads.heads],
        "root": heads.root.hex(),
        "pushed": heads.pushed,
        "buffer_digest": heads.buffer_digest.hex(),
        "buffer_rows": heads.buffer_rows,
        "buffer_sha256": heads.buffer_sha256,
    }
    replace_file(path, checked_json(value) + b"\n")


def read_heads(path: Path) -> Heads:
    """Read and check a heads file: its own check, its Merkle root, and its name."""

    def count(name: str) -> int:
        item = value[name]
        if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < 1 << 62:
            raise ValueError(f"the field {name} is {item!r}")
        return item

    try:
        data = read_small(path, HEADS_LIMIT)
        if not data.endswith(b"\n"):
            raise ValueError("it has no end")
        value = parse_checked_json(data[:-1])
        heads = tuple(bytes.fromhex(item) for item in value["heads"])
        result = Heads(
            step=count("step"),
            attempt=count("attempt"),
            heads=heads,
            root=bytes.fromhex(value["root"]),
            pushed=count("pushed"),
            buffer_digest=bytes.fromhex(value["buffer_digest"]),
            buffer_rows=None if value["buffer_rows"] is None else count("buffer_rows"),
            buffer_sha256=value["buffer_sha256"],
        )
        if (result.buffer_rows is None) != (result.buffer_sha256 is None) or len(value) != 8:
            raise ValueError("its fields are not those of a heads file")
    except (ValueError, TypeError, KeyError) as error:
        raise LogCorruptError(f"{path}: {error}. Restore it from a copy.") from error
    name = _HEADS.fullmatch(path.name)
    if not name or int(name[1]) != result.step or (name[2] is not None and int(name[2]) != result.attempt):
        raise LogCorruptError(f"{path} holds the heads of step {result.step}, attempt {result.attempt}: it was renamed")
    if merkle_root(result.heads) != result.root or any(len(head) != 32 for head in heads):
        raise LogCorruptError(f"{path}: the Merkle root does not follow from the ranks' heads")
    return result


def buffer_codec(dim: int, dtype: EmbeddingDtype) -> TableCodec:
    schema = pa.schema(
        [
            pa.field("step", pa.int64(), nullable=False),
            pa.field("push_index", pa.int64(), nullable=False),
            pa.field("embedding", embedding_type(dim, dtype)),
        ]
    )
    return TableCodec("buffer", schema)


def write_buffer(root: Path, codec: TableCodec, *, step: int, attempt: int, buffer: np.ndarray, pushed: int) -> str:
    """Write the memory's vectors, oldest first; the SHA-256 of the file in hex. OSError passes through."""
    rows = len(buffer)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, codec.schema) as writer:
        if rows:
            columns = {"step": step, "push_index": np.arange(pushed - rows, pushed), "embedding": buffer}
            writer.write_batch(codec.encode(columns, rows)[0])
    data = sink.getvalue().to_pybytes()
    path = layout.buffer_path(root, step, attempt)
    make_dirs(path.parent)
    replace_file(path, data)
    return hashlib.sha256(data).hexdigest()


def read_buffer(root: Path, codec: TableCodec, heads: Heads) -> Memory:
    """The memory that was kept with these heads. FileNotFoundError when its file is gone (an old one may be deleted)."""
    assert heads.buffer_rows is not None
    path = layout.buffer_path(root, heads.step, heads.attempt)
    data = map_file(path)
    if hashlib.sha256(data).hexdigest() != heads.buffer_sha256:
        raise LogCorruptError(
            f"{path}: the vectors are not those that the heads of step {heads.step} speak of. Restore the file from a copy."
        )
    try:
        footer_blocks(data)
        batches = list(frames(data, 8))[1:]
        rows = sum(record_batch(data, frame, codec, compression=False).rows for frame in batches)
        if rows != heads.buffer_rows:
            raise FrameError(f"it has {rows} rows, expected {heads.buffer_rows}")
        with pa.ipc.open_stream(pa.py_buffer(data[8:])) as reader:
            if not reader.schema.equals(codec.schema):
                raise FrameError("its columns are not those of a memory")
            table = reader.read_all()
        table.validate(full=True)
    except (FrameError, pa.ArrowException, OSError, ValueError) as error:
        raise LogCorruptError(f"{path}: {error}") from error
    values = {column.name: array for column, array, _ in codec.canonical(table)}
    first = heads.pushed - rows
    if not np.array_equal(values["push_index"], np.arange(first, heads.pushed)) or (values["step"] != heads.step).any():
        raise LogCorruptError(f"{path}: the vectors are not the last {rows} of {heads.pushed} pushed")
    return Memory(embeddings=values["embedding"].copy(), pushed=heads.pushed, digest=heads.buffer_digest)
