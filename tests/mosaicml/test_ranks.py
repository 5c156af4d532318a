"""Several ranks choose as one: the same order, the same choice, one memory, one log; and go on after kills, on other numbers of ranks."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
from composer.core import Callback
from hypothesis import given
from hypothesis import strategies as st
from streaming.base.partition import get_partitions
from tiny import TinyRun, write_stream

from udsstream import OnlineBatchSelection, ReplaySelection, SelectionConfig, SelectionLog, UDSStreamingDataset
from udsstream.audit.run import audit
from udsstream.errors import DataError, ReplayError
from udsstream.mosaicml.batch import join_rows, split_rows, take_rows, trim_padding
from udsstream.mosaicml.ranks import CanonicalOrder, canonical_order, moves, shares
from udsstream.mosaicml.replay_data import LoggedDecisions

# Canonical order ----------------------------------------------------------------------------------------------------------


LAYOUTS = [
    (nodes, per_node, canonical_nodes)
    for nodes, per_node in [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2), (2, 4)]
    for canonical_nodes in (1, 2, 4, 8)
    if canonical_nodes >= nodes  # fewer is possible, but then Streaming's order depends on the number of nodes
]


@pytest.mark.parametrize(("nodes", "per_node", "canonical_nodes"), LAYOUTS)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("algorithm", ["relaxed", "orig"])
def test_the_order_is_that_of_one_rank(nodes, per_node, canonical_nodes, workers, algorithm):
    """Streaming's own partition of the same samples over one rank and over several."""
    ranks, batch = nodes * per_node, 16
    alone = get_partitions(algorithm, 8 * batch, canonical_nodes, 1, 1, 1, batch).reshape(-1, batch)
    dealt = get_partitions(algorithm, 8 * batch, canonical_nodes, nodes, per_node, workers, batch // ranks)
    # (nodes, ranks, workers, batches per worker, rows); workers take turns
    of_rank = dealt.transpose(0, 1, 3, 2, 4).reshape(ranks, 8, batch // ranks)
    order = canonical_order([batch // ranks] * ranks, per_node)
    for number in range(8):
        assert of_rank[order.rank, number, order.row].tolist() == alone[number].tolist()


def test_one_rank_is_in_the_order_of_its_batch():
    order = canonical_order([5], 1)
    assert (order.rank.tolist(), order.row.tolist()) == ([0] * 5, [0, 1, 2, 3, 4])


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(1, 3))
def test_every_candidate_has_one_place(counts, per_node):
    order = canonical_order(counts, per_node)
    assert len(order) == sum(counts)
    for rank, count in enumerate(counts):
        assert order.row[order.of(rank)].tolist() == list(range(count))
        assert (np.diff(order.of(rank)) > 0).all()


# Who trains on what -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 4), st.randoms(use_true_random=False))
def test_moves_are_the_fewest_that_make_shares_equal(ranks, share, rng):
    order = canonical_order([2 * share] * ranks, ranks)
    kept = sorted(rng.sample(range(len(order)), ranks * share))
    planned = moves(order, kept, ranks)
    held = Counter(order.rank[kept].tolist())
    trained = Counter(held)
    for move in planned:
        assert order.rank[move.place] == move.source != move.target
        trained[move.source] -= 1
        trained[move.target] += 1
    assert [trained[rank] for rank in range(ranks)] == [share] * ranks
    assert len(planned) == sum(max(0, held[rank] - share) for rank in range(ranks))
    assert len({move.place for move in planned}) == len(planned)
    dealt = shares(order, kept, ranks)
    assert sorted(place for places in dealt for place in places) == kept
    assert all(len(places) == share for places in dealt)


def padded(lengths: list[int], *, left: bool, width: int, first_id: int = 0) -> dict:
    ids, mask, labels = (torch.full((len(lengths), width), fill) for fill in (7, 0, -100))
    for row, length in enumerate(lengths):
        real = slice(width - length, width) if left else slice(0, length)
        ids[row, real] = torch.arange(length) + 100 * (first_id + row)
        mask[row, real] = 1
        labels[row, real] = ids[row, real]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "sample_id": torch.arange(first_id, first_id + len(lengths)),
        "weights": torch.arange(len(lengths), dtype=torch.float16) + first_id,
        "texts": [f"text {first_id + row}" for row in range(len(lengths))],
        "pairs": torch.arange(2 * len(lengths)).reshape(-1, 2) + first_id,
        "total": 3,
    }


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
def test_joined_rows_are_as_if_collated_together(left):
    """Rows of two batches of different widths and one of a type of its own."""
    here, there = padded([3, 9, 5], left=left, width=12), padded([4, 2], left=left, width=6, first_id=3)
    rows = [*split_rows(here, [0, 2]), *split_rows(there, [0])]
    joined = join_rows([rows[0], rows[2], rows[1]], here)
    together = trim_padding(take_rows(padded([3, 9, 5, 4, 2], left=left, width=12), [0, 3, 2]))
    assert joined.keys() == together.keys()
    for key in ("input_ids", "attention_mask", "labels", "sample_id", "weights"):
        assert joined[key].dtype == together[key].dtype
        assert torch.equal(joined[key], together[key]), key
    assert joined["texts"] == ["text 0", "text 3", "text 2"]
    assert joined["total"] == 3


def test_rows_without_padding_take_the_side_of_those_that_have_some():
    full, short = padded([4], left=True, width=4), padded([2], left=True, width=4, first_id=1)
    joined = join_rows([*split_rows(full, [0]), *split_rows(short, [0])], full)
    assert joined["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert joined["labels"][1].tolist() == [-100, -100, 100, 101]


def test_rows_that_only_some_ranks_have_are_named():
    here, there = padded([3], left=False, width=3), padded([2], left=False, width=3, first_id=1)
    del there["weights"]
    with pytest.raises(DataError, match=r"'weights' belongs to the rows of the batch on some ranks, but not on others"):
        join_rows([*split_rows(here, [0]), *split_rows(there, [0])], here)


@pytest.mark.parametrize(
    ("keep", "candidates", "ranks", "kept"),
    [(0.25, 8, 1, 2), (0.25, 8, 2, 2), (0.25, 3, 1, 1), (0.25, 4, 2, 2), (0.25, 4, 4, 4), (3, 8, 2, 4), (0.9, 5, 2, 4)],
)
def test_shares_are_equal(keep, candidates, ranks, kept):
    assert SelectionConfig(keep=keep).kept(candidates, ranks) == kept


# Whole runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def streams(tmp_path_factory) -> tuple[str, ...]:
    """80 samples: ten batches of 8 an epoch, none incomplete."""
    root = tmp_path_factory.mktemp("streams")
    return (
        str(write_stream(root / "one", samples=50, seed=1)),
        str(write_stream(root / "two", samples=30, seed=2)),
    )


@pytest.fixture(scope="module")
def processes():
    return launch.forkserver()


def run_on(processes, ranks: int, run: TinyRun) -> list[int | None]:
    Path(run.folder).mkdir(exist_ok=True)
    return launch.finish(launch.start(processes, ranks, run.run_and_save))


def log_of(run: TinyRun) -> SelectionLog:
    return SelectionLog.open(Path(run.folder) / "log")


def choices(run: TinyRun) -> list[list[int]]:
    log = log_of(run)
    return [log.selected(step) for step in log.steps()]


SETTINGS = {"selection": {"keep": 4, "embeddings": "full"}, "dropout": 0.0, "by_tokens": True, "duration": "50ba"}


@pytest.fixture(scope="module")
def alone(streams, processes, tmp_path_factory) -> TinyRun:
    """50 steps on one rank, with checkpoints."""
    run = TinyRun(streams=streams, folder=str(tmp_path_factory.mktemp("alone")), save_interval="10ba", **SETTINGS)
    assert run_on(processes, 1, run) == [0]
    return run


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_choice_does_not_depend_on_the_number_of_ranks(alone, processes, tmp_path, ranks):
    run = dataclasses.replace(alone, folder=str(tmp_path), save_interval="10ba")
    assert run_on(processes, ranks, run) == [0] * ranks
    ours, theirs = log_of(run), log_of(alone)
    rows, reference = ours.table(), theirs.table()
    assert rows["sample_id"].to_pylist() == reference["sample_id"].to_pylist()
    assert rows["position"].to_pylist() == reference["position"].to_pylist()
    assert rows["epoch_position"].to_pylist() == reference["epoch_position"].to_pylist()
    assert set(rows["rank"].to_pylist()) == set(range(ranks))
    for step, (chosen, expected) in enumerate(zip(choices(run), choices(alone), strict=True)):
        if chosen != expected:  # only where rounding decides
            scores = np.sort(reference.filter(np.equal(reference["step"].to_numpy(), step))["score"].to_numpy())[::-1]
            assert abs(scores[3] - scores[4]) < 1e-5 * scores[3], f"step {step}"
    first = rows["step"].to_numpy() < 3  # rounding grows with the steps
    np.testing.assert_allclose(rows["score"].to_numpy()[first], reference["score"].to_numpy()[first], rtol=1e-5)
    weights, expected = (torch.load(Path(r.folder) / "weights.pt", weights_only=True) for r in (run, alone))
    assert all(torch.allclose(weights[name], expected[name], rtol=1e-2, atol=1e-3) for name in expected)
    report = ours.verify()
    assert (report.ranks, report.rows, report.heads) == (ranks, 400, 5)
    assert ours.run["weights"] == theirs.run["weights"]


@pytest.mark.slow
def test_one_memory_whose_pushes_are_shared_out(alone, processes, tmp_path):
    run = dataclasses.replace(alone, folder=str(tmp_path), save_interval="10ba", duration="20ba")
    assert run_on(processes, 2, run) == [0, 0]
    log = log_of(run)
    pushes = log.pushes()
    assert pushes["push_index"].to_pylist() == list(range(80))
    assert pushes["sample_id"].to_pylist() == [sample for step in choices(run) for sample in step]
    by_step = pushes.group_by("step").aggregate([("digest", "count_distinct")])
    assert set(by_step["digest_count_distinct"].to_pylist()) == {1}
    reference = log_of(alone).pushes().slice(0, 80)
    ours, theirs = (np.stack(table["embedding"].to_pylist()) for table in (pushes, reference))
    np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=1e-2 * np.abs(theirs).max())
    assert log.buffer_at(20).pushed == 80


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "then", "scope"), [(2, 2, "global"), (2, 1, "global"), (2, 2, "rank")])
def test_an_audit_finds_nothing_in_a_log_of_several_ranks(processes, tmp_path, ranks, then, scope):
    """With incomplete batches at the ends of epochs, and with another number of ranks half-way."""
    settings = SETTINGS | {"selection": {"keep": 4, "embeddings": "full", "scope": scope}, "duration": "14ba"}
    stream = str(write_stream(tmp_path / "stream", samples=83))
    run = TinyRun(streams=(stream,), folder=str(tmp_path), save_interval="7ba", autoresume=True, **settings)
    assert run_on(processes, ranks, run) == [0] * ranks
    assert run_on(processes, then, dataclasses.replace(run, duration="28ba")) == [0] * then
    (checkpoint,) = (tmp_path / "checkpoints").glob("*ba28-rank0.pt")
    report = audit(tmp_path / "log", data=True, checkpoint=checkpoint)
    assert report.findings == ()
    assert (report.steps, report.anchored) == (28, True)


