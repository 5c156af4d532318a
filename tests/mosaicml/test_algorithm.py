"""OnlineBatchSelection inside Composer's Trainer: what it chooses, what it records, what it leaves alone, what it refuses."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging

import numpy as np
import oracles
import pytest
import torch
from composer.core import Callback, TimeUnit
from composer.loggers import InMemoryLogger
from composer.utils.parallelism import TPConfig
from tiny import TinyRun, collate, llama, write_stream
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from udsstream import OnlineBatchSelection, SelectionConfig, SelectionLog, UDSStreamingDataset
from udsstream.errors import (
    ConfigError,
    DataError,
    LogWriteError,
    MissingSampleIdError,
    ScoreError,
    SequenceTooLongError,
)
from udsstream.mosaicml.batch import take_rows, trim_padding
from udsstream.mosaicml.schedule import should_select
from udsstream.selection_log.timings import read_timings
from udsstream.selection_log.writer import SelectionLogWriter


@pytest.fixture(scope="module")
def streams(tmp_path_factory) -> tuple[str, ...]:
    """83 samples of 3 to 24 tokens: 11 batches of 8 an epoch, the last one of 3."""
    return (str(write_stream(tmp_path_factory.mktemp("streams") / "one")),)


def train(run: TinyRun, *callbacks: Callback, **overrides) -> SelectionLog:
    trainer = run.trainer(callbacks=list(callbacks), **overrides)
    try:
        trainer.fit()
    finally:
        trainer.close()
    return SelectionLog.open(f"{run.folder}/log")


class Batches(Callback):
    """Keeps every batch as training sees it."""

    def __init__(self) -> None:
        self.seen: list[dict] = []

    def batch_start(self, state, logger) -> None:
        del logger
        self.seen.append(dict(state.batch))


class Logits(Callback):
    """Scores every candidate the slow way, from the model's own logits, before selection sees the batch."""

    def __init__(self) -> None:
        self.candidates: list[list[np.ndarray]] = []

    def before_each(self, model, batch) -> None:
        was = model.training
        model.eval()
        with torch.no_grad():
            rows = []
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                alone = ids[mask.bool()][None]
                rows.append(model.model(input_ids=alone).logits[0].double().numpy())
        model.train(was)
        self.candidates.append(rows)


@pytest.mark.parametrize("projection_scale", ["isometric", "reference"])
@pytest.mark.parametrize("length_norm", ["none", "sqrt", "tokens"])
def test_choices_are_those_of_the_published_formula(streams, tmp_path, monkeypatch, projection_scale, length_norm):
    """A whole run against an oracle that sees nothing but logits: intra, inter, score and the kept set of every step."""
    settings = {"projection_scale": projection_scale, "length_norm": length_norm, "alpha": 0.3, "buffer_size": 5}
    run = TinyRun(streams=streams, folder=str(tmp_path), duration="13ba", selection=settings)
    spy = Logits()
    decide = OnlineBatchSelection._decide

    def spied(self, state):
        spy.before_each(state.model, state.batch)
        return decide(self, state)

    monkeypatch.setattr(OnlineBatchSelection, "_decide", spied)
    trainer = run.trainer()
    trainer.fit()
    projection = trainer.state.algorithms[0].selector.projection
    trainer.close()

    gammas = oracles.gamma(projection.vocabulary), oracles.gamma(projection.tokens)
    table = SelectionLog.open(tmp_path / "log").table()
    memory: list[np.ndarray] = []
    for step, candidates in enumerate(spy.candidates):
        rows = table.filter(np.equal(table["step"].to_numpy(), step))
        by = [{"none": 1.0, "sqrt": len(c) ** 0.5, "tokens": len(c)}[length_norm] for c in candidates]
        intra = np.array([oracles.nuclear_norm(c) / n for c, n in zip(candidates, by, strict=True)])
        embeddings = [oracles.embedding(c, *gammas) / n for c, n in zip(candidates, by, strict=True)]
        inter = np.array([oracles.mean_distance(z, memory) for z in embeddings])
        np.testing.assert_allclose(rows["intra"], intra, rtol=2e-5)
        np.testing.assert_allclose(rows["inter"], inter, rtol=1e-4)
        np.testing.assert_allclose(rows["score"], intra + 0.3 * inter, rtol=1e-4)
        kept = sorted(np.argsort(-(intra + 0.3 * inter), kind="stable")[: 2 if len(candidates) == 8 else 1].tolist())
        assert np.flatnonzero(rows["selected"]).tolist() == kept
        memory = (memory + [embeddings[place] for place in kept])[-5:]


