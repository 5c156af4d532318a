"""Epochs grouped by length: the order itself, on any number of ranks, after any resumption, and whole runs with it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import pickle
from collections import Counter
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streaming import Stream
from streaming.base.batching import generate_work
from streaming.base.world import World
from test_webdataset import Tokens, write_shards
from tiny import TinyRun, write_stream
from torch.utils.data import DataLoader

from udsstream import ReplaySelection, SelectionLog, UDSStreamingDataset, UDSWebDataset
from udsstream.audit.run import audit
from udsstream.errors import ConfigError, DataError, ResumeError, ShardError
from udsstream.mosaicml.length_groups import LengthGroups, group_by_length, grouped_window
from udsstream.mosaicml.lengths import count_lengths, remembered_lengths
from udsstream.scoring.seeding import raw_bits

# The order, as a function of lengths ---------------------------------------------------------------------------------------

epochs = {
    "lengths": st.lists(st.integers(0, 9), max_size=70).map(np.array),
    "batch": st.integers(1, 7),
    "batches": st.integers(2, 5),
    "seed": st.integers(0, 3),
    "epoch": st.integers(0, 3),
}


@given(**epochs)
def test_it_is_window_by_window_the_plain_form(lengths, batch, batches, seed, epoch):
    found = group_by_length(lengths, batch=batch, batches=batches, seed=seed, epoch=epoch)
    words = raw_bits(-(-len(lengths) // batch), seed=seed, purpose="length_groups", epoch=epoch)
    window, expected = batch * batches, []
    for number, start in enumerate(range(0, len(lengths), window)):
        drawn = words[number * batches : (number + 1) * batches]
        expected += (start + grouped_window(lengths[start : start + window], drawn, batch)).tolist()
    assert found.tolist() == expected


@given(**epochs)
def test_each_window_is_sorted_and_cut_and_its_batches_take_turns(lengths, batch, batches, seed, epoch):
    places = group_by_length(lengths, batch=batch, batches=batches, seed=seed, epoch=epoch).tolist()
    window = batch * batches
    for start in range(0, len(lengths), window):
        stop = min(start + window, len(lengths))
        assert sorted(places[start:stop]) == list(range(start, stop))
        cut = [places[at : min(at + batch, stop)] for at in range(start, stop, batch)]
        # (length, place) tells all samples of the window apart, so that the batches have one order.
        cut.sort(key=lambda rows: (lengths[rows[0]], rows[0]))
        assert [row for rows in cut for row in rows] == sorted(range(start, stop), key=lambda p: (lengths[p], p))


@given(**epochs, more=st.lists(st.integers(0, 9), max_size=30))
def test_a_whole_window_does_not_depend_on_what_comes_after_it(lengths, batch, batches, seed, epoch, more):
    settings = {"batch": batch, "batches": batches, "seed": seed, "epoch": epoch}
    whole = len(lengths) // (batch * batches) * batch * batches
    longer = group_by_length(np.concatenate([lengths, np.array(more, int)]).astype(int), **settings)
    assert longer[:whole].tolist() == group_by_length(lengths, **settings)[:whole].tolist()


def test_training_does_not_run_from_short_to_long():
    """Each quarter of the lengths comes at each turn about as often; 400 windows of 4 batches."""
    windows, batches, batch = 400, 4, 3
    lengths = np.random.default_rng(0).permutation(windows * batches * batch)
    places = group_by_length(lengths, batch=batch, batches=batches, seed=1, epoch=0)
    shortest = lengths[places].reshape(windows, batches, batch)[:, :, 0]
    quarter = shortest.argsort(axis=1).argsort(axis=1)
    counts = np.array([np.bincount(quarter[:, turn], minlength=batches) for turn in range(batches)])
    assert ((counts - windows / 4) ** 2 / (windows / 4)).sum() < 35  # χ² of 9 degrees of freedom: 1 in 17,000 is above


def test_the_incomplete_batch_is_the_last_one_and_not_always_of_one_length():
    lengths, first_of_rest = np.arange(11), set()
    for epoch in range(40):
        places = group_by_length(lengths, batch=3, batches=5, seed=0, epoch=epoch).tolist()
        assert places[9] + 1 == places[10], "two neighbours in length are left over"
        first_of_rest.add(places[9])
    assert first_of_rest == {0, 3, 6, 9}


def test_epochs_and_seeds_draw_other_turns():
    lengths = np.arange(64)
    orders = {
        tuple(group_by_length(lengths, batch=4, batches=8, seed=seed, epoch=epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


# A data set's epochs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, ...]:
    """96 samples together: 12 global batches of 8."""
    root = tmp_path_factory.mktemp("streams")
    return (
        str(write_stream(root / "one", samples=60, seed=1)),
        str(write_stream(root / "two", samples=36, seed=2)),
    )


def length_of(sample) -> int:
    return len(sample["input_ids"])


def open_streams(folders, *, grouped: int | None = None, weights=({}, {}), **options) -> UDSStreamingDataset:
    settings = {"shuffle": True, "batch_size": 8, "num_canonical_nodes": 1} | options
    streams = [Stream(local=folder, **weight) for folder, weight in zip(folders, weights, strict=False)]
    dataset = UDSStreamingDataset(streams=streams, **settings)
    if grouped is not None:
        dataset.group_by_length(grouped, count_lengths(dataset, length_of))
    return dataset


def begun(dataset: UDSStreamingDataset, canonical_nodes: int = 1) -> UDSStreamingDataset:
    """As Streaming leaves a data set whose first epoch begins."""
    dataset.num_canonical_nodes = canonical_nodes
    dataset._set_shuffle_block_size(World(1, 1, 1, 0))
    return dataset


def global_batches(
    dataset: UDSStreamingDataset, *, nodes=1, per_node=1, workers=1, epoch=0, seen=0, batch=8, method=None
) -> list[list[int]]:
    """The global batches of an epoch in canonical order: what `generate_work` deals, put together again."""
    ranks = nodes * per_node
    dataset.batch_size = batch // ranks
    method = dataset.batching_method if method is None else method
    work = generate_work(method, dataset, World(nodes, per_node, workers, 0), epoch, seen)
    assert work.shape[:3] == (nodes, per_node, workers)
    # (batches, workers, rows, ranks of a node, nodes): workers take turns, and rows are dealt to nodes and then to their ranks
    rows = work.transpose(3, 2, 4, 1, 0).reshape(-1, batch)
    return [row[row != -1].tolist() for row in rows if (row != -1).any()]


def flat(batches: list[list[int]]) -> list[int]:
    return [sample for batch in batches for sample in batch]


LAYOUTS = [
    (nodes, per_node, workers, canonical)
    for nodes, per_node in [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 2)]
    for workers in (1, 3)
    for canonical in (4, 8)
]


@pytest.mark.parametrize(("nodes", "per_node", "workers", "canonical"), LAYOUTS)
def test_without_grouping_it_would_be_dealt_as_streaming_deals(
    folders, monkeypatch, nodes, per_node, workers, canonical
):
    dataset = begun(open_streams(folders, grouped=3), canonical)
    monkeypatch.setattr(LengthGroups, "order", lambda self, ids, **_: ids)
    for seen in (0, 8, 40, 88, 96):
        settings = {"nodes": nodes, "per_node": per_node, "workers": workers, "epoch": 1, "seen": seen}
        assert global_batches(dataset, **settings) == global_batches(dataset, method="random", **settings)


@pytest.mark.parametrize(("nodes", "per_node", "workers", "canonical"), LAYOUTS)
@pytest.mark.parametrize("epoch", [0, 2])
def test_global_batches_are_those_of_one_rank(folders, nodes, per_node, workers, canonical, epoch):
    dataset = begun(open_streams(folders, grouped=3), canonical)
    alone = global_batches(dataset, epoch=epoch)
    dealt = global_batches(dataset, nodes=nodes, per_node=per_node, workers=workers, epoch=epoch)
    assert dealt == alone
    assert Counter(flat(alone)) == Counter(range(96))


@pytest.mark.parametrize(("nodes", "per_node", "workers", "canonical"), LAYOUTS[::3])
def test_resumed_at_any_batch_of_a_window_the_rest_is_the_same(folders, nodes, per_node, workers, canonical):
    dataset = begun(open_streams(folders, grouped=5), canonical)
    alone = global_batches(dataset, epoch=1)
    for number in range(13):
        rest = global_batches(dataset, nodes=nodes, per_node=per_node, workers=workers, epoch=1, seen=8 * number)
        assert rest == alone[number:]


WEIGHTS = {
    "repeat": ({"repeat": 2.0}, {"repeat": 0.5}),
    "proportion": ({"proportion": 0.3}, {"proportion": 0.7}),
    "choose": ({"choose": 20}, {"choose": 71}),
    "plain": ({}, {}),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("canonical", [1, 5, 64])
def test_each_window_has_the_samples_that_it_had(folders, weights, canonical):
    """Where streams are weighted, or padded for many canonical nodes, ids come several times or not at all, and not where they came."""
    dataset = begun(open_streams(folders, grouped=3, weights=WEIGHTS[weights]), canonical)
    lengths, offered = count_lengths(dataset, length_of), Counter()
    for epoch in range(3):
        plain = flat(global_batches(dataset, epoch=epoch, method="random"))
        offered.update(plain)
        grouped = global_batches(dataset, epoch=epoch)
        assert [len(batch) for batch in grouped[:-1]] == [8] * (len(grouped) - 1)
        for start in range(0, len(plain), 24):
            window = grouped[start // 8 : start // 8 + 3]
            assert Counter(flat(window)) == Counter(plain[start : start + 24])
            spans = sorted((lengths[batch].min(), lengths[batch].max()) for batch in window)
            assert all(low[1] <= high[0] for low, high in itertools.pairwise(spans))
    assert weights == "plain" or len(set(offered.values())) > 1


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_what_pads_an_epoch_to_all_ranks_comes_at_its_end(tmp_path, ranks):
    dataset = begun(open_streams([str(write_stream(tmp_path / "odd", samples=83))], grouped=4))
    alone = flat(global_batches(dataset))
    dealt = global_batches(dataset, per_node=ranks)
    assert dealt[:10] == global_batches(dataset)[:10]
    assert set(flat(dealt)) == set(alone) == set(range(83))
    assert len(flat(dealt)) == -(-83 // ranks) * ranks


# Read by a data loader -----------------------------------------------------------------------------------------------------


def ids_of(samples) -> list[int]:
    return [sample["sample_id"] for sample in samples]


def loader_of(dataset, workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=dataset.batch_size,
        num_workers=workers,
        collate_fn=ids_of,
        multiprocessing_context="fork" if workers else None,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_brings_that_order_epoch_by_epoch(folders, workers):
    expected = begun(open_streams(folders, grouped=5))
    epochs = [global_batches(expected, epoch=epoch) for epoch in range(3)]
    loader = loader_of(open_streams(folders, grouped=5), workers)
    assert [list(loader) for _ in range(3)] == epochs
    assert epochs[0] != epochs[1] != epochs[2]
    plain = loader_of(open_streams(folders), workers)
    assert list(plain) != epochs[0]


def test_without_shuffling_epochs_have_the_same_batches_in_other_turns(folders):
    loader = loader_of(open_streams(folders, grouped=6, shuffle=False), 0)
    one, two = list(loader), list(loader)
    assert one != two
    for window in (slice(0, 6), slice(6, 12)):
        assert sorted(one[window]) == sorted(two[window])
    assert sorted(flat(one[:6])) == list(range(48))


@pytest.mark.parametrize("at", range(13))
def test_resumed_at_any_batch_a_loader_goes_on(folders, at):
    first = open_streams(folders, grouped=5)
    whole = list(loader_of(first, 0))
    state = json.loads(json.dumps(first.state_dict(8 * at, True)))
    state["epoch"] = 0  # at its beginning, `state_dict` names the epoch to come
    again = open_streams(folders, grouped=5)
    again.load_state_dict(state)
    loader = loader_of(again, 2 if at % 4 == 2 else 0)
    assert list(loader) == whole[at:]
    assert list(loader) == global_batches(begun(open_streams(folders, grouped=5)), epoch=1)


def test_at_an_epochs_end_the_next_one_begins(folders):
    dataset = open_streams(folders, grouped=5)
    list(dataset)
    boundary, following = dataset.state_dict(0, True), ids_of(dataset)
    again = open_streams(folders, grouped=5)
    again.load_state_dict(boundary)
    assert ids_of(again) == following


@pytest.mark.parametrize(
    ("grouped", "changes", "named"),
    [
        (4, {}, r"batches: was 5, is 4"),
        (None, {}, r"batches: was 5, is '\(absent\)'"),
        (5, {"batch_size": 4}, r"global_batch: was 8, is 4"),
        (5, {"shuffle_seed": 3}, r"seed: was 9176, is 3"),
    ],
)
def test_a_state_of_other_groups_is_refused_by_name(folders, grouped, changes, named):
    state = open_streams(folders, grouped=5).state_dict(16, True)
    with pytest.raises(ResumeError, match=named):
        open_streams(folders, grouped=grouped, **changes).load_state_dict(state)


def test_a_state_of_other_lengths_or_of_no_groups_is_refused(folders):
    dataset, other = open_streams(folders, grouped=5), open_streams(folders)
    lengths = count_lengths(dataset, length_of)
    lengths[17] += 1
    other.group_by_length(5, lengths)
    with pytest.raises(ResumeError, match=r"lengths_sha256: was '\w{64}', is '\w{64}'"):
        other.load_state_dict(dataset.state_dict(0, True))
    with pytest.raises(ResumeError, match=r"batches: was '\(absent\)', is 5"):
        dataset.load_state_dict(open_streams(folders).state_dict(0, True))


def test_one_set_of_lengths_is_one_digest_whatever_its_type(folders):
    one, two = open_streams(folders), open_streams(folders)
    one.group_by_length(3, np.arange(96, dtype=np.uint8))
    two.group_by_length(3, np.arange(96, dtype=np.int64))
    assert one.length_grouping == two.length_grouping
    assert open_streams(folders).length_grouping is None


# What is refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [1, 0, -2, 2.0, True, "4"])
def test_windows_must_be_of_several_batches(folders, batches):
    with pytest.raises(ConfigError, match=r"batches=.* must be a whole number of at least 2"):
        open_streams(folders).group_by_length(batches, np.zeros(96, int))


@pytest.mark.parametrize("lengths", [np.zeros(95, int), np.zeros(96), np.full(96, -1), np.zeros((96, 1), int)])
def test_lengths_must_be_one_for_each_sample(folders, lengths):
    with pytest.raises(DataError, match=r"expected one whole number of at least 0 for each of the 96 samples"):
        open_streams(folders).group_by_length(4, lengths)


@pytest.mark.parametrize("method", ["stratified", "per_stream", "device_per_stream"])
def test_batches_with_a_rule_of_their_own_are_not_broken(folders, method):
    with pytest.raises(ConfigError, match=rf"batching_method='{method}' .* take 'random'"):
        open_streams(folders, grouped=4, batching_method=method)


def test_it_must_be_said_before_the_first_epoch_and_with_a_batch_size(folders):
    dataset = open_streams(folders)
    next(iter(dataset))
    with pytest.raises(ConfigError, match=r"epoch 0 has begun"):
        dataset.group_by_length(4, np.zeros(96, int))
    with pytest.raises(ConfigError, match=r"batch_size: the data set was given none"):
        open_streams(folders, batch_size=None).group_by_length(4, np.zeros(96, int))


# Lengths -------------------------------------------------------------------------------------------------------------------


class Halves(UDSStreamingDataset):
    """A data set class of one's own, which tokenises in `__getitem__`."""

    def __getitem__(self, at):
        return {"first": super().__getitem__(at)["input_ids"][::2], "sample_id": at}


