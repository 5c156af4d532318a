"""The methods: what is known of the candidates in, one score for each out. The largest scores are kept (`select.py`).

    B candidates in canonical order

A method that weighs candidates against each other (`greats`, `divbs`) returns the place of each in the order in which it would take them,
B for the first, so that the largest k are the first k for every k.

Each can be computed again from the log's float32 columns, in float64 with NumPy, in any language.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from udsstream.scoring.candidates import Candidates
from udsstream.scoring.seeding import raw_bits

__all__ = [
    "METHODS",
    "by_gradient",
    "by_length",
    "by_loss",
    "divbs",
    "everything",
    "greats",
    "random",
    "rho_loss",
    "selective_backprop",
    "uds",
    "uds_inter",
    "uds_intra",
]


def uds(candidates: Candidates) -> Tensor:
    """`score = intra + α · inter` (arXiv 2510.16882): (B,) float32.

    Summed in float64 and rounded once, so that the score can be recomputed from the logged float32 `intra` and `inter` to the
    last bit, in any language.
    """
    return (candidates["intra"].double() + candidates.alpha * candidates["inter"].double()).float()


def uds_intra(candidates: Candidates) -> Tensor:
    """The utility alone, the first ablation of arXiv 2510.16882 (table 3): (B,) float32."""
    return candidates["intra"]


def uds_inter(candidates: Candidates) -> Tensor:
    """The distance to the memory alone, the second ablation: (B,) float32. While the memory is empty all are equal."""
    return candidates["inter"]


def by_loss(candidates: Candidates) -> Tensor:
    """`max_loss`: the mean loss per labelled token, nats, (B,) float32: what the model knows least comes first."""
    return candidates["loss"]


def by_gradient(candidates: Candidates) -> Tensor:
    """`max_grad`: the norm of the gradient with respect to the last layer's weight, (B,) float32.

    Katharopoulos and Fleuret (arXiv 1803.00942, section 3.2) bound a sample's whole gradient norm by that of the loss with respect to the
    last layer's pre-activations, which needs no backward; with the head's weight instead it is a part of the gradient itself.
    """
    return candidates["grad_norm"]


def selective_backprop(candidates: Candidates) -> Tensor:
    """Selective-Backprop (Jiang et al., arXiv 1910.00762): a draw in which a sample's chance grows with the percentile of its loss.

    A weighted draw of k without replacement, with weights `percentile ** β`, percentiles within the candidate batch, and β = 1/share − 1 as
    in Composer's algorithm of that name: β is what makes the mean of `percentile ** β` the share that is kept. The draw is the k largest
    of `log weight + Gumbel noise` (the successive draw: Yellott 1977), and the noise follows from (seed, epoch, batch).
    """
    loss = candidates["loss"].numpy()
    percentile = np.empty(len(loss))
    percentile[np.argsort(loss, kind="stable")] = np.arange(1, len(loss) + 1) / len(loss)
    beta = 1 / candidates.share - 1
    noise = -np.log(-np.log(_uniform(candidates, "method/selective_backprop")))
    return torch.from_numpy((beta * np.log(percentile) + noise).astype(np.float32))


def rho_loss(candidates: Candidates) -> Tensor:
    """RHO-Loss (Mindermann et al., arXiv 2206.07137): the loss less the loss of a reference model, nats per token, (B,) float32.

    What can be learnt and is not yet: what is noise has a high loss with the reference model too. In float64, rounded once.
    """
    return (candidates["loss"].double() - candidates["reference_loss"].double()).float()


def greats(candidates: Candidates) -> Tensor:
    """GREATS (Wang et al., NeurIPS 2024): greedily, what lowers the loss of validation samples most beside what was taken already.

    By the Taylor expansion of the validation loss over one step of gradient descent, with the identity in the place of its Hessian: the
    gain of candidate i is `⟨g_i, g_val⟩ − Σ over the taken j of η⟨g_i, g_j⟩` (times η, which changes no choice). `alignment` is the first
    term, `interaction` (B, B) holds η⟨g_i, g_j⟩. Gradients are the last layer's.
    """
    gain = candidates["alignment"].double().numpy().copy()
    interaction = candidates["interaction"].double().numpy()
    order: list[int] = []
    for _ in range(len(gain)):
        best = int(np.argmax(gain))  # of equal ones the first
        order.append(best)
        gain -= interaction[:, best]
        gain[order] = -np.inf
    return _by_place(order)


def divbs(candidates: Candidates) -> Tensor:
    """DivBS (Hong et al., ICML 2024, arXiv 2406.04872): greedily, what adds most to the part of the batch's gradient that the taken span.

    Each next one is that whose gradient, orthogonalised against those of the taken and of length one, has the largest inner product, up
    to sign, with the sum of all candidates' gradients; so a second sample like the first adds nothing. `interaction` (B, B) holds
    ⟨g_i, g_j⟩ of last-layer gradients; the orthogonalisation is a pivoted Cholesky factorisation of it. (The authors' published code draws
    by the inner products before normalising; this takes the largest.)
    """
    rest = candidates["interaction"].double().numpy().copy()
    whole = rest.diagonal().copy()
    order: list[int] = []
    for _ in range(len(rest)):
        own = rest.diagonal()
        spanned = own <= 1e-6 * whole  # of what is left beside the taken, float32 products tell no more
        adds = np.where(spanned, 0.0, np.abs(rest.sum(axis=1)) / np.sqrt(np.where(spanned, 1.0, own)))
        adds[order] = -np.inf
        best = int(np.argmax(adds))
        order.append(best)
        if not spanned[best]:
            rest -= np.outer(rest[:, best], rest[best]) / rest[best, best]
    return _by_place(order)


def by_length(candidates: Candidates) -> Tensor:
    """`longest`: the number of tokens, (B,) float32: what much of a nuclear norm is, for a control without any scoring."""
    return candidates.tokens.float()


def random(candidates: Candidates) -> Tensor:
    """(B,) float32, uniform in [0, 1): the top k of it are a uniform draw of k without replacement.

    Depends on the seed, the epoch and the batch within it alone, so that a resumed run draws what it would have drawn.
    """
    bits = raw_bits(
        len(candidates), seed=candidates.seed, purpose="method/random", epoch=candidates.epoch, batch=candidates.batch
    )
    return torch.from_numpy((bits >> 40).astype("f4") / 2**24)


def everything(candidates: Candidates) -> Tensor:
    """`full`: all alike, since all are kept: (B,) zeros."""
    return torch.zeros(len(candidates))


METHODS: dict[str, Callable[[Candidates], Tensor]] = {
    "uds": uds,
    "uds_intra": uds_intra,
    "uds_inter": uds_inter,
    "max_loss": by_loss,
    "max_grad": by_gradient,
    "selective_backprop": selective_backprop,
    "rho_loss": rho_loss,
    "greats": greats,
    "divbs": divbs,
    "longest": by_length,
    "random": random,
    "full": everything,
}
"""By the names of `SelectionConfig.method`."""


def _uniform(candidates: Candidates, purpose: str) -> np.ndarray:
    """(B,) float64 in (0, 1), of (seed, purpose, epoch, batch)."""
    bits = raw_bits(
        len(candidates), seed=candidates.seed, purpose=purpose, epoch=candidates.epoch, batch=candidates.batch
    )
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) / 2**52


def _by_place(order: list[int]) -> Tensor:
    """(B,) float32: B for the first of the order, 1 for the last."""
    scores = torch.empty(len(order))
    scores[order] = torch.arange(len(order), 0, -1, dtype=torch.float32)
    return scores