@pytest.mark.parametrize("method", ["uds_intra", "uds_inter", "max_loss", "longest"])
def test_other_methods_choose_by_their_own_measure(streams, tmp_path, monkeypatch, method):
    """Whole runs against the definition on the model's own float64 logits; ties go to the smaller place."""
    run = TinyRun(streams=streams, folder=str(tmp_path), duration="13ba", selection={"method": method})
    spy = Logits()
    decide = OnlineBatchSelection._decide

    def spied(self, state):
        spy.before_each(state.model, state.batch)
        labels.append(
            [
                row[mask.bool()].tolist()
                for row, mask in zip(state.batch["labels"], state.batch["attention_mask"], strict=True)
            ]
        )
        return decide(self, state)

    labels: list[list[list[int]]] = []
    monkeypatch.setattr(OnlineBatchSelection, "_decide", spied)
    log = train(run)
    assert log.run["selection"]["method"] == method
    table = log.table()
    for step, candidates in enumerate(spy.candidates):
        rows = table.filter(np.equal(table["step"].to_numpy(), step))
        match method:
            case "uds_intra":
                expected = [oracles.nuclear_norm(logits) for logits in candidates]
            case "max_loss":
                expected = [
                    oracles.mean_loss(logits, label) for logits, label in zip(candidates, labels[step], strict=True)
                ]
            case "longest":
                expected = [len(logits) for logits in candidates]
            case _:
                expected = rows[
                    "inter"
                ].to_pylist()  # against the oracle in test_choices_are_those_of_the_published_formula
        np.testing.assert_allclose(rows["score"], expected, rtol=2e-5)
        scores = rows["score"].to_pylist()
        assert np.flatnonzero(rows["selected"]).tolist() == oracles.top_k(scores, 2 if len(candidates) == 8 else 1)
    recorded = {name for name in ("intra", "inter", "loss") if table[name].null_count == 0}
    assert recorded == {"max_loss": {"loss"}, "longest": set()}.get(method, {"intra", "inter"})
    assert (len(log.pushes()) > 0) == (method in ("uds_intra", "uds_inter"))


def test_the_loss_needs_labels(streams, tmp_path):
    loader = DataLoader(
        UDSStreamingDataset(local=streams[0], batch_size=8),
        batch_size=8,
        collate_fn=lambda rows: {key: value for key, value in collate(rows).items() if key != "labels"},
    )
    run = TinyRun(streams=streams, folder=str(tmp_path), selection={"method": "max_loss"})
    with pytest.raises(
        DataError,
        match=r"method='max_loss' needs 'labels' of shape \(8, \d+\) .*found: input_ids, attention",
    ):
        train(run, train_dataloader=loader)


def test_a_loss_that_nothing_is_asked_for_is_refused(streams, tmp_path):
    def only_the_first(rows):
        batch = collate(rows)
        batch["labels"][3, 1:] = -100
        return batch

    dataset = UDSStreamingDataset(local=streams[0], batch_size=8)
    loader = DataLoader(dataset, batch_size=8, collate_fn=only_the_first)
    run = TinyRun(streams=streams, folder=str(tmp_path), selection={"method": "max_loss"})
    with pytest.raises(DataError, match=r"of sample 3 \(row 3 of the batch\) no token but the first has a label"):
        train(run, train_dataloader=loader)


def test_training_sees_the_kept_rows_alone(streams, tmp_path):
    """Trimmed to the longest kept sample, in the order of their places, and recorded as such."""
    batches = Batches()
    log = train(TinyRun(streams=streams, folder=str(tmp_path), duration="12ba"), batches)
    for step, batch in enumerate(batches.seen):
        assert batch["sample_id"].tolist() == log.selected(step)
        assert batch["attention_mask"].sum(dim=1).max() == batch["input_ids"].shape[1] == batch["labels"].shape[1]
    rows = log.table()
    assert rows.num_rows == 11 * 8 - 5 + 8
    kept = rows.filter(rows["selected"])
    assert len(kept) == 10 * 2 + 1 + 2
    assert rows["epoch_position"].to_pylist() == [*range(83), *range(8)]
    assert [rows["shard"].to_numpy().max() > 0, rows["stream"].to_numpy().max()] == [True, 0]


def test_the_log_says_where_a_sample_lies(streams, tmp_path):
    log = train(TinyRun(streams=streams, folder=str(tmp_path), duration="2ba"))
    dataset = UDSStreamingDataset(local=streams[0], batch_size=1)
    offsets = dataset.sample_offset_per_shard
    for row in log.table().to_pylist():
        assert offsets[row["shard"]] + row["shard_index"] == row["sample_id"]
        assert row["tokens"] == len(dataset[row["sample_id"]]["input_ids"])


