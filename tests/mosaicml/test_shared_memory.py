"""Jobs of one machine and the shared memory that they have in common: real processes, each with a temporary folder of its own."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streaming.base.shared.prefix as counting
from launch import finish, forkserver, start
from streaming import MDSWriter, StreamingDataset
from streaming.base.batching import generate_work
from streaming.base.constant import EPOCH_DATA
from streaming.base.util import clean_stale_shared_memory
from streaming.base.world import World
from torch.utils.data import DataLoader

from udsstream.errors import DataError, RankError, ResumeError
from udsstream.mosaicml import shared_memory
from udsstream.mosaicml.dataset import UDSStreamingDataset
from udsstream.mosaicml.shared_memory import PREFIXES, names_of_its_own, remove_what_ended_jobs_left

SHM = Path("/dev/shm")
pytestmark = pytest.mark.skipif(not SHM.is_dir(), reason="shared memory is no folder here")
SAMPLES = 60


@pytest.fixture(scope="module")
def processes():
    return forkserver()


@pytest.fixture
def stream(tmp_path) -> Path:
    with MDSWriter(out=str(tmp_path / "stream"), columns={"text": "str"}) as writer:
        for place in range(SAMPLES):
            writer.write({"text": str(place)})
    return tmp_path / "stream"


class Meeting:
    """Where processes tell each other how far they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def reached(self, point: str) -> None:
        (self.folder / point).touch()

    def wait(self, point: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not (self.folder / point).exists():
            assert time.monotonic() < end, f"nobody came to {point}"
            time.sleep(0.005)


def with_temporary_folder(work, folder: Path) -> None:
    """As a job that was started with a TMPDIR of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None
    work()


def job(context, work, folder: Path, ranks: int = 1):
    return start(context, ranks, functools.partial(with_temporary_folder, work, folder))


def open_stream(stream: Path, cls: Any = UDSStreamingDataset, **options):
    return cls(
        local=str(stream), shuffle=True, batch_size=4, num_canonical_nodes=1, shuffle_block_size=1 << 18, **options
    )


def ids_of(dataset, workers: int = 0) -> list[int]:
    loader = DataLoader(dataset, batch_size=4, num_workers=workers)
    return [int(i) for batch in loader for i in batch["sample_id"]]


def expected_order(stream: Path, epoch: int, workers: int = 0) -> list[int]:
    """What an epoch's order is, computed without iterating."""
    dataset = open_stream(stream)
    world = World(num_nodes=1, ranks_per_node=1, workers_per_rank=max(workers, 1), worker=0)
    work = generate_work("random", dataset, world, epoch, 0)[0, 0]  # (workers, batches, batch)
    ids = work.swapaxes(0, 1).reshape(-1)  # the loader takes a batch of each worker in turn
    return ids[ids >= 0].tolist()


# Another job takes the names away ------------------------------------------------------------------------------------------


def two_epochs(stream: Path, meeting: Meeting, workers: int) -> None:
    dataset = open_stream(stream)
    first = ids_of(dataset, workers)
    meeting.reached("between epochs")
    meeting.wait("another job runs")
    np.save(meeting.folder / "orders.npy", [first, ids_of(dataset, workers)])


def clean_and_resume(stream: Path, meeting: Meeting) -> None:
    """A job of plain Streaming that cleans up, as Streaming's error message recommends, and goes on with a checkpoint."""
    meeting.wait("between epochs")
    clean_stale_shared_memory()
    dataset = open_stream(stream, StreamingDataset)
    dataset.load_state_dict(
        {"epoch": 5, "sample_in_epoch": 8, "num_canonical_nodes": 1, "shuffle_seed": 9176, "initial_physical_nodes": 1}
    )
    meeting.reached("another job runs")
    meeting.wait("orders.npy")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_job_that_cleans_up_and_starts_does_not_change_anothers_order(processes, stream, tmp_path, workers):
    meeting = Meeting(tmp_path / "meeting")
    ours = job(processes, functools.partial(two_epochs, stream, meeting, workers), tmp_path / "a")
    other = job(processes, functools.partial(clean_and_resume, stream, meeting), tmp_path / "b")
    assert finish([*ours, *other]) == [0, 0]
    found = np.load(meeting.folder / "orders.npy").tolist()
    assert found == [expected_order(stream, epoch, workers) for epoch in (0, 1)]


# Two jobs start at once ----------------------------------------------------------------------------------------------------


def ranks_that_look_at_different_times(stream: Path, meeting: Meeting) -> None:
    """Rank 1 looks for a free number before another job takes one, rank 0 after it."""
    looking, rank = counting._check_and_find_retrying, int(os.environ["RANK"])

    def looked(*args, **kwargs) -> int:
        if rank == 0:
            meeting.wait("another job runs")
        found = looking(*args, **kwargs)
        if rank == 1:
            meeting.reached("looked")
        return found

    counting._check_and_find_retrying = looked
    if rank == 0:
        meeting.reached("starting")
    dataset = open_stream(stream)
    np.save(meeting.folder / f"prefix-{rank}.npy", dataset._shm_prefix_int)
    np.save(meeting.folder / f"order-{rank}.npy", ids_of(dataset))


def start_between(stream: Path, meeting: Meeting) -> None:
    end = time.monotonic() + 20
    meeting.wait("starting")
    while not (meeting.folder / "looked").exists() and time.monotonic() < end:
        if (meeting.folder / "prefix-0.npy").exists():  # nobody counts: there is nothing to come between
            break
        time.sleep(0.005)
    dataset = open_stream(stream, StreamingDataset)
    meeting.reached("another job runs")
    meeting.wait("order-0.npy")
    meeting.wait("order-1.npy")
    del dataset


def test_no_rank_joins_another_job_on_the_same_stream_that_starts_meanwhile(processes, stream, tmp_path):
    meeting = Meeting(tmp_path / "meeting")
    other = job(processes, functools.partial(start_between, stream, meeting), tmp_path / "b")
    ours = job(
        processes, functools.partial(ranks_that_look_at_different_times, stream, meeting), tmp_path / "a", ranks=2
    )
    assert finish([*ours, *other], seconds=60) == [0, 0, 0]
    prefixes = [int(np.load(meeting.folder / f"prefix-{rank}.npy")) for rank in (0, 1)]
    assert prefixes[0] == prefixes[1]
    ids = [i for rank in (0, 1) for i in np.load(meeting.folder / f"order-{rank}.npy")]
    assert sorted(ids) == list(range(SAMPLES))


def test_a_job_that_looks_for_a_number_while_another_takes_it_starts_all_the_same(stream, monkeypatch):
    taken = []

    def looked(*args, **kwargs) -> int:
        number = looking(*args, **kwargs)
        if kwargs["shm_name"] == EPOCH_DATA and not taken:  # the last that it looks for
            taken.append(number)
            open_stream(stream, StreamingDataset)
        return number

    looking = counting._check_and_find_retrying
    monkeypatch.setattr(counting, "_check_and_find_retrying", looked)
    with pytest.raises(FileExistsError):  # what Streaming does
        open_stream(stream, StreamingDataset)
    taken.clear()
    assert ids_of(open_stream(stream)) == expected_order(stream, 0)
    with names_of_its_own():
        assert open_stream(stream, StreamingDataset)._shm_prefix_int in PREFIXES
    assert not taken


# What ended jobs leave -----------------------------------------------------------------------------------------------------


def hold(stream: Path, remote: str | None, meeting: Meeting, workers: int) -> None:
    dataset = open_stream(stream, remote=remote)
    loader = iter(DataLoader(dataset, batch_size=4, num_workers=workers))
    next(loader)
    (meeting.folder / "prefix").write_text(str(dataset._shm_prefix_int))
    meeting.reached("holding")
    time.sleep(600)


def blocks(prefix: int | str) -> list[str]:
    return sorted(path.name for path in SHM.glob(f"{prefix}_*"))


def test_a_killed_jobs_memory_is_removed_once_none_of_its_processes_lives(processes, stream, tmp_path):
    meeting = Meeting(tmp_path / "meeting")
    (victim,) = job(processes, functools.partial(hold, stream, None, meeting, 1), tmp_path / "a")
    meeting.wait("holding")
    prefix = (meeting.folder / "prefix").read_text()
    held = blocks(prefix)
    assert f"{prefix}_next_epoch" in held
    remove_what_ended_jobs_left()
    assert blocks(prefix) == held
    os.kill(victim.pid, signal.SIGSTOP)  # as good as alive
    remove_what_ended_jobs_left()
    assert blocks(prefix) == held
    victim.kill()
    victim.join()
    remove_what_ended_jobs_left()
    assert blocks(prefix) == held, "its DataLoader's worker still lives"
    end = time.monotonic() + 30
    while blocks(prefix) and time.monotonic() < end:
        time.sleep(0.1)
        open_stream(stream)
    assert blocks(prefix) == []
    assert not list((tmp_path / "a").glob("*_locals"))


def test_streamings_own_numbers_are_left_alone(stream):
    dataset = open_stream(stream, StreamingDataset)
    before = blocks(f"{dataset._shm_prefix_int:06}")
    assert before
    remove_what_ended_jobs_left()
    assert blocks(f"{dataset._shm_prefix_int:06}") == before


# Caches --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_wait(monkeypatch):
    monkeypatch.setattr(shared_memory, "_CACHE_WAIT_SECONDS", 0.2)


@pytest.mark.parametrize("cls", [UDSStreamingDataset, StreamingDataset])
def test_a_cache_that_another_data_set_uses_is_refused(stream, tmp_path, short_wait, cls):
    cache = tmp_path / "cache"
    holder = open_stream(cache, cls, remote=str(stream))
    with pytest.raises(DataError, match=re.escape(f"the local folder {cache}, to which a stream is to be downloaded")):
        open_stream(cache, remote=str(stream))
    open_stream(stream)  # a folder that is only read is anyone's
    del holder
    assert sorted(ids_of(open_stream(cache, remote=str(stream)))) == list(range(SAMPLES))


def test_closing_frees_a_cache_in_the_middle_of_an_epoch(stream, tmp_path, short_wait):
    """As after a job of this process that ended with `max_duration`: threads of the epoch hold the data set."""
    cache = tmp_path / "cache"
    holder = open_stream(cache, remote=str(stream))
    epoch = iter(holder)
    next(epoch)
    with pytest.raises(DataError, match=r"call its close\(\)"):
        open_stream(cache, remote=str(stream))
    holder.close()
    assert sorted(ids_of(open_stream(cache, remote=str(stream)))) == list(range(SAMPLES))
    holder.close()
    assert len(ids_of(holder)) == SAMPLES, "it can be used again"


def test_a_cache_is_free_as_soon_as_its_killed_user_is_gone(processes, stream, tmp_path):
    """As after kill -9 and an immediate new start: workers of the dead process live on for up to five seconds."""
    meeting, cache = Meeting(tmp_path / "meeting"), tmp_path / "cache"
    (victim,) = job(processes, functools.partial(hold, cache, str(stream), meeting, 1), tmp_path / "a")
    meeting.wait("holding")
    victim.kill()
    victim.join()
    assert sorted(ids_of(open_stream(cache, remote=str(stream)))) == list(range(SAMPLES))


def rank_expects_refusal(stream: Path, cache: Path, folder: Path) -> None:
    shared_memory._CACHE_WAIT_SECONDS = 0.2
    try:
        open_stream(cache, remote=str(stream))
    except (DataError, RankError) as error:
        (folder / f"refused-{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")


def test_when_the_first_rank_fails_all_stop(processes, stream, tmp_path, short_wait):
    cache = tmp_path / "cache"
    holder = open_stream(cache, remote=str(stream))
    ranks = job(processes, functools.partial(rank_expects_refusal, stream, cache, tmp_path), tmp_path / "a", ranks=2)
    assert finish(ranks, seconds=60) == [0, 0]
    assert (tmp_path / "refused-0").read_text().startswith("DataError: the local folder")
    assert (tmp_path / "refused-1").read_text().startswith("RankError: the first rank of this machine")
    del holder


def ranks_with_folders_of_their_own(stream: Path, folder: Path) -> None:
    rank = os.environ["RANK"]
    try:
        open_stream(shutil.copytree(stream, folder / f"copy-{rank}"))
    except RankError as error:
        (folder / f"refused-{rank}").write_text(str(error))


def test_ranks_of_one_machine_with_different_folders_are_told(processes, stream, tmp_path):
    finish(
        job(processes, functools.partial(ranks_with_folders_of_their_own, stream, tmp_path), tmp_path / "a", ranks=2)
    )
    assert re.search("copy-0.* and rank 1 has .*copy-1", (tmp_path / "refused-1").read_text())


# Where to go on ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_position_that_was_removed_before_it_was_used_is_an_error(stream, workers):
    before = open_stream(stream)
    ids_of(before)
    state = before.state_dict(8, from_beginning=True)
    dataset = open_stream(stream)
    dataset.load_state_dict(state)
    (SHM / f"{dataset._shm_prefix_int}_resume").unlink()
    with pytest.raises(ResumeError, match=r"where to go on in epoch 0 .* Resume again from the same checkpoint"):
        ids_of(dataset, workers)
    dataset = open_stream(stream)
    dataset.load_state_dict(state)
    assert ids_of(dataset, workers) == expected_order(stream, 0)[8:]
    (SHM / f"{dataset._shm_prefix_int}_resume").unlink()
    assert ids_of(dataset, workers) == expected_order(stream, 1, workers)  # by then it is of no use
