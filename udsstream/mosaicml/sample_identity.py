"""Which sample is which, where a data loader does not say so: ids from the data set behind it, or from the tokens.

A log needs for every candidate an id that names it. `UDSStreamingDataset` and `UDSWebDataset` give one; other data sets mostly do not, nor
do the loaders that frameworks build around them. `SampleIdentity` finds out, before training starts, which of three there is:

    dataset        the data set's own ids: the sample's index over all streams, which stays the same between runs. A StreamingDataset of
                   another class is made to tell them (and gets `UDSStreamingDataset`'s guards); where a batch holds `sample_id`, it counts.
    position       the row in a map-style data set, such as one of Hugging Face's `datasets`, as the loader holds it: after whatever
                   was filtered out of it or shuffled in it before.
    content-hash   63 bits of the SHA-256 of the tokens, when asked for: equal texts have one id.

Ids travel beside their samples from the data set through the workers to the collator, which puts them into the batch. That the batch has
the samples' order is taken for granted; that it has their number is checked, so packing is refused.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from streaming import StreamingDataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from udsstream.errors import ConfigError, DataError, ResumeError
from udsstream.mosaicml.batch import real_tokens
from udsstream.mosaicml.dataset import IdentifiedDataset, SampleLocation, StreamIdentity, UDSStreamingDataset
from udsstream.mosaicml.rng_state import keeps_rng_state

__all__ = [
    "IdentifiedSample",
    "IdentifyingCollator",
    "NumberedRows",
    "SampleIdentity",
    "SampleIds",
    "check_same_ids",
    "content_ids",
]

SampleIds = Literal["dataset", "position", "content-hash"]
"""Where the ids of a run's samples come from; run.json says it under `loader`."""

SampleIdSetting = Literal["auto", "content-hash"]

_LOOKED_AT = 64
"""Rows of a map-style data set that its digest is made of, beside their number."""


class IdentifiedSample(NamedTuple):
    """A sample on its way to the collator."""

    sample_id: int
    sample: Any


class SampleIdentity:
    """Sees to it that a loader's batches hold `sample_id`, as far as that can be done before its workers start.

    Attributes:
        source: where the ids come from.
    """

    def __init__(self, setting: SampleIdSetting = "auto") -> None:
        if setting not in get_args(SampleIdSetting):
            raise ConfigError(f"sample_ids: {setting!r} is none of {', '.join(get_args(SampleIdSetting))}")
        self._hashes = setting == "content-hash"
        self.source: SampleIds = "content-hash" if self._hashes else "dataset"
        self._put_back: list[Callable[[], None]] = []

    def attach(self, loader: object) -> None:
        """Makes the loader's data set and collator tell ids, where they do not yet. Doing it again changes nothing.

        Raises:
            ConfigError: the collator packs several samples into one row.
        """
        if not isinstance(loader, DataLoader):
            return
        _refuse_packing(loader.collate_fn)
        dataset = loader.dataset
        if self._hashes or loader._iterator is not None or not loader._auto_collation:
            return
        if isinstance(dataset, NumberedRows):
            self.source = "position"
        elif isinstance(dataset, StreamingDataset):
            if not isinstance(dataset, UDSStreamingDataset):
                former = type(dataset)
                dataset.__class__ = _telling_ids(former)
                self._put_back.append(lambda: setattr(dataset, "__class__", former))
                self._attach_collator(loader)
        elif not isinstance(dataset, (IdentifiedDataset, IterableDataset)) and not _rows_have_ids(dataset):
            self.source = "position"
            # The data loader refuses to have its data set replaced, since a sampler may know the old one: this one has its rows.
            loader.__dict__["dataset"] = NumberedRows(dataset)
            self._put_back.append(lambda: loader.__dict__.update(dataset=dataset))
            self._attach_collator(loader)

    def _attach_collator(self, loader: DataLoader) -> None:
        former = loader.collate_fn
        loader.collate_fn = IdentifyingCollator(former)
        self._put_back.append(lambda: setattr(loader, "collate_fn", former))

    def identified(self, batch: Any) -> Any:
        """The batch as selection needs it: with content hashes put in, where these were asked for."""
        if not self._hashes or not isinstance(batch, Mapping):
            return batch
        return {**batch, "sample_id": torch.tensor(content_ids(batch), dtype=torch.int64)}

    def detach(self) -> None:
        """Puts the data set and the collator back as they were."""
        while self._put_back:
            self._put_back.pop()()


def check_same_ids(recorded: str, found: SampleIds) -> None:
    """Raises ResumeError when a run would go on with ids of another kind than it began with."""
    if recorded != found:
        raise ResumeError(
            f"the checkpoint's run named its samples by {recorded}, this one does by {found}, so that the log would name one sample in two "
            "ways; resume with the same kind of data set and the same sample_ids"
        )


# Ids of a data set -------------------------------------------------------------------------------------------------------


