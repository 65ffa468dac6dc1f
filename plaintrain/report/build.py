"""Build the report from its sections; a section that fails leaves a note."""

import datetime
import functools
import logging
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

import plaintrain
from plaintrain.analysis.errors import OUTCOMES
from plaintrain.analysis.run_folder import format_duration, get_run_names
from plaintrain.report import detections, runs
from plaintrain.utils.errors import UserError, get_first_line
from plaintrain.utils.files import atomic_write
from plaintrain.utils.text import truncate_text
from plaintrain.visualization.colors import get_hex_color
from plaintrain.visualization.plots import convert_to_svg, require_matplotlib

logger = logging.getLogger(__name__)

# Maximum length of a text, such as a value in the config.
_MAX_TEXT = 10_000

# (id, which is also a macro of the template; title; function from a list of `Run` to the macro's argument).
SECTIONS = (
    ("summary", "Summary", runs.build_summary),
    ("run", "Configuration", runs.build_run_table),
    ("curves", "Curves", runs.build_curves),
    ("scores", "AP", runs.build_scores),
    ("precision-recall", "Precision-recall curves", detections.build_precision_recall),
    ("errors", "Errors (TIDE)", detections.build_errors),
    ("confusion", "Confusion matrix", detections.build_confusion),
    ("calibration", "Calibration", detections.build_calibration),
    ("thresholds", "Score thresholds", detections.build_thresholds),
    ("groups", "Recall by object size and crowding", detections.build_groups),
    ("gallery", "Best and worst images", detections.build_gallery),
    ("data", "Data", runs.build_datasets),
    ("timing", "Time and memory", runs.build_timing),
    ("warnings", "Warnings", runs.build_warnings),
)


def build_report(folders: Sequence[str], output: str) -> None:
    """Write an HTML file on the runs of one or several folders."""
    require_matplotlib()
    names = get_run_names(folders)
    loaded = [runs.Run(f, n, i) for i, (f, n) in enumerate(zip(folders, names, strict=True))]
    sections = [
        (id_, title, _render(id_, title, build, loaded))
        for id_, title, build in SECTIONS
        if len(loaded) == 1 or id_ != "gallery"
    ]
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    title = names[0] if len(names) == 1 else f"{len(names)} runs compared"
    subtitle = f"{', '.join(names)}: report" if len(names) > 1 else "Report"
    subtitle += f" of {now}, by plaintrain {plaintrain.__version__}"
    with atomic_write(output) as f:
        f.write(load_template().page(title, subtitle, sections))


def _render(id_, title, build, loaded):
    template = load_template()
    try:
        return getattr(template, id_.replace("-", "_"))(build(loaded))
    except UserError as e:
        return template.note(f"This section is not available: {e}")
    except Exception as e:
        # A bug in one section must not cost the others.
        logger.warning(f"the section {title!r} of the report failed", exc_info=True)
        return template.note(f"This section failed: {type(e).__name__}: {get_first_line(e)}")


@functools.cache
def load_template() -> Any:
    """Return the template module, whose attributes are its macros."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=format_value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "color": get_hex_color,
        "command": shlex.join,
        "full": lambda text: escape(truncate_text(text, _MAX_TEXT)) if isinstance(text, str) else text,
        "duration": format_duration,
        "cells": lambda records, keys: [[record[key] for key in keys] for record in records],
        "numeric": lambda table: [all(map(_is_number, column)) for column in zip(*table, strict=True)],
        "svg": lambda figure: Markup(convert_to_svg(figure)),
    }
    environment.globals["outcomes"] = OUTCOMES
    environment.tests["best"] = lambda value: isinstance(value, runs.Best)
    return environment.get_template("report.html.jinja").module


def _is_number(value):
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def format_value(value: Any) -> Any:
    """Format a float with 4 digits, from 1000 on without decimals; None, NaN and infinity as a dash."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e15 > abs(value) >= 1000 else f"{value:.4g}"
    # The filter "full" and macros return Markup.
    return truncate_text(value, 200) if type(value) is str else value
