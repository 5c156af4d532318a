"""Sample ids, places in shards, the epoch boundary, and streams that break off, over small MDS streams."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter, Stream, StreamingDataset
from torch.utils.data import DataLoader

from udsstream.errors import DataError, ShardError
from udsstream.mosaicml.dataset import UDSStreamingDataset, canonical_nodes, locate, stream_identities, verify_shards

COLUMNS = {"text": "str", "stream": "int", "shard": "int", "index": "int"}


def write_stream(folder: Path, number: int, samples: int, *, per_shard: int = 7) -> Path:
    """A stream of shards of `per_shard` samples, each of which says where it truly lies."""
    with MDSWriter(out=str(folder), columns=COLUMNS, hashes=["sha1"], size_limit=1 << 20) as writer:
        for place in range(samples):
            shard, index = divmod(place, per_shard)
            if place and index == 0:  # as the writer does when a shard is full
                writer.flush_shard()
                writer._reset_cache()
            writer.write({"text": "x" * 50, "stream": number, "shard": shard, "index": index})
    return folder


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    return [
        write_stream(tmp_path / name, number, n) for number, (name, n) in enumerate([("a", 23), ("b", 7), ("c", 30)])
    ]


def open_streams(folders, cls=UDSStreamingDataset, **options) -> UDSStreamingDataset:
    settings = {"shuffle": False, "batch_size": 4, "num_canonical_nodes": 1} | options
    return cls(streams=[Stream(local=str(folder)) for folder in folders], **settings)


def as_they_are(samples):
    return samples


def collected(dataset, workers: int, **options) -> list[dict]:
    loader = DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=as_they_are, **options)
    return [sample for batch in loader for sample in batch]


def truth(samples) -> list[tuple[int, int, int]]:
    return [(sample["stream"], sample["shard"], sample["index"]) for sample in samples]


def places(dataset, ids) -> list[tuple[int, int, int]]:
    place = locate(dataset, ids)
    return list(zip(place.stream.tolist(), place.shard.tolist(), place.index.tolist(), strict=True))


# Ids and places ------------------------------------------------------------------------------------------------------------


def test_locate_matches_what_the_samples_say(folders):
    dataset = open_streams(folders)
    assert len(dataset.shards) == 4 + 1 + 5
    ids = list(range(60))
    assert places(dataset, ids) == truth([dataset[i] for i in ids])
    assert places(dataset, [59, 0, 30, 0]) == [(2, 4, 1), (0, 0, 0), (2, 0, 0), (0, 0, 0)]
    assert locate(dataset, []).stream.shape == (0,)
    assert {part.dtype for part in vars(locate(dataset, np.array([3], dtype=np.int32))).values()} == {
        np.dtype(np.int64)
    }


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_sample_has_its_id(folders, workers, shuffle):
    dataset = open_streams(folders, shuffle=shuffle)
    samples = collected(dataset, workers)
    ids = [sample["sample_id"] for sample in samples]
    assert all(type(i) is int for i in ids)
    assert sorted(ids) == list(range(60))
    assert (ids == sorted(ids)) != shuffle
    assert places(dataset, ids) == truth(samples)


class Tokenising(UDSStreamingDataset):
    """A user's subclass: another dict with other keys."""

    def __getitem__(self, at):
        sample = super().__getitem__(at)
        return {"tokens": sample["text"][:3], "true": (sample["stream"], sample["shard"], sample["index"])}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_subclass_that_drops_the_id_gets_it_back(folders, workers):
    dataset = open_streams(folders, Tokenising, shuffle=True)
    samples = collected(dataset, workers)
    assert len(samples) == 60
    assert places(dataset, [sample["sample_id"] for sample in samples]) == [sample["true"] for sample in samples]


def test_ids_are_right_when_two_iterations_of_a_stream_alternate(folders):
    """Streaming lets only the newest iterator go on; its ids must be its own."""
    dataset = open_streams(folders)
    first = iter(dataset)
    next(first), next(first)
    second = list(dataset)
    assert places(dataset, [sample["sample_id"] for sample in second]) == truth(second)
    assert len(second) == 60


def test_random_access_by_id_list_and_slice(folders):
    dataset = open_streams(folders)
    assert dataset[31]["sample_id"] == 31
    assert dataset[np.int64(31)]["sample_id"] == 31
    assert dataset[-1]["sample_id"] == 59
    assert [sample["sample_id"] for sample in dataset[[5, 3]]] == [5, 3]
    assert [sample["sample_id"] for sample in dataset[28:31]] == [28, 29, 30]


@pytest.mark.parametrize("at", [60, 1000, -61])
def test_an_index_out_of_range_is_not_called_a_damaged_shard(folders, at):
    with pytest.raises(IndexError, match=rf"there is no sample {at}: the data set has 60"):
        _ = open_streams(folders)[at]


