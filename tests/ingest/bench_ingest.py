"""Measures `udsstream ingest` against Streaming's own loop on the same JSONL; prints figures, asserts nothing. Not collected by pytest.

    PYTHONPATH=. python tests/ingest/bench_ingest.py [--megabytes 100] [--small-rows 1_000_000] [--repeats 3] [--gsm8k DIR]

The loop is `MDSWriter.write(json.loads(line))` with the same hashes and shard size. Each run is a process of its own; the clock runs
from the open source to the last shard, imports left out. Shown are wall time, processor time (the main process's and its workers'),
and the largest resident memory of either. Turns alternate, and medians are taken. Other work on the machine disturbs seconds much
more than ratios: compare only within one run. With every core taken by others, more workers cannot show in the wall time; the
share of the processor time that workers took tells how far they would go.

Texts are GSM8K's where its folder is given; otherwise words of about the same lengths.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTENDERS = ("MDSWriter loop", "1 worker", "2 workers")


def write_texts(path: Path, megabytes: int, gsm8k: Path | None) -> None:
    if gsm8k is not None:
        lines = (gsm8k / "train.jsonl").read_bytes().splitlines(keepends=True)
    else:
        draw = random.Random(1)
        words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2000)]
        text = lambda mean: " ".join(draw.choices(words, k=max(5, round(draw.gauss(mean, mean / 3)))))  # noqa: E731
        lines = [json.dumps({"question": text(40), "answer": text(50)}).encode() + b"\n" for _ in range(5000)]
    size = 0
    with open(path, "wb") as file:
        while size < megabytes << 20:
            size += sum(map(file.write, lines))


def write_small(path: Path, rows: int) -> None:
    with open(path, "w") as file:
        for number in range(rows):
            file.write(f'{{"id": {number}, "text": "row {number}", "score": {number / 7}}}\n')


def run(contender: str, source: Path, out: Path) -> dict[str, float]:
    """In this process; seconds, processor seconds, bytes."""
    if contender == "MDSWriter loop":
        from streaming import MDSWriter

        with open(source, "rb") as file:
            first = json.loads(file.readline())
        names = {str: "str", int: "int", float: "float64"}
        columns = {name: names[type(value)] for name, value in first.items()}

        def job() -> None:
            with (
                MDSWriter(out=str(out), columns=columns, hashes=["sha1", "xxh64"]) as writer,
                open(source, "rb") as file,
            ):
                for line in file:
                    writer.write(json.loads(line))
    else:
        from udsstream.ingest.run import IngestConfig, ingest

        def job() -> None:
            ingest(IngestConfig(source=(str(source),), out=out), workers=int(contender[0]))

    begun, own, workers = time.perf_counter(), *_cpu()
    job()
    found = {"seconds": time.perf_counter() - begun, "own": _cpu()[0] - own, "workers": _cpu()[1] - workers}
    for who, name in ((resource.RUSAGE_SELF, "memory"), (resource.RUSAGE_CHILDREN, "worker memory")):
        found[name] = resource.getrusage(who).ru_maxrss * 1024
    return found


def _cpu() -> tuple[float, float]:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime


def compare(title: str, source: Path, folder: Path, repeats: int) -> None:
    size = source.stat().st_size
    with open(source, "rb") as file:
        rows = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    print(f"\n{title}: {rows:,} rows, {size / 1e6:.0f} MB")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    reference = None
    for turn in range(repeats):
        for name in CONTENDERS:
            with tempfile.TemporaryDirectory(dir=folder) as made:
                out = Path(made) / "out"
                command = [sys.executable, __file__, "--run", name, str(source), str(out)]
                found[name].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
                if turn == 0:
                    index = (out / "index.json").read_bytes()
                    reference = reference or index
                    if index != reference:  # the hashes of all shards are in it
                        sys.exit(f"{name} wrote other bytes")
    base = None
    for name in CONTENDERS:
        took = {key: statistics.median(turn[key] for turn in found[name]) for key in found[name][0]}
        base = base or took
        cpu = took["own"] + took["workers"]
        print(
            f"  {name:15} {rows / took['seconds']:9,.0f} rows/s {size / took['seconds'] / 1e6:6.1f} MB/s"
            f"  speed ×{base['seconds'] / took['seconds']:.2f}"
            f"  processor time ×{cpu / (base['own'] + base['workers']):.2f}, {took['workers'] / cpu:.0%} of it in workers"
            f"  memory {took['memory'] / 1e6:.0f} MB, worker {took['worker memory'] / 1e6:.0f} MB"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--small-rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--run", nargs=3)
    given = parser.parse_args()
    if given.run:
        print(json.dumps(run(given.run[0], Path(given.run[1]), Path(given.run[2]))))
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_texts(folder / "texts.jsonl", given.megabytes, given.gsm8k)
        compare("GSM8K, repeated" if given.gsm8k else "texts", folder / "texts.jsonl", folder, given.repeats)
        (folder / "texts.jsonl").unlink()
        write_small(folder / "small.jsonl", given.small_rows)
        compare("small rows", folder / "small.jsonl", folder, given.repeats)


if __name__ == "__main__":
    main()
