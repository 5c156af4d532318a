"""Reading, splitting and trimming a batch of samples, as pure functions of a mapping.

    B rows (candidates), N columns (tokens, padded), n_i real tokens of row i

A batch is a mapping with `input_ids` (B, N), mostly `attention_mask` (B, N) and `labels` (B, N), `sample_id` (B,) int64, and whatever
else a collator adds: tensors whose first dimension is B and lists of B entries belong to the rows; of the tensors, those whose
second dimension is N belong to the tokens. Anything else is carried along untouched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from udsstream.errors import DataError, MissingSampleIdError, SequenceTooLongError
from udsstream.scoring.losses import IGNORED_LABEL

__all__ = [
    "check_candidates",
    "cut_by_length",
    "join_rows",
    "real_tokens",
    "sample_ids_of",
    "scoring_microbatches",
    "split_rows",
    "take_rows",
    "trim_padding",
]

_FILL = {"labels": IGNORED_LABEL, "sequence_id": -1}
"""What padding holds beside zeros; `sequence_id` is llm-foundry's, which tells the sequences of a row apart."""

LEFT_PADDED = "(left padded)"
"""Key of a row apart from its batch: whether its padding stood on the left."""


def sample_ids_of(batch: object) -> list[int]:
    """The ids of the rows.

    Raises:
        DataError: the batch is not a mapping.
        MissingSampleIdError: it has no `sample_id`, or not one integer for each row.
    """
    if not isinstance(batch, Mapping):
        raise DataError(
            f"the data loader yields a {type(batch).__name__}, but selection needs a mapping such as "
            "{'input_ids': …, 'attention_mask': …, 'labels': …, 'sample_id': …}: return a dict from the collator"
        )
    if "sample_id" not in batch:
        raise MissingSampleIdError(
            f"the batch has no 'sample_id' (found: {', '.join(map(str, batch)) or 'nothing'}); every decision is recorded by it. "
            "UDSStreamingDataset puts it into each sample; keep it in the collator as an int64 tensor of shape (B,): "
            "batch['sample_id'] = torch.tensor([sample['sample_id'] for sample in samples]). With sample_ids=\"content-hash\" samples are "
            "named by their tokens instead"
        )
    ids = batch["sample_id"]
    rows = _input_ids(batch).shape[0]
    if not isinstance(ids, Tensor) or ids.shape != (rows,) or ids.is_floating_point():
        found = f"{ids.dtype} tensor of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise MissingSampleIdError(
            f"'sample_id' is a {found}, but must be an integer tensor of shape ({rows},), one id for each row of 'input_ids' "
            "(Composer cannot count or split a batch that holds tuples, strings or None)"
        )
    return ids.tolist()


def real_tokens(batch: Mapping[str, Any]) -> Tensor:
    """(B, N) bool: True where a token is not padding. Without an `attention_mask` every token is real."""
    input_ids = _input_ids(batch)
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(input_ids.shape[:2], dtype=torch.bool, device=input_ids.device)
    if mask.shape != input_ids.shape[:2]:
        raise DataError(
            f"'attention_mask' has shape {tuple(mask.shape)}, but 'input_ids' has {tuple(input_ids.shape)}; both must be (B, N)"
        )
    return mask.bool()


def check_candidates(batch: Mapping[str, Any], mask: Tensor, ids: Sequence[int], max_seq_len: int) -> list[int]:
    """The lengths n_i, once every row is known to be one that can be scored and trained on.

    Raises:
        SequenceTooLongError: a row has more than `max_seq_len` real tokens.
        DataError: a row has no real token, or no label that a loss is computed for.
    """
    lengths: list[int] = mask.sum(dim=1).tolist()
    for row, length in enumerate(lengths):
        if length > max_seq_len:
            raise SequenceTooLongError(
                f"sample {ids[row]} (row {row} of the batch) has {length} tokens, but max_seq_len={max_seq_len}; raise max_seq_len, "
                "or shorten the sample where it is tokenised"
            )
        if length == 0:
            raise DataError(
                f"sample {ids[row]} (row {row} of the batch) has no token that is not padding; leave it out of the stream"
            )
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.shape[:1] == mask.shape[:1]:
        learnable = (labels != IGNORED_LABEL).flatten(1).any(dim=1)
        if not bool(learnable.all()):
            row = int((~learnable).nonzero()[0])
            raise DataError(
                f"all labels of sample {ids[row]} (row {row} of the batch) are {IGNORED_LABEL}, so nothing can be learnt from it and a "
                "batch of such samples has the loss NaN; leave it out of the stream, or do not cut its response off"
            )
    return lengths


