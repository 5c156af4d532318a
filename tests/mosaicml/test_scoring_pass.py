"""A pass of selection without training: the plain reference's choices, whatever the ranks, kills and workers; and what it refuses."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
from pathlib import Path
from typing import Any

import launch
import numpy as np
import oracles
import pyarrow as pa
import pytest
import torch
from composer.devices import DeviceCPU
from streaming import MDSWriter, Stream
from tiny import collate, llama, write_stream

from udsstream import SelectionLog, UDSStreamingDataset
from udsstream.audit.run import audit
from udsstream.config import SelectionConfig
from udsstream.errors import ConfigError, DataError, LogExistsError, ResumeError
from udsstream.mosaicml.scoring_pass import PassProgress, ScoringPass, Windows, pass_order
from udsstream.mosaicml.weights import weights_sha256

SETTINGS = {"keep": 0.25, "max_seq_len": 32, "projection_dims": (16, 4), "buffer_size": 13}


@pytest.fixture(scope="module")
def streams(tmp_path_factory) -> tuple[str, ...]:
    """Two streams in several shards, 83 samples together: with windows of 20, the last one has 3."""
    root = tmp_path_factory.mktemp("streams")
    return (
        str(write_stream(root / "one", samples=50, seed=1)),
        str(write_stream(root / "two", samples=33, seed=2)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A pass over these streams; picklable, so that another process can be told to do it."""

    streams: tuple[str, ...]
    folder: str
    window: int = 20
    seed: int = 0
    """Of the model's weights."""
    selection: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    stop_after: int | None = None
    """Kill this process after so many windows."""

    def make(self) -> ScoringPass:
        torch.set_num_threads(1)
        return ScoringPass(
            config=SelectionConfig(**(SETTINGS | self.selection)),
            model=llama(seed=self.seed),
            dataset=UDSStreamingDataset(streams=[Stream(local=stream) for stream in self.streams], batch_size=1),
            collate_fn=collate,
            log_dir=self.folder,
            window=self.window,
            device=DeviceCPU(),
            **({"anchor_seconds": 0.0} | self.options),
        )

    def __call__(self) -> None:
        from composer.utils import dist

        dist.initialize_dist("cpu")
        windows = 0

        def report(progress: PassProgress) -> None:
            nonlocal windows
            windows += 1
            if windows == self.stop_after:
                os.kill(os.getpid(), signal.SIGKILL)

        self.make().run(report)


def decisions(folder: str | Path) -> pa.Table:
    """What was decided, without which attempt and which rank it was."""
    return SelectionLog.open(folder).table().drop_columns(["attempt", "rank"])


def samples_of(streams: tuple[str, ...]) -> UDSStreamingDataset:
    return UDSStreamingDataset(streams=[Stream(local=stream) for stream in streams], batch_size=1)


def reference(job: Job) -> list[list[int]]:
    """Per window the ids that are kept: from explicit logits, one sample at a time, in float64."""
    scoring = job.make()
    dataset, projection, model = samples_of(job.streams), scoring.selector.projection, llama(seed=job.seed).eval()
    config, alpha = scoring.config, scoring.selector.alpha
    gamma1, gamma2 = oracles.gamma(projection.vocabulary), oracles.gamma(projection.tokens)
    order = pass_order(dataset, job.options.get("order", "shuffled"), seed=job.options.get("shuffle_seed", 9176))
    memory = oracles.Fifo(config.buffer_size)
    chosen = []
    for start in range(0, len(order), job.window):
        ids = order[start : start + job.window].tolist()
        scores, embeddings = [], []
        for sample_id in ids:
            tokens = torch.tensor(dataset[sample_id]["input_ids"])[None]
            with torch.no_grad():
                logits = model({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}).logits[0]
            embedding = oracles.embedding(logits, gamma1, gamma2)
            distance = oracles.mean_distance(embedding, memory.rows)
            scores.append(oracles.nuclear_norm(logits) + alpha * distance)
            embeddings.append(embedding)
        count = max(1, int(len(ids) * 0.25 + 0.5))
        places = oracles.top_k(scores, count)
        memory.push([embeddings[place] for place in places])
        chosen.append([ids[place] for place in places])
    return chosen


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_its_choices_are_those_of_a_plain_reference(streams, tmp_path, order):
    job = Job(
        streams=streams, folder=str(tmp_path / "run"), options={"order": order, "num_workers": order == "shuffled"}
    )
    progress = job.make().run()
    assert (progress.windows, progress.samples, progress.kept) == (5, 83, 21)
    log = SelectionLog.open(job.folder)
    assert [log.selected(step) for step in range(5)] == reference(job)
    rows = log.table()
    assert sorted(rows["sample_id"].to_pylist()) == list(range(83))  # each sample once
    assert rows["epoch_position"].to_pylist() == list(range(83))
    assert rows.filter(rows["step"].to_numpy() == 4).num_rows == 3  # and of the last three, one
    report = audit(job.folder, data=True)
    assert report.findings == ()
    assert any("1 finished epoch of 2 streams" in line for line in report.checked)


