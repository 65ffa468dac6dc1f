"""What may be wrong with a dataset, found in its records without opening an image."""

import math
import numbers
from collections import Counter
from dataclasses import dataclass

from plaintrain.data.datasets.coco_mistakes import keypoint_mistake
from plaintrain.structures import BoxMode, segmentation_mistake

MAX_EXAMPLES = 10
# A box is tiny if a side is shorter than this, in pixels.
TINY = 2
# Classes are unbalanced if the commonest has so many times the boxes of the rarest that has any.
IMBALANCE = 10
# An image is nearly constant if its values, in each channel, are closer together: 14 bits read as 16.
LEAST_SPREAD = 64

# kind -> (what was found, whether training stops at it).
KINDS = {
    "no_images": ("datasets without an image", True),
    "no_boxes": ("datasets without a usable box, so that there is nothing to learn", True),
    "broken_image": ("incomplete or malformed entries of images", True),
    "unreadable": ("images that are missing or cannot be read to their end", True),
    "pixel_range": ("images whose pixels do not fit INPUT.PIXEL_RANGE, or the range of their type", True),
    "ambiguous": ("images whose annotations may be those of another one", True),
    "wrong_size": ("images of another size than their record says", True),
    "same_image_id": ("images with the id of another one (stop evaluation)", True),
    "broken": ("incomplete or malformed annotations", True),
    "unknown_image": ("annotations of an image that is not there", True),
    "unknown_class": ("annotations with an unknown class id", True),
    "bad_box": ("boxes that are not four finite numbers in their place", True),
    "wrong_keypoints": ("annotations with a wrong number of keypoints, or malformed ones", True),
    "bad_polygon": (
        "annotations with polygons of fewer than three points, or malformed ones (stop training with masks)",
        True,
    ),
    "bad_rle": ("run-length encodings that do not fit their image (stop training with masks)", True),
    "empty_box": ("boxes without area, which training drops", False),
    "outside_box": ("boxes outside their image, which training drops", False),
    "clipped_box": ("boxes that reach beyond their image by over half a pixel, which training clips", False),
    "tiny_box": (f"boxes with a side shorter than {TINY} pixels", False),
    "outside_keypoint": ("annotations with a labelled keypoint outside the image", False),
    "duplicate_id": ("annotations with the id of another one", False),
    "no_annotations": ("images without annotations", False),
    "unused_class": ("classes without a box", False),
    "imbalance": (f"classes whose numbers of boxes differ by a factor of {IMBALANCE} or more", False),
    "turned": ("images that their EXIF orientation turns", False),
    "near_constant": (
        f"images that use fewer than {LEAST_SPREAD} of 256 values, as when INPUT.PIXEL_RANGE is wrong",
        False,
    ),
    "listed_twice": ("images that are listed more than once", False),
    "duplicate": ("images with the pixels of another one of the dataset", False),
    "leak": ("images with the pixels of one of another dataset", False),
}


@dataclass(frozen=True)
class Finding:
    """One sort of thing that was found: `kind` (of `KINDS`), how often, up to ten examples."""

    kind: str
    count: int
    examples: tuple
    fatal: bool

    def __str__(self):
        head = f"{'FATAL: ' if self.fatal else ''}{KINDS[self.kind][0]}: {self.count}"
        more = [f"... and {self.count - len(self.examples)} more"] * (self.count > len(self.examples) > 0)
        return "\n".join([head, *(f"    {line}" for line in [*self.examples, *more])])


class Tally:
    """Counts by kind, with the first examples of each."""

    def __init__(self):
        self._counts, self._examples = Counter(), {}

    def add(self, kind, *words):
        """Count one; `words` are joined to its example, if there is room for it."""
        self._counts[kind] += 1
        if words and self._counts[kind] <= MAX_EXAMPLES:
            self._examples.setdefault(kind, []).append(" ".join(map(str, words)))

    def findings(self):
        """list of `Finding`, in the order of `KINDS`."""
        return [
            Finding(kind, self._counts[kind], tuple(self._examples.get(kind, ())), fatal)
            for kind, (_, fatal) in KINDS.items()
            if self._counts[kind]
        ]


def check_problems(problems):
    """Findings of what a reader collected: a list of `UserError`, some with a `kind`."""
    tally = Tally()
    for error in problems:
        tally.add(getattr(error, "kind", "broken"), error)
    return tally.findings()


