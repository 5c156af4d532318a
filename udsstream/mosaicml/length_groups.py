"""Length groups: batches of candidates of similar length, so that a choice among them is not a matter of length.

    P samples of an epoch in its order, B of a global batch, m batches of a window

Within each window of m·B samples of the epoch's order (the last one may be smaller), samples are sorted by length and cut into batches
again; then the batches of the window take turns in an order drawn from (seed, epoch, window). So no sample leaves its window, and training
does not run from short to long. An incomplete batch stays the last of its epoch; which lengths it has is drawn too.

The grouped order is a function of the epoch's order, the lengths, B, m, seed and epoch, and of nothing else: not of the number of ranks or
workers, nor of where a run was resumed. (Transformers' `LengthGroupedSampler` sorts windows too, its megabatches, from long to short, and
leaves the batches in that order.)

What is not here: how lengths are counted (`lengths.py`), and the order that an epoch has before (Streaming's, or `webdataset.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from composer.utils import dist
from streaming import StreamingDataset
from streaming.base.batching import batching_methods
from streaming.base.batching.random import generate_work_random_batching
from streaming.base.partition.orig import get_partitions_orig
from streaming.base.world import World

from udsstream.config import config_difference
from udsstream.errors import ConfigError, DataError, RankError, ResumeError
from udsstream.scoring.seeding import raw_bits

__all__ = [
    "STREAMING_METHOD",
    "LengthGroups",
    "check_same_grouping",
    "group_by_length",
    "grouped_window",
    "length_groups",
    "streaming_length_groups",
]

STREAMING_METHOD = "udsstream/length_groups"
"""Our name among Streaming's batching methods."""


# Orders -------------------------------------------------------------------------------------------------------------------


def grouped_window(lengths: np.ndarray, words: np.ndarray, batch: int) -> np.ndarray:
    """One window in its new order: places in the window, (n,) int64. The plain form of what `group_by_length` does to all of them.

    Args:
        lengths: (n,) of the window's samples, as they come.
        words: (⌈n/B⌉,) uint64, one drawn for each batch.
        batch: B; the batch that comes last is smaller where B does not divide n.
    """
    turns = np.argsort(words, kind="stable")
    sizes = np.full(len(turns), batch)
    sizes[turns[-1:]] -= len(turns) * batch - len(lengths)
    by_length = np.argsort(lengths, kind="stable")
    cut = np.split(by_length, np.cumsum(sizes)[:-1])
    return np.concatenate([by_length[:0], *(cut[turn] for turn in turns)])


