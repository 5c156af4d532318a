"""The loss of each candidate from its hidden states, without its logits: N×V is never built.

    N tokens, D hidden width, V vocabulary, n positions whose next token has a label

`loss = mean over the labelled tokens of logsumexp(l) − l[target]`, nats per token, where `l` are the logits at the position before. The
sum over the vocabulary is taken slice by slice with a running maximum. Costs what the head's own forward would cost, n·V·D: more than
everything else about choosing together, but no memory.

What is not here: which tokens have a label (the collator's `labels`, −100 for none).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from udsstream.scoring.lm_head import LMHead
from udsstream.scoring.nuclear_norm import exact_float32

__all__ = ["IGNORED_LABEL", "labelled_positions", "log_sums", "mean_losses", "mean_losses_from_logits"]

IGNORED_LABEL = -100
"""The label that no loss is computed for (`torch.nn.CrossEntropyLoss`)."""


@torch.no_grad()
def mean_losses(hidden: Sequence[Tensor], labels: Sequence[Tensor], head: LMHead) -> Tensor:
    """hidden (N_i, D) on any device, labels (N_i,) int64 on the host → (B,) float32 on the device of the hidden states.

    As causal models do, position t is asked for the label of position t + 1. A candidate without a label there is NaN. With a sharded head
    every rank of its group must call it as often.
    """
    with exact_float32():
        rows, targets, counts = labelled_positions(hidden, labels)
        return _mean(log_sums(head.sliced_logits(rows), targets), counts)


@torch.no_grad()
def mean_losses_from_logits(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """The same from the model's own logits, one (N_i, V) each."""
    rows, targets, counts = labelled_positions(logits, labels)
    return _mean(log_sums([(0, rows.float())], targets), counts)


def labelled_positions(matrices: Sequence[Tensor], labels: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[int]]:
    """The rows (n, any) of all candidates whose next token has a label, these labels (n,), and how many are whose."""
    rows, targets = [], []
    for matrix, label in zip(matrices, labels, strict=True):
        place = (label[1:] != IGNORED_LABEL).nonzero().flatten()  # on the host: nobody waits for it
        rows.append(matrix.index_select(0, place.to(matrix.device)))
        targets.append(label[1:][place])
    return torch.cat(rows), torch.cat(targets).to(matrices[0].device), [len(target) for target in targets]


def log_sums(slices: Iterable[tuple[int, Tensor]], targets: Tensor) -> tuple[Tensor, Tensor]:
    """(first vocabulary row, logits (n, slice)) pairs and targets (n,) → (n,) float32 each: logsumexp, the target's logit."""
    most = torch.full(targets.shape, float("-inf"), device=targets.device)
    total, own = torch.zeros_like(most), torch.zeros_like(most)
    for start, part in slices:
        above = torch.maximum(most, part.amax(dim=1)) if part.shape[1] else most
        total = total * (most - above).exp() + (part - above[:, None]).exp().sum(dim=1)
        most = above
        here = (targets >= start) & (targets < start + part.shape[1])
        found = part.gather(1, (targets - start).clamp(0, part.shape[1] - 1)[:, None])[:, 0]
        own = torch.where(here, found, own)
    return most + total.log(), own


def _mean(sums_and_own: tuple[Tensor, Tensor], counts: list[int]) -> Tensor:
    log_sum, own = sums_and_own
    return torch.stack([part.mean() for part in (log_sum - own).split(counts)])
