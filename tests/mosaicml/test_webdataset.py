"""Tar shards of WebDataset as a training source: ids, order, resuming, replay, audit; and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import random
import tarfile
from pathlib import Path
from typing import Any

import launch
import numpy as np
import pyarrow as pa
import pytest
import torch
import webdataset
from composer import Trainer
from composer.utils import dist, reproducibility
from tiny import VOCABULARY, collate, llama
from torch.utils.data import DataLoader

from udsstream import OnlineBatchSelection, ReplaySelection, SelectionLog
from udsstream.audit.run import audit
from udsstream.errors import ConfigError, DataError, ResumeError, ShardError
from udsstream.mosaicml.webdataset import UDSWebDataset, decode_member, epoch_order
from udsstream.mosaicml.webdataset_index import INDEX, OFFSETS

SAMPLES = 43


def member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_shards(folder: Path, samples: int = SAMPLES, per_shard: int = 10, *, seed: int = 0) -> Path:
    """Shards of samples with a JSON list of token ids and a text, 3 to 24 tokens each."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for first in range(0, samples, per_shard):
        with tarfile.open(folder / f"part-{first // per_shard:03}.tar", "w") as tar:
            for number in range(first, min(samples, first + per_shard)):
                tokens = rng.integers(3, VOCABULARY, size=rng.integers(3, 25)).tolist()
                member(tar, f"{number % per_shard:04}.tokens.json", json.dumps(tokens).encode())
                member(tar, f"{number % per_shard:04}.txt", f"sample {number} — ü".encode())
    return folder


