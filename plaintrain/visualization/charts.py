"""Pictures of numbers that are no curves of a run: lines over a common x, bars, histograms, matrices.

Every function returns a matplotlib `Figure`, as those of `plaintrain.visualization.plots` do.
"""

import math

from plaintrain.visualization.curves import thin
from plaintrain.visualization.plots import INK, PALETTE, SIZE, draw_legend, drawing


def xy_figure(lines, x_label, y_label, *, limits=None, diagonal=False):
    """Lines over a common x, such as precision over recall.

    Args:
        lines: dicts of `label`, `x`, `y` (lists; a NaN interrupts the line) and `color`, a number;
            `points` in it marks the points.
        x_label, y_label: text of the axes.
        limits: (least, largest) of both axes, or None to fit.
        diagonal: draw the line of equal x and y, faint.
    """
    with drawing() as (figure, ax):
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
            draw_legend(ax, [line["label"] for line in lines])
    return figure


def bar_figure(names, series, x_label, *, colors=None, most=30):
    """Horizontal bars, of one kind or of several beside each other, with their values written out.

    Args:
        names: one for each group of bars, from the top.
        series: {label: values}; NaN or None is no bar.
        x_label: text of the axis.
        colors: a number for each of the series; default 0, 1, ...
        most: groups that are drawn; the others are left out.
    """
    names = [str(name) for name in names][:most]
    height, colors = 0.8 / len(series), range(len(series)) if colors is None else colors
    with drawing((SIZE[0], 0.9 + len(names) * max(0.3, 0.2 * len(series)))) as (figure, ax):
        for i, (label, values) in enumerate(series.items()):
            values = [math.nan if v is None else v for v in values][:most]
            places = [n + height * (i - (len(series) - 1) / 2) for n in range(len(names))]
            shown = [0 if math.isnan(v) else v for v in values]
            color = PALETTE[colors[i] % len(PALETTE)]
            bars = ax.barh(places, shown, height * 0.92, color=color, label=label)
            ax.bar_label(bars, ["" if math.isnan(v) else _number(v) for v in values], padding=3, fontsize=9)
        ax.set_yticks(range(len(names)), [cut(name) for name in names])
        ax.invert_yaxis()
        ax.margins(x=0.15)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(x_label)
        if len(series) > 1:
            draw_legend(ax, list(series))
    return figure


def _number(value):
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def cut(name, most=24):
    return name if len(name) <= most else name[: most - 1] + "…"


def histogram_figure(edges, series, x_label, y_label, *, colors=None):
    """Counts in bins as outlines with a light fill, one or several.

    Args:
        edges: N + 1 borders of the bins.
        series: {label: N counts}.
        x_label, y_label: text of the axes.
        colors: a number for each of the series; default 0, 1, ...
    """
    colors = range(len(series)) if colors is None else colors
    with drawing() as (figure, ax):
        for number, (label, counts) in zip(colors, series.items(), strict=True):
            color = PALETTE[number % len(PALETTE)]
            ax.stairs(counts, edges, fill=True, color=color, alpha=0.25)
            ax.stairs(counts, edges, color=color, label=label, linewidth=1.4)
        ax.set(xlabel=x_label, ylabel=y_label, ylim=(0, None))
        if len(series) > 1:
            draw_legend(ax, list(series))
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
    shades = _shades(shares**0.6)
    few = max(counts.shape) <= 14
    side = max(3.0, 0.36 * len(row_names) + 1.3) if few else 0.21 * len(row_names) + 1.6
    with drawing((max(SIZE[0], side + 1.2), side)) as (figure, ax):
        ax.imshow(shades, interpolation="nearest", aspect="auto")
        ax.grid(visible=False)
        size = 9 if few else 8
        turned = {"rotation": 45, "ha": "right"} if few else {"rotation": 90}
        ax.set_xticks(range(len(column_names)), [cut(str(name)) for name in column_names], **turned)
        ax.set_yticks(range(len(row_names)), [cut(str(name)) for name in row_names])
        ax.tick_params(labelsize=size, length=2)
        if few:
            for (i, j), count in np.ndenumerate(counts):
                ax.text(
                    j, i, f"{count:.0f}", ha="center", va="center", fontsize=9, alpha=1 if count else 0.35
                )
        ax.set(xlabel=x_label, ylabel=y_label)
    return figure


def _shades(opacity):
    """One colour of growing opacity, `[H, W, 4]`: it works on white and on black."""
    import numpy as np

    shades = np.zeros((*opacity.shape, 4))
    shades[..., :3] = [int(PALETTE[0][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    shades[..., 3] = opacity
    return shades


def heat_figure(cells):
    """Rows of counts, from the top, as a map of shades: the more, the darker."""
    import numpy as np

    counts = np.asarray(cells, dtype=float)
    with drawing() as (figure, ax):
        ax.imshow(_shades(counts / max(counts.max(), 1)), interpolation="nearest", aspect="auto")
        ax.grid(visible=False)
        ax.set(xticks=[], yticks=[], xlabel="width", ylabel="height")
        ax.spines[["top", "right"]].set_visible(True)
    return figure
