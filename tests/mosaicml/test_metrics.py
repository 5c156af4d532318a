"""What trackers are told: the numbers by hand, the documented list, and how it looks in Composer's console, TensorBoard and MLflow."""

from __future__ import annotations

import io
import re
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from composer.loggers import ConsoleLogger, InMemoryLogger, MLFlowLogger, TensorboardLogger
from mlflow import MlflowClient
from streaming import MDSWriter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import TinyRun, write_stream

from udsstream import SelectionLog
from udsstream.mosaicml.decision import Decision
from udsstream.mosaicml.metrics import TokenTotals, step_metrics, time_metrics
from udsstream.mosaicml.ranks import canonical_order

DOCS = Path(__file__).parents[2] / "docs" / "trackers.md"


@pytest.fixture(scope="module")
def streams(tmp_path_factory) -> tuple[str, ...]:
    return (str(write_stream(tmp_path_factory.mktemp("streams") / "one")),)


def decision(**more) -> Decision:
    return Decision(
        order=canonical_order([4], 1), sample_ids=[7, 8, 9, 10], lengths=[10, 20, 30, 40], kept=[1, 3], **more
    )


# The numbers -------------------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_step():
    totals = TokenTotals(candidates=1000, kept=200)
    step = decision(
        scores=torch.tensor([1.0, 4.0, 2.0, 3.0]),
        measured={"intra": torch.tensor([1.0, 2.0, 3.0, 6.0]), "inter": torch.tensor([0.0, 1.0, 2.0, 5.0])},
    )
    totals.add(step)
    found = step_metrics(step, totals)
    assert found == pytest.approx(
        {
            "selection/candidates": 4,
            "selection/kept": 2,
            "selection/kept_share": 0.5,
            "selection/candidate_tokens": 100,
            "selection/kept_tokens": 60,
            "selection/kept_token_share": 0.6,
            "selection/tokens_saved": 840,
            "selection/intra_mean": 3,
            "selection/intra_kept_mean": 4,
            "selection/inter_mean": 2,
            "selection/inter_kept_mean": 3,
            "selection/score_mean": 2.5,
            "selection/score_kept_mean": 3.5,
            "selection/score_p10": 1.3,
            "selection/score_p50": 2.5,
            "selection/score_p90": 3.7,
            "selection/score_kept_p10": 3.1,
            "selection/score_kept_p50": 3.5,
            "selection/score_kept_p90": 3.9,
            "selection/score_cut": 3,
            "selection/novelty": 1.5,
        }
    )
    assert all(type(value) is float for value in found.values())


def test_where_nothing_was_scored_there_are_no_scores():
    step = decision(scores=None)
    totals = TokenTotals()
    totals.add(step)
    assert not [name for name in step_metrics(step, totals) if "score" in name or "novelty" in name]


def test_there_is_no_novelty_beside_an_empty_memory():
    step = decision(scores=torch.ones(4), measured={"inter": torch.zeros(4)})
    assert "selection/novelty" not in step_metrics(step, TokenTotals(1, 1))


def test_the_share_of_a_step():
    found = time_metrics(step_seconds=4.0, selection_seconds=0.75, log_seconds=0.25)
    assert found == {"selection/step_seconds": 4.0, "selection/share_of_step": 0.25}


# The list ----------------------------------------------------------------------------------------------------------------