def test_lengths_are_counted_of_what_the_data_set_gives(folders, caplog):
    dataset = Halves(streams=[Stream(local=folder) for folder in folders], batch_size=8)
    with caplog.at_level(logging.INFO, logger="udsstream"):
        lengths = count_lengths(dataset, lambda sample: len(sample["first"]), progress_bar=True)
    assert lengths.tolist() == [-(-length_of(super(Halves, dataset).__getitem__(at)) // 2) for at in range(96)]
    assert lengths.dtype == np.int32
    assert "Counted the lengths of 96 samples" in caplog.text
    assert f"{lengths.min()} to {lengths.max()}, median {int(np.median(lengths))}" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_counting_draws_nothing_and_gives_the_same_with_workers(folders, workers):
    dataset = open_streams(folders)
    random_states = torch.get_rng_state(), str(np.random.get_state())
    found = count_lengths(dataset, length_of, num_workers=workers)
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert str(np.random.get_state()) == random_states[1]
    assert found.tolist() == [length_of(dataset[at]) for at in range(96)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("length", [-1, 2.0, True, None, 1 << 31])
def test_a_length_that_is_none_is_refused_by_sample(folders, length, workers):
    with pytest.raises(DataError, match=r"length_of gave .* for sample 3, expected a whole number"):
        count_lengths(
            open_streams(folders), lambda sample: length if sample["sample_id"] == 3 else 5, num_workers=workers
        )


@pytest.mark.parametrize(("limit", "workers"), [(None, 0), ("20kb", 0), (None, 2)])
def test_remote_streams_are_fetched_and_the_data_set_can_still_be_sent(folders, tmp_path, limit, workers):
    streams = [Stream(remote=folder, local=str(tmp_path / str(i))) for i, folder in enumerate(folders)]
    dataset = UDSStreamingDataset(streams=streams, batch_size=8, shuffle=True, num_canonical_nodes=1, cache_limit=limit)
    dataset.group_by_length(5, count_lengths(dataset, length_of, num_workers=workers))
    expected = global_batches(begun(open_streams(folders, grouped=5)))
    pickle.dumps(dataset)
    assert list(loader_of(dataset, 0)) == expected


def test_a_shard_that_cannot_be_fetched_is_named(folders, tmp_path):
    remote = write_stream(tmp_path / "remote", samples=96, seed=1)
    lost = sorted(remote.glob("*.mds"))[2]
    lost.unlink()
    dataset = UDSStreamingDataset(remote=str(remote), local=str(tmp_path / "local"), batch_size=8)
    with pytest.raises(ShardError, match=lost.name):
        count_lengths(dataset, length_of)


def test_a_shard_damaged_after_counting_is_still_an_error(folders, tmp_path):
    folder = write_stream(tmp_path / "one", samples=40)
    dataset = open_streams([str(folder)], grouped=3)
    shard = sorted(folder.glob("*.mds"))[1]
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(ShardError, match=shard.name):
        list(dataset)


def test_remembered_lengths_are_counted_once(tmp_path):
    counted = []

    def count() -> np.ndarray:
        counted.append(1)
        return np.arange(5, dtype=np.int32)

    path = tmp_path / "run" / "lengths.npy"
    for _ in range(2):
        assert remembered_lengths(path, 5, count).tolist() == [0, 1, 2, 3, 4]
    assert len(counted) == 1
    assert [file.name for file in path.parent.iterdir()] == ["lengths.npy"]


def save(path: Path, array: np.ndarray) -> None:
    np.save(path, array, allow_pickle=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(pickle.dumps([1, 2, 3, 4, 5])),
        lambda path: path.write_bytes(path.read_bytes().replace(b"(5,), ", b"(50,),")),
        lambda path: path.write_bytes(path.read_bytes().replace(b"(5,), ", b"9**9**")),
        lambda path: save(path, np.arange(4, dtype=np.int32)),
        lambda path: save(path, np.arange(5.0)),
        lambda path: save(path, np.full(5, -1, dtype=np.int32)),
        lambda path: save(path, np.array([None] * 5)),
        lambda path: np.savez(path.open("wb"), lengths=np.arange(5, dtype=np.int32)),
    ],
    ids=["empty", "cut", "pickle", "larger", "no header", "fewer", "floats", "negative", "objects", "npz"],
)
def test_a_spoilt_file_is_counted_again(tmp_path, spoil, caplog):
    path = tmp_path / "lengths.npy"
    lengths = np.arange(5, dtype=np.int32)
    remembered_lengths(path, 5, lambda: lengths)
    spoil(path)
    assert remembered_lengths(path, 5, lambda: lengths + 7).tolist() == [7, 8, 9, 10, 11]
    assert "counted again" in caplog.text
    assert remembered_lengths(path, 5, lambda: lengths).tolist() == [7, 8, 9, 10, 11]


# Tar shards of WebDataset --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("tars") / "train", samples=96)


def open_tars(folder: Path, *, grouped: int | None = 5, ranks: int = 1, rank: int = 0) -> UDSWebDataset:
    dataset = Tokens(folder, batch_size=8 // ranks)
    dataset._rank, dataset._ranks, dataset._ranks_per_node = rank, ranks, ranks
    if grouped is not None:
        dataset.group_by_length(grouped, count_lengths(dataset, length_of))
    return dataset


@pytest.mark.parametrize("workers", [0, 2])
def test_tar_shards_are_grouped_too_and_resumed_exactly(tars, workers):
    plain = list(loader_of(open_tars(tars, grouped=None), 0))
    dataset = open_tars(tars)
    loader = loader_of(dataset, workers)
    whole = [list(loader), list(loader)]
    lengths = count_lengths(dataset, length_of)
    for start in (0, 5, 10):
        window = whole[0][start : start + 5]
        assert Counter(flat(window)) == Counter(flat(plain[start : start + 5]))
        spans = sorted((lengths[batch].min(), lengths[batch].max()) for batch in window)
        assert all(low[1] <= high[0] for low, high in itertools.pairwise(spans))
    for at in (3, 5, 11):
        again = open_tars(tars)
        again.load_state_dict(
            json.loads(json.dumps(dataset.state_dict(0, True) | {"epoch": 1, "sample_in_epoch": 8 * at}))
        )
        assert list(loader_of(again, workers)) == whole[1][at:]


def test_ranks_are_dealt_one_grouped_order_of_tar_shards(tars):
    alone = list(loader_of(open_tars(tars), 0))
    parts = [list(loader_of(open_tars(tars, ranks=2, rank=rank), 0)) for rank in (0, 1)]
    # Rows are dealt in turn.
    assert [flat([list(pair) for pair in zip(*both, strict=True)]) for both in zip(*parts, strict=True)] == alone


def test_a_position_in_tar_shards_grouped_otherwise_is_refused(tars):
    with pytest.raises(ResumeError, match=r"batches: was 5, is 4"):
        open_tars(tars, grouped=4).load_state_dict(open_tars(tars).state_dict(0, True))
    with pytest.raises(ResumeError, match=r"batches: was '\(absent\)', is 5"):
        open_tars(tars).load_state_dict(open_tars(tars, grouped=None).state_dict(0, True))
    dataset = open_tars(tars, grouped=None)
    next(iter(dataset))
    with pytest.raises(ConfigError, match=r"epoch 0 has begun"):
        dataset.group_by_length(4, np.zeros(96, int))


# Whole runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> tuple[str, ...]:
    """83 samples: 11 batches of 8 an epoch, the last one of 3; with windows of 4, the third one of 3 batches."""
    return (str(write_stream(tmp_path_factory.mktemp("odd") / "one", samples=83, seed=1)),)


@pytest.fixture(scope="module")
def run(odd, tmp_path_factory) -> TinyRun:
    """A run of two epochs and a bit, with dropout, and a checkpoint at its end."""
    run = TinyRun(streams=odd, folder=str(tmp_path_factory.mktemp("run")), length_group_batches=4, save_interval="25ba")
    torch.save(run.run(), Path(run.folder) / "weights.pt")
    return run


def log_of(run: TinyRun) -> SelectionLog:
    return SelectionLog.open(Path(run.folder) / "log")


def same(weights: dict[str, torch.Tensor], run: TinyRun) -> bool:
    expected = torch.load(Path(run.folder) / "weights.pt", weights_only=True)
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_log_says_how_candidates_were_grouped(run, odd):
    log = log_of(run)
    dataset = UDSStreamingDataset(local=odd[0], batch_size=8, shuffle=True, num_canonical_nodes=1)
    dataset.group_by_length(4, count_lengths(dataset, length_of))
    assert log.run["loader"]["length_groups"] == dataset.length_grouping
    assert log.run["loader"]["length_groups"] | {"lengths_sha256": ""} == {
        "batches": 4,
        "global_batch": 8,
        "seed": 9176,
        "lengths_sha256": "",
    }
    rows = log.table()
    steps, tokens = rows["step"].to_numpy(), rows["tokens"].to_numpy()
    for first in (*range(0, 11, 4), *range(11, 22, 4)):  # the windows of two epochs
        window = [tokens[steps == step] for step in range(first, min(first + 4, 11 if first < 11 else 22))]
        spans = sorted((lengths.min(), lengths.max()) for lengths in window)
        assert all(low[1] <= high[0] for low, high in itertools.pairwise(spans))


def test_an_audit_finds_nothing(run):
    (checkpoint,) = (Path(run.folder) / "checkpoints").glob("*ba25-rank0.pt")
    report = audit(Path(run.folder) / "log", data=True, checkpoint=checkpoint)
    assert report.findings == ()
    assert any(check.startswith("coverage: 2 finished epochs") for check in report.checked)


@pytest.mark.parametrize("verify", [False, True])
def test_a_replay_gives_the_same_weights_and_counts_no_lengths(run, tmp_path, verify):
    replay = ReplaySelection(Path(run.folder) / "log", verify=verify)
    assert same(dataclasses.replace(run, folder=str(tmp_path), save_interval=None).run(replay=replay), run)
    assert replay.tally is None or replay.tally.agreed == replay.tally.steps == 25


def settings_of(run: TinyRun, tmp_path: Path, **changes) -> TinyRun:
    return dataclasses.replace(run, **({"folder": str(tmp_path), "autoresume": True} | changes))


@pytest.mark.parametrize("at", [1, 2, 4, 10, 11, 14])
def test_resumed_within_a_window_at_its_end_and_at_an_epochs_end(run, tmp_path, at):
    first = settings_of(run, tmp_path, duration=f"{at}ba", save_interval=f"{at}ba")
    first.run()
    weights = dataclasses.replace(first, duration="25ba", workers=2 if at == 10 else 0).run()
    ours, theirs = (log_of(r).table().drop_columns(["attempt"]) for r in (first, run))
    assert ours.equals(theirs)
    assert same(weights, run)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"length_group_batches": 3}, r"batches: was 4, is 3"),
        ({"length_group_batches": None}, r"batches: was 4, is '\(absent\)'"),
        ({"batch_size": 16}, r"global_batch: was 8, is 16"),
    ],
)
def test_a_run_that_goes_on_must_group_as_it_did(run, tmp_path, changes, named):
    """From a checkpoint (the data set's state says so), and before the first one (run.json does)."""
    begun = settings_of(run, tmp_path, duration="2ba", save_interval="2ba")
    begun.run()
    with pytest.raises(ResumeError, match=named):
        dataclasses.replace(begun, duration="4ba", **changes).run()
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        checkpoint.unlink()
    with pytest.raises(ResumeError, match=named):
        dataclasses.replace(begun, duration="4ba", **changes).run()


@pytest.fixture(scope="module")
def processes():
    return launch.forkserver()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_are_offered_the_candidates_of_one(processes, folders, tmp_path, ranks):
    settings = {"streams": folders, "length_group_batches": 5, "duration": "24ba", "dropout": 0.0, "by_tokens": True}
    alone = TinyRun(folder=str(tmp_path / "alone"), **settings, selection={"keep": 4})
    alone.run()
    # Stopped in the middle of the second epoch's second window, and gone on with.
    several = settings_of(alone, tmp_path / "several", duration="19ba", save_interval="19ba")
    for duration in ("19ba", "24ba"):
        part = dataclasses.replace(several, duration=duration)
        Path(part.folder).mkdir(exist_ok=True)
        assert launch.finish(launch.start(processes, ranks, part.run_and_save)) == [0] * ranks
    columns = ["step", "position", "sample_id", "tokens", "epoch_position"]
    assert log_of(several).table(columns=columns).equals(log_of(alone).table(columns=columns))
    assert audit(tmp_path / "several" / "log", data=True).findings == ()
