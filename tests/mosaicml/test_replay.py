"""A replay trains to the original's weights, bit for bit, from the log alone; what differs is said; what cannot be is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from composer.core import DataSpec
from composer.optim import LinearScheduler
from streaming import MDSWriter, Stream
from tiny import TinyRun, collate, write_stream
from torch.utils.data import DataLoader

from udsstream import OnlineBatchSelection, ReplaySelection, SelectionLog, UDSStreamingDataset
from udsstream.errors import ConfigError, LogError, ReplayError, ResumeError, ShardError
from udsstream.mosaicml import algorithm
from udsstream.selection_log.writer import SelectionLogWriter

DURATION = "25ba"
"""Two epochs of 11 batches, the last of each of 3 candidates, and 3 batches of a third."""


@pytest.fixture(scope="module")
def streams(tmp_path_factory) -> tuple[str, ...]:
    root = tmp_path_factory.mktemp("streams")
    return (
        str(write_stream(root / "one", samples=50, seed=1)),
        str(write_stream(root / "two", samples=33, seed=2)),
    )


@pytest.fixture(scope="module")
def original(streams, tmp_path_factory) -> tuple[TinyRun, dict[str, torch.Tensor]]:
    """A run with dropout and checkpoints, and its weights."""
    run = TinyRun(
        streams=streams, folder=str(tmp_path_factory.mktemp("original")), duration=DURATION, save_interval="5ba"
    )
    return run, run.run()


def log_of(run: TinyRun) -> Path:
    return Path(run.folder) / "log"


def checkpoint_of(run: TinyRun, batch: int) -> Path:
    (path,) = (Path(run.folder) / "checkpoints").glob(f"ep*-ba{batch}-rank0.pt")
    return path


def again(run: TinyRun, folder: Path, **changes) -> TinyRun:
    """The same run, without checkpoints, elsewhere."""
    return dataclasses.replace(run, **({"folder": str(folder), "save_interval": None} | changes))


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def saved_weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=False)["state"]["model"]


# The same weights ---------------------------------------------------------------------------------------------------------

KINDS = {
    "full training": {},
    "LoRA": {"lora": True},
    "tied embeddings": {"tie": True},
    "2 workers": {"workers": 2},
    "random": {"selection": {"method": "random"}},
    "the highest loss": {"selection": {"method": "max_loss"}},
    "off at times": {"selection": {"start": "2ba", "end": "20ba", "interrupt": 4}},
}


@pytest.mark.slow
@pytest.mark.parametrize("verify", [False, True], ids=["from the log", "decided again"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_originals(streams, tmp_path, kind, verify):
    run = TinyRun(streams=streams, folder=str(tmp_path), duration=DURATION, **KINDS[kind])
    weights = run.run()
    replay = ReplaySelection(log_of(run), verify=verify)
    assert same(again(run, tmp_path / "again").run(replay=replay), weights)
    assert replay.differences == []
    if verify:
        tally = replay.tally
        assert tally is not None
        assert tally.steps + tally.unscored == 25
        assert tally.unscored == (11 if kind == "off at times" else 0)
        assert (tally.agreed, tally.equal_scores) == (tally.steps, tally.scores)
        assert tally.equal_memories == tally.memories == (0 if kind in ("random", "the highest loss") else tally.steps)
        assert tally.first_divergence is tally.first_difference is None
    else:
        assert replay.tally is None


def test_another_number_of_workers_changes_nothing(original, tmp_path):
    run, weights = original
    assert same(again(run, tmp_path, workers=2).run(replay=ReplaySelection(log_of(run))), weights)


def test_a_resumed_run_is_replayed_as_it_went_on(streams, original, tmp_path):
    """Killed after step 13, resumed from the checkpoint before step 10: of each step the newest attempt counts."""
    _, weights = original
    run = TinyRun(streams=streams, folder=str(tmp_path), duration="13ba", save_interval="10ba", autoresume=True)
    run.run()
    for path in (tmp_path / "checkpoints").glob("*ba13*"):
        path.unlink()
    shutil.copy(tmp_path / "checkpoints" / "ep0-ba10-rank0.pt", tmp_path / "checkpoints" / "latest-rank0.pt")
    run = dataclasses.replace(run, duration=DURATION)
    run.run()
    log = SelectionLog.open(log_of(run))
    first = log.table(columns=["attempt", "step"]).group_by("attempt", use_threads=False).aggregate([("step", "min")])
    assert dict(zip(first["attempt"].to_pylist(), first["step_min"].to_pylist(), strict=True)) == {0: 0, 1: 10}
    assert len(log.table(all_attempts=True)) > len(log.table())
    replay = ReplaySelection(log_of(run), verify=True)
    assert same(again(run, tmp_path / "again", autoresume=False).run(replay=replay), weights)
    assert replay.tally is not None
    assert replay.tally.equal_memories == 25


@pytest.mark.parametrize("stop", [5, 10, 15])
def test_the_first_steps_lead_to_the_checkpoint(original, tmp_path, stop):
    run, _ = original
    replay = ReplaySelection(log_of(run), steps=(None, stop))
    trainer = again(run, tmp_path).trainer(replay=replay)
    trainer.fit()
    assert trainer.state.timestamp.batch.value == stop
    assert same(dict(trainer.state.get_model_state_dict()), saved_weights(checkpoint_of(run, stop)))
    trainer.close()


@pytest.mark.parametrize("first", [5, 10, 15])
@pytest.mark.parametrize("verify", [False, True], ids=["from the log", "decided again"])
def test_from_a_checkpoint_on(original, tmp_path, first, verify):
    run, weights = original
    checkpoint = checkpoint_of(run, first)
    replay = ReplaySelection(log_of(run), checkpoint=checkpoint, verify=verify)
    assert (replay.decisions.first, replay.decisions.stop) == (first, 25)
    found = again(run, tmp_path).run(replay=replay, load_path=str(checkpoint))
    assert same(found, weights)
    if verify:
        assert replay.tally is not None
        assert (replay.tally.steps, replay.tally.equal_memories) == (25 - first, 25 - first)


@pytest.mark.parametrize(("until", "verify"), [("7ba", False), ("11ba", False), ("14ba", True)])
def test_an_interrupted_replay_goes_on(original, tmp_path, until, verify):
    run, weights = original
    settings = {"save_interval": "7ba" if until != "11ba" else "1ep", "autoresume": True}
    first = again(run, tmp_path, duration=until, **settings)
    first.run(replay=ReplaySelection(log_of(run), verify=verify))
    replay = ReplaySelection(log_of(run), verify=verify)
    assert same(dataclasses.replace(first, duration=DURATION).run(replay=replay), weights)
    if verify:
        assert replay.tally is not None
        assert (replay.tally.steps, replay.tally.agreed) == (25, 25)


def test_durations_in_epochs_mean_the_originals(streams, tmp_path):
    """A schedule over epochs needs to know how long one is, even where the log holds a part of it."""
    run = TinyRun(streams=streams, folder=str(tmp_path), duration="2ep", save_interval="5ba")
    run.run(schedulers=LinearScheduler(alpha_f=0.1, t_max="2ep"))
    replay = ReplaySelection(log_of(run), steps=(0, 15))
    found = again(run, tmp_path / "again").run(replay=replay, schedulers=LinearScheduler(alpha_f=0.1, t_max="2ep"))
    saved = saved_weights(checkpoint_of(run, 15))
    assert same(found, {name: saved[name] for name in found})


def test_the_default_microbatch_is_the_originals(streams, tmp_path):
    run = TinyRun(streams=streams, folder=str(tmp_path), duration="6ba", selection={"keep": 5})
    weights = run.run(device_train_microbatch_size=None)
    replay = ReplaySelection(log_of(run))
    found = again(run, tmp_path / "again").run(replay=replay, device_train_microbatch_size=None)
    assert same(found, weights)


def test_a_collator_that_pads_further_leads_to_the_same_batch(original, tmp_path):
    run, weights = original

    def padded_to_a_multiple_of_16(rows):
        batch = collate(rows)
        more = -batch["input_ids"].shape[1] % 16
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {
            key: torch.nn.functional.pad(value, (0, more), value=fill[key]) if key in fill else value
            for key, value in batch.items()
        }

    replay = ReplaySelection(log_of(run))
    repeated = again(run, tmp_path)
    dataset = UDSStreamingDataset(streams=[Stream(local=s) for s in run.streams], batch_size=8)
    trainer = repeated.trainer(replay=replay)
    trainer.state.set_dataloader(None)
    loader = replay.dataloader(dataset, collate_fn=padded_to_a_multiple_of_16)
    trainer.fit(train_dataloader=loader)
    assert same({n: p for n, p in trainer.state.model.named_parameters()}, weights)
    trainer.close()


def test_only_the_logged_samples_are_read(original, tmp_path, monkeypatch):
    run, _ = original
    read: list[int] = []
    get_item = UDSStreamingDataset.get_item

    def spied(self, sample_id, retry=7):
        read.append(int(sample_id))
        return get_item(self, sample_id, retry)

    monkeypatch.setattr(UDSStreamingDataset, "get_item", spied)
    again(run, tmp_path).run(replay=ReplaySelection(log_of(run), steps=(3, 14), checkpoint=None))
    log = SelectionLog.open(log_of(run))
    assert read == [sample for step in range(3, 14) for sample in log.selected(step)]


# What differs is said -----------------------------------------------------------------------------------------------------


def test_another_model_is_a_re_use_and_says_so(original, tmp_path, caplog):
    run, weights = original
    run = again(run, tmp_path)
    replay = ReplaySelection(log_of(original[0]))
    with caplog.at_level(logging.WARNING):
        found = run.run(replay=replay, seed=6)
    assert not same(found, weights)
    assert replay.differences == ["training seed: was 5, is 6"]
    assert "equal weights are not to be expected: training seed: was 5, is 6" in caplog.text


def test_fresh_weights_on_later_steps_are_a_re_use(original, tmp_path):
    run, _ = original
    replay = ReplaySelection(log_of(run), steps=(12, 17))
    trainer = again(run, tmp_path).trainer(replay=replay)
    trainer.fit()
    assert trainer.state.timestamp.batch.value == 5
    trainer.close()
    assert replay.differences == ["it begins at step 12 without the checkpoint that the run had saved there"]


def test_samples_of_other_lengths_are_a_re_use(original, tmp_path):
    run, _ = original
    replay = ReplaySelection(log_of(run), steps=(0, 3))
    trainer = again(run, tmp_path).trainer(replay=replay)
    loader = replay.dataloader(
        UDSStreamingDataset(streams=[Stream(local=s) for s in run.streams], batch_size=8),
        collate_fn=lambda rows: collate([row | {"input_ids": row["input_ids"][:2]} for row in rows]),
    )
    trainer.fit(train_dataloader=loader)
    trainer.close()
    (line,) = replay.differences
    assert line.startswith("step 0, sample ")
    assert "has 2 tokens, the run logged" in line


def test_a_first_divergence_is_named_with_its_margins(original, tmp_path):
    """The log says that the runner-up was chosen at step 4, by a score of its own: deciding again disagrees, and goes on."""
    run, _ = original
    forged = tmp_path / "forged"
    forge(log_of(run), forged, step=4)
    logged = SelectionLog.open(forged)
    replay = ReplaySelection(forged, verify=True)
    again(run, tmp_path / "again").run(replay=replay)
    tally = replay.tally
    assert tally is not None
    assert tally.steps == 25
    assert tally.agreed < 25
    first = tally.first_divergence
    assert first is not None
    rows = logged.table().to_pylist()
    row = next(r for r in rows if r["step"] == 4 and r["sample_id"] == first["sample_id"])
    assert (first["step"], first["logged_score"], first["was_kept"]) == (4, row["score"], row["selected"])
    assert first["is_kept"] is not first["was_kept"]
    kth = min(r["score"] for r in rows if r["step"] == 4 and r["selected"])
    assert first["logged_margin"] == pytest.approx(row["score"] - kth)
    assert first["new_margin"] < 0 if first["was_kept"] else first["new_margin"] >= 0


def forge(source: Path, target: Path, *, step: int) -> None:
    """Rewrites a log consistently, with the best rejected and the last kept of a step exchanged, scores and all."""
    old = SelectionLog.open(source)
    log_keys = {key: value for key, value in old.run.items() if key != "log"}
    settings = old.run["log"]
    with SelectionLogWriter.create(
        target,
        run=log_keys,
        embedding_dim=settings["embedding_dim"],
        buffer_capacity=settings["buffer_capacity"],
    ) as writer:
        for number in old.steps().tolist():
            rows = old.table().filter(pc.field("step") == number).to_pylist()
            if number == step:
                kept = min((r for r in rows if r["selected"]), key=lambda r: r["score"])
                other = max((r for r in rows if not r["selected"]), key=lambda r: r["score"])
                kept["score"], other["score"] = other["score"], kept["score"]
                kept["selected"], other["selected"] = False, True
                for order, row in enumerate([r for r in rows if r["selected"]]):
                    row["train_order"] = order
                kept["train_order"] = None
            writer.append(number, as_columns(rows))


def as_columns(rows: list[dict]) -> dict[str, np.ndarray]:
    names = [name for name in rows[0] if name not in ("attempt", "step", "rank", "loss")]
    columns = {}
    for name in names:
        values = [row[name] for row in rows]
        if any(value is None for value in values):
            filled = [0 if value is None else value for value in values]
            columns[name] = np.ma.masked_array(np.array(filled, dtype=np.int32), mask=[v is None for v in values])
        else:
            columns[name] = np.array(values)
    return columns


# What cannot be replayed is refused ---------------------------------------------------------------------------------------


def loader_of(replay: ReplaySelection, streams) -> DataLoader:
    dataset = UDSStreamingDataset(streams=[Stream(local=str(s)) for s in streams], batch_size=8)
    return replay.dataloader(dataset, collate_fn=collate)


def test_streams_may_have_moved_but_not_changed(original, tmp_path):
    run, weights = original
    moved = tuple(str(shutil.copytree(stream, tmp_path / Path(stream).name)) for stream in run.streams)
    assert same(again(run, tmp_path / "a", streams=moved).run(replay=ReplaySelection(log_of(run))), weights)
    with pytest.raises(ResumeError, match=r"stream 0: was one \(index .*\), is two"):
        loader_of(ReplaySelection(log_of(run)), moved[::-1])


def test_a_shard_that_changed_is_named_with_its_sample(original, tmp_path):
    """One byte of one sample, so that only its digest tells."""
    run, _ = original
    moved = tuple(str(shutil.copytree(stream, tmp_path / Path(stream).name)) for stream in run.streams)
    sample = SelectionLog.open(log_of(run)).selected(2)[0]
    dataset = UDSStreamingDataset(streams=[Stream(local=s) for s in moved], batch_size=8)
    shard_number, _ = dataset.spanner[sample]
    shard = Path(dataset._shard_path(int(shard_number)))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    read_before = [
        s
        for step in range(25)
        for s in SelectionLog.open(log_of(run)).selected(step)
        if int(dataset.spanner[s][0]) == int(shard_number)
    ]
    with pytest.raises(
        ShardError,
        match=rf"sample {read_before[0]} is not the one that the run trained on: the sha1 of its shard {shard} ",
    ):
        again(run, tmp_path / "a", streams=moved).run(replay=ReplaySelection(log_of(run)))
    unchecked = ReplaySelection(log_of(run), verify_shards=False, steps=(0, 3))
    again(run, tmp_path / "b", streams=moved).run(replay=unchecked)


def test_streams_without_hashes_are_warned_of(tmp_path, caplog):
    with MDSWriter(out=str(tmp_path / "s"), columns={"input_ids": "ndarray:int64"}) as writer:
        for number in range(16):
            writer.write({"input_ids": np.arange(3, 5 + number)})
    run = TinyRun(streams=(str(tmp_path / "s"),), folder=str(tmp_path), duration="2ba")
    weights = run.run()
    with caplog.at_level(logging.WARNING):
        assert same(again(run, tmp_path / "a").run(replay=ReplaySelection(log_of(run))), weights)
    assert (
        "were written without hashes: whether their samples are those that the run saw cannot be checked" in caplog.text
    )


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((0, 26), r"steps 0 to 25 are to be replayed, but the log in .* holds steps 0 to 24"),
        ((30, None), r"steps 30 to 24 are to be replayed"),
        ((7, 7), r"choose steps that it holds"),
    ],
)
def test_steps_that_the_log_does_not_hold(original, steps, message):
    with pytest.raises(ReplayError, match=message):
        ReplaySelection(log_of(original[0]), steps=steps)


def test_an_empty_log_and_no_log(tmp_path):
    with pytest.raises(LogError):
        ReplaySelection(tmp_path / "none")
    SelectionLogWriter.create(tmp_path / "log", run={"run_id": "x"}, embeddings="none").close()
    with pytest.raises(ReplayError, match=r"has no decisions yet, so there is nothing to replay"):
        ReplaySelection(tmp_path / "log")


def test_a_missing_step_is_named(tmp_path):
    with SelectionLogWriter.create(tmp_path / "log", run={"run_id": "x"}, embeddings="none") as writer:
        for step in (0, 1, 3):
            writer.append(
                step,
                {
                    "epoch": np.zeros(1, np.int32),
                    "position": np.zeros(1, np.int32),
                    "epoch_position": np.zeros(1, np.int64),
                    "sample_id": np.zeros(1, np.int64),
                    "tokens": np.ones(1, np.int32),
                    "selected": np.ones(1, bool),
                    "train_order": np.zeros(1, np.int32),
                },
            )
    with pytest.raises(ReplayError, match=r"lacks step 2"):
        ReplaySelection(tmp_path / "log")


def test_settings_that_would_change_the_batches(original):
    run, _ = original
    replay = ReplaySelection(log_of(run))
    dataset = UDSStreamingDataset(streams=[Stream(local=s) for s in run.streams], batch_size=8)
    with pytest.raises(ConfigError, match=r"drop_last, shuffle: the log decides about order and batches"):
        replay.dataloader(dataset, collate_fn=collate, shuffle=True, drop_last=True)


def test_a_loader_of_ones_own(original, tmp_path):
    run, _ = original
    replay = ReplaySelection(log_of(run))
    trainer = again(run, tmp_path).trainer(replay=replay)
    dataset = UDSStreamingDataset(streams=[Stream(local=s) for s in run.streams], batch_size=8)
    with pytest.raises(ConfigError, match=r"is not the one that ReplaySelection.dataloader\(\) made"):
        trainer.fit(train_dataloader=DataLoader(dataset, batch_size=8, collate_fn=collate))
    trainer.close()


def test_a_wrapped_loader_is_the_one(original, tmp_path):
    run, _ = original
    replay = ReplaySelection(log_of(run), steps=(0, 2))
    trainer = again(run, tmp_path).trainer(replay=replay)
    trainer.fit(train_dataloader=DataSpec(loader_of(replay, run.streams)))
    assert trainer.state.timestamp.batch.value == 2
    trainer.close()


def test_a_collator_that_loses_rows(original, tmp_path):
    run, _ = original
    replay = ReplaySelection(log_of(run))
    trainer = again(run, tmp_path).trainer(replay=replay)
    dataset = UDSStreamingDataset(streams=[Stream(local=s) for s in run.streams], batch_size=8)
    loader = replay.dataloader(dataset, collate_fn=lambda rows: collate(rows[::-1]))
    with pytest.raises(
        ReplayError, match=r"step 0: the batch holds the samples .*, but the log names .*, in this order"
    ):
        trainer.fit(train_dataloader=loader)
    trainer.close()


def test_durations_in_tokens_are_refused(original, tmp_path):
    run, _ = original
    with pytest.raises(ConfigError, match=r"max_duration=9000tok: a replay reads fewer samples and tokens"):
        again(run, tmp_path, duration="9000tok").run(replay=ReplaySelection(log_of(run)))


def test_beside_a_selecting_algorithm(original, tmp_path):
    run, _ = original
    replay = ReplaySelection(log_of(run))
    selecting = OnlineBatchSelection(max_seq_len=32)
    with pytest.raises(ConfigError, match=r"beside OnlineBatchSelection, but both decide what is trained on"):
        again(run, tmp_path).trainer(replay=replay, algorithms=[replay, selecting])


def test_a_checkpoint_that_only_the_trainer_was_given(original, tmp_path):
    run, _ = original
    checkpoint = str(checkpoint_of(run, 5))
    with pytest.raises(
        ReplayError, match=r"the Trainer begins at batch 5, but this replay at batch 0: give the checkpoint"
    ):
        again(run, tmp_path).trainer(replay=ReplaySelection(log_of(run)), load_path=checkpoint)
    replay = ReplaySelection(log_of(run), checkpoint=checkpoint)
    with pytest.raises(ReplayError, match=r"begins at batch 0, but this replay at batch 5: give the Trainer load_path"):
        again(run, tmp_path).trainer(replay=replay)


def test_a_checkpoint_of_another_step_or_run(original, streams, tmp_path):
    run, _ = original
    with pytest.raises(ReplayError, match=r"steps from 4 on are to be replayed, but .* was saved before step 5"):
        ReplaySelection(log_of(run), checkpoint=checkpoint_of(run, 5), steps=(4, None))
    other = TinyRun(streams=streams, folder=str(tmp_path), duration="2ba", save_interval="2ba")
    other.run()
    with pytest.raises(ReplayError, match=r"belongs to the log of run \w+, but .* holds run \w+"):
        ReplaySelection(log_of(run), checkpoint=checkpoint_of(other, 2))
    plain = TinyRun(
        streams=streams, folder=str(tmp_path / "plain"), duration="2ba", save_interval="2ba", selection=None
    )
    plain.run()
    with pytest.raises(ReplayError, match=r"holds no state of OnlineBatchSelection"):
        ReplaySelection(log_of(run), checkpoint=checkpoint_of(plain, 2))


def test_a_replays_checkpoint_belongs_to_that_replay(original, tmp_path):
    run, _ = original
    begun = again(run, tmp_path, duration="4ba", save_interval="2ba", autoresume=True)
    begun.run(replay=ReplaySelection(log_of(run)))
    longer = dataclasses.replace(begun, duration="8ba")
    with pytest.raises(ReplayError, match=r"of other steps, or one without verify"):
        longer.run(replay=ReplaySelection(log_of(run), verify=True))
    other = dataclasses.replace(run, folder=str(tmp_path / "other"), duration="8ba", save_interval=None)
    other.run()
    with pytest.raises(ReplayError, match=r"belongs to a replay of run \w+ \(version 2\), but .* holds run \w+"):
        longer.run(replay=ReplaySelection(log_of(other)))


def test_deciding_again_without_the_weights_that_decided(original, tmp_path):
    run, _ = original
    with pytest.raises(ReplayError, match=r"from step 3 on cannot be made again without the weights that made them"):
        again(run, tmp_path).run(replay=ReplaySelection(log_of(run), steps=(3, 6), verify=True))


def test_a_warm_start_is_decided_again_with_the_former_memory(original, streams, tmp_path):
    former, _ = original
    warm = {"warm_start": str(log_of(former))}
    run = TinyRun(streams=streams, folder=str(tmp_path), duration="5ba", selection=warm)
    weights = run.run()
    replay = ReplaySelection(log_of(run), verify=True, warm_start=log_of(former))
    assert same(again(run, tmp_path / "a").run(replay=replay), weights)
    assert replay.tally is not None
    assert replay.tally.equal_memories == 5
    with pytest.raises(ReplayError, match=r"began with the memory of run \w+, without which"):
        again(run, tmp_path / "b").run(replay=ReplaySelection(log_of(run), verify=True))
    other = TinyRun(streams=streams, folder=str(tmp_path / "other"), duration="3ba", save_interval="3ba")
    other.run()
    with pytest.raises(ReplayError, match=r"the run began with another memory than .* ends with"):
        again(run, tmp_path / "c").run(replay=ReplaySelection(log_of(run), verify=True, warm_start=log_of(other)))


def test_a_log_of_an_older_version_says_less_but_is_replayed(streams, tmp_path, monkeypatch):
    """Before run.json told of the loader, the length of an epoch and the candidates per step have to be found out."""
    describe = algorithm.describe_run

    def as_it_was(**facts):
        described = describe(**facts)
        del described["loader"]
        for stream in described["streams"]:
            del stream["per_epoch"]
        return described

    monkeypatch.setattr(algorithm, "describe_run", as_it_was)
    run = TinyRun(streams=streams, folder=str(tmp_path), duration="13ba")
    weights = run.run(device_train_microbatch_size=None)
    for steps in ((0, 13), (0, 5)):
        replay = ReplaySelection(log_of(run), steps=steps)
        loader = loader_of(replay, streams)
        assert (len(loader), loader.batch_size) == (11, 8)
    replay = ReplaySelection(log_of(run))
    assert same(again(run, tmp_path / "a").run(replay=replay, device_train_microbatch_size=None), weights)


def test_the_state_is_plain(original, tmp_path):
    run, _ = original
    trainer = again(run, tmp_path).trainer(replay=(replay := ReplaySelection(log_of(run), verify=True, steps=(0, 2))))
    trainer.fit()
    state = replay.state_dict()
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert json.dumps(loaded["tally"]) == json.dumps(replay.tally.as_dict())  # type: ignore[union-attr]
    trainer.close()
