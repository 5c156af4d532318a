"""`UDSStreamingDataset`: a StreamingDataset whose samples know their ids and whose epochs cannot silently end early.

Streaming 0.13 has three habits that a recorded run cannot live with (each reproduced; file and line are of that version):

* nothing in a sample says which sample it is;
* a shard that cannot be read ends the epoch early, without an exception (`dataset.py:1456`);
* a checkpoint at an epoch boundary makes the resumed run repeat the finished epoch (`dataset.py:795` against Composer's `state.py:972`).

And a fourth, that jobs of one machine take each other's place in shared memory: `shared_memory.py`.

What is not guarded here: with DataLoader workers a failed worker may hang instead of raising; give the DataLoader a `timeout`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from composer.utils import dist
from streaming import StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.format import get_index_basename
from streaming.base.hashing import get_hash

from udsstream.errors import DataError, ResumeError, ShardError
from udsstream.mosaicml.length_groups import (
    STREAMING_METHOD,
    LengthGroups,
    check_same_grouping,
    streaming_length_groups,
)
from udsstream.mosaicml.shared_memory import is_gone, names_of_its_own

__all__ = [
    "IdentifiedDataset",
    "SampleLocation",
    "SampleSource",
    "StreamIdentity",
    "UDSStreamingDataset",
    "canonical_nodes",
    "locate",
    "sample_source_of",
    "stream_identities",
    "stream_names",
    "streaming_dataset_of",
    "verify_shards",
    "with_sample_id",
]


class UDSStreamingDataset(StreamingDataset):
    """A `streaming.StreamingDataset` (same arguments) that adds `sample_id` to every sample and raises when a stream breaks off.

    `sample_id` is the sample's index over all streams in their order, an int that stays the same between epochs, ranks and
    resumptions. A subclass may return anything that is a mutable mapping from `__getitem__`: the id is put in if it is missing.

    Raises:
        DataError: a stream holds no samples, or its cache is in use by another data set.
        RankError: the ranks of one machine have different local folders.

    Raises (while iterating):
        ShardError: a shard is missing, truncated or corrupt.
        DataError: a sample is not a mutable mapping.
        ResumeError: the place to go on from was removed from shared memory.
    """

    _yielding: int = -1
    _resumes_in: int = -1
    _failure: ShardError | None = None
    length_groups: LengthGroups | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            with names_of_its_own():
                super().__init__(*args, **kwargs)
        except RuntimeError as error:
            if "contains no samples" not in str(error):
                raise
            index = str(error).partition(": ")[2].rstrip(".")
            raise DataError(f"the stream with the index {index} holds no samples; leave it out, or fill it") from error

    def close(self) -> None:
        """Ends what an unfinished epoch has running and lets go of the local folders, so that another data set may use them as its cache.

        Streaming's threads of an epoch that nobody iterates to its end live on, and the data set with them. It can be iterated again.
        """
        if hasattr(self, "_iterator"):
            self._iterator.non_blocking_exit()
        if hasattr(self, "_executor"):
            self._executor.shutdown()  # waits for a download that has begun
            del self._executor
        self.__del__()

    def group_by_length(self, batches: int, lengths: np.ndarray) -> None:
        """From now on batches have samples of similar length: each `batches` global batches of an epoch are sorted by length together.

        The order that this gives, and what it keeps of the epoch's own: `length_groups.py`. A collective: every rank must call it.

        Args:
            batches: at least 2.
            lengths: (samples,) integers by id, of any unit: as `count_lengths` gives them.

        Raises:
            ConfigError: `batches` is too few, the data set has no batch size or has begun an epoch, or `batching_method` is not "random".
            DataError: `lengths` are not one for each sample.
            RankError: the ranks would group differently.
        """
        self.length_groups = streaming_length_groups(self, batches, lengths)
        self.batching_method = STREAMING_METHOD

    @property
    def length_grouping(self) -> dict[str, Any] | None:
        """What decides how epochs are grouped by length, as plain types; None: they are not."""
        if self.length_groups is None or self.batch_size is None:
            return None
        batch = self.batch_size * self._parallel_rank_world.num_ranks
        return self.length_groups.facts(batch=batch, seed=self.shuffle_seed)

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """The sample with its `sample_id`."""
        if not 0 <= sample_id < self.size:
            raise IndexError(f"there is no sample {sample_id}: the data set has {self.size}")
        try:
            self._check_size(sample_id)
            sample = super().get_item(sample_id, retry)
        except Exception as error:
            if error is self._failure:
                raise
            # Once a background thread has failed, Streaming refuses every sample; the thread's own error names the shard.
            stopped = hasattr(self, "_event") and self._event.is_set()
            raise (self._failure if stopped else None) or self._shard_error(sample_id, error) from error
        return with_sample_id(sample, sample_id)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Downloads or decompresses a shard. A failure is remembered and ends the iteration.

        Streaming leaves a shard that failed "in preparation", so that whoever needs it next waits for ever.
        """
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            self._failure = ShardError(
                f"shard {self._shard_path(shard_id)} cannot be downloaded or decompressed ({type(error).__name__}: {error}). It is "
                "missing or corrupt: put it back at its remote or local place, or rebuild the stream"
            )
            # As for a shard whose file went missing: whoever waits for it, in other workers too, goes on, tries again, and fails too.
            self._shard_states[shard_id] = _ShardState.LOCAL
            if hasattr(self, "_event"):
                self._event.set()
            raise self._failure from error

    def __iter__(self) -> Iterator[Any]:
        """The samples of this epoch's partition; ends only when all of them came."""
        if self._resumes_in >= self.next_epoch and is_gone(self._shm_prefix_int):
            raise ResumeError(
                f"where to go on in epoch {self._resumes_in} was kept in shared memory, and something has removed it since it was loaded "
                "(a job that cleans it, a logout under systemd's RemoveIPC=yes): Streaming would begin the epoch anew, without a word. "
                "Resume again from the same checkpoint"
            )
        for item in super().__iter__():
            yield self._with_id(item, self._yielding)
        event = getattr(self, "_event", None)
        if event is not None and event.is_set():
            raise self._failure or ShardError(
                f"the stream broke off in epoch {self.next_epoch - 1} after sample {self._yielding}: a shard could not be downloaded or "
                "decompressed (the thread's traceback stands above). Streaming would have ended the epoch here without an error; "
                f"check that every shard named in {get_index_basename()} is at its remote or local place and has its recorded size"
            )

    def _with_id(self, sample: Any, sample_id: int) -> Any:
        return with_sample_id(sample, sample_id)

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        # Streaming maps __getitem__ over these one at a time, so the last id handed out belongs to the item in hand.
        for sample_id in super()._each_sample_id(it):
            self._yielding = int(sample_id)
            yield sample_id

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Streaming's state, but at an epoch boundary it names the epoch to come instead of the finished one."""
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0 and self.next_epoch > 0:
            state["epoch"] = self.next_epoch
        if self.length_groups is not None:
            state["length_groups"] = self.length_grouping
        return state

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave, in the next iteration; ResumeError where its epochs were grouped by length otherwise."""
        check_same_grouping(obj.get("length_groups"), self.length_grouping)
        super().load_state_dict(obj)
        self._resumes_in = int(obj["epoch"])

    @cached_property
    def _sized(self) -> set[int]:
        """Shards that this process has found to have the recorded size."""
        return set()

    def _check_size(self, sample_id: int) -> None:
        """Raises ShardError when a shard is read for the first time and its file has not the size that the index records.

        Streaming would decode what is left of a sample that was cut off in a text: a shorter text, and no error.
        """
        shard_id = int(self.spanner[sample_id][0])
        if shard_id in self._sized:
            return
        raw, path = self.shards[shard_id].file_pairs[0][0], self._shard_path(shard_id)
        if not os.path.exists(path):  # yet to be downloaded or decompressed
            return
        found = os.path.getsize(path)
        if found != raw.bytes:
            raise ShardError(f"it has {found} bytes, but the stream's index records {raw.bytes}")
        self._sized.add(shard_id)

    def _shard_path(self, shard_id: int) -> str:
        stream = self.streams[int(self.stream_per_shard[shard_id])]
        return os.path.join(stream.local, stream.split, self.shards[shard_id].file_pairs[0][0].basename)

    def _shard_error(self, sample_id: int, error: Exception) -> ShardError:
        shard_id, row = self.spanner[sample_id]
        return ShardError(
            f"sample {sample_id} cannot be read: row {row} of shard {self._shard_path(int(shard_id))} ({type(error).__name__}: {error}). "
            "The shard is missing, truncated or corrupt: fetch it again from its remote, or rebuild the stream"
        )


def with_sample_id(sample: Any, sample_id: int) -> Any:
    """The sample, with its id put in if it is missing; DataError when it is no mutable mapping."""
    if not isinstance(sample, MutableMapping):
        raise DataError(
            f"sample {sample_id} is a {type(sample).__name__}, but must be a dict, so that 'sample_id' can travel with it to the log; "
            "return a dict from __getitem__"
        )
    sample.setdefault("sample_id", int(sample_id))
    return sample


@dataclass(frozen=True, kw_only=True)
class SampleLocation:
    """Where samples lie: three int64 arrays of one length."""

    stream: np.ndarray
    """Place of the stream in the data set's list of streams."""
    shard: np.ndarray
    """Place of the shard in its stream's index."""
    index: np.ndarray
    """Place of the sample in its shard."""