def test_every_vector_can_be_recorded(streams, tmp_path):
    job = Job(streams=streams, folder=str(tmp_path), selection={"embeddings": "full", "keep": 3})
    job.make().run()
    assert SelectionLog.open(tmp_path).table(columns=["selected"])["selected"].to_pylist().count(True) == 15
    assert audit(tmp_path).findings == ()


def test_the_random_baseline_needs_no_forward(streams, tmp_path):
    job = Job(streams=streams, folder=str(tmp_path), selection={"method": "random"})
    job.make().run()
    report = audit(tmp_path)
    assert report.findings == ()
    assert any(line.startswith("random: the scores of 5 steps") for line in report.checked)


def test_the_model_is_left_as_it_was(streams, tmp_path):
    scoring = Job(streams=streams, folder=str(tmp_path)).make()
    model = scoring._model
    model.train()
    before = weights_sha256(model)
    scoring.run()
    assert weights_sha256(model) == before == weights_sha256(llama())
    assert weights_sha256(llama(seed=1)) != before
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert SelectionLog.open(tmp_path).run["job"]["weights_sha256"] == before


# Order and ranks ----------------------------------------------------------------------------------------------------------


def test_the_order_holds_each_sample_once_and_follows_from_the_seed(streams):
    dataset = samples_of(streams)
    shuffled = pass_order(dataset, "shuffled", seed=1)
    assert sorted(shuffled.tolist()) == list(range(83))
    assert shuffled.tolist() != list(range(83))
    assert np.array_equal(shuffled, pass_order(dataset, "shuffled", seed=1))
    assert not np.array_equal(shuffled, pass_order(dataset, "shuffled", seed=2))
    assert pass_order(dataset, "sequential", seed=1).tolist() == list(range(83))


@pytest.mark.parametrize(("ranks", "per_node"), [(1, 1), (2, 2), (3, 3), (4, 2), (6, 3)])
def test_windows_put_together_in_canonical_order_are_the_order(ranks, per_node):
    from udsstream.mosaicml.ranks import canonical_order

    order = np.random.default_rng(0).permutation(43)
    dealt = [
        list(Windows(order, 10, first=1, rank=rank, ranks=ranks, ranks_per_node=per_node)) for rank in range(ranks)
    ]
    assert {len(windows) for windows in dealt} == {4}
    for number, window in enumerate(zip(*dealt, strict=True)):
        places = canonical_order([len(rows) for rows in window], per_node)
        ids = [window[rank][row] for rank, row in zip(places.rank, places.row, strict=True)]
        assert ids == order[10 * (number + 1) : 10 * (number + 2)].tolist()


@pytest.fixture(scope="module")
def processes():
    return launch.forkserver()


def run_in(processes, job: Job, *, ranks: int = 1, codes: int = 0) -> None:
    assert launch.finish(launch.start(processes, ranks, job)) == [codes] * ranks


