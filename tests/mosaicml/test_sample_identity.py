"""Ids where the data loader has none: from a StreamingDataset of any class, from the rows of a map-style data set, from the tokens."""

from __future__ import annotations

import hashlib
import random

import datasets
import numpy as np
import pytest
import torch
from composer.loggers import InMemoryLogger
from streaming import StreamingDataset
from tiny import TinyRun, collate, write_stream
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import BatchEncoding

from udsstream import SelectionLog, UDSStreamingDataset
from udsstream.audit.run import audit
from udsstream.errors import ConfigError, DataError, MissingSampleIdError, ResumeError, ShardError
from udsstream.mosaicml.sample_identity import NumberedRows, SampleIdentity, check_same_ids, content_ids


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    return str(write_stream(tmp_path_factory.mktemp("streams") / "one"))


def forgetful(rows):
    """A collator that knows nothing of ids."""
    batch = collate([{"input_ids": row["input_ids"], "sample_id": 0} for row in rows])
    del batch["sample_id"]
    return batch


class Fields(StreamingDataset):
    """A user's class as llm-foundry's are: makes another object of the raw sample, and objects to keys that it does not know."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        assert list(sample) == ["input_ids"]
        return {"input_ids": sample["input_ids"]}


class Tensors(StreamingDataset):
    """Its samples are no mappings."""

    def __getitem__(self, index):
        return torch.from_numpy(super().__getitem__(index)["input_ids"].copy())


def of_tensors(rows):
    return forgetful([{"input_ids": row.numpy()} for row in rows])


class Rows(Dataset):
    def __init__(self, count=23, **more):
        self.rows = [{"input_ids": [3 + i % 7] * (3 + i % 11)} | more for i in range(count)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def table(count=61) -> datasets.Dataset:
    rng = np.random.default_rng(0)
    return datasets.Dataset.from_dict({"input_ids": [rng.integers(3, 97, 3 + i % 20).tolist() for i in range(count)]})


def attached(loader) -> SampleIdentity:
    identity = SampleIdentity()
    identity.attach(loader)
    return identity


# Data sets ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "collator"), [(Fields, forgetful), (Tensors, of_tensors)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_streaming_data_set_of_any_class_tells_its_ids(stream, cls, collator, workers):
    dataset = cls(local=stream, batch_size=8, shuffle=True, num_canonical_nodes=1)
    loader = DataLoader(dataset, batch_size=8, collate_fn=collator, num_workers=workers)
    identity = attached(loader)
    assert identity.source == "dataset"
    assert isinstance(dataset, cls)
    seen = []
    for batch in loader:
        for row, mask, number in zip(
            batch["input_ids"], batch["attention_mask"], batch["sample_id"].tolist(), strict=True
        ):
            np.testing.assert_array_equal(row[mask.bool()], dataset.get_item(number)["input_ids"])
            seen.append(number)
    assert sorted(seen) == list(range(83))


def test_a_data_set_that_was_made_to_tell_ids_does_not_end_early(tmp_path):
    folder = write_stream(tmp_path / "s")
    dataset = Fields(local=str(folder), batch_size=8)
    loader = DataLoader(dataset, batch_size=8, collate_fn=forgetful)
    attached(loader)
    (folder / "shard.00002.mds").unlink()
    with pytest.raises(ShardError, match=r"shard\.00002\.mds"):
        list(loader)


def test_everything_is_put_back(stream):
    dataset = Fields(local=stream, batch_size=8)
    streamed = DataLoader(dataset, batch_size=8, collate_fn=forgetful)
    rows = Rows()
    numbered = DataLoader(rows, batch_size=8, collate_fn=forgetful)
    for loader in (streamed, numbered):
        identity = SampleIdentity()
        identity.attach(loader)
        identity.attach(loader)  # AFTER_LOAD, then FIT_START
        assert "sample_id" in next(iter(loader))
        identity.detach()
        assert loader.collate_fn is forgetful
    assert type(dataset) is Fields
    assert numbered.dataset is rows
    assert "sample_id" not in next(iter(numbered))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rows", [Rows(), table(23)], ids=["torch", "datasets"])
def test_rows_of_a_map_style_data_set_have_their_numbers(rows, workers):
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(
        rows, batch_size=4, shuffle=True, generator=generator, collate_fn=forgetful, num_workers=workers
    )
    assert attached(loader).source == "position"
    seen = []
    for batch in loader:
        for row, mask, number in zip(
            batch["input_ids"], batch["attention_mask"], batch["sample_id"].tolist(), strict=True
        ):
            assert row[mask.bool()].tolist() == rows[number]["input_ids"]
            seen.append(number)
    assert sorted(seen) == list(range(23))
    assert seen != sorted(seen)


def test_a_data_set_s_own_attributes_stay_in_reach():
    wrapped = NumberedRows(table(5))
    assert wrapped.column_names == ["input_ids"]
    assert len(wrapped) == 5
    assert not hasattr(wrapped, "state_dict")  # Composer: "this data set resumes by itself"


@pytest.mark.parametrize("rows", [Rows(sample_id=70), table(3).add_column("sample_id", [70, 71, 72])])
def test_ids_that_the_rows_have_count(rows):
    loader = DataLoader(rows, batch_size=3, collate_fn=collate)
    assert attached(loader).source == "dataset"
    assert loader.dataset is rows
    assert next(iter(loader))["sample_id"][0] == 70


def test_looking_at_a_row_draws_nothing():
    class Augmented(Rows):
        def __getitem__(self, index):
            random.random(), np.random.rand(), torch.rand(1)
            return super().__getitem__(index)

    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    before = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    attached(DataLoader(Augmented(), batch_size=2, collate_fn=forgetful))
    assert (torch.rand(1), np.random.rand(), random.random()) == before


def test_loaders_that_tell_ids_are_left_alone(stream):
    loader = DataLoader(UDSStreamingDataset(local=stream, batch_size=8), batch_size=8, collate_fn=collate)
    for given in (loader, [{"input_ids": torch.ones(2, 3)}], None):
        assert attached(given).source == "dataset"
    assert loader.collate_fn is collate

    class Endless(IterableDataset):
        def __iter__(self):
            return iter(Rows().rows)

    endless = DataLoader(Endless(), batch_size=2, collate_fn=forgetful)
    attached(endless)
    assert endless.collate_fn is forgetful


def test_the_digest_tells_data_sets_apart():
    def digest(dataset):
        (identity,) = NumberedRows(dataset).stream_identities()
        return identity.index_sha256

    known = digest(table())
    assert known == digest(table())
    assert known != digest(table(60))
    changed = table().to_dict()["input_ids"]
    changed[0][0] += 1
    assert known != digest(datasets.Dataset.from_dict({"input_ids": changed}))
    assert digest(datasets.Dataset.from_dict({"a": [[1], [2, 3]]})) != digest(
        datasets.Dataset.from_dict({"a": [[1, 2], [3]]})
    )
    assert digest(Rows()) != digest(Rows(24))


# Collators ---------------------------------------------------------------------------------------------------------------


class Wrapper:
    def __init__(self, base_collator):
        self.base_collator = base_collator


class BinPackCollator(Wrapper):
    """Named as llm-foundry's."""


