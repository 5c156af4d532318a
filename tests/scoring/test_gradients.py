"""Norms and inner products of last-layer gradients from hidden states, against autograd on explicit float64 logits."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from largest_tensor import LargestTensor

from udsstream.scoring import gradients, lm_head
from udsstream.scoring.gradients import gradient_norms, gradient_products
from udsstream.scoring.lm_head import LMHead, LowRankUpdate


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


V, D, LENGTHS = 507, 33, (20, 2, 123, 41)

HEADS = {
    "linear": {},
    "a bias": {"bias": normal(V, seed=3)},
    "a scale": {"scale": 0.0625},
    "a soft cap": {"softcap": 3.0},
    "a scale and a soft cap": {"scale": 0.5, "softcap": 5.0},
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


def exact(head: LMHead, hidden, labels) -> np.ndarray:
    """(B, V·D) float64."""
    weight = head.weight.double()
    for update in head.updates:
        weight = weight + update.scale * update.up.double() @ update.down.double()
    found = oracles.head_gradients(hidden, labels, weight, head.bias, scale=head.scale, softcap=head.softcap)
    return np.stack([g.ravel() for g in found])


@pytest.fixture(params=[None, 2**14], ids=["slices of their usual size", "many slices"], autouse=True)
def slices(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(lm_head, "_SLICE_BYTES", 4 * request.param)
        monkeypatch.setattr(gradients, "_SLICE_BYTES", request.param)


@pytest.mark.parametrize("name", HEADS)
def test_norms_are_those_of_the_gradients(name):
    head = LMHead(weight=normal(V, D, seed=1), **HEADS[name])
    hidden, labels = candidates()
    expected = np.linalg.norm(exact(head, hidden, labels), axis=1)
    np.testing.assert_allclose(gradient_norms(hidden, labels, head), expected, rtol=2e-6)


@pytest.mark.parametrize("name", HEADS)
def test_products_are_those_of_the_gradients(name):
    head = LMHead(weight=normal(V, D, seed=1), **HEADS[name])
    hidden, labels = candidates()
    own = exact(head, hidden[:3], labels[:3])
    theirs = exact(head, hidden[2:], labels[2:]).mean(axis=0)
    found = gradient_products(hidden[:3], labels[:3], head, reference=(hidden[2:], labels[2:]))
    assert found.with_reference is not None
    lengths = np.linalg.norm(own, axis=1)
    by = np.outer(lengths, lengths)
    np.testing.assert_allclose(found.between.numpy() / by, own @ own.T / by, atol=1e-5)
    by = lengths * np.linalg.norm(theirs)
    np.testing.assert_allclose(found.with_reference.numpy() / by, own @ theirs / by, atol=1e-5)
    assert gradient_products(hidden, labels, head).with_reference is None


def test_a_candidate_without_a_label_has_no_norm():
    hidden, labels = candidates()
    labels[3][:] = -100
    norms = gradient_norms(hidden, labels, LMHead(weight=normal(V, D, seed=1)))
    assert norms.isnan().tolist() == [False, False, False, True]


def test_a_candidate_alone_has_the_norm_that_it_has_among_others():
    head = LMHead(weight=normal(V, D, seed=1))
    hidden, labels = candidates()
    together = gradient_norms(hidden, labels, head)
    alone = torch.cat([gradient_norms([h], [y], head) for h, y in zip(hidden, labels, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)


def test_neither_logits_nor_whole_gradients_are_built(monkeypatch):
    """The logits of all positions would take 25 MB, the gradients of three candidates 6 MB; the weight itself takes 2 MB."""
    monkeypatch.setattr(lm_head, "_SLICE_BYTES", 2**20)
    monkeypatch.setattr(gradients, "_SLICE_BYTES", 2**20)
    weight = normal(32_768, 16, seed=1)
    hidden = [normal(64, 16, seed=n) for n in range(3)]
    labels = [torch.full((64,), n) for n in range(3)]
    with LargestTensor() as largest:
        gradient_products(hidden, labels, LMHead(weight=weight))
    assert largest.bytes <= 2**21


def test_half_precision_states_are_taken_in_float32():
    head = LMHead(weight=normal(V, D, seed=1).bfloat16())
    hidden, labels = candidates()
    hidden = [h.bfloat16() for h in hidden]
    np.testing.assert_allclose(
        gradient_norms(hidden, labels, head), np.linalg.norm(exact(head, hidden, labels), axis=1), rtol=2e-6
    )
