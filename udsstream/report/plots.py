"""The plots of a report, as SVG to stand in an HTML page: they take the page's colours, light or dark, and need nothing from outside.

matplotlib draws with stand-in colours, which `inline` replaces with the page's CSS variables. What it drops: metadata, ids that
nothing refers to (they would clash between the plots of one page), and matplotlib's style sheet (it would apply to the whole page).
Text stays text. The same figures give the same bytes with the same version of matplotlib.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from udsstream.report.figures import QUANTILES, Figures, Histogram, StepTimes, bands
from udsstream.untrusted_text import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Plot",
    "band_plot",
    "inline",
    "length_plot",
    "novelty_plot",
    "score_plot",
    "short",
    "time_plot",
    "token_plot",
]

WIDTH, HEIGHT = 3.9, 2.55
"""Inches: three plots stand side by side in a page that is 1280 pixels wide, one on a phone, at about their own size."""
POINTS = 600
"""More candidates than this are drawn as a density."""

# Stand-ins: colours that occur nowhere else, and the page's variables that they become.
_INK, _GRID, _ALL, _KEPT, _REJECTED = "#000001", "#000002", "#000003", "#000004", "#000005"
_VARIABLES = {
    _INK: "currentColor",
    _GRID: "var(--grid)",
    _ALL: "var(--all)",
    _KEPT: "var(--kept)",
    _REJECTED: "var(--rejected)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "udsstream",
    "font.family": "sans-serif",
    "font.size": 8.8,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.5,
    "path.simplify": True,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}
_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawing and what it shows, in words."""

    svg: str
    says: str


