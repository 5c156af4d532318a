"""Measures the selection log; prints figures, asserts nothing. Not collected by pytest.

    PYTHONPATH=. python tests/selection_log/bench_selection_log.py [--rows 10_000_000] [--folder DIR]

Rows look like a real run: shuffled ids over 200,000 samples in 4 streams of shards of 2048, log-normal token counts, scores
that follow from intra and inter, a quarter kept, no loss. Times depend on the machine's load, which is printed.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from udsstream.selection_log import layout
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.schema import SELECTION
from udsstream.selection_log.writer import SelectionLogWriter

SAMPLES, SHARD = 200_000, 2048
TOKENS = np.clip(np.random.default_rng(1).lognormal(5, 0.6, SAMPLES), 5, 2048).astype(np.int32)


def steps(rows: int, count: int, loss: bool = False) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(2)
    order = rng.permutation(SAMPLES)
    for step in range(count):
        at = (step * rows) % (SAMPLES - rows)
        ids = order[at : at + rows]
        intra = rng.lognormal(3, 0.5, rows).astype(np.float32)
        inter = rng.normal(0.7, 0.1, rows).astype(np.float32)
        score = (1.5e-3 * intra + inter).astype(np.float32)
        selected = np.zeros(rows, bool)
        selected[np.argsort(-score)[: rows // 4]] = True
        train_order = np.ma.MaskedArray((np.cumsum(selected) - 1).astype(np.int32), mask=~selected)
        within = ids % 50_000
        yield {
            "epoch": np.full(rows, step * rows // SAMPLES, np.int32),
            "position": np.arange(rows, dtype=np.int32),
            "epoch_position": at + np.arange(rows),
            "sample_id": ids,
            "stream": (ids // 50_000).astype(np.int16),
            "shard": (within // SHARD).astype(np.int32),
            "shard_index": (within % SHARD).astype(np.int32),
            "tokens": TOKENS[ids],
            "intra": intra,
            "inter": inter,
            "score": score,
            "selected": selected,
            "train_order": train_order,
        } | ({"loss": rng.lognormal(0.5, 0.4, rows).astype(np.float32)} if loss else {})


def create(folder: Path, name: str, **more: Any) -> SelectionLogWriter:
    return SelectionLogWriter.create(folder / name, run={"run_id": name}, embedding_dim=1024, **more)


def timed(what: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = what()
    return time.perf_counter() - begun, result


def append(folder: Path) -> None:
    print("append without sync, and sealed size")
    for rows, count in ((8, 25_000), (64, 3_000), (512, 600)):
        for loss in (False, True):
            data = list(steps(rows, count, loss))
            writer = create(folder, f"append{rows}{loss}", wal_bytes=1 << 40)
            times = np.array([timed(lambda s=s, d=d, w=writer: w.append(s, d))[0] for s, d in enumerate(data)]) * 1e6
            seal, _ = timed(writer.seal)
            size = sum(p.stat().st_size for p in (folder / f"append{rows}{loss}" / "selection").rglob("*.arrow"))
            print(
                f"  {rows:4d} rows: median {np.median(times):6.1f} µs, mean {times.mean():6.1f}, 99% {np.quantile(times, 0.99):7.1f}; "
                f"{size / (rows * count):5.2f} B/row {'with loss' if loss else 'without loss'}; sealing {rows * count:,} rows {seal:.2f} s"
            )
            writer.close()


def sync(folder: Path) -> None:
    writer = create(folder, "sync")
    data = list(steps(8, 500))
    times = []
    for step, columns in enumerate(data):
        writer.append(step, columns)
        times.append(timed(writer.sync)[0] * 1e6)
    print(f"sync after each step: median {np.median(times):.0f} µs, 99% {np.quantile(times, 0.99):.0f} µs")
    writer.close()


def background(folder: Path) -> None:
    """The longest a training thread waits while another thread seals."""
    data = list(steps(8, 60_000))
    writer = create(folder, "background", wal_bytes=16 << 20)
    times, rotated = [], []
    for step, columns in enumerate(data):
        path = writer._selection.path
        seconds, _ = timed(lambda s=step, c=columns: writer.append(s, c))
        (times if writer._selection.path == path else rotated).append(seconds * 1e3)
    writer.close()
    print(
        f"while another thread seals: longest append {max(times):.1f} ms of {len(times):,}; the {len(rotated)} appends that begin "
        f"a new file (16 MB made durable first): {', '.join(f'{t:.1f}' for t in rotated)} ms"
    )


def recover(folder: Path) -> None:
    count = 20_000
    writer = create(folder, "recover", wal_bytes=1 << 40)
    for step, columns in enumerate(steps(8, count)):
        writer.append(step, columns)
    head = writer.sync()
    writer.release()
    scan, _ = timed(lambda: SelectionLog.open(folder / "recover").steps())
    resume, again = timed(lambda: SelectionLogWriter.resume(folder / "recover", step=count, head=head))
    again.close()
    verify, report = timed(lambda: SelectionLog.open(folder / "recover").verify())
    print(
        f"{count:,} unsealed steps of 8 rows: read {scan:.2f} s, resume (scan, check, seal) {resume:.2f} s = "
        f"{resume / count * 1e6:.0f} µs a step; verify sealed {verify:.2f} s = {verify / report.steps * 1e6:.0f} µs a step"
    )


def read(folder: Path, rows: int) -> None:
    per_step = 512
    count = rows // per_step
    writer = create(folder, "read")
    made, _ = timed(lambda: [writer.append(s, d) for s, d in enumerate(steps(per_step, count))])
    writer.close()
    paths = list(layout.segment_path(folder / "read", SELECTION, 0, 0, 0).parent.iterdir())
    size = sum(path.stat().st_size for path in paths)
    log = SelectionLog.open(folder / "read")
    print(f"{count * per_step:,} rows in {len(paths)} segments, {size / 1e6:.0f} MB (made and written in {made:.0f} s)")
    late = pc.field("selected") & (pc.field("step") > 0.9 * count)
    for name, look in (
        ("table()", log.table),
        ("table(3 columns)", lambda: log.table(columns=["step", "sample_id", "score"])),
        (
            "table(filter selected & step > 90%)",
            lambda: log.table(filter=late),
        ),
        ("dataset().count_rows(selected)", lambda: log.dataset().count_rows(filter=pc.field("selected"))),
        ("selected(one step)", lambda: log.selected(count // 2)),
        ("verify()", log.verify),
        ("to_parquet()", lambda: log.to_parquet(folder / "out")),
    ):
        seconds = min(timed(look)[0] for _ in range(2))
        print(f"  {name:38s} {seconds:6.2f} s")
    parquet = (folder / "out" / "selection.parquet").stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"  Parquet: {parquet / (count * per_step):.2f} B/row; peak memory {peak:.1f} GB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-selection-log-", dir=given.folder))
    print(f"pyarrow {pa.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {folder}")
    try:
        append(folder)
        sync(folder)
        background(folder)
        recover(folder)
        read(folder, given.rows)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