def test_packing_is_refused_before_training(stream):
    loader = DataLoader(
        Fields(local=stream, batch_size=8), batch_size=8, collate_fn=Wrapper(BinPackCollator(forgetful))
    )
    for setting in ("auto", "content-hash"):
        with pytest.raises(ConfigError, match=r"packs several samples into one row .*leave packing_ratio out"):
            SampleIdentity(setting).attach(loader)


def test_a_collator_that_changes_the_number_of_rows_is_refused():
    loader = DataLoader(Rows(), batch_size=4, collate_fn=lambda rows: forgetful(rows[:3]))
    attached(loader)
    with pytest.raises(DataError, match=r"made 3 rows of 4 samples.*no packing"):
        next(iter(loader))
    loader = DataLoader(Rows(), batch_size=4, collate_fn=lambda rows: tuple(rows))
    attached(loader)
    with pytest.raises(DataError, match=r"returns a tuple"):
        next(iter(loader))


def test_a_batch_of_the_tokenizer_s_own_kind_is_a_mapping_too():
    loader = DataLoader(Rows(), batch_size=4, collate_fn=lambda rows: BatchEncoding(forgetful(rows)))
    attached(loader)
    assert next(iter(loader))["sample_id"].tolist() == [0, 1, 2, 3]


# Content ids -------------------------------------------------------------------------------------------------------------


def test_content_ids_are_those_of_the_definition_whatever_the_padding():
    texts = [[5, 6, 7], [9], [5, 6, 7], [5, 6]]
    by_hand = [
        int.from_bytes(hashlib.sha256(np.array(text, "<i8").tobytes()).digest()[:8], "big") // 2 for text in texts
    ]
    for left in (False, True):
        ids, mask = torch.full((4, 6), 1), torch.zeros(4, 6, dtype=torch.int64)
        for row, text in enumerate(texts):
            place = slice(6 - len(text), 6) if left else slice(0, len(text))
            ids[row, place] = torch.tensor(text)
            mask[row, place] = 1
        found = content_ids({"input_ids": ids, "attention_mask": mask})
        assert found == by_hand
        assert found == content_ids({"input_ids": ids.int(), "attention_mask": mask.bool()})
    assert by_hand[0] == by_hand[2]
    assert len(set(by_hand)) == 3
    assert all(0 <= number < 1 << 63 for number in by_hand)


