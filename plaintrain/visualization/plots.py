"""Pictures from plain data, drawn by matplotlib, which is imported only when something is drawn.

Every function returns a matplotlib `Figure` on a transparent ground, to be given to `save_figure` or, for a
page that is light or dark, to `svg_text`.
"""

import contextlib
import io
import math
import os
import re

from plaintrain.utils.errors import require
from plaintrain.utils.files import writing
from plaintrain.visualization.curves import smooth, thin

# Told apart on white and on black, also by most who do not see all colours.
PALETTE = ("#3b7dd8", "#e2711d", "#2a9d6f", "#c2479b", "#8a63d2", "#b5890c", "#c9423f", "#4f93a8")
# Text and axes; in a page it becomes the page's own colour.
INK = "#1f2933"
# One picture of a page or of a grid, in inches.
SIZE = (5.0, 3.0)

_STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.7,
    "axes.linewidth": 0.8,
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    # Names of classes and files are not TeX.
    "text.parse_math": False,
    "figure.constrained_layout.use": True,
    **dict.fromkeys(("figure.constrained_layout.w_pad", "figure.constrained_layout.h_pad"), 0.07),
}


def require_matplotlib():
    """matplotlib, or a `UserError` that says how to install it."""
    return require("matplotlib", "drawing", "plot")


@contextlib.contextmanager
def styled():
    with require_matplotlib().rc_context(_STYLE):
        yield


@contextlib.contextmanager
def drawing(size=SIZE, rows=1, columns=1):
    """(figure, its axes, `[rows, columns]` if they are several) to be drawn on within the block."""
    with styled():
        from matplotlib.figure import Figure

        # Without pyplot, whose figures stay in memory.
        figure = Figure(figsize=size)
        yield figure, figure.subplots(rows, columns)


def save_figure(figure, path):
    """Write a figure on white; the name's ending says how: .png, .svg or .pdf.

    Raises:
        UserError: the file cannot be written.
    """
    with styled(), writing(path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        figure.savefig(path, facecolor="white", dpi=130)


def svg_text(figure, name):
    """A figure as an `<svg>` element that takes the text colour and the fonts of its page.

    Args:
        figure: the figure.
        name: letters and digits, another for each figure of the page.
    """
    file = io.StringIO()
    import matplotlib

    with styled(), matplotlib.rc_context({"svg.hashsalt": name}):
        # Once is enough: left to itself it is laid out, and drawn, twice.
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine("none")
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    # Without a size of its own it fills the width that it is given.
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    return text.replace(INK, "currentColor").strip()


def curve_grid(panels, smoothing=0.0):
    """The pictures of `curves.panels` in one figure, three a row."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with drawing((SIZE[0] * columns, (SIZE[1] + 0.3) * rows), rows, columns) as (figure, _):
        for ax, panel in zip(figure.axes, panels, strict=False):
            _draw_curves(ax, panel, smoothing)
            rows_of_legend = math.ceil(len(panel["lines"]) / _columns(_labels(panel)))
            ax.set_title(panel["title"], pad=6 + 13 * rows_of_legend * panel["legend"])
        for ax in figure.axes[len(panels) :]:
            ax.set_axis_off()
    return figure


def curve_figure(panel, smoothing=0.0):
    """One of the pictures of `curves.panels`, without its title."""
    with drawing() as (figure, ax):
        _draw_curves(ax, panel, smoothing)
    return figure


def _draw_curves(ax, panel, smoothing):
    from matplotlib.ticker import MaxNLocator

    is_result, noisy = panel["kind"] == "result", panel["kind"] not in ("result", "schedule")
    for line in panel["lines"]:
        color = PALETTE[line["color"] % len(PALETTE)]
        dashes = ("-", "--", ":")[line["color"] // len(PALETTE) % 3]
        x, y = thin(line["x"], line["y"])
        if smoothing and noisy:
            ax.plot(x, y, color=color, alpha=0.25, linewidth=1)
            x, y = thin(line["x"], smooth(line["y"], smoothing))
        marker = "o" if is_result or len(x) == 1 else None
        ax.plot(x, y, dashes, color=color, marker=marker, markersize=4, label=line["label"])
    if panel["log"]:
        _log_scale(ax)
    # From the start, whatever came first: the pictures of a run have the same x axis.
    last = max((line["x"][-1] for line in panel["lines"]), default=0)
    ax.set_xlim(-0.03 * last, max(1.0, 1.03 * last))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel(panel.get("x_label", "iteration"))
    if panel["legend"]:
        draw_legend(ax, _labels(panel))


def _log_scale(ax):
    """A logarithmic y axis with plain numbers at its ticks: powers are TeX, which pages do not have."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set_yscale("log")
    low, high = ax.yaxis.get_view_interval()
    steps = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)
    ax.yaxis.set_major_locator(LogLocator(subs=steps, numticks=7))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def _labels(panel):
    return [line["label"] for line in panel["lines"]]


def _columns(labels):
    return max(1, min(4, 62 // (max(map(len, labels)) + 6)))


def draw_legend(ax, labels):
    """Above the axes, where it hides nothing."""
    place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
    ax.legend(ncols=_columns(labels), handlelength=1.4, columnspacing=1.2, labelspacing=0.2, **place)