def documented(measured: tuple[str, ...]) -> set[str]:
    """The metrics that docs/trackers.md lists, for a method that measures these."""
    names = set()
    for row in re.findall(r"^\| (`selection/[^|]*) \|", DOCS.read_text(), flags=re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", row):
            names |= {name.replace("{measured}", value) for value in measured} if "{measured}" in name else {name}
    return names


@pytest.mark.parametrize("method", ["uds", "max_loss", "longest"])
def test_the_documented_metrics_are_those_that_are_told(streams, tmp_path, method):
    logger = InMemoryLogger()
    run = TinyRun(streams=streams, folder=str(tmp_path), duration="6ba", selection={"method": method})
    trainer = run.trainer(loggers=[logger])
    trainer.fit()
    config = trainer.state.algorithms[0].config
    trainer.close()
    told = {name for name in logger.data if name.startswith("selection/")}
    listed = documented(config.measures)
    if not config.remembers:
        listed.discard("selection/novelty")
    assert told == listed


def test_metrics_agree_with_the_log(streams, tmp_path):
    logger = InMemoryLogger()
    TinyRun(streams=streams, folder=str(tmp_path), duration="6ba", selection={"start": "2ba"}).run(loggers=[logger])
    table = SelectionLog.open(tmp_path / "log").table().to_pandas()
    told = {name: dict((int(time.batch), value) for time, value in logger.data[name]) for name in logger.data}
    saved = 0
    for step, rows in table.groupby("step"):
        kept = rows[rows["selected"]]
        saved += rows["tokens"].sum() - kept["tokens"].sum()
        assert told["selection/kept"][step] == len(kept)
        assert told["selection/tokens_saved"][step] == saved
        if step < 2:
            assert step not in told["selection/score_mean"]
            continue
        assert told["selection/score_p90"][step] == pytest.approx(np.percentile(rows["score"], 90), rel=1e-6)
        assert told["selection/score_cut"][step] == pytest.approx(kept["score"].min(), rel=1e-6)
        assert told["selection/intra_kept_mean"][step] == pytest.approx(kept["intra"].mean(), rel=1e-6)
    assert set(told["selection/share_of_step"]) == set(range(1, 7))  # Composer's clock has moved on by then


def test_what_was_saved_is_summed_through_resumptions(streams, tmp_path):
    def saved(folder, *durations) -> float:
        run = TinyRun(streams=streams, folder=str(tmp_path / folder), save_interval="3ba", autoresume=True)
        for duration in durations:
            logger = InMemoryLogger()
            run.run(loggers=[logger], max_duration=duration)
        return logger.data["selection/tokens_saved"][-1][1]

    assert saved("cut", "3ba", "6ba") == saved("whole", "6ba") > 0


def test_the_documented_example_runs(tmp_path, monkeypatch):
    with MDSWriter(out=str(tmp_path / "streams" / "text"), columns={"text": "str"}) as writer:
        for number in range(40):
            writer.write({"text": "Ein Satz, noch ein Satz. " * (number % 5 + 1)})
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for path in (DOCS.parents[1] / "README.md", DOCS):
        (example,) = re.findall(r"^```python\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        exec(compile(example, path.name, "exec"), names)
    names["selection"].close()  # type: ignore[attr-defined]
    (events,) = (tmp_path / "tensorboard").rglob("events.*.0")
    board = EventAccumulator(str(events.parent))
    board.Reload()
    assert "selection/kept" in board.Tags()["scalars"]


# Trackers ----------------------------------------------------------------------------------------------------------------


def test_the_console_shows_them(streams, tmp_path):
    stream = io.StringIO()
    TinyRun(streams=streams, folder=str(tmp_path), duration="3ba").run(loggers=[ConsoleLogger("1ba", stream)])
    shown = stream.getvalue()
    assert shown.count("Train selection/kept_share: 0.2500") == 3
    assert "Train selection/share_of_step: 0." in shown


def test_tensorboard_shows_them(streams, tmp_path):
    run = TinyRun(streams=streams, folder=str(tmp_path), duration="5ba", save_interval="5ba")
    run.run(loggers=[TensorboardLogger(log_dir=str(tmp_path / "board"))])
    board = EventAccumulator(str(tmp_path / "board" / "tiny"))
    board.Reload()
    told = {tag for tag in board.Tags()["scalars"] if tag.startswith("selection/")}
    assert told == documented(("intra", "inter"))
    assert [(event.step, event.value) for event in board.Scalars("selection/kept")] == [(n, 2.0) for n in range(5)]


def test_an_mlflow_file_store_keeps_them(streams, tmp_path):
    store = (tmp_path / "mlruns").as_uri()
    logger = MLFlowLogger("tiny", tracking_uri=store, synchronous=True, log_system_metrics=False)
    run = TinyRun(streams=streams, folder=str(tmp_path), duration="6ba", save_interval="3ba")
    try:
        run.run(loggers=[logger])
    finally:
        mlflow.end_run()
    client = MlflowClient(store)
    (kept,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert {name for name in kept.data.metrics if name.startswith("selection/")} == documented(("intra", "inter"))
    history = client.get_metric_history(kept.info.run_id, "selection/tokens_saved")
    assert [metric.step for metric in history] == list(range(6))
    assert [metric.value for metric in history] == sorted(metric.value for metric in history)
    run_file = SelectionLog.open(tmp_path / "log").run
    params = kept.data.params
    assert params["selection/log_run_id"] == run_file["run_id"]
    assert params["selection/keep"] == "0.25"
    heads = (tmp_path / "log" / "_heads" / "ba00000003.json").read_text()
    assert params["selection/log_root/ba00000003"] in heads