def test_an_unknown_setting_is_refused():
    with pytest.raises(ConfigError, match=r"sample_ids: 'hash' is none of auto, content-hash"):
        SampleIdentity("hash")  # type: ignore[arg-type]


# In a run ----------------------------------------------------------------------------------------------------------------


def loader_of(kind: str, stream: str, workers: int = 0) -> DataLoader:
    if kind == "dataset":
        dataset = Fields(local=stream, batch_size=8, shuffle=True, num_canonical_nodes=1)
        return DataLoader(dataset, batch_size=8, collate_fn=forgetful, num_workers=workers)
    rows = table()
    if kind == "position":
        order = torch.utils.data.distributed.DistributedSampler(rows, num_replicas=1, rank=0, shuffle=True, seed=1)
        return DataLoader(rows, batch_size=8, collate_fn=forgetful, sampler=order, drop_last=True, num_workers=workers)
    return DataLoader(rows, batch_size=8, collate_fn=forgetful, drop_last=True)


@pytest.mark.parametrize("kind", ["dataset", "position", "content-hash"])
def test_the_log_says_where_ids_come_from_and_is_audited(stream, tmp_path, kind):
    setting = "content-hash" if kind == "content-hash" else "auto"
    run = TinyRun(streams=(stream,), folder=str(tmp_path), duration="2ep", selection={"sample_ids": setting})
    logger = InMemoryLogger()
    loader = loader_of(kind, stream)
    run.run(train_dataloader=loader, loggers=[logger])
    log = SelectionLog.open(tmp_path / "log")
    assert log.run["loader"]["sample_ids"] == kind
    report = audit(tmp_path / "log")
    assert report.findings == ()
    rows = log.table(columns=["sample_id", "stream", "shard", "tokens", "epoch"])
    ids = rows["sample_id"].to_numpy()
    if kind == "dataset":
        assert rows["shard"].null_count == 0
    elif kind == "position":
        assert rows["stream"].to_pylist() == [0] * len(ids)
        assert rows["shard"].null_count == len(ids)
        assert log.run["streams"][0]["format"] == "rows"
        assert [3 + i % 20 for i in ids] == rows["tokens"].to_pylist()
    else:
        assert log.run["streams"] == []
        assert set(ids[: len(ids) // 2]) == set(ids[len(ids) // 2 :])


@pytest.mark.parametrize("stop", [3, 7])
@pytest.mark.parametrize("kind", ["dataset", "position"])
def test_a_run_goes_on_as_if_it_had_not_been_interrupted(stream, tmp_path, kind, stop):
    """7 batches an epoch (11 of the stream): in the middle of an epoch, and at the end of one."""
    stop = 11 if (kind, stop) == ("dataset", 7) else stop

    def train(folder, duration, resume=False):
        run = TinyRun(
            streams=(stream,), folder=str(folder), duration="17ba", save_interval=f"{stop}ba", autoresume=True
        )
        return run.run(train_dataloader=loader_of(kind, stream), max_duration=duration)

    whole = train(tmp_path / "whole", "17ba")
    train(tmp_path / "cut", f"{stop}ba")
    resumed = train(tmp_path / "cut", "17ba")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    columns = ["step", "sample_id", "score", "selected"]
    first, second = (SelectionLog.open(tmp_path / name / "log").table(columns=columns) for name in ("whole", "cut"))
    assert first.equals(second)


def test_going_on_with_other_ids_is_refused(stream, tmp_path):
    run = TinyRun(streams=(stream,), folder=str(tmp_path), duration="4ba", save_interval="4ba", autoresume=True)
    run.run(train_dataloader=loader_of("position", stream))
    with pytest.raises(ResumeError, match=r"named its samples by position, this one does by content-hash"):
        TinyRun(
            streams=(stream,),
            folder=str(tmp_path),
            save_interval="4ba",
            autoresume=True,
            selection={"sample_ids": "content-hash"},
        ).run(train_dataloader=loader_of("content-hash", stream))
    check_same_ids("dataset", "dataset")


def test_a_loader_that_tells_nothing_is_refused_with_what_to_do(stream, tmp_path):
    batches = [forgetful(Rows().rows[:8])]
    with pytest.raises(MissingSampleIdError, match=r"sample_ids=\"content-hash\""):
        TinyRun(streams=(stream,), folder=str(tmp_path), duration="1ba").run(train_dataloader=batches)
