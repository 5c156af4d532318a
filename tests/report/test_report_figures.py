"""The report's numbers are those that plain Python counts in the log's rows, for every kind of run, in bins, samples and bounds."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import uds_log

from udsstream.errors import LogCorruptError
from udsstream.report import figures as figures_module
from udsstream.report.figures import bands, histogram, measure, stream_names
from udsstream.selection_log import layout
from udsstream.selection_log.reader import SelectionLog
from udsstream.selection_log.writer import SelectionLogWriter


def pearson(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ranks": 2, "steps": 9},
        {"off": (0, 3, 4), "steps": 7},
        {"method": "random"},
        {"streams": False},
        {"resume_at": 5, "steps": 8, "checkpoints": (2,)},
        {"steps": 1},
        {"embeddings": "full", "steps": 20},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
@pytest.mark.parametrize("bins", [100, 3])
@pytest.mark.parametrize("sample_rows", [1_000_000, 20])
def test_figures_are_what_the_rows_say(tmp_path, monkeypatch, settings, bins, sample_rows):
    monkeypatch.setattr(figures_module, "BINS", bins)
    log = SelectionLog.open(uds_log.write(tmp_path / "run", **dict(settings)))
    rows = log.table().to_pylist()
    found = measure(log, sample_rows=sample_rows)
    kept = [row for row in rows if row["selected"]]
    scored = [row for row in rows if row["score"] is not None]
    steps = sorted({row["step"] for row in rows})
    assert (found.steps, found.scored_steps) == (len(steps), len({row["step"] for row in scored}))
    assert (found.candidates, found.kept, found.scored, found.not_finite) == (len(rows), len(kept), len(scored), 0)
    assert found.candidate_tokens == sum(row["tokens"] for row in rows)
    assert found.saved_tokens == sum(row["tokens"] for row in rows if not row["selected"])
    assert found.epochs == len({row["epoch"] for row in rows})
    assert found.correlation == pytest.approx(
        pearson([row["score"] for row in scored], [row["tokens"] for row in scored]), rel=1e-9
    )

    names = [name for name, _ in uds_log.STREAMS]
    expected = {}
    for row in rows:
        name = "(no stream)" if row["stream"] is None else names[row["stream"]]
        offered, chosen = expected.get(name, (0, 0))
        expected[name] = offered + 1, chosen + row["selected"]
    assert {s.name: (s.candidates, s.kept) for s in found.streams} == expected
    assert [s.candidates for s in found.streams] == sorted((s.candidates for s in found.streams), reverse=True)

    count = min(bins, len(steps))
    assert len(found.bins) == count
    for i in range(count):
        of_bin = [step for place, step in enumerate(steps) if place * count // len(steps) == i]
        inside = [row for row in rows if row["step"] in of_bin]
        assert (found.bins.first[i], found.bins.last[i]) == (of_bin[0], of_bin[-1])
        assert (found.bins.candidates[i], found.bins.kept[i]) == (len(inside), sum(row["selected"] for row in inside))
        assert found.bins.candidate_tokens[i] == sum(row["tokens"] for row in inside)
        assert found.bins.kept_tokens[i] == sum(row["tokens"] for row in inside if row["selected"])
        distances = [row["inter"] for row in inside if row["inter"] is not None]
        of_kept = [row["inter"] for row in inside if row["inter"] is not None and row["selected"]]
        for value, given in ((found.bins.inter_candidates[i], distances), (found.bins.inter_kept[i], of_kept)):
            assert value == pytest.approx(statistics.fmean(given)) if given else math.isnan(value)

    assert found.rows.one_in == (1 if sample_rows >= len(rows) else -(-len(rows) // sample_rows))
    if found.rows.one_in == 1:
        key = lambda values: sorted(map(str, values))  # noqa: E731 (None, NaN and numbers)
        nan = lambda value: math.nan if value is None else value  # noqa: E731
        given = [
            (row["tokens"], nan(row["intra"]), nan(row["inter"]), nan(row["score"]), row["selected"]) for row in rows
        ]
        held = zip(
            *(getattr(found.rows, n).tolist() for n in ("tokens", "intra", "inter", "score", "selected")), strict=True
        )
        assert key(given) == key(held)
    else:
        assert 0 < len(found.rows) < len(rows)


def test_the_sample_is_the_same_each_time_and_evenly_spread(tmp_path):
    log = SelectionLog.open(uds_log.write(tmp_path / "run", steps=300))
    first, again = (measure(log, sample_rows=500).rows for _ in range(2))
    assert first.one_in == 4
    assert np.array_equal(first.score, again.score)
    rows = measure(log).rows
    assert len(first) == pytest.approx(len(rows) / 4, rel=0.15)
    assert first.tokens.mean() == pytest.approx(rows.tokens.mean(), rel=0.1)
    assert first.selected.mean() == pytest.approx(rows.selected.mean(), rel=0.2)


def test_an_empty_log(tmp_path):
    SelectionLogWriter.create(tmp_path, run=uds_log.run(), embeddings="none").close()
    found = measure(SelectionLog.open(tmp_path))
    assert (found.steps, found.candidates, len(found.bins), len(found.rows)) == (0, 0, 0, 0)
    assert found.correlation is None
    assert found.times is None


def test_a_log_that_is_being_written(tmp_path):
    writer = SelectionLogWriter.create(tmp_path, run=uds_log.run(), embeddings="none")
    uds_log.append(writer, 0, 4)
    assert measure(SelectionLog.open(tmp_path)).steps == 4
    writer.close()


def test_scores_that_are_no_numbers_are_counted_and_left_out(tmp_path):
    writer = SelectionLogWriter.create(tmp_path, run=uds_log.run(), embeddings="none")
    columns = uds_log.candidates(0, rows=7, method="uds", scored=True)
    columns["score"] = columns["score"].copy()
    columns["score"][[1, 4]] = np.nan, np.inf
    writer.append(0, columns)
    writer.close()
    found = measure(SelectionLog.open(tmp_path))
    assert (found.scored, found.not_finite) == (5, 2)
    assert math.isfinite(found.correlation)
    assert np.isfinite(bands(found.rows.score, found.rows.bin, 1)).all()


def test_alike_scores_have_no_correlation(tmp_path):
    writer = SelectionLogWriter.create(tmp_path, run=uds_log.run(), embeddings="none")
    columns = uds_log.candidates(0, rows=7, method="uds", scored=True)
    columns["score"] = np.full(7, 1e7, np.float32)
    writer.append(0, columns)
    writer.close()
    assert measure(SelectionLog.open(tmp_path)).correlation is None


def test_the_memory_is_said_to_hold_what_was_pushed(tmp_path):
    log = SelectionLog.open(uds_log.write(tmp_path / "run", embeddings="full", steps=11))
    memory = measure(log).memory
    assert (memory.capacity, memory.pushed) == (uds_log.CAPACITY, log.pushes().num_rows)
    assert memory.turnovers == pytest.approx(log.pushes().num_rows / uds_log.CAPACITY)
    assert measure(SelectionLog.open(uds_log.write(tmp_path / "none"))).memory is None


def test_times_of_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(figures_module, "BINS", 2)
    root = uds_log.write(tmp_path / "run", steps=4)
    times = [
        (0, 3.0, 1.0),
        (1, 5.0, 2.0),
        (2, 7.0, 1.0),
        (9, 100.0, 100.0),
    ]  # none of step 3, one of a step that is not logged
    path = layout.timings_path(root)
    keys = ("step", "step_seconds", "selection_seconds")
    path.write_text(
        "".join(json.dumps(dict(zip(keys, line, strict=True)) | {"log_seconds": 0.5}) + "\n" for line in times)
    )
    found = measure(SelectionLog.open(root)).times
    assert (found.steps, found.step_total, found.selection_total, found.log_total) == (3, 15.0, 4.0, 1.5)
    assert found.selection_share == pytest.approx(4 / 15)
    assert found.step.tolist() == [4.0, 7.0]
    assert found.selection.tolist() == [1.5, 1.0]


def test_times_that_cannot_be_read_cost_no_other_figure(tmp_path):
    root = uds_log.write(tmp_path / "run")
    layout.timings_path(root).write_text('{"step":"x"}\n')
    found = measure(SelectionLog.open(root))
    assert found.times is None
    assert any("timings.jsonl, line 1" in note for note in found.notes)
    assert found.candidates > 0


def test_a_damaged_segment_is_named(tmp_path):
    root = uds_log.write(tmp_path / "run")
    segment = next((root / "selection").rglob("*.arrow"))
    content = bytearray(segment.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    segment.write_bytes(content)
    with pytest.raises(LogCorruptError):
        measure(SelectionLog.open(root))


def test_bands_are_numpys_quantiles_of_each_bin():
    rng = np.random.default_rng(0)
    values, bins = rng.normal(size=500).astype(np.float32), rng.integers(0, 4, 500)
    values[::17] = np.nan
    found = bands(values, bins, 5)
    for number in range(4):
        part = [float(v) for v, b in zip(values, bins, strict=True) if b == number and not math.isnan(v)]
        assert np.allclose(found[:, number], np.quantile(part, [0.05, 0.25, 0.5, 0.75, 0.95]))
    assert np.isnan(found[:, 4]).all()


def test_a_histogram_counts_each_value_once():
    rng = np.random.default_rng(1)
    values, selected = rng.normal(size=5000), rng.random(5000) < 0.3
    values[:3] = 1e6, -1e6, np.nan
    found = histogram(values, selected)
    assert found.kept.sum() == selected[np.isfinite(values)].sum()
    assert found.kept.sum() + found.rejected.sum() == 4999
    assert -5 < found.edges[0] < found.edges[-1] < 5
    assert found.outside == int(((values < found.edges[0]) | (values > found.edges[-1])).sum())
    assert histogram(np.array([np.nan]), np.array([True])) is None
    alike = histogram(np.array([2.0, 2.0]), np.array([True, False]))
    assert (alike.kept.sum(), alike.rejected.sum(), alike.outside) == (1, 1, 0)


@pytest.mark.parametrize("streams", [None, "text", 3, {}, [None, 5]])
def test_names_of_streams_whatever_run_json_holds(streams):
    assert all(isinstance(name, str) for name in stream_names({"streams": streams}))
    assert stream_names({"streams": [{"name": "a"}, {}]}) == ["a", "1"]


def test_a_stream_that_run_json_does_not_name(tmp_path):
    root = uds_log.write(Path(tmp_path / "run"), run={"streams": []})
    assert {s.name for s in measure(SelectionLog.open(root)).streams} == {
        "(stream 0, not in run.json)",
        "(stream 1, not in run.json)",
    }