@pytest.mark.slow
def test_each_rank_keeps_its_own_share_with_scope_rank(streams, processes, tmp_path):
    run = TinyRun(
        streams=streams,
        folder=str(tmp_path),
        **(SETTINGS | {"selection": {"keep": 4, "scope": "rank"}, "duration": "6ba"}),
    )
    assert run_on(processes, 2, run) == [0, 0]
    for row in (
        log_of(run)
        .table()
        .group_by(["step", "rank"])
        .aggregate([("selected", "sum"), ("selected", "count")])
        .to_pylist()
    ):
        assert (row["selected_sum"], row["selected_count"]) == (2, 4)


@pytest.mark.slow
def test_random_is_the_same_draw_on_any_number_of_ranks(streams, processes, tmp_path):
    runs = []
    for ranks in (1, 2):
        settings = SETTINGS | {"selection": {"keep": 4, "method": "random", "interrupt": 3}, "duration": "12ba"}
        run = TinyRun(streams=streams, folder=str(tmp_path / str(ranks)), **settings)
        assert run_on(processes, ranks, run) == [0] * ranks
        runs.append(run)
    assert choices(runs[0]) == choices(runs[1])


@pytest.mark.slow
@pytest.mark.parametrize("kill", ["one rank", "all ranks"])
def test_killed_and_resumed_two_ranks_are_the_same_run(streams, processes, tmp_path, kill):
    settings = SETTINGS | {"duration": "25ba", "dropout": 0.1, "save_interval": "3ba"}
    reference = TinyRun(streams=streams, folder=str(tmp_path / "left alone"), **settings)
    began = time.monotonic()
    assert run_on(processes, 2, reference) == [0, 0]
    seconds = time.monotonic() - began
    run = dataclasses.replace(reference, folder=str(tmp_path / "killed"), autoresume=True)
    Path(run.folder).mkdir()
    moments = random.Random(3)
    for _ in range(2):
        started = launch.start(processes, 2, run.run_and_save)
        time.sleep(moments.uniform(0.4, 0.9) * seconds)
        for victim in started[1:] if kill == "one rank" else started:
            if victim.is_alive():
                os.kill(victim.pid, signal.SIGKILL)
        launch.finish(started, seconds=60)
    assert run_on(processes, 2, run) == [0, 0]
    assert log_of(run).table().drop_columns(["attempt"]).equals(log_of(reference).table().drop_columns(["attempt"]))
    weights, expected = (torch.load(Path(r.folder) / "weights.pt", weights_only=True) for r in (run, reference))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    log_of(run).verify()


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_a_run_goes_on_with_another_number_of_ranks(alone, processes, tmp_path, before, after):
    first = dataclasses.replace(alone, folder=str(tmp_path), duration="20ba", autoresume=True)
    assert run_on(processes, before, first) == [0] * before
    assert run_on(processes, after, dataclasses.replace(first, duration="40ba")) == [0] * after
    assert choices(first) == choices(alone)[:40]
    log = log_of(first)
    report = log.verify()
    assert (report.ranks, report.attempts) == (max(before, after), 2)
    assert log.pushes()["push_index"].to_pylist() == list(range(160))