class IdentifyingCollator:
    """A collator of `IdentifiedSample`s: hands the samples to another one, and puts their ids into the batch.

    Raises (when called):
        DataError: the batch is no mapping, or has another number of rows than there were samples.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.base_collator = collate

    def __call__(self, samples: Sequence[IdentifiedSample]) -> MutableMapping[str, Any]:
        batch = self.base_collator([sample for _, sample in samples])
        if not isinstance(batch, MutableMapping):
            raise DataError(
                f"the collator returns a {type(batch).__name__}, but selection needs a mapping with 'input_ids', so that ids can be put in"
            )
        rows = batch["input_ids"].shape[0] if isinstance(batch.get("input_ids"), Tensor) else None
        if rows != len(samples):
            raise DataError(
                f"the collator made {rows} rows of {len(samples)} samples, so that a row is no sample any more and none can be chosen or "
                "recorded; collate one row for each sample (no packing)"
            )
        if "sample_id" not in batch:
            batch["sample_id"] = torch.tensor([sample_id for sample_id, _ in samples], dtype=torch.int64)
        return batch


class NumberedRows(Dataset):
    """A map-style data set whose rows tell their numbers. Everything else is as the data set itself says."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        if hasattr(dataset, "__getitems__"):
            self.__getitems__ = self._many

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> IdentifiedSample:
        return IdentifiedSample(int(index), self._dataset[index])

    def _many(self, indices: Sequence[int]) -> list[IdentifiedSample]:
        rows = self._dataset.__getitems__(indices)
        return [IdentifiedSample(int(index), row) for index, row in zip(indices, rows, strict=True)]

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self._dataset, name)

    # `IdentifiedDataset`: one stream, without shards.

    def locate(self, sample_ids: Sequence[int] | np.ndarray) -> SampleLocation:
        """All in stream 0; in no shard."""
        count = len(sample_ids)
        nowhere = np.ma.masked_all(count, dtype=np.int64)
        return SampleLocation(stream=np.zeros(count, dtype=np.int64), shard=nowhere, index=nowhere)

    def stream_identities(self) -> list[StreamIdentity]:
        """The data set as a stream of the format "rows"; see `_digest` for what its digest covers."""
        info = getattr(self._dataset, "info", None)
        files = getattr(self._dataset, "cache_files", None) or [{}]
        return [
            StreamIdentity(
                name=str(getattr(info, "dataset_name", None) or type(self._dataset).__name__),
                location=str(files[0].get("filename", "memory")),
                samples=len(self),
                per_epoch=len(self),
                index_sha256=_digest(self._dataset),
                format="rows",
            )
        ]


def _telling_ids(cls: type[StreamingDataset]) -> type[StreamingDataset]:
    """A class whose data sets are as those of `cls`, but yield `IdentifiedSample`s and never end early."""
    return _telling_ids_of(cls)


@functools.cache
def _telling_ids_of(cls: type[StreamingDataset]) -> type[StreamingDataset]:
    return type(f"Identified{cls.__name__}", (_Identified, cls), {"__module__": cls.__module__})


class _Identified(UDSStreamingDataset):
    """What `_telling_ids` adds to a class; its objects were made by that class alone."""

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """As it lies in the stream: whoever makes a sample of it may not expect a key that the stream does not have."""
        sample = super().get_item(sample_id, retry)
        shard = self.shards[int(self.spanner[sample_id][0])]
        if "sample_id" not in getattr(shard, "column_names", ()):
            del sample["sample_id"]
        return sample

    def _with_id(self, sample: Any, sample_id: int) -> Any:
        return IdentifiedSample(sample_id, sample)


def _refuse_packing(collate: object) -> None:
    """Raises ConfigError for llm-foundry's packing collator, however it is wrapped."""
    seen = 0
    while collate is not None and seen < 16:
        if type(collate).__name__ == "BinPackCollator":
            raise ConfigError(
                "the data loader packs several samples into one row (llm-foundry's packing_ratio), so that a row is no sample any more: "
                "leave packing_ratio out of the train_loader's dataset. What is kept is trained on without padding anyway, which is most "
                "of what packing saves"
            )
        collate, seen = getattr(collate, "base_collator", None), seen + 1


def _rows_have_ids(dataset: Any) -> bool:
    """Whether the rows of a map-style data set hold `sample_id` already."""
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, list):
        return "sample_id" in columns
    with keeps_rng_state():  # it may augment what it reads
        return len(dataset) > 0 and isinstance(row := dataset[0], Mapping) and "sample_id" in row


def _digest(dataset: Any) -> str:
    """SHA-256, in hexadecimal, of the number of rows, the names of the columns, and 64 rows evenly spaced.

    Only columns that are known to stay as they are (Hugging Face `datasets`) are read: rows of other data sets may be made at random.
    """
    columns = getattr(dataset, "column_names", None)
    count = len(dataset)
    digest = hashlib.sha256(f"udsstream rows 1\0{count}\0".encode())
    if isinstance(columns, list):
        for number in np.unique(np.linspace(0, max(count - 1, 0), min(count, _LOOKED_AT)).astype(np.int64)).tolist():
            _add(digest, dataset[number])
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Takes in what a row may hold, so that different values give different bytes."""
    if isinstance(value, Mapping):
        digest.update(f"{{{len(value)}".encode())
        for key in sorted(value, key=str):
            _add(digest, str(key))
            _add(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _add(digest, item)
    elif isinstance(value, (np.ndarray, Tensor)):
        _add(digest, value.tolist())
    else:
        text = value if isinstance(value, bytes) else repr(value).encode() if _plain(value) else b""
        digest.update(f"{type(value).__name__}{len(text)}:".encode() + text)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, np.generic))


# Ids of the tokens -------------------------------------------------------------------------------------------------------


def content_ids(batch: Mapping[str, Any]) -> list[int]:
    """For each row the first 63 bits of the SHA-256 of its real tokens (int64, little-endian), whatever its padding.

    Equal texts have one id. Two different ones of n samples share one with probability n²/2⁶⁴: 5e-8 for a million.

    Raises:
        DataError: the batch has no 'input_ids' (B, N), or an 'attention_mask' of another shape.
    """
    mask = real_tokens(batch)
    rows = [row[real].cpu().numpy().astype("<i8") for row, real in zip(batch["input_ids"], mask, strict=True)]
    return [int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:8], "big") >> 1 for row in rows]