class Tokens(UDSWebDataset):
    """As a user would write it: from members to what the collator takes."""

    def get_item(self, sample_id: int) -> dict[str, Any]:
        return {"input_ids": super().get_item(sample_id)["tokens.json"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(write_shards(tmp_path_factory.mktemp("shards") / "train"))


def epochs_of(dataset: UDSWebDataset, epochs: int, **loading: Any) -> list[list[list[int]]]:
    """Ids of each batch of each epoch."""
    workers = loading.get("num_workers", 0)
    loader = DataLoader(
        dataset, batch_size=dataset.batch_size, collate_fn=_ids, multiprocessing_context="fork" if workers else None,
        **loading,
    )  # fmt: skip
    return [list(loader) for _ in range(epochs)]


def _ids(rows: list[dict[str, Any]]) -> list[int]:
    return [row["sample_id"] for row in rows]


# Samples and ids ----------------------------------------------------------------------------------------------------------


def test_samples_are_those_that_webdataset_reads(folder, tmp_path):
    odd = tmp_path / "odd"
    odd.mkdir()
    with tarfile.open(odd / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member(tar, "__meta__/ignored.txt", b"?")
        member(tar, "no extension", b"?")
        member(tar, "d/1.TXT", "Übung".encode())
        member(tar, "d/1.cls", b"7")
        member(tar, "x" * 300 + ".prompt.txt", b"")  # a name with a header of its own
        member(tar, "d/3.bin", bytes(range(256)) * 9)
    ours = UDSWebDataset([folder, odd], batch_size=4, shuffle=False)
    urls = [str(path) for place in (Path(folder), odd) for path in sorted(place.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(ours) == len(theirs) == SAMPLES + 3
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine == {k: v for k, v in other.items() if k not in ("__url__", "__local_path__")} | {
            "sample_id": number
        }
    assert ours[SAMPLES]["txt"] == "Übung"
    assert ours[SAMPLES]["cls"] == 7


def test_each_id_is_one_place(folder):
    dataset = UDSWebDataset(folder, batch_size=4)
    assert dataset.size == SAMPLES
    for sample_id in (0, 9, 10, 42):
        assert dataset[sample_id]["txt"] == f"sample {sample_id} — ü"
    place = dataset.locate([0, 9, 10, 42])
    assert place.shard.tolist() == [0, 0, 1, 4]
    assert place.index.tolist() == [0, 9, 0, 2]
    [identity] = dataset.stream_identities()
    assert (identity.name, identity.samples, identity.per_epoch, identity.format) == ("train", 43, 43, "webdataset")
    with pytest.raises(IndexError, match="there is no sample 43"):
        dataset[43]


def test_the_index_is_made_once_and_depends_on_the_shards_alone(folder, tmp_path):
    twin = write_shards(tmp_path / "twin")
    first = UDSWebDataset(twin, batch_size=4).stream_identities()[0].index_sha256
    assert first == UDSWebDataset(folder, batch_size=4).stream_identities()[0].index_sha256
    made = (twin / INDEX).stat().st_mtime_ns
    UDSWebDataset(twin, batch_size=4)
    assert (twin / INDEX).stat().st_mtime_ns == made


def test_columns_are_taken_from_members(folder):
    dataset = UDSWebDataset(folder, batch_size=4, columns={"text": "txt"})
    assert dataset[3] == {"__key__": "0003", "text": "sample 3 — ü", "sample_id": 3}
    lacking = UDSWebDataset(folder, batch_size=4, columns={"text": "caption"})
    with pytest.raises(
        DataError,
        match=r"sample 3 \(row 3 of .*part-000\.tar\), key '0003', has no member \.caption; it has \.tokens\.json",
    ):
        lacking[3]


@pytest.mark.parametrize("ending", ["pyd", "pkl", "pickle", "pth", "weights.pt"])
def test_pickles_are_refused_unread(ending, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "stream").mkdir()
    with tarfile.open(tmp_path / "stream" / "a.tar", "w") as tar:
        member(tar, f"1.{ending}", pickle.dumps(Evil()))
        member(tar, "1.txt", b"fine")
    with pytest.raises(DataError, match=rf"the member \.{ending} holds a pickle"):
        UDSWebDataset(tmp_path / "stream", batch_size=1)[0]
    assert UDSWebDataset(tmp_path / "stream", batch_size=1, columns={"text": "txt"})[0]["text"] == "fine"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("field", "data"),
    [("txt", b"\xff"), ("json", b"{"), ("cls", b"seven"), ("npy", b"?"), ("npy", None)],
    ids=["text", "json", "integer", "array", "array of objects"],
)
def test_a_member_that_is_not_what_its_name_says(field, data):
    if data is None:
        file = io.BytesIO()
        np.save(file, np.array([{}]), allow_pickle=True)
        data = file.getvalue()
    with pytest.raises(DataError, match=rf"here: the member \.{field} cannot be decoded"):
        decode_member(field, data, "here")


# Order --------------------------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own():
    settings = {"seed": 3, "shuffle": True, "shuffle_buffer": 8}
    orders = [epoch_order([10] * 20, epoch=epoch, **settings) for epoch in (0, 1)]
    assert all(sorted(order.tolist()) == list(range(200)) for order in orders)
    assert not np.array_equal(*orders)
    assert np.array_equal(orders[0], epoch_order([10] * 20, epoch=0, **settings))
    assert not np.array_equal(orders[0], epoch_order([10] * 20, epoch=0, **(settings | {"seed": 4})))
    by_shard = epoch_order([10] * 20, epoch=0, seed=3, shuffle=True, shuffle_buffer=0)
    assert (by_shard.reshape(20, 10) % 10 == np.arange(10)).all()  # whole shards, in another order
    place = np.argsort(orders[0])[by_shard]
    assert np.abs(place - np.arange(200)).max() < 8
    assert np.abs(place - np.arange(200)).max() > 2
    assert epoch_order([2, 3], epoch=5, seed=3, shuffle=False, shuffle_buffer=8).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "loading", [{"num_workers": 2}, {"num_workers": 3}, {"num_workers": 2, "persistent_workers": True}], ids=str
)
def test_the_order_does_not_depend_on_workers(folder, loading):
    expected = epochs_of(UDSWebDataset(folder, batch_size=4), 3)
    assert [len(epoch) for epoch in expected] == [11, 11, 11]
    assert sorted(sample_id for batch in expected[0] for sample_id in batch) == list(range(SAMPLES))
    assert expected[0] != expected[1] != expected[2]
    assert epochs_of(UDSWebDataset(folder, batch_size=4), 3, **loading) == expected


def test_reading_with_and_without_workers_in_turn_counts_every_epoch(folder):
    expected = epochs_of(UDSWebDataset(folder, batch_size=4), 4)
    dataset = UDSWebDataset(folder, batch_size=4)
    found = [epochs_of(dataset, 1, num_workers=workers)[0] for workers in (0, 2, 3, 0)]
    assert found == expected


@pytest.mark.parametrize(("ranks", "per_node"), [(2, 2), (3, 3), (4, 2)])
def test_ranks_put_together_have_the_global_batches_of_one(folder, ranks, per_node):
    from udsstream.mosaicml.ranks import canonical_order

    [alone] = epochs_of(UDSWebDataset(folder, batch_size=12), 1)
    batches = []
    for rank in range(ranks):
        dataset = UDSWebDataset(folder, batch_size=12 // ranks)
        dataset._rank, dataset._ranks, dataset._ranks_per_node = rank, ranks, per_node
        assert len(dataset) == -(-SAMPLES // ranks)
        batches.append(epochs_of(dataset, 1)[0])
    for number, parts in enumerate(zip(*batches, strict=True)):
        order = canonical_order([len(part) for part in parts], per_node)
        ids = [parts[rank][row] for rank, row in zip(order.rank, order.row, strict=True)]
        repeated = -SAMPLES % ranks if number == 3 else 0
        assert ids[: len(ids) - repeated] == alone[number]
        assert ids[len(ids) - repeated :] == alone[0][:repeated]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seen", [0, 8, 40, 43])
def test_resuming_is_exact(folder, seen, workers):
    whole = epochs_of(UDSWebDataset(folder, batch_size=4), 3)
    first = UDSWebDataset(folder, batch_size=4)
    epochs_of(first, 1)
    if seen:
        iterator = iter(DataLoader(first, batch_size=4, collate_fn=_ids))
        for _ in range(-(-seen // 4)):
            next(iterator)
    state = first.state_dict(seen, True)
    assert (state["epoch"], state["sample_in_epoch"]) == (1, seen)
    second = UDSWebDataset(folder, batch_size=4)
    second.load_state_dict(json.loads(json.dumps(state)))
    resumed = epochs_of(second, 2, num_workers=workers)
    assert resumed == [whole[1][-(-seen // 4) :], whole[2]]


def test_a_position_in_another_stream_is_refused(folder, tmp_path):
    state = UDSWebDataset(folder, batch_size=4).state_dict(8, True)
    other = write_shards(tmp_path / "other", seed=1)
    with pytest.raises(ResumeError, match=r"shuffle_buffer: was 1000, is 7\n  indexes: was \['\w+'\], is "):
        UDSWebDataset(other, batch_size=4, shuffle_buffer=7).load_state_dict(state)


# Bad shards ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path) -> Path:
    return write_shards(tmp_path / "train")


@pytest.mark.parametrize(
    "cut", ["in a member", "in a header", "between two samples", "before the end mark", "to nothing"]
)
def test_a_truncated_tar_is_found_when_it_is_indexed(shards, cut):
    path = shards / "part-001.tar"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    end = members[-1].offset_data + 512
    size = {
        "in a member": members[5].offset_data + 3,
        "in a header": members[6].offset + 100,
        "between two samples": members[6].offset,
        "before the end mark": end,
        "to nothing": 0,
    }[cut]
    with open(path, "r+b") as file:
        file.truncate(size)
    with pytest.raises(ShardError, match=r"shard .*part-001\.tar is truncated or no tar"):
        UDSWebDataset(shards, batch_size=4)
    assert not (shards / INDEX).exists()


def test_a_damaged_header_is_not_an_early_end(shards):
    path = shards / "part-001.tar"
    with tarfile.open(path) as tar:
        place = tar.getmembers()[8].offset
    with open(path, "r+b") as file:
        file.seek(place + 20)
        file.write(b"damaged")
    with pytest.raises(ShardError, match=rf"no end-of-archive mark at byte {place}"):
        UDSWebDataset(shards, batch_size=4)


def test_what_happens_to_shards_after_they_were_indexed(shards):
    path = shards / "part-001.tar"
    dataset = UDSWebDataset(shards, batch_size=4, shuffle=False)
    whole = path.read_bytes()
    with open(path, "r+b") as file:
        file.truncate(len(whole) // 2)
    with pytest.raises(ShardError, match=r"part-001\.tar has \d+ bytes, but the index records \d+"):
        UDSWebDataset(shards, batch_size=4)
    with pytest.raises(
        ShardError, match=r"sample 10 \(row 0 of .*part-001\.tar\) cannot be read .*but the index records"
    ):
        epochs_of(dataset, 1)
    with pytest.raises(ShardError, match=r"sample 10 \(row 0"):  # and never a shorter epoch
        epochs_of(dataset, 1, num_workers=2, timeout=60)
    path.unlink()
    with pytest.raises(ShardError, match=r"part-001\.tar is missing \(1 of 5 are\)"):
        UDSWebDataset(shards, batch_size=4)
    changed = bytearray(whole)
    changed[whole.index(b"sample 12")] ^= 1
    path.write_bytes(changed)
    dataset = UDSWebDataset(shards, batch_size=4)
    with pytest.raises(ShardError, match=r"sample 12 is not the one that was indexed: the sha256"):
        dataset.check_shard(12)
    dataset.check_shard(20)
    (shards / "part-009.tar").write_bytes(whole)
    with pytest.raises(DataError, match=r"part-009\.tar is not in the index"):
        UDSWebDataset(shards, batch_size=4)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.txt", "2.txt", "1.txt"], r"the key '1' comes twice"),
        (["1.txt", "1.TXT"], r"the sample '1' has the member \.txt twice"),
        (["readme"], r"it holds no samples"),
    ],
)
def test_ambiguous_shards_are_refused(tmp_path, names, message):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            member(tar, name, b"text")
    with pytest.raises(DataError, match=rf"shard {tmp_path / 'a.tar'}: {message}"):
        UDSWebDataset(tmp_path, batch_size=1)


def test_a_link_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("1.txt")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match=r"'1\.txt' is a link"):
        UDSWebDataset(tmp_path, batch_size=1)


def test_folders_that_are_no_streams(tmp_path):
    with pytest.raises(DataError, match=r"nowhere is not a folder"):
        UDSWebDataset(tmp_path / "nowhere", batch_size=1)
    with pytest.raises(DataError, match=r"has no \.tar shard"):
        UDSWebDataset(tmp_path, batch_size=1)
    (tmp_path / "a.tar.gz").write_bytes(b"?")
    with pytest.raises(DataError, match=r"a\.tar\.gz is compressed"):
        UDSWebDataset(tmp_path, batch_size=1)
    with pytest.raises(ConfigError, match=r"folders: is empty"):
        UDSWebDataset([], batch_size=1)
    with pytest.raises(ConfigError, match=r"batch_size=0 must be a whole number of at least 1"):
        UDSWebDataset(tmp_path, batch_size=0)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"version": 2, "shards": [], "offsets": 3}', b"\xff"], ids=repr
)
def test_a_damaged_index_is_refused(shards, content):
    UDSWebDataset(shards, batch_size=1)
    (shards / INDEX).write_bytes(content)
    with pytest.raises(DataError, match=rf"{INDEX} is no index of WebDataset shards"):
        UDSWebDataset(shards, batch_size=1)


def test_damaged_offsets_are_refused(shards):
    UDSWebDataset(shards, batch_size=1)
    content = bytearray((shards / OFFSETS).read_bytes())
    content[-1] ^= 1
    (shards / OFFSETS).write_bytes(content)
    with pytest.raises(DataError, match=r"offsets\.npy cannot be read \(it is not the one that the index speaks of\)"):
        UDSWebDataset(shards, batch_size=1)


# Training -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class WebRun:
    """Two epochs with selection over tar shards; picklable."""

    source: str
    folder: str
    workers: int = 0
    duration: str = "2ep"

    def trainer(self, replay: ReplaySelection | None = None) -> Trainer:
        torch.set_num_threads(1)
        dist.initialize_dist("cpu")
        reproducibility.seed_all(5)
        model = llama()
        per_rank = 8 // dist.get_world_size()
        dataset = Tokens(self.source, batch_size=per_rank, shuffle_buffer=16)
        loading: dict[str, Any] = {"collate_fn": collate}
        if self.workers:
            loading |= {"num_workers": self.workers, "timeout": 60, "multiprocessing_context": "fork"}
        loader = (
            replay.dataloader(dataset, **loading) if replay else DataLoader(dataset, batch_size=per_rank, **loading)
        )
        selection = OnlineBatchSelection(
            keep=0.25, max_seq_len=32, projection_dims=(16, 4), buffer_size=13, log_dir=Path(self.folder) / "log",
            autoresume=True,
        )  # fmt: skip
        return Trainer(
            model=model,
            train_dataloader=loader,
            optimizers=torch.optim.AdamW(model.parameters(), lr=1e-2),
            max_duration=self.duration,
            algorithms=[replay or selection],
            device="cpu",
            device_train_microbatch_size=2,
            seed=5,
            progress_bar=False,
            auto_log_hparams=False,
            **({} if replay else {"run_name": "web", "save_folder": str(Path(self.folder) / "checkpoints"), "save_interval": "3ba",
               "save_overwrite": True, "autoresume": True}),
        )  # fmt: skip

    def run(self, replay: ReplaySelection | None = None) -> dict[str, torch.Tensor]:
        trainer = self.trainer(replay)
        if trainer.state.timestamp < self.duration:
            trainer.fit()
        weights = {name: value.detach().clone() for name, value in trainer.state.model.named_parameters()}
        trainer.close()
        return weights

    def __call__(self) -> None:
        weights = self.run()
        if dist.get_global_rank() == 0:
            torch.save(weights, Path(self.folder) / "weights.pt")


def decisions(folder: str | Path) -> pa.Table:
    return SelectionLog.open(Path(folder) / "log").table().drop_columns(["attempt"])


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory) -> tuple[WebRun, dict[str, torch.Tensor]]:
    run = WebRun(source=folder, folder=str(tmp_path_factory.mktemp("reference")))
    return run, run.run()


def test_two_epochs_with_selection_over_tar_shards(reference, folder):
    run, _ = reference
    log = SelectionLog.open(Path(run.folder) / "log")
    assert len(log.steps()) == 12
    rows = log.table()
    for epoch in (0, 1):
        ids = rows.filter(rows["epoch"].to_numpy() == epoch)["sample_id"].to_pylist()
        assert sorted(ids) == list(range(SAMPLES))
    place = UDSWebDataset(folder, batch_size=1).locate(rows["sample_id"].to_numpy())
    assert rows["shard"].to_pylist() == place.shard.tolist()
    assert rows["shard_index"].to_pylist() == place.index.tolist()
    (stream,) = log.run["streams"]
    assert (stream["format"], stream["location"], stream["samples"]) == ("webdataset", folder, SAMPLES)


def test_it_audits_clean_with_its_data(reference, shards, tmp_path):
    run, _ = reference
    log = Path(run.folder) / "log"
    report = audit(log, data=True)
    assert report.findings == ()
    assert any("data-index, data-shards, data-samples: 1 of 1 streams" in line for line in report.checked)
    assert any("coverage: 2 finished epochs" in line for line in report.checked)
    # A copy elsewhere, one byte of which was changed since.
    UDSWebDataset(shards, batch_size=1)
    assert audit(log, data=True, streams={"train": str(shards)}).findings == ()
    content = bytearray((shards / "part-001.tar").read_bytes())
    content[content.index(b"sample 12")] ^= 1
    (shards / "part-001.tar").write_bytes(content)
    (finding,) = audit(log, data=True, streams={"train": str(shards)}).findings
    assert finding.check == "data-shards"
    assert "part-001.tar has the sha256" in finding.message


def test_what_cannot_read_tar_shards_says_so(reference, tmp_path):
    from udsstream.curate.chosen import Choice
    from udsstream.curate.write import Output, curate_log
    from udsstream.report.write import write_report

    log = Path(reference[0].folder) / "log"
    with pytest.raises(
        DataError, match=r"stream 'train' of the format 'webdataset', and samples are copied from MDS alone"
    ):
        curate_log(log, tmp_path / "out", choice=Choice(), output=Output(format="jsonl"))
    page = tmp_path / "report.html"
    write_report(log, out=page)
    assert "is of the format &#x27;webdataset&#x27;, and text is shown from MDS alone" in page.read_text()


def test_the_same_run_with_workers(reference, folder, tmp_path):
    run, weights = reference
    other = WebRun(source=folder, folder=str(tmp_path), workers=2)
    found = other.run()
    assert decisions(other.folder).equals(decisions(run.folder))
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_it_replays_to_the_same_weights(reference):
    run, weights = reference
    replay = ReplaySelection(Path(run.folder) / "log")
    found = run.run(replay)
    assert replay.differences == []
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_replay_finds_a_changed_shard(reference, shards):
    run, _ = reference
    UDSWebDataset(shards, batch_size=1)
    content = bytearray((shards / "part-002.tar").read_bytes())
    content[content.index(b"sample 25")] ^= 1
    (shards / "part-002.tar").write_bytes(content)
    replay = ReplaySelection(Path(run.folder) / "log")
    with pytest.raises(ShardError, match=r"is not the one that was indexed: the sha256 of its shard .*part-002\.tar"):
        dataclasses.replace(run, source=str(shards)).run(replay)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_it_is_the_same_run(reference, folder, tmp_path, workers):
    run, weights = reference
    processes, moments = launch.forkserver(), random.Random(workers)
    other = WebRun(source=folder, folder=str(tmp_path), workers=workers)
    (process,) = launch.start(processes, 1, other)
    while not list(tmp_path.glob("checkpoints/ep*")) and process.exitcode is None:
        process.join(0.05)
    process.join(moments.uniform(0, 0.5))
    process.kill()
    process.join()
    assert launch.finish(launch.start(processes, 1, other)) == [0]
    assert decisions(tmp_path).equals(decisions(run.folder))
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.slow
def test_two_ranks_are_offered_the_same_batches(reference, folder, tmp_path):
    run, _ = reference
    other = WebRun(source=folder, folder=str(tmp_path), duration="1ep")
    assert launch.finish(launch.start(launch.forkserver(), 2, other)) == [0, 0]
    alone = decisions(run.folder)
    alone = alone.filter(alone["step"].to_numpy() < 5)
    both = decisions(tmp_path)
    assert both.filter(both["step"].to_numpy() < 5)["sample_id"].equals(alone["sample_id"])
    assert both.num_rows == SAMPLES + 1  # the last batch, of 3, has the epoch's first sample once more
    assert audit(tmp_path / "log", data=True).findings == ()
