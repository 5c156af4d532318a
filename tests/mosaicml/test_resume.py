"""A run that is killed at any moment and resumed is the run that was never interrupted: bit for bit."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from composer.core import Callback
from tiny import TinyRun, write_stream

from udsstream import SelectionLog
from udsstream.errors import LogCorruptError, LogExistsError, ResumeError


@pytest.fixture(scope="module")
def streams(tmp_path_factory) -> tuple[str, ...]:
    """Two streams, 83 samples together: 11 batches of 8 an epoch, the last one of 3."""
    root = tmp_path_factory.mktemp("streams")
    return (
        str(write_stream(root / "one", samples=50, seed=1)),
        str(write_stream(root / "two", samples=33, seed=2)),
    )


@pytest.fixture(scope="module")
def processes():
    """Processes that start in a moment, because a server that has imported everything forks them."""
    context = multiprocessing.get_context("forkserver")
    # Not "tiny": until Python 3.13 the server does not know the tests' folder, and skips what it cannot import.
    context.set_forkserver_preload(["udsstream.mosaicml.algorithm", "peft", "transformers.models.llama.modeling_llama"])
    process = context.Process(target=int)  # the server's imports should not count as a run's seconds
    process.start()
    process.join()
    return context


def decisions(folder: str | Path) -> pa.Table:
    """What was decided, without the number of attempts that it took."""
    return SelectionLog.open(Path(folder) / "log").table().drop_columns(["attempt"])


def assert_same_run(folder: str, reference: str) -> None:
    assert decisions(folder).equals(decisions(reference))
    ours, theirs = (SelectionLog.open(Path(root) / "log").buffer_at() for root in (folder, reference))
    assert (ours.pushed, ours.digest) == (theirs.pushed, theirs.digest)
    assert (ours.embeddings == theirs.embeddings).all()
    weights, expected = (torch.load(Path(root) / "weights.pt", weights_only=True) for root in (folder, reference))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def finish(processes, run: TinyRun) -> float:
    """Runs to the end in a process of its own; the seconds it took."""
    began = time.monotonic()
    process = processes.Process(target=run.run_and_save)
    process.start()
    process.join(120)
    assert process.exitcode == 0, "the run did not come to its end"
    return time.monotonic() - began


KINDS = {
    "full training": {},
    "LoRA": {"lora": True},
    "2 workers": {"workers": 2},
    "tied embeddings, checkpoints at epoch ends": {"tie": True, "save_interval": "1ep"},
    "length groups, 2 workers": {"length_group_batches": 4, "workers": 2},
}


def kill_and_compare(processes, tmp_path: Path, streams: tuple[str, ...], kind: str, kills: int, seed: int) -> None:
    """Runs, killed up to three times each at random moments, against one that was left alone; until there were enough kills."""
    settings = {"streams": streams, "save_interval": "3ba", "autoresume": True, "duration": "25ba"} | KINDS[kind]
    reference = TinyRun(folder=str(tmp_path / "uninterrupted"), **settings)
    Path(reference.folder).mkdir()
    seconds = finish(processes, reference)
    moments = random.Random(seed)
    killed = trials = 0
    while killed < kills:
        trials += 1
        run = dataclasses.replace(reference, folder=str(tmp_path / f"killed-{trials}"))
        Path(run.folder).mkdir()
        for _ in range(moments.randint(1, 3)):
            process = processes.Process(target=run.run_and_save)
            process.start()
            process.join(moments.uniform(0.1, 1.0) * seconds)
            if process.exitcode is not None:
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
        finish(processes, run)
        assert_same_run(run.folder, reference.folder)
        SelectionLog.open(Path(run.folder) / "log").verify()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kills"), [(kind, 6 if kind in ("full training", "LoRA", "2 workers") else 2) for kind in KINDS]
)
def test_killed_anywhere_and_resumed_it_is_the_same_run(streams, processes, tmp_path, kind, kills):
    kill_and_compare(processes, tmp_path, streams, kind, kills, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_killed_many_times(streams, processes, tmp_path, kind):
    kill_and_compare(processes, tmp_path, streams, kind, kills=60, seed=time.time_ns())


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 8, 11, 12, 22], ids=lambda at: f"ba{at}")
def test_resumed_at_each_kind_of_place(streams, processes, tmp_path, at):
    """In the middle of an epoch, at its end, before and after: the random state must be the interrupted run's in each."""
    settings = {"streams": streams, "save_interval": f"{at}ba", "autoresume": True, "duration": "25ba"}
    reference = TinyRun(folder=str(tmp_path / "uninterrupted"), **settings)
    first = TinyRun(folder=str(tmp_path / "resumed"), **(settings | {"duration": f"{at}ba"}))
    second = dataclasses.replace(first, duration="25ba")
    for run in (reference, first, second):
        Path(run.folder).mkdir(exist_ok=True)
        finish(processes, run)
    assert_same_run(second.folder, reference.folder)


def checkpointed(tmp_path: Path, streams: tuple[str, ...], **selection) -> tuple[TinyRun, str]:
    """A run of 4 batches and its checkpoint."""
    run = TinyRun(streams=streams, folder=str(tmp_path), duration="4ba", save_interval="4ba", selection=selection)
    run.run()
    return run, str(tmp_path / "checkpoints" / "ep0-ba4-rank0.pt")


