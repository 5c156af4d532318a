"""The table of a comparison against figures worked out by hand."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import pytest
from comparisons import finished_run, settings_of
from rich.console import Console

from udsstream.compare.arithmetic import chance_overlap
from udsstream.compare.config import CompareConfig, plan_runs
from udsstream.compare.table import as_markdown, compare_runs, print_table, write_table


@pytest.fixture
def config(tmp_path) -> CompareConfig:
    entries = {"random": {}, "long": {"selection.method": "longest"}, "late": {}, "none": {}}
    return CompareConfig(**settings_of(tmp_path / "out", "m", Path("d"), entries=entries, seeds=[1, 2, 3]))


@pytest.fixture
def finished():
    random = [[0], [1]] * 10
    return [
        finished_run("random", 1, losses=[2.0, 1.0, 0.8], tokens=[0, 100, 200], kept=random, accuracy=0.25),
        finished_run("random", 2, losses=[2.0, 1.2, 0.9], tokens=[0, 100, 220], kept=random, accuracy=0.5),
        finished_run("long", 1, losses=[2.0, 1.0, 0.7], tokens=[0, 150, 300], seconds=20.0, accuracy=0.5),
        finished_run("long", 2, losses=[2.0, 1.0, 1.0], tokens=[0, 160, 320], seconds=None, accuracy=1.0),
        finished_run("late", 3, losses=[2.0, 1.5, 1.4], tokens=[0, 200, 400], kept=[[1, 2]] * 20),
    ]


@pytest.fixture
def comparison(config, finished):
    return compare_runs(config, plan_runs(config), finished, {("none", 2): "ModelError: no such model"})


def row(comparison, entry):
    (found,) = [row for row in comparison.rows if row.entry == entry]
    return found


def test_held_out_losses_and_their_differences_within_seeds(comparison):
    random, long, late, none = (row(comparison, name) for name in ("random", "long", "late", "none"))
    assert (random.loss.mean, random.loss.deviation, random.loss.n) == pytest.approx((0.85, math.sqrt(0.005), 2))
    assert long.seeds == (1, 2)
    # −0.1 at seed 1, +0.1 at seed 2
    assert (long.difference.mean, long.difference.deviation) == pytest.approx((0.0, math.sqrt(0.02)), abs=1e-12)
    assert (long.better, long.difference.n) == (1, 2)
    assert random.difference is None  # not to itself
    assert late.loss.mean == 1.4
    assert late.difference is None  # the baseline has not finished seed 3
    assert (none.loss, none.seeds, none.tokens) == (None, (), None)


def test_which_differences_are_more_than_chance(tmp_path):
    entries = {name: {} for name in ("random", "lower", "higher", "so-so", "once")}
    config = CompareConfig(**settings_of(tmp_path, "m", Path("d"), entries=entries, seeds=[1, 2, 3]))
    ends = {
        "random": [1.0, 1.1, 0.9], "lower": [0.9, 1.001, 0.799], "higher": [1.01, 1.112, 0.914],
        "so-so": [0.9, 1.2, 0.8], "once": [0.5],
    }  # fmt: skip
    finished = [
        finished_run(name, seed, losses=[2.0, loss], tokens=[0, 10])
        for name, losses in ends.items()
        for seed, loss in enumerate(losses, start=1)
    ]
    comparison = compare_runs(config, plan_runs(config), finished)
    # With 2 degrees of freedom p = 1 − t / √(2 + t²): differences −0.1, −0.099, −0.101 and 0.01, 0.012, 0.014; so-so: t = 1/2.
    t_lower, t_higher = 0.1 / (0.001 / math.sqrt(3)), 0.012 / (0.002 / math.sqrt(3))
    assert row(comparison, "lower").p_value == pytest.approx(1 - t_lower / math.sqrt(2 + t_lower**2))
    assert row(comparison, "higher").p_value == pytest.approx(1 - t_higher / math.sqrt(2 + t_higher**2))
    assert row(comparison, "random").p_value is None
    assert row(comparison, "once").p_value is None
    (note,) = [note for note in comparison.notes if "chance" in note]
    assert note == (
        "More than chance by a paired t-test at 5%: lower, higher. With Holm's correction for 3 entries: lower, higher."
    )
    lines = as_markdown(comparison).splitlines()
    place = lines[2].split("|").index(" p ")
    assert [line.split("|")[place].strip() for line in lines[4:9]] == ["", "<0.001", "0.009", "0.667", ""]

    weaker = [run for run in finished if run.entry in ("random", "so-so")]
    (note,) = [note for note in compare_runs(config, plan_runs(config), weaker).notes if "chance" in note]
    assert note == "More than chance by a paired t-test at 5%: none."


def test_losses_at_equal_tokens(comparison):
    assert comparison.equal_tokens == 200  # random, seed 1: the smallest
    random, long, late = (row(comparison, name) for name in ("random", "long", "late"))
    at_200 = {
        "random": [0.8, 1.2 - 0.3 * 100 / 120],
        "long": [1.0 - 0.3 * 50 / 150, 1.0],
    }
    assert random.loss_at_equal_tokens.mean == pytest.approx(sum(at_200["random"]) / 2)
    assert long.loss_at_equal_tokens.mean == pytest.approx(sum(at_200["long"]) / 2)
    assert late.loss_at_equal_tokens.mean == 1.5
    gaps = [long - random for long, random in zip(at_200["long"], at_200["random"], strict=True)]
    assert long.difference_at_equal_tokens.mean == pytest.approx(sum(gaps) / 2)
    assert long.difference_at_equal_tokens.deviation == pytest.approx(abs(gaps[0] - gaps[1]) / math.sqrt(2))


def test_steps_tokens_shares_seconds_answers(comparison):
    long, late = row(comparison, "long"), row(comparison, "late")
    assert long.steps.mean == 20
    assert long.tokens.mean == 310
    assert (long.kept_share.mean, late.kept_share.mean) == (0.25, 0.5)
    assert (long.seconds.mean, long.seconds.n) == (20.0, 1)  # seed 2 is not known
    assert long.accuracy.mean == 0.75
    assert long.difference_of_accuracy.mean == pytest.approx((0.25 + 0.5) / 2)
    assert late.accuracy is None


def test_overlaps_are_means_over_common_seeds(comparison):
    """random keeps place 0 and 1 in turn, long always 0: alike at every second step. They share no seed with late."""
    assert row(comparison, "random").overlap["long"] == 0.5
    assert row(comparison, "long").overlap["random"] == 0.5
    assert row(comparison, "late").overlap == {"random": None, "long": None, "none": None}
    assert comparison.chance == chance_overlap(4, 1, 1)


def test_other_candidates_are_said(config, finished):
    other = finished_run("late", 1, losses=[2.0, 1.5], steps=[0, 20], tokens=[0, 400], ids=1000)
    comparison = compare_runs(config, plan_runs(config), [*finished, other])
    notes = [note for note in comparison.notes if "did not look at the same candidates" in note]
    assert [note.split(" did")[0] for note in notes] == ["late and long", "late and random"]
    assert row(comparison, "late").overlap["long"] is None


def test_a_run_that_was_not_evaluated_at_its_end_has_no_loss(config):
    run = finished_run("long", 1, losses=[2.0, 1.0], tokens=[0, 100])
    object.__setattr__(run, "steps", 25)
    comparison = compare_runs(config, plan_runs(config), [run])
    assert row(comparison, "long").loss is None
    assert comparison.equal_tokens is None


def test_what_is_not_finished_is_said(comparison, tmp_path):
    (tmp_path / "out").mkdir()
    assert comparison.states["random"] == {1: ("finished", ""), 2: ("finished", ""), 3: ("not begun", "")}
    assert comparison.states["none"][2] == ("failed", "ModelError: no such model")
    assert comparison.unfinished == 12 - 5
    text = as_markdown(comparison)
    assert "- none, seed 2: failed: ModelError: no such model" in text
    assert "- random, seed 3: not begun" in text


def test_the_files_and_what_is_printed(comparison, finished, tmp_path):
    paths = write_table(tmp_path / "out", comparison, finished)
    assert [path.name for path in paths] == ["table.json", "table.md"]
    value = json.loads(paths[0].read_text())
    assert value["rows"][1]["loss"] == {"mean": pytest.approx(0.85), "deviation": pytest.approx(0.2121320), "n": 2}
    assert value["runs"][3]["curve"] == {
        "step": [0, 10, 20], "loss": [2.0, 1.0, 1.0], "tokens": [0, 160, 320], "seconds": [None] * 3,
    }  # fmt: skip
    lines = paths[1].read_text().splitlines()
    heading = [cell.strip() for cell in lines[2].strip("|").split("|")]
    cells = {line.split("|")[1].strip(): dict(zip(heading, map(str.strip, line.strip("|").split("|")), strict=True))
             for line in lines[4:8]}  # fmt: skip
    assert cells["long"]["held-out loss"] == "0.8500 ± 0.2121"
    assert cells["long"]["− random"].endswith("0.0000 ± 0.1414")
    assert cells["long"]["better"] == "1 of 2"
    assert cells["long"]["seeds"] == "2 of 3"
    assert cells["long"]["exact match"] == "75.0% ± 35.4"
    assert cells["long"]["− random, exact match"] == "+37.5% ± 17.7"
    assert cells["random"]["− random"] == ""
    assert cells["late"]["kept"] == "50.0%"
    assert cells["none"]["held-out loss"] == "–"
    printed = printed_at(comparison, 140)
    for expected in ("0.8500 ± 0.2121", "Differences are to `random`", "none, seed 2: failed"):
        assert expected in printed


def printed_at(comparison, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    print_table(comparison, console=console)
    return console.export_text()


@pytest.mark.parametrize("width", [140, 100, 80, 60, 50])
def test_no_figure_is_cut_however_narrow_the_terminal(comparison, width):
    """What does not fit is left out by name; the figures of the columns that are there are whole."""
    printed = printed_at(comparison, width)
    table = printed.split("Differences are")[0]
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= width
    for figure in ("0.8500", "± 0.2121", "random", "long"):
        assert figure in table
    columns, _, note = table.partition("For want of width without ")
    left_out = " ".join(note.split()).removesuffix(": all columns are in table.md.").split(", ")
    for name in ("seeds", "better", "tokens", "seconds"):
        there = re.search(rf"\b{name}\b", columns) is not None
        assert there == (name not in left_out), name
    assert bool(note) == (width < 100)


def test_a_wide_terminal_has_one_line_for_each_entry(comparison):
    printed = printed_at(comparison, 140)
    assert "For want of width" not in printed
    assert re.search(r"^ *long .*0\.8500 ± 0\.2121", printed, flags=re.MULTILINE)


def test_without_a_baseline_there_are_no_differences(tmp_path):
    config = CompareConfig(**settings_of(tmp_path, "m", Path("d"), entries={"a": {}, "b": {}}))
    finished = [finished_run(name, 1, losses=[2.0, 1.0], tokens=[0, 10]) for name in ("a", "b")]
    comparison = compare_runs(config, plan_runs(config), finished)
    assert all(row.difference is None for row in comparison.rows)
    text = as_markdown(comparison)
    assert "−" not in text.splitlines()[2]
    assert "2 seeds: too few" in text
