"""The section of the scores: AP by size and by class."""

from plaintrain.report.html import join, note, score_cell, table, tag
from plaintrain.report.overview import is_best, main_scores

_EXPLAINED = {
    "AP": "mean over IoU 0.50 to 0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "small, below 32² pixels",
    "APm": "medium, 32² to 96²",
    "APl": "large, above 96²",
    "AR1": "recall, 1 detection an image",
    "AR10": "recall, 10 an image",
    "AR100": "recall, 100 an image",
    "ARs": "recall, small",
    "ARm": "recall, medium",
    "ARl": "recall, large",
}


def ap_tables(runs):
    """The scores of the last evaluation."""
    parts = []
    for dataset, task in dict.fromkeys((d, t) for run in runs for d, t, _ in main_scores(run)):
        found = [run.results.get(dataset, {}).get(task, {}) for run in runs]
        parts.append(tag("h3", f"{task} on {dataset}"))
        tables = [_main_table(runs, found)]
        classes = [n for n in dict.fromkeys(n for scores in found for n in scores) if n.startswith("AP-")]
        if classes:
            tables.append(_class_table(runs, found, classes, dataset, task))
        parts.append(tag("div", *tables, class_="beside"))
    if not parts:
        return note(
            "No evaluation has been made yet: TEST.EVAL_PERIOD says how often, and the end of the training "
            "makes one; scripts/test_net.py makes one of any checkpoint."
        )
    lead = "Of the last evaluation, 0 to 100. A dash: the test set has no such object."
    return join([tag("p", lead, class_="lead"), *parts])


def _main_table(runs, found):
    names = [n for n in dict.fromkeys(n for scores in found for n in scores) if "-" not in n]
    rows = []
    for name in names:
        rows.append([tag("strong", name), *_cells(found, name), _EXPLAINED.get(name, "")])
    return table(["metric", *_columns(runs), "what it is"], rows)


def _cells(found, name):
    values = [scores.get(name) for scores in found]
    return [score_cell(value, is_best(value, values)) for value in values]


def _columns(runs):
    return [run.name for run in runs] if len(runs) > 1 else ["score"]


def _class_table(runs, found, classes, dataset, task):
    """By class; of one run with what the analysis knows of each."""
    if len(runs) == 1 and dataset in runs[0].analyses:
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
        known = runs[0].analyses[dataset]["per_class"].get(task, [])
        there = [row for row in known if row["objects"]]
        rows = [[row["name"], row["objects"], *(score_cell(row[n]) for n in names)] for row in there]
        without = len(known) - len(there)
        more = f"; {without} classes without objects are left out" if without else ""
        return table(["class", "objects", *names], rows, f"AP by class on {dataset}{more}")
    rows = [[name.removeprefix("AP-"), *_cells(found, name)] for name in classes]
    columns = ["AP"] if len(runs) == 1 else _columns(runs)
    return table(["class", *columns], rows, f"AP by class on {dataset}")
