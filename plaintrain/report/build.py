"""The report as a whole: its sections, each of which may fail without harm to the others."""

import datetime
import logging
from functools import partial

import plaintrain
from plaintrain.analysis.run_folder import run_names
from plaintrain.report import datasets, detections, gallery, runs
from plaintrain.report.detections import by_dataset
from plaintrain.report.gather import gather
from plaintrain.report.render import load_template
from plaintrain.utils.errors import UserError, first_line
from plaintrain.utils.files import atomic_write
from plaintrain.visualization.plots import require_matplotlib

logger = logging.getLogger(__name__)

# The id, which is a macro of the template too, the title, and the function that makes the macro's data from a
# list of `RunFacts`; "gallery" is of one run.
SECTIONS = (
    ("summary", "Summary", runs.summary),
    ("run", "What was run", runs.what_was_run),
    ("curves", "Curves", runs.curves),
    ("scores", "AP", runs.scores),
    ("precision-recall", "Precision and recall", partial(by_dataset, detections.precision_recall)),
    ("errors", "Errors", partial(by_dataset, detections.errors)),
    ("confusion", "Confusion", detections.confusion),
    ("calibration", "Calibration", partial(by_dataset, detections.calibration)),
    ("thresholds", "Thresholds", partial(by_dataset, detections.thresholds)),
    ("groups", "Size and crowdedness", partial(by_dataset, detections.groups)),
    ("gallery", "Best and worst images", gallery.gallery),
    ("data", "Data", datasets.datasets),
    ("timing", "Time and memory", runs.timing),
    ("warnings", "Warnings", runs.warnings),
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
    facts = [gather(f, n, i) for i, (f, n) in enumerate(zip(folders, names, strict=True))]
    sections = [
        (id_, title, _render(id_, title, collect, facts))
        for id_, title, collect in SECTIONS
        if len(facts) == 1 or id_ != "gallery"
    ]
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    title = names[0] if len(names) == 1 else f"{len(names)} runs compared"
    subtitle = f"{', '.join(names)}: report" if len(names) > 1 else "Report"
    subtitle += f" of {now}, by plaintrain {plaintrain.__version__}"
    text = load_template().page(title, subtitle, sections)
    with atomic_write(output) as f:
        f.write(text)


def _render(id_, title, collect, facts):
    template = load_template()
    try:
        return getattr(template, id_.replace("-", "_"))(collect(facts))
    except UserError as e:
        return template.note(f"This cannot be shown: {e}")
    except Exception as e:
        # Whatever is wrong with one part, the rest is worth reading.
        logger.warning(f"the section {title!r} of the report could not be made", exc_info=True)
        return template.note(f"This could not be made: {type(e).__name__}: {first_line(e)}")
