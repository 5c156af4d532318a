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
from udsstream.mosaicml.scoring_pass import PassProgress, ScoringPass, Windows, pass_order, weights_sha256

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
    job = Job(streams=streams, folder=str(tmp_path / "run"), options={"order": order, "num_workers": order == "shuffled"})
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