@pytest.fixture(scope="module")
def alone(streams, tmp_path_factory) -> Job:
    """On one rank, never interrupted."""
    job = Job(streams=streams, folder=str(tmp_path_factory.mktemp("alone") / "run"))
    job.make().run()
    return job


@pytest.mark.slow
@pytest.mark.parametrize("window", [20, 82], ids=["the last window has 3", "the last window has 1: a rank has none"])
def test_two_ranks_choose_what_one_does(streams, processes, tmp_path, window):
    one, two = (Job(streams=streams, folder=str(tmp_path / name), window=window) for name in ("one", "two"))
    one.make().run()
    run_in(processes, two, ranks=2)
    exact = ["step", "position", "sample_id", "tokens", "selected", "train_order", "stream", "shard", "shard_index"]
    assert decisions(two.folder).select(exact).equals(decisions(one.folder).select(exact))
    for name in ("intra", "inter", "score"):
        np.testing.assert_allclose(decisions(two.folder)[name], decisions(one.folder)[name], rtol=1e-5)
    assert set(SelectionLog.open(two.folder).table()["rank"].to_pylist()) == {0, 1}
    report = audit(two.folder, data=True)
    assert report.findings == ()


# Killed, and gone on with -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_anywhere_and_gone_on_with_it_is_the_same_pass(streams, processes, alone, tmp_path):
    moments = random.Random(3)
    for trial in range(2):
        job = dataclasses.replace(alone, folder=str(tmp_path / f"{trial}"))
        for _ in range(2):
            (process,) = launch.start(processes, 1, job)
            process.join(moments.uniform(0.2, 2.5))
            process.kill()
            process.join()
        run_in(processes, job)
        assert decisions(job.folder).equals(decisions(alone.folder))
        SelectionLog.open(job.folder).verify()


@pytest.mark.slow
@pytest.mark.parametrize("selection", [{}, {"embeddings": "full"}, {"method": "random"}], ids=str)
def test_it_goes_on_at_the_newest_anchor(streams, processes, tmp_path, selection):
    job = Job(streams=streams, folder=str(tmp_path / "killed"), selection=selection)
    whole = dataclasses.replace(job, folder=str(tmp_path / "whole"))
    whole.make().run()
    run_in(processes, dataclasses.replace(job, stop_after=2), codes=-signal.SIGKILL)
    assert SelectionLog.open(job.folder).steps().tolist() == [0, 1]
    # Without anchors in between: what is logged behind the last one is superseded.
    lost = dataclasses.replace(job, stop_after=2, options={"anchor_seconds": 1e9})
    run_in(processes, lost, codes=-signal.SIGKILL)
    assert SelectionLog.open(job.folder).steps().tolist() == [0, 1, 2, 3]
    done = []
    job.make().run(done.append)
    assert [progress.windows for progress in done] == [3, 4, 5]
    assert (done[-1].samples, done[-1].kept, done[-1].samples_here) == (83, 21, 43)
    assert decisions(job.folder).equals(decisions(whole.folder))
    one, other = (SelectionLog.open(folder) for folder in (job.folder, whole.folder))
    if selection.get("method") != "random":
        assert (one.buffer_at().digest, one.buffer_at().pushed) == (other.buffer_at().digest, 21)
    assert len(set(one.table()["attempt"].to_pylist())) == 2
    assert audit(job.folder).findings == ()


@pytest.mark.slow
def test_it_goes_on_with_another_number_of_ranks(streams, processes, alone, tmp_path):
    job = dataclasses.replace(alone, folder=str(tmp_path / "run"), stop_after=2)
    run_in(processes, job, codes=-signal.SIGKILL)
    run_in(processes, dataclasses.replace(job, stop_after=None), ranks=2)
    exact = ["step", "position", "sample_id", "selected"]
    assert decisions(job.folder).select(exact).equals(decisions(alone.folder).select(exact))
    assert audit(job.folder).findings == ()