def take_rows(batch: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The given rows of a batch, in the given order: tensors are indexed, lists filtered, all else carried along."""
    count = _input_ids(batch).shape[0]
    index = torch.tensor(rows, dtype=torch.int64)

    def taken(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim >= 1 and value.shape[0] == count:
            return value[index.to(value.device)]
        if isinstance(value, (list, tuple)) and len(value) == count:
            return type(value)([value[row] for row in rows])
        return value

    return {key: taken(value) for key, value in batch.items()}


def trim_padding(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without the columns at either end in which every row is padding: as if it had been collated from its rows alone."""
    used = real_tokens(batch).any(dim=0).nonzero().flatten()
    width = _input_ids(batch).shape[1]
    start, stop = int(used[0]), int(used[-1]) + 1
    if (start, stop) == (0, width):
        return dict(batch)
    # Contiguous, as a collator's tensors are: Composer's metrics take views of the labels.
    return {
        key: value[:, start:stop].contiguous() if _has_tokens(value, batch) else value for key, value in batch.items()
    }


def split_rows(batch: Mapping[str, Any], rows: Sequence[int]) -> list[dict[str, Any]]:
    """The given rows one by one, each cut to its real tokens, so that they can be joined with rows of another batch.

    A row holds what belongs to it, and under `LEFT_PADDED` whether its padding stood on the left.
    """
    mask = real_tokens(batch)
    count = mask.shape[0]
    split = []
    for row in rows:
        real = mask[row].nonzero().flatten()
        start, stop = int(real[0]), int(real[-1]) + 1
        parts: dict[str, Any] = {LEFT_PADDED: start > 0}
        for key, value in batch.items():
            if _has_tokens(value, batch):
                parts[key] = value[row, start:stop]
            elif (isinstance(value, Tensor) and value.ndim >= 1 and value.shape[0] == count) or (
                isinstance(value, (list, tuple)) and len(value) == count
            ):
                parts[key] = value[row]
        split.append(parts)
    return split


def join_rows(rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of rows that `split_rows` cut, padded to the longest of them on the side that any of them was padded on.

    Args:
        rows: at least one, with the same keys.
        batch: one that such rows came from: what belongs to no row is carried along from it, and its padding token is used.

    Raises:
        DataError: the rows do not have the same keys.
    """
    left = any(row[LEFT_PADDED] for row in rows)
    longest = max(row["input_ids"].shape[0] for row in rows)
    padding = _input_ids(batch)[~real_tokens(batch)].flatten()
    fill = _FILL | ({"input_ids": padding[0].item()} if len(padding) else {})
    joined: dict[str, Any] = {}
    for key, value in batch.items():
        if not all(key in row for row in rows):
            if any(key in row for row in rows):
                raise DataError(
                    f"'{key}' belongs to the rows of the batch on some ranks, but not on others; collate it alike on all"
                )
            joined[key] = value
        elif _has_tokens(value, batch):
            laid = value.new_full((len(rows), longest, *value.shape[2:]), fill.get(key, 0))
            for place, row in enumerate(rows):
                length = row[key].shape[0]
                laid[place, longest - length if left else 0 : longest if left else length] = row[key]
            joined[key] = laid
        elif isinstance(value, Tensor):
            joined[key] = torch.stack([row[key] for row in rows])
        else:
            joined[key] = type(value)([row[key] for row in rows])
    return joined


def scoring_microbatches(
    batch: Mapping[str, Any],
    mask: Tensor,
    lengths: Sequence[int],
    max_tokens: int,
    *,
    forward_cost: int | None = None,
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """(rows, batch of these rows) such that rows × longest ≤ `max_tokens`, sorted by length, all padded on the right.

    Every row is laid out anew from its real tokens, so what the model computes for it does not depend on the side or the
    amount of padding that the collator chose. A row longer than `max_tokens` goes alone.

    Args:
        forward_cost: what a forward costs beside its tokens, in tokens: more forwards of rows of like length are made where the padding
            that they save is worth it. None: as few forwards as can be.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    for start, stop in cut_by_length([lengths[row] for row in order], max_tokens, forward_cost):
        yield order[start:stop], _repacked(batch, mask, order[start:stop])


def cut_by_length(lengths: Sequence[int], max_tokens: int, forward_cost: int | None) -> list[tuple[int, int]]:
    """Cuts ascending lengths (B,) into runs, (start, stop) each, of least cost: Σ over the runs of (rows × longest + `forward_cost`).

    Exact, by the best cut of each beginning: O(B²) in NumPy. See `scoring_microbatches` for the arguments.
    """
    count = len(lengths)
    # A forward that costs more than all tokens together is made as seldom as can be.
    price = float(count * max(lengths, default=0) + 1 if forward_cost is None else forward_cost)
    best, begin = np.zeros(count + 1), np.zeros(count + 1, dtype=np.int64)
    for stop in range(1, count + 1):
        longest = lengths[stop - 1]
        starts = np.arange(max(0, min(stop - 1, stop - max_tokens // longest)), stop)
        cost = best[starts] + (stop - starts) * longest + price
        begin[stop] = starts[np.argmin(cost)]
        best[stop] = cost.min()
    runs = []
    while count:
        runs.append((int(begin[count]), count))
        count = int(begin[count])
    return runs[::-1]


def _repacked(batch: Mapping[str, Any], mask: Tensor, rows: list[int]) -> dict[str, Any]:
    longest = int(mask[rows].sum(dim=1).max())
    packed: dict[str, Any] = {}
    for key, value in take_rows(batch, rows).items():
        if not _has_tokens(batch[key], batch):
            packed[key] = value
            continue
        # Ones in the mask's own dtype; any valid token id serves as padding, since nothing attends to it and nobody reads it.
        relaid = value.new_full((len(rows), longest, *value.shape[2:]), _FILL.get(key, 0))
        for place, row in enumerate(rows):
            real = value[place][mask[row]]
            relaid[place, : real.shape[0]] = real
        packed[key] = relaid
    if "attention_mask" not in packed:
        packed["attention_mask"] = torch.ones(len(rows), longest, dtype=torch.int64, device=mask.device)
    return packed


def _input_ids(batch: Mapping[str, Any]) -> Tensor:
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim < 2:
        raise DataError(
            f"the batch has no 'input_ids' tensor of shape (B, N) (found: {', '.join(map(str, batch)) or 'nothing'}); "
            "selection reads the tokens from it"
        )
    return ids


def _has_tokens(value: Any, batch: Mapping[str, Any]) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 2 and value.shape[:2] == _input_ids(batch).shape[:2]
