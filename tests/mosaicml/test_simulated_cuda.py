"""A whole selecting step with its tensors on a CUDA device (simulated: there is no GPU here): no mixed devices, one wait a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from composer.devices import DeviceCPU
from composer.models import HuggingFaceModel
from simulated_cuda import SimulatedCuda
from tiny import collate, gemma2, llama
from torch import Tensor

from udsstream import SelectionConfig
from udsstream.mosaicml import ranks
from udsstream.mosaicml.selector import CandidateSelector

CONFIG = SelectionConfig(keep=2, max_seq_len=32, projection_dims=(16, 4), buffer_size=5)


class SimulatedDevice(DeviceCPU):
    """Composer's own moves a tensor without waiting, as this does."""

    def tensor_to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to("cuda:0", non_blocking=True)


def made_up(fake: Tensor) -> Tensor:
    """What the host gets of the device: scores at random; of the first step's check, one token and no difference."""
    if fake.is_floating_point() and fake.ndim == 2:
        return torch.rand(fake.shape)
    return (
        torch.zeros(fake.shape, dtype=fake.dtype)
        if fake.is_floating_point()
        else torch.ones(fake.shape, dtype=fake.dtype)
    )


MODELS = {
    "LoRA": lambda: llama(lora=True),
    "a head that trains": llama,
    "a tied head": lambda: llama(tie=True),
    "a soft-capped head": gemma2,
}


@pytest.fixture
def cuda(monkeypatch) -> SimulatedCuda:
    # The state of the device's generator lies on the host; asking for it needs a driver all the same.
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    return SimulatedCuda(answer=made_up)


def candidates() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return collate([{"input_ids": rng.integers(3, 97, size=rng.integers(3, 25)), "sample_id": i} for i in range(8)])


def selector_on(cuda: SimulatedCuda, model: HuggingFaceModel, **settings: Any) -> CandidateSelector:
    # The library's fused attention asks the driver which kernel to take.
    model.model.config._attn_implementation = "eager"
    cuda.move(model)
    config = dataclasses.replace(CONFIG, **settings)
    return CandidateSelector(config, model, device=SimulatedDevice())


def step(selector: CandidateSelector, number: int) -> list[int]:
    decision = selector.decide(candidates(), selects=True, epoch=0, batch_in_epoch=number)
    selector.remember(decision, decision.kept)
    return decision.kept


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", MODELS)
def test_a_step_waits_once_for_what_is_chosen_by(cuda, name):
    with cuda.running():
        selector = selector_on(cuda, MODELS[name]())
        step(selector, 0)  # compares the head's formula with the model's logits
        for number in range(1, 8):  # the memory of 5 becomes full on the way
            cuda.waits.clear()
            assert len(step(selector, number)) == 2
            assert [wait.split(" < ")[0] for wait in cuda.waits] == ["ranks.py:fetch"], cuda.waits
    assert selector.form is not None
    assert selector.form.form == ("vocabulary_slices" if name == "a soft-capped head" else "hidden_space")
    assert selector.buffer.rows.device.type == "cuda"
    assert selector.buffer.pushed == 16


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_with_two_ranks_too(cuda, monkeypatch):
    """The other rank's message is a copy of ours, so all that is real comes from our own batch."""
    sent = []

    def all_gather(message: Tensor) -> list[Tensor]:
        assert message.device.type == "cuda"
        sent.append(message.shape)
        return [message, message]

    def gathered(fake: Tensor) -> Tensor:
        if fake.ndim < 3:
            return made_up(fake)
        message = torch.zeros(fake.shape[1:], dtype=torch.int32)
        message[0, 0] = 8
        message[1:, 3:] = torch.rand(8, fake.shape[2] - 3).view(torch.int32)
        return torch.stack([message, message])

    cuda.answer = gathered
    monkeypatch.setattr(ranks, "greatest_over_ranks", list)
    for name, value in (("get_world_size", lambda: 2), ("get_local_world_size", lambda: 2), ("all_gather", all_gather)):
        monkeypatch.setattr(ranks.dist, name, value)
    monkeypatch.setattr("udsstream.mosaicml.measuring.from_rank_zero", lambda value: value)
    monkeypatch.setattr("udsstream.mosaicml.selector.greatest_over_ranks", list)
    with cuda.running():
        selector = selector_on(cuda, llama(lora=True))
        step(selector, 0)
        cuda.waits.clear()
        decision = selector.decide(candidates(), selects=True, epoch=0, batch_in_epoch=1)
    assert [wait.split(" < ")[0] for wait in cuda.waits] == ["ranks.py:fetch"]
    assert len(decision.sample_ids) == 16
    assert sent == 2 * [(9, 3 + 2 + 64)]  # one collective a step


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("method", ["max_loss", "max_grad", "selective_backprop"])
def test_losses_and_gradients_too_wait_once(cuda, method):
    cuda.answer = lambda fake: torch.rand(fake.shape) if fake.shape == (8, 1) else made_up(fake)
    with cuda.running():
        selector = selector_on(cuda, llama(lora=True), method=method)
        step(selector, 0)
        cuda.waits.clear()
        step(selector, 1)
    assert [wait.split(" < ")[0] for wait in cuda.waits] == ["ranks.py:fetch"]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_to_compare_candidates_waits_once_for_their_products(cuda):
    def answer(fake):
        rows = torch.rand(8, 5)
        return rows @ rows.T if fake.shape == (8, 8) else torch.rand(fake.shape) if fake.ndim == 1 else made_up(fake)

    cuda.answer = answer
    with cuda.running():
        selector = selector_on(cuda, llama(lora=True), method="divbs")
        step(selector, 0)
        cuda.waits.clear()
        step(selector, 1)
    # The order that is made of them goes to the device, to be told to the other ranks, and comes back.
    assert [wait.split(" < ")[0] for wait in cuda.waits] == ["ranks.py:fetch", "ranks.py:fetch"]


def test_random_waits_for_nothing(cuda):
    with cuda.running():
        model = llama()
        cuda.move(model)
        config = SelectionConfig(method="random", keep=2, max_seq_len=32, projection_dims=(16, 4))
        selector = CandidateSelector(config, model, device=SimulatedDevice())
        decision = selector.decide(candidates(), selects=True, epoch=0, batch_in_epoch=0)
    assert len(decision.kept) == 2
    assert cuda.waits == []


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_the_check_can_fail(cuda, monkeypatch):
    with cuda.running():
        selector = selector_on(cuda, llama(lora=True))
        step(selector, 0)
        cuda.waits.clear()
        distance = selector.buffer.mean_distance
        monkeypatch.setattr(selector.buffer, "mean_distance", lambda rows: distance(rows) * rows.sum().item())
        step(selector, 1)
        assert len(cuda.waits) == 2
        monkeypatch.setattr(selector.buffer, "mean_distance", lambda rows: distance(rows) + torch.ones(8))
        with pytest.raises(RuntimeError, match="device"):
            step(selector, 2)