@dataclass(frozen=True, kw_only=True)
class StreamIdentity:
    """What a log says of a stream, so that a later reader can tell whether it holds the same samples."""

    name: str
    location: str
    """Where the stream was read from: its remote, or its local folder when it has none."""
    samples: int
    per_epoch: int
    """Samples drawn from it in each epoch: more than `samples` where it is repeated, fewer where only a part is drawn."""
    index_sha256: str
    """SHA-256, in hexadecimal, of the stream's index file, which names every shard with its size, rows and hashes."""
    format: str = "mds"
    """Of its shards: `mds`, or `webdataset`."""


@runtime_checkable
class IdentifiedDataset(Protocol):
    """What a log asks of a data set that is no StreamingDataset, such as `UDSWebDataset`. Ids count through its streams in their order."""

    def locate(self, sample_ids: Sequence[int] | np.ndarray) -> SampleLocation:
        """Where each sample lies. Opens nothing."""
        ...

    def stream_identities(self) -> list[StreamIdentity]:
        """The identity of each stream, in order."""
        ...


SampleSource = StreamingDataset | IdentifiedDataset
"""A data set that can tell where its samples come from."""


def sample_source_of(loader: object) -> SampleSource | None:
    """The data set behind a data loader, if it can tell where its samples come from."""
    dataset = getattr(loader, "dataset", None)
    return dataset if isinstance(dataset, (StreamingDataset, IdentifiedDataset)) else None


