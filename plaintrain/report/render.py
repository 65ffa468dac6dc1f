"""The report's template, report.html.jinja, and what its cells, figures and numbers are made of."""

import datetime
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from plaintrain.visualization.plots import PALETTE, svg_text


class Cell(NamedTuple):
    """A table's cell that is shown in another way than it is sorted, or is the best of a row."""

    shown: Any
    value: float | None = None
    is_best: bool = False


class Figure(NamedTuple):
    """A figure of matplotlib's; each has another name on the page, and a wide one needs more room."""

    name: str
    drawing: Any
    title: str
    description: str = ""
    is_wide: bool = False


def format_value(value):
    """Format floats in at most 4 digits, whole ones from 1000 on; None, NaN and infinity as a dash."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return value


def format_score(value):
    """Format a score, 0 to 100, with one decimal; "–" where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.1f}"


def format_duration(seconds):
    """Format seconds as h:mm:ss; "–" where they are not known."""
    return "–" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))


def score_cell(value, others=()):
    """Return a score as a cell, marked if it is the best of `others`; one that is missing sorts below 0."""
    is_known = value is not None and math.isfinite(value)
    return Cell(format_score(value), value if is_known else -1.0, is_best(value, others))


def is_best(value, values):
    """Return whether a value is the best of several, of which at least two are known."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    return len(known) > 1 and value == max(known)


def _to_cells(rows):
    """Return rows of `Cell`, and for each column whether all its cells are numbers or missing."""
    cells = [[c if isinstance(c, Cell) else _cell(c) for c in row] for row in rows]
    values = [[c.value if isinstance(c, Cell) else c for c in row] for row in rows]
    return cells, [all(v is None or _is_number(v) for v in column) for column in zip(*values, strict=True)]


def _cell(content):
    return Cell(content, content if _is_number(content) and math.isfinite(content) else None)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _svg(figure):
    name = "".join(c if c.isascii() and c.isalnum() else "-" for c in figure.name)
    return Markup(svg_text(figure.drawing, name))


@functools.cache
def load_template():
    """Return the template's macros: one for each section, and `page`.

    A key that is missing in the data of a section raises.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=format_value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["palette"] = PALETTE
    environment.filters |= {"to_cells": _to_cells, "duration": format_duration, "svg": _svg}
    return environment.get_template("report.html.jinja").module
