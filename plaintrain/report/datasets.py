"""The section on the data: how many objects there are, of what size and shape, and where."""

from plaintrain.charts import bar_figure, heat_figure
from plaintrain.data.catalog import DatasetCatalog, class_names
from plaintrain.data.statistics import dataset_statistics
from plaintrain.report.html import figure, grid, join, note, table, tag
from plaintrain.utils.errors import UserError

_HISTOGRAMS = {
    "objects_per_image": ("Objects in an image", "% of the images"),
    "box_size": ("Size", "% of the objects"),
    "aspect": ("Shape", "% of the objects"),
    "relative_box_size": ("Size in the image", "% of the objects"),
}
_WORDS = {
    "box_size": "root of the box' area, pixels",
    "aspect": "width by height",
    "relative_box_size": "by the root of the image's area",
}


def datasets(runs):
    """Statistics of what was trained and tested on."""
    roles, found, reasons = {}, {}, []
    for run in runs:
        for role, names in (("train", run.train_sets), ("test", run.test_sets)):
            for name in names:
                known = roles.setdefault(name, [])
                known += [role] if role not in known else []
    for name in roles:
        try:
            found[name] = dataset_statistics(DatasetCatalog.get(name), class_names(name))
        except UserError as e:
            why = next((run.unreadable[name] for run in runs if name in run.unreadable), e)
            reasons.append(note(f"{name} cannot be read here: {why}"))
    if not roles:
        return note("The config names no datasets.")
    if not found:
        return join(reasons)
    parts = [_counts(found, roles), *reasons, tag("h3", "Classes"), _classes(found), _drawn(found)]
    return join(parts)


def _counts(found, roles):
    rows = []
    for name, s in found.items():
        area, per_image = s["area"], s["objects_per_image"]
        shares = [
            None if area[key] is None else round(100 * area[key], 1) for key in ("small", "medium", "large")
        ]
        counts = [s[key] for key in ("images", "empty_images", "objects", "crowds")]
        rows.append(
            [name, " and ".join(roles[name]), *counts, per_image["mean"], *shares, _sizes(s["image_size"])]
        )
    columns = ["dataset", "used to", "images", "of them empty", "objects", "crowds", "objects an image"]
    return table([*columns, "% small", "% medium", "% large", "images' width x height"], rows)


def _sizes(size):
    if not size["width"]:
        return "–"
    ranges = [
        f"{side['min']}" if side["min"] == side["max"] else f"{side['min']} to {side['max']}"
        for side in (size["width"], size["height"])
    ]
    return " x ".join(ranges)


def _classes(found):
    names = list(dict.fromkeys(c["name"] for s in found.values() for c in s["classes"]))
    counts = {name: {c["name"]: c for c in s["classes"]} for name, s in found.items()}
    rows = []
    for name in names:
        cells = [counts[d].get(name, {}).get(key) for d in found for key in ("objects", "images")]
        rows.append([name, *cells])
    columns = [f"{what}, {name}" for name in found for what in ("objects", "images with it")]
    return table(["class", *columns], rows)


def _drawn(found):
    figures = []
    for key, (title, label) in _HISTOGRAMS.items():
        names = next(iter(found.values()))[key]["names"]
        counts = {name: s[key]["counts"] for name, s in found.items()}
        used = [i for i in range(len(names)) if any(c[i] for c in counts.values())]
        series = {n: [100 * c[i] / max(1, sum(c)) for i in used] for n, c in counts.items()}
        if used:
            shown = bar_figure([names[i] for i in used], series, label)
            figures.append(figure(shown, f"data-{key}", title, _WORDS.get(key, "")))
    for i, (name, s) in enumerate(found.items()):
        if s["objects"]:
            words = f"Where the objects are, {name}", "centres of the boxes in the image"
            figures.append(figure(heat_figure(s["centres"]), f"centres-{i}", *words))
    return grid(figures)
