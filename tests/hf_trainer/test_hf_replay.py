"""ReplayTrainer trains to the weights of the run, bit for bit, from its log; and says which weights it begins with are others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_runs import HFRun, llama, same, weights_of

from udsstream import ReplayTrainer

KINDS: dict[str, dict[str, Any]] = {"full training": {}, "LoRA": {"lora": True}}


@pytest.fixture(scope="module", params=list(KINDS))
def done(request, tmp_path_factory) -> tuple[HFRun, dict[str, torch.Tensor]]:
    """Eight updates with dropout, over the end of an epoch, with a checkpoint of the fourth; and its weights."""
    folder = str(tmp_path_factory.mktemp("run"))
    arguments = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    run = HFRun(folder=folder, arguments=arguments, **KINDS[request.param])
    return run, run.run()


def replay_of(run: HFRun, folder: Path, **settings: Any) -> Any:
    again = dataclasses.replace(
        run, folder=str(folder), selection=None, arguments=run.arguments | {"save_strategy": "no"}
    )
    return again.trainer(ReplayTrainer, log_dir=run.log_dir, **settings)


@pytest.mark.parametrize("begins", [0, 4])
@pytest.mark.parametrize("verify", [False, True])
def test_the_same_weights(done, tmp_path, begins, verify):
    run, weights = done
    replay = replay_of(run, tmp_path, verify=verify)
    replay.train(f"{run.folder}/checkpoint-{begins}" if begins else None)
    assert same(weights_of(replay), weights)
    assert replay.differences == []
    if verify:
        assert (replay.tally.steps, replay.tally.holds) == (8 - begins, True)
        assert replay.tally.equal_scores == replay.tally.scores > 0


def test_it_says_that_it_begins_with_other_weights(done, tmp_path):
    run, weights = done
    for part in ("frozen", "trained") if run.lora else ("trained",):
        other = llama(lora=run.lora)
        parameter = next(p for p in other.parameters() if p.requires_grad == (part == "trained") and p.ndim == 2)
        with torch.no_grad():
            parameter.add_(1e-2)
        replay = replay_of(run, tmp_path, model=other)
        replay.train()
        (line,) = replay.differences
        assert line.startswith(f"{part} weights")
        assert not same(weights_of(replay), weights)