def short(value: float) -> str:
    """A number in few characters: 1.2M, 340k, 0.051."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:  # 999,600 is "1M", not "1000k"
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def band_plot(figures: Figures, column: str, says: str) -> Plot | None:
    """Quantiles over the steps: of all candidates as bands and a line, the median of the kept as a dashed line. None without values.

    A bin in which all values are 0 is left out: before anything is in the memory, `inter` is 0 by definition.
    """
    rows, bins = figures.rows, figures.bins
    values = getattr(rows, column)
    if not np.isfinite(values).any():
        return None
    all_, kept = (bands(values[of], rows.bin[of], len(bins)) for of in (slice(None), rows.selected))
    nothing = (all_[0] == 0) & (all_[-1] == 0)
    if not nothing.all():
        all_[:, nothing], kept[:, nothing] = np.nan, np.nan
    low, lower, median, upper, high = all_
    x = bins.middle

    def draw(axes: Axes) -> None:
        axes.fill_between(x, low, high, color=_ALL, alpha=0.18, linewidth=0)
        axes.fill_between(x, lower, upper, color=_ALL, alpha=0.3, linewidth=0)
        axes.plot(x, median, color=_ALL, **_marks(x))
        axes.plot(x, kept[len(QUANTILES) // 2], color=_KEPT, linestyle=(0, (3, 1.5)), **_marks(x))
        _step_axis(axes, figures)

    there = np.flatnonzero(np.isfinite(median))
    first, last = median[there[0]], median[there[-1]]
    says = f"{says} over the steps: its median over all candidates goes from {short(first)} to {short(last)}."
    return Plot(svg=_drawn(f"over-steps-{column}", says, draw), says=says)


def score_plot(found: Histogram) -> Plot:
    """The distribution of scores, the kept against the rejected."""
    from matplotlib.ticker import MaxNLocator

    kept, rejected = int(found.kept.sum()), int(found.rejected.sum())

    def draw(axes: Axes) -> None:
        for counts, colour in ((found.rejected, _REJECTED), (found.kept, _KEPT)):
            axes.stairs(counts, found.edges, fill=True, color=colour, alpha=0.3, linewidth=0)
            axes.stairs(counts, found.edges, color=colour, linewidth=1.3)
        axes.set_xlabel("score")
        axes.set_ylabel("candidates")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
        _short_axis(axes, "x")

    middle = (found.edges[:-1] + found.edges[1:]) / 2
    typical = [
        f"the {count:,} {fate} lie mostly around {short(float(middle[counts.argmax()]))}"
        for count, fate, counts in ((kept, "chosen", found.kept), (rejected, "rejected", found.rejected))
        if count
    ]
    says = f"Distribution of scores: {', '.join(typical)}."
    return Plot(svg=_drawn("scores", says, draw), says=says)


def length_plot(figures: Figures) -> Plot | None:
    """Length against score: each candidate, or how many there are in each cell of a grid. None without scores."""
    rows = figures.rows
    finite = np.isfinite(rows.score)
    if not finite.any():
        return None
    from matplotlib.ticker import LogLocator

    tokens, score, selected = (values[finite] for values in (rows.tokens, rows.score, rows.selected))
    # Lengths over more than one order of magnitude would crowd at one side.
    logarithmic = tokens.min() > 0 and tokens.max() >= 20 * tokens.min()

    def draw(axes: Axes) -> None:
        if logarithmic:
            axes.set_xscale("log")
        if len(tokens) <= POINTS:
            size = 4 if len(tokens) <= 100 else 2.8
            for of, colour, marker in ((~selected, _REJECTED, "o"), (selected, _KEPT, "D")):
                axes.plot(tokens[of], score[of], marker, color=colour, alpha=0.75, markersize=size, markeredgewidth=0)
        else:
            _draw_density(axes, tokens, score, selected, logarithmic)
        axes.set_xlabel("tokens")
        axes.set_ylabel("score")
        if logarithmic:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        _short_axis(axes, "x")

    known = "undefined" if figures.correlation is None else f"{figures.correlation:+.2f}"
    says = f"Length in tokens against score; their correlation is {known}."
    return Plot(svg=_drawn("length", says, draw), says=says)


def novelty_plot(figures: Figures) -> Plot | None:
    """Mean distance to the memory, of all candidates and of the kept. None when the method measures none."""
    bins = figures.bins
    everyone, kept = bins.inter_candidates.copy(), bins.inter_kept.copy()
    if not np.isfinite(everyone).any():
        return None
    if (everyone != 0).any():
        kept[everyone == 0], everyone[everyone == 0] = np.nan, np.nan
    x = bins.middle

    def draw(axes: Axes) -> None:
        axes.plot(x, everyone, color=_ALL, **_marks(x))
        axes.plot(x, kept, color=_KEPT, linestyle=(0, (3, 1.5)), **_marks(x))
        axes.set_ylabel("mean distance to the memory")
        _step_axis(axes, figures)

    there = everyone[np.isfinite(everyone)]
    says = (
        f"Mean distance of the candidates to the memory, over the steps: from {short(there[0])} to {short(there[-1])}."
    )
    return Plot(svg=_drawn("novelty", says, draw), says=says)


def token_plot(figures: Figures) -> Plot:
    """Tokens that were offered and that were trained on, added up over the steps."""
    bins = figures.bins
    # A bin's tokens are all there once its last step is done.
    x = np.concatenate([bins.first[:1], bins.last + 1])
    offered, trained = (
        np.concatenate([[0], np.cumsum(tokens)]) for tokens in (bins.candidate_tokens, bins.kept_tokens)
    )

    def draw(axes: Axes) -> None:
        axes.fill_between(x, trained, offered, color=_ALL, alpha=0.18, linewidth=0)
        axes.plot(x, offered, color=_ALL)
        axes.plot(x, trained, color=_KEPT, linestyle=(0, (3, 1.5)))
        axes.set_ylabel("tokens so far")
        axes.set_ylim(bottom=0)
        _step_axis(axes, figures, after=1)

    says = f"Tokens over the steps: {figures.candidate_tokens:,} offered and {figures.kept_tokens:,} trained on by the end."
    return Plot(svg=_drawn("tokens", says, draw), says=says)


def time_plot(figures: Figures, times: StepTimes) -> Plot:
    """Seconds of a step, the part spent on choosing beneath the rest."""
    there = np.isfinite(times.step)
    x, step, choosing = figures.bins.middle[there], times.step[there], times.selection[there]

    def draw(axes: Axes) -> None:
        axes.fill_between(x, 0, choosing, color=_KEPT, alpha=0.3, linewidth=0)
        axes.fill_between(x, choosing, step, color=_ALL, alpha=0.18, linewidth=0)
        axes.plot(x, step, color=_ALL, **_marks(x))
        axes.plot(x, choosing, color=_KEPT, linestyle=(0, (3, 1.5)), **_marks(x))
        axes.set_ylabel("seconds per step")
        axes.set_ylim(bottom=0)
        _step_axis(axes, figures)

    share = times.selection_share
    says = f"Seconds per step over the steps{'' if share is None else f'; {share:.0%} of all of it was spent on choosing'}."
    return Plot(svg=_drawn("time", says, draw), says=says)


# -- drawing -------------------------------------------------------------------------------------------------------------


def _marks(x: np.ndarray) -> dict[str, Any]:
    """Few points are marked: a line of one point would not be seen."""
    return {"marker": "o", "markersize": 2.5} if len(x) <= 30 else {}


def _step_axis(axes: Axes, figures: Figures, *, after: int = 0) -> None:
    """`after`: steps behind the last one that are drawn too."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    first, last = float(figures.bins.first[0]), float(figures.bins.last[-1]) + after
    margin = max(0.5, 0.02 * (last - first))
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    _short_axis(axes, "x")


