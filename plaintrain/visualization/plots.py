"""Plots from plain data, drawn by matplotlib, which is imported only when something is drawn.

Every `_figure` function returns a matplotlib `Figure` on a transparent ground, to be given to `save_figure`
or, for a page that is light or dark, to `to_svg`. Colours are indices of the palette.
"""

import contextlib
import io
import itertools
import math
import os
import re

import numpy as np

from plaintrain.utils.errors import require
from plaintrain.utils.files import writing
from plaintrain.visualization.colors import PALETTE, get_hex_color
from plaintrain.visualization.curves import smooth

# Text and axes; in a page it becomes the page's own colour.
INK = "#1f2933"
# One plot of a page or of a grid, in inches.
SIZE = (5.0, 3.0)
_STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.7,
    "axes.linewidth": 0.8,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    # Of long curves few points are kept.
    "path.simplify_threshold": 1.0,
    "svg.fonttype": "none",
    # Names of classes and files are not TeX.
    "text.parse_math": False,
    "figure.constrained_layout.use": True,
    **dict.fromkeys(("figure.constrained_layout.w_pad", "figure.constrained_layout.h_pad"), 0.07),
}
_svg_numbers = itertools.count()


def require_matplotlib():
    """Return matplotlib, or raise a `UserError` that says how to install it."""
    return require("matplotlib", "drawing", "plot")


@contextlib.contextmanager
def _drawing(size=SIZE, rows=1, columns=1):
    """Yield a figure and its axes, to be drawn on within the block."""
    with require_matplotlib().rc_context(_STYLE):
        from matplotlib.figure import Figure

        # Without pyplot, whose figures stay in memory.
        figure = Figure(figsize=size)
        yield figure, figure.subplots(rows, columns)


def save_figure(figure, path):
    """Write a figure on white; the name's ending says how: .png, .svg or .pdf."""
    with require_matplotlib().rc_context(_STYLE), writing(path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        figure.savefig(path, facecolor="white", dpi=130)


def convert_to_svg(figure):
    """Return a figure as an `<svg>` element that takes the text colour, fonts and width of its page."""
    file = io.StringIO()
    with require_matplotlib().rc_context({**_STYLE, "svg.hashsalt": f"{next(_svg_numbers)}"}):
        # Once is enough: left to itself it is laid out, and drawn, twice.
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine("none")
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    head, text = text.split(">", 1)
    text = re.sub(r' (width|height)="[^"]*"', "", head) + ">" + text
    # What is referred to has an id with a hash that is this figure's own; names such as axes_1 are in each.
    text = re.sub(r' id="[a-z0-9.]+_\d+"', "", text)
    return text.replace(INK, "currentColor").strip()


def draw_curves(panels, smoothing=0.0, titles=True):
    """Draw plots of `curves.group_panels`, three a row."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (SIZE[0] * columns, (SIZE[1] + 0.3 * titles) * rows)
    with _drawing(size, rows, columns) as (figure, _):
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
        x, y, color = line["x"], line["y"], get_hex_color(line["color"])
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
        # Plain numbers: powers are TeX, which pages do not have.
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    # From the start, whatever came first: the plots of a run have the same x axis.
    last = max((line["x"][-1] for line in panel["lines"]), default=0)
    ax.set_xlim(-0.03 * last, max(1.0, 1.03 * last))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel("iteration")
    return _draw_legend(ax) if panel["legend"] else 0


def _draw_legend(ax):
    """Draw the legend above the axes, where it hides nothing; return its number of rows."""
    labels = ax.get_legend_handles_labels()[1]
    columns = max(1, min(4, 62 // (max(map(len, labels)) + 6)))
    place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
    ax.legend(ncols=columns, handlelength=1.4, columnspacing=1.2, labelspacing=0.2, **place)
    return math.ceil(len(labels) / columns)


def draw_xy(lines, x_label, y_label, *, diagonal=False, marker=None):
    """Draw lines, as `curves.group_panels` has them, on a unit square, with a faint diagonal or without."""
    with _drawing() as (figure, ax):
        if diagonal:
            ax.plot((0, 1), (0, 1), "--", color=INK, alpha=0.4, linewidth=1)
        for line in lines:
            color = get_hex_color(line["color"])
            ax.plot(line["x"], line["y"], color=color, marker=marker, label=line["label"])
        ax.set(xlabel=x_label, ylabel=y_label, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        if len(lines) > 1:
            _draw_legend(ax)
    return figure


def draw_bars(names, series, x_label, *, colors=None):
    """Draw horizontal bars with their values written out.

    Args:
        names: one for each group of bars, from the top.
        series: {label: values}; NaN or None is no bar.
        x_label: text of the axis.
        colors: one for each of the series; default 0, 1, ...
    """
    height, colors = 0.8 / len(series), colors or range(len(series))
    with _drawing((SIZE[0], 0.9 + len(names) * max(0.3, 0.2 * len(series)))) as (figure, ax):
        for i, (label, values) in enumerate(series.items()):
            positions = np.arange(len(names)) + height * (i - (len(series) - 1) / 2)
            values = np.array(values, dtype=float)
            bars = ax.barh(positions, values, height * 0.92, color=get_hex_color(colors[i]), label=label)
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


def truncate_text(text, most=24):
    """Return a text of at most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def draw_matrix(counts, names, x_label, y_label):
    """Draw a square matrix of counts, each row shaded by fractions of its sum, few of them as numbers."""
    counts = np.asarray(counts, dtype=float)
    # One colour of growing opacity: it works on white and on black.
    opacity = (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)) ** 0.6
    shades = np.dstack([np.full((*counts.shape, 3), np.array(PALETTE[0]) / 255), opacity])
    few = len(names) <= 14
    side = max(SIZE[1], 0.36 * len(names) + 1.3) if few else 0.21 * len(names) + 1.6
    with _drawing((max(SIZE[0], side + 1.2), side)) as (figure, ax):
        ax.imshow(shades, interpolation="nearest", aspect="auto")
        ax.grid(visible=False)
        turned = {"rotation": 45, "ha": "right"} if few else {"rotation": 90}
        ax.set_xticks(range(len(names)), map(truncate_text, names), **turned)
        ax.set_yticks(range(len(names)), map(truncate_text, names))
        ax.tick_params(labelsize=9 if few else 8, length=2)
        for (i, j), count in np.ndenumerate(counts) if few else ():
            ax.text(j, i, f"{count:.0f}", ha="center", va="center", fontsize=9, alpha=1 if count else 0.35)
        ax.set(xlabel=x_label, ylabel=y_label)
    return figure
