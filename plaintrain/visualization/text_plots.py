"""Curves as text, for a terminal."""

import datetime
import fnmatch
import math

from plaintrain.analysis.run_folder import seconds_left, split_result

# Dots of a braille character by row and column.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_ASCII = " .:-=+*#"
_NAME_WIDTH = 24
_HEIGHT = 3


def braille(values, width, height=_HEIGHT):
    """A curve as lines of braille characters, two dots wide and four high each.

    Args:
        values: list of numbers in equal distances; what is not finite is a gap.
        width, height: in characters.

    Returns:
        list of `height` strings of `width` characters.
    """
    places = _places(values, 2 * width, 4 * height)
    cells = [[0] * width for _ in range(height)]
    before = None
    for column, place in enumerate(places):
        if place is not None:
            # Steps are filled, so that the line holds together.
            step = place if before is None else before + (place > before) - (place < before)
            for dot in range(min(step, place), max(step, place) + 1):
                row = 4 * height - 1 - dot
                cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
        before = place
    return ["".join(chr(0x2800 + cell) for cell in row) for row in cells]


def ascii_line(values, width):
    """A curve as one line of plain characters, the darker the larger."""
    places = _places(values, width, len(_ASCII))
    return "".join(" " if place is None else _ASCII[place] for place in places)


def _places(values, columns, levels):
    """For each column the level, 0 to levels - 1, of the values that fall on it, or None."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return [None] * columns
    low, high = min(finite), max(finite)
    if len(values) < columns:
        values = _spread(values, columns)
    places = []
    for column in range(columns):
        part = values[column * len(values) // columns : (column + 1) * len(values) // columns]
        part = [v for v in part if math.isfinite(v)]
        share = (sum(part) / len(part) - low) / (high - low) if part and high > low else 0.0
        places.append(round(share * (levels - 1)) if part else None)
    return places


def _spread(values, number):
    """Few values as more, on the straight lines between them."""
    spread = []
    for i in range(number):
        at = i * (len(values) - 1) / (number - 1)
        before = int(at)
        after = min(before + 1, len(values) - 1)
        spread.append(values[before] + (at - before) * (values[after] - values[before]))
    return spread


def shown_metrics(metrics, patterns=()):
    """The names of the metrics that a terminal has room for; those that match `patterns` if there are any."""
    if patterns:
        return [name for name in metrics if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    results = [n for n in metrics if split_result(n) and split_result(n)[2] == "AP"]
    wanted = ["total_loss", "val/total_loss", *results, "lr", "time", "data_time"]
    return [name for name in wanted if name in metrics]


def state_line(name, metrics, state):
    """Where a run stands, with the time that is left.

    Args:
        name: what to call the run.
        metrics: what `run_folder.read_metrics` gave.
        state: what `run_folder.run_state` gave.
    """
    done = f"iteration {state.iteration + 1} of {state.max_iter}" if state.max_iter else "no iterations"
    left = seconds_left(metrics, state) if state.name == "running" else None
    eta = f", {datetime.timedelta(seconds=int(left))} left" if left is not None else ""
    return f"{name}: {state.name}, {done}{eta}"


def curve_lines(curves, width=80, plain=False):
    """Curves with their names, last values and limits.

    Args:
        curves: {name: values}, lists that are not empty.
        width: characters a line may have.
        plain: one line of ASCII characters a curve.

    Returns:
        list of lines.
    """
    # Beside the curve: name, last value, limits.
    room, lines = max(8, width - _NAME_WIDTH - 12 - (25 if plain else 11)), []
    for name, values in curves.items():
        finite = [v for v in values if math.isfinite(v)] or [math.nan]
        low, high = f" {min(finite):.4g}", f" {max(finite):.4g}"
        head = f"{_cut(name):<{_NAME_WIDTH}}{values[-1]:>10.4g}  "
        if plain:
            lines.append(f"{head}{ascii_line(values, room)}{low} to{high}")
            continue
        drawn = braille(values, room)
        heads = [head, *[" " * len(head)] * (len(drawn) - 1)]
        limits = [high, *[""] * (len(drawn) - 2), low]
        lines += [(h + d + limit).rstrip() for h, d, limit in zip(heads, drawn, limits, strict=True)]
    return lines


def _cut(name):
    return name if len(name) < _NAME_WIDTH else "~" + name[-(_NAME_WIDTH - 2) :]
