"""Several ranks of one run, as processes of this machine that talk over gloo: what `composer -n R` does, without its start-up time."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any


def forkserver() -> ForkServerContext:
    """Processes that start in a moment, because a server that has imported everything forks them."""
    context = multiprocessing.get_context("forkserver")
    # Not "tiny": until Python 3.13 the server does not know the tests' folder, and skips what it cannot import.
    context.set_forkserver_preload(["udsstream.mosaicml.algorithm", "peft", "transformers.models.llama.modeling_llama"])
    process = context.Process(target=int)  # the server's imports should not count as a run's seconds
    process.start()
    process.join()
    return context


def start(context: ForkServerContext, ranks: int, work: Callable[[], Any]) -> list[BaseProcess]:
    """Starts `work`, which must be picklable, on each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [context.Process(target=_on_rank, args=(rank, ranks, port, work)) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[BaseProcess], seconds: float = 120) -> list[int | None]:
    """Waits for all; when one fails, the others are stopped, as launchers do. The exit codes by rank."""
    end = time.monotonic() + seconds
    while any(process.exitcode is None for process in processes):
        if time.monotonic() > end or any(process.exitcode not in (None, 0) for process in processes):
            time.sleep(1.0)  # what a rank says as it fails may come after another's
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            break
        time.sleep(0.02)
    return [process.exitcode for process in processes]


def _on_rank(rank: int, ranks: int, port: int, work: Callable[[], Any]) -> None:
    # As in a process that a launcher started; what a fork server started would give its DataLoader's workers another server.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        NODE_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    work()
