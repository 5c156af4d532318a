"""Reading, taking, trimming and repacking batches.

B rows, N columns
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from udsstream.errors import DataError, MissingSampleIdError, SequenceTooLongError
from udsstream.mosaicml.batch import (
    check_candidates,
    cut_by_length,
    join_rows,
    real_tokens,
    sample_ids_of,
    scoring_microbatches,
    split_rows,
    take_rows,
    trim_padding,
)


def make_batch(lengths: list[int], width: int | None = None, side: str = "right") -> dict:
    """Row i holds the tokens 100·(i+1) + position, padded with 9."""
    width = width or max(lengths)
    batch = {
        "input_ids": torch.full((len(lengths), width), 9),
        "attention_mask": torch.zeros(len(lengths), width, dtype=torch.int64),
        "labels": torch.full((len(lengths), width), -100),
        "sample_id": torch.arange(len(lengths)) + 70,
    }
    for row, n in enumerate(lengths):
        place = slice(0, n) if side == "right" else slice(width - n, width)
        batch["input_ids"][row, place] = 100 * (row + 1) + torch.arange(n)
        batch["attention_mask"][row, place] = 1
        batch["labels"][row, place] = 100 * (row + 1) + torch.arange(n)
    return batch


SIDES = pytest.mark.parametrize("side", ["left", "right"])
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=7)


# Ids -------------------------------------------------------------------------------------------------------------------


def test_ids_are_read_as_ints():
    assert sample_ids_of(make_batch([2, 3])) == [70, 71]
    small = make_batch([2, 3]) | {"sample_id": torch.tensor([4, 5], dtype=torch.int32)}
    assert sample_ids_of(small) == [4, 5]


@pytest.mark.parametrize(
    ("batch", "error", "text"),
    [
        ((1, 2), DataError, r"yields a tuple, but selection needs a mapping.*return a dict"),
        ({}, MissingSampleIdError, r"no 'sample_id' \(found: nothing\)"),
        ({"input_ids": torch.ones(2, 3)}, MissingSampleIdError, r"\(found: input_ids\).*UDSStreamingDataset puts it"),
        ({"sample_id": torch.tensor([1])}, DataError, r"no 'input_ids' tensor.*found: sample_id"),
        (
            {"sample_id": torch.tensor([1]), "input_ids": torch.ones(3)},
            DataError,
            r"no 'input_ids' tensor of shape \(B, N\)",
        ),
        (
            {"sample_id": [1, 2], "input_ids": torch.ones(2, 3)},
            MissingSampleIdError,
            r"'sample_id' is a list, but must be",
        ),
        (
            {"sample_id": torch.ones(2), "input_ids": torch.ones(2, 3)},
            MissingSampleIdError,
            r"is a torch.float32 tensor of shape \(2,\)",
        ),
        (
            {"sample_id": torch.tensor([1, 2, 3]), "input_ids": torch.ones(2, 3)},
            MissingSampleIdError,
            r"of shape \(3,\), but must be an integer tensor of shape \(2,\)",
        ),
    ],
)
def test_a_batch_without_proper_ids_is_refused(batch, error, text):
    with pytest.raises(error, match=text):
        sample_ids_of(batch)


# Masks and checks --------------------------------------------------------------------------------------------------------


def test_real_tokens_without_a_mask_are_all():
    batch = make_batch([2, 3])
    del batch["attention_mask"]
    assert real_tokens(batch).tolist() == [[True] * 3] * 2


def test_real_tokens_with_a_mask():
    mask = real_tokens(make_batch([1, 3], side="left"))
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[False, False, True], [True, True, True]]


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(DataError, match=r"'attention_mask' has shape \(2, 1, 3, 3\), but 'input_ids' has \(2, 3\)"):
        real_tokens(make_batch([2, 3]) | {"attention_mask": torch.ones(2, 1, 3, 3)})


@SIDES
def test_lengths_of_good_candidates(side):
    batch = make_batch([2, 5, 1], side=side)
    assert check_candidates(batch, real_tokens(batch), [70, 71, 72], 5) == [2, 5, 1]


def test_too_long_empty_and_unlearnable_rows_are_named():
    batch = make_batch([2, 5, 1])
    mask = real_tokens(batch)
    with pytest.raises(SequenceTooLongError, match=r"sample 71 \(row 1 of the batch\) has 5 tokens, but max_seq_len=4"):
        check_candidates(batch, mask, [70, 71, 72], 4)
    batch["labels"][2] = -100
    with pytest.raises(DataError, match=r"all labels of sample 72 \(row 2 of the batch\) are -100"):
        check_candidates(batch, mask, [70, 71, 72], 5)
    del batch["labels"]
    assert check_candidates(batch, mask, [70, 71, 72], 5) == [2, 5, 1]
    mask[0] = False
    with pytest.raises(DataError, match=r"sample 70 \(row 0 of the batch\) has no token that is not padding"):
        check_candidates(batch, mask, [70, 71, 72], 5)


# Rows ------------------------------------------------------------------------------------------------------------------


def test_take_rows_indexes_tensors_filters_lists_and_carries_the_rest():
    extra = {
        "text": ["a", "b", "c"],
        "pair": ("x", "y", "z"),
        "position_ids": torch.arange(12).view(3, 4),
        "per_row": torch.tensor([0.5, 1.5, 2.5]),
        "scalar": torch.tensor(3.0),
        "number": 3,
        "name": "abc",  # a string of B letters is not a list of B entries
        "none": None,
        "other_length": [1, 2],
        "square": torch.ones(4, 4),
    }
    batch = make_batch([2, 4, 1]) | extra
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    taken = take_rows(batch, [2, 0])
    assert taken.keys() == batch.keys()
    assert taken["sample_id"].tolist() == [72, 70]
    assert torch.equal(taken["input_ids"], batch["input_ids"][[2, 0]])
    assert torch.equal(taken["position_ids"], extra["position_ids"][[2, 0]])
    assert taken["per_row"].tolist() == [2.5, 0.5]
    assert (taken["text"], taken["pair"]) == (["c", "a"], ("z", "x"))
    for key in ("scalar", "number", "name", "none", "other_length", "square"):
        assert taken[key] is batch[key], key
    for key, value in before.items():  # the batch itself is left alone
        assert torch.equal(batch[key], value) if isinstance(value, torch.Tensor) else batch[key] == value


def test_taking_one_row_keeps_the_dimension():
    taken = take_rows(make_batch([2, 4]), [1])
    assert taken["input_ids"].shape == (1, 4)
    assert taken["sample_id"].tolist() == [71]


@SIDES
def test_trim_cuts_the_side_that_was_padded(side):
    batch = make_batch([2, 4, 7], width=10, side=side) | {
        "position_ids": torch.arange(10).expand(3, 10),
        "per_row": torch.ones(3, 1),
        "note": "kept",
    }
    trimmed = trim_padding(take_rows(batch, [0, 1]))
    kept = slice(0, 4) if side == "right" else slice(6, 10)
    for key in ("input_ids", "attention_mask", "labels", "position_ids"):
        assert torch.equal(trimmed[key], batch[key][:2, kept]), key
    assert trimmed["per_row"].shape == (2, 1)
    assert trimmed["note"] == "kept"


@SIDES
@pytest.mark.parametrize("rows", [[0], [1], [0, 2], [0, 1, 2]])
def test_trimming_the_taken_rows_is_collating_them_alone(side, rows):
    lengths = [3, 5, 8]
    trimmed = trim_padding(take_rows(make_batch(lengths, width=11, side=side), rows))
    collated = take_rows(make_batch(lengths, side=side), rows)
    width = max(lengths[row] for row in rows)
    for key in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(trimmed[key], collated[key][:, :width] if side == "right" else collated[key][:, -width:])
        assert trimmed[key].is_contiguous()


@SIDES
def test_what_llm_foundry_s_collators_add_stays_with_its_rows(side):
    """Token counts as lists of one entry a row, some of them tensors; `sequence_id`, -1 where there is padding."""
    lengths = [3, 5, 8, 2]
    batch = make_batch(lengths, width=11, side=side)
    batch |= {
        "sequence_id": batch["attention_mask"] - 1,
        "total_tokens": list(lengths),
        "loss_generating_tokens": [torch.tensor(n - 1) for n in lengths],
    }
    kept = trim_padding(take_rows(batch, [1, 3]))
    joined = join_rows(split_rows(batch, [1, 3]), batch)
    for found in (kept, joined):
        assert found["total_tokens"] == [5, 2]
        assert [int(n) for n in found["loss_generating_tokens"]] == [4, 1]
        assert torch.equal(found["sequence_id"], found["attention_mask"] - 1)
        assert found["input_ids"].shape == (2, 5)
    for key in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(kept[key], joined[key]), key
    for rows, packed in scoring_microbatches(batch, batch["attention_mask"].bool(), lengths, 100):
        assert packed["total_tokens"] == [lengths[row] for row in rows]
        assert torch.equal(packed["sequence_id"], packed["attention_mask"] - 1)


def test_trim_keeps_holes_inside_and_batches_without_a_mask():
    batch = make_batch([4, 4], width=4)
    batch["attention_mask"] = torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]])
    assert trim_padding(batch)["input_ids"].shape == (2, 3)
    del batch["attention_mask"]
    assert trim_padding(batch)["input_ids"].shape == (2, 4)


# Microbatches for scoring ----------------------------------------------------------------------------------------------


@given(lengths=LENGTHS, max_tokens=st.integers(1, 40), side=st.sampled_from(["left", "right"]), spare=st.integers(0, 5))
def test_microbatches_cover_each_row_once_within_the_budget(lengths, max_tokens, side, spare):
    batch = make_batch(lengths, width=max(lengths) + spare, side=side)
    covered = []
    for rows, packed in scoring_microbatches(batch, real_tokens(batch), lengths, max_tokens):
        covered += rows
        longest = max(lengths[row] for row in rows)
        assert packed["input_ids"].shape == (len(rows), longest)
        assert len(rows) * longest <= max_tokens or len(rows) == 1
        for place, row in enumerate(rows):
            n = lengths[row]
            tokens = list(range(100 * (row + 1), 100 * (row + 1) + n))
            assert packed["input_ids"][place, :n].tolist() == tokens  # as laid out, from the first real token on
            assert packed["labels"][place].tolist() == tokens + [-100] * (longest - n)
            assert packed["attention_mask"][place].tolist() == [1] * n + [0] * (longest - n)
            assert packed["sample_id"][place] == 70 + row
    assert sorted(covered) == list(range(len(lengths)))


@given(lengths=LENGTHS, max_tokens=st.integers(1, 40))
def test_microbatches_do_not_depend_on_the_side_or_amount_of_padding(lengths, max_tokens):
    variants = [make_batch(lengths), make_batch(lengths, side="left"), make_batch(lengths, width=20, side="left")]
    packings = [list(scoring_microbatches(each, real_tokens(each), lengths, max_tokens)) for each in variants]
    for packing in packings[1:]:
        for (rows, packed), (expected_rows, expected) in zip(packing, packings[0], strict=True):
            assert rows == expected_rows
            assert packed.keys() == expected.keys()
            assert all(torch.equal(packed[key], expected[key]) for key in packed)


def test_microbatches_keep_dtypes_and_leave_the_batch_alone():
    batch = make_batch([2, 4], side="left") | {"attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()}
    before = {key: value.clone() for key, value in batch.items()}
    [(rows, packed)] = scoring_microbatches(batch, real_tokens(batch), [2, 4], 100)
    assert rows == [0, 1]
    assert packed["attention_mask"].dtype == torch.bool
    assert packed["attention_mask"].tolist() == [[True, True, False, False], [True] * 4]
    assert all(torch.equal(batch[key], value) for key, value in before.items())


def test_microbatches_give_a_mask_to_batches_that_have_none():
    batch = make_batch([3, 3])
    del batch["attention_mask"]
    [(_, packed)] = scoring_microbatches(batch, real_tokens(batch), [3, 3], 100)
    assert packed["attention_mask"].tolist() == [[1, 1, 1]] * 2


def test_microbatches_put_rows_of_like_length_together():
    lengths = [9, 1, 8, 2]
    batch = make_batch(lengths)
    assert [rows for rows, _ in scoring_microbatches(batch, real_tokens(batch), lengths, 18)] == [[1, 3], [2, 0]]


@given(LENGTHS, st.integers(1, 40), st.one_of(st.none(), st.integers(0, 30)))
def test_cuts_cost_the_least_of_all_that_are_allowed(lengths, max_tokens, forward_cost):
    """Against every way to cut."""
    lengths = sorted(lengths)
    price = 10_000 if forward_cost is None else forward_cost

    def cost(runs):
        return sum((stop - start) * lengths[stop - 1] + price for start, stop in runs)

    allowed = []
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        edges = [0, *(place + 1 for place, cut in enumerate(cuts) if cut), len(lengths)]
        runs = list(itertools.pairwise(edges))
        if all((stop - start) * lengths[stop - 1] <= max_tokens or stop - start == 1 for start, stop in runs):
            allowed.append(runs)
    found = cut_by_length(lengths, max_tokens, forward_cost)
    assert found in allowed
    assert cost(found) == min(map(cost, allowed))


def test_cheap_forwards_leave_no_padding_and_dear_ones_are_few():
    lengths = [90, 107, 127, 135, 167, 209, 210, 271]
    assert cut_by_length(lengths, 16384, None) == [(0, 8)]
    assert cut_by_length(lengths, 16384, 0) == [(place, place + 1) for place in range(8)]
    assert cut_by_length(lengths, 600, None) == [(0, 4), (4, 6), (6, 8)]
    assert cut_by_length([], 100, 5) == []
