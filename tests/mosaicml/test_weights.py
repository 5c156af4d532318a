"""A log and a checkpoint tell which weights a run was made with; another base model is refused, or said."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
import tiny
import torch
from tiny import TinyRun, llama, write_stream
from torch import nn

from udsstream import ReplaySelection, SelectionLog
from udsstream.errors import ResumeError
from udsstream.mosaicml.checkpoint import checkpoints_in, read_checkpoint, selection_state
from udsstream.mosaicml.weights import frozen_sha256, starting_weights, weights_differences


def changed(part: str) -> nn.Module:
    """The tiny model with LoRA, with one number changed in what is frozen, or in what is trained."""
    model = llama(lora=True)
    parameter = next(p for p in model.parameters() if p.requires_grad == (part == "trained") and p.ndim == 2)
    with torch.no_grad():
        parameter[0, 0] += 2e-3
    return model


def test_the_digest_by_hand():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1, bias=False)).requires_grad_(False)
    model[1].weight.requires_grad_(True)
    digest = hashlib.sha256()
    for parameter, shape in ((model[0].weight, "(2, 3)"), (model[0].bias, "(2,)")):
        digest.update(f" torch.float32 {shape}\0".encode() + parameter.numpy().astype("<f4").tobytes())
    assert frozen_sha256(model) == digest.hexdigest()
    trained = hashlib.sha256(b" torch.float32 (1, 2)\0" + model[1].weight.detach().numpy().astype("<f4").tobytes())
    assert starting_weights(model)["trained_sha256"] == trained.hexdigest()


def test_each_digest_is_of_its_part():
    whole = starting_weights(llama(lora=True))
    assert starting_weights(llama(lora=True)) == whole
    assert starting_weights(nn.Sequential(llama(lora=True))) == whole  # in a wrapper
    for part, other in (("frozen", "trained"), ("trained", "frozen")):
        found = starting_weights(changed(part))
        assert found[f"{part}_sha256"] != whole[f"{part}_sha256"]
        assert found[f"{other}_sha256"] == whole[f"{other}_sha256"]
    assert starting_weights(llama(lora=True).to(torch.bfloat16))["frozen_sha256"] != whole["frozen_sha256"]
    assert starting_weights(llama())["frozen_sha256"] is None  # nothing is


def test_what_is_no_plain_tensor_has_no_digest():
    """Sharded parameters are in tests/mosaicml/test_sharding.py."""
    with torch.device("meta"):
        assert starting_weights(nn.Linear(2, 2)) == {"frozen_sha256": None, "trained_sha256": None}


def test_unknown_digests_are_not_compared():
    model = llama(lora=True)
    for recorded in (None, {}, {"frozen_sha256": None}, {"trained_sha256": "0" * 64}, "no object", [1]):
        assert weights_differences(recorded, model, at_start=False) == []
    (line,) = weights_differences({"trained_sha256": "0" * 64}, model, at_start=True)
    assert line.startswith("trained weights before the first step: was '0000")
    assert weights_differences(starting_weights(llama()), model, at_start=False) == []


# Runs ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> TinyRun:
    """LoRA, six steps, checkpoints after each second one."""
    root = tmp_path_factory.mktemp("lora")
    stream = str(write_stream(root / "stream"))
    run = TinyRun(streams=(stream,), folder=str(root / "run"), duration="6ba", save_interval="2ba", lora=True)
    run.run()
    return run


def log_of(run: TinyRun) -> Path:
    return Path(run.folder) / "log"


def with_model(monkeypatch, part: str) -> None:
    monkeypatch.setattr(tiny, "llama", lambda **_: changed(part))


def test_a_log_and_its_checkpoints_tell_what_the_run_began_with(run):
    expected = starting_weights(llama(lora=True))
    assert SelectionLog.open(log_of(run)).run["weights"] == expected
    for path in checkpoints_in(Path(run.folder) / "checkpoints").values():
        state = selection_state(read_checkpoint(path))
        assert state is not None
        assert state["frozen_sha256"] == expected["frozen_sha256"]


def test_a_run_that_trains_the_whole_model(run, tmp_path):
    TinyRun(streams=run.streams, folder=str(tmp_path), duration="1ba").run()
    assert SelectionLog.open(tmp_path / "log").run["weights"] == starting_weights(llama())


def test_adapters_do_not_go_on_with_another_base_model(run, tmp_path, monkeypatch):
    """A checkpoint of adapters holds none of the base model, which Composer would load without a word."""
    short = dataclasses.replace(run, folder=str(tmp_path), duration="2ba", autoresume=True)
    short.run()
    before = (log_of(short) / "run.json").read_bytes()
    with monkeypatch.context() as patch:
        with_model(patch, "frozen")
        with pytest.raises(
            ResumeError, match=r"(?s)the checkpoint was saved with another base model.*frozen weights: was"
        ):
            dataclasses.replace(short, duration="4ba").run()
        assert (log_of(short) / "run.json").read_bytes() == before
    with monkeypatch.context() as patch:
        with_model(patch, "trained")  # the checkpoint's take their place
        dataclasses.replace(short, duration="4ba").run()
    dataclasses.replace(short, duration="6ba").run()
    ours, theirs = (SelectionLog.open(log_of(one)).table().drop_columns(["attempt"]) for one in (short, run))
    assert ours.equals(theirs)


@pytest.mark.parametrize("part", ["frozen", "trained"])
def test_a_run_that_begins_its_log_anew_begins_with_the_same_weights(run, part, tmp_path, monkeypatch):
    killed = dataclasses.replace(run, folder=str(tmp_path), duration="2ba", save_interval=None, autoresume=True)
    killed.run()
    with_model(monkeypatch, part)
    with pytest.raises(ResumeError, match=rf"(?s)holds a run that began with other weights:\n  {part} weights"):
        killed.run()


def test_a_replay_says_that_it_begins_with_others(run, tmp_path, monkeypatch):
    def differences(checkpoint: str | None = None) -> list[str]:
        replay = ReplaySelection(log_of(run), checkpoint=checkpoint)
        again = dataclasses.replace(run, folder=str(tmp_path / "replay"), save_interval=None)
        again.run(replay=replay, load_path=checkpoint)
        return [line for line in replay.differences if "weights" in line]

    assert differences() == []
    path = str(checkpoints_in(Path(run.folder) / "checkpoints")[2])
    for part, there in (("frozen", True), ("trained", False)):
        with monkeypatch.context() as patch:
            with_model(patch, part)
            (line,) = differences()
            assert line.startswith(f"{part} weights")
            # From a checkpoint what is trained comes from there.
            assert len(differences(path)) == there
