"""Names in shared memory that belong to one data set, whatever else runs on the machine.

Streaming 0.12 and 0.13 keep a data set's state (its next epoch, where to go on, the order that workers read) in shared memory, under
names with a running number: `000000_locals`, `000000_next_epoch`, … the first that looks free. All jobs of a machine count in the same
place, and find each other's memory by name:

* `clean_stale_shared_memory()`, which Streaming's own error message recommends, removes the names of jobs that run. The next job takes
  them, and both then read one position: the order changes without a word.
* Each rank looks for the free number alone. When another job on the same streams starts between two of them, one rank joins that job.
* Looking and taking are two steps: of two jobs that start at once, one stops with a FileExistsError.

Here the first rank of each machine draws the number at random, from a range that Streaming neither counts to nor cleans, and tells it to
the others. A lock of the operating system on the data set's memory says that one of its processes is alive; what a killed job left is
removed when the next data set is made.

What is not guarded: a plain StreamingDataset, unless it is made within `names_of_its_own`; such a one also does not see that a data set
made here uses its cache. Where shared memory is no folder (macOS) nothing is removed, and caches are not compared.
"""

from __future__ import annotations

import fcntl
import gc
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import streaming.base.dataset as streaming_dataset
import torch
import torch.distributed
from composer.utils import dist
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, RESUME, SHM_TO_CLEAN
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import _check_self, _get_path, _pack_locals, _unpack_locals
from streaming.base.world import World

from udsstream.errors import DataError, RankError

__all__ = ["PREFIXES", "is_gone", "names_of_its_own", "remove_what_ended_jobs_left"]

PREFIXES = range(10**6, 10**12)
"""The numbers drawn from. Streaming cleans those below; longer names than these do not fit everywhere."""

_FOLDER = Path("/dev/shm")
_CACHE_WAIT_SECONDS = 10.0
"""A killed process's DataLoader workers end up to five seconds after it."""

_making = threading.RLock()


@contextmanager
def names_of_its_own() -> Iterator[None]:
    """While it lasts, each StreamingDataset that is made takes names of its own in shared memory. With several ranks, all must be here.

    Raises (where the data set is made):
        DataError: another data set of this machine uses the same local folder as the cache of a remote.
        RankError: the ranks of this machine have different local folders, or the first of them failed.
    """
    with _making:
        module: Any = streaming_dataset
        counting = module.get_shm_prefix
        module.get_shm_prefix = _take
        try:
            yield
        finally:
            module.get_shm_prefix = counting


def is_gone(prefix: int, name: str = RESUME) -> bool:
    """Whether this block of a data set's memory was removed, or never made."""
    return _FOLDER.is_dir() and not (_FOLDER / _get_path(prefix, name)).exists()


def remove_what_ended_jobs_left() -> None:
    """Removes the memory that no process holds any more: of jobs that were killed. Touches none of Streaming's own numbers."""
    for path in _FOLDER.glob(f"*_{LOCALS}"):
        number = path.name.partition("_")[0]
        if not (number.isdecimal() and int(number) in PREFIXES):
            continue
        with suppress(OSError):  # gone meanwhile, another user's, or, as BlockingIOError, in use
            file = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The folder that all is found by goes last, in case this is interrupted too.
                for name in reversed(SHM_TO_CLEAN):
                    (_FOLDER / _get_path(int(number), name)).unlink(missing_ok=True)
                for name in (BARRIER_FILELOCK, CACHE_FILELOCK):
                    Path(gettempdir(), _get_path(int(number), name)).unlink(missing_ok=True)
            finally:
                os.close(file)


def _take(
    streams_local: list[str], streams_remote: list[str | None], world: World, retry: int = 100
) -> tuple[int, SharedMemory]:
    """What Streaming's `get_shm_prefix` does: this data set's number, the same on all ranks of a machine, and its first block of memory."""
    _check_self(streams_local)
    failure: Exception | None = None
    prefix, memory = 0, None
    if world.is_local_leader:
        try:
            remove_what_ended_jobs_left()
            _refuse_used_caches(streams_local, streams_remote)
            prefix, memory = _register(streams_local)
        except Exception as error:  # the other ranks wait for a number: they must get one first
            failure = error
    prefix = _of_local_leader(prefix, world)
    if failure is not None:
        raise failure
    if memory is not None:
        return prefix, memory
    if not prefix:
        raise RankError("the first rank of this machine could not make its data set; its own error says why")
    memory = SharedMemory(_get_path(prefix, LOCALS), False)
    _hold(prefix)
    theirs, _ = _unpack_locals(bytes(memory.buf))
    if theirs != streams_local:
        raise RankError(
            f"the ranks of one machine must read a data set from the same local folders, but the first has {theirs} and rank {world.rank} "
            f"has {streams_local}; make local= the same on all of them"
        )
    return prefix, memory


def _register(streams_local: list[str]) -> tuple[int, SharedMemory]:
    """A number that nobody has, and its first block, which says for which local folders it stands."""
    while True:
        prefix = PREFIXES[secrets.randbelow(len(PREFIXES))]
        data = _pack_locals(streams_local, prefix)
        try:
            memory = SharedMemory(_get_path(prefix, LOCALS), True, len(data))
        except FileExistsError:
            continue
        if not _hold(prefix):  # taken for an ended job's, between being made and being locked
            continue
        memory.buf[: len(data)] = data
        return prefix, memory


def _hold(prefix: int) -> bool:
    """Locks a number's memory for as long as this process or one that it forks lives. False: it was removed before that."""
    if not _FOLDER.is_dir():
        return True
    try:
        file = os.open(_FOLDER / _get_path(prefix, LOCALS), os.O_RDONLY)
    except FileNotFoundError:
        return False
    with suppress(OSError):  # where the system cannot lock here, nothing is ever found to be unused
        fcntl.flock(file, fcntl.LOCK_SH)  # (the file stays open; the end of the process closes it)
    return os.fstat(file).st_nlink > 0


def _of_local_leader(number: int, world: World) -> int:
    """The number that this machine's first rank has."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return number
    device = f"cuda:{world.rank_of_node}" if "nccl" in torch.distributed.get_backend() else "cpu"
    numbers = dist.all_gather(torch.tensor([number], dtype=torch.int64, device=device))
    return int(list(numbers)[world.rank - world.rank_of_node])


def _refuse_used_caches(streams_local: Sequence[str], streams_remote: Sequence[str | None]) -> None:
    """DataError when another data set uses the folder that one of these streams is to be downloaded to: each would remove its shards."""
    caches = {local for local, remote in zip(streams_local, streams_remote, strict=True) if remote is not None}
    end = time.monotonic() + _CACHE_WAIT_SECONDS
    collected = False
    while caches:
        used = {folder: path for path in _FOLDER.glob(f"*_{LOCALS}") for folder in _locals_in(path) if folder in caches}
        if not used:
            return
        if not collected:
            gc.collect()  # a Trainer that nobody uses any more is a cycle of references, and has a data set
            collected = True
            continue
        if time.monotonic() > end:
            folder, path = next(iter(used.items()))
            raise DataError(
                f"the local folder {folder}, to which a stream is to be downloaded, is in use by another data set ({path}); give each its "
                "own local=, or, if this process made it, call its close(). If no other job runs on this machine, one that was "
                "killed left this file: remove it"
            )
        time.sleep(0.05)
        remove_what_ended_jobs_left()


def _locals_in(path: Path) -> list[str]:
    with suppress(OSError, ValueError, IndexError):  # gone, another user's, or being written
        return _unpack_locals(path.read_bytes())[0]
    return []
