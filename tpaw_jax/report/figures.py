"""Plots of runs, as SVG whose text and lines take the page's colors, and as PNG."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORS = ("#3b82f6", "#f97316", "#10b981", "#e11d48", "#a855f7", "#ca8a04", "#06b6d4", "#84cc16")
"""Colors of the series, readable on light and dark pages."""

_TEXT, _GRID = "#123456", "#654321"
"""Placeholder colors that `svg` replaces by the page's own."""

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tpaw_jax",
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "Segoe UI", "DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "grid.color": _GRID,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


class Series(NamedTuple):
    """A mean line over x, with a band from the minimum to the maximum of several runs."""

    label: str
    x: Sequence[float]
    values: np.ndarray  # [runs, x]; NaN where a run has no value


def lines(title: str, xlabel: str, ylabel: str, series: Sequence[Series], marks: bool = False) -> Figure:
    """Mean lines with bands over runs; `marks` puts a dot at every point.

    Values on both sides of zero get a horizontal line at zero.
    """

    def draw(axes: Any) -> None:
        for i, one in enumerate(series):
            color, marker = COLORS[i % len(COLORS)], "o" if marks else None
            values = np.asarray(one.values, float)
            present = ~np.isnan(values).all(axis=0)
            x, values = np.asarray(one.x, float)[present], values[:, present]
            axes.plot(x, np.nanmean(values, axis=0), color=color, lw=1.6, marker=marker, ms=4, label=one.label)
            if len(values) > 1:
                low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
                axes.fill_between(x, low, high, color=color, alpha=0.18, lw=0)
        if not any(np.nan_to_num(one.values).any() for one in series):
            axes.set_ylim(-0.05, 1)
        low, high = axes.get_ylim()
        if low < 0 < high:
            axes.axhline(0, color=_TEXT, lw=0.8)
        if marks:
            axes.xaxis.get_major_locator().set_params(integer=True)

    return _figure(title, xlabel, ylabel, draw, len(series))


def histograms(title: str, xlabel: str, values: Mapping[str, np.ndarray]) -> Figure:
    """Histograms of responses, one outline per label, all over the same bins."""

    def draw(axes: Any) -> None:
        everything = np.concatenate(list(values.values()))
        bins = np.linspace(everything.min(), max(everything.max(), everything.min() + 1e-6), 25)
        for i, (label, labelled) in enumerate(values.items()):
            color = COLORS[i % len(COLORS)]
            axes.hist(labelled, bins, histtype="stepfilled", color=color, alpha=0.15)
            axes.hist(labelled, bins, histtype="step", color=color, lw=1.4, label=label)

    return _figure(title, xlabel, "responses", draw, len(values))


def stacked(title: str, xlabel: str, rows: Sequence[str], parts: Mapping[str, Sequence[float]]) -> Figure:
    """Stacked horizontal bars, one bar per row; `parts` maps a label to its size in each row."""

    def draw(axes: Any) -> None:
        start = np.zeros(len(rows))
        for i, (label, sizes) in enumerate(parts.items()):
            axes.barh(rows, sizes, left=start, color=COLORS[i % len(COLORS)], label=label, height=0.6)
            start = start + np.asarray(sizes)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)

    return _figure(title, xlabel, "", draw, len(parts))


def _figure(title: str, xlabel: str, ylabel: str, draw: Callable[[Any], None], labels: int) -> Figure:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 2.9 + 0.17 * labels * (labels > 1)), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(alpha=0.5, lw=0.5)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.set_title(title, fontsize=11, loc="left")
        if labels > 1 and axes.get_legend_handles_labels()[1]:
            figure.legend(loc="outside lower left")
    return figure


def svg(figure: Figure) -> str:
    """An <svg> element that takes its text color and line color from the surrounding page."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_TEXT, "currentColor").replace(_GRID, "var(--line)")
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text)
    assert size is not None  # matplotlib always writes it
    return text.replace(size.group(), 'class="plot" role="img"', 1)


def png(figure: Figure, path: Any) -> None:
    """Save a PNG with a white background."""
    with matplotlib.rc_context(_STYLE):
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=160, facecolor="white")
