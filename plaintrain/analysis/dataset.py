"""What is in a dataset, in numbers: how many, how large, of what shape, and where."""

from collections import Counter

import numpy as np

from plaintrain.data.serialized import SerializedRecords
from plaintrain.utils.errors import UserError

# Lower edges of bins; the last has no end.
PER_IMAGE = (0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100)
SIZES = (0, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768)
RELATIVE = (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ASPECTS = (0, 1 / 4, 1 / 3, 1 / 2, 3 / 4, 4 / 3, 2, 3, 4)
IMAGES = (0, 128, 256, 384, 512, 640, 800, 1024, 1536, 2048, 4096)
# COCO's areas of what is medium and what is large.
_MEDIUM, _LARGE = 32**2, 96**2


def dataset_statistics(records, class_names, cells=16):
    """Statistics of a dataset, which hold only what goes into JSON.

    Boxes that are counted are of objects, not of crowds. Sizes are the root of the box' area.

    Args:
        records: what `DatasetCatalog.get` returns, or a list of records.
        class_names: the dataset's class names.
        cells: rows and columns of the map of centres.

    Returns:
        dict; a histogram is a dict of `names` of the bins, their lower `edges`, and `counts`:

        - `images`, `empty_images` (without an object), `objects`, `crowds`, `with_masks`, `with_keypoints`
          (objects that have some)
        - `classes`: [{`name`, `objects`, `images` (that hold one), `crowds`}]
        - `objects_per_image`: histogram, and `mean`, `median`, `max`
        - `box_size` in pixels and `relative_box_size` (by the root of the image's area): histograms, and
          `median`; `area`: share of `small`, `medium` and `large` objects by COCO's limits of the box' area
        - `aspect`: histogram of width by height, and `median`
        - `image_size`: histogram of the root of the area, `width` and `height`: {`min`, `median`, `max`}, and
          `commonest`: [{`width`, `height`, `count`}], up to 10
        - `centres`: `cells` rows from top to bottom of how many boxes have their centre there, [`cells`] each

        None where there is nothing to take it from.

    Raises:
        UserError: a record or an annotation that cannot be read.
    """
    if getattr(records, "annotations", None) is None or records.columns is None:
        records = SerializedRecords(list(records))
    table, columns, number = records.annotations, records.columns, len(class_names)
    if table is None or columns is None or not ((table.labels >= 0) & (table.labels < number)).all():
        raise UserError("the dataset holds a record that cannot be read; scripts/check_dataset.py says which")
    real = ~table.crowd
    image, labels, boxes = table.record[real], table.labels[real], table.boxes[real]
    width, height = columns["width"], columns["height"]
    per_image = np.bincount(image, minlength=len(records))
    return {
        "images": len(records),
        "empty_images": int((per_image == 0).sum()),
        "objects": len(labels),
        "crowds": int(table.crowd.sum()),
        "with_masks": int((table.masks & real).sum()),
        "with_keypoints": int((table.keypoints[real] > 0).sum()),
        "classes": _classes(class_names, labels, image, table.labels[table.crowd]),
        "objects_per_image": _counted(per_image),
        **_boxes(boxes, width[image] * height[image]),
        "image_size": _images(width, height),
        "centres": _centres(boxes, width[image], height[image], cells),
    }


def _classes(names, labels, image, crowds):
    objects, crowds = (np.bincount(part, minlength=len(names)) for part in (labels, crowds))
    # Each pair of a class and an image once.
    pairs = np.unique(image * len(names) + labels)
    images = np.bincount(pairs % max(len(names), 1), minlength=len(names))
    columns = {"objects": objects, "images": images, "crowds": crowds}
    return [
        {"name": name, **{key: int(column[k]) for key, column in columns.items()}}
        for k, name in enumerate(names)
    ]


def _counted(per_image):
    known = len(per_image) > 0
    return {
        **_histogram(per_image, PER_IMAGE),
        "mean": float(per_image.mean()) if known else None,
        "median": _median(per_image),
        "max": int(per_image.max()) if known else None,
    }


def _boxes(boxes, image_area):
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    area = sides.prod(axis=1)
    size, relative = np.sqrt(area), np.sqrt(area / np.maximum(image_area, 1))
    # A box without height is as wide as can be.
    aspect = sides[:, 0] / np.maximum(sides[:, 1], 1e-9)
    shares = {"small": area < _MEDIUM, "large": area >= _LARGE}
    shares["medium"] = ~(shares["small"] | shares["large"])
    found = {
        "box_size": (size, SIZES),
        "relative_box_size": (relative, RELATIVE),
        "aspect": (aspect, ASPECTS),
    }
    histograms = {key: {**_histogram(*pair), "median": _median(pair[0])} for key, pair in found.items()}
    share = {key: float(shares[key].mean()) if len(area) else None for key in ("small", "medium", "large")}
    return {**histograms, "area": share}


def _images(width, height):
    sizes = Counter(zip(width.tolist(), height.tolist(), strict=True)).most_common(10)
    sides = {
        key: {"min": int(side.min()), "median": _median(side), "max": int(side.max())} if len(side) else None
        for key, side in (("width", width), ("height", height))
    }
    commonest = [{"width": w, "height": h, "count": count} for (w, h), count in sizes]
    return {**_histogram(np.sqrt(width * height), IMAGES), **sides, "commonest": commonest}


def _centres(boxes, width, height, cells):
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    x, y = (
        np.clip(middle[:, i] / np.maximum(side, 1) * cells, 0, cells - 1).astype(int)
        for i, side in enumerate((width, height))
    )
    return np.bincount(y * cells + x, minlength=cells**2).reshape(cells, cells).tolist()


def bin_names(edges, whole):
    """Names of bins by their lower edges, from 0 unless it is whole numbers that are counted."""
    names = [f"{round(edge, 2):g}" for edge in edges]
    if not whole:
        return [f"< {names[1]}", *map("-".join, zip(names[1:-1], names[2:], strict=True)), f">= {names[-1]}"]
    spans = [f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return [*spans, f">= {names[-1]}"]


def _histogram(values, edges):
    counts = np.bincount(np.digitize(values, edges[1:]), minlength=len(edges)).tolist()
    return {"names": bin_names(edges, values.dtype.kind == "i"), "edges": list(edges), "counts": counts}


def _median(values):
    return float(np.median(values)) if len(values) else None
