"""Measures the audit; prints figures, asserts nothing. Not collected by pytest.

    PYTHONPATH=. python tests/audit/bench_audit.py [--steps 100_000] [--folder DIR]

The logs are those of a run over 200,000 samples: 8 candidates a step, 2 kept, a memory of 1024, a checkpoint every 5,000 steps. α is 0,
so that only the kept candidates' distances must be right, which makes writing them cheap; auditing them costs the same. Each audit runs
in a process of its own, whose largest resident memory is printed; it includes the log's mapped files.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from udsstream.audit.memory import _mean_distances
from udsstream.config import SelectionConfig
from udsstream.selection_log.writer import SelectionLogWriter

SAMPLES, SHARD, BATCH, KEPT = 200_000, 2048, 8, 2
EPOCH = SAMPLES // BATCH


def write(folder: Path, steps: int, config: SelectionConfig) -> None:
    rng = np.random.default_rng(1)
    dim, capacity = config.embedding_dim, config.buffer_size
    run = {
        "run_id": folder.name,
        "selection": config.as_dict(),
        "selection_fingerprint": config.fingerprint(),
        "resolved_alpha": 0.0,
        "vocab_size": 49152,
        "streams": [
            {"name": "s", "location": "/s", "samples": SAMPLES, "per_epoch": SAMPLES, "index_sha256": "00" * 32}
        ],
        "loader": {"batch_size": BATCH, "batches_per_epoch": EPOCH, "max_duration": f"{steps}ba", "canonical_nodes": 1},
        "world_size": 1,
    }
    writer = SelectionLogWriter.create(
        folder, run=run, embeddings=config.embeddings, embedding_dim=dim, buffer_capacity=capacity
    )
    vectors = rng.standard_normal((steps * KEPT, dim), dtype=np.float32) if config.embeddings != "none" else None
    inter = distances(vectors, capacity) if vectors is not None else rng.random(steps * KEPT).astype(np.float32)
    inter[:KEPT] = 0
    digest = bytes(32)
    position = np.arange(BATCH, dtype=np.int32)
    for step in range(steps):
        epoch, batch = divmod(step, EPOCH)
        if batch == 0:
            order = np.random.default_rng([2, epoch]).permutation(SAMPLES)
        ids = order[batch * BATCH : (batch + 1) * BATCH]
        intra = rng.lognormal(3, 0.5, BATCH).astype(np.float32)
        kept = np.sort(np.argsort(-intra, kind="stable")[:KEPT])
        met = np.zeros(BATCH, np.float32) if step == 0 else rng.random(BATCH).astype(np.float32)
        met[kept] = inter[step * KEPT : (step + 1) * KEPT]
        selected = np.isin(position, kept)
        train_order = np.ma.MaskedArray((np.cumsum(selected) - 1).astype(np.int32), mask=~selected)
        columns = {
            "epoch": np.full(BATCH, epoch, np.int32),
            "position": position,
            "epoch_position": batch * BATCH + position.astype(np.int64),
            "sample_id": ids,
            "stream": np.zeros(BATCH, np.int16),
            "shard": (ids // SHARD).astype(np.int32),
            "shard_index": (ids % SHARD).astype(np.int32),
            "tokens": rng.integers(5, 2048, BATCH).astype(np.int32),
            "intra": intra,
            "inter": met,
            "score": intra,
            "selected": selected,
            "train_order": train_order,
        }
        writer.append(step, columns)
        rows = vectors[step * KEPT : (step + 1) * KEPT] if vectors is not None else None
        digest = hashlib.sha256(digest + (rows.tobytes() if rows is not None else b"")).digest()
        writer.push(
            step,
            positions=kept.astype(np.int32),
            sample_ids=ids[kept],
            push_index=step * KEPT,
            embeddings=rows,
            digest=digest,
        )
        if (step + 1) % 5000 == 0:
            pushed = (step + 1) * KEPT
            buffer = None if vectors is None else vectors[max(0, pushed - capacity) : pushed]
            writer.checkpoint(step + 1, heads=[writer.sync()], buffer=buffer, pushed=pushed, buffer_digest=digest)
    writer.close()


def distances(vectors: np.ndarray, capacity: int) -> np.ndarray:
    """(pushes,) float32: each kept embedding's mean distance to the memory that it met."""
    out = np.zeros(len(vectors), np.float32)
    centre = np.zeros(vectors.shape[1])
    for low in range(KEPT, len(vectors), 256):
        rows = np.arange(low, min(low + 256, len(vectors)))
        end = rows // KEPT * KEPT
        spans = np.stack([np.maximum(end - capacity, 0), end], axis=1)
        out[rows] = _mean_distances(vectors[rows], vectors, spans, centre)[0]
    return out


AUDIT = """
import re, sys, time
from pathlib import Path
from udsstream.audit.run import audit
def peak():  # of this process alone; getrusage's includes what the parent had when it forked
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before = peak()
began, used = time.perf_counter(), time.process_time()
report = audit(Path(sys.argv[1]))
seconds, used = time.perf_counter() - began, time.process_time() - used
print(f"  audit {seconds:.1f} s ({used:.1f} s of all cores), {report.steps / seconds:,.0f} steps/s")
print(f"  peak {peak():.0f} MB ({before:.0f} before it began)")
print(f"  {report.verdict}")
for sentence in report.checked:
    if sentence.startswith(("digest", "inter")):
        print(f"  {sentence}")
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--modes", nargs="*", default=["none", "tail", "full", "full-small"])
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-audit-", dir=given.folder))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, numpy {np.__version__}, {folder}")
    for mode in given.modes:
        steps = given.steps
        config = SelectionConfig(
            keep=KEPT,
            alpha=0.0,
            projection_dims=(16, 4) if mode == "full-small" else (128, 8),
            embeddings=mode.removesuffix("-small"),
        )
        root = folder / mode
        began = time.perf_counter()
        write(root, steps, config)
        size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        written = time.perf_counter() - began
        print(
            f"{mode}: {steps:,} steps of {BATCH}, {config.embedding_dim} numbers each, {size / 1e6:.0f} MB (written in {written:.0f} s)"
        )
        subprocess.run([sys.executable, "-c", AUDIT, str(root)], check=True)
        shutil.rmtree(root)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
