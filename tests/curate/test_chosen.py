"""Every rule of choosing against a slow reference that goes row by row, on logs with ties, ranks, resumes, repeats and unscored steps."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import uds_log
from hypothesis import given, settings
from hypothesis import strategies as st

from udsstream.curate.chosen import Choice, choose, largest_output
from udsstream.errors import ConfigError, LogError
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.writer import SelectionLogWriter

LOGS: dict[str, dict[str, Any]] = {
    "one rank": {"steps": 23},
    "resumed": {"steps": 20, "resume_at": 7},
    "three ranks, resumed": {"steps": 16, "ranks": 3, "resume_at": 5},
    "steps without scores": {"steps": 14, "off": (0, 1, 6)},
    "random": {"steps": 15, "method": "random"},
    "no stream columns": {"steps": 12, "streams": False},
    "one step": {"steps": 1},
}
CHOICES: dict[str, Choice] = {
    "ever": Choice(),
    "twice": Choice(times=2),
    "offered": Choice(times=0),
    "last epoch": Choice(last_epoch=True),
    "until": Choice(until=9),
    "last epoch before a step": Choice(last_epoch=True, until=8, times=1),
    "quantile": Choice(top_quantile=Fraction("0.2")),
    "quantile and chosen": Choice(top_quantile=Fraction("0.5"), times=1),
    "all by quantile": Choice(top_quantile=Fraction(1)),
    "quota": Choice(quotas={"pairs": 3, "long": 0}),
    "quota and share": Choice(quotas={"pairs": 4}, shares={"long": Fraction("1/3")}),
    "share of the offered": Choice(times=0, shares={"long": Fraction("0.25")}),
    "one stream": Choice(only=("long",)),
}


@pytest.fixture(scope="module", params=list(LOGS))
def log(request, tmp_path_factory) -> SelectionLog:
    return SelectionLog.open(uds_log.write(tmp_path_factory.mktemp("log") / "run", **LOGS[request.param]))


def reference(log: SelectionLog, choice: Choice) -> list[dict[str, Any]]:
    """The rules of docs/curating.md, one after the other, in plain Python."""
    rows = sorted(log.table().to_pylist(), key=lambda row: (row["step"], row["position"]))
    if choice.until is not None:
        rows = [row for row in rows if row["step"] < choice.until]
    if choice.last_epoch:
        rows = [row for row in rows if row["epoch"] == max(other["epoch"] for other in rows)]
    samples: dict[int, dict[str, Any]] = {}
    for row in rows:
        sample = samples.setdefault(row["sample_id"], {"sample_id": row["sample_id"], "rows": []})
        sample["rows"].append(row)
    names = [stream["name"] for stream in log.run.get("streams", [])]
    for age, sample in enumerate(samples.values()):
        taken = sorted(
            (row for row in sample["rows"] if row["selected"]), key=lambda row: (row["step"], row["train_order"])
        )
        scores = [row["score"] for row in sample["rows"] if row["score"] is not None]
        turn = taken[0] if taken else sample["rows"][0]
        sample |= {
            "age": age,
            "times_offered": len(sample["rows"]),
            "times_chosen": len(taken),
            "mean_score": sum(scores) / len(scores) if scores else None,
            "turn": turn,
            "place": (0, turn["step"], turn["train_order"]) if taken else (1, age, 0),
            "stream": names[turn["stream"]] if turn["stream"] is not None else None,
        }
    least = choice.times if choice.times is not None else (0 if choice.top_quantile else 1)
    kept = [sample for sample in samples.values() if sample["times_chosen"] >= least]

    def best(some: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(
            some,
            key=lambda s: (
                s["mean_score"] is None,
                -(s["mean_score"] or 0) if s["mean_score"] is not None else 0,
                s["age"],
            ),
        )

    if choice.top_quantile is not None:
        scored = best([sample for sample in samples.values() if sample["mean_score"] is not None])
        among = {s["sample_id"] for s in scored[: math.ceil(choice.top_quantile * len(scored))]}
        kept = [sample for sample in kept if sample["sample_id"] in among]
    if choice.only:
        kept = [sample for sample in kept if sample["stream"] in choice.only]
    groups: dict[str, list[dict[str, Any]]] = {}
    for sample in best(kept):
        groups.setdefault(sample["stream"], []).append(sample)
    for name, number in choice.quotas.items():
        groups[name] = groups.get(name, [])[:number]
    if choice.shares:
        for size in range(sum(map(len, groups.values())), -1, -1):  # the largest that fits, by trying all
            cut = {
                name: group[: math.floor(choice.shares[name] * size)] if name in choice.shares else group
                for name, group in groups.items()
            }
            if sum(map(len, cut.values())) == size:
                groups = cut
                break
    return sorted((sample for group in groups.values() for sample in group), key=lambda s: s["place"])


@pytest.mark.parametrize("name", list(CHOICES))
def test_a_choice_is_what_the_rules_say(log, name):
    choice = CHOICES[name]
    named = {stream["name"] for stream in log.run.get("streams", [])}
    if {*choice.only, *choice.quotas, *choice.shares} - named:
        with pytest.raises(ConfigError, match=r"run\.json names no stream '(long|pairs)'; it has none"):
            choose(log, choice)
        return
    if choice.until is not None and choice.until > len(log.steps()):
        with pytest.raises(LogError, match=rf"does not reach ba{choice.until}"):
            choose(log, choice)
        return
    expected = reference(log, choice)
    if not expected and choice.shares:
        with pytest.raises(ConfigError, match="only an empty output meets the shares"):
            choose(log, choice)
        return
    found = choose(log, choice)
    assert found.sample_id.tolist() == [sample["sample_id"] for sample in expected]
    for column in ("times_chosen", "times_offered"):
        assert getattr(found, column).tolist() == [sample[column] for sample in expected]
    for column in ("score", "intra", "inter"):
        values = [sample["turn"][column] for sample in expected]
        np.testing.assert_array_equal(
            getattr(found, column), np.array([math.nan if v is None else v for v in values], np.float32)
        )
    np.testing.assert_allclose(
        found.mean_score, [math.nan if s["mean_score"] is None else s["mean_score"] for s in expected], rtol=1e-12
    )
    assert found.first_step.tolist() == [sample["turn"]["step"] for sample in expected]
    for column in ("shard", "shard_index", "stream"):
        values = [sample["turn"][column] for sample in expected]
        assert getattr(found, column).tolist() == [-1 if value is None else value for value in values]


def test_the_logs_have_what_the_rules_are_about(tmp_path):
    """Repeats, samples that were never chosen, equal mean scores, and superseded rows that would change the outcome."""
    log = SelectionLog.open(uds_log.write(tmp_path / "run", steps=20, resume_at=7))
    found = choose(log, Choice(times=0))
    assert (found.times_chosen > 1).any()
    assert (found.times_chosen == 0).any()
    assert len(np.unique(found.mean_score)) < len(found)
    everything = log.table(all_attempts=True)
    assert everything.num_rows > found.candidates
    old = {row["sample_id"] for row in everything.to_pylist() if row["selected"]}
    assert old != set(choose(log, Choice()).sample_id.tolist())


def test_samples_of_one_step_come_in_training_order(tmp_path):
    """Which is not that of their positions here; one sample is chosen twice in the step, at its second turn first."""
    writer = SelectionLogWriter.create(
        tmp_path / "run", run=uds_log.run(), rank=0, world_size=1, embeddings="none", embedding_dim=6, buffer_capacity=9
    )
    for step, (ids, order) in enumerate((([5, 3, 9, 3], [2, 3, 0, 1]), ([9, 7, 5, 1], [1, 3, 0, 2]))):
        columns = {
            name: values[:4] for name, values in uds_log.candidates(step, rows=7, method="uds", scored=True).items()
        }
        intra = np.arange(4, dtype=np.float32)
        columns |= {
            "sample_id": np.array(ids),
            "selected": np.ones(4, bool),
            "train_order": np.array(order, np.int32),
            "intra": intra,
        }
        writer.append(step, columns)
    writer.close()
    found = choose(SelectionLog.open(tmp_path / "run"), Choice())
    assert found.sample_id.tolist() == [9, 3, 5, 1, 7]
    assert found.intra.tolist() == [2, 3, 0, 3, 1]


@settings(max_examples=60)
@given(
    counts=st.dictionaries(st.integers(0, 4), st.integers(0, 40), min_size=1),
    shares=st.dictionaries(st.integers(0, 4), st.fractions(min_value="1/20", max_value=1, max_denominator=20)),
)
def test_the_largest_output_within_shares(counts, shares):
    def total(size: int) -> int:
        return sum(min(n, math.floor(shares[k] * size)) if k in shares else n for k, n in counts.items())

    assert largest_output(counts, shares) == max(
        size for size in range(sum(counts.values()) + 1) if total(size) == size
    )


def test_choices_that_cannot_be(tmp_path):
    log = SelectionLog.open(uds_log.write(tmp_path / "run", steps=6))
    for settings_, message in (
        ({"times": -1}, "times=-1"),
        ({"until": 0}, "until=0"),
        ({"top_quantile": Fraction(0)}, "top_quantile=0.0, expected more than 0"),
        ({"quotas": {"pairs": -1}}, "quota of stream 'pairs' is -1"),
        ({"shares": {"pairs": Fraction(2)}}, "share of stream 'pairs' is 2.0"),
        ({"quotas": {"pairs": 1}, "shares": {"pairs": Fraction(1, 2)}}, "a quota and a share"),
    ):
        with pytest.raises(ConfigError, match=message):
            Choice(**settings_)
    with pytest.raises(ConfigError, match=r"run\.json names no stream 'pair'; it has pairs, long, unused"):
        choose(log, Choice(quotas={"pair": 3}))
    with pytest.raises(
        ConfigError, match=r"only an empty output meets the shares \(pairs=1/4, long=1/4\): they add up to 0\.5"
    ):
        choose(log, Choice(shares={"pairs": Fraction(1, 4), "long": Fraction(1, 4)}))
    with pytest.raises(
        LogError, match=r"does not reach ba9: its last step is 5; the newest state that it can speak of is ba6"
    ):
        choose(log, Choice(until=9))
    empty = SelectionLog.open(uds_log.write(tmp_path / "empty", steps=0))
    with pytest.raises(LogError, match="has no decisions"):
        choose(empty, Choice())
