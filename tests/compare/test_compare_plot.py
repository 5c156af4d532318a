"""The plot of a comparison: the lines that it draws, what it says of them, and that it can be read."""

from __future__ import annotations

import numpy as np
import pytest
from comparisons import finished_run

from udsstream.compare.plot import draw, figure_of, series_of

RUNS = [
    finished_run("random", 1, losses=[2.0, 1.0, 0.8], tokens=[0, 100, 200]),
    finished_run("random", 2, losses=[2.0, 1.2, 0.9], tokens=[0, 120, 240]),
    finished_run("uds", 1, losses=[2.0, 0.9, 0.7], tokens=[0, 160, 300], seconds=None),
    finished_run("uds", 2, losses=[2.0, 0.6], steps=[0, 20], tokens=[0, 320]),
]


def test_a_line_is_the_mean_over_seeds_and_its_band_from_lowest_to_highest():
    random, uds = series_of(RUNS, ["random", "none", "uds"])
    assert random.entry == "random"
    assert random.step.tolist() == [0, 10, 20]
    assert random.tokens.tolist() == [0, 110, 220]
    assert random.loss == pytest.approx([2.0, 1.1, 0.85])
    assert random.low.tolist() == [2.0, 1.0, 0.8]
    assert random.high.tolist() == [2.0, 1.2, 0.9]
    assert random.final == "0.8500 ± 0.0707"
    assert uds.step.tolist() == [0, 20]  # the evaluations that both seeds have
    assert np.isnan(uds.seconds).all()


def test_what_is_drawn():
    series = series_of(RUNS, ["random", "uds"])
    figure = figure_of(series, entries=["random", "uds"], baseline="random", title="a comparison")
    steps, tokens, seconds = figure.axes
    assert [axis.get_xlabel() for axis in (steps, tokens, seconds)] == [
        "steps",
        "trained tokens",
        "seconds in training steps",
    ]
    assert steps.get_ylabel() == "held-out loss, nats per token"
    assert figure.get_suptitle() == "a comparison"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["uds  0.6500 ± 0.0707", "random  0.8500 ± 0.0707"]
    lines = {line.get_label(): line for line in tokens.lines}
    assert lines["uds"].get_xdata()[-1] == 310
    assert lines["uds"].get_ydata()[-1] == pytest.approx(0.65)
    assert lines["random"].get_color() == "black"
    low, high = steps.get_ylim()
    assert low < 0.6
    assert high > 0.9


def test_losses_before_training_do_not_flatten_the_ends():
    runs = [finished_run("a", 1, losses=[9.0, 3.0, 1.0, 0.9, 0.8, 0.7, 0.6], tokens=list(range(7)))]
    axis = figure_of(series_of(runs, ["a"]), entries=["a"], baseline=None, title="").axes[0]
    low, high = axis.get_ylim()
    assert low < 0.6
    assert 0.9 < high < 1.1


def test_an_axis_is_logarithmic_where_one_entry_would_leave_no_room():
    full = finished_run("full", 1, losses=[2.0, 1.0, 0.9, 0.8], tokens=[0, 1000, 2000, 3000], seconds=30.0)
    part = finished_run("part", 1, losses=[2.0, 1.0, 0.9, 0.8], tokens=[0, 100, 200, 300], seconds=29.0)
    figure = figure_of(series_of([full, part], ["full", "part"]), entries=["full", "part"], baseline=None, title="")
    assert [axis.get_xscale() for axis in figure.axes] == ["linear", "log", "linear"]
    assert figure.axes[1].get_xlabel() == "trained tokens (logarithmic)"


def test_fourteen_entries_can_be_told_apart():
    names = ["random", *(f"entry-{i}" for i in range(13))]
    runs = [finished_run(name, 1, losses=[2.0, 1.0, 0.9], tokens=[0, 100, 200]) for name in names]
    figure = figure_of(series_of(runs, names), entries=names, baseline="random", title="")
    looks = {(line.get_color(), str(line.get_linestyle()), line.get_marker()) for line in figure.axes[0].lines}
    assert len(looks) == 14
    # An entry keeps its colour while others are still to come.
    later = figure_of(series_of(runs[5:], names), entries=names, baseline="random", title="")
    colour = {line.get_label(): line.get_color() for line in figure.axes[0].lines}
    assert all(colour[line.get_label()] == line.get_color() for line in later.axes[0].lines)


def test_the_file_is_an_image_and_the_same_each_time(tmp_path):
    series = series_of(RUNS, ["random", "uds"])
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, figure_of(series, entries=["random", "uds"], baseline="random", title="t"))
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content == (tmp_path / "b.png").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_finished_gives_a_plot_that_says_so(tmp_path):
    figure = figure_of([], entries=["a"], baseline=None, title="")
    assert "no finished run has a held-out loss" in [text.get_text() for text in figure.axes[1].texts]
    draw(tmp_path / "plot.png", figure)
    assert (tmp_path / "plot.png").stat().st_size > 1000