def group_by_length(lengths: np.ndarray, *, batch: int, batches: int, seed: int, epoch: int) -> np.ndarray:
    """An epoch in its new order: places in the epoch, (P,) int64, each once.

    Args:
        lengths: (P,) of the epoch's samples, in its order; any unit.
        batch: B.
        batches: m.
        seed, epoch: what the turns of each window's batches are drawn from.
    """
    window, places = batch * batches, np.arange(len(lengths), dtype=np.int64)
    words = raw_bits(-(-len(lengths) // batch), seed=seed, purpose="length_groups", epoch=epoch)
    whole = len(lengths) // window
    if whole:  # all whole windows at once: an epoch may have millions of them
        by_length = np.argsort(lengths[: whole * window].reshape(whole, window), axis=1, kind="stable")
        turns = np.argsort(words[: whole * batches].reshape(whole, batches), axis=1, kind="stable")
        grouped = np.take_along_axis(by_length.reshape(whole, batches, batch), turns[:, :, None], axis=1)
        places[: whole * window] = (grouped + np.arange(whole)[:, None, None] * window).ravel()
    rest = whole * window
    places[rest:] = rest + grouped_window(lengths[rest:], words[whole * batches :], batch)
    return places


# A data set's ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class LengthGroups:
    """How a data set groups its epochs: by which lengths, in windows of how many batches.

    Made by `length_groups`, which checks the values.
    """

    batches: int
    """m."""
    lengths: np.ndarray
    """(samples,) integers by id; any unit."""

    def order(self, ids: np.ndarray, *, batch: int, seed: int, epoch: int) -> np.ndarray:
        """The ids of an epoch, (P,), in their new order."""
        return ids[group_by_length(self.lengths[ids], batch=batch, batches=self.batches, seed=seed, epoch=epoch)]

    @cached_property
    def sha256(self) -> str:
        """Of the lengths as little-endian int64, in hexadecimal."""
        return hashlib.sha256(self.lengths.astype("<i8").tobytes()).hexdigest()

    def facts(self, *, batch: int, seed: int) -> dict[str, Any]:
        """All that decides the order beside the epoch, as plain types: what a checkpoint and run.json keep of it."""
        return {"batches": self.batches, "global_batch": batch, "seed": seed, "lengths_sha256": self.sha256}


def length_groups(batches: int, lengths: np.ndarray, *, samples: int) -> LengthGroups:
    """Checked length groups. A collective: every rank must call it.

    Raises:
        ConfigError: `batches` is no whole number of at least 2 (1 would change no batch).
        DataError: `lengths` are not one whole number of at least 0 for each sample.
        RankError: the ranks' settings or lengths differ.
    """
    if not isinstance(batches, int) or isinstance(batches, bool) or batches < 2:
        raise ConfigError(
            f"batches={batches!r} must be a whole number of at least 2: so many batches are sorted by length together"
        )
    lengths = np.asarray(lengths)
    if lengths.shape != (samples,) or lengths.dtype.kind not in "iu" or (lengths < 0).any():
        raise DataError(
            f"lengths are of shape {lengths.shape} and type {lengths.dtype}, expected one whole number of at least 0 for each of the "
            f"{samples} samples, by id; count_lengths makes them"
        )
    groups = LengthGroups(batches=batches, lengths=lengths)
    if dist.get_world_size() > 1:
        found = dist.all_gather_object((groups.batches, groups.sha256))
        if odd := [rank for rank, theirs in enumerate(found) if theirs != found[0]]:
            raise RankError(
                f"ranks {', '.join(map(str, odd))} would group by other lengths, or in other windows, than rank 0; give all ranks the same "
                "(count_lengths gives all of them the same lengths)"
            )
    return groups


def check_same_grouping(recorded: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> None:
    """Raises ResumeError when a run that goes on would group otherwise than it did (None: not at all)."""
    changed = config_difference(dict(recorded or {}), dict(ours or {}))
    if changed:
        raise ResumeError(
            "the run was begun with other length groups, so that its epoch would go on in another order:\n  "
            + "\n  ".join(changed)
            + "\ngo on with the same windows, global batch and lengths, or start a new run (load_weights_only=True keeps the weights)"
        )


# Streaming ----------------------------------------------------------------------------------------------------------------


def streaming_length_groups(dataset: StreamingDataset, batches: int, lengths: np.ndarray) -> LengthGroups:
    """Length groups that fit this data set; `UDSStreamingDataset.group_by_length` says what is raised."""
    if not isinstance(dataset.batch_size, int):
        raise ConfigError(
            "batch_size: the data set was given none, but its batches are to be grouped; give it the loader's"
        )
    if dataset.batching_method not in ("random", STREAMING_METHOD):
        raise ConfigError(
            f"batching_method={dataset.batching_method!r} draws each batch from the streams by a rule of its own, which length groups "
            "would break; take 'random', or leave length groups out"
        )
    if dataset.next_epoch > 0:
        raise ConfigError(f"epoch {dataset.next_epoch - 1} has begun; group the data set before it is read from")
    return length_groups(batches, lengths, samples=dataset.size)


def _generate_grouped_work(dataset: Any, world: World, epoch: int, sample_in_epoch: int) -> np.ndarray:
    """An epoch as Streaming orders it for one rank, grouped, and then dealt to all ranks and workers as Streaming deals.

    Returns:
        (nodes, ranks of a node, workers of a rank, batches of a worker, rows) int64: ids, -1 where there is none.
    """
    groups: LengthGroups = dataset.length_groups
    alone = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)
    ids = generate_work_random_batching(dataset, alone, epoch, 0).ravel()
    batch = dataset.batch_size * world.num_ranks
    order = groups.order(ids[ids != -1], batch=batch, seed=dataset.shuffle_seed, epoch=epoch)
    # Places in that order, as samples of one canonical node. What was seen is left out only here, so that it moves no window.
    places = get_partitions_orig(
        len(order),
        1,
        world.num_nodes,
        world.ranks_per_node,
        world.workers_per_rank,
        dataset.batch_size,
        sample_in_epoch,
    )
    return np.where(places != -1, order[places], -1)


# Streaming looks up here, by the data set's `batching_method`, what makes the order of an epoch.
batching_methods[STREAMING_METHOD] = _generate_grouped_work
