"""Many ranks, one choice: the order that all ranks agree on, what they tell each other, and where the kept rows go.

    R ranks, B_r candidates on rank r, B = Σ B_r candidates of the global batch, K kept, d components of an embedding

*Canonical order.* StreamingDataset deals the samples of a global batch to the nodes in turn, and each node's to its ranks in turn. So the
global batch of one rank is put together again by taking the ranks' first rows, then their second rows, and so on: row j of rank q on
node p comes at place (j·Q + q)·P + p for P nodes of Q ranks. Ties, the memory and the log follow this order, which does not depend on
the number of ranks.

*Per step* each rank takes part in two collectives (`gather_candidates`, `gather_embeddings`), and sends or receives only those kept rows
that must change their rank for all to train on the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed
from composer.devices import Device
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
    "from_rank_zero",
    "gather_candidates",
    "gather_embeddings",
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
    """What every rank knows of all B candidates, in canonical order."""

    order: CanonicalOrder
    sample_ids: list[int]
    lengths: list[int]
    intra: Tensor
    """(B,) float32 on the host."""
    inter: Tensor
    """(B,) float32 on the host."""


def gather_candidates(
    sample_ids: Sequence[int],
    lengths: Sequence[int],
    intra: Tensor,
    inter: Tensor,
    *,
    capacity: int,
    device: torch.device,
) -> GatheredCandidates:
    """One collective of (capacity + 1) · 24 bytes a rank: every rank must call it.

    Args:
        sample_ids, lengths: of this rank's candidates, B_r each.
        intra, inter: (B_r,) float32.
        capacity: the most candidates that any rank has, the same number on all.
        device: that the process group communicates on.
    """
    count = len(sample_ids)
    message = torch.zeros(capacity + 1, 3, dtype=torch.int64)
    message[0, 0] = count
    if count <= capacity:
        message[1 : count + 1, 0] = torch.tensor(sample_ids, dtype=torch.int64)
        message[1 : count + 1, 1] = torch.tensor(lengths, dtype=torch.int64)
        values = torch.stack([intra.float().cpu(), inter.float().cpu()], dim=1).contiguous()
        message[1 : count + 1, 2] = values.view(torch.int64).flatten()
    gathered = torch.stack([part.cpu() for part in dist.all_gather(message.to(device))])
    counts: list[int] = gathered[:, 0, 0].tolist()
    if max(counts) > capacity:
        raise DataError(
            f"the ranks' batches have {counts} candidates, but the first ones had {capacity} at most; let the data loader yield batches "
            "of one size, but for an incomplete last one"
        )
    order = canonical_order(counts, dist.get_local_world_size())
    rows = gathered[torch.from_numpy(order.rank), torch.from_numpy(order.row) + 1]
    scores = rows[:, 2].contiguous().view(torch.float32).reshape(-1, 2)
    return GatheredCandidates(
        order=order,
        sample_ids=rows[:, 0].tolist(),
        lengths=rows[:, 1].tolist(),
        intra=scores[:, 0].contiguous(),
        inter=scores[:, 1].contiguous(),
    )


def gather_embeddings(
    embeddings: Tensor, order: CanonicalOrder, kept: Sequence[int], *, device: torch.device
) -> Tensor:
    """This rank's embeddings (B_r, d) → those of all kept candidates (K, d) float32 on the host, in canonical order.

    One collective of (most kept candidates of one rank) · 4d bytes a rank: every rank must call it.
    """
    places = np.asarray(kept, dtype=np.int64)
    owners, rows = order.rank[places], order.row[places]
    mine = embeddings[torch.from_numpy(rows[owners == dist.get_global_rank()]).to(embeddings.device)].float()
    counts = np.bincount(owners, minlength=dist.get_world_size())
    message = torch.zeros(int(counts.max()), embeddings.shape[1], device=device)
    message[: len(mine)] = mine.to(device)
    gathered = torch.stack([part.cpu() for part in dist.all_gather(message)])
    # The j-th kept candidate of a rank, in the order of its batch, lies in row j of its message.
    place_in_message = np.empty(len(places), dtype=np.int64)
    for rank in range(len(counts)):
        of_rank = np.flatnonzero(owners == rank)
        place_in_message[of_rank[np.argsort(rows[of_rank], kind="stable")]] = np.arange(len(of_rank))
    return gathered[torch.from_numpy(owners), torch.from_numpy(place_in_message)]


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


def exchange(
    rows: Mapping[int, Mapping[str, Any]], planned: Sequence[Move], *, device: torch.device
) -> dict[int, dict[str, Any]]:
    """Sends this rank's rows that move away, and returns those that come: canonical place → row. Every rank must call it.

    Args:
        rows: canonical place → row, at least of those that this rank sends.
        planned: the moves, the same on all ranks; done one after the other, so that no two ranks wait for each other.
    """
    here = dist.get_global_rank()
    received: dict[int, dict[str, Any]] = {}
    for move in planned:
        if move.source == here:
            torch.distributed.send_object_list([rows[move.place]], dst=move.target, device=device)
        elif move.target == here:
            box: list[Any] = [None]
            torch.distributed.recv_object_list(box, src=move.source, device=device)
            received[move.place] = box[0]
    return received


def kept_batch(
    batch: Mapping[str, Any], order: CanonicalOrder, kept: Sequence[int], *, device: Device
) -> dict[str, Any]:
    """What this rank trains on: its share of the kept candidates, in canonical order, trimmed to the longest. Every rank must call it.

    With one rank nothing is sent, and the rows are cut from the batch as they lie.
    """
    ranks, here = dist.get_world_size(), dist.get_global_rank()
    if ranks == 1:
        return trim_padding(take_rows(batch, order.row[list(kept)].tolist()))
    planned = moves(order, kept, ranks)
    own = [place for place in kept if order.rank[place] == here]
    rows = dict(zip(own, split_rows(batch, order.row[own].tolist()), strict=True))
    on = torch.device("cpu") if device.dist_backend == "gloo" else torch_device(device)
    received = exchange(rows, planned, device=on)
    share = shares(order, kept, ranks)[here]
    return join_rows([(received.get(place) or rows[place]) for place in share], batch)


def torch_device(device: Device) -> torch.device:
    """The torch device of a Composer device."""
    return device.tensor_to_device(torch.empty(0)).device


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