def test_selection_is_neutral(streams, tmp_path):
    """keep=1.0 scores everything and drops nothing: the weights are those of a run without it, dropout on."""
    run = TinyRun(streams=streams, folder=str(tmp_path / "a"), duration="12ba", selection={"keep": 1.0})
    plain = dataclasses.replace(run, folder=str(tmp_path / "b"), selection=None)
    ours, theirs = run.run(), plain.run()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_compiled_model_is_traced_as_often_as_without_selection(streams, tmp_path):
    """Composer's `compile_config`: scoring runs what was compiled as it was written, and takes no place of the training's graphs."""
    run = TinyRun(streams=streams, folder=str(tmp_path / "eager"), duration="12ba", dropout=0.0)
    expected = train(run).table(columns=["sample_id", "selected", "intra"])
    traced = {}
    for name, selection in (("alone", None), ("selecting", {})):
        torch._dynamo.reset()
        counters.clear()
        compiled = dataclasses.replace(run, folder=str(tmp_path / name), selection=selection)
        compiled.run(compile_config={"backend": "eager"})
        traced[name] = (counters["frames"]["total"], counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert traced["selecting"] == traced["alone"]
    assert traced["alone"][1] > 0
    log = SelectionLog.open(tmp_path / "selecting" / "log")
    assert log.table(columns=["sample_id", "selected", "intra"]).equals(expected)


def test_the_same_seed_makes_the_same_run(streams, tmp_path):
    runs = [TinyRun(streams=streams, folder=str(tmp_path / name), duration="12ba") for name in "ab"]
    weights = [run.run() for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    tables = [SelectionLog.open(f"{run.folder}/log").table() for run in runs]
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_side_does_not_matter(streams, tmp_path, side):
    """Scores of a left-padding collator equal those of a right-padding one."""

    def left(rows):
        batch = collate(rows)
        for number in range(len(rows)):
            shift = int((batch["attention_mask"][number] == 0).sum())
            for key in ("input_ids", "attention_mask", "labels"):
                batch[key][number] = batch[key][number].roll(shift)
        return batch

    dataset = UDSStreamingDataset(local=streams[0], shuffle=True, batch_size=8, num_canonical_nodes=1)
    loader = DataLoader(dataset, batch_size=8, collate_fn=left if side == "left" else collate)
    run = TinyRun(streams=streams, folder=str(tmp_path / side), duration="1ba")
    batches = Batches()
    log = train(run, batches, train_dataloader=loader)
    reference = train(dataclasses.replace(run, folder=str(tmp_path / "reference")))
    assert log.selected(0) == reference.selected(0)
    np.testing.assert_allclose(log.table()["score"], reference.table()["score"], rtol=1e-5)
    assert batches.seen[0]["attention_mask"][:, -1 if side == "left" else 0].all()


def test_random_keeps_as_many_and_pushes_nothing(streams, tmp_path):
    log = train(TinyRun(streams=streams, folder=str(tmp_path), duration="11ba", selection={"method": "random"}))
    rows = log.table()
    assert rows["intra"].null_count == rows["inter"].null_count == rows.num_rows
    assert rows["score"].null_count == 0
    assert sum(rows["selected"].to_pylist()) == 10 * 2 + 1
    assert log.buffer_at().pushed == 0 if log.buffer_steps() else True


def test_steps_without_selection_are_recorded_and_trained_on_whole(streams, tmp_path):
    batches = Batches()
    run = TinyRun(
        streams=streams, folder=str(tmp_path), duration="8ba", selection={"start": "2ba", "end": "7ba", "interrupt": 3}
    )
    log = train(run, batches)
    sizes = [len(batch["input_ids"]) for batch in batches.seen]
    assert sizes == [8, 8, 8, 2, 2, 8, 2, 8]
    for step, size in enumerate(sizes):
        rows = log.table().filter(np.equal(log.table()["step"].to_numpy(), step))
        assert rows["score"].null_count == (8 if size == 8 else 0)
        assert sum(rows["selected"].to_pylist()) == size


@pytest.mark.parametrize(
    ("settings", "batches", "elapsed", "expected"),
    [
        ({}, 0, 0.0, True),
        ({"start": "3ba"}, 2, 0.0, False),
        ({"start": "3ba"}, 3, 0.0, True),
        ({"end": "3ba"}, 3, 0.0, False),
        ({"start": "0.5dur"}, 9, 0.4, False),
        ({"start": "0.5dur"}, 9, 0.5, True),
        ({"end": "0.9dur"}, 9, 0.95, False),
        ({"interrupt": 2}, 1, 0.0, False),
        ({"interrupt": 2}, 2, 0.0, True),
    ],
)
def test_when_selection_is_on(settings, batches, elapsed, expected):
    now = dict.fromkeys((TimeUnit.EPOCH, TimeUnit.SAMPLE, TimeUnit.TOKEN), 0) | {TimeUnit.BATCH: batches}
    config = SelectionConfig(**settings)
    assert should_select(elapsed=elapsed, batch_in_epoch=batches, now=now, config=config) is expected


def test_warm_start_begins_with_the_former_memory(streams, tmp_path):
    first = TinyRun(streams=streams, folder=str(tmp_path / "a"), duration="6ba", save_interval="6ba")
    train(first)
    second = TinyRun(
        streams=streams,
        folder=str(tmp_path / "b"),
        duration="2ba",
        selection={"warm_start": tmp_path / "a" / "log", "embeddings": "full"},
    )
    log = train(second)
    before = SelectionLog.open(tmp_path / "a" / "log").buffer_at()
    assert len(before.embeddings) == 12
    np.testing.assert_array_equal(log.buffer_at(0).embeddings, before.embeddings)
    assert log.table()["inter"][0].as_py() > 0
    assert log.run["warm_start"]["run_id"] == SelectionLog.open(tmp_path / "a" / "log").run["run_id"]


def test_warm_start_from_another_space_is_refused(streams, tmp_path):
    train(TinyRun(streams=streams, folder=str(tmp_path / "a"), duration="6ba", save_interval="6ba"))
    other = TinyRun(
        streams=streams,
        folder=str(tmp_path / "b"),
        duration="2ba",
        selection={"warm_start": tmp_path / "a" / "log", "seed": 3},
    )
    with pytest.raises(ConfigError, match=r"warm_start: .*made by another projection.*\n  seed: was 17, is 3"):
        train(other)


def test_length_correlation_is_logged_and_announced(streams, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="udsstream"):
        train(TinyRun(streams=streams, folder=str(tmp_path), duration="40ba", lr=1e-5))
    warnings = [record.message for record in caplog.records if "correlate by" in record.message]
    assert len(warnings) == 1
    assert "taking the longest samples" in warnings[0]


def test_defaults_are_those_of_the_configuration():
    """The signature repeats SelectionConfig, so that editors and `help()` show it; the two must not drift apart."""
    signature = inspect.signature(OnlineBatchSelection).parameters
    fields = {field.name: field.default for field in dataclasses.fields(SelectionConfig)}
    del fields["measured"]  # what a method of one's own says of itself
    assert {name: signature[name].default for name in fields} == fields
    assert OnlineBatchSelection(keep=3, seed=4).config == SelectionConfig(keep=3, seed=4)


def test_the_run_s_loggers_are_told_what_anchors_the_log(streams, tmp_path):
    """Metrics of every step, and the Merkle root of each checkpoint: a record of the record, outside its folder."""
    logger = InMemoryLogger()
    run = TinyRun(streams=streams, folder=str(tmp_path), duration="6ba", save_interval="3ba")
    train(run, loggers=[logger])
    kept = [value for _, value in logger.data["selection/kept"]]
    assert kept == [2.0] * 6
    assert {"selection/seconds", "selection/log_seconds", "selection/inter_mean"} <= logger.data.keys()
    heads = json.loads((tmp_path / "log" / "_heads" / "ba00000003.json").read_text())
    roots = {name: value for name, value in logger.hyperparameters.items() if "log_root" in name}
    assert sorted(roots) == ["selection/log_root/ba00000003", "selection/log_root/ba00000006"]
    assert roots["selection/log_root/ba00000003"] in json.dumps(heads)


def test_training_does_not_go_on_unrecorded(streams, tmp_path, monkeypatch):
    """A decision that cannot be written down stops the run before the model trains on it."""
    run = TinyRun(streams=streams, folder=str(tmp_path), duration="6ba")
    trainer = run.trainer()
    append, calls = SelectionLogWriter.append, []

    def full(self, step, columns):
        calls.append([p.detach().clone() for p in trainer.state.model.parameters()])
        if step == 2:
            raise LogWriteError("no space left on device")
        append(self, step, columns)

    monkeypatch.setattr(SelectionLogWriter, "append", full)
    with pytest.raises(LogWriteError):
        trainer.fit()
    assert len(calls) == 3
    after = list(trainer.state.model.parameters())
    assert all(torch.equal(was, now) for was, now in zip(calls[-1], after, strict=True))
    trainer.close()


# What is refused ------------------------------------------------------------------------------------------------------


def test_two_selections_in_one_trainer_are_refused(streams, tmp_path):
    run = TinyRun(streams=streams, folder=str(tmp_path))
    with pytest.raises(ConfigError, match=r"2 OnlineBatchSelection algorithms"):
        run.trainer(algorithms=[OnlineBatchSelection(), OnlineBatchSelection()])


def test_a_batch_without_sample_id_is_refused(streams, tmp_path):
    def forgetful(rows):
        batch = collate(rows)
        del batch["sample_id"]
        return batch

    loader = DataLoader(UDSStreamingDataset(local=streams[0], batch_size=8), batch_size=8, collate_fn=forgetful)
    with pytest.raises(MissingSampleIdError, match=r"no 'sample_id' \(found: input_ids, attention_mask, labels\)"):
        train(TinyRun(streams=streams, folder=str(tmp_path)), train_dataloader=loader)


def test_keep_larger_than_the_batch_is_refused_before_training(streams, tmp_path):
    with pytest.raises(ConfigError, match=r"keep: 9 of each candidate batch .* only 8; choose at most 8"):
        TinyRun(streams=streams, folder=str(tmp_path), selection={"keep": 9}).trainer()


def test_a_sequence_that_is_too_long_is_refused(streams, tmp_path):
    run = TinyRun(streams=streams, folder=str(tmp_path), selection={"max_seq_len": 10})
    with pytest.raises(
        SequenceTooLongError, match=r"sample \d+ \(row \d of the batch\) has \d+ tokens, but max_seq_len=10"
    ):
        train(run)


def test_labels_that_are_all_ignored_are_refused(streams, tmp_path):
    def mute(rows):
        batch = collate(rows)
        batch["labels"][2] = -100
        return batch

    loader = DataLoader(UDSStreamingDataset(local=streams[0], batch_size=8), batch_size=8, collate_fn=mute)
    with pytest.raises(DataError, match=r"all labels of sample 2 \(row 2 of the batch\) are -100"):
        train(TinyRun(streams=streams, folder=str(tmp_path)), train_dataloader=loader)


def test_a_score_that_is_not_a_number_names_its_sample_and_nothing_is_recorded(streams, tmp_path):
    run = TinyRun(streams=streams, folder=str(tmp_path), duration="3ba")
    model = llama()
    with torch.no_grad():
        model.model.model.embed_tokens.weight[3:50] = float("nan")
    with pytest.raises(ScoreError, match=r"scores are not finite: nan for sample \d+ \(position \d\)"):
        train(run, model=model)
    assert len(SelectionLog.open(tmp_path / "log").steps()) == 0


def test_tensor_parallelism_is_refused(streams, tmp_path):
    trainer = TinyRun(streams=streams, folder=str(tmp_path), duration="2ba").trainer()
    trainer.state.tp_config = TPConfig()
    with pytest.raises(ConfigError, match=r"parallelism_config\['tp'\] .* so leave 'tp' out"):
        trainer.fit()
    trainer.close()


def test_trimming_equals_collating_the_kept_rows_alone(streams):
    """What replay relies on."""
    dataset = UDSStreamingDataset(local=streams[0], batch_size=8)
    rows = [dataset[number] for number in range(8)]
    for kept in ([0], [1, 5], [7, 2, 3]):
        ours = trim_padding(take_rows(collate(rows), kept))
        alone = collate([rows[number] for number in kept])
        assert ours.keys() == alone.keys()
        assert all(torch.equal(ours[key], alone[key]) for key in alone)


def test_what_each_step_took_is_written_beside_the_log(streams, tmp_path):
    TinyRun(streams=streams, folder=str(tmp_path), duration="3ba").run()
    times = read_timings(tmp_path / "log")
    assert times["step"].tolist() == [0, 1, 2]
    assert (times["step_seconds"] > times["selection_seconds"]).all()
    assert (times["selection_seconds"] > 0).all()


def test_run_json_says_how_candidates_come(streams, tmp_path):
    TinyRun(streams=streams, folder=str(tmp_path), duration="3ba").run()
    run = SelectionLog.open(tmp_path / "log").run
    assert run["loader"] == {
        "batch_size": 8,
        "canonical_nodes": 1,
        "length_groups": None,
        "batches_per_epoch": 11,
        "max_duration": "3ba",
        "sample_ids": "dataset",
    }
    assert [(stream["samples"], stream["per_epoch"]) for stream in run["streams"]] == [(83, 83)]
