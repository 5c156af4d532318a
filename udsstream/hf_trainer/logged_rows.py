"""What a replay reads: the rows that a log names, update by update, from a data set with rows by number.

    LoggedBatches   a batch sampler: the rows of each update, epoch by epoch
    LoggedRows      a data set by sample id

The Trainer counts batches: it asks for `gradient_accumulation_steps` of them for an update, and skips so many of each update that was made
before a resume. So there are as many here; the first one of an update has all its kept rows, to be cut into parts as they were then, and
the others have none. Where selection was off, the batches are those of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from udsstream.errors import ReplayError
from udsstream.mosaicml.replay_data import LoggedDecisions
from udsstream.mosaicml.rng_state import keeps_rng_state
from udsstream.mosaicml.sample_identity import IdentifiedSample, IdentifyingCollator

__all__ = ["LoggedBatches", "LoggedRows", "collator_of_logged_rows", "numbers_by_id"]


class LoggedBatches(Sampler[list[int]]):
    """Yields the sample ids of an epoch's batches.

    Args:
        decisions: from step 0 on.
        batches: of the data loader in an epoch.
        batch_size: rows of each.
        accumulation: batches of an update.
        candidates: whether all candidates are read, or the kept rows alone.
    """

    def __init__(
        self, decisions: LoggedDecisions, *, batches: int, batch_size: int, accumulation: int, candidates: bool
    ) -> None:
        self._decisions, self._batches, self._accumulation = decisions, batches, accumulation
        self.batch_size, self.drop_last = batch_size, False  # where the data loader's wrapper looks for them
        self._whole = candidates
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is of."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        updates = -(-self._batches // self._accumulation)
        first = self._epoch * updates
        for step in range(first, min(first + updates, self._decisions.stop)):
            logged = self._decisions[step]
            ids = logged.sample_ids
            parts = min(self._accumulation, self._batches - (step - first) * self._accumulation)
            if logged.scored and not self._whole:
                yield ids
                yield from ([] for _ in range(parts - 1))
            else:
                for part in range(parts):
                    yield ids[part * self.batch_size : (part + 1) * self.batch_size]


class LoggedRows(Dataset):
    """A data set by sample id.

    Args:
        dataset: rows by number, with or without their ids.
        numbers: sample id → number. None: they are the same.
    """

    def __init__(self, dataset: Any, numbers: Mapping[int, int] | None) -> None:
        self._dataset, self._numbers = dataset, numbers

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, sample_id: int) -> IdentifiedSample:
        if self._numbers is not None and sample_id not in self._numbers:
            raise ReplayError(f"the log names sample {sample_id}, which no row of the data set has as its sample_id")
        row = self._dataset[sample_id if self._numbers is None else self._numbers[sample_id]]
        return row if isinstance(row, IdentifiedSample) else IdentifiedSample(sample_id, row)


def collator_of_logged_rows(collate: Callable[[list[Any]], Any]) -> Callable[[Sequence[IdentifiedSample]], Any]:
    """The run's collator for batches of which some have no rows."""
    return _CollatesNothingToo(IdentifyingCollator(collate))


class _CollatesNothingToo:  # a class, for workers that are spawned
    def __init__(self, collate: IdentifyingCollator) -> None:
        self._collate = collate

    def __call__(self, rows: Sequence[IdentifiedSample]) -> Mapping[str, Any]:
        return self._collate(rows) if rows else {"input_ids": torch.empty(0, 0, dtype=torch.int64)}


def numbers_by_id(dataset: Any) -> dict[int, int]:
    """The number of each row by its `sample_id`; of rows that are no columns all are read.

    Raises:
        ReplayError: rows have none, or two have the same.
    """
    if "sample_id" in (getattr(dataset, "column_names", None) or ()):
        ids = [int(sample_id) for sample_id in dataset["sample_id"]]
    else:
        with keeps_rng_state():
            rows = (dataset[number] for number in range(len(dataset)))
            found = [row.get("sample_id") if isinstance(row, Mapping) else None for row in rows]
        if None in found:
            raise ReplayError(
                f"the run named its samples by their sample_id, but row {found.index(None)} of the data set has none; give the data set "
                "that the run had"
            )
        ids = [int(sample_id) for sample_id in found if sample_id is not None]
    numbers = {sample_id: number for number, sample_id in enumerate(ids)}
    if len(numbers) != len(ids):
        raise ReplayError(
            f"{len(ids)} rows of the data set have {len(numbers)} different sample_ids: the log does not tell them apart"
        )
    return numbers