def _short_axis(axes: Axes, which: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(NullFormatter())


def _draw_density(axes: Axes, tokens: np.ndarray, score: np.ndarray, selected: np.ndarray, logarithmic: bool) -> None:
    """Cells of a grid: the colour says whether most in it were kept, the strength how many there are (by orders of magnitude)."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    space = np.geomspace if logarithmic else np.linspace
    low, high = float(tokens.min()), float(tokens.max())
    x = space(low, high if high > low else low + 1, 37)
    floor, ceiling = np.quantile(score, (0.0005, 0.9995))
    y = np.linspace(floor, ceiling if ceiling > floor else floor + 1, 29)
    inside = np.clip(score, y[0], y[-1])
    everyone = np.histogram2d(tokens, inside, (x, y))[0]
    kept = np.histogram2d(tokens[selected], inside[selected], (x, y))[0]
    strength = np.ceil(5 * np.log1p(everyone) / np.log1p(everyone.max())).astype(int)
    for mostly_kept, colour in ((False, _REJECTED), (True, _KEPT)):
        for level in range(1, 6):
            cells = np.argwhere((strength == level) & ((kept * 2 > everyone) == mostly_kept))
            if len(cells):
                i, j = cells.T
                corners = [(x[i], y[j]), (x[i + 1], y[j]), (x[i + 1], y[j + 1]), (x[i], y[j + 1]), (x[i], y[j])]
                vertices = np.stack([np.stack(corner, -1) for corner in corners], 1).reshape(-1, 2)
                codes = np.tile([Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY], len(cells))
                shape = Path(vertices, codes)
                axes.add_patch(PathPatch(shape, facecolor=colour, alpha=0.12 + 0.16 * level, linewidth=0))
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(y[0], y[-1])
    axes.grid(False)


def _drawn(name: str, says: str, draw: Callable[[Axes], None]) -> str:
    """An axes' drawing as SVG for a page; `name` keeps its ids apart from those of other plots."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with _style():
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        draw(axes)
        _short_axis(axes, "y")
        out = io.BytesIO()
        canvas.print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return inline(out.getvalue().decode("utf-8"), name=name, says=says)


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A character that matplotlib's own font lacks: the browser's font is what counts.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")
        yield


def inline(svg: str, *, name: str, says: str) -> str:
    """matplotlib's SVG file as an element of an HTML page, with `says` as its title."""
    root = ElementTree.fromstring(re.sub(r"<!DOCTYPE[^>]*>", "", svg))
    referred = set(re.findall(r"#([\w-]+)", " ".join(value for part in root.iter() for value in part.attrib.values())))
    _drop(root)
    for part in root.iter():
        part.tag = part.tag.removeprefix(_SVG)
        part.text = None if part.tag != "text" and not (part.text or "").strip() else part.text
        part.tail = None
        for key, value in list(part.attrib.items()):
            del part.attrib[key]
            if key == "id" and value not in referred:
                continue
            if key == "id":
                value = f"{name}-{value}"
            part.attrib[key.removeprefix(_XLINK)] = _rewrite(value, name)
    for key in ("width", "height", "version", "role", "id"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title"}
    title = ElementTree.Element("title", {"id": f"{name}-title"})
    title.text = clean(says)
    root.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")


def _drop(parent: ElementTree.Element) -> None:
    """Removes metadata, style sheets, and groups that have nothing (left) in them."""
    for part in list(parent):
        _drop(part)
        empty = part.tag in (f"{_SVG}g", f"{_SVG}defs") and not len(part)
        if empty or part.tag in (f"{_SVG}metadata", f"{_SVG}style"):
            parent.remove(part)


def _rewrite(value: str, name: str) -> str:
    """References to this plot's own names, stand-in colours and fonts to the page's, coordinates to hundredths of a point."""
    value = re.sub(r"font-family: [^;]*; ", "", value)
    value = re.sub(r"url\(#", f"url(#{name}-", value)
    if value.startswith("#") and value not in _VARIABLES:
        value = f"#{name}-{value[1:]}"
    for colour, variable in _VARIABLES.items():
        value = value.replace(colour, variable)
    return re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value)
