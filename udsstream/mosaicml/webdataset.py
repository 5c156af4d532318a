"""`UDSWebDataset`: tar shards of WebDataset as a training source whose samples have ids, in an order that can be repeated and resumed.

A stream is a folder of `*.tar` shards, by name. An index made once (`webdataset_index.py`) names each shard with its size, SHA-256 and
number of samples, and where each sample begins. So a sample's id is its running number, over the streams, their shards and the places in
them: the same in every epoch, on every rank, and for a replay.

*Order.* Each epoch has all samples once. With `shuffle`, shards come in an order drawn from (seed, epoch), and then each sample moves by
up to `shuffle_buffer` places, as in WebDataset's buffer, but drawn from (seed, epoch) too. Batches may then be grouped by length
(`group_by_length`). Position p of the epoch belongs to the rank
whose turn it is, and of a rank's batches each worker takes its own in turn; so the global batches do not depend on the number of workers,
nor, with the same global batch, on the number of ranks. Where the ranks cannot share an epoch equally its first samples come once more at
its end, at most one a rank.

*Resuming.* Composer keeps the epoch and the number of samples seen in it, and the next iterator begins there: exact, nothing is read to be
skipped, with any number of workers. (An epoch begins when an iterator of the data loader does.)

What is not done: remote shards (fetch them, or make an MDS stream of them: `udsstream ingest`), compressed tars (.tar.gz: no sample can be
reached in them), and pickles, which are refused.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from torch.utils.data import IterableDataset, get_worker_info

from udsstream.errors import ConfigError, DataError, ResumeError, ShardError
from udsstream.mosaicml.dataset import SampleLocation, StreamIdentity, stream_names, with_sample_id
from udsstream.mosaicml.length_groups import LengthGroups, check_same_grouping, length_groups
from udsstream.mosaicml.webdataset_index import INDEX, WebIndex, ensure_index, sample_member
from udsstream.scoring.seeding import draw_without_replacement, raw_bits

__all__ = ["PICKLES", "UDSWebDataset", "decode_member", "epoch_order"]

PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")
"""Endings of members that a reader would have to unpickle, which can run code."""

STATE_VERSION = 1
_OPEN_FILES = 32
_MOST_WORKERS = 1024
_TEXT = ("txt", "text", "transcript")
_INTEGERS = ("cls", "cls2", "index", "inx", "id")


def epoch_order(
    shard_samples: Sequence[int] | np.ndarray, *, seed: int, epoch: int, shuffle: bool, shuffle_buffer: int
) -> np.ndarray:
    """(samples,) int64: the ids of all samples in the order of this epoch.

    Args:
        shard_samples: samples of each shard, in the order of their ids.
        shuffle_buffer: places by which a sample may move; 0 or 1: shards alone are shuffled.
    """
    counts = np.asarray(shard_samples, dtype=np.int64)
    firsts = np.concatenate([[0], np.cumsum(counts)])
    if not shuffle:
        return np.arange(firsts[-1], dtype=np.int64)
    shards = draw_without_replacement(len(counts), len(counts), seed=seed, purpose="webdataset/shards", epoch=epoch)
    order = np.concatenate([np.arange(firsts[k], firsts[k + 1], dtype=np.int64) for k in shards])
    if shuffle_buffer > 1:
        fractions = (
            raw_bits(len(order), seed=seed, purpose="webdataset/buffer", epoch=epoch) >> np.uint64(11)
        ) * 2.0**-53
        order = order[np.argsort(np.arange(len(order)) + fractions * shuffle_buffer, kind="stable")]
    return order


def decode_member(field: str, data: bytes, where: str) -> Any:
    """The value of a sample's member: text, a JSON value, an integer or an array by its ending; else its bytes.

    Raises:
        DataError: it is a pickle, or not what its ending says.
    """
    ending = field.rpartition(".")[2]
    if ending in PICKLES:
        raise DataError(
            f"{where}: the member .{field} holds a pickle, which can run code when it is read, and is refused; write it as .json, .txt or "
            ".npy, or leave the field out with columns="
        )
    try:
        if ending in _TEXT:
            return data.decode("utf-8")
        if ending in ("json", "jsn"):
            return json.loads(data)
        if ending in _INTEGERS:
            return int(data)
        if ending == "npy":
            return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, RecursionError) as error:
        raise DataError(f"{where}: the member .{field} cannot be decoded ({type(error).__name__}: {error})") from error
    return data


class UDSWebDataset(IterableDataset):
    """Tar shards of WebDataset, as samples with `sample_id`.

    A sample is a dict: `__key__`, the value of each member by its ending (`txt`, `prompt.txt`, …), and `sample_id`. A subclass may change
    it in `get_item(sample_id)`; it may also return another dict. Random access by id is `dataset[sample_id]`.

    Args:
        folders: one stream each, of shards `*.tar`. An index is written into a folder that has none; that reads its shards once.
        batch_size: of the data loader, on this rank: batches are dealt to its workers whole.
        shuffle: draw the order of each epoch; see `epoch_order`.
        shuffle_seed: of that draw.
        shuffle_buffer: by how many places a sample moves at most.
        columns: name → ending of the member that it is taken from, such as {"prompt": "prompt.txt"}; others are not decoded. None: all
            members, by their endings.

    Raises:
        ConfigError: an argument has no meaning.
        DataError: a folder has no shards, or a shard is no tar, is compressed, holds no samples or one key twice.
        ShardError: a shard is missing, truncated, or not the one that was indexed.
    """

    def __init__(
        self,
        folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        batch_size: int,
        shuffle: bool = True,
        shuffle_seed: int = 9176,
        shuffle_buffer: int = 1000,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        given = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
        if not given:
            raise ConfigError("folders: is empty, expected at least one folder of tar shards")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("shuffle_buffer", shuffle_buffer, 0),
            ("shuffle_seed", shuffle_seed, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")
        self.folders = [Path(folder).absolute() for folder in given]
        self.batch_size = batch_size
        self._order_settings = {"seed": shuffle_seed, "shuffle": shuffle, "shuffle_buffer": shuffle_buffer}
        self._columns = None if columns is None else dict(columns)
        self._indexes: list[WebIndex] = [_shared_index(folder) for folder in self.folders]
        self._paths = [
            folder / shard.name
            for folder, index in zip(self.folders, self._indexes, strict=True)
            for shard in index.shards
        ]
        counts = [[shard.samples for shard in index.shards] for index in self._indexes]
        self._shard_samples = np.array(list(itertools.chain(*counts)), dtype=np.int64)
        self._shard_firsts = np.concatenate([[0], np.cumsum(self._shard_samples)])
        self._stream_of_shard = np.repeat(np.arange(len(counts)), [len(shards) for shards in counts])
        self._shard_in_stream = np.concatenate([np.arange(len(shards)) for shards in counts])
        self._rank, self._ranks = dist.get_global_rank(), dist.get_world_size()
        self._ranks_per_node = dist.get_local_world_size()
        # Shared with the workers of this rank: what each has begun, see `_begin_epoch`; and where a resumed epoch begins.
        self._begun = torch.zeros(_MOST_WORKERS + 1, dtype=torch.int64).share_memory_()
        self._turns: dict[int, int] = {}
        self._resume_at = torch.tensor([-1, 0], dtype=torch.int64).share_memory_()
        self._files: OrderedDict[int, int] = OrderedDict()
        self._files_of = os.getpid()
        self._groups: LengthGroups | None = None

    # What a log asks --------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Samples of all streams."""
        return int(self._shard_firsts[-1])

    def locate(self, sample_ids: Sequence[int] | np.ndarray) -> SampleLocation:
        """Where each sample lies. Opens nothing."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        shard = np.searchsorted(self._shard_firsts, ids, side="right") - 1
        return SampleLocation(
            stream=self._stream_of_shard[shard],
            shard=self._shard_in_stream[shard],
            index=ids - self._shard_firsts[shard],
        )

    def stream_identities(self) -> list[StreamIdentity]:
        """The identity of each stream, in order: the digest of its index, which names each shard with its SHA-256."""
        names = stream_names([str(folder) for folder in self.folders])
        return [
            StreamIdentity(
                name=name,
                location=str(folder),
                samples=index.samples,
                per_epoch=index.samples,
                index_sha256=index.sha256,
                format="webdataset",
            )
            for name, folder, index in zip(names, self.folders, self._indexes, strict=True)
        ]

    # Samples ----------------------------------------------------------------------------------------------------------

    def __getitem__(self, sample_id: int) -> Any:
        return with_sample_id(self.get_item(sample_id), sample_id)

    def get_item(self, sample_id: int) -> dict[str, Any]:
        """A sample by its id.

        Raises:
            IndexError: there is none.
            ShardError: its shard cannot be read, or changed since it was indexed.
            DataError: it lacks a field that `columns` names, or has a pickle.
        """
        if not 0 <= sample_id < self.size:
            raise IndexError(f"there is no sample {sample_id}: the data set has {self.size}")
        shard = self.shard_of(sample_id)
        row, path = int(sample_id - self._shard_firsts[shard]), self._paths[shard]
        where = f"sample {sample_id} (row {row} of {path})"
        members = self._members(shard, row, where)
        key = next(iter(members.values()))[0]
        sample: dict[str, Any] = {"__key__": key}
        fields = {name: name for name in members} if self._columns is None else self._columns
        for name, field in fields.items():
            if field not in members:
                raise DataError(
                    f"{where}, key {key!r}, has no member .{field}; it has {', '.join(f'.{found}' for found in members)}: repair "
                    "the shard, or name another field in columns="
                )
            sample[name] = decode_member(field, members[field][1], f"{where}, key {key!r}")
        sample["sample_id"] = int(sample_id)
        return sample

    def _members(self, shard: int, row: int, where: str) -> dict[str, tuple[str, bytes]]:
        """Ending → (key, content) of the sample's members."""
        offsets = self._indexes[int(self._stream_of_shard[shard])].offsets(int(self._shard_in_stream[shard]))
        begin, end = int(offsets[row]), int(offsets[row + 1])
        members: dict[str, tuple[str, bytes]] = {}
        try:
            data = os.pread(self._file(shard), end - begin, begin)
            if len(data) != end - begin:
                raise tarfile.ReadError(f"the file ends after {begin + len(data)} bytes")
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                for info in tar:
                    if (member := sample_member(info)) is None:
                        continue
                    key, field = member
                    content = tar.extractfile(info)
                    assert content is not None, "sample_member lets only regular files pass"
                    members[field] = (key, content.read())
        except (OSError, tarfile.TarError) as error:
            raise ShardError(
                f"{where} cannot be read ({type(error).__name__}: {error}). The shard is missing, truncated or was changed since it was "
                f"indexed: put it back, or delete {INDEX} in its folder for a new index (a new stream: its ids may name other samples)"
            ) from error
        if not members or len({key for key, _ in members.values()}) != 1:
            raise ShardError(
                f"{where} is not where the index says: the shard was changed since it was indexed; put it back"
            )
        return members

    def _file(self, shard: int) -> int:
        """A descriptor of the shard, for reading at a place; the last few stay open."""
        if self._files_of != os.getpid():  # a worker's copy: the parent's descriptors are the parent's to close
            self._files, self._files_of = OrderedDict(), os.getpid()
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        path = self._paths[shard]
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        found, recorded = os.fstat(descriptor).st_size, self._shard(shard).bytes
        if found != recorded:
            os.close(descriptor)
            raise OSError(f"it has {found} bytes, but the index records {recorded}")
        self._files[shard] = descriptor
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def _shard(self, number: int) -> Any:
        return self._indexes[int(self._stream_of_shard[number])].shards[int(self._shard_in_stream[number])]

    def check_shard(self, sample_id: int) -> None:
        """Compares the shard that a sample lies in with the SHA-256 in its index.

        Raises:
            ShardError: it has another one, or cannot be read.
        """
        number = self.shard_of(sample_id)
        path = self._paths[number]
        try:
            with open(path, "rb") as file:
                found = _sha256(file)
        except OSError as error:
            raise ShardError(f"shard {path} cannot be read ({error.strerror or error})") from error
        if found != self._shard(number).sha256:
            raise ShardError(
                f"sample {sample_id} is not the one that was indexed: the sha256 of its shard {path} is {found}, but the index records "
                f"{self._shard(number).sha256}; put the shard back"
            )

    def shard_of(self, sample_id: int) -> int:
        """The number of the shard that a sample lies in, over all streams."""
        return int(np.searchsorted(self._shard_firsts, sample_id, side="right")) - 1

    # Epochs -----------------------------------------------------------------------------------------------------------

    def group_by_length(self, batches: int, lengths: np.ndarray) -> None:
        """From now on batches have samples of similar length: each `batches` global batches of an epoch are sorted by length together.

        As `UDSStreamingDataset.group_by_length`, in arguments and errors. A collective: every rank must call it.
        """
        if self.next_epoch > 0:
            raise ConfigError(f"epoch {self.next_epoch - 1} has begun; group the data set before it is read from")
        self._groups = length_groups(batches, lengths, samples=self.size)

    @property
    def length_grouping(self) -> dict[str, Any] | None:
        """What decides how epochs are grouped by length, as plain types; None: they are not."""
        if self._groups is None:
            return None
        return self._groups.facts(batch=self.batch_size * self._ranks, seed=self._order_settings["seed"])

    def __len__(self) -> int:
        """Samples of an epoch on this rank."""
        return -(-self.size // self._ranks)

    def __iter__(self) -> Iterator[Any]:
        # Here, not in the generator: an epoch begins when its iterator is made.
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch = self._begin_epoch(None if worker is None else (worker.id, worker.seed - worker.id))
        skipped = int(self._resume_at[1]) if int(self._resume_at[0]) == epoch else 0
        return self._epoch(epoch, skipped, number, workers)

    def _begin_epoch(self, worker: tuple[int, int] | None) -> int:
        """The epoch of a new iterator: the one after the last that any iterator began, and the same for all workers of one iterator.

        The workers of one iterator know each other by its base seed. Each writes one word, (tag of the iterator, next epoch), so that
        another sees both or neither; whichever order they come in, they find the same epoch.

        Args:
            worker: (number, base seed of its iterator); None: this process reads by itself.
        """
        slot = tag = 0
        if worker is not None:
            number, base = worker
            if number >= _MOST_WORKERS:
                raise ConfigError(f"num_workers is more than {number}; at most {_MOST_WORKERS} can be used")
            turn = self._turns.get(base, 0)  # workers that persist keep their seed
            self._turns[base] = turn + 1
            slot = number + 1
            tag = int.from_bytes(hashlib.sha256(f"{base} {turn}".encode()).digest()[:4], "little") >> 1 | 1
        words = self._begun.numpy().copy()
        tags, epochs = words >> 32, words & 0xFFFFFFFF
        known = epochs[(tags == tag) & (tag > 0)]
        following = int(known.max()) if len(known) else int(epochs.max()) + 1
        self._begun[slot] = tag << 32 | following
        return following - 1

    def _epoch(self, epoch: int, skipped: int, worker: int, workers: int) -> Iterator[Any]:
        mine = self._ids_of_rank(epoch, skipped)
        for batch in range(worker, -(-len(mine) // self.batch_size), workers):
            for sample_id in mine[batch * self.batch_size : (batch + 1) * self.batch_size].tolist():
                yield self[sample_id]

    def _ids_of_rank(self, epoch: int, skipped: int) -> np.ndarray:
        """This rank's ids of an epoch of which `skipped` samples, of all ranks, are done."""
        order = epoch_order(self._shard_samples, epoch=epoch, **self._order_settings)
        if self._groups is not None:
            batch, seed = self.batch_size * self._ranks, self._order_settings["seed"]
            order = self._groups.order(order, batch=batch, seed=seed, epoch=epoch)
        rest = order[min(skipped, len(order)) :]
        short = -len(rest) % self._ranks
        rest = np.concatenate([rest, np.resize(order, short)])
        nodes = self._ranks // self._ranks_per_node
        offset = self._rank % self._ranks_per_node * nodes + self._rank // self._ranks_per_node
        return rest[offset :: self._ranks]

    @property
    def next_epoch(self) -> int:
        """The epoch that the next iterator of the data loader is of."""
        return int((self._begun & 0xFFFFFFFF).max())

    # Composer: "this data set resumes by itself".

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where the epoch stands after `num_samples` of all ranks, as plain types."""
        epoch, seen = self.next_epoch, 0
        if num_samples or not from_beginning:
            epoch, seen = max(0, epoch - 1), num_samples
            if not from_beginning and int(self._resume_at[0]) == epoch:
                seen += int(self._resume_at[1])
        return {
            "version": STATE_VERSION,
            "epoch": epoch,
            "sample_in_epoch": seen,
            **self._order_settings,
            "indexes": [index.sha256 for index in self._indexes],
            **({} if self._groups is None else {"length_groups": self.length_grouping}),
        }

    def load_state_dict(self, obj: Mapping[str, Any]) -> None:
        """The next iterator begins where `state_dict` stood.

        Raises:
            ResumeError: it was of other shards, or shuffled or grouped otherwise; the message names what.
        """
        ours = self.state_dict(0, True)
        names = ("version", *self._order_settings, "indexes")
        if changed := [
            f"{name}: was {obj.get(name)!r}, is {ours[name]!r}" for name in names if obj.get(name) != ours[name]
        ]:
            raise ResumeError(
                "the checkpoint was made with another WebDataset stream or order, so its position means nothing here:\n  "
                + "\n  ".join(changed)
                + "\ngive the same folders and settings, or start a new run"
            )
        check_same_grouping(obj.get("length_groups"), self.length_grouping)
        epoch, seen = int(obj["epoch"]), int(obj["sample_in_epoch"])
        self._begun.fill_(epoch)
        self._resume_at[0], self._resume_at[1] = epoch, seen


def _shared_index(folder: Path) -> WebIndex:
    """The folder's index, made by rank 0 if there is none; by another rank where it does not see rank 0's disk."""
    from udsstream.mosaicml.ranks import on_rank_zero

    if dist.get_world_size() > 1 and dist.is_initialized():
        on_rank_zero(lambda: ensure_index(folder) and None)
    return ensure_index(folder)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    for piece in iter(lambda: file.read(1 << 20), b""):
        digest.update(piece)
    return digest.hexdigest()
