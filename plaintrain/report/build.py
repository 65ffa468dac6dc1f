"""The report as a whole: its sections, each of which may fail without harm to the others."""

import datetime
import functools
import logging
import math
import shlex
from pathlib import Path

import jinja2
from markupsafe import Markup

import plaintrain
from plaintrain.analysis.errors import OUTCOMES
from plaintrain.analysis.run_folder import get_run_names
from plaintrain.report import detections, runs
from plaintrain.utils.errors import UserError, get_first_line
from plaintrain.utils.files import atomic_write
from plaintrain.visualization.colors import get_hex_color
from plaintrain.visualization.plots import convert_to_svg, require_matplotlib

logger = logging.getLogger(__name__)

# The id, which is a macro of the template too, the title, and the function that makes the macro's data from a
# list of `Run`; "gallery" is of one run.
SECTIONS = (
    ("summary", "Summary", runs.build_summary),
    ("run", "What was run", runs.build_run_table),
    ("curves", "Curves", runs.build_curves),
    ("scores", "AP", runs.build_scores),
    ("precision-recall", "Precision and recall", detections.build_precision_recall),
    ("errors", "Errors", detections.build_errors),
    ("confusion", "Confusion", detections.build_confusion),
    ("calibration", "Calibration", detections.build_calibration),
    ("thresholds", "Thresholds", detections.build_thresholds),
    ("groups", "Size and crowdedness", detections.build_groups),
    ("gallery", "Best and worst images", detections.build_gallery),
    ("data", "Data", runs.build_datasets),
    ("timing", "Time and memory", runs.build_timing),
    ("warnings", "Warnings", runs.build_warnings),
)


def build_report(folders, output):
    """Write one HTML file on one or several runs.

    Args:
        folders: their folders; the first one's colour is the first everywhere.
        output: the file.
    """
    require_matplotlib()
    names = get_run_names(folders)
    facts = [runs.Run(f, n, i) for i, (f, n) in enumerate(zip(folders, names, strict=True))]
    sections = [
        (id_, title, _render(id_, title, collect, facts))
        for id_, title, collect in SECTIONS
        if len(facts) == 1 or id_ != "gallery"
    ]
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    title = names[0] if len(names) == 1 else f"{len(names)} runs compared"
    subtitle = f"{', '.join(names)}: report" if len(names) > 1 else "Report"
    subtitle += f" of {now}, by plaintrain {plaintrain.__version__}"
    with atomic_write(output) as f:
        f.write(load_template().page(title, subtitle, sections))


def _render(id_, title, collect, facts):
    template = load_template()
    try:
        return getattr(template, id_.replace("-", "_"))(collect(facts))
    except UserError as e:
        return template.note(f"This cannot be shown: {e}")
    except Exception as e:
        # Whatever is wrong with one part, the rest is worth reading.
        logger.warning(f"the section {title!r} of the report could not be made", exc_info=True)
        return template.note(f"This could not be made: {type(e).__name__}: {get_first_line(e)}")


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
    environment.filters |= {
        "color": get_hex_color,
        "command": shlex.join,
        "duration": lambda seconds: str(datetime.timedelta(seconds=round(seconds))),
        "numeric": lambda rows: [all(map(_is_number, column)) for column in zip(*rows, strict=True)],
        "svg": lambda figure: Markup(convert_to_svg(figure)),
    }
    environment.globals["outcomes"] = OUTCOMES
    environment.tests["best"] = lambda value: isinstance(value, runs.Best)
    return environment.get_template("report.html.jinja").module


def _is_number(value):
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def format_value(value):
    """Format floats in at most 4 digits, whole ones from 1000 on; None, NaN and infinity as a dash."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return value
