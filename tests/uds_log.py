"""Small logs whose choices are what they should be: the k best of intra + α·inter, with ties, steps without scores, ranks and resumes.

Every value follows from (seed, attempt, step, rank) alone. `tests/selection_log/recorded.py` has logs whose choices are arbitrary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from udsstream.config import SelectionConfig
from udsstream.selection_log.writer import SelectionLogWriter

ALPHA = 0.5
DIM, CAPACITY = 6, 9
STREAMS = [("pairs", 20), ("long", 11), ("unused", 3)]


def run(method: str = "uds", **changes: Any) -> dict[str, Any]:
    """What run.json says of such a log."""
    config = SelectionConfig(method=method, keep=2, alpha=ALPHA, buffer_size=CAPACITY, projection_dims=(3, 2))  # type: ignore[arg-type]
    description: dict[str, Any] = {
        "run_id": "9f0e",
        "created": "2026-11-24T03:00:00+00:00",
        "selection": config.as_dict(),
        "selection_fingerprint": config.fingerprint(),
        "resolved_alpha": ALPHA,
        "streams": [
            {"name": name, "location": f"/data/{name}", "samples": count, "index_sha256": f"{number:064x}"}
            for number, (name, count) in enumerate(STREAMS)
        ],
        "versions": {"udsstream": "0.1.0"},
    }
    return description | changes


def candidates(step: int, *, rows: int, method: str, scored: bool, attempt: int = 0, seed: int = 0) -> dict[str, Any]:
    """The global candidate batch of one step: coarse values, so that there are ties."""
    rng = np.random.default_rng([seed, attempt, step])
    ids = rng.choice(31, rows, replace=False).astype(np.int64)
    tokens = (3 + ids * 7 % 23).astype(np.int32)
    intra = np.round(tokens / 8 + rng.random(rows)).astype(np.float32)
    inter = np.round(rng.random(rows) * 4).astype(np.float32)
    columns: dict[str, Any] = {
        "epoch": np.full(rows, step // 5, np.int32),
        "position": np.arange(rows, dtype=np.int32),
        "epoch_position": np.arange(rows, dtype=np.int64) + step % 5 * rows,
        "sample_id": ids,
        "stream": (ids >= STREAMS[0][1]).astype(np.int16),
        "shard": (ids % 3).astype(np.int32),
        "shard_index": (ids // 3).astype(np.int32),
        "tokens": tokens,
    }
    selected = np.ones(rows, bool)
    if scored:
        if method == "uds":
            score = (intra.astype(np.float64) + ALPHA * inter.astype(np.float64)).astype(np.float32)
            columns |= {"intra": intra, "inter": inter}
        else:
            score = rng.random(rows).astype(np.float32)
        columns["score"] = score
        selected = np.zeros(rows, bool)
        selected[sorted(range(rows), key=lambda row: (-score[row], row))[:2]] = True
    columns["selected"] = selected
    order = np.cumsum(selected) - 1
    columns["train_order"] = np.ma.MaskedArray(order.astype(np.int32), mask=~selected)
    return columns


def append(writer: SelectionLogWriter, first: int, stop: int, **settings: Any) -> None:
    """Logs this rank's part of the steps from `first` to before `stop`, and pushes what was kept."""
    rows, method, off = settings.get("rows", 7), settings.get("method", "uds"), settings.get("off", ())
    mode = settings.get("embeddings", "none")
    for step in range(first, stop):
        batch = candidates(
            step,
            rows=rows - step % 2,
            method=method,
            scored=step not in off,
            attempt=writer.attempt,
            seed=settings.get("seed", 0),
        )
        if not settings.get("streams", True):
            for name in ("stream", "shard", "shard_index"):
                del batch[name]
        mine = np.arange(rows - step % 2) % writer.world_size == writer.rank
        writer.append(step, {name: values[mine] for name, values in batch.items()})
        if mode != "none" and writer.world_size == 1:
            ids = batch["sample_id"][batch["selected"]]
            writer.push(
                step,
                positions=batch["position"][batch["selected"]],
                sample_ids=ids,
                push_index=settings["pushed"][0],
                embeddings=vectors(ids, step),
                digest=bytes(32),
            )
            settings["pushed"][0] += len(ids)


def vectors(ids: np.ndarray, step: int) -> np.ndarray:
    """Samples that agree modulo 5 are near to each other, one sample at two steps nearer still."""
    centres = np.random.default_rng(3).standard_normal((5, DIM))
    return np.stack(
        [
            centres[i % 5] + 1e-2 * np.random.default_rng([4, i]).standard_normal(DIM)
            + 1e-3 * np.random.default_rng([4, i, step]).standard_normal(DIM)
            for i in ids.tolist()
        ]
    ).astype(np.float32)  # fmt: skip


def write(root: Path, *, steps: int = 12, ranks: int = 1, resume_at: int | None = None, **settings: Any) -> Path:
    """A closed log. With `resume_at` all steps from there on are superseded by a second attempt, which goes as far.

    Settings: rows, method, off (steps without scores), streams (False: no stream columns and none in run.json), embeddings, seed,
    checkpoints (steps before which there is one), run (changes of run.json).
    """
    description = run(settings.get("method", "uds"), **settings.pop("run", {}))
    if not settings.get("streams", True):
        del description["streams"]
    mode = settings.get("embeddings", "none")
    settings["pushed"] = [0]
    points = sorted({*settings.get("checkpoints", ()), *([resume_at] if resume_at else [])})
    writers = [
        SelectionLogWriter.create(
            root,
            run=description,
            rank=rank,
            world_size=ranks,
            embeddings=mode,
            embedding_dim=DIM,
            buffer_capacity=CAPACITY,
        )
        for rank in range(ranks)
    ]
    kept = _record(writers, 0, steps, points, settings)
    for writer in writers:
        writer.close()
    if resume_at is not None:
        settings["pushed"] = [kept[resume_at][1]]
        writers = [
            SelectionLogWriter.resume(
                root, step=resume_at, head=kept[resume_at][0][rank], rank=rank, world_size=ranks, attempt=1
            )
            for rank in range(ranks)
        ]
        _record(writers, resume_at, steps, [point for point in points if point > resume_at], settings)
        for writer in writers:
            writer.close()
    return root


def _record(writers: list[SelectionLogWriter], first: int, steps: int, points: list[int], settings: dict[str, Any]):
    kept = {}
    for step in [*points, steps]:
        for writer in writers:
            append(writer, first, step, **settings)
        first = step
        if step in points:
            heads = [writer.sync() for writer in writers]
            pushed = settings["pushed"][0]
            held = np.ones((min(pushed, CAPACITY), DIM), np.float32) if settings.get("embeddings") == "tail" else None
            writers[0].checkpoint(step, heads=heads, buffer=held, pushed=pushed, buffer_digest=bytes(32))
            kept[step] = (heads, settings["pushed"][0])
    return kept