def test_a_pass_that_is_done_is_done(streams, tmp_path):
    job = Job(streams=streams, folder=str(tmp_path))
    job.make().run()
    again = job.make().run()
    assert (again.windows, again.samples, again.kept, again.samples_here) == (5, 83, 21, 0)
    assert again.seconds_left is None
    assert SelectionLog.open(tmp_path).table().num_rows == 83
    assert len(list((tmp_path / "_buffers").iterdir())) == 3  # of six anchors


def test_what_is_changed_is_refused_by_name(streams, tmp_path):
    job = Job(streams=streams, folder=str(tmp_path / "run"), options={"settings": {"data.text_key": "text"}})
    job.make().run()
    other = str(write_stream(tmp_path / "other", samples=33, seed=3))
    for change, message in (
        ({"streams": (streams[0], other)}, r"stream 1: was two .*, is other"),
        ({"seed": 1}, r"weights_sha256: was '\w+', is '\w+'"),
        ({"window": 10}, r"window: was 20, is 10"),
        ({"selection": {"keep": 0.5}}, r"keep: was 0\.25, is 0\.5"),
        ({"options": {"settings": {"data.text_key": "body"}}}, r"data\.text_key: was 'text', is 'body'"),
        ({"options": job.options | {"order": "sequential"}}, r"order: was 'shuffled', is 'sequential'"),
    ):
        with pytest.raises(ResumeError, match=message):
            dataclasses.replace(job, **change).make().run()
    job.make().run()  # and nothing was changed by it


def test_a_training_run_is_not_gone_on_with(streams, tmp_path):
    from tiny import TinyRun

    TinyRun(streams=streams, folder=str(tmp_path), duration="1ba").run()
    with pytest.raises(ResumeError, match="holds the log of a training run, not of a scoring pass"):
        Job(streams=streams, folder=str(tmp_path / "log")).make().run()


def test_leftovers_of_another_log_are_refused(streams, tmp_path):
    (tmp_path / "selection" / "r00000").mkdir(parents=True)
    (tmp_path / "selection" / "r00000" / "a0-000000.arrow").write_bytes(b"?")
    with pytest.raises(LogExistsError, match=r"already holds selection"):
        Job(streams=streams, folder=str(tmp_path)).make().run()


# What it refuses ----------------------------------------------------------------------------------------------------------


def test_settings_without_a_meaning_are_refused_together(streams, tmp_path):
    selection = {"start": "5ba", "interrupt": 3, "scope": "rank", "embeddings": "none", "keep": 30}
    with pytest.raises(ConfigError) as raised:
        Job(streams=streams, folder=str(tmp_path), selection=selection).make()
    for field in selection:
        assert f"\n  {field}: " in str(raised.value)


def test_a_stream_drawn_in_part_is_refused(streams, tmp_path):
    dataset = UDSStreamingDataset(streams=[Stream(local=streams[0], repeat=2)], batch_size=1)
    with pytest.raises(ConfigError, match=r"stream 0 .* would be drawn 100 times for its 50 samples"):
        ScoringPass(
            config=SelectionConfig(**SETTINGS), model=llama(), dataset=dataset, collate_fn=collate, log_dir=tmp_path,
            device=DeviceCPU(),
        )  # fmt: skip


def test_a_stream_that_cannot_be_collated_leaves_no_log(tmp_path):
    with MDSWriter(out=str(tmp_path / "stream"), columns={"number": "int"}) as writer:
        writer.write({"number": 3})

    def refusing(rows):
        raise DataError(f"no text among {sorted(rows[0])}")

    job = Job(streams=(str(tmp_path / "stream"),), folder=str(tmp_path / "run"))
    scoring = job.make()
    scoring._collate = dataclasses.replace(scoring._collate, collate=refusing)
    with pytest.raises(DataError, match=r"no text among \['number', 'sample_id'\]"):
        scoring.run()
    assert not (tmp_path / "run").exists()
