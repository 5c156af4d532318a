"""Digests of the selection log: of one batch of rows, of a chain of batches, of a rank's head, of all ranks' heads.

Pure functions over bytes; `docs/log_format.md` ("Digests") is the normative text and this file follows it. A digest covers
the *content* of the columns, never Arrow's buffers: padding, offsets, compression and file format do not enter, so that the
same rows give the same digest in a write-ahead file, in a sealed segment and in Parquet.

What this does not give: a proof against someone who can rewrite the whole folder. SHA-256 has no key; a chain is evidence
only relative to a head that is kept elsewhere (the checkpoint, the run's logger).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

__all__ = [
    "ATTEMPTS",
    "DIGEST_RULE",
    "attempt_link",
    "batch_link",
    "content_digest",
    "genesis",
    "merkle_root",
    "rank_head",
    "schema_digest",
]

DIGEST_RULE = "udsstream-sha256-1"

ATTEMPTS = 1 << 15
"""How many attempts a log can have: the chain has their numbers as int16."""

_ATTEMPT = b"\x01"
_BATCH = b"\x02"


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def schema_digest(table: str, version: int, columns: Sequence[tuple[str, str, bool]]) -> bytes:
    """SHA-256 of the table's name, schema version and columns, each given as (name, type, nullable)."""
    lines = [f"udsstream {table} {version}"]
    lines += [f"{name} {kind} {'nullable' if nullable else 'required'}" for name, kind, nullable in columns]
    return _sha256("".join(line + "\n" for line in lines).encode())


def content_digest(schema: bytes, rows: int, pieces: Sequence[bytes | memoryview]) -> bytes:
    """SHA-256 of a batch: the schema's digest, the number of rows (u64), then each column's bytes in schema order.

    A nullable column gives two pieces, its validity bits and its values; any other gives its values. The widths are fixed,
    so the concatenation is unambiguous once the schema and the number of rows are in front of it.
    """
    return _sha256(b"".join((schema, struct.pack("<Q", rows), *pieces)))


def genesis(table: str, rank: int, run_json_sha256: bytes) -> bytes:
    """The chain's value before anything was written: it binds the table, the rank and every byte of run.json."""
    return _sha256(b"udsstream log 1\0" + table.encode() + b"\0" + struct.pack("<I", rank) + run_json_sha256)


def attempt_link(previous: bytes, attempt: int, from_step: int, parent: int | None) -> bytes:
    """The chain's value after an attempt began at `from_step`, continuing attempt `parent` (None: from nothing)."""
    return _sha256(previous + _ATTEMPT + struct.pack("<hqh", attempt, from_step, -1 if parent is None else parent))


def batch_link(previous: bytes, content: bytes) -> bytes:
    """The chain's value after a batch with this content digest."""
    return _sha256(previous + _BATCH + content)


def rank_head(selection: bytes, pushes: bytes) -> bytes:
    """The 32 bytes that stand for all that a rank has written: its two chains, one per table."""
    return _sha256(b"udsstream head 1\0" + selection + pushes)


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """Merkle Tree Hash of RFC 6962, section 2.1, over `leaves` in order (here: the ranks' heads)."""
    if not leaves:
        return _sha256(b"")
    if len(leaves) == 1:
        return _sha256(b"\x00" + leaves[0])
    split = 1 << ((len(leaves) - 1).bit_length() - 1)  # the largest power of two smaller than the number of leaves
    return _sha256(b"\x01" + merkle_root(leaves[:split]) + merkle_root(leaves[split:]))
