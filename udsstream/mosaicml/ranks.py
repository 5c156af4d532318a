"""Many ranks, one choice: the order that all ranks agree on, what they tell each other, and where the kept rows go.

    R ranks, B_r candidates on rank r, B = Σ B_r candidates of the global batch, K kept, d components of an embedding

*Canonical order.* StreamingDataset deals the samples of a global batch to the nodes in turn, and each node's to its ranks in turn. So the
global batch of one rank is put together again by taking the ranks' first rows, then their second rows, and so on: row j of rank q on
node p comes at place (j·Q + q)·P + p for P nodes of Q ranks. Ties, the memory and the log follow this order, which does not depend on
the number of ranks.

*Per step* each rank takes part in one collective on the training device (`gather_candidates`), waits for that device once (`fetch`), and
sends or receives, from host to host, only those kept rows that must change their rank for all to train on the same number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed
from composer.utils import dist
from torch import Tensor

from udsstream.errors import DataError, RankError, UdsstreamError
from udsstream.mosaicml.batch import join_rows, split_rows, take_rows, trim_padding

T = TypeVar("T")

__all__ = [
    "CanonicalOrder",
    "GatheredCandidates",
    "Move",
    "canonical_order",
    "check_same_memory",
    "exchange",
    "fetch",
    "from_rank_zero",
    "gather_candidates",
    "greatest_over_ranks",
    "host_group",
    "kept_batch",
    "moves",
    "on_rank_zero",
    "shares",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class CanonicalOrder:
    """Whose each of the B candidates of a global batch is: two int64 arrays in canonical order."""

    rank: np.ndarray
    row: np.ndarray
    """Place in that rank's batch."""

    def __len__(self) -> int:
        """B."""
        return len(self.rank)

    def of(self, rank: int) -> np.ndarray:
        """Canonical places of one rank's candidates, in the order of its batch."""
        places = np.flatnonzero(self.rank == rank)
        return places[np.argsort(self.row[places], kind="stable")]


