"""The section on the data: how many objects there are, of what size and shape, and where."""

from plaintrain.analysis.dataset import dataset_statistics
from plaintrain.data.catalog import DatasetCatalog, class_names
from plaintrain.report.render import Figure
from plaintrain.utils.errors import UserError
from plaintrain.visualization.charts import bar_figure, heat_figure

# (statistic, title, of what its bars are percentages, remark).
_HISTOGRAMS = (
    ("objects_per_image", "Objects in an image", "images", ""),
    ("box_size", "Size", "objects", "root of the box' area, pixels"),
    ("aspect", "Shape", "objects", "width by height"),
    ("relative_box_size", "Size in the image", "objects", "by the root of the image's area"),
)


def datasets(runs):
    """Return statistics of the datasets that the runs are trained and tested on."""
    roles, statistics, unreadable = {}, {}, []
    for run in runs:
        for role, names in (("train", run.train_sets), ("test", run.test_sets)):
            for name in names:
                roles.setdefault(name, {})[role] = None
    for name in roles:
        try:
            statistics[name] = dataset_statistics(DatasetCatalog.get(name), class_names(name))
        except UserError as e:
            reason = next((run.unreadable[name] for run in runs if name in run.unreadable), e)
            unreadable.append((name, reason))
    if not statistics:
        return {"unreadable": unreadable, "columns": []}
    classes = dict.fromkeys(c["name"] for s in statistics.values() for c in s["classes"])
    by_name = [{c["name"]: c for c in s["classes"]} for s in statistics.values()]
    return {
        "columns": [f"{counted}, {name}" for name in statistics for counted in ("objects", "images with it")],
        "unreadable": unreadable,
        "counts": [_counts(name, " and ".join(roles[name]), s) for name, s in statistics.items()],
        "classes": [
            [c, *(known.get(c, {}).get(key) for known in by_name for key in ("objects", "images"))]
            for c in classes
        ],
        "figures": [*_histograms(statistics), *_heat_maps(statistics)],
    }


def _counts(name, role, s):
    counts = [s[key] for key in ("images", "empty_images", "objects", "crowds")]
    areas = [s["area"][key] for key in ("small", "medium", "large")]
    shares = [None if area is None else round(100 * area, 1) for area in areas]
    sides = [s["image_size"][side] for side in ("width", "height")]
    ranges = [f"{d['min']}" if d["min"] == d["max"] else f"{d['min']} to {d['max']}" for d in sides if d]
    return [name, role, *counts, s["objects_per_image"]["mean"], *shares, " x ".join(ranges) or "–"]


def _histograms(statistics):
    for key, title, counted, remark in _HISTOGRAMS:
        counts = {name: s[key]["counts"] for name, s in statistics.items()}
        names = next(iter(statistics.values()))[key]["names"]
        used = [i for i, of_bin in enumerate(zip(*counts.values(), strict=True)) if any(of_bin)]
        series = {n: [100 * c[i] / max(1, sum(c)) for i in used] for n, c in counts.items()}
        if used:
            drawing = bar_figure([names[i] for i in used], series, f"% of the {counted}")
            yield Figure(f"data-{key}", drawing, title, remark)


def _heat_maps(statistics):
    for i, (name, s) in enumerate(statistics.items()):
        if s["objects"]:
            drawing = heat_figure(s["centres"])
            title, words = f"Where the objects are, {name}", "centres of the boxes in the image"
            yield Figure(f"centres-{i}", drawing, title, words)