def class_counts(records, metadata):
    """{class name: number of boxes}, unknown ids left out."""
    counts = Counter(a["category_id"] for record in records for a in record["annotations"])
    return {name: counts[label] for label, name in enumerate(metadata["thing_classes"])}


def check_records(records, metadata):
    """What is to be said about records: the checks that open no image.

    Args:
        records: iterable of records.
        metadata: dict or `Metadata` with `thing_classes` and, for keypoints, `keypoint_names`.

    Returns:
        list of `Finding`; the fatal ones are those that training stops at.
    """
    tally, used, seen = Tally(), Counter(), set()
    classes = list(metadata.get("thing_classes") or ())
    num_keypoints = len(metadata.get("keypoint_names") or ()) or None
    for record in records:
        name = record["file_name"]
        if record["image_id"] in seen:
            tally.add("same_image_id", name, "has the id", record["image_id"])
        seen.add(record["image_id"])
        if not record["annotations"]:
            tally.add("no_annotations", name)
        for annotation in record["annotations"]:
            label = annotation["category_id"]
            if isinstance(label, numbers.Integral) and 0 <= label < len(classes):
                used[label] += 1
            else:
                tally.add("unknown_class", f"{name}: {label!r}, of {len(classes)} classes")
            for kind, what in annotation_problems(annotation, record, num_keypoints):
                tally.add(kind, f"{name}: {what}")
    if not seen:
        tally.add("no_images")
    elif not used:
        tally.add("no_boxes")
    _check_balance(tally, [(used[label], class_name) for label, class_name in enumerate(classes)])
    return tally.findings()


def _check_balance(tally, counts):
    present = [count for count, _ in counts if count]
    unbalanced = present and max(present) >= IMBALANCE * min(present)
    for count, name in sorted(counts, key=lambda pair: -pair[0]):
        if not count:
            tally.add("unused_class", name)
        elif unbalanced:
            tally.add("imbalance", f"{name}: {count} boxes")


def annotation_problems(annotation, record, num_keypoints=None):
    """[(kind, what was found)] of one annotation, its class aside.

    Args:
        annotation, record: the annotation and its image's record.
        num_keypoints: how many keypoints it must have if it has any, or None.
    """
    found = []
    problem = _box_problem(annotation, record["height"], record["width"])
    if problem:
        found.append((problem, f"box {annotation['bbox']}"))
    segmentation = annotation.get("segmentation")
    wrong = segmentation and segmentation_mistake(segmentation, record["height"], record["width"])
    if wrong:
        found.append((wrong[0], f"an annotation {wrong[1]}"))
    if annotation.get("keypoints"):
        found += _keypoint_problems(annotation["keypoints"], num_keypoints, record)
    return found


def _box_problem(annotation, height, width):
    try:
        x0, y0, x1, y1 = map(float, annotation["bbox"])
    except (TypeError, ValueError):
        return "bad_box"
    if not math.isfinite(x0 + y0 + x1 + y1):
        return "bad_box"
    if annotation["bbox_mode"] == BoxMode.XYWH_ABS:
        x1, y1 = x0 + x1, y0 + y1
    kinds = box_kinds(x0, y0, x1, y1, width, height)
    return next((kind for kind, is_so in kinds.items() if is_so), None)


def box_kinds(x0, y0, x1, y1, width, height):
    """{kind: whether a box is of it}, the first of them counts; numbers, or arrays of one length."""
    return {
        "empty_box": (x1 <= x0) | (y1 <= y0),
        "outside_box": (x0 >= width) | (y0 >= height) | (x1 <= 0) | (y1 <= 0),
        # Half a pixel over the edge is rounding, not a mistake.
        "clipped_box": (x0 < -0.5) | (y0 < -0.5) | (x1 > width + 0.5) | (y1 > height + 0.5),
        "tiny_box": (x1 - x0 < TINY) | (y1 - y0 < TINY),
    }


def _keypoint_problems(keypoints, number, record):
    wrong = keypoint_mistake(keypoints, number)
    if wrong:
        return [(wrong[0], f"an annotation {wrong[1]}")]
    width, height = record["width"], record["height"]
    # Half a pixel over the edge is rounding, as for boxes.
    for x, y, v in zip(keypoints[::3], keypoints[1::3], keypoints[2::3], strict=True):
        if v > 0 and not (-0.5 <= x <= width + 0.5 and -0.5 <= y <= height + 0.5):
            return [("outside_keypoint", f"keypoint {x:g}, {y:g} of {width}x{height}")]
    return []
