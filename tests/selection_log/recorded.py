"""Small recorded runs: every value follows from (seed, rank, step) alone, so that a resumed run repeats what it lost."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from udsstream.selection_log.schema import MEASURES
from udsstream.selection_log.writer import SelectionLogWriter

DIM = 4
CAPACITY = 6


def columns(step: int, rows: int = 5, rank: int = 0, seed: int = 0) -> dict[str, Any]:
    """A step's decisions of one rank: odd numbers of rows, nulls in most nullable columns."""
    rng = np.random.default_rng([seed, rank, step])
    kept = rows // 2
    selected = np.zeros(rows, bool)
    selected[rng.permutation(rows)[:kept]] = True
    order = np.ma.MaskedArray(np.zeros(rows, np.int32), mask=~selected)
    order[selected] = rng.permutation(kept).astype(np.int32)
    return {
        "epoch": np.full(rows, step // 7, np.int32),
        "position": np.arange(rank * rows, (rank + 1) * rows, dtype=np.int32),
        "epoch_position": np.arange(rows, dtype=np.int64) + 100 * step,
        "sample_id": rng.integers(0, 1 << 40, rows),
        "stream": np.zeros(rows, np.int16),
        "shard": np.ma.MaskedArray(rng.integers(0, 9, rows).astype(np.int32), mask=rng.random(rows) < 0.3),
        "tokens": rng.integers(1, 2048, rows).astype(np.int32),
        "intra": rng.random(rows).astype(np.float32),
        "inter": np.ma.MaskedArray(rng.random(rows).astype(np.float32), mask=np.full(rows, step == 0)),
        "score": rng.random(rows).astype(np.float32),
        "selected": selected,
        "train_order": order,
    }


def measured(step: int, rows: int = 5, width: int = 5) -> dict[str, Any]:
    """The columns of version 2; at step 1 nothing was measured."""
    if step == 1:
        return {}
    rng = np.random.default_rng([step, 2])
    values = {name: rng.standard_normal(rows).astype(np.float32) for name in MEASURES if name != "interaction"}
    values["grad_norm"] = np.ma.MaskedArray(values["grad_norm"], mask=np.arange(rows) == 2)
    values["interaction"] = rng.standard_normal((rows, width)).astype(np.float32)
    return values


def vectors(step: int, rank: int = 0, seed: int = 0, count: int = 2) -> np.ndarray:
    return np.random.default_rng([seed, rank, step, 1]).standard_normal((count, DIM)).astype(np.float32)


def digest_after(step: int) -> bytes:
    return hashlib.sha256(f"memory after step {step}".encode()).digest()


def memory_before(step: int, seed: int = 0) -> tuple[np.ndarray, int]:
    """The memory of one rank's run before a step: its vectors, oldest first, and how many were pushed."""
    pushed = [row for s in range(step) for row in vectors(s, seed=seed)]
    return np.array(pushed[-CAPACITY:], np.float32).reshape(-1, DIM), len(pushed)


def create(root: Path, *, embeddings: str = "full", **more: Any) -> SelectionLogWriter:
    more.setdefault("run", {"run_id": "r"})
    return SelectionLogWriter.create(
        root,
        embeddings=embeddings,
        embedding_dim=DIM,
        buffer_capacity=CAPACITY,
        **more,  # type: ignore[arg-type]
    )


def record(writer: SelectionLogWriter, first: int, stop: int, *, rows: int = 5, seed: int = 0) -> None:
    """Log the steps from `first` to before `stop` of one rank."""
    rank = writer.rank
    for step in range(first, stop):
        log_step(writer, step, rows=rows, rank=rank, seed=seed)


def log_step(writer: SelectionLogWriter, step: int, *, rows: int = 5, rank: int = 0, seed: int = 0) -> None:
    given = columns(step, rows, rank, seed)
    writer.append(step, given)
    writer.push(
        step,
        positions=given["position"][:2],
        sample_ids=given["sample_id"][:2],
        push_index=2 * (step * writer.world_size + rank),
        embeddings=vectors(step, rank, seed),
        digest=digest_after(step),
    )


def checkpoint(writer: SelectionLogWriter, step: int, seed: int = 0) -> bytes:
    """What a trainer does at a checkpoint; the head that it would keep."""
    head = writer.sync()
    memory, pushed = memory_before(step, seed)
    writer.checkpoint(step, heads=[head], buffer=memory, pushed=pushed, buffer_digest=digest_after(step - 1))
    return head


def expected(step: int, rows: int = 5, rank: int = 0, seed: int = 0, attempt: int = 0) -> list[dict[str, Any]]:
    """The rows of a step as Python values, as the reader must give them."""
    given = columns(step, rows, rank, seed)
    out = []
    for i in range(rows):
        row: dict[str, Any] = {"attempt": attempt, "step": step, "rank": rank}
        for name, values in given.items():
            value = values[i]
            row[name] = None if value is np.ma.masked else value.item()
        row |= {"shard_index": None, "loss": None}
        out.append(row)
    return out


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(bytes(data))
