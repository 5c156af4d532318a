"""The questions of `udsstream log`, each against a slow, obvious answer from the rows as Python values."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uds_log
from typer.testing import CliRunner

from udsstream.cli import app
from udsstream.errors import ConfigError, LogError
from udsstream.log_queries import queries
from udsstream.log_queries.near_duplicates import near_duplicates
from udsstream.log_queries.summary import summarize
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.writer import SelectionLogWriter

GOLDEN = Path(__file__).parent / "selection_log" / "golden_v1"
LOGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "resumed": {"resume_at": 5},
    "ranks": {"ranks": 3, "steps": 9},
    "resumed ranks": {"ranks": 2, "steps": 9, "resume_at": 4},
    "unscored steps": {"off": (0, 4, 5)},
    "never scored": {"off": tuple(range(12))},
    "no streams": {"streams": False},
    "random": {"method": "random"},
    "everything kept": {"rows": 2},
    "one step": {"steps": 1},
}


@pytest.fixture(params=LOGS, scope="module")
def log(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SelectionLog:
    return SelectionLog.open(uds_log.write(tmp_path_factory.mktemp("log") / "a", **LOGS[request.param]))


@pytest.fixture
def plain(tmp_path: Path) -> SelectionLog:
    return SelectionLog.open(uds_log.write(tmp_path / "a"))


def steps_of(log: SelectionLog, **given: Any) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """(step, attempt) → its rows by position."""
    out: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for row in log.table(**given).to_pylist():
        out[row["step"], row["attempt"]].append(row)
    return {key: sorted(rows, key=lambda row: row["position"]) for key, rows in sorted(out.items())}


def rank(rows: list[dict[str, Any]], row: dict[str, Any], column: str) -> int:
    better = [r for r in rows if (-r[column], r["position"]) < (-row[column], row["position"])]
    return len(better) + 1


# -- one sample --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("all_attempts", [False, True])
def test_each_turn_of_a_sample_is_told(log: SelectionLog, all_attempts: bool) -> None:
    current = set(steps_of(log))
    by_step = steps_of(log, all_attempts=all_attempts)
    offered = 0
    for sample_id in range(31):
        history = queries.sample_history(log, sample_id, all_attempts=all_attempts)
        expected = [(key, rows, row) for key, rows in by_step.items() for row in rows if row["sample_id"] == sample_id]
        assert len(history.offers) == len(expected)
        for offer, (key, rows, row) in zip(history.offers, expected, strict=True):
            for name in (
                "step",
                "attempt",
                "epoch",
                "position",
                "shard",
                "shard_index",
                "tokens",
                "intra",
                "inter",
                "score",
            ):
                assert getattr(offer, name) == row[name], name
            k = sum(r["selected"] for r in rows)
            assert (offer.candidates, offer.kept, offer.chosen) == (len(rows), k, row["selected"])
            assert offer.superseded == (key not in current)
            if row["score"] is None:
                assert (offer.rank, offer.kth_score, offer.next_score, offer.margin, offer.chosen_by_intra) == (
                    None,
                ) * 5
                assert "selection was off" in offer.reason
                continue
            kth, *rest = sorted((r["score"] for r in rows), reverse=True)[k - 1 :]
            assert (offer.rank, offer.kth_score) == (rank(rows, row, "score"), kth)
            assert offer.next_score == (rest[0] if rest else None)
            assert offer.margin == pytest.approx(row["score"] - kth, abs=1e-6)
            assert offer.chosen == (offer.rank <= k)
            if row["intra"] is None:
                assert offer.chosen_by_intra is None
                assert "at random" in offer.reason
            else:
                assert offer.intra_rank == rank(rows, row, "intra")
                assert offer.chosen_by_intra == (offer.intra_rank <= k)
            assert "contradicts" not in offer.reason
        assert history.times_chosen == sum(row["selected"] for key, _, row in expected if key in current)
        assert history.steps_searched == len(current)
        offered += len(expected)
    assert offered == sum(map(len, by_step.values()))


def test_reasons_say_what_decided(tmp_path: Path) -> None:
    log = SelectionLog.open(uds_log.write(tmp_path / "a", steps=60))
    offers = [offer for sample in range(31) for offer in queries.sample_history(log, sample).offers]
    lifted = [offer for offer in offers if offer.chosen and not offer.chosen_by_intra]
    put_back = [offer for offer in offers if not offer.chosen and offer.chosen_by_intra]
    assert lifted
    assert put_back
    assert all("by intra alone it would not have been chosen" in offer.reason for offer in lifted)
    assert all("others were further from what the memory held" in offer.reason for offer in put_back)
    for offer in put_back:
        assert offer.margin is not None
        assert offer.margin <= 0
        assert f"rank {offer.rank} of {offer.candidates}, 2 were kept" in offer.reason
        if offer.margin < 0:
            assert f"(margin {offer.margin:+.3g})" in offer.reason
    ties = [offer for offer in offers if not offer.chosen and offer.margin == 0]
    assert ties
    assert all("went to the smaller position" in offer.reason for offer in ties)


def test_whether_a_sample_exists_is_read_from_the_streams(plain: SelectionLog, tmp_path: Path) -> None:
    def place(sample: int) -> tuple[Any, ...]:
        history = queries.sample_history(plain, sample)
        return history.exists, history.stream, history.number_in_stream, len(history.offers) > 0

    assert place(0) == (True, "pairs", 0, True)
    assert place(30) == (True, "long", 10, True)
    assert place(31) == (True, "unused", 0, False)
    assert place(34) == (False, None, None, False)
    assert place(-1) == (False, None, None, False)
    without = SelectionLog.open(uds_log.write(tmp_path / "b", streams=False))
    assert queries.sample_history(without, 99).exists is None


def test_until_leaves_out_later_turns(plain: SelectionLog) -> None:
    for sample in range(31):
        all_of_them = queries.sample_history(plain, sample).offers
        assert queries.sample_history(plain, sample, until=6).offers == tuple(o for o in all_of_them if o.step < 6)
    assert queries.sample_history(plain, 3, until=6).steps_searched == 6


def test_a_choice_against_the_scores_is_called_a_contradiction(tmp_path: Path) -> None:
    batch = uds_log.candidates(0, rows=7, method="uds", scored=True)
    batch["selected"] = ~batch["selected"]
    batch["score"] = np.ma.MaskedArray(batch["score"], mask=np.arange(7) == 2)
    batch["train_order"] = np.ma.masked_all(7, np.int32)
    with SelectionLogWriter.create(tmp_path / "a", run=uds_log.run(), embeddings="none") as writer:
        writer.append(0, batch)
    log = SelectionLog.open(tmp_path / "a")
    offers = [offer for sample in range(31) for offer in queries.sample_history(log, sample).offers]
    assert len(offers) == 7
    assert sum("against its score" in offer.reason for offer in offers) >= 2
    assert sum("is no finite number" in offer.reason for offer in offers) == 1


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_scores_that_are_no_numbers_still_answer(tmp_path: Path, value: float) -> None:
    with SelectionLogWriter.create(tmp_path / "a", run=uds_log.run(), embeddings="none") as writer:
        for step, selected in ((0, True), (1, False)):
            batch = uds_log.candidates(0, rows=7, method="uds", scored=True)
            batch["score"][3] = batch["intra"][3] = batch["inter"][3] = value
            batch["selected"] &= selected
            batch["train_order"] = np.ma.masked_all(7, np.int32)
            writer.append(step, batch)
    log = SelectionLog.open(tmp_path / "a")
    for sample in range(31):
        for offer in queries.sample_history(log, sample).offers:
            assert ("nothing was kept" in offer.reason) == (offer.step == 1)
            assert json.dumps(offer.as_dict(), allow_nan=False)
    for found in (
        queries.length_effect(log),
        queries.suppressed(log),
        *queries.most_chosen(log, 99),
        *queries.stream_shares(log),
    ):
        assert json.dumps(found.as_dict(), allow_nan=False)


def test_an_unfinished_log_answers(tmp_path: Path) -> None:
    writer = SelectionLogWriter.create(tmp_path / "a", run=uds_log.run(), embeddings="none")
    log = SelectionLog.open(tmp_path / "a")
    assert queries.sample_history(log, 3).offers == ()
    assert queries.trained_on(log).samples == 0
    assert [share.offered for share in queries.stream_shares(log)] == [0, 0, 0]
    assert queries.most_chosen(log, 3) == ()
    assert queries.suppressed(log).suppressed == 0
    assert queries.length_effect(log).deciles == ()
    assert queries.length_effect(log).longest_share is None
    uds_log.append(writer, 0, 3)
    assert len(SelectionLog.open(tmp_path / "a").steps()) == 3
    assert queries.trained_on(log).times == 6
    writer.release()


# -- what a checkpoint was trained on ----------------------------------------------------------------------------


@pytest.mark.parametrize("until", [None, 0, 1, 7])
def test_trained_on_counts_what_was_selected_below_the_step(log: SelectionLog, until: int | None) -> None:
    rows = [row for row in log.table().to_pylist() if row["selected"] and (until is None or row["step"] < until)]
    expected = Counter(row["sample_id"] for row in rows)
    found = queries.trained_on(log, until=until)
    assert dict(zip(found.sample_ids.tolist(), found.counts.tolist(), strict=True)) == expected
    assert (found.samples, found.times) == (len(expected), len(rows))
    assert found.steps == len({row["step"] for row in rows})
    assert json.loads(json.dumps(found.as_dict()))["trained_on"] == [
        {"sample_id": sample, "times": times} for sample, times in sorted(expected.items())
    ]


def test_a_log_that_does_not_reach_the_checkpoint_says_so(plain: SelectionLog) -> None:
    for until in (0, 1, 12):
        queries.check_reaches(plain, until)
    with pytest.raises(LogError, match=r"does not reach ba13: it holds steps 0 to 11; .* can speak of is ba12"):
        queries.check_reaches(plain, 13)


def test_a_log_with_a_gap_says_so(tmp_path: Path) -> None:
    with SelectionLogWriter.create(tmp_path / "a", run=uds_log.run(), embeddings="none") as writer:
        uds_log.append(writer, 0, 2)
        uds_log.append(writer, 5, 7)
    with pytest.raises(LogError, match=r"has no step 3, but later ones: it is incomplete"):
        queries.check_reaches(SelectionLog.open(tmp_path / "a"), 4)


# -- streams, the most and the least -----------------------------------------------------------------------------


@pytest.mark.parametrize("until", [None, 6])
def test_stream_shares_are_counts(log: SelectionLog, until: int | None) -> None:
    rows = [row for row in log.table().to_pylist() if until is None or row["step"] < until]
    chosen = [row for row in rows if row["selected"]]
    shares = {share.name: share for share in queries.stream_shares(log, until=until)}
    names = [stream["name"] for stream in log.run.get("streams", [])]
    assert set(shares) == ({"pairs", "long", "unused"} if names else {"(no stream)"})
    for name, share in shares.items():
        number = names.index(name) if names else None
        own = [row for row in rows if row["stream"] == number]
        kept = [row for row in own if row["selected"]]
        assert (share.offered, share.chosen) == (len(own), len(kept))
        assert (share.tokens_offered, share.tokens_chosen) == (
            sum(row["tokens"] for row in own),
            sum(row["tokens"] for row in kept),
        )
        assert share.share_chosen == (len(kept) / len(own) if own else None)
        assert share.share_of_chosen == pytest.approx(len(kept) / len(chosen))
        scores = [row["score"] for row in own if row["score"] is not None]
        assert share.mean_score == (pytest.approx(statistics.fmean(scores), rel=1e-6) if scores else None)


def test_a_stream_that_run_json_does_not_know_is_named_so(tmp_path: Path) -> None:
    log = SelectionLog.open(uds_log.write(tmp_path / "a", run={"streams": [{"name": "pairs", "samples": 20}]}))
    assert {share.name for share in queries.stream_shares(log)} == {"pairs", "(stream 1, not in run.json)"}


@pytest.mark.parametrize("most", [True, False])
@pytest.mark.parametrize("until", [None, 6])
def test_the_most_and_the_least_chosen(log: SelectionLog, most: bool, until: int | None) -> None:
    expected: dict[int, dict[str, list[Any]]] = defaultdict(lambda: {"chosen": [], "score": [], "rank": []})
    for (step, _), rows in steps_of(log).items():
        if until is not None and step >= until:
            continue
        for row in rows:
            entry = expected[row["sample_id"]]
            entry["chosen"].append(row["selected"])
            if row["score"] is not None:
                entry["score"].append(row["score"])
                entry["rank"].append(rank(rows, row, "score"))

    def key(sample: int) -> tuple[Any, ...]:
        entry, sign = expected[sample], -1 if most else 1
        ranks = -sign * statistics.fmean(entry["rank"]) if entry["rank"] else math.inf
        return sign * sum(entry["chosen"]), ranks, sample

    ask = queries.most_chosen if most else queries.least_chosen
    found = ask(log, 8, until=until)
    assert [item.sample_id for item in found] == sorted(expected, key=key)[:8]
    for item in found:
        entry = expected[item.sample_id]
        assert (item.offered, item.chosen) == (len(entry["chosen"]), sum(entry["chosen"]))
        assert item.mean_rank == (pytest.approx(statistics.fmean(entry["rank"])) if entry["rank"] else None)
        assert item.mean_score == (
            pytest.approx(statistics.fmean(entry["score"]), rel=1e-6) if entry["score"] else None
        )
    assert len(ask(log, 1000, until=until)) == len(expected)


# -- diversity ---------------------------------------------------------------------------------------------------


def test_suppressed_are_those_that_intra_alone_would_have_kept(log: SelectionLog) -> None:
    if log.run["selection"]["method"] != "uds":
        with pytest.raises(
            ConfigError, match=r"chose by the method 'random', which does not weigh diversity against utility"
        ):
            queries.suppressed(log)
        return
    expected: dict[tuple[int, int], dict[str, Any]] = {}
    scored = chosen = 0
    for (step, _), rows in steps_of(log).items():
        if any(row["score"] is None for row in rows):
            continue
        k = sum(row["selected"] for row in rows)
        scored, chosen = scored + 1, chosen + k
        median = statistics.median(row["inter"] for row in rows)
        lifted = [row["sample_id"] for row in rows if row["selected"] and rank(rows, row, "intra") > k]
        for row in rows:
            if rank(rows, row, "intra") <= k and not row["selected"]:
                expected[step, row["sample_id"]] = {
                    "median_inter": pytest.approx(median),
                    "below": pytest.approx(1 - row["inter"] / median),
                    "in_its_place": tuple(lifted),
                    "rank": rank(rows, row, "score"),
                    "intra_rank": rank(rows, row, "intra"),
                    "kept": k,
                } | {name: row[name] for name in ("intra", "inter", "score")}
    found = queries.suppressed(log)
    assert (found.steps, found.chosen, found.suppressed) == (scored, chosen, len(expected))
    assert {(item.step, item.sample_id) for item in found.items} == set(expected)
    for item in found.items:
        for name, value in expected[item.step, item.sample_id].items():
            assert getattr(item, name) == value, name
    assert [item.below for item in found.items] == sorted((item.below for item in found.items), reverse=True)
    assert queries.suppressed(log, limit=2).items == found.items[:2]
    assert {item.step for item in queries.suppressed(log, until=6).items} <= set(range(6))


def test_there_is_something_suppressed_in_the_test_logs(plain: SelectionLog) -> None:
    assert queries.suppressed(plain).suppressed > 3


@pytest.fixture(params=[{}, {"resume_at": 8}], ids=["plain", "resumed"])
def full(tmp_path: Path, request: pytest.FixtureRequest) -> SelectionLog:
    return SelectionLog.open(uds_log.write(tmp_path / "a", steps=40, embeddings="full", **request.param))


@pytest.mark.parametrize("portion", [1, 256 << 20])
@pytest.mark.parametrize("until", [None, 21])
def test_near_duplicates_are_all_close_pairs_within_the_window(
    full: SelectionLog, portion: int, until: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("udsstream.log_queries.near_duplicates._READ_BYTES", portion)
    monkeypatch.setattr("udsstream.log_queries.near_duplicates._BLOCK", 7)
    found = near_duplicates(full, until=until)
    pushes = [row for row in full.pushes().to_pylist() if until is None or row["step"] < until]
    assert (found.pushes, found.window) == (len(pushes), uds_log.CAPACITY)
    assert found.typical_distance is not None
    expected, same = {}, 0
    for at, later in enumerate(pushes):
        for earlier in pushes[max(0, at - uds_log.CAPACITY) : at]:
            distance = math.dist(later["embedding"], earlier["embedding"])
            if distance > 0.1 * found.typical_distance:
                continue
            if later["sample_id"] == earlier["sample_id"]:
                same += 1
            else:
                expected[later["step"], later["sample_id"], earlier["step"], earlier["sample_id"]] = distance
    assert expected
    assert (found.found, found.same_sample) == (len(expected), same)
    assert {
        (p.step, p.sample_id, p.earlier_step, p.earlier_sample_id): pytest.approx(p.distance) for p in found.pairs
    } == expected
    assert [pair.distance for pair in found.pairs] == sorted(pair.distance for pair in found.pairs)
    nearest = near_duplicates(full, until=until, limit=3)
    assert (nearest.found, nearest.pairs) == (len(expected), found.pairs[:3])
    assert near_duplicates(full, until=until, fraction=0.0).found == 0


def test_near_duplicates_leave_out_what_was_taken_over(tmp_path: Path) -> None:
    with SelectionLogWriter.create(
        tmp_path / "a",
        run=uds_log.run(),
        embeddings="full",
        embedding_dim=uds_log.DIM,
        buffer_capacity=uds_log.CAPACITY,
    ) as writer:
        none, before = np.full(4, -1), uds_log.vectors(np.array([1, 2, 3, 4]), 0)
        writer.push(-1, positions=none, sample_ids=none, push_index=0, embeddings=before, digest=bytes(32))
        uds_log.append(writer, 0, 6, embeddings="full", pushed=[4])
    found = near_duplicates(SelectionLog.open(tmp_path / "a"))
    assert found.pushes == 12
    assert all(pair.earlier_sample_id >= 0 for pair in found.pairs)


def test_copies_are_near_even_where_everything_is_a_copy(tmp_path: Path) -> None:
    with SelectionLogWriter.create(
        tmp_path / "a", run=uds_log.run(), embeddings="full", embedding_dim=3, buffer_capacity=4
    ) as writer:
        rows = np.full((6, 3), 2.5, np.float32)
        rows[5] = np.nan
        writer.push(0, positions=np.arange(6), sample_ids=np.arange(6), push_index=0, embeddings=rows, digest=bytes(32))
    found = near_duplicates(SelectionLog.open(tmp_path / "a"))
    assert (found.typical_distance, found.found) == (0, 10)
    assert json.dumps(found.as_dict(), allow_nan=False)


def test_near_duplicates_need_every_embedding(plain: SelectionLog, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"embeddings='none': only embeddings='full' keeps"):
        near_duplicates(plain)
    with SelectionLogWriter.create(tmp_path / "b", run=uds_log.run(), embeddings="full", embedding_dim=3) as writer:
        writer.release()
    with pytest.raises(ConfigError, match=r"does not say how many embeddings the memory holds"):
        near_duplicates(SelectionLog.open(tmp_path / "b"))
    log = SelectionLog.open(uds_log.write(tmp_path / "c", embeddings="full", steps=1))
    assert near_duplicates(log, until=0).typical_distance is None


@pytest.mark.parametrize(
    "changes",
    [
        {"streams": "pairs"},
        {"streams": [1, None]},
        {"streams": [{"samples": "x"}]},
        {"selection": ["uds"]},
        {"selection": None},
    ],
    ids=str,
)
def test_a_run_json_of_another_form_does_not_matter(tmp_path: Path, changes: dict[str, Any]) -> None:
    root = uds_log.write(tmp_path / "a", run=changes)
    for question in (
        "--sample=5",
        "--sample=31",
        "--streams",
        "--most=3",
        "--suppressed",
        "--length",
        "--until=ba6",
        "--step=3",
    ):
        assert udsstream(str(root), question)


# -- length ------------------------------------------------------------------------------------------------------


def slow_pearson(a: list[float], b: list[float]) -> Any:
    if len(a) < 2 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    try:
        return pytest.approx(statistics.correlation(a, b), abs=1e-9)
    except statistics.StatisticsError:
        return None


def slow_ranks(values: list[float]) -> list[float]:
    return [sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2 for value in values]


def test_length_correlations(log: SelectionLog) -> None:
    steps = [
        (rows, sum(row["selected"] for row in rows))
        for rows in steps_of(log).values()
        if all(row["score"] is not None for row in rows)
    ]
    effect = queries.length_effect(log)
    rows = [row for group, _ in steps for row in group]
    assert (effect.steps, effect.candidates) == (len(steps), len(rows))
    tokens, scores = [float(row["tokens"]) for row in rows], [row["score"] for row in rows]
    assert effect.score_pearson == slow_pearson(scores, tokens)
    assert effect.score_spearman == slow_pearson(slow_ranks(scores), slow_ranks(tokens))
    contested = [group for group, k in steps if k < len(group)]
    flat = [row for group in contested for row in group]
    assert effect.choice_point_biserial == slow_pearson(
        [float(row["selected"]) for row in flat], [float(row["tokens"]) for row in flat]
    )

    def less_mean(values: list[float]) -> list[float]:
        mean = statistics.fmean(values)
        return [round(value - mean, 12) for value in values]

    def within(groups: list[list[dict[str, Any]]], column: str, change=lambda values: values) -> list[float]:
        return [value for group in groups for value in less_mean(change([float(row[column]) for row in group]))]

    everything = [group for group, _ in steps]
    assert effect.within_score_pearson == slow_pearson(within(everything, "score"), within(everything, "tokens"))
    assert effect.within_score_spearman == slow_pearson(
        within(everything, "score", slow_ranks), within(everything, "tokens", slow_ranks)
    )
    assert effect.within_choice_point_biserial == slow_pearson(
        within(contested, "selected"), within(contested, "tokens")
    )
    both = chosen = 0
    chance = 0.0
    for group, k in steps:
        if k == len(group):
            continue
        longest = sorted(group, key=lambda row: (-row["tokens"], row["position"]))[:k]
        both += sum(row["selected"] for row in longest)
        chosen, chance = chosen + k, chance + k * k / len(group)
    assert effect.longest_share == (pytest.approx(both / chosen) if chosen else None)
    assert effect.longest_share_by_chance == (pytest.approx(chance / chosen) if chosen else None)


def test_deciles_hold_every_candidate_once(log: SelectionLog) -> None:
    deciles = queries.length_effect(log).deciles
    rows = [row for row in log.table().to_pylist() if row["score"] is not None]
    assert len(deciles) <= 10
    assert [d.shortest for d in deciles] == sorted(d.shortest for d in deciles)
    for decile, following in itertools.pairwise(deciles):
        assert decile.longest < following.shortest
    for decile in deciles:
        members = [row for row in rows if decile.shortest <= row["tokens"] <= decile.longest]
        assert (decile.candidates, decile.chosen) == (len(members), sum(row["selected"] for row in members))
        assert decile.mean_score == pytest.approx(statistics.fmean(row["score"] for row in members))
    assert sum(decile.candidates for decile in deciles) == len(rows)


def test_a_score_that_is_the_length_is_found(tmp_path: Path) -> None:
    with SelectionLogWriter.create(tmp_path / "a", run=uds_log.run(), embeddings="none") as writer:
        for step in range(5):
            batch = uds_log.candidates(step, rows=9, method="uds", scored=True)
            batch["score"] = (1000 * step + batch["tokens"]).astype(np.float32)  # the level differs from step to step
            batch["selected"] = np.isin(np.arange(9), np.argsort(-batch["score"], kind="stable")[:2])
            batch["train_order"] = np.ma.masked_all(9, np.int32)
            writer.append(step, batch)
    effect = queries.length_effect(SelectionLog.open(tmp_path / "a"))
    assert effect.score_pearson is not None
    assert effect.score_pearson < 0.5
    assert effect.within_score_pearson == pytest.approx(1)
    assert effect.within_score_spearman == pytest.approx(1)
    assert effect.longest_share == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_fast_order_is_lexsort(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 9, 40)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    of_row = np.repeat(np.arange(40), counts)
    values = rng.integers(0, 4, counts.sum()).astype(np.float32)
    values[rng.random(len(values)) < 0.1] = np.nan
    steps = queries._Steps(of_row=of_row, starts=starts, counts=counts)
    assert np.array_equal(steps.order(values), np.lexsort((values, of_row)))
    filled = np.nan_to_num(values)
    assert np.array_equal(steps.median(filled), [np.median(filled[of_row == step]) for step in range(40)])


def test_no_question_loads_torch() -> None:
    code = (
        "import sys, udsstream.log_queries.tables, udsstream.log_queries.summary\n"
        "print([name for name in ('torch', 'composer', 'streaming') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("root", sorted(GOLDEN.glob("*/run.json")), ids=lambda path: path.parent.name)
def test_logs_of_version_1_answer(root: Path) -> None:
    for question in ("--sample=5", "--streams", "--most=3", "--least=3", "--suppressed", "--length", "--until=ba2"):
        assert udsstream(str(root.parent), question)


# -- the command -------------------------------------------------------------------------------------------------


def udsstream(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["log", *arguments], env={"COLUMNS": "160"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize(
    "question",
    [
        "--sample=5",
        "--sample=5 --all-attempts",
        "--sample=31",
        "--streams",
        "--most=3",
        "--least=3",
        "--suppressed",
        "--length",
        "",
    ],
)
@pytest.mark.parametrize("until", ["", "--until=ba6"])
@pytest.mark.parametrize(
    "settings", [{"resume_at": 4}, {"streams": False, "off": (1,)}, {"embeddings": "full"}], ids=str
)
def test_each_question_has_a_table_and_json(
    tmp_path: Path, question: str, until: str, settings: dict[str, Any]
) -> None:
    root = str(uds_log.write(tmp_path / "a", **settings))
    arguments = [root, *question.split(), *until.split()]
    assert len(udsstream(*arguments)) > 40
    assert json.loads(udsstream(*arguments, "--json"))


def test_the_tables_say_what_was_asked(tmp_path: Path) -> None:
    root = str(uds_log.write(tmp_path / "a", resume_at=4, embeddings="full"))
    log = SelectionLog.open(root)
    sample = next(
        s for s in range(31) if any(o.superseded for o in queries.sample_history(log, s, all_attempts=True).offers)
    )
    shown = udsstream(root, f"--sample={sample}", "--all-attempts")
    assert "(superseded)" in shown
    assert f"(number {sample} of stream pairs)" in shown
    assert "was never offered in the 12 steps" in udsstream(root, "--sample=31")
    assert "does not exist" in udsstream(root, "--sample=99")
    assert "unused" in udsstream(root, "--streams")
    shown = " ".join(udsstream(root, "--until=ba6").split())  # the title is broken where the folder's name is long
    assert "before step 6" in shown
    assert "Checkpoint ba6 had been trained on" in shown
    assert "chosen all the same" in udsstream(root, "--suppressed")
    assert "Take the longest k" in udsstream(root, "--length")
    assert "that needs a run with embeddings=full" in udsstream(str(uds_log.write(tmp_path / "b")), "--suppressed")


def test_json_of_until_is_summary_and_samples(tmp_path: Path) -> None:
    root = str(uds_log.write(tmp_path / "a"))
    found = json.loads(udsstream(root, "--until=ba6", "--json"))
    assert found["steps"] == 6
    assert found["kept"] == found["times"] == sum(item["times"] for item in found["trained_on"]) == 12
    assert summarize(SelectionLog.open(root), until=6).kept == 12


def test_the_documented_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uds_log.write(tmp_path / "runs" / "a", embeddings="full")
    monkeypatch.chdir(tmp_path)
    document = (Path(__file__).parents[1] / "docs" / "reading_the_log.md").read_text()
    lines = re.findall(r"^udsstream log (.*?) *#", document, flags=re.MULTILINE)
    assert len(lines) == 7
    for line in lines:
        assert udsstream(*line.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--streams", "--length"], "--streams and --length are different questions"),
        (["--sample=1", "--step=1"], "--step and --sample are different questions"),
        (["--all-attempts"], "it goes with --sample alone"),
        (["--text"], "it goes with --step, --sample, --most or --least, without --json"),
        (["--streams", "--text"], "it goes with --step"),
        (["--least=2", "--text", "--json"], "without --json"),
        (["--until=120"], "'120' is not baN"),
        (["--until=ba-1"], "is not baN"),
        (["--until=ba3", "--to-parquet"], "of the whole log"),
        (["--until=ba3", "--step=3"], "ba3 was made before step 3"),
        (["--most=0"], "Invalid value for '--most'"),
    ],
)
def test_bad_combinations_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    root = str(uds_log.write(tmp_path / "a"))
    done = CliRunner().invoke(app, ["log", root, *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_checkpoint_beyond_the_log_is_an_error(tmp_path: Path) -> None:
    root = str(uds_log.write(tmp_path / "a"))
    for more in ([], ["--streams"], ["--sample=3"]):
        with pytest.raises(LogError, match="does not reach ba13"):
            CliRunner().invoke(app, ["log", root, "--until=ba13", *more], catch_exceptions=False)
