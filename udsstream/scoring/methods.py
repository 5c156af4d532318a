"""The methods: what is known of the candidates in, one score for each out. The largest scores are kept (`select.py`).

B candidates in canonical order
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from udsstream.scoring.seeding import raw_bits

__all__ = ["by_length", "by_loss", "random", "uds", "uds_inter", "uds_intra"]


def uds(intra: Tensor, inter: Tensor, alpha: float) -> Tensor:
    """`score = intra + α · inter` (arXiv 2510.16882): (B,) float32 on the host from (B,) float32 each.

    Summed in float64 and rounded once, so that the score can be recomputed from the logged float32 `intra` and `inter` to the
    last bit, in any language. Waits for the device once.
    """
    return (intra.cpu().double() + alpha * inter.cpu().double()).float()


def uds_intra(intra: Tensor, inter: Tensor) -> Tensor:
    """The utility alone, the first ablation of arXiv 2510.16882 (table 3): (B,) float32 on the host."""
    del inter
    return intra.float().cpu()


def uds_inter(intra: Tensor, inter: Tensor) -> Tensor:
    """The distance to the memory alone, the second ablation: (B,) float32 on the host. While the memory is empty all are equal."""
    del intra
    return inter.float().cpu()


def by_loss(loss: Tensor) -> Tensor:
    """`max_loss`: the mean loss per labelled token, nats, (B,) float32 on the host: what the model knows least comes first."""
    return loss.float().cpu()


def by_length(tokens: Sequence[int]) -> Tensor:
    """`longest`: the number of tokens, (B,) float32: what much of a nuclear norm is, for a control without any scoring."""
    return torch.tensor(tokens, dtype=torch.float32)


def random(count: int, *, seed: int, epoch: int, batch: int) -> Tensor:
    """(count,) float32 on the host, uniform in [0, 1): the top k of it are a uniform draw of k without replacement.

    Depends on the seed, the epoch and the batch within it alone, so that a resumed run draws what it would have drawn.
    """
    bits = raw_bits(count, seed=seed, purpose="method/random", epoch=epoch, batch=batch)
    return torch.from_numpy((bits >> 40).astype("f4") / 2**24)
