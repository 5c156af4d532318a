"""Writes the golden logs of a schema version. Run it once per version; what is committed never changes again.

    PYTHONPATH=. python tests/selection_log/make_golden.py 1 tests/selection_log/golden_v1
    PYTHONPATH=. python tests/selection_log/make_golden.py 2 tests/selection_log/golden_v2

Version 1:

full/   two ranks, embeddings="full", a resume that supersedes steps, sealed segments and live write-ahead files
tail/   one rank, embeddings="tail" in float16, two checkpoints, closed

Version 2:

measured/   one rank, embeddings="none", every column of version 2, nulls in them, a sealed segment and a live write-ahead file

expected.json   the rows and vectors, not read from the logs but from what went into them
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import recorded

from udsstream.selection_log.schema import MEASURES
from udsstream.selection_log.writer import SelectionLogWriter

RUN = {"run_id": "golden", "streams": [{"name": "a", "location": "streams/a", "licence": "unknown", "date": "unknown"}]}


def write_full(root: Path) -> dict[str, Any]:
    writers = [recorded.create(root, rank=r, world_size=2, run=RUN) for r in range(2)]
    for step in range(5):
        for writer in writers:
            recorded.log_step(writer, step, rank=writer.rank, seed=1 if step >= 3 else 0)
            if step == 1:
                writer.seal()
        if step == 2:
            heads = [writer.sync() for writer in writers]
            for writer in writers:
                writer.checkpoint(3, heads=heads, pushed=12, buffer_digest=recorded.digest_after(2))
    for writer in writers:
        writer.release()
    first = SelectionLogWriter.resume(root, step=3, head=heads[0], world_size=2)
    again = [
        first,
        SelectionLogWriter.resume(root, step=3, head=heads[1], rank=1, world_size=2, attempt=first.attempt),
    ]
    for step in (3, 4):
        for writer in again:
            recorded.log_step(writer, step, rank=writer.rank)
    merkle = {writer.checkpoint(5, heads=[w.sync() for w in again], pushed=20) for writer in again}
    again[0].seal()
    for writer in again:
        writer.release()
    rows = [row for s in range(5) for r in range(2) for row in recorded.expected(s, rank=r, attempt=0 if s < 3 else 1)]
    vectors = np.concatenate([recorded.vectors(s, r) for s in range(5) for r in range(2)])
    return {"rows": rows, "memory": vectors[-recorded.CAPACITY :].tolist(), "root": merkle.pop().hex()}


def write_tail(root: Path) -> dict[str, Any]:
    with recorded.create(root, embeddings="tail", embedding_dtype="float16", run=RUN) as writer:
        recorded.record(writer, 0, 2)
        recorded.checkpoint(writer, 2)
        recorded.record(writer, 2, 4)
        recorded.checkpoint(writer, 4)
        head = writer.head
    rows = [row for s in range(4) for row in recorded.expected(s)]
    memory = recorded.memory_before(4)[0].astype(np.float16)
    return {"rows": rows, "memory": memory.tolist(), "head": head.hex()}


def write_measured(root: Path) -> dict[str, Any]:
    writer = recorded.create(root, embeddings="none", run=RUN, measures=MEASURES, interactions=5)
    rows: list[dict[str, Any]] = []
    for step in range(4):
        more = recorded.measured(step)
        writer.append(step, recorded.columns(step) | more)
        for place, row in enumerate(recorded.expected(step)):
            extra = {name: more[name][place] if name in more else None for name in MEASURES}
            plain = {name: None if v is None or v is np.ma.masked else v.tolist() for name, v in extra.items()}
            rows.append(row | plain)
        if step == 2:
            writer.seal()
    head = writer.sync()
    writer.release()
    return {"rows": rows, "head": head.hex()}


def main(version: int, folder: Path) -> None:
    folder.mkdir()
    if version == 1:
        expected = {"full": write_full(folder / "full"), "tail": write_tail(folder / "tail")}
    else:
        expected = {"measured": write_measured(folder / "measured")}
    (folder / "expected.json").write_text(json.dumps(expected))
    for lock in folder.rglob("lock"):
        lock.unlink()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
