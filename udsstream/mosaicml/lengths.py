"""The lengths of a data set's samples: counted once before training, and remembered so that a resumed job need not count again."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from composer.utils import dist
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from udsstream.errors import DataError, RankError
from udsstream.mosaicml.ranks import from_rank_zero

__all__ = ["count_lengths", "remembered_lengths"]

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_REPORTS = 10.0
_CHUNK = 64
"""Samples that a worker counts at a time."""
_DOWNLOADS = 8
"""Shards that are fetched at once, ahead of the sample that is being counted."""
_LONGEST = np.iinfo(np.int32).max


class _Samples(Protocol):
    """Random access to samples by id."""

    @property
    def size(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def count_lengths(
    dataset: _Samples, length_of: Callable[[Any], int], *, num_workers: int = 0, progress_bar: bool = False
) -> np.ndarray:
    """The length of every sample, (samples,) int32 by id. Reads all of them once, which fetches what is remote; draws no random number.

    A collective: every rank must call it. Each counts its share, and all get all.

    Args:
        dataset: a `UDSStreamingDataset` or `UDSWebDataset`, of a class of your own too.
        length_of: the length of a sample as `dataset[id]` gives it: mostly the tokens that the collator will make of it.
        num_workers: processes that count, on each rank. 0: this one does.
        progress_bar: shown by rank 0, for its share.

    Raises:
        DataError: `length_of` gave something else than a whole number of at least 0.
        ShardError, and what `length_of` raises: a sample cannot be read, or has no length.
        RankError: another rank could not count its share.
    """
    ranks, here, began = dist.get_world_size(), dist.get_global_rank(), time.monotonic()
    first, stop = (dataset.size * rank // ranks for rank in (here, here + 1))
    share, failure = np.empty(0, np.int32), None
    try:
        share = _count(_Measured(dataset, length_of), first, stop, num_workers, bar=progress_bar and here == 0)
    except Exception as error:  # told to the other ranks, which wait for this one
        failure = error
    said = None if failure is None else f"{type(failure).__name__}: {failure}"
    found = list(dist.all_gather_object((share, said))) if ranks > 1 else [(share, said)]
    if failure is not None:
        raise failure
    for rank, (_, other) in enumerate(found):
        if other is not None:
            raise RankError(f"rank {rank} could not count the lengths of its share of the samples: {other}")
    lengths = np.concatenate([counted for counted, _ in found])
    least, middle, most = np.quantile(lengths, (0, 0.5, 1)) if len(lengths) else (0, 0, 0)
    log.info(
        "Counted the lengths of %d samples in %.1f s: %d to %d, median %d.",
        len(lengths),
        time.monotonic() - began,
        least,
        most,
        middle,
    )
    return lengths


class _Measured(Dataset):
    """Lengths by random access."""

    def __init__(self, dataset: Any, length_of: Callable[[Any], int]) -> None:
        self.dataset, self._length_of = dataset, length_of

    def __getitems__(self, ids: Sequence[int]) -> list[int]:
        return [self._measured(sample_id) for sample_id in ids]

    def _measured(self, sample_id: int) -> int:
        length = self._length_of(self.dataset[sample_id])
        if not isinstance(length, (int, np.integer)) or isinstance(length, bool) or not 0 <= length <= _LONGEST:
            raise DataError(
                f"length_of gave {length!r} for sample {sample_id}, expected a whole number of at least 0 (and below 2³¹)"
            )
        return int(length)


def _count(measured: _Measured, first: int, stop: int, workers: int, *, bar: bool) -> np.ndarray:
    chunks = [list(range(at, min(at + _CHUNK, stop))) for at in range(first, stop, _CHUNK)]
    # A generator of its own: the loader would else draw its workers' seed from the global one.
    loader = DataLoader(
        measured, batch_sampler=chunks, collate_fn=list, num_workers=workers, generator=torch.Generator()
    )
    counted, reported = [], time.monotonic()
    rows = iter(loader)  # workers are forked before there are threads
    with _fetching_ahead(measured.dataset, first, stop):
        for lengths in track(rows, total=len(chunks), description="Counting lengths", disable=not bar):
            counted += lengths
            if time.monotonic() - reported > _SECONDS_BETWEEN_REPORTS:
                reported = time.monotonic()
                log.info("Counted the lengths of %d of %d samples.", len(counted), stop - first)
    # What reading leaves in a StreamingDataset: a lock that cannot be sent to spawned workers, and notes of the shards that were looked
    # at, which training is to look at again.
    for name in ("_cache_filelock", "_sized"):
        vars(measured.dataset).pop(name, None)
    return np.array(counted, dtype=np.int32)


@contextlib.contextmanager
def _fetching_ahead(dataset: Any, first: int, stop: int) -> Iterator[None]:
    """Fetches the shards of remote streams meanwhile, side by side; where the cache is limited, they come one by one as they are read."""
    streams = getattr(dataset, "streams", [])
    if first == stop or getattr(dataset, "cache_limit", None) or all(stream.remote is None for stream in streams):
        yield
        return
    pool = ThreadPoolExecutor(max_workers=_DOWNLOADS, thread_name_prefix="fetch-shard")
    try:
        for shard in range(int(dataset.spanner[first][0]), int(dataset.spanner[stop - 1][0]) + 1):
            pool.submit(dataset.prepare_shard, shard)  # where one fails, reading it fails too
        yield
    finally:
        pool.shutdown(cancel_futures=True)


def remembered_lengths(path: Path, samples: int, count: Callable[[], np.ndarray]) -> np.ndarray:
    """The lengths in this file; where there are none that can be used, those that `count` gives, which are then written there.

    A collective: every rank must call it, and gets what rank 0 finds.

    Args:
        path: a NumPy file (.npy), replaced as a whole; its name should tell lengths of other data or other tokens apart.
        samples: how many lengths there must be.
        count: as `count_lengths`.
    """
    found = from_rank_zero(_read(path, samples) if dist.get_global_rank() == 0 else None)
    if found is not None:
        return found
    lengths = count()
    if dist.get_global_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "wb") as file:
            np.save(file, lengths, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return lengths


def _read(path: Path, samples: int) -> np.ndarray | None:
    if not path.exists():
        return None
    try:
        # Mapped, so that a header that claims more than the file holds costs nothing.
        lengths = np.array(np.lib.format.open_memmap(path, mode="r"))
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s); the lengths are counted again.", path, error)
        return None
    if lengths.shape != (samples,) or lengths.dtype != np.int32 or (lengths < 0).any():
        log.warning("%s holds something else than %d lengths; they are counted again.", path, samples)
        return None
    return lengths
