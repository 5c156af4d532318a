"""Parameters sharded over the ranks by FSDP2, over gloo on CPUs: the same scores, choices and weights, and no rank that holds the head."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import launch
import numpy as np
import oracles
import pytest
import torch
from composer.devices import DeviceCPU
from composer.utils import dist
from tiny import TinyRun, collate, gemma2, write_stream
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from udsstream import SelectionConfig, SelectionLog
from udsstream.errors import ModelError
from udsstream.mosaicml.selector import CandidateSelector
from udsstream.mosaicml.sharding import check_sharding, own_rows
from udsstream.scoring import scorer as scorer_module
from udsstream.scoring.lm_head import LMHead, factor_head
from udsstream.scoring.projection import BilinearProjection
from udsstream.scoring.scorer import CandidateScorer


@pytest.fixture(scope="module")
def processes():
    return launch.forkserver()


def on_ranks(processes, ranks: int, work: Any) -> None:
    assert launch.finish(launch.start(processes, ranks, work)) == [0] * ranks


# A head in shards ---------------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "97 rows": {"v": 97},
    "a bias and a scale": {"v": 97, "bias": True, "scale": 0.25},
    "low rank": {"v": 97, "rank": 3},
    "fewer rows than columns": {"v": 11},
    "a rank without rows": {"v": 4},  # of 3 ranks: 2, 2 and none
    "a soft cap": {"v": 97, "softcap": 3.0},
    "in slices": {"v": 97, "bias": True, "slices": True},
}
D, LENGTHS = 20, ([7, 1, 30], [33], [2, 9])


def case(name: str) -> tuple[LMHead, CandidateScorer]:
    settings = CASES[name]
    v, generator = settings["v"], torch.Generator().manual_seed(1)
    weight = torch.randn(v, D, generator=generator)
    if "rank" in settings:
        weight = weight[:, : settings["rank"]] @ torch.randn(settings["rank"], D, generator=generator)
    head = LMHead(
        weight=weight,
        bias=torch.randn(v, generator=generator) if settings.get("bias") else None,
        scale=settings.get("scale", 1.0),
        softcap=settings.get("softcap"),
    )
    projection = BilinearProjection.draw(vocab_size=v, max_seq_len=64, dims=(4, 4), scale="isometric", seed=3)
    return head, CandidateScorer(projection, slices=settings.get("slices"))


def states_of(rank: int) -> list[torch.Tensor]:
    return [torch.randn(n, D, generator=torch.Generator().manual_seed(100 * rank + n)) for n in LENGTHS[rank]]


@dataclasses.dataclass(frozen=True)
class ScoredInShards:
    """Each rank scores its own candidates through its own rows; what it found goes to a file."""

    folder: str

    def __call__(self) -> None:
        dist.initialize_dist("cpu")
        rank = dist.get_global_rank()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        found: dict[str, Any] = {}
        for name in CASES:
            head, scorer = case(name)
            weight, shard = own_rows(distribute_tensor(head.weight, mesh, [Shard(0)]))
            bias = None if head.bias is None else own_rows(distribute_tensor(head.bias, mesh, [Shard(0)]))[0]
            scores = scorer.score_hidden(
                states_of(rank), dataclasses.replace(head, weight=weight, bias=bias, shard=shard)
            )
            found[name] = (len(weight), scores.intra, scores.embeddings)
        try:
            own_rows(distribute_tensor(torch.ones(6, 6), mesh, [Shard(1)]))
        except ModelError as error:
            found["refused"] = str(error)
        torch.save(found, Path(self.folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def in_shards(processes, tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("shards")
    on_ranks(processes, 3, ScoredInShards(str(folder)))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(3)]


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_whole_head(in_shards, name):
    head, scorer = case(name)
    for rank, found in enumerate(in_shards):
        _, intra, embeddings = found[name]
        whole = scorer.score_hidden(states_of(rank), head)
        torch.testing.assert_close(intra, whole.intra, rtol=1e-6, atol=0)
        torch.testing.assert_close(embeddings, whole.embeddings, rtol=1e-5, atol=1e-5 * float(whole.embeddings.norm()))
        for value, hidden in zip(intra, states_of(rank), strict=True):
            expected = oracles.nuclear_norm(head.logits(hidden).double().numpy())
            assert oracles.relative_error(value, expected) < 2e-5
    assert [found[name][0] for found in in_shards] == [len(part) for part in (*head.weight.chunk(3), ())[:3]]


def test_a_head_cut_across_its_rows_is_refused(in_shards):
    assert all("laid out over the ranks as" in found["refused"] for found in in_shards)
    assert all("tensor parallelism is not supported" in found["refused"] for found in in_shards)


def test_the_factors_of_one_rank_are_kept_apart_from_those_of_shards():
    """Nothing is added up where there is no shard: no process group exists here."""
    head, scorer = case("97 rows")
    assert not torch.distributed.is_initialized() or dist.get_world_size() == 1
    assert factor_head(head, scorer.projection).projected.shape == (4, D)


# A soft-capped model, without a Trainer -----------------------------------------------------------------------------------


def candidates(step: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(step)
    return [
        {"input_ids": rng.integers(3, 97, size=rng.integers(3, 25)), "sample_id": 8 * step + row} for row in range(8)
    ]


@dataclasses.dataclass(frozen=True)
class Decided:
    """Four decisions over batches dealt to the ranks, the scoring forwards of the ranks being unequal in number."""

    folder: str

    def __call__(self) -> None:
        torch.set_num_threads(1)
        dist.initialize_dist("cpu")
        ranks, rank = dist.get_world_size(), dist.get_global_rank()
        model = gemma2(softcap=0.5, scale=3.0)
        if ranks > 1:
            for layer in model.model.model.layers:
                fully_shard(layer)
            fully_shard(model.model)
        config = SelectionConfig(keep=4, max_seq_len=32, projection_dims=(16, 4), score_microbatch_tokens=30)
        selector = CandidateSelector(config, model, device=DeviceCPU())
        found = []
        for step in range(4):
            batch = collate(candidates(step)[rank::ranks])
            decision = selector.decide(batch, selects=True, epoch=0, batch_in_epoch=step)
            selector.remember(decision, decision.kept)
            found.append((decision.kept, decision.measured["intra"], decision.measured["inter"]))
        assert selector.form is not None
        torch.save((selector.form.form, found), Path(self.folder) / f"{ranks}-{rank}.pt")


@pytest.mark.slow
def test_a_soft_capped_head_is_scored_by_slices_that_its_owners_send(processes, tmp_path):
    for ranks in (1, 2):
        on_ranks(processes, ranks, Decided(str(tmp_path)))
    alone, one, other = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert alone[0] == one[0] == "vocabulary_slices"
    for step, reference in enumerate(alone[1]):
        for kept, intra, inter in (one[1][step], other[1][step]):
            assert kept == reference[0]
            torch.testing.assert_close(intra, reference[1], rtol=1e-5, atol=0)
            torch.testing.assert_close(inter, reference[2], rtol=1e-4, atol=0)


# Whole runs with Composer -------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "selection": {"keep": 4, "embeddings": "full"},
    "dropout": 0.0,
    "by_tokens": True,
    "duration": "20ba",
}


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> str:
    """80 samples: ten batches of 8 an epoch."""
    return str(write_stream(tmp_path_factory.mktemp("stream"), samples=80, seed=1))


@dataclasses.dataclass(frozen=True)
class Watched:
    """Trains, and writes how many rows of the head each rank made factors of, and how often."""

    run: TinyRun

    def __call__(self) -> None:
        rows = []
        factor = scorer_module.factor_head

        def watched(head: LMHead, projection: BilinearProjection) -> Any:
            rows.append(len(head.weight))
            return factor(head, projection)

        scorer_module.factor_head = watched
        self.run.run_and_save()
        torch.save(rows, Path(self.run.folder) / f"rows-{dist.get_global_rank()}.pt")


def log_of(run: TinyRun) -> SelectionLog:
    return SelectionLog.open(Path(run.folder) / "log")


def weights_of(run: TinyRun) -> dict[str, torch.Tensor]:
    return torch.load(Path(run.folder) / "weights.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "factored"),
    [
        ({}, 20),
        ({"tie": True}, 20),
        ({"lora": True, "lr": 1e-3}, None),
        ({"selection": {"method": "max_loss"}}, 0),
        ({"selection": {"method": "max_grad"}}, 0),
    ],
    ids=["full training", "a tied head", "LoRA, on the head too", "by loss", "by gradient"],
)
def test_two_ranks_with_shards_are_one_without(processes, stream, tmp_path, kind, factored):
    """Same candidates, scores and choices; each rank reads its own rows of the head alone, once a step."""
    settings = SETTINGS | kind | {"streams": (stream,)}
    # Unequal numbers of forwards.
    settings["selection"] = SETTINGS["selection"] | kind.get("selection", {}) | {"score_microbatch_tokens": 40}
    alone, sharded = (TinyRun(folder=str(tmp_path / name), **settings) for name in ("alone", "sharded"))
    sharded = dataclasses.replace(sharded, shard="full")
    for ranks, run in ((1, alone), (2, sharded)):
        Path(run.folder).mkdir()
        on_ranks(processes, ranks, Watched(run))
    ours, theirs = log_of(sharded).table(), log_of(alone).table()
    assert ours["sample_id"].to_pylist() == theirs["sample_id"].to_pylist()
    for before, tolerance in ((1, 1e-6), (5, 1e-5)):  # rounding grows with the steps
        early = ours["step"].to_numpy() < before
        np.testing.assert_allclose(ours["score"].to_numpy()[early], theirs["score"].to_numpy()[early], rtol=tolerance)
    for step in range(20):
        scores = np.sort(theirs.filter(np.equal(theirs["step"].to_numpy(), step))["score"].to_numpy())[::-1]
        close = abs(scores[3] - scores[4]) < 1e-5 * scores[3]
        assert log_of(sharded).selected(step) == log_of(alone).selected(step) or close, f"step {step}"
    found, expected = weights_of(sharded), weights_of(alone)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-2, atol=1e-3) for name in expected)
    rows = [torch.load(tmp_path / "sharded" / f"rows-{rank}.pt", weights_only=True) for rank in range(2)]
    assert [{*found} - {own} for found, own in zip(rows, (49, 48), strict=True)] == [set(), set()]  # of 97
    assert len(rows[0]) == len(rows[1])
    assert factored is None or len(rows[0]) == factored
    # Digests of weights would need them whole in one place.
    assert log_of(sharded).run["weights"] == {"frozen_sha256": None, "trained_sha256": None}
    assert log_of(alone).run["weights"]["trained_sha256"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_sharded_run_goes_on_where_it_stopped(processes, stream, tmp_path, kind):
    settings = SETTINGS | {"streams": (stream,), "shard": kind, "dropout": 0.1, "save_interval": "5ba"}
    whole = TinyRun(folder=str(tmp_path / "whole"), **settings)
    parted = TinyRun(folder=str(tmp_path / "parted"), autoresume=True, **(settings | {"duration": "13ba"}))
    for run in (whole, parted, dataclasses.replace(parted, duration="20ba")):
        Path(run.folder).mkdir(exist_ok=True)
        on_ranks(processes, 2, run.run_and_save)
    ours, theirs = log_of(parted), log_of(whole)
    assert ours.table().drop_columns(["attempt"]).equals(theirs.table().drop_columns(["attempt"]))
    assert ours.verify().attempts == 2
    found, expected = weights_of(parted), weights_of(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# Refusals -----------------------------------------------------------------------------------------------------------------


def test_fsdp1_is_refused():
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapped)
    model = nn.Sequential(nn.Linear(2, 2))
    check_sharding(model)
    model.append(wrapped)
    with pytest.raises(ModelError, match=r"sharded by FSDP1, .* shard it by FSDP2: .* FSDP_VERSION=2"):
        check_sharding(model)
