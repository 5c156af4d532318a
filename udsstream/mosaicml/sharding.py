"""Parameters that are sharded over the ranks by torch's `fully_shard` (FSDP2): what scoring must know of them.

    V vocabulary, R ranks of a shard group

A sharded parameter is a DTensor between forwards, each rank holding about V/R of the head's rows, and a plain tensor, gathered, within one.
Scoring reads the rows that it has (`scoring/lm_head.py` adds up over the ranks), so the head is gathered by FSDP's own forward alone.

What is not here: FSDP1, whose flat shards are cut across rows, and parameters that are cut in other dimensions (tensor parallelism):
both are refused.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard

from udsstream.errors import ModelError
from udsstream.scoring.lm_head import VocabularyShard

__all__ = ["check_sharding", "in_rows", "is_sharded", "own_rows", "release", "version_parts", "whole"]


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to any of the model's modules."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def check_sharding(model: nn.Module) -> None:
    """Raises ModelError when the model is sharded by FSDP1."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ModelError(
            "the model is sharded by FSDP1, whose shards are cut across the rows of the head's weight, so that it cannot be scored without "
            "gathering it; shard it by FSDP2: parallelism_config={'fsdp': FSDP2Config(…)} of composer.utils.parallelism, or set the "
            "environment variable FSDP_VERSION=2 for a configuration as it is"
        )


def release(model: nn.Module) -> None:
    """Lets go of parameters that a forward gathered and FSDP kept, as it does for the outermost module until the next backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own_rows(weight: Tensor) -> tuple[Tensor, VocabularyShard | None]:
    """A weight (V, …) → the rows that this rank holds, and which these are; the weight itself and None when it is not sharded.

    Raises:
        ModelError: it is not cut into rows.
    """
    if not isinstance(weight, DTensor):
        return weight, None
    mesh, placements = weight.device_mesh, weight.placements
    cut = [dim for dim, placement in enumerate(placements) if type(placement) is Shard and placement.dim == 0]
    if (
        len(cut) != 1
        or any(type(placement) not in (Shard, Replicate) for placement in placements)
        or (sum(isinstance(placement, Shard) for placement in placements) != 1)
    ):
        raise ModelError(
            f"the head's weight is laid out over the ranks as {placements}, but scoring needs it cut into rows once (Shard(0), as "
            "fully_shard does, with or without replicas); tensor parallelism is not supported"
        )
    group, rows = mesh.get_group(cut[0]), weight.to_local()
    # Shard cuts as torch.chunk does: pieces of ⌈V/R⌉ rows, the last ones shorter or empty.
    vocab_size, ranks = weight.shape[0], mesh.size(cut[0])
    step = -(-vocab_size // ranks)
    starts = tuple(min(vocab_size, step * rank) for rank in range(ranks + 1))
    shard = VocabularyShard(starts=starts, group=group)
    if rows.shape[0] != starts[shard.rank + 1] - starts[shard.rank]:
        raise ModelError(
            f"rank {shard.rank} of {ranks} holds {rows.shape[0]} rows of the head's weight of {vocab_size}, but torch.chunk gives it "
            f"{starts[shard.rank + 1] - starts[shard.rank]}: this layout is unknown"
        )
    return rows, shard


def in_rows(weight: Tensor, like: Tensor) -> Tensor:
    """A weight laid out over the ranks as `like` is, whatever it is laid out as. A collective when both are sharded."""
    if isinstance(like, DTensor) and isinstance(weight, DTensor):
        return weight.redistribute(like.device_mesh, like.placements)
    return weight


def whole(weight: Tensor) -> Tensor:
    """The parameter gathered, for small ones. A collective when it is sharded."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def version_parts(parameter: Tensor) -> tuple[int, int]:
    """Where a parameter's values lie, and how often they were written."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local.data_ptr(), local._version
