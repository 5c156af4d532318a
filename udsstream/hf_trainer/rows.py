"""What a training set must be for `SelectingTrainer`: rows that can be read by number, each with an id that names it in the log.

The Trainer draws an order of row numbers for each epoch and, resuming, skips the numbers that were used. So a data set that can only be
iterated over is refused: where it goes on after a resume is not known here. A StreamingDataset can do both, and is read by number, in
the Trainer's order; its own shuffling, which makes downloads follow one another, has no part in that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from streaming import StreamingDataset
from torch.utils.data import Dataset, IterableDataset

from udsstream.errors import ConfigError
from udsstream.mosaicml.dataset import SampleLocation, StreamIdentity, locate, stream_identities
from udsstream.mosaicml.sample_identity import IdentifiedSample
from udsstream.mosaicml.webdataset import UDSWebDataset

__all__ = ["StreamRows", "readable_by_number"]


class StreamRows(Dataset):
    """The samples of a StreamingDataset or UDSWebDataset by their ids, and with them.

    Raises (by `__getitem__`):
        ShardError: a shard is missing or corrupt, if the data set is one of udsstream's.
    """

    def __init__(self, dataset: StreamingDataset | UDSWebDataset) -> None:
        self.streaming = dataset

    def __len__(self) -> int:
        return self.streaming.size

    def __getitem__(self, index: int) -> IdentifiedSample:
        return IdentifiedSample(int(index), self.streaming[int(index)])

    # `IdentifiedDataset`

    def locate(self, sample_ids: Sequence[int] | np.ndarray) -> SampleLocation:
        """Where each sample lies. Opens nothing."""
        return locate(self.streaming, sample_ids)

    def stream_identities(self) -> list[StreamIdentity]:
        """The identity of each stream, in order."""
        return stream_identities(self.streaming)


def readable_by_number(dataset: Any) -> Any:
    """The data set, or its rows where it is a stream.

    Raises:
        ConfigError: it can only be iterated over.
    """
    if isinstance(dataset, (StreamingDataset, UDSWebDataset)):
        return StreamRows(dataset)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"train_dataset is a {type(dataset).__name__}, which can only be iterated over, so that a resumed run could not tell where it "
            "stands and no log could be replayed; give a data set with rows by number (datasets.Dataset, torch.utils.data.Dataset), or a "
            "UDSStreamingDataset"
        )
    return dataset