@pytest.mark.slow
def test_one_ranks_error_stops_all(streams, processes, tmp_path):
    """A sample of one rank is too long: that rank says so, and the other does not wait for ever."""
    run = TinyRun(streams=streams, folder=str(tmp_path), **(SETTINGS | {"selection": {"keep": 4, "max_seq_len": 23}}))
    codes = launch.finish(launch.start(processes, 2, Refused(run)), seconds=60)
    assert 0 not in codes
    said = [path.read_text() for path in tmp_path.glob("refused-*")]
    assert any("has 24 tokens, but max_seq_len=23" in text for text in said)


@dataclasses.dataclass(frozen=True)
class Replayed:
    """Replays a log, and writes what came of it; fails as a run would."""

    run: TinyRun
    log: str
    verify: bool = False

    def __call__(self) -> None:
        replay = ReplaySelection(self.log, verify=self.verify)
        weights = self.run.run(replay=replay)
        found = {"weights": weights, "differences": replay.differences}
        found["tally"] = None if replay.tally is None else replay.tally.as_dict()
        torch.save(found, Path(self.run.folder) / f"replay-{os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def pair(processes, tmp_path_factory) -> TinyRun:
    """A run of two ranks with dropout, over ends of epochs with incomplete batches; two batches are not selected from."""
    folder = tmp_path_factory.mktemp("pair")
    stream = str(write_stream(folder / "stream", samples=83))
    settings = SETTINGS | {"selection": {"keep": 4, "interrupt": 9}, "duration": "25ba", "dropout": 0.1}
    run = TinyRun(streams=(stream,), folder=str(folder), **settings)
    assert run_on(processes, 2, run) == [0, 0]
    return run


@pytest.mark.slow
@pytest.mark.parametrize("verify", [False, True], ids=["from the log", "decided again"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_log_of_two_ranks_is_replayed(pair, processes, tmp_path, ranks, verify):
    """By two the weights are the same bit for bit; by others it is the same data, and that is said."""
    again = dataclasses.replace(pair, folder=str(tmp_path), dropout=0.1 if ranks == 2 else 0.0)
    job = Replayed(again, str(Path(pair.folder) / "log"), verify)
    codes = launch.finish(launch.start(processes, ranks, job))
    assert codes == [0] * ranks
    for rank in range(ranks):
        found = torch.load(tmp_path / f"replay-{rank}.pt", weights_only=True)
        if verify:
            tally = found["tally"]
            assert (tally["steps"], tally["unscored"]) == (23, 2)
        if ranks == 2:
            expected = torch.load(Path(pair.folder) / "weights.pt", weights_only=True)
            assert all(torch.equal(found["weights"][name], expected[name]) for name in expected)
            assert found["differences"] == []
            if verify:
                assert tally["equal_scores"] == tally["scores"]
                assert tally["agreed"] == tally["equal_memories"] == tally["memories"] == 23
        else:
            assert found["differences"] == [f"25 of 25 steps were trained on another number of ranks than {ranks}"]


def test_shares_that_cannot_be_equal_are_named(pair):
    log = SelectionLog.open(Path(pair.folder) / "log")
    with pytest.raises(
        ReplayError, match=r"step 0 has 4 rows, which 3 ranks cannot share equally; replay on 2, as it was"
    ):
        LoggedDecisions(log, first=None, stop=None, candidates=False, ranks=3)


@pytest.mark.slow
def test_without_dropout_one_rank_comes_close_to_the_weights_of_two(alone, processes, tmp_path):
    run = dataclasses.replace(alone, folder=str(tmp_path), save_interval=None, duration="20ba")
    assert run_on(processes, 2, run) == [0, 0]
    replay = ReplaySelection(tmp_path / "log", verify=True)
    weights = dataclasses.replace(run, folder=str(tmp_path / "again")).run(replay=replay)
    assert replay.tally is not None
    assert replay.tally.agreed == replay.tally.steps == 20
    expected = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(torch.allclose(weights[name], expected[name], rtol=1e-2, atol=1e-3) for name in expected)


class Held(Callback):
    """Memory (KiB) and open files of this process, noted at two batches."""

    def __init__(self, *batches: int) -> None:
        self.batches = batches
        self.found: list[tuple[int, int]] = []

    def batch_end(self, state, logger) -> None:
        if state.timestamp.batch.value in self.batches:
            status = Path("/proc/self/status").read_text()
            resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
            self.found.append((int(resident.split()[1]), len(os.listdir("/proc/self/fd"))))


@dataclasses.dataclass(frozen=True)
class Watched:
    """Runs, and writes down what the process held after 50 batches and at the end."""

    run: TinyRun

    def __call__(self) -> None:
        held = Held(50, 200)
        self.run.run(callbacks=[held])
        Path(self.run.folder, f"held-{os.environ['RANK']}").write_text(json.dumps(held.found))


@pytest.mark.slow
def test_two_ranks_hold_no_more_after_200_steps(streams, processes, tmp_path):
    run = TinyRun(streams=streams, folder=str(tmp_path), **(SETTINGS | {"duration": "200ba"}))
    assert launch.finish(launch.start(processes, 2, Watched(run)), seconds=300) == [0, 0]
    for rank in (0, 1):
        (memory, files), (memory_after, files_after) = json.loads((tmp_path / f"held-{rank}").read_text())
        assert files_after <= files + 1  # a segment's file may be open at one of the two moments
        assert memory_after - memory < 16 * 1024  # a leak of one batch's hidden states a step would be more


@dataclasses.dataclass(frozen=True)
class Refused:
    """Runs, and writes down what it fails with."""

    run: TinyRun
    replication: int | None = None
    uneven: bool = False

    def __call__(self) -> None:
        make = UDSStreamingDataset.__init__
        UDSStreamingDataset.__init__ = lambda *a, **k: make(*a, **k, replication=self.replication)
        try:
            self.run.run(**({"train_subset_num_batches": 3 + int(os.environ["RANK"])} if self.uneven else {}))
        except Exception as error:
            Path(self.run.folder, f"refused-{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")
            raise


@pytest.mark.parametrize(
    ("selection", "settings", "message"),
    [
        (
            {"keep": 3},
            {},
            "ConfigError: keep: 3 of the 8 candidates of a global batch are to be kept, but 2 ranks can only train on equal shares; "
            "keep 2 or 4",
        ),
        ({"keep": 4}, {"replication": 2}, "ConfigError: the data set gives each sample to 2 ranks (replication)"),
        (
            {"keep": 4},
            {"uneven": True},
            "RankError: the ranks' data loaders yield between 3 and 4 batches an epoch (rank ",
        ),
    ],
)
def test_what_several_ranks_cannot_do(streams, processes, tmp_path, selection, settings, message):
    run = TinyRun(streams=streams, folder=str(tmp_path), **(SETTINGS | {"selection": selection}))
    codes = launch.finish(launch.start(processes, 2, Refused(run, **settings)))
    assert codes == [1, 1]
    for rank in (0, 1):
        assert Path(tmp_path, f"refused-{rank}").read_text().startswith(message)


def test_the_order_is_part_of_the_interface():
    assert isinstance(canonical_order([2, 2], 2), CanonicalOrder)
    assert "scope" in OnlineBatchSelection(scope="rank").config.as_dict()
