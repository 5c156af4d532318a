"""The memory against a naive FIFO loop, its restoration bit for bit, its digest, and distances of near-duplicates."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from udsstream.scoring.embedding_buffer import EmbeddingBuffer, mean_distance

DIM = 5
PUSHES = st.lists(st.integers(0, 17), max_size=8)
"""Sizes of successive pushes: none, one, and more than the capacity at once."""
CAPACITIES = st.integers(1, 9)


def rows(count: int, *, seed: int, dim: int = DIM) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(capacity=CAPACITIES, sizes=PUSHES)
def test_it_is_a_fifo(capacity, sizes):
    buffer, naive, pushes = EmbeddingBuffer.empty(capacity, DIM), oracles.Fifo(capacity), []
    candidates = rows(3, seed=99)
    for number, size in enumerate(sizes):
        new = rows(size, seed=number)
        buffer.push(new)
        naive.push(new.numpy())
        pushes.append(new.numpy())
        assert len(buffer) == len(naive.rows)
        assert buffer.pushed == sum(sizes[: number + 1])
        np.testing.assert_array_equal(buffer.oldest_first().numpy(), np.array(naive.rows).reshape(-1, DIM))
        assert sorted(buffer.held().tolist()) == sorted(row.tolist() for row in naive.rows)
        assert buffer.digest == oracles.digest_chain(pushes)
    found = buffer.mean_distance(candidates)
    expected = [oracles.mean_distance(candidate, naive.rows) for candidate in candidates]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


@settings(max_examples=60)
@given(capacity=CAPACITIES, sizes=PUSHES, later=PUSHES)
def test_a_restored_buffer_goes_on_as_the_same_array(capacity, sizes, later):
    buffer = EmbeddingBuffer.empty(capacity, DIM)
    for number, size in enumerate(sizes):
        buffer.push(rows(size, seed=number))
    again = EmbeddingBuffer.restore(
        buffer.oldest_first(), pushed=buffer.pushed, digest=buffer.digest, capacity=capacity
    )
    for number, size in enumerate([0, *later]):
        for each in (buffer, again):
            each.push(rows(size, seed=1000 + number))
        assert torch.equal(again.rows, buffer.rows)  # the layout too: sums over it round alike
        assert (again.pushed, again.digest) == (buffer.pushed, buffer.digest)
        assert torch.equal(again.mean_distance(rows(4, seed=7)), buffer.mean_distance(rows(4, seed=7)))


def test_one_push_of_many_is_as_many_pushes_but_for_the_digest():
    whole, single = EmbeddingBuffer.empty(4, DIM), EmbeddingBuffer.empty(4, DIM)
    new = rows(11, seed=1)
    whole.push(new)
    for row in new:
        single.push(row[None])
    assert torch.equal(whole.rows, single.rows)
    assert whole.digest != single.digest


def test_the_digest_depends_on_order_values_and_history():
    def digest(*pushes: torch.Tensor) -> bytes:
        buffer = EmbeddingBuffer.empty(4, DIM)
        for new in pushes:
            buffer.push(new)
        return buffer.digest

    one, other = rows(2, seed=1), rows(2, seed=2)
    assert EmbeddingBuffer.empty(4, DIM).digest == bytes(32)
    assert digest(one, other) == digest(one.clone(), other.clone())
    assert digest(one, other) != digest(other, one)
    assert digest(one) != digest(one.flip(0))
    nudged = one.clone()
    nudged[0, 0] = torch.nextafter(nudged[0, 0], torch.tensor(9.0))
    assert digest(one) != digest(nudged)


def test_an_empty_buffer_is_at_distance_zero():
    buffer = EmbeddingBuffer.empty(4, DIM)
    found = buffer.mean_distance(rows(3, seed=1))
    assert torch.equal(found, torch.zeros(3))
    assert found.dtype == torch.float32
    assert buffer.oldest_first().shape == (0, DIM)


def test_rows_that_were_never_filled_do_not_count():
    buffer = EmbeddingBuffer.empty(1000, DIM)
    buffer.push(rows(1, seed=1))
    assert buffer.mean_distance(rows(1, seed=1)) == 0


def test_what_is_pushed_is_copied():
    buffer, new = EmbeddingBuffer.empty(4, DIM), rows(2, seed=1)
    buffer.push(new)
    before = buffer.oldest_first()
    new.zero_()
    assert torch.equal(buffer.oldest_first(), before)
    before.zero_()
    assert buffer.oldest_first().any()


def test_restoring_the_wrong_number_of_rows_is_refused():
    with pytest.raises(ValueError, match=r"capacity 4 after 9 pushes holds 4 rows, but 3 were given"):
        EmbeddingBuffer.restore(rows(3, seed=1), pushed=9, digest=bytes(32), capacity=4)


@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3])
def test_near_duplicates_are_told_apart(gap):
    """32 components of about 1, so ‖z‖² ≈ 1000 · 1024, and neighbours a `gap` away."""
    base = 30 * rows(1, seed=1, dim=1024)
    memory = base + gap / 32 * rows(40, seed=2, dim=1024)
    expected = oracles.mean_distance(base[0], memory)
    assert oracles.relative_error(mean_distance(base, memory)[0], expected) < 1e-3
    expanded = (base.square().sum() + memory.square().sum(dim=1) - 2 * memory @ base[0]).clamp_min(0).sqrt().mean()
    assert oracles.relative_error(expanded, expected) > 0.5  # why it is not used


@pytest.mark.parametrize("size", [1, 2, 8, 33])
@pytest.mark.parametrize(("held", "dim"), [(1024, 1024), (1, 1024), (77, 1000), (40_000, 3), (3, 40_000)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_distance_does_not_depend_on_the_other_candidates(size, held, dim, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        candidates, memory = rows(size, seed=1, dim=dim), rows(held, seed=2, dim=dim)
        together = mean_distance(candidates, memory)
        for place in range(size):
            assert torch.equal(mean_distance(candidates[place : place + 1], memory)[0], together[place])
        assert oracles.relative_error(together[0], oracles.mean_distance(candidates[0], memory)) < 1e-5
    finally:
        torch.set_num_threads(before)


def test_distances_take_little_memory_and_no_loop_over_candidates():
    class Seen(TorchDispatchMode):
        largest = operations = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.operations += 1
            self.largest = max(self.largest, result.untyped_storage().nbytes())
            return result

    memory = rows(1024, seed=2, dim=256)
    counts = []
    for size in (8, 16):
        with Seen() as seen:
            mean_distance(rows(size, seed=1, dim=256), memory)
        assert seen.largest <= max(2**20, memory.untyped_storage().nbytes())
        counts.append(seen.operations)
    assert counts[0] < 8 * 10
    assert counts[1] < 2.2 * counts[0]


def test_elsewhere_than_on_the_cpu_differences_are_taken_too():
    """The same call of cdist as on a GPU, run here."""
    candidates, memory = rows(8, seed=1, dim=1024), rows(100, seed=2, dim=1024)
    found = torch.cdist(candidates, memory, compute_mode="donot_use_mm_for_euclid_dist").mean(dim=1)
    torch.testing.assert_close(found, mean_distance(candidates, memory), rtol=1e-6, atol=0)
    assert torch.cdist(memory[:1], memory[:1], compute_mode="donot_use_mm_for_euclid_dist") == 0


def test_a_candidate_that_is_not_finite_spoils_its_own_distance_only():
    candidates, memory = rows(3, seed=1), rows(8, seed=2)
    clean = mean_distance(candidates, memory)
    candidates[1, 2] = float("nan")
    found = mean_distance(candidates, memory)
    assert torch.isnan(found[1])
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
