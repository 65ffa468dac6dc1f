"""The results of an evaluation for people: a table with the change since the last one, and results.json."""

import logging
import math
import os

from plaintrain.evaluation.evaluator import format_table, print_csv_format
from plaintrain.evaluation.predictions import write_results
from plaintrain.utils import comm
from plaintrain.utils.files import RESULTS_FILE, read_results_file

logger = logging.getLogger(__name__)


def report_results(dataset_name, results, folder):
    """Log a dataset's results with the change since the last ones in `folder`, and write them there.

    Does nothing on ranks other than 0. A class' own numbers (`AP-NAME`) are in the file, not in the table.

    Args:
        dataset_name: what was evaluated.
        results: {task: {metric: number}}.
        folder: where results.json is, `{dataset_name: results}`, with null for what is no finite number.
    """
    if not comm.is_main_process():
        return
    before = read_results_file(folder).get(dataset_name, {})
    table = results_table(results, before)
    since = ", and the change since the last evaluation" if before else ""
    text = f"results on {dataset_name}{since}:\n{table}"
    logger.info(text)
    print_csv_format(results)
    write_results(os.path.join(folder, RESULTS_FILE), {dataset_name: results})


def results_table(results, before):
    """Each task's numbers as an aligned text table; below them, the change from those of `before`."""
    tables = []
    for task, metrics in results.items():
        names = [name for name in metrics if "-" not in name]
        rows = [[task, *(float(metrics[name]) for name in names)]]
        changes = [_change(before.get(task, {}).get(name), metrics[name]) for name in names]
        rows += [["", *changes]] if any(changes) else []
        tables.append(format_table(rows, ["", *names]))
    return "\n".join(tables)


def _change(before, now):
    known = isinstance(before, int | float) and math.isfinite(before) and math.isfinite(now)
    return f"{now - before:+.2f}" if known else ""
