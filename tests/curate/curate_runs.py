"""Streams of several columns, and logs whose ids, streams, shards and rows are those of real MDS folders. No model, no training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter
from uds_log import run as described

from udsstream.selection_log.writer import SelectionLogWriter

TEXTS = [
    "the cat sat",
    "",
    "Grüße aus Zürich — 你好 🌍",
    'line\nbreak\ttab "quoted" \\',
    "x" * 300_000,
    "\u2028 \x00 end",
]
COLUMNS = {
    "text": "str",
    "messages": "json",
    "blob": "bytes",
    "number": "int",
    "small": "uint8",
    "ratio": "float32",
    "exact": "float64",
    "tokens": "ndarray:int32",
    "image": "ndarray:float32:2,3",
    "any": "ndarray",
    "huge": "str_int",
    "price": "str_decimal",
}


def sample(number: int, tag: str = "") -> dict[str, Any]:
    """A row with a value of every kind; all follow from the number."""
    turns = [
        {"role": "user", "content": TEXTS[number % 6][:40], "meta": {"n": number, "none": None, "list": [1.5, True]}}
    ]
    return {
        "text": f"{tag}{number}: {TEXTS[number % 6]}" if number % 6 != 1 else "",
        "messages": turns * (number % 3),
        "blob": bytes(range(256)) * (number % 3) + number.to_bytes(2, "little"),
        "number": -(1 << 62) + number,
        "small": number % 256,
        "ratio": float(np.float32(0.1 * number)),
        "exact": number / 7,
        "tokens": np.arange(1 + number % 5, dtype=np.int32) + number,
        "image": np.full((2, 3), number, np.float32),
        "any": np.arange(6, dtype=np.int16).reshape(2, 3) + number % 9,
        "huge": 10**30 + number,
        "price": Decimal("0.10") + number,
    }


def write_stream(
    folder: Path, rows: Sequence[dict[str, Any]], columns: dict[str, str] | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """An MDS folder; its rows."""
    settings = {"hashes": ["sha1"], "size_limit": 1 << 14} | settings
    with MDSWriter(out=str(folder), columns=columns or dict.fromkeys(rows[0], "str"), **settings) as writer:
        for row in rows:
            writer.write(row)
    return list(rows)


def describe(folders: Sequence[Path], **changes: Any) -> dict[str, Any]:
    """run.json of a run over these streams."""
    streams = []
    for folder in folders:
        index = (folder / "index.json").read_bytes()
        streams.append(
            {
                "name": folder.name,
                "location": str(folder),
                "samples": sum(shard["samples"] for shard in json.loads(index)["shards"]),
                "index_sha256": hashlib.sha256(index).hexdigest(),
                "licence": "unknown",
                "date": "unknown",
            }
        )
    return described(streams=streams, model={"name": "tiny"}, **changes)


def write_log(
    root: Path,
    folders: Sequence[Path],
    *,
    steps: int = 12,
    rows: int = 6,
    keep: int = 2,
    ranks: int = 1,
    seed: int = 0,
    run: dict[str, Any] | None = None,
    shards: bool = True,
) -> Path:
    """A log of `steps` steps: `rows` candidates drawn from the streams, epoch after epoch, the `keep` best of them kept."""
    run = run or describe(folders)
    place = []
    for number, folder in enumerate(folders):
        index = json.loads((folder / "index.json").read_bytes())
        for at, shard in enumerate(index["shards"]):
            place += [(number, at, row) for row in range(shard["samples"])]
    writers = [
        SelectionLogWriter.create(
            root, run=run, rank=rank, world_size=ranks, embeddings="none", embedding_dim=6, buffer_capacity=9
        )
        for rank in range(ranks)
    ]
    rng = np.random.default_rng(seed)
    per_epoch = max(1, len(place) // rows)
    for step in range(steps):
        if step % per_epoch == 0:
            order = rng.permutation(len(place))
        ids = order[(step % per_epoch) * rows :][:rows].astype(np.int64)
        intra = np.round(rng.random(len(ids)) * 4).astype(np.float32)  # coarse, so that there are ties
        inter = np.round(rng.random(len(ids)) * 4).astype(np.float32)
        score = (intra + np.float32(0.5) * inter).astype(np.float32)
        selected = np.zeros(len(ids), bool)
        selected[sorted(range(len(ids)), key=lambda row: (-score[row], row))[:keep]] = True
        columns = {
            "epoch": np.full(len(ids), step // per_epoch, np.int32),
            "position": np.arange(len(ids), dtype=np.int32),
            "epoch_position": np.arange(len(ids), dtype=np.int64) + step % per_epoch * rows,
            "sample_id": ids,
            "stream": np.array([place[i][0] for i in ids], np.int16),
            "tokens": (3 + ids % 23).astype(np.int32),
            "intra": intra,
            "inter": inter,
            "score": score,
            "selected": selected,
            "train_order": np.ma.MaskedArray((np.cumsum(selected) - 1).astype(np.int32), mask=~selected),
        }
        if shards:
            columns["shard"] = np.array([place[i][1] for i in ids], np.int32)
            columns["shard_index"] = np.array([place[i][2] for i in ids], np.int32)
        for rank, writer in enumerate(writers):
            mine = np.arange(len(ids)) % ranks == rank
            if mine.any():
                writer.append(step, {name: values[mine] for name, values in columns.items()})
    for writer in writers:
        writer.close()
    return root


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """The working directory, for tools that want relative paths."""
    import os

    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
