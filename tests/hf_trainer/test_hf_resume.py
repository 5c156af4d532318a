"""A run of SelectingTrainer that was killed and resumed is the run that was never interrupted, bit for bit; and what cannot be resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import launch
import pytest
import safetensors.torch
import torch
from hf_runs import HFRun, Rows, llama, same

from udsstream import SelectionLog
from udsstream.errors import LogExistsError, ResumeError
from udsstream.hf_trainer.checkpoint import newest_whole_checkpoint
from udsstream.mosaicml.weights import starting_weights

STATE, ROWS = "udsstream_selection.json", "udsstream_selection.safetensors"


def saved(folder: Path, every: int = 1, **settings: Any) -> tuple[HFRun, dict[str, torch.Tensor]]:
    """A run that leaves checkpoints, and its weights."""
    arguments = {"save_strategy": "steps", "save_steps": every} | settings.pop("arguments", {})
    run = HFRun(folder=str(folder), arguments=arguments, **settings)
    return run, run.run()


def as_if_killed(run: HFRun, folder: Path, at: int) -> HFRun:
    """What was there when the checkpoint at `at` was the newest, but for the log, which had gone on."""
    shutil.copytree(run.folder, folder)
    for path in folder.glob("checkpoint-*"):
        if int(path.name.removeprefix("checkpoint-")) > at:
            shutil.rmtree(path)
    return dataclasses.replace(run, folder=str(folder))


def assert_same_record(run: HFRun, reference: HFRun) -> None:
    ours, theirs = SelectionLog.open(run.log_dir), SelectionLog.open(reference.log_dir)
    assert ours.table().drop_columns(["attempt"]).equals(theirs.table().drop_columns(["attempt"]))
    memories = ours.buffer_at(), theirs.buffer_at()
    assert (memories[0].pushed, memories[0].digest) == (memories[1].pushed, memories[1].digest)
    ours.verify()


KINDS: dict[str, tuple[dict[str, Any], list[int]]] = {
    # within an epoch of 6 updates, at its end, after it
    "full training": ({}, [1, 6, 8]),
    # within an epoch of 3 updates of 4, 4 and 3 batches: before the incomplete one, after it
    "accumulating": (
        {
            "arguments": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 7},
            "selection": {"interrupt": 3},
        },
        [2, 4, 5, 6],
    ),
    "LoRA, 2 workers, evaluated": (
        {
            "lora": True,
            "arguments": {"dataloader_num_workers": 2, "eval_strategy": "steps", "eval_steps": 4, "max_steps": 9},
        },
        [4, 7],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_at_each_kind_of_place(tmp_path, kind):
    settings, places = KINDS[kind]
    more = {"eval_dataset": Rows(9, seed=4)} if "evaluated" in kind else {}
    arguments = {"save_strategy": "steps", "save_steps": 1} | settings.get("arguments", {})
    reference = HFRun(folder=str(tmp_path / "whole"), **(settings | {"arguments": arguments}))
    weights = reference.run(**more)
    for at in places:
        run = as_if_killed(reference, tmp_path / f"from-{at}", at)
        assert same(run.run(resume=True, **more), weights), at
        assert_same_record(run, reference)


def test_a_run_that_had_ended_is_not_trained_further(tmp_path):
    """Killed after its last checkpoint, say. A plain Trainer makes one more update."""
    reference, weights = saved(tmp_path / "whole", every=3, arguments={"max_steps": 3})
    assert same(reference.run(resume=True), weights)
    assert len(SelectionLog.open(reference.log_dir).steps()) == 3


@pytest.mark.slow
def test_killed_anywhere_and_resumed_it_is_the_same_run(tmp_path):
    """SIGKILL at random moments, in the middle of a checkpoint too."""
    processes = launch.forkserver()

    def finish(run: HFRun) -> float:
        began = time.monotonic()
        assert launch.finish([_started(processes, run)], seconds=200) == [0]
        return time.monotonic() - began

    arguments = {"save_strategy": "steps", "save_steps": 2, "max_steps": 25}
    reference = HFRun(folder=str(tmp_path / "whole"), arguments=arguments, selection={"autoresume": True})
    seconds = finish(reference)
    weights = torch.load(tmp_path / "whole" / "weights.pt", weights_only=True)
    moments, killed, trials = random.Random(2), 0, 0
    while killed < 5 and trials < 12:
        trials += 1
        run = dataclasses.replace(reference, folder=str(tmp_path / f"killed-{trials}"))
        for _ in range(2):
            process = _started(processes, run)
            process.join(moments.uniform(0.1, 0.9) * seconds)
            if process.exitcode is not None:
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
        finish(run)
        assert same(torch.load(Path(run.folder) / "weights.pt", weights_only=True), weights)
        assert_same_record(run, reference)
    assert killed >= 5


def _started(processes: Any, run: HFRun) -> Any:
    Path(run.folder).mkdir(exist_ok=True)
    process = processes.Process(target=run.run_and_save)
    process.start()
    return process


def test_a_checkpoint_that_was_not_saved_to_its_end_is_passed_over(tmp_path, caplog):
    reference, weights = saved(tmp_path / "whole", every=2, arguments={"max_steps": 6})
    run = as_if_killed(reference, tmp_path / "killed", 4)
    state = Path(run.folder) / "checkpoint-4" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:100])
    assert newest_whole_checkpoint(Path(run.folder)) == Path(run.folder) / "checkpoint-2"
    assert "checkpoint-4 was not saved to its end" in caplog.text
    assert same(run.run(resume=True), weights)
    assert_same_record(run, reference)


# What cannot be resumed -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> HFRun:
    """Four updates of 13, with a checkpoint of the last: within the first epoch."""
    run, _ = saved(tmp_path_factory.mktemp("interrupted") / "run", every=4, arguments={"max_steps": 4})
    run.arguments["max_steps"] = 13
    return run


@pytest.fixture
def broken(interrupted, tmp_path) -> HFRun:
    return as_if_killed(interrupted, tmp_path / "run", 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"selection": {"keep": 0.5}}, r"other selection settings.*\n  keep: was 0\.25, is 0\.5\n"),
        ({"log": False}, "saved by a run with a log, but log_dir is None"),
        ({"selection": {"sample_ids": "content-hash"}}, "named its samples by position, this one does by content-hash"),
        ({"more": {"gradient_accumulation_steps": 2}}, "took 1 batches of 8 for each update, this one takes 2 of 8"),
        (
            {"more": {"group_by_length": True}},
            r"group_by_length=True draws .* \(4 of the epoch's 6 updates were made\)",
        ),
        ({"more": {"ignore_data_skip": True}}, "ignore_data_skip=True begins the epoch anew"),
        (
            {"more": {"accelerator_config": {"use_seedable_sampler": False}}},
            "use_seedable_sampler=False draws an epoch's order anew",
        ),
        ({"train_dataset": Rows(44)}, "the data set is not the one that this run was recorded with"),
    ],
)
def test_with_other_settings(broken, changes, said):
    overrides = {name: value for name, value in changes.items() if name == "train_dataset"}
    run = dataclasses.replace(
        broken,
        arguments=broken.arguments | changes.get("more", {}),
        selection=changes.get("selection", {}),
        log=changes.get("log", True),
    )
    before = (broken.log_dir / "run.json").read_bytes()
    with pytest.raises(ResumeError, match=f"(?s){said}"):
        run.run(resume=True, **overrides)
    assert (broken.log_dir / "run.json").read_bytes() == before


def test_adapters_do_not_go_on_with_another_base_model(tmp_path):
    """peft's checkpoints hold none of it."""
    run = HFRun(
        folder=str(tmp_path),
        lora=True,
        arguments={"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "lr_scheduler_type": "constant"},
    )
    run.run()
    other = llama(lora=True)
    with torch.no_grad():
        next(p for p in other.parameters() if not p.requires_grad)[0] += 1e-3
    run.arguments["max_steps"] = 4
    with pytest.raises(ResumeError, match=r"(?s)was saved with another base model.*\n  frozen weights: was"):
        run.run(resume=True, model=other)
    state = json.loads((tmp_path / "checkpoint-2" / STATE).read_text())
    recorded = SelectionLog.open(run.log_dir).run["weights"]
    assert recorded == starting_weights(llama(lora=True))
    assert state["frozen_sha256"] == recorded["frozen_sha256"]
    run.run(resume=True)


@pytest.mark.parametrize("part", ["frozen", "trained"])
def test_a_run_that_begins_its_log_anew_begins_with_the_same_weights(tmp_path, part):
    run = HFRun(folder=str(tmp_path), lora=True, arguments={"max_steps": 2}, selection={"autoresume": True})
    run.run()
    before = (run.log_dir / "run.json").read_bytes()
    other = llama(lora=True)
    with torch.no_grad():
        next(p for p in other.parameters() if p.requires_grad == (part == "trained"))[0] += 1e-3
    with pytest.raises(ResumeError, match=rf"(?s)holds a run that began with other weights:\n  {part} weights"):
        run.run(model=other)
    assert (run.log_dir / "run.json").read_bytes() == before
    run.run()


def test_a_checkpoint_of_a_trainer_without_selection(tmp_path):
    plain = HFRun(
        folder=str(tmp_path), selection=None, arguments={"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    )
    plain.run()
    with pytest.raises(ResumeError, match=f"holds no {STATE}: it was saved without selection"):
        dataclasses.replace(plain, selection={}, arguments={"max_steps": 4}).run(resume=True)


def test_the_log_of_another_run(broken, tmp_path):
    shutil.rmtree(broken.log_dir)
    with pytest.raises(ResumeError, match="there is no log in"):
        broken.run(resume=True)
    HFRun(folder=str(tmp_path / "other"), arguments={"max_steps": 5}).run()
    shutil.copytree(tmp_path / "other" / "log", broken.log_dir)
    with pytest.raises(LogExistsError, match="but the checkpoint belongs to run"):
        broken.run(resume=True)


def _edited(**changes: Any):
    def edit(folder: Path) -> None:
        state = json.loads((folder / STATE).read_text())
        (folder / STATE).write_text(json.dumps(state | changes))

    return edit


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / STATE).write_bytes(b'{"version": 1, "con'), "cannot be read"),
        (lambda folder: (folder / STATE).write_bytes(b"[" * 100_000), "cannot be read"),
        (lambda folder: (folder / STATE).write_bytes(b"[]"), "cannot be read"),
        (lambda folder: (folder / STATE).write_bytes(b"x" * (65 << 20)), "cannot be read"),
        (lambda folder: (folder / ROWS).write_bytes(b"\xff" * 64), "cannot be read"),
        (lambda folder: (folder / ROWS).unlink(), f"holds no {ROWS}"),
        (
            lambda folder: safetensors.torch.save_file({"memory": torch.zeros(3, 2)}, folder / ROWS),
            r"the memory is torch.float32 \(3, 2\), expected torch.float32 \(8, 64\)",
        ),
        (_edited(version=2), "has version 2, this udsstream reads version 1"),
        (_edited(step=-1), "step is -1"),
        (_edited(pushed="many"), "pushed is 'many'"),
        (_edited(memory_digest="0g"), "is not what SelectingTrainer writes"),
        (_edited(frozen_sha256="00"), "frozen_sha256 is '00'"),
        (_edited(frozen_sha256=7), "is not what SelectingTrainer writes"),
        (_edited(log={"run_id": "a", "heads": ["00"]}), "one head of 32 bytes"),
        (_edited(log=[]), "is not what SelectingTrainer writes"),
        (_edited(streams=[[1, 2]]), "names and digests"),
        (_edited(tokens=7), "tokens is no object"),
        (_edited(tokens={"kept": "many"}), "tokens is no object of such values"),
        (_edited(tokens={"lost": 1}), "unexpected keyword argument 'lost'"),
        (_edited(correlation={"count": None}), "correlation is no object of such values"),
        (_edited(inputs={"reference": 1}), "inputs is no object of such values"),
        (_edited(surprise=1), "unexpected keyword argument 'surprise'"),
        (_edited(step=5), "the Trainer begins at update 4, but the selection at 5"),
    ],
)
def test_a_state_that_was_damaged(broken, damage, said):
    folder = Path(broken.folder) / "checkpoint-4"
    damage(folder)
    with pytest.raises(ResumeError, match=said):
        broken.run(resume=str(folder))
