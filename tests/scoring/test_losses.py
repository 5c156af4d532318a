"""Losses from hidden states, by slices of the vocabulary, against the definition on float64 logits."""

from __future__ import annotations

import oracles
import pytest
import torch
from largest_tensor import LargestTensor

from udsstream.scoring import lm_head
from udsstream.scoring.lm_head import LMHead, LowRankUpdate
from udsstream.scoring.losses import mean_losses, mean_losses_from_logits


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


V, D, LENGTHS = 507, 33, (20, 2, 123)

HEADS = {
    "linear": {},
    "a bias": {"bias": normal(V, seed=3)},
    "a scale": {"scale": 0.0625},
    "a soft cap": {"softcap": 3.0},
    "an adapter": {"updates": (LowRankUpdate(up=normal(V, 4, seed=4), down=normal(4, D, seed=5), scale=0.5),)},
    "large logits": {"scale": 40.0},
}


def candidates() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Prompts without labels, and one candidate whose last token alone has one."""
    hidden = [normal(n, D, seed=n) for n in LENGTHS]
    labels = [torch.randint(0, V, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    labels[0][:7] = -100
    labels[1][0] = -100
    return hidden, labels


@pytest.mark.parametrize("name", HEADS)
def test_losses_are_those_of_the_logits(name, monkeypatch):
    monkeypatch.setattr(lm_head, "_SLICE_BYTES", 2**16)  # several slices, the last one narrower
    head = LMHead(weight=normal(V, D, seed=1), **HEADS[name])
    hidden, labels = candidates()
    logits = [oracle_logits(states, head) for states in hidden]
    found = mean_losses(hidden, labels, head)
    for value, matrix, label in zip(found, logits, labels, strict=True):
        assert float(value) == pytest.approx(oracles.mean_loss(matrix, label), rel=1e-5)
    torch.testing.assert_close(
        mean_losses_from_logits([matrix.float() for matrix in logits], labels), found, rtol=1e-4, atol=1e-5
    )


def oracle_logits(hidden: torch.Tensor, head: LMHead) -> torch.Tensor:
    weight = head.weight.double()
    for update in head.updates:
        weight = weight + update.scale * update.up.double() @ update.down.double()
    logits = hidden.double() @ weight.T
    logits = logits if head.bias is None else logits + head.bias.double()
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def test_a_candidate_without_labels_has_no_loss():
    hidden, labels = candidates()
    labels[1][:] = -100
    found = mean_losses(hidden, labels, LMHead(weight=normal(V, D)))
    assert found.isnan().tolist() == [False, True, False]


def test_the_first_label_is_nobodys_target():
    hidden, labels = candidates()
    head = LMHead(weight=normal(V, D))
    before = mean_losses(hidden, labels, head)
    labels[2][0] = (labels[2][0] + 1) % V
    assert torch.equal(mean_losses(hidden, labels, head), before)


def test_the_logits_are_never_there_at_once():
    v, n = 60_000, 300
    labels = [torch.randint(0, v, (n,))]
    with LargestTensor() as seen:
        mean_losses([normal(n, 16)], labels, LMHead(weight=normal(v, 16)))
    assert seen.bytes < 4 * n * v / 3