def resume(run: TinyRun, checkpoint: str, **changes) -> None:
    changed = dataclasses.replace(run, duration="6ba", save_interval=None, **changes)
    trainer = changed.trainer(load_path=checkpoint)
    try:
        trainer.fit()
    finally:
        trainer.close()


def test_other_settings_are_refused_by_name(streams, tmp_path):
    run, checkpoint = checkpointed(tmp_path, streams)
    with pytest.raises(ResumeError, match=r"keep: was 0\.25, is 0\.5\n.*seed: was 17, is 3"):
        resume(run, checkpoint, selection={"keep": 0.5, "seed": 3})


def test_another_data_set_is_refused_by_stream(streams, tmp_path):
    run, checkpoint = checkpointed(tmp_path, streams)
    other = str(write_stream(tmp_path / "other", samples=33, seed=3))
    with pytest.raises(ResumeError, match=r"stream 1: was two .*, is other"):
        resume(run, checkpoint, streams=(streams[0], other))


def test_a_moved_data_set_is_the_same_data_set(streams, tmp_path):
    run, checkpoint = checkpointed(tmp_path, streams)
    moved = str(write_stream(tmp_path / "moved", samples=33, seed=2))
    resume(run, checkpoint, streams=(streams[0], moved))
    assert len(SelectionLog.open(tmp_path / "log").steps()) == 6


def test_a_checkpoint_without_selection_is_refused(streams, tmp_path):
    plain = TinyRun(streams=streams, folder=str(tmp_path), duration="4ba", save_interval="4ba", selection=None)
    plain.run()
    selecting = dataclasses.replace(plain, selection={}, save_interval=None, duration="6ba")
    with pytest.raises(ResumeError, match=r"at batch 4, but holds no state of OnlineBatchSelection"):
        selecting.trainer(load_path=str(tmp_path / "checkpoints" / "ep0-ba4-rank0.pt"))


def test_weights_alone_begin_a_new_run(streams, tmp_path):
    _, checkpoint = checkpointed(tmp_path / "old", streams)
    run = TinyRun(streams=streams, folder=str(tmp_path / "new"), duration="2ba")
    trainer = run.trainer(load_path=checkpoint, load_weights_only=True)
    trainer.fit()
    trainer.close()
    assert SelectionLog.open(tmp_path / "new" / "log").steps().tolist() == [0, 1]


def test_a_log_of_another_run_is_refused(streams, tmp_path):
    _, checkpoint = checkpointed(tmp_path / "a", streams)
    other, _ = checkpointed(tmp_path / "b", streams)
    with pytest.raises(LogExistsError, match=r"holds the log of run \w+, but the checkpoint belongs to run"):
        resume(other, checkpoint)


def test_a_missing_log_is_refused(streams, tmp_path):
    run, checkpoint = checkpointed(tmp_path / "a", streams)
    with pytest.raises(ResumeError, match=r"there is no log in .*elsewhere"):
        resume(run, checkpoint, folder=str(tmp_path / "elsewhere"))
    with pytest.raises(ResumeError, match=r"saved by a run with a log, but log_dir is None"):
        resume(run, checkpoint, log=False)


def test_a_second_run_in_the_same_folder_is_refused(streams, tmp_path):
    run, _ = checkpointed(tmp_path, streams)
    trainer = dataclasses.replace(run, save_interval=None).trainer()
    with pytest.raises(LogExistsError, match=r"already"):
        trainer.fit()


class Backup(Callback):
    """Copies the log as it is after the first batch."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def batch_checkpoint(self, state, logger) -> None:
        del logger
        if state.timestamp.batch.value == 1:
            shutil.copytree(self.log, self.log.with_name("backup"))


def test_a_log_that_is_behind_its_checkpoint_is_refused(streams, tmp_path):
    """As after restoring an old backup of the log, or of its disk's losing what was written last."""
    run = TinyRun(streams=streams, folder=str(tmp_path), duration="4ba", save_interval="4ba")
    trainer = run.trainer(callbacks=[Backup(tmp_path / "log")])
    trainer.fit()
    trainer.close()
    shutil.rmtree(tmp_path / "log")
    (tmp_path / "backup").rename(tmp_path / "log")
    with pytest.raises(LogCorruptError, match=r"checkpoint"):
        resume(run, str(tmp_path / "checkpoints" / "ep0-ba4-rank0.pt"))


def test_a_log_that_lost_a_segment_is_refused(streams, tmp_path):
    run, checkpoint = checkpointed(tmp_path, streams)
    (segment,) = (tmp_path / "log" / "selection").rglob("*.arrow")
    segment.unlink()
    with pytest.raises(LogCorruptError, match=segment.name):
        resume(run, checkpoint)


def test_a_checkpoint_opens_without_pickle(streams, tmp_path):
    """The algorithm's state is plain types, bytes and tensors, so `weights_only=True` can load it."""
    run = TinyRun(streams=streams, folder=str(tmp_path), duration="3ba")
    trainer = run.trainer()
    trainer.fit()
    torch.save(trainer.state.algorithms[0].state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["memory"]["pushed"] == 6
    assert state["step"] == 3
    assert len(state["log"]["merkle_root"]) == 32
    trainer.close()
