"""Plots with matplotlib, which is imported on first use.

`draw_*` functions return a `Figure` with a transparent background, for `save_figure` or `convert_to_svg`.
Colors are indices into the palette.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plaintrain.utils.errors import require
from plaintrain.utils.files import writing
from plaintrain.utils.text import truncate_text
from plaintrain.visualization.colors import PALETTE, get_hex_color
from plaintrain.visualization.curves import Lines, smooth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Color of text and axes in the style; `convert_to_svg` replaces it by the text color of the page.
INK = "#1f2933"
# Width and height of one plot, inches.
SIZE = (5.0, 3.0)
_STYLE = Path(__file__).with_name("plots.mplstyle")
_svg_numbers = itertools.count()


def require_matplotlib() -> Any:
    """Import matplotlib, or raise a `UserError` with the command that installs it."""
    return require("matplotlib", "drawing", "plot")


def _use_style(*changes):
    require_matplotlib()
    from matplotlib import style

    return style.context([_STYLE, *changes])


@contextlib.contextmanager
def _open_figure(size=SIZE, num_rows=1, num_columns=1):
    """Yield a figure and its axes; draw within the context, which sets the style."""
    with _use_style():
        from matplotlib.figure import Figure

        # pyplot would keep the figures in memory.
        figure = Figure(figsize=size)
        yield figure, figure.subplots(num_rows, num_columns)


def save_figure(figure: Figure, path: str) -> None:
    """Write a figure on white as .png, .svg or .pdf."""
    with _use_style(), writing(path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        figure.savefig(path, facecolor="white", dpi=130)


def convert_to_svg(figure: Figure) -> str:
    """Return a figure as an `<svg>` element with the text color, fonts and width of its page."""
    file = io.StringIO()
    with _use_style({"svg.hashsalt": f"{next(_svg_numbers)}"}):
        # savefig would run the layout, and draw, twice.
        figure.get_layout_engine().execute(figure)  # type: ignore[union-attr]
        figure.set_layout_engine("none")
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    head, text = text.split(">", 1)
    text = re.sub(r' (width|height)="[^"]*"', "", head) + ">" + text
    # Ids with the figure's hash are referenced; ids such as axes_1 are not, and occur in every figure.
    text = re.sub(r' id="[a-z0-9.]+_\d+"', "", text)
    return text.replace(INK, "currentColor").strip()


def draw_curves(panels: Sequence[Mapping[str, Any]], smoothing: float = 0.0, titles: bool = True) -> Figure:
    """Draw the panels of `curves.group_panels`, three per row."""
    num_columns = min(3, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    size = (SIZE[0] * num_columns, (SIZE[1] + 0.3 * titles) * num_rows)
    with _open_figure(size, num_rows, num_columns) as (figure, _):
        for ax, panel in zip(figure.axes, panels, strict=False):
            legend_rows = _draw_curves(ax, panel, smoothing)
            if titles:
                ax.set_title(panel["title"], pad=6 + 13 * legend_rows)
        for ax in figure.axes[len(panels) :]:
            ax.set_axis_off()
    return figure


def _draw_curves(ax, panel, smoothing):
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    for line in panel["lines"]:
        x = line["x"]
        y = line["y"]
        color = get_hex_color(line["color"])
        if smoothing and panel["type"] not in ("result", "schedule"):
            ax.plot(x, y, color=color, alpha=0.25, linewidth=1)
            y = smooth(y, smoothing)
        dashes = ("-", "--", ":")[line["color"] // len(PALETTE) % 3]
        marker = "o" if panel["type"] == "result" or len(x) == 1 else None
        ax.plot(x, y, dashes, color=color, marker=marker, label=line["label"])
    if panel["log"]:
        ax.set_yscale("log")
        low, high = ax.yaxis.get_view_interval()
        steps = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)
        ax.yaxis.set_major_locator(LogLocator(subs=steps, numticks=7))
        # Powers of ten would need mathtext, which is off.
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    # All plots of a run have the same x axis, from 0.
    last = max((line["x"][-1] for line in panel["lines"]), default=0)
    ax.set_xlim(-0.03 * last, max(1.0, 1.03 * last))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel("iteration")
    return _draw_legend(ax) if panel["legend"] else 0


def _draw_legend(ax):
    """Draw the legend above the axes and return its number of rows."""
    labels = ax.get_legend_handles_labels()[1]
    columns = max(1, min(4, 62 // (max(map(len, labels)) + 6)))
    anchor = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
    ax.legend(ncols=columns, handlelength=1.4, columnspacing=1.2, labelspacing=0.2, **anchor)
    return math.ceil(len(labels) / columns)


def draw_xy(lines: Lines, x_label: str, y_label: str, *, diagonal: bool = False, marker: str = "") -> Figure:
    """Draw lines, see `curves.make_line`, on the unit square, optionally with its diagonal."""
    with _open_figure() as (figure, ax):
        if diagonal:
            ax.plot((0, 1), (0, 1), "--", color=INK, alpha=0.4, linewidth=1)
        for line in lines:
            color = get_hex_color(line["color"])
            ax.plot(line["x"], line["y"], color=color, marker=marker, label=line["label"])
        ax.set(xlabel=x_label, ylabel=y_label, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        if len(lines) > 1:
            _draw_legend(ax)
    return figure


def draw_bars(
    names: Sequence[str], series: Mapping[str, Sequence], x_label: str, *, colors: Sequence[int] = ()
) -> Figure:
    """Draw horizontal bars with their values; each of `series` has a value, or None, per name."""
    height = 0.8 / len(series)
    colors = colors or range(len(series))
    with _open_figure((SIZE[0], 0.9 + len(names) * max(0.3, 0.2 * len(series)))) as (figure, ax):
        for i, (label, values) in enumerate(zip(map(truncate_text, series), series.values(), strict=True)):
            positions = np.arange(len(names)) + height * (i - (len(series) - 1) / 2)
            widths = np.array(values, dtype=float)
            bars = ax.barh(positions, widths, height * 0.92, color=get_hex_color(colors[i]), label=label)
            ax.bar_label(bars, fmt=_format_bar, padding=3, fontsize=9)
        ax.set_yticks(range(len(names)), map(truncate_text, names))
        ax.invert_yaxis()
        ax.margins(x=0.15)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(x_label)
        if len(series) > 1:
            _draw_legend(ax)
    return figure


def _format_bar(value):
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def draw_matrix(counts: Any, names: Sequence[str], x_label: str, y_label: str) -> Figure:
    """Draw a square matrix of counts, shaded by fractions of the row's sum, with numbers if it is small."""
    counts = np.asarray(counts, dtype=float)
    # Opacity is legible on white and on black.
    opacity = (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)) ** 0.6
    shades = np.dstack([np.full((*counts.shape, 3), np.array(PALETTE[0]) / 255), opacity])
    is_small = len(names) <= 14
    side = max(SIZE[1], 0.36 * len(names) + 1.3) if is_small else 0.21 * len(names) + 1.6
    with _open_figure((max(SIZE[0], side + 1.2), side)) as (figure, ax):
        ax.imshow(shades, interpolation="nearest", aspect="auto")
        ax.grid(visible=False)
        rotation = {"rotation": 45, "ha": "right"} if is_small else {"rotation": 90}
        ax.set_xticks(range(len(names)), map(truncate_text, names), **rotation)
        ax.set_yticks(range(len(names)), map(truncate_text, names))
        ax.tick_params(labelsize=9 if is_small else 8, length=2)
        if is_small:
            for (i, j), count in np.ndenumerate(counts):
                alpha = 1 if count else 0.35
                ax.text(j, i, f"{count:.0f}", ha="center", va="center", fontsize=9, alpha=alpha)
        ax.set(xlabel=x_label, ylabel=y_label)
    return figure