def test_an_id_in_the_stream_itself_is_kept(tmp_path):
    with MDSWriter(out=str(tmp_path / "own"), columns={"sample_id": "int"}) as writer:
        for value in (40, 41):
            writer.write({"sample_id": value})
    assert [sample["sample_id"] for sample in open_streams([tmp_path / "own"], batch_size=1)] == [40, 41]


class NotAMapping(UDSStreamingDataset):
    def __getitem__(self, at):
        return tuple(super().__getitem__(at).values())


def test_a_sample_that_is_not_a_mapping_is_an_error(folders):
    with pytest.raises(DataError, match=r"sample 0 is a tuple, but must be a dict.*return a dict from __getitem__"):
        list(open_streams(folders, NotAMapping))


# Streams that break off --------------------------------------------------------------------------------------------------


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard.{number:05d}.mds"


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def clip(path: Path) -> None:
    """Only the end of the last sample's text is lost: Streaming would decode the rest of it as if it were whole."""
    path.write_bytes(path.read_bytes()[:-5])


def scramble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36  # the offsets of the first samples
    path.write_bytes(bytes(content))


DAMAGES = pytest.mark.parametrize("damage", [delete, truncate, empty, clip, scramble])


def read_until_error(dataset, workers: int = 0, **options) -> tuple[list[dict], BaseException | None]:
    samples: list[dict] = []
    loader = DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=as_they_are, **options)
    try:
        for batch in loader:
            samples += batch
    except Exception as error:
        # Its traceback would keep this loader's queues open in the workers of the next one, which then take 10 s to end.
        return samples, error.with_traceback(None)
    return samples, None


@DAMAGES
@pytest.mark.parametrize(("stream", "shard"), [(0, 0), (0, 2), (2, 4)])
@pytest.mark.parametrize("when", ["before opening", "after opening"])
def test_a_damaged_shard_is_an_error_that_names_it_and_never_a_short_epoch(folders, damage, stream, shard, when):
    path = shard_file(folders[stream], shard)
    if when == "after opening":
        dataset = open_streams(folders)
        damage(path)
        samples, error = read_until_error(dataset)
    else:
        damage(path)
        samples, error = read_until_error(open_streams(folders))
    assert isinstance(error, ShardError), f"{len(samples)} of 60 samples came, then {error!r}"
    assert str(path) in str(error)


