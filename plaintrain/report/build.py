"""The report as a whole: its sections, each of which may fail without harm to the others."""

import datetime
import logging

import plaintrain
from plaintrain.plots import require_matplotlib
from plaintrain.report import datasets, detections, gallery, groups, overview, scores, training
from plaintrain.report.gather import gather
from plaintrain.report.html import note, page
from plaintrain.run_folder import run_names
from plaintrain.utils.errors import UserError, first_line
from plaintrain.utils.files import atomic_write

logger = logging.getLogger(__name__)

# id, title, function of the list of `RunFacts`; "gallery" is of one run.
SECTIONS = (
    ("summary", "Summary", overview.summary),
    ("run", "What was run", overview.what_was_run),
    ("curves", "Curves", training.curves),
    ("scores", "AP", scores.ap_tables),
    ("precision-recall", "Precision and recall", detections.precision_recall),
    ("errors", "Errors", detections.error_costs),
    ("confusion", "Confusion", detections.confusion),
    ("calibration", "Calibration", groups.calibration),
    ("thresholds", "Thresholds", groups.thresholds),
    ("groups", "Size and crowdedness", groups.groups),
    ("gallery", "Best and worst images", gallery.gallery),
    ("data", "Data", datasets.datasets),
    ("timing", "Time and memory", training.timing),
    ("warnings", "Warnings", training.warnings),
)


def build_report(folders, output):
    """Write one HTML file on one or several runs.

    Args:
        folders: their folders; the first one's colour is the first everywhere.
        output: the file.

    Raises:
        UserError: matplotlib is missing, a folder is no run's, or the file cannot be written.
    """
    require_matplotlib()
    names = run_names(folders)
    runs = [gather(f, n, i) for i, (f, n) in enumerate(zip(folders, names, strict=True))]
    sections = [
        (id_, title, _section(title, make, runs))
        for id_, title, make in SECTIONS
        if len(runs) == 1 or id_ != "gallery"
    ]
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    title = names[0] if len(names) == 1 else f"{len(names)} runs compared"
    what = f"{', '.join(names)}: report" if len(names) > 1 else "Report"
    text = page(title, f"{what} of {now}, by plaintrain {plaintrain.__version__}", sections)
    with atomic_write(output) as f:
        f.write(text)


def _section(title, make, runs):
    try:
        return make(runs)
    except UserError as e:
        return note(f"This cannot be shown: {e}")
    except Exception as e:
        # Whatever is wrong with one part, the rest is worth reading.
        logger.warning(f"the section {title!r} of the report could not be made", exc_info=True)
        return note(f"This could not be made: {type(e).__name__}: {first_line(e)}")
