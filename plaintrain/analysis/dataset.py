"""Statistics of a dataset: number, size and shape of objects."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from plaintrain.data.serialized import SerializedRecords
from plaintrain.utils.errors import UserError

# Lower edges of bins; the last is open.
PER_IMAGE = (0, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100)
SIZES = (0, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768)
ASPECTS = (0, 1 / 4, 1 / 3, 1 / 2, 3 / 4, 4 / 3, 2, 3, 4)
# COCO's minimum areas of medium and large objects.
_MEDIUM = 32**2
_LARGE = 96**2


def compute_dataset_statistics(
    records: SerializedRecords | Sequence[dict[str, Any]], class_names: Sequence[str]
) -> dict[str, Any]:
    """Compute statistics of the objects, without crowds.

    Returns:
        a dict; a histogram is a dict of `names` of the bins and `counts`:

        - `images`, `empty_images` (without objects), `objects`, `crowds`: counts
        - `classes`: {name: {`objects`, `images`}}
        - `mean_objects`: per image; None without images
        - `objects_per_image`, `box_size` (square root of the area, pixels), `aspect` (width / height):
          histograms
        - `areas`: fractions of small, medium and large objects by COCO's limits
        - `ranges`: {"width", "height": (minimum, maximum) of the images}; {} without images
    """
    if not isinstance(records, SerializedRecords) or records.annotations is None or records.columns is None:
        records = SerializedRecords(list(records))
    table = records.annotations
    columns = records.columns
    num_classes = len(class_names)
    if table is None or columns is None or not ((table.labels >= 0) & (table.labels < num_classes)).all():
        raise UserError("the dataset holds an invalid record; scripts/check_dataset.py lists the problems")
    real = ~table.crowd
    image = table.record[real]
    labels = table.labels[real]
    boxes = table.boxes[real]
    per_image = np.bincount(image, minlength=len(records))
    # Count each pair of a class and an image once.
    pairs = np.unique(image * max(num_classes, 1) + labels) % max(num_classes, 1)
    objects, images = (np.bincount(ids, minlength=num_classes).tolist() for ids in (labels, pairs))
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    area = sides.prod(axis=1)
    by_size = np.bincount(np.digitize(area, (_MEDIUM, _LARGE)), minlength=3) / max(len(area), 1)
    ranges = {k: (int(columns[k].min()), int(columns[k].max())) for k in ("width", "height") if len(records)}
    return {
        "images": len(records),
        "empty_images": int((per_image == 0).sum()),
        "objects": len(labels),
        "crowds": int(table.crowd.sum()),
        "classes": {n: {"objects": objects[k], "images": images[k]} for k, n in enumerate(class_names)},
        "mean_objects": float(per_image.mean()) if len(per_image) else None,
        "objects_per_image": _histogram(per_image, PER_IMAGE),
        "box_size": _histogram(np.sqrt(area), SIZES),
        "aspect": _histogram(sides[:, 0] / np.maximum(sides[:, 1], 1e-9), ASPECTS),
        "areas": by_size.tolist(),
        "ranges": ranges,
    }


def format_bins(edges: Sequence[float], are_counts: bool) -> list[str]:
    """Return names of bins by their lower edges; `are_counts` for integer values."""
    names = [f"{round(edge, 2):g}" for edge in edges]
    if not are_counts:
        return [f"< {names[1]}", *map("-".join, zip(names[1:-1], names[2:], strict=True)), f">= {names[-1]}"]
    spans = [f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return [*spans, f">= {names[-1]}"]


def _histogram(values, edges):
    counts = np.bincount(np.digitize(values, edges[1:]), minlength=len(edges)).tolist()
    return {"names": format_bins(edges, values.dtype.kind == "i"), "counts": counts}
