"""Measures the questions of `udsstream log` on a long log; prints figures, asserts nothing. Not collected by pytest.

    PYTHONPATH=. python tests/bench_log_queries.py [--rows 10_000_000] [--per-step 64] [--folder DIR]

One epoch offers 2,000,000 samples of 4 streams, so that a sample comes up to five times; scores follow from intra and inter, a
quarter is kept. With --folder the log is made there once and kept. Each answer's time is also given as a multiple of the
time that it takes to read the three columns step, sample_id and score of the whole log in the same process.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from udsstream.log_queries import queries
from udsstream.log_queries.near_duplicates import near_duplicates
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.writer import SelectionLogWriter

SAMPLES, STREAMS, ALPHA = 2_000_000, 4, 1.5e-3
PUSHES, DIM, MEMORY = 20_000, 1024, 1024
RUN = {
    "run_id": "bench",
    "selection": {"method": "uds"},
    "resolved_alpha": ALPHA,
    "streams": [{"name": f"stream{n}", "samples": SAMPLES // STREAMS} for n in range(STREAMS)],
}


def make(root: Path, rows: int, per_step: int) -> None:
    rng = np.random.default_rng(2)
    tokens = np.clip(rng.lognormal(5, 0.6, SAMPLES), 5, 2048).astype(np.int32)
    order = rng.permutation(SAMPLES)
    steps_per_epoch = SAMPLES // per_step
    with SelectionLogWriter.create(root, run=RUN, embeddings="none") as writer:
        for step in range(rows // per_step):
            if step % steps_per_epoch == 0:
                order = rng.permutation(SAMPLES)
            at = step % steps_per_epoch * per_step
            ids = order[at : at + per_step]
            inter = rng.normal(0.7, 0.1, per_step).astype(np.float32)
            intra = (tokens[ids] * rng.normal(0.01, 0.001, per_step)).astype(np.float32)
            score = (intra.astype(np.float64) + ALPHA * inter).astype(np.float32)
            selected = np.zeros(per_step, bool)
            selected[np.argsort(-score, kind="stable")[: per_step // 4]] = True
            writer.append(
                step,
                {
                    "epoch": np.full(per_step, step // steps_per_epoch, np.int32),
                    "position": np.arange(per_step, dtype=np.int32),
                    "epoch_position": at + np.arange(per_step),
                    "sample_id": ids,
                    "stream": (ids // (SAMPLES // STREAMS)).astype(np.int16),
                    "shard": (ids % (SAMPLES // STREAMS) // 2048).astype(np.int32),
                    "shard_index": (ids % 2048).astype(np.int32),
                    "tokens": tokens[ids],
                    "intra": intra,
                    "inter": inter,
                    "score": score,
                    "selected": selected,
                    "train_order": np.ma.MaskedArray((np.cumsum(selected) - 1).astype(np.int32), mask=~selected),
                },
            )


def push(root: Path) -> None:
    rng = np.random.default_rng(3)
    with SelectionLogWriter.create(
        root, run=RUN, embeddings="full", embedding_dim=DIM, buffer_capacity=MEMORY
    ) as writer:
        for step in range(PUSHES // 16):
            ids = np.arange(16 * step, 16 * step + 16)
            rows = (3 + rng.standard_normal((16, DIM))).astype(np.float32)
            writer.push(
                step, positions=ids % 16, sample_ids=ids, push_index=16 * step, embeddings=rows, digest=bytes(32)
            )


def timed(what: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    what()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--per-step", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-log-queries-") as temporary:
        root = given.folder or Path(temporary) / "log"
        if not (root / "run.json").exists():
            print(f"made in {timed(lambda: make(root, given.rows, given.per_step)):.0f} s")
        log = SelectionLog.open(root)
        half = given.rows // given.per_step // 2
        base = min(timed(lambda: log.table(columns=["step", "sample_id", "score"])) for _ in range(2))
        print(
            f"{given.rows:,} rows, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; three columns read in {base:.2f} s"
        )
        for name, ask in (
            ("--sample", lambda: queries.sample_history(log, 123_456)),
            ("--sample, never offered", lambda: queries.sample_history(log, SAMPLES + 1)),
            ("--until", lambda: queries.trained_on(log, until=half)),
            ("--streams", lambda: queries.stream_shares(log)),
            ("--most", lambda: queries.most_chosen(log, 10)),
            ("--least", lambda: queries.least_chosen(log, 10)),
            ("--suppressed", lambda: queries.suppressed(log)),
            ("--length", lambda: queries.length_effect(log)),
        ):
            seconds = min(timed(ask) for _ in range(2))
            print(f"  {name:26s} {seconds:6.2f} s  {seconds / base:5.1f} ×")
        near = Path(temporary) / "near"
        push(near)
        seconds = timed(lambda: near_duplicates(SelectionLog.open(near)))
        print(
            f"  near-duplicates among {PUSHES:,} embeddings of {DIM}, each against the {MEMORY:,} before it: {seconds:.1f} s"
        )
        print(f"  peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
