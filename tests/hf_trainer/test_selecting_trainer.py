"""SelectingTrainer: what it chooses and trains on, what it records, what it leaves alone, what it refuses."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from datasets import Dataset as HFDataset
from hf_runs import HFRun, Rows, collate, llama, same, weights_of
from jobs import udsstream
from streaming import MDSWriter
from torch.utils.data import IterableDataset
from transformers.trainer import Trainer
from transformers.trainer_callback import TrainerCallback

from udsstream import OnlineBatchSelection, SelectionLog, UDSStreamingDataset
from udsstream.errors import ConfigError, LogExistsError, ModelError, RankError, ScoreError
from udsstream.hf_trainer.batches import cut, joined
from udsstream.hf_trainer.trainer import SelectingTrainer

ACCUMULATING = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 4}
"""43 rows: 11 batches, 3 updates an epoch, the last of 3 batches with 11 rows."""


class Watching(SelectingTrainer):
    """Keeps each update's candidates, their logits from the whole model, and the parts that are trained on."""

    def __init__(self, **settings: Any) -> None:
        self.candidates: list[list[list[int]]] = []
        self.logits: list[list[np.ndarray]] = []
        self.parts: list[list[dict[str, torch.Tensor]]] = []
        super().__init__(**settings)

    def get_batch_samples(self, epoch_iterator, num_batches, *args):
        batches = list(itertools.islice(epoch_iterator, num_batches))
        rows = [
            row[mask.bool()]
            for batch in batches
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert self.model is not None
        was = self.model.training
        self.model.eval()
        with torch.no_grad():
            self.logits.append([self.model(input_ids=row[None]).logits[0].double().numpy() for row in rows])
        self.model.train(was)
        self.candidates.append([row.tolist() for row in rows])
        found, items = super().get_batch_samples(iter(batches), num_batches, *args)
        self.parts.append(found)
        return found, items


def watched(run: HFRun, **overrides: Any) -> Watching:
    trainer = run.trainer(Watching, **overrides)
    trainer.train()
    return trainer


def trained_on(parts: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [
        row[mask.bool()].tolist()
        for part in parts
        for row, mask in zip(part["input_ids"], part["attention_mask"], strict=True)
    ]


def audit(monkeypatch, capsys, run: HFRun) -> tuple[int, str]:
    code, out, err = udsstream(monkeypatch, capsys, "audit", str(run.log_dir))
    return code, out + err


# What is chosen ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulating", [False, True])
def test_it_chooses_what_the_logits_say_and_trains_on_that(tmp_path, monkeypatch, capsys, accumulating):
    """Against float64 logits while the weights change: the score, the memory, the k best; an epoch's end included."""
    run = HFRun(folder=str(tmp_path), arguments=ACCUMULATING if accumulating else {"max_steps": 8})
    trainer = watched(run)
    assert trainer._run is not None
    projection, alpha = trainer._run.selector.projection, trainer._run.selector.alpha
    gammas = oracles.gamma(projection.vocabulary), oracles.gamma(projection.tokens)
    memory, rows = oracles.Fifo(13), Rows().tokens
    table = SelectionLog.open(run.log_dir).table().to_pandas()
    sizes = [16, 16, 11, 16] if accumulating else [8, 8, 8, 8, 8, 3, 8, 8]
    for step, (candidates, logits, parts) in enumerate(
        zip(trainer.candidates, trainer.logits, trainer.parts, strict=True)
    ):
        logged = table[table["step"] == step]
        assert [rows[sample_id] for sample_id in logged["sample_id"]] == candidates
        assert len(candidates) == sizes[step]
        intra = [oracles.nuclear_norm(matrix) for matrix in logits]
        embeddings = [oracles.embedding(matrix, *gammas) for matrix in logits]
        inter = [oracles.mean_distance(z, memory.rows) for z in embeddings]
        np.testing.assert_allclose(logged["intra"], intra, rtol=2e-5)
        np.testing.assert_allclose(logged["inter"], inter, rtol=2e-5)
        kept = oracles.top_k(np.array(intra) + alpha * np.array(inter), max(1, int(0.25 * len(candidates) + 0.5)))
        assert np.flatnonzero(logged["selected"]).tolist() == kept
        memory.push([embeddings[place] for place in kept])
        assert trained_on(parts) == [candidates[place] for place in kept]
        assert all(part["attention_mask"].any(0).all() for part in parts if len(part["input_ids"]))  # trimmed
        assert all("sample_id" not in part for part in parts)
        assert len(parts) == (-(-len(candidates) // 4) if accumulating else 1)
        assert logged["epoch"].unique().tolist() == [step // (3 if accumulating else 6)]
    assert audit(monkeypatch, capsys, run)[0] == 0


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("max_loss", {}),
        ("greats", {"validation": [collate([{"input_ids": row} for row in Rows(5, seed=9).tokens])]}),
        ("random", {"keep_tokens": 40}),
        ("rho_loss", {"reference": dict.fromkeys(range(43), 1.5)}),
    ],
)
def test_every_method_is_recorded_so_that_an_audit_finds_nothing(tmp_path, monkeypatch, capsys, method, more):
    run = HFRun(folder=str(tmp_path), selection={"method": method, **more}, arguments={"max_steps": 7})
    trainer = watched(run)
    code, said = audit(monkeypatch, capsys, run)
    assert code == 0, said
    table = SelectionLog.open(run.log_dir).table().to_pandas()
    for step, parts in enumerate(trainer.parts):
        kept = table[(table["step"] == step) & table["selected"]]["sample_id"]
        assert trained_on(parts) == [Rows().tokens[sample_id] for sample_id in kept]


def test_the_gradient_is_that_of_the_mean_over_the_kept_tokens(tmp_path):
    """However they are cut into parts: with plain SGD, one update moves the weights by the gradient."""
    arguments = ACCUMULATING | {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    run = HFRun(folder=str(tmp_path), dropout=0.0, selection={"keep": 7}, arguments=arguments)
    before = weights_of(Trainer(model=llama(), args=run.training_arguments()))
    trainer = watched(run)
    assert [len(part["input_ids"]) for part in trainer.parts[0]] == [2, 2, 2, 1]
    model = llama(dropout=0.0)
    total, labels = torch.zeros(()), 0
    for tokens in trained_on(trainer.parts[0]):
        ids = torch.tensor([tokens])
        logits = model(input_ids=ids).logits
        total = total + torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        labels += len(tokens)  # as the Trainer counts: all labels that are not ignored
    (total / labels).backward()
    after = weights_of(trainer)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(before[name] - after[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_a_part_without_rows_adds_nothing(tmp_path):
    """Fewer rows than parts: the others are empty, and the update is the same as with one batch as large as all."""
    one = HFRun(
        folder=str(tmp_path / "one"), dropout=0.0, selection={"keep": 2}, arguments={"per_device_train_batch_size": 16}
    )
    four = dataclasses.replace(one, folder=str(tmp_path / "four"), arguments=ACCUMULATING)
    for run in (one, four):
        # Adam divides by the gradient's size: it would hide a wrong scale, and show rounding where a gradient is nearly 0.
        run.arguments.update(max_steps=2, optim="sgd", learning_rate=0.1)
    trainer = watched(four)
    assert [len(part["input_ids"]) for part in trainer.parts[0]] == [1, 1, 0, 0]
    expected = one.run()
    for name, weight in weights_of(trainer).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("evaluated", [False, True])
def test_keeping_all_is_training_without_it(tmp_path, evaluated):
    """Dropout on: scoring draws no random number; neither does evaluating, which a plain Trainer lets training notice."""

    def unpadded(rows):
        return collate(rows) if len(rows) == 1 else {k: v[:, : _longest(rows)] for k, v in collate(rows).items()}

    def _longest(rows):
        return max(len(row["input_ids"]) for row in rows)

    plain = HFRun(folder=str(tmp_path / "plain"), selection=None, arguments={"max_steps": 8})
    everything = HFRun(folder=str(tmp_path / "all"), selection={"keep": 1.0}, arguments={"max_steps": 8})
    chosen = HFRun(folder=str(tmp_path / "chosen"), arguments={"max_steps": 8})
    more: dict[str, Any] = {"data_collator": unpadded}
    evaluating = more
    if evaluated:
        everything.arguments.update(eval_strategy="steps", eval_steps=3)
        evaluating = more | {"eval_dataset": Rows(9, seed=4)}
    expected = plain.run(**more)
    assert same(everything.run(**evaluating), expected)
    if not evaluated:
        assert not same(chosen.run(**more), expected)


def test_where_selection_is_off_the_batches_stay_as_they_are(tmp_path, monkeypatch, capsys):
    run = HFRun(
        folder=str(tmp_path), selection={"start": "2ba", "interrupt": 4}, arguments=ACCUMULATING | {"max_steps": 6}
    )
    trainer = watched(run)
    # updates 0 and 1 come before the start, 5 is the third of its epoch: only every fourth would be whole
    for step in range(6):
        kept = len(trained_on(trainer.parts[step]))
        assert (kept == len(trainer.candidates[step])) == (step < 2), step
    assert all(part["input_ids"].shape[1] % 4 == 0 for part in trainer.parts[0])  # padding is the collator's
    assert audit(monkeypatch, capsys, run)[0] == 0


def test_batches_are_joined_and_cut_again():
    """Odd numbers; padding on either side; what belongs to no row is carried along."""
    right = collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}]) | {"sample_id": torch.tensor([4, 9])}
    wide = collate([{"input_ids": list(range(3, 12))}]) | {"sample_id": torch.tensor([2])}
    whole = joined([right, wide], 16)
    assert whole["sample_id"].tolist() == [4, 9, 2]
    assert whole["input_ids"].tolist() == [[5, 6, 7] + [2] * 6, [8] + [2] * 8, list(range(3, 12))]
    parts = cut(whole, [0, 1, 2], 2)
    assert [part["sample_id"].tolist() for part in parts] == [[4, 9], [2]]
    assert parts[0]["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert [len(part["input_ids"]) for part in cut(whole, [1], 3)] == [1, 0, 0]
    assert joined([right], 16) is right


# Which sample is which --------------------------------------------------------------------------------------------------


def test_rows_keep_the_ids_that_they_have(tmp_path, monkeypatch, capsys):
    """A column of Hugging Face's `datasets`, which the Trainer would remove since the model does not name it."""
    rows = HFDataset.from_dict(
        {"input_ids": Rows().tokens, "sample_id": [1000 + 7 * i for i in range(43)], "note": ["x"] * 43}
    )

    def keeping(features):
        return collate(features) | {"sample_id": torch.tensor([feature["sample_id"] for feature in features])}

    run = HFRun(folder=str(tmp_path), arguments={"max_steps": 2})
    trainer = watched(run, train_dataset=rows, data_collator=keeping)
    ids = SelectionLog.open(run.log_dir).table()["sample_id"].to_pylist()
    assert [Rows().tokens[(i - 1000) // 7] for i in ids] == [row for step in trainer.candidates for row in step]
    assert audit(monkeypatch, capsys, run)[0] == 0


def test_rows_without_ids_are_named_by_their_numbers_and_the_data_set_is_described(tmp_path):
    rows = HFDataset.from_dict({"input_ids": Rows().tokens})
    run = HFRun(folder=str(tmp_path), arguments={"max_steps": 1})
    run.run(train_dataset=rows)
    described = SelectionLog.open(run.log_dir).run
    (stream,) = described["streams"]
    assert (stream["format"], stream["samples"], stream["per_epoch"]) == ("rows", 43, 43)
    assert described["loader"] == {
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "batches_per_epoch": 6,
        "max_duration": "1ba",
        "canonical_nodes": None,
        "sample_ids": "position",
        "sampler": "SeedableRandomSampler",
    }
    assert described["trainer"] == "transformers.Trainer"


def test_tokens_name_samples_when_asked_to(tmp_path):
    run = HFRun(folder=str(tmp_path), selection={"sample_ids": "content-hash"}, arguments={"max_steps": 2})
    trainer = watched(run)
    logged = SelectionLog.open(run.log_dir)
    assert logged.run["loader"]["sample_ids"] == "content-hash"
    ids = logged.table()["sample_id"].to_pylist()
    rows = [tuple(row) for step in trainer.candidates for row in step]
    assert len(set(ids)) == len(set(rows))
    assert min(ids) > 43


@pytest.fixture
def stream(tmp_path) -> Path:
    with MDSWriter(
        out=str(tmp_path / "stream"), columns={"input_ids": "ndarray:int64"}, hashes=["sha1"], size_limit=2048
    ) as writer:
        for tokens in Rows().tokens:
            writer.write({"input_ids": np.array(tokens)})
    return tmp_path / "stream"


def test_a_stream_is_read_by_number_and_what_was_chosen_becomes_a_data_set(tmp_path, stream, monkeypatch, capsys):
    """The log tells shards, so that auditing the data, the report and curating work as after training with Composer."""
    dataset = UDSStreamingDataset(local=str(stream), batch_size=8)
    run = HFRun(folder=str(tmp_path / "run"), arguments={"max_steps": 7})
    trainer = watched(run, train_dataset=dataset)
    table = SelectionLog.open(run.log_dir).table().to_pandas()
    assert [Rows().tokens[i] for i in table["sample_id"]] == [row for step in trainer.candidates for row in step]
    assert table["shard"].max() > 0
    for arguments in (
        ("audit", str(run.log_dir), "--data"),
        ("log", str(run.log_dir)),
        ("report", str(run.log_dir)),
        ("curate", "--from-log", str(run.log_dir), "--out", str(tmp_path / "best"), "--format", "parquet"),
    ):
        code, out, err = udsstream(monkeypatch, capsys, *arguments)
        assert code == 0, out + err
    assert (tmp_path / "best" / "croissant.json").exists()


def test_of_rows_the_tools_say_what_they_cannot_read(tmp_path, monkeypatch, capsys):
    run = HFRun(folder=str(tmp_path / "run"), arguments={"max_steps": 7})
    run.run()
    for arguments in (
        ("log", str(run.log_dir)),
        ("log", str(run.log_dir), "--step", "3"),
        ("report", str(run.log_dir)),
    ):
        code, out, err = udsstream(monkeypatch, capsys, *arguments)
        assert code == 0, out + err
    code, out, err = udsstream(monkeypatch, capsys, "audit", str(run.log_dir), "--data")
    assert (code, "its rows were read from a data set of the format rows" in out) == (0, True), out + err
    code, out, err = udsstream(
        monkeypatch,
        capsys,
        "curate",
        "--from-log",
        str(run.log_dir),
        "--out",
        str(tmp_path / "best"),
        "--format",
        "jsonl",
    )
    assert code != 0
    assert "of the format 'rows'" in err


# What the Trainer is told -----------------------------------------------------------------------------------------------


def test_metrics_come_with_the_loss(tmp_path):
    run = HFRun(folder=str(tmp_path), arguments={"max_steps": 4})
    trainer = run.trainer()
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    for entry in logged:
        assert entry["selection/kept"] == 2
        assert 0 < entry["selection/kept_token_share"] < 1
        assert -1 <= entry["selection/score_length_correlation"] <= 1
        assert "selection/novelty" in entry
    assert logged[1]["selection/tokens_saved"] > logged[0]["selection/tokens_saved"]
    assert (run.log_dir / "timings.jsonl").read_text().count("\n") == 4


def test_its_settings_are_those_of_the_composer_adapter():
    ours, theirs = (inspect.signature(cls).parameters for cls in (SelectingTrainer, OnlineBatchSelection))
    known = {name: parameter for name, parameter in ours.items() if name not in ("args", "kwargs")}
    assert set(theirs) - set(known) == {"upload_log"}
    assert all(parameter.default == theirs[name].default for name, parameter in known.items())


def test_a_trainer_of_ones_own_selects_too(tmp_path):
    """`class Mine(SelectingTrainer, OnesOwn)`: what the other one overrides still runs, on the kept rows."""
    seen: list[int] = []

    class OnesOwn(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(len(inputs["input_ids"]))
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Mine(SelectingTrainer, OnesOwn):
        pass

    HFRun(folder=str(tmp_path), arguments={"max_steps": 3}).trainer(Mine).train()
    assert seen == [2, 2, 2]


def test_lora_and_bfloat16_are_scored_as_they_are_trained(tmp_path, monkeypatch, capsys):
    run = HFRun(folder=str(tmp_path), lora=True, arguments={"max_steps": 3, "bf16": True})
    trainer = run.trainer()
    trainer.train()
    assert trainer._run.selector._measurer.form.form == "hidden_space"
    assert 1e-5 < trainer._run.selector._measurer.form.relative_error < 3e-2  # bfloat16 was on
    assert audit(monkeypatch, capsys, run)[0] == 0


# What is refused --------------------------------------------------------------------------------------------------------


def test_settings_that_cannot_be_used(tmp_path, monkeypatch):
    run = HFRun(folder=str(tmp_path))
    with pytest.raises(ConfigError, match=r"keep: 9 .* an update has only 8 \(1 batches of 8\)"):
        run.trainer(keep=9)
    with pytest.raises(ConfigError, match=r"keep: the fraction 1\.5"):
        run.trainer(keep=1.5)
    with pytest.raises(ConfigError, match="auto_find_batch_size=True starts again"):
        run.trainer(args=run.training_arguments(auto_find_batch_size=True))
    with pytest.raises(ConfigError, match="train them one by one"):
        run.trainer().train(trial={"learning_rate": 1e-3})
    with pytest.raises(ModelError, match="head='nothing' names no module of LlamaForCausalLM"):
        run.trainer(head="nothing").train()
    monkeypatch.setattr("transformers.training_args.TrainingArguments.world_size", 2)
    with pytest.raises(RankError, match="set up for 2 processes, but here one process chooses"):
        run.trainer()


def test_a_data_set_without_numbers(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            yield {"input_ids": [3, 4]}

    with pytest.raises(ConfigError, match="train_dataset is a Endless, which can only be iterated over"):
        HFRun(folder=str(tmp_path)).run(train_dataset=Endless())


def test_another_run_s_log_is_left_alone_and_the_own_is_begun_anew_if_asked_to(tmp_path):
    run = HFRun(folder=str(tmp_path), arguments={"max_steps": 2})
    first = run.run()
    with pytest.raises(LogExistsError):
        run.run()
    assert same(run.run(autoresume=True), first)
    log = SelectionLog.open(run.log_dir)
    assert log.table()["attempt"].unique().to_pylist() == [1]
    log.verify()


def test_a_loss_that_is_a_mean_over_each_part_needs_a_row_in_each(tmp_path):
    class Plain(torch.nn.Module):
        """A model whose forward takes no num_items_in_batch."""

        def __init__(self) -> None:
            super().__init__()
            self.model = llama(dropout=0.0)
            self.config = self.model.config

        def forward(self, input_ids, attention_mask=None, labels=None):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    run = HFRun(folder=str(tmp_path / "a"), selection={"keep": 4}, arguments=ACCUMULATING | {"max_steps": 2})
    run.run(model=Plain())
    with pytest.raises(ConfigError, match="kept 3 rows, fewer than the 4 batches that it accumulates over"):
        dataclasses.replace(run, folder=str(tmp_path / "b"), selection={"keep": 3}).run(model=Plain())


def test_a_model_that_diverged_ends_the_run_and_gives_the_log_back(tmp_path):
    class Diverges(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            assert model is not None
            if state.global_step == 2:
                torch.nn.init.constant_(model.lm_head.weight, float("nan"))

    run = HFRun(folder=str(tmp_path))
    with pytest.raises(ScoreError, match="not finite"):
        run.run(callbacks=[Diverges()])
    log = SelectionLog.open(run.log_dir)
    assert [int(step) for step in log.steps()] == [0, 1]
    log.verify()