def locate(dataset: SampleSource, sample_ids: Sequence[int] | np.ndarray) -> SampleLocation:
    """Where each sample lies. Opens nothing."""
    if not isinstance(dataset, StreamingDataset):
        return dataset.locate(sample_ids)
    ids = np.asarray(sample_ids, dtype=np.int64)
    shard = np.searchsorted(dataset.sample_offset_per_shard, ids, side="right") - 1
    stream = dataset.stream_per_shard[shard]
    return SampleLocation(
        stream=stream,
        shard=shard - dataset.shard_offset_per_stream[stream],
        index=ids - dataset.sample_offset_per_shard[shard],
    )


def streaming_dataset_of(loader: object) -> StreamingDataset | None:
    """The StreamingDataset behind a data loader; None when it reads from something else."""
    dataset = getattr(loader, "dataset", None)
    return dataset if isinstance(dataset, StreamingDataset) else None


def canonical_nodes(dataset: StreamingDataset) -> int:
    """Into how many parts each epoch is cut, before or after its first one began.

    Streaming fills `num_canonical_nodes` in only as an epoch begins (`dataset.py`, `_resume`): for the shuffles within shard parts 64 a
    node, else one a node. An epoch of C parts may repeat up to C - 1 samples and leave as many out.
    """
    if dataset.num_canonical_nodes is not None:
        return int(dataset.num_canonical_nodes)
    nodes = dist.get_world_size() // dist.get_local_world_size()
    return nodes * (64 if dataset.shuffle_algo in ("py1s", "py2s") else 1)


def stream_identities(dataset: SampleSource) -> list[StreamIdentity]:
    """The identity of each stream, in order. Names are the last part of the path that tells the streams apart."""
    if not isinstance(dataset, StreamingDataset):
        return dataset.stream_identities()
    locations = [
        os.path.join(stream.remote or stream.local, stream.split or "").rstrip("/") for stream in dataset.streams
    ]
    names = stream_names(locations)
    identities = []
    for number, stream in enumerate(dataset.streams):
        with open(os.path.join(stream.local, stream.split or "", get_index_basename()), "rb") as index:
            digest = hashlib.sha256(index.read()).hexdigest()
        identities.append(
            StreamIdentity(
                name=names[number],
                location=locations[number],
                samples=int(dataset.samples_per_stream[number]),
                per_epoch=int(stream.choose),
                index_sha256=digest,
            )
        )
    return identities


def stream_names(locations: Sequence[str]) -> list[str]:
    """The last part of each path; the whole paths where these do not tell the streams apart."""
    basenames = [os.path.basename(location) for location in locations]
    return basenames if len(set(basenames)) == len(basenames) else list(locations)


def verify_shards(dataset: StreamingDataset) -> int:
    """Checks every shard that lies in its local folder, uncompressed, against the hashes in its stream's index.

    Streaming itself never does so for a stream without a remote. Shards that are not there yet are left to Streaming's
    `validate_hash`, which checks them as they are downloaded.

    Returns:
        How many shards were checked.

    Raises:
        ShardError: a shard has another hash than recorded, is missing although its stream has no remote to fetch it from, or its
            stream was written without hashes.
    """
    checked = 0
    for number, shard in enumerate(dataset.shards):
        stream = dataset.streams[int(dataset.stream_per_shard[number])]
        for raw, compressed in shard.file_pairs:
            path = os.path.join(stream.local, stream.split or "", raw.basename)
            if not os.path.exists(path):
                if stream.remote is None and compressed is None:
                    raise ShardError(
                        f"shard {path} is missing and its stream has no remote to fetch it from; rebuild the stream"
                    )
                continue
            if not raw.hashes:
                raise ShardError(
                    f"shard {path} cannot be verified: its stream was written without hashes; write it with "
                    "MDSWriter(hashes=['sha1']), or leave verify_data off"
                )
            with open(path, "rb") as file:
                content = file.read()
            for algorithm, recorded in raw.hashes.items():
                found = get_hash(algorithm, content)
                if found != recorded:
                    raise ShardError(
                        f"shard {path} is corrupt: its {algorithm} is {found}, but the stream's index records {recorded}; "
                        "fetch it again from its remote, or rebuild the stream"
                    )
            checked += 1
    return checked
