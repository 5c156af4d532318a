"""The batches of one update: joined to choose from, and what was kept of them cut into as many parts again.

The Trainer takes `gradient_accumulation_steps` batches for each update of the weights. All of them together are the candidates of one
decision, since all are looked at with the same weights; the kept rows are then trained on in as many parts, so that no more of them are on
the device at once than the user allowed for.

    B candidates of an update, K kept, n batches of it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from udsstream.mosaicml.batch import (
    check_candidates,
    join_rows,
    real_tokens,
    sample_ids_of,
    split_rows,
    take_rows,
    trim_padding,
)

__all__ = ["cut", "is_empty", "joined", "without_ids"]


def joined(batches: Sequence[Mapping[str, Any]], max_seq_len: int) -> Mapping[str, Any]:
    """All rows of n ≥ 1 batches as one batch, in order; a single batch as it is.

    Raises:
        DataError: a row cannot be chosen or trained on; see `check_candidates`.
    """
    if len(batches) == 1:
        return batches[0]
    rows, padded = [], batches[0]
    for batch in batches:
        ids, mask = sample_ids_of(batch), real_tokens(batch)
        check_candidates(batch, mask, ids, max_seq_len)
        rows += split_rows(batch, range(len(ids)))
        padded = padded if bool(mask.all()) else batch  # it shows the padding token
    return join_rows(rows, padded)


def cut(batch: Mapping[str, Any], rows: Sequence[int], parts: int) -> list[dict[str, Any]]:
    """The given rows (K,) of a batch, in order, in `parts` batches that differ by one row at most, each trimmed to its longest.

    With fewer rows than parts the last ones are empty: they have the batch's keys and no rows.
    """
    chunks = [chunk.tolist() for chunk in np.array_split(np.asarray(rows, dtype=np.int64), parts)]
    return [trim_padding(take_rows(batch, chunk)) if chunk else take_rows(batch, []) for chunk in chunks]


def is_empty(batch: Mapping[str, Any]) -> bool:
    """Whether a batch is one of the parts that got no row."""
    return "input_ids" in batch and len(batch["input_ids"]) == 0


def without_ids(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is called with."""
    return {name: value for name, value in batch.items() if name != "sample_id"}
