"""Pictures from plain data, drawn by matplotlib, which is imported only when something is drawn.

Every function returns a matplotlib `Figure` on a transparent ground, to be given to `save_figure` or, for a
page that is light or dark, to `svg_text`.
"""

import contextlib
import io
import math
import os
import re

from plaintrain.curves import smooth, thin
from plaintrain.utils.errors import UserError
from plaintrain.utils.reading import reason

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
}


def require_matplotlib():
    """Raise a `UserError` that says how to install matplotlib where it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise UserError('drawing needs matplotlib: pip install "plaintrain[plot]"') from e


@contextlib.contextmanager
def _style():
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def _figure(size=SIZE, rows=1, columns=1):
    """(figure, axes `[rows, columns]`) without pyplot, whose figures stay in memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure, path):
    """Write a figure on white; the name's ending says how: .png, .svg or .pdf.

    Raises:
        UserError: the file cannot be written.
    """
    with _style():
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            figure.savefig(path, facecolor="white", dpi=130)
        except OSError as e:
            raise UserError(f"cannot write {path}: {reason(e)}") from e


def svg_text(figure, name):
    """A figure as an `<svg>` element that takes the text colour and the fonts of its page.

    Args:
        figure: the figure.
        name: letters and digits, another for each figure of the page.
    """
    file = io.StringIO()
    import matplotlib

    with _style(), matplotlib.rc_context({"svg.hashsalt": name}):
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
    with _style():
        figure, axes = _figure((SIZE[0] * columns, (SIZE[1] + 0.3) * rows), rows, columns)
        for ax, panel in zip(axes.flat, panels, strict=False):
            _draw_curves(ax, panel, smoothing)
            ax.set_title(panel["title"], pad=6 + 13 * _legend_rows(panel["lines"]) * panel["legend"])
        for ax in list(axes.flat)[len(panels) :]:
            ax.set_axis_off()
    return figure


def curve_figure(panel, smoothing=0.0):
    """One of the pictures of `curves.panels`, without its title."""
    with _style():
        figure, axes = _figure()
        _draw_curves(axes[0, 0], panel, smoothing)
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
        _log_scale(ax.yaxis, ax.set_yscale)
    # From the start, whatever came first: the pictures of a run have the same x axis.
    last = max((line["x"][-1] for line in panel["lines"]), default=0)
    ax.set_xlim(-0.03 * last, max(1.0, 1.03 * last))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel(panel.get("x_label", "iteration"))
    if panel["legend"]:
        _legend(ax, panel["lines"])


