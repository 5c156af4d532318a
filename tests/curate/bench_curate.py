"""What curate costs: choosing from a log of many rows, and writing each format.

    PYTHONPATH=. .venv/bin/python tests/curate/bench_curate.py                        # everything: 10 million rows of log, 200,000 samples
    PYTHONPATH=. .venv/bin/python tests/curate/bench_curate.py --rows 1000000 --samples 50000

Prints one line for each measurement. Each runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

FORMATS = {"mds": "none", "webdataset": "none", "parquet": "zstd", "jsonl": "none"}


def make_log(root: Path, rows: int, samples: int, streams: list[dict[str, Any]], *, batch: int = 64) -> None:
    """A log of `rows` candidates in steps of `batch`, a quarter of them kept."""
    import uds_log

    from udsstream.selection_log.writer import SelectionLogWriter

    run = uds_log.run(streams=streams, model={"name": "none"})
    rng = np.random.default_rng(0)
    with_writer = SelectionLogWriter.create(
        root, run=run, rank=0, world_size=1, embeddings="none", embedding_dim=6, buffer_capacity=9
    )
    order = rng.permutation(samples)
    per_epoch = samples // batch
    for step in range(rows // batch):
        at = step % per_epoch
        if at == 0:
            order = rng.permutation(samples)
        ids = order[at * batch : (at + 1) * batch].astype(np.int64)
        score = rng.random(batch, np.float32)
        selected = np.zeros(batch, bool)
        selected[np.argsort(-score, kind="stable")[: batch // 4]] = True
        with_writer.append(
            step,
            {
                "epoch": np.full(batch, step // per_epoch, np.int32),
                "position": np.arange(batch, dtype=np.int32),
                "epoch_position": np.arange(batch, dtype=np.int64) + at * batch,
                "sample_id": ids,
                "stream": np.zeros(batch, np.int16),
                "tokens": np.full(batch, 100, np.int32),
                "intra": score,
                "inter": score,
                "score": score,
                "selected": selected,
                "train_order": np.ma.MaskedArray((np.cumsum(selected) - 1).astype(np.int32), mask=~selected),
            },
        )
    with_writer.close()


def make_stream(folder: Path, samples: int) -> dict[str, Any]:
    """Pairs of about 600 bytes; what run.json says of them."""
    import hashlib

    from streaming import MDSWriter

    rng = np.random.default_rng(1)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, n)) for n in rng.integers(2, 10, 5000)]
    columns = {"prompt": "str", "response": "str", "tokens": "int"}
    with MDSWriter(out=str(folder), columns=columns, hashes=["sha1"]) as writer:
        for _ in range(samples):
            text = [words[i] for i in rng.integers(0, len(words), 92)]
            writer.write({"prompt": " ".join(text[:30]), "response": " ".join(text[30:]), "tokens": len(text)})
    index = (folder / "index.json").read_bytes()
    return {
        "name": folder.name,
        "location": str(folder),
        "samples": samples,
        "index_sha256": hashlib.sha256(index).hexdigest(),
    }


def measure(what: str, root: Path) -> None:
    """One measurement, in this process."""
    from udsstream.curate.chosen import Choice, choose
    from udsstream.curate.write import Output, curate_log, curate_stream
    from udsstream.selection_log.reader import SelectionLog

    out = root / "out"
    if what == "choose":
        begun = time.perf_counter()
        chosen = choose(SelectionLog.open(root / "log"), Choice())
        seconds = time.perf_counter() - begun
        print(
            f"choose: {chosen.candidates:,} rows, {chosen.offered:,} samples, {len(chosen):,} chosen: {seconds:.1f} s, "
            f"{chosen.candidates / seconds / 1e6:.1f} million rows/s, {memory():.2f} GB at most"
        )
        return
    mode, format = what.split(":")
    output = Output(format=format, compression=FORMATS[format])
    import streaming  # noqa: F401 (its seconds of import are not what is measured)

    begun = time.perf_counter()
    if mode == "log":
        result = curate_log(root / "small", out, choice=Choice(), output=output)
    else:
        result = curate_stream(str(root / "stream"), out, output=output)
    seconds = time.perf_counter() - begun
    print(
        f"{'chosen samples' if mode == 'log' else 'a whole stream'} to {format} ({FORMATS[format]}): {result.samples:,} samples, "
        f"{result.bytes / 1e6:.0f} MB in {seconds:.1f} s: {result.samples / seconds:,.0f} samples/s, {memory():.2f} GB at most"
    )
    shutil.rmtree(out)


def memory() -> float:
    """Peak resident set of this process since it began (not of the one that it was forked from, as `ru_maxrss` has it), in GB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--measure")
    parser.add_argument("--root", type=Path)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given.root)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        streams = [make_stream(root / "stream", given.samples)]
        # Of every sample once, in shuffled order, a quarter kept.
        make_log(root / "small", given.samples, given.samples, streams)
        many = given.rows // 3  # three epochs
        make_log(root / "log", given.rows, many, [streams[0] | {"samples": many}])
        for what in ["choose", *(f"{mode}:{format}" for mode in ("log", "all") for format in FORMATS)]:
            subprocess.run([sys.executable, __file__, "--measure", what, "--root", folder], check=True)
    print(json.dumps({"rows": given.rows, "samples": given.samples}))


if __name__ == "__main__":
    main()
