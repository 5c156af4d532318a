"""What choosing takes per step on 1, 2 and 4 ranks of this machine: PYTHONPATH=.:tests python tests/mosaicml/bench_ranks.py

A tiny model, 8 candidates a rank, a quarter kept, embeddings of 1024 components, a memory of 1024: what is measured is mostly talk between
the ranks and arithmetic of the memory. Ranks share this machine's cores, so more ranks than cores wait for each other.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from statistics import median

import launch
from tiny import TinyRun, write_stream

from udsstream.selection_log.timings import read_timings


def main() -> None:
    found = {}
    processes = launch.forkserver()
    with tempfile.TemporaryDirectory() as folder:
        stream = write_stream(Path(folder) / "stream", samples=640)
        selection = {"keep": 0.25, "projection_dims": (64, 16), "buffer_size": 1024}
        run = TinyRun(streams=(str(stream),), folder="", duration="60ba", selection=selection, by_tokens=True)
        for ranks in (1, 2, 4):
            place = Path(folder) / str(ranks)
            place.mkdir()
            job = dataclasses.replace(run, folder=str(place), batch_size=8 * ranks)
            codes = launch.finish(launch.start(processes, ranks, job.run_and_save), seconds=600)
            if codes != [0] * ranks:
                raise SystemExit(f"{ranks} ranks ended with {codes}")
            times = read_timings(place / "log")
            settled = times["step"] >= 20
            found[ranks] = {
                "selection_ms": 1000 * median(times["selection_seconds"][settled]),
                "step_ms": 1000 * median(times["step_seconds"][settled]),
            }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