def _log_scale(axis, set_scale):
    """A logarithmic axis with plain numbers at its ticks: powers are TeX, which pages do not have."""
    from matplotlib.ticker import LogLocator, NullFormatter

    set_scale("log")
    low, high = axis.get_view_interval()
    steps = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps, numticks=7))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _columns(lines):
    widest = max(len(line["label"]) for line in lines)
    return max(1, min(4, 62 // (widest + 6)))


def _legend_rows(lines):
    return math.ceil(len(lines) / _columns(lines))


def _legend(ax, lines):
    """Above the axes, where it hides nothing."""
    place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
    ax.legend(ncols=_columns(lines), handlelength=1.4, columnspacing=1.2, labelspacing=0.2, **place)


def xy_figure(lines, x_label, y_label, *, limits=None, diagonal=False):
    """Lines over a common x, such as precision over recall.

    Args:
        lines: dicts of `label`, `x`, `y` (lists; a NaN interrupts the line) and `color`, a number;
            `points` in it marks the points.
        x_label, y_label: text of the axes.
        limits: (least, largest) of both axes, or None to fit.
        diagonal: draw the line of equal x and y, faint.
    """
    with _style():
        figure, axes = _figure()
        ax = axes[0, 0]
        if diagonal:
            ax.plot(limits, limits, "--", color=INK, alpha=0.4, linewidth=1)
        for line in lines:
            marker = "o" if line.get("points") else None
            color = PALETTE[line["color"] % len(PALETTE)]
            x, y = thin(line["x"], line["y"], 250)
            ax.plot(x, y, color=color, marker=marker, markersize=4, label=line["label"])
        if limits:
            margin = 0.02 * (limits[1] - limits[0])
            ax.set(
                xlim=(limits[0] - margin, limits[1] + margin), ylim=(limits[0] - margin, limits[1] + margin)
            )
        ax.set(xlabel=x_label, ylabel=y_label)
        if len(lines) > 1:
            _legend(ax, lines)
    return figure


def bar_figure(names, series, x_label, *, most=30):
    """Horizontal bars, of one kind or of several beside each other, with their values written out.

    Args:
        names: one for each group of bars, from the top.
        series: {label: values}; NaN or None is no bar.
        x_label: text of the axis.
        most: groups that are drawn; the others are left out.
    """
    names = [str(name) for name in names][:most]
    height = 0.8 / len(series)
    with _style():
        figure, axes = _figure((SIZE[0], 0.9 + len(names) * max(0.3, 0.2 * len(series))))
        ax = axes[0, 0]
        for i, (label, values) in enumerate(series.items()):
            values = [math.nan if v is None else v for v in values][:most]
            places = [n + height * (i - (len(series) - 1) / 2) for n in range(len(names))]
            shown = [0 if math.isnan(v) else v for v in values]
            bars = ax.barh(places, shown, height * 0.92, color=PALETTE[i % len(PALETTE)], label=label)
            ax.bar_label(bars, ["" if math.isnan(v) else _number(v) for v in values], padding=3, fontsize=9)
        ax.set_yticks(range(len(names)), [_cut(name) for name in names])
        ax.invert_yaxis()
        ax.margins(x=0.15)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(x_label)
        if len(series) > 1:
            _legend(ax, [{"label": label} for label in series])
    return figure


def _number(value):
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _cut(name, most=24):
    return name if len(name) <= most else name[: most - 1] + "…"


def histogram_figure(edges, series, x_label, y_label, *, log_x=False):
    """Counts in bins as outlines with a light fill, one or several.

    Args:
        edges: N + 1 borders of the bins.
        series: {label: N counts}.
        x_label, y_label: text of the axes.
        log_x: a logarithmic x axis.
    """
    with _style():
        figure, axes = _figure()
        ax = axes[0, 0]
        for i, (label, counts) in enumerate(series.items()):
            color = PALETTE[i % len(PALETTE)]
            ax.stairs(counts, edges, fill=True, color=color, alpha=0.25)
            ax.stairs(counts, edges, color=color, label=label, linewidth=1.4)
        if log_x:
            _log_scale(ax.xaxis, ax.set_xscale)
        ax.set(xlabel=x_label, ylabel=y_label, ylim=(0, None))
        if len(series) > 1:
            _legend(ax, [{"label": label} for label in series])
    return figure


def matrix_figure(matrix, row_names, column_names, x_label, y_label):
    """Counts as a map of shades, each row as shares of its sum; with numbers where there is room.

    Args:
        matrix: rows of counts, lists of equal length.
        row_names, column_names: their names.
        x_label, y_label: text of the axes.
    """
    import numpy as np

    counts = np.asarray(matrix, dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # One colour of growing opacity: it works on white and on black.
    shades = np.zeros((*counts.shape, 4))
    shades[..., :3] = [int(PALETTE[0][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    shades[..., 3] = shares**0.6
    few = max(counts.shape) <= 14
    side = max(3.2, 0.42 * len(row_names) + 1.4) if few else 6.4
    with _style():
        figure, axes = _figure((max(SIZE[0], side + 1.2) if few else 7.4, side))
        ax = axes[0, 0]
        ax.imshow(shades, interpolation="nearest", aspect="auto")
        ax.grid(visible=False)
        size = 9 if few else max(3.5, 9 - 0.07 * len(row_names))
        turned = {"rotation": 45, "ha": "right"} if few else {"rotation": 90}
        ax.set_xticks(range(len(column_names)), [_cut(str(name)) for name in column_names], **turned)
        ax.set_yticks(range(len(row_names)), [_cut(str(name)) for name in row_names])
        ax.tick_params(labelsize=size, length=2)
        if few:
            for (i, j), count in np.ndenumerate(counts):
                ax.text(
                    j, i, f"{count:.0f}", ha="center", va="center", fontsize=9, alpha=1 if count else 0.35
                )
        ax.set(xlabel=x_label, ylabel=y_label)
    return figure