@DAMAGES
@pytest.mark.parametrize("shuffle", [False, True])
def test_with_workers_too_the_error_names_the_shard(folders, damage, shuffle):
    path = shard_file(folders[0], 2)
    damage(path)
    samples, error = read_until_error(open_streams(folders, shuffle=shuffle), workers=2, timeout=30)
    assert isinstance(error, ShardError), f"{len(samples)} of 60 samples came, then {error!r}"
    assert str(path) in str(error)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_process_ends_after_the_error(folders, workers):
    """Streaming's threads must not wait for a shard that will never come: the interpreter joins them at its exit."""
    delete(shard_file(folders[0], 2))
    code = f"""
from streaming import Stream
from torch.utils.data import DataLoader
from udsstream import UDSStreamingDataset
if __name__ == "__main__":
    dataset = UDSStreamingDataset(
        streams=[Stream(local=folder) for folder in {[str(folder) for folder in folders]}], batch_size=4, shuffle=False
    )
    list(DataLoader(dataset, batch_size=4, num_workers={workers}, collate_fn=list))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "udsstream.errors.ShardError" in done.stderr


def test_streaming_itself_ends_the_epoch_early_without_a_word(folders):
    """Why the guard is there; when this fails, Streaming has been mended."""
    delete(shard_file(folders[0], 2))
    dataset = open_streams(folders, StreamingDataset)
    samples, _ = read_until_error(dataset)
    assert len(samples) < 60


@DAMAGES
def test_a_damaged_shard_read_by_id_is_an_error_that_names_it(folders, damage):
    dataset = open_streams(folders)
    path = shard_file(folders[0], 2)
    damage(path)
    for _ in range(2):
        with pytest.raises(ShardError) as raised:
            _ = dataset[14]
        assert str(path) in str(raised.value)
    assert dataset[0]["sample_id"] == 0  # the others can still be read


def test_a_shard_that_comes_back_can_be_read_and_another_failure_is_its_own(folders):
    dataset = open_streams(folders)
    lost, damaged = shard_file(folders[0], 2), shard_file(folders[2], 1)
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(ShardError, match=rf"^shard {lost} cannot be downloaded"):
        _ = dataset[14]
    lost.write_bytes(content)
    assert dataset[14]["sample_id"] == 14
    truncate(damaged)
    with pytest.raises(ShardError, match=rf"sample 37 cannot be read: row 0 of shard {damaged} .*index records"):
        _ = dataset[37]


def test_once_a_background_thread_has_failed_its_shard_is_named_whatever_is_read(folders):
    dataset = open_streams(folders)
    samples = iter(dataset)
    next(samples)
    lost = shard_file(folders[2], 4)
    delete(lost)
    with pytest.raises(ShardError, match=rf"^shard {lost} cannot be downloaded or decompressed \(ValueError: "):
        dataset.prepare_shard(9)  # as the thread that looks ahead does
    with pytest.raises(ShardError, match=rf"^shard {lost} "):
        list(samples)
    with pytest.raises(ShardError, match=rf"^shard {lost} "):
        _ = dataset[0]


def test_verify_shards_finds_one_changed_byte(folders):
    dataset = open_streams(folders)
    assert verify_shards(dataset) == 10
    path = shard_file(folders[2], 1)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(
        ShardError, match=rf"shard {path} is corrupt: its sha1 is \w+, but the stream's index records \w+"
    ):
        verify_shards(dataset)
    path.unlink()
    with pytest.raises(ShardError, match=rf"shard {path} is missing"):
        verify_shards(dataset)


def test_verify_shards_refuses_streams_without_hashes(tmp_path):
    with MDSWriter(out=str(tmp_path / "bare"), columns={"text": "str"}) as writer:
        writer.write({"text": "a"})
    with pytest.raises(ShardError, match=r"written without hashes"):
        verify_shards(open_streams([tmp_path / "bare"], batch_size=1))


# Epochs and resuming ------------------------------------------------------------------------------------------------------


def test_state_at_an_epoch_boundary_names_the_epoch_to_come(folders):
    dataset = open_streams(folders, shuffle=True)
    beginning = dataset.state_dict(0, True)
    first = [sample["sample_id"] for sample in dataset]
    boundary = dataset.state_dict(0, True)
    assert boundary["epoch"] == 1
    assert boundary["sample_in_epoch"] == 0
    second = [sample["sample_id"] for sample in dataset]
    assert first != second
    for state, order in ((boundary, second), (beginning, first)):
        resumed = open_streams(folders, shuffle=True)
        resumed.load_state_dict(state)
        assert [sample["sample_id"] for sample in resumed] == order


def test_state_within_an_epoch_goes_on_where_it_was(folders):
    dataset = open_streams(folders, shuffle=True)
    order = [sample["sample_id"] for sample in dataset]
    again = open_streams(folders, shuffle=True)
    iterator = iter(again)
    for _ in range(8):
        next(iterator)
    state = again.state_dict(8, False)
    assert state["epoch"] == 0
    resumed = open_streams(folders, shuffle=True)
    resumed.load_state_dict(state)
    assert [sample["sample_id"] for sample in resumed] == order[8:]


# Identities ---------------------------------------------------------------------------------------------------------------


def test_stream_identities(folders):
    found = stream_identities(open_streams(folders))
    assert [stream.name for stream in found] == ["a", "b", "c"]
    assert [stream.location for stream in found] == [str(folder) for folder in folders]
    assert [stream.samples for stream in found] == [23, 7, 30]
    assert [stream.per_epoch for stream in found] == [23, 7, 30]
    for stream, folder in zip(found, folders, strict=True):
        assert stream.index_sha256 == hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()


def test_a_stream_that_is_repeated_says_how_often_it_is_drawn_from(folders):
    streams = [
        Stream(local=str(folder), repeat=repeat) for folder, repeat in zip(folders, (2.0, 1.0, 0.5), strict=True)
    ]
    dataset = UDSStreamingDataset(streams=streams, batch_size=1)
    assert [(stream.samples, stream.per_epoch) for stream in stream_identities(dataset)] == [(23, 46), (7, 7), (30, 15)]


@pytest.mark.parametrize(
    "settings", [{}, {"shuffle_algo": "py2s"}, {"shuffle_algo": "py1e"}, {"num_canonical_nodes": 4}]
)
def test_the_parts_of_an_epoch_are_known_before_it_begins(folders, settings):
    dataset = open_streams(folders, shuffle=True, **settings)
    foretold = canonical_nodes(dataset)
    next(iter(dataset))
    assert dataset.num_canonical_nodes == canonical_nodes(dataset) == foretold


def test_streams_of_one_name_are_told_apart_by_their_place(tmp_path):
    twins = [write_stream(tmp_path / parent / "train", i, 7) for i, parent in enumerate(["x", "y"])]
    assert [stream.name for stream in stream_identities(open_streams(twins))] == [str(folder) for folder in twins]


def test_streams_with_remotes_and_splits_are_named_by_them(tmp_path):
    write_stream(tmp_path / "remote" / "train", 0, 7)
    dataset = UDSStreamingDataset(
        remote=str(tmp_path / "remote"), local=str(tmp_path / "local"), split="train", shuffle=False, batch_size=1
    )
    [stream] = stream_identities(dataset)
    assert stream.location == str(tmp_path / "remote" / "train")
    assert stream.name == "train"
