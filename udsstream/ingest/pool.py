"""Encodes blocks in several processes, and gives them back in order. Knows nothing of files.

At most two blocks per worker are under way, so that memory does not grow with the source. A worker whose parent was killed ends by itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from types import TracebackType

from udsstream.errors import DataError
from udsstream.ingest.encode import Encoded, Plan, RowEncoder, encode_block
from udsstream.ingest.readers import Block

__all__ = ["Workers"]

_encoder: RowEncoder
_plan: Plan


def _start(plan: Plan) -> None:
    global _encoder, _plan
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells its workers to stop
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    _plan, _encoder = plan, RowEncoder(plan)


def _encode(block: Block) -> Encoded:
    return encode_block(_encoder, _plan, block)


def _ready() -> None:
    return None


class Workers:
    """One process (1: this one) or several; a context manager."""

    def __init__(self, plan: Plan, workers: int) -> None:
        self._plan, self._workers = plan, workers
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            # Forked where that is safe, before any thread of ours runs: a spawned worker would import for seconds.
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            self._pool = ProcessPoolExecutor(workers, context, _start, (plan,))
            self._pool.submit(_ready).result()

    def encode(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, Encoded]]:
        """Each block with what became of it, in the order of the blocks."""
        if self._pool is None:
            encoder = RowEncoder(self._plan)
            for block in blocks:
                yield block, encode_block(encoder, self._plan, block)
            return
        under_way: deque[tuple[Block, Future[Encoded]]] = deque()
        try:
            for block in blocks:
                under_way.append((block, self._pool.submit(_encode, block)))
                if len(under_way) > 2 * self._workers:
                    done, future = under_way.popleft()
                    yield done, future.result()
            while under_way:
                done, future = under_way.popleft()
                yield done, future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was ended from outside, most often because memory ran out: run the same command again with fewer "
                "--workers or a smaller --max-row-size; it goes on from what is finished"
            ) from error

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
