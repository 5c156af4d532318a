"""The plot of a comparison, `plot.png`: the held-out loss against steps, trained tokens and seconds, a line per entry.

A line is the mean over the entry's finished seeds, at the mean tokens or seconds of each evaluation; its band goes from the lowest to the
highest seed. Colours are those of Okabe and Ito that can be told apart on white with any colour vision (jfly.uni-koeln.de/color), dashes
and markers tell the rest apart. The loss before training is left out of sight where it would flatten everything else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from udsstream.compare.arithmetic import spread
from udsstream.compare.results import FinishedRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Series", "draw", "figure_of", "series_of"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.3)), (0, (6, 1.5, 1.2, 1.5)))
_MARKERS = "osD^"
_AXES = (("step", "steps"), ("tokens", "trained tokens"), ("seconds", "seconds in training steps"))


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """One entry's line, (E,) each: the evaluations that all of its finished seeds have."""

    entry: str
    step: np.ndarray
    tokens: np.ndarray
    """Mean over seeds."""
    seconds: np.ndarray
    """Mean over seeds; NaN where one is unknown."""
    loss: np.ndarray
    """Mean over seeds."""
    low: np.ndarray
    high: np.ndarray
    final: str
    """The last loss, in words: mean ± standard deviation over seeds."""


def series_of(runs: Sequence[FinishedRun], entries: Sequence[str]) -> list[Series]:
    """The lines, in the order of `entries`; none for an entry without a finished run that was evaluated."""
    found = []
    for entry in entries:
        mine = [run for run in runs if run.entry == entry and run.loss is not None]
        if not mine:
            continue
        steps = mine[0].curve.step
        for run in mine[1:]:
            steps = np.intersect1d(steps, run.curve.step)
        at = [np.isin(run.curve.step, steps) for run in mine]
        losses, tokens, seconds = (
            np.stack([getattr(run.curve, what)[there] for run, there in zip(mine, at, strict=True)])
            for what in ("loss", "tokens", "seconds")
        )
        found.append(
            Series(
                entry=entry,
                step=steps,
                tokens=tokens.mean(0),
                seconds=seconds.mean(0),
                loss=losses.mean(0),
                low=losses.min(0),
                high=losses.max(0),
                final=str(spread([run.loss for run in mine])),
            )
        )
    return found


def draw(path: Path, figure: Figure) -> None:
    """Writes the figure as a PNG; the same lines give the same bytes with the same version of matplotlib."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", metadata={"Software": None})
    os.replace(temporary, path)


def figure_of(series: Sequence[Series], *, entries: Sequence[str], baseline: str | None, title: str) -> Figure:
    """The plot; one that says that there is nothing yet where there is no line.

    Args:
        entries: all of the comparison, so that an entry keeps its colour while others are still to come.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter

    figure = Figure(figsize=(15, 6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's backend
    axes = figure.subplots(1, 3, sharey=True)
    styles = _styles(entries, baseline)
    lines = {}
    for axis, (name, label) in zip(axes, _AXES, strict=True):
        for line in series:
            shown = slice(_first_in_sight(line) - 1, None)
            x = getattr(line, name)[shown]
            style = styles[line.entry]
            axis.fill_between(x, line.low[shown], line.high[shown], color=style["color"], alpha=0.10, linewidth=0)
            (lines[line.entry],) = axis.plot(x, line.loss[shown], label=line.entry, **style)
        axis.set_xlabel(label)
        _scale(axis, [line.get_xdata() for line in axis.lines])
        axis.grid(color="#dddddd", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(EngFormatter(sep="") if name == "tokens" else FuncFormatter(_plain))
    axes[0].set_ylabel("held-out loss, nats per token")
    if series:
        axes[0].set_ylim(*_sight(series))
        ranked = sorted(series, key=lambda line: line.loss[-1])
        figure.legend(
            [lines[line.entry] for line in ranked],
            [f"{line.entry}  {line.final}" for line in ranked],
            loc="outside right center",
            title="loss at the end, best first",
            frameon=False,
            handlelength=3.4,
        )
    else:
        axes[1].text(0.5, 0.5, "no finished run has a held-out loss", ha="center", transform=axes[1].transAxes)
    figure.suptitle(title)
    return figure


def _styles(entries: Sequence[str], baseline: str | None) -> dict[str, dict[str, Any]]:
    """The baseline in black; the others by colour, then dash and marker."""
    styles = {}
    others = [entry for entry in entries if entry != baseline]
    for number, entry in enumerate(others):
        kind = number // len(_COLOURS) % len(_DASHES)
        styles[entry] = {
            "color": _COLOURS[number % len(_COLOURS)],
            "linestyle": _DASHES[kind],
            "marker": _MARKERS[kind],
            "markersize": 4.5,
            "linewidth": 1.7,
        }
    if baseline in entries:
        styles[baseline] = {"color": "black", "linestyle": "-", "marker": "X", "markersize": 6, "linewidth": 2.4}
    return styles


def _plain(value: float, position: int) -> str:
    del position
    return f"{value:g}"


def _first_in_sight(line: Series) -> int:
    """The first evaluation that must be seen: neither that before training nor one in the first third of those after it, beside which the
    ends could not be told apart. (Lines come in from above.) At least 1 where there are two."""
    return max(1, min(1 + (len(line.loss) - 1) // 3, len(line.loss) - 1))


def _sight(series: Sequence[Series]) -> tuple[float, float]:
    """The losses to show."""
    low = min(line.low[_first_in_sight(line) :].min(initial=line.low[-1]) for line in series)
    high = max(line.high[_first_in_sight(line) :].max(initial=line.high[-1]) for line in series)
    margin = 0.06 * (high - low) or 0.01
    return low - margin, high + margin


def _scale(axis: Any, shown: Sequence[np.ndarray]) -> None:
    """Limits around what is shown; logarithmic where one entry would leave no room for the others."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axis.xaxis.set_major_locator(MaxNLocator(6, integer=axis.get_xlabel() == "steps"))
    ends = np.array([x[-1] for x in shown if len(x) and np.isfinite(x[-1])])
    values = np.concatenate([x[np.isfinite(x)] for x in shown]) if shown else np.empty(0)
    if not len(ends) or not len(values):
        return
    low, high = values.min(), values.max()
    if low > 0 and ends.max() > 2 * ends.min():
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlim(low / 1.05, high * 1.08)
        axis.set_xlabel(f"{axis.get_xlabel()} (logarithmic)")
    elif high > low:
        axis.set_xlim(low - 0.03 * (high - low), high + 0.05 * (high - low))