def canonical_order(counts: Sequence[int], ranks_per_node: int) -> CanonicalOrder:
    """The canonical order of a global batch of which rank r holds `counts[r]` rows."""
    rank = np.repeat(np.arange(len(counts)), counts)
    row = np.concatenate([np.arange(count) for count in counts])
    order = np.lexsort((rank // ranks_per_node, rank % ranks_per_node, row))
    return CanonicalOrder(rank=rank[order], row=row[order])


@dataclass(frozen=True, kw_only=True, eq=False)
class GatheredCandidates:
    """What every rank knows of all B candidates, in canonical order. Tensors are float32 on the host."""

    order: CanonicalOrder
    sample_ids: list[int]
    lengths: list[int]
    measured: dict[str, Tensor]
    """(B,) each, by the names that they were given under."""
    embeddings: Tensor | None
    """(B, d)."""


def fetch(tensor: Tensor) -> Tensor:
    """The tensor on the host. The one place where a step waits for its device."""
    return tensor.cpu()


def gather_candidates(
    sample_ids: Sequence[int],
    lengths: Sequence[int],
    measured: Mapping[str, Tensor],
    embeddings: Tensor | None,
    *,
    capacity: int,
    device: torch.device,
) -> GatheredCandidates:
    """One collective of (capacity + 1) · (12 + 4m + 4d) bytes a rank for m measures, and one wait for the device: every rank must call it.

    With one rank nothing is sent.

    Args:
        sample_ids, lengths: of this rank's candidates, B_r each.
        measured: what the method measured of each, (B_r,) float32 by name; the same names on all ranks.
        embeddings: (B_r, d) float32; None where the method has none.
        capacity: the most candidates that any rank has, the same number on all.
        device: of the scores, and that the process group communicates on.

    Raises:
        DataError: a rank has more candidates than `capacity`.
    """
    count, ranks = len(sample_ids), dist.get_world_size()
    columns = [values[:, None].float() for values in measured.values()]
    columns += [] if embeddings is None else [embeddings.float()]
    numbers = torch.cat(columns, dim=1) if columns else torch.empty(count, 0, device=device)
    if ranks == 1:
        order, host = canonical_order([count], 1), fetch(numbers) if columns else numbers
        ids, tokens = list(sample_ids), list(lengths)
    else:
        # Numbers travel as their bits, so that ids of 64 of them fit beside: id (2), tokens, and whatever was scored.
        facts = torch.zeros(capacity + 1, 3, dtype=torch.int32)
        facts[0, 0] = count
        if count <= capacity:
            facts[1 : count + 1, :2] = torch.tensor(sample_ids, dtype=torch.int64)[:, None].view(torch.int32)
            facts[1 : count + 1, 2] = torch.tensor(lengths, dtype=torch.int32)
        message = torch.zeros(capacity + 1, 3 + numbers.shape[1], dtype=torch.int32, device=device)
        message[:, :3] = facts.to(device)
        if count <= capacity:
            message[1 : count + 1, 3:] = numbers.contiguous().view(torch.int32)
        gathered = fetch(torch.stack(list(dist.all_gather(message))))
        counts: list[int] = gathered[:, 0, 0].tolist()
        if max(counts) > capacity:
            raise DataError(
                f"the ranks' batches have {counts} candidates, but the first ones had {capacity} at most; let the data loader yield "
                "batches of one size, but for an incomplete last one"
            )
        order = canonical_order(counts, dist.get_local_world_size())
        rows = gathered[torch.from_numpy(order.rank), torch.from_numpy(order.row) + 1]
        # Flat before its view as int64: one row alone counts as contiguous, whatever its stride.
        ids, tokens = rows[:, :2].flatten().view(torch.int64).tolist(), rows[:, 2].tolist()
        host = rows[:, 3:].contiguous().view(torch.float32)
    return GatheredCandidates(
        order=order,
        sample_ids=ids,
        lengths=tokens,
        measured={name: host[:, place].contiguous() for place, name in enumerate(measured)},
        embeddings=None if embeddings is None else host[:, len(measured) :].contiguous(),
    )


@dataclass(frozen=True, kw_only=True)
class Move:
    """A kept candidate that is trained on by another rank than the one that loaded it."""

    place: int
    """In canonical order, among the B candidates."""
    source: int
    target: int


def moves(order: CanonicalOrder, kept: Sequence[int], ranks: int) -> list[Move]:
    """The fewest moves after which every rank has K/R kept candidates: the last ones of ranks that have too many fill up the others."""
    share = len(kept) // ranks
    held: list[list[int]] = [[] for _ in range(ranks)]
    for place in kept:
        held[order.rank[place]].append(place)
    surplus = [(place, rank) for rank, places in enumerate(held) for place in places[share:]]
    wanting = [rank for rank, places in enumerate(held) for _ in range(share - len(places))]
    return [
        Move(place=place, source=source, target=target)
        for (place, source), target in zip(surplus, wanting, strict=True)
    ]


def shares(order: CanonicalOrder, kept: Sequence[int], ranks: int) -> list[list[int]]:
    """The kept places that each rank trains on once the moves are done, ascending."""
    trained = {place: int(order.rank[place]) for place in kept} | {
        move.place: move.target for move in moves(order, kept, ranks)
    }
    return [sorted(place for place, rank in trained.items() if rank == here) for here in range(ranks)]


def exchange(rows: Mapping[int, Mapping[str, Any]], planned: Sequence[Move]) -> dict[int, dict[str, Any]]:
    """Sends this rank's rows that move away, and returns those that come: canonical place → row. Every rank must call it.

    Args:
        rows: canonical place → row, at least of those that this rank sends.
        planned: the moves, the same on all ranks; done one after the other, so that no two ranks wait for each other.
    """
    here, group, device = dist.get_global_rank(), host_group(), torch.device("cpu")
    received: dict[int, dict[str, Any]] = {}
    for move in planned:
        if move.source == here:
            torch.distributed.send_object_list([rows[move.place]], dst=move.target, group=group, device=device)
        elif move.target == here:
            box: list[Any] = [None]
            torch.distributed.recv_object_list(box, src=move.source, group=group, device=device)
            received[move.place] = box[0]
    return received


def kept_batch(batch: Mapping[str, Any], order: CanonicalOrder, kept: Sequence[int]) -> dict[str, Any]:
    """What this rank trains on: its share of the kept candidates, in canonical order, trimmed to the longest. Every rank must call it.

    With one rank nothing is sent, and the rows are cut from the batch as they lie.
    """
    ranks, here = dist.get_world_size(), dist.get_global_rank()
    if ranks == 1:
        return trim_padding(take_rows(batch, order.row[list(kept)].tolist()))
    planned = moves(order, kept, ranks)
    own = [place for place in kept if order.rank[place] == here]
    rows = dict(zip(own, split_rows(batch, order.row[own].tolist()), strict=True))
    received = exchange(rows, planned)
    share = shares(order, kept, ranks)[here]
    return join_rows([(received.get(place) or rows[place]) for place in share], batch)


def host_group() -> torch.distributed.ProcessGroup | None:
    """The process group for what lies on the host; None: the default one will do. A collective when first called.

    A batch is on the host when it is chosen from: to send its rows over NCCL would be to copy them to the device and wait for it.
    """
    return _host_group(torch.distributed.group.WORLD)


@functools.cache
def _host_group(default: torch.distributed.ProcessGroup) -> torch.distributed.ProcessGroup | None:
    return None if "gloo" in torch.distributed.get_backend(default) else torch.distributed.new_group(backend="gloo")


def greatest_over_ranks(numbers: Sequence[int]) -> list[int]:
    """The greatest of each of these numbers over all ranks, which touches no device. A collective: every rank must call it."""
    if dist.get_world_size() == 1:
        return list(numbers)
    greatest = torch.tensor(numbers, dtype=torch.int64)
    torch.distributed.all_reduce(greatest, op=torch.distributed.ReduceOp.MAX, group=host_group())
    return greatest.tolist()


def from_rank_zero(value: T) -> T:
    """Rank 0's value on every rank. A collective: every rank must call it."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_rank_zero(work: Callable[[], T]) -> T:
    """Does something on rank 0 alone; every rank gets its value, or its error. A collective: every rank must call it.

    Raises:
        UdsstreamError: what `work` raised on rank 0.
    """
    if dist.get_world_size() == 1:
        return work()
    value, error = None, None
    if dist.get_global_rank() == 0:
        try:
            value = work()
        except UdsstreamError as raised:
            error = raised
    value, error = from_rank_zero((value, error))
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def check_same_memory(digest: bytes, pushed: int) -> None:
    """Raises RankError when the ranks' memories differ. A collective: every rank must call it."""
    found = dist.all_gather_object((pushed, digest))
    odd = [rank for rank, state in enumerate(found) if state != found[0]]
    if odd:
        raise RankError(
            f"the memories of ranks {', '.join(map(str, odd))} differ from rank 0's ({[pushed for pushed, _ in found]} pushes), so that "
            "the ranks would choose by different scores: the model's hidden states, its head or the settings are not the same on all "
            "ranks. No checkpoint is written; resume from the last one"
        )
