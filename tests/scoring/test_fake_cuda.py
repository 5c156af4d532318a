"""The CUDA path without a GPU: under FakeTensorMode mixed devices raise, and so does any hidden wait for the device."""

from __future__ import annotations

import pytest
import torch
from simulated_cuda import IndexWithoutDriver
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from udsstream.scoring.embedding_buffer import EmbeddingBuffer
from udsstream.scoring.lm_head import HeadFactors, LMHead
from udsstream.scoring.projection import BilinearProjection
from udsstream.scoring.scorer import CandidateScorer

V, D, LENGTHS = 507, 64, (33, 1, 100)


@pytest.fixture
def scorer():
    return CandidateScorer(
        BilinearProjection.draw(vocab_size=V, max_seq_len=128, dims=(16, 4), scale="isometric", seed=1)
    )


@pytest.fixture
def cuda():
    with FakeTensorMode(allow_non_fake_inputs=False), IndexWithoutDriver():
        yield torch.device("cuda")


def hidden_states(cuda):
    return [torch.randn(n, D, device=cuda, dtype=torch.bfloat16) for n in LENGTHS]


def finish(scores, cuda):
    """Distance and shapes; everything stays where it is."""
    buffer = EmbeddingBuffer(rows=torch.empty(32, 64, device=cuda), pushed=40)
    inter = buffer.mean_distance(scores.embeddings)
    assert {scores.intra.device.type, scores.embeddings.device.type, inter.device.type} == {"cuda"}
    assert scores.intra.shape == inter.shape == (3,)
    assert scores.embeddings.shape == (3, 64)
    assert buffer.oldest_first().device.type == "cuda"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", [None, "polar", "gram", "svd"])
def test_a_step_in_hidden_space_neither_mixes_devices_nor_waits(scorer, cuda, bias, form):
    width = D + bias
    scorer._form = form
    head = LMHead(
        weight=torch.randn(V, D, device=cuda, dtype=torch.bfloat16), bias=torch.randn(V, device=cuda) if bias else None
    )
    scorer._factors = HeadFactors(
        blocks=((0, torch.randn(width, 40, device=cuda)), (40, torch.randn(width - 40, width - 40, device=cuda))),
        projected=torch.randn(16, width, device=cuda),
        sample=torch.randn(64, D, device=cuda, dtype=torch.bfloat16),
    )
    scorer._version = "frozen"
    finish(scorer.score_hidden(hidden_states(cuda), head, version="frozen"), cuda)


def test_factoring_a_head_does_not_wait(scorer, cuda):
    """One that trains is factored at every step."""
    finish(scorer.score_hidden(hidden_states(cuda), LMHead(weight=torch.randn(V, D, device=cuda)), version=1), cuda)


def test_factoring_a_narrow_head_does_not_wait(cuda):
    scorer = CandidateScorer(
        BilinearProjection.draw(vocab_size=50, max_seq_len=128, dims=(16, 4), scale="isometric", seed=1)
    )
    finish(scorer.score_hidden(hidden_states(cuda), LMHead(weight=torch.randn(50, D, device=cuda))), cuda)


def test_the_other_forms_neither_mix_devices_nor_wait(scorer, cuda):
    head = LMHead(weight=torch.randn(V, D, device=cuda), softcap=30.0)
    finish(scorer.score_hidden(hidden_states(cuda), head), cuda)
    scorer._slices = True  # what the cost rule may choose for a head that trains
    finish(scorer.score_hidden(hidden_states(cuda), LMHead(weight=torch.randn(V, D, device=cuda))), cuda)
    finish(scorer.score_logits([torch.randn(n, V, device=cuda, dtype=torch.bfloat16) for n in LENGTHS]), cuda)


def test_the_check_can_fail(cuda):
    with pytest.raises(RuntimeError, match="device"):
        torch.randn(3, 3, device=cuda) @ torch.randn(3, 3)
    with pytest.raises(DataDependentOutputException):
        torch.randn(3, device=cuda).sum().item()
