"""Find what is wrong with a dataset, in its records and in COCO's entries, without opening an image."""

import numbers
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from plaintrain.data.image_files import is_too_large
from plaintrain.structures import BoxMode, are_numbers, find_segmentation_problem, is_box
from plaintrain.utils.errors import DataError

MAX_EXAMPLES = 10
# A box is tiny if a side is shorter than this, in pixels.
TINY = 2
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
    "bad_polygon": ("polygons of fewer than 3 points, or malformed ones (stop training with masks)", True),
    "bad_rle": ("run-length encodings that do not fit their image (stop training with masks)", True),
    "empty_box": ("boxes without area, which training drops", False),
    "outside_box": ("boxes outside their image, which training drops", False),
    "clipped_box": ("boxes that reach beyond their image by over half a pixel, which training clips", False),
    "tiny_box": (f"boxes with a side shorter than {TINY} pixels", False),
    "outside_keypoint": ("annotations with a labelled keypoint outside the image", False),
    "duplicate_id": ("annotations with the id of another one", False),
    "no_annotations": ("images without annotations", False),
    "unused_class": ("classes without a box", False),
    "turned": ("images that their EXIF orientation turns", False),
    "near_constant": (f"images of under {LEAST_SPREAD} of 256 values: is INPUT.PIXEL_RANGE right?", False),
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
        lines = [f"{'FATAL: ' if self.fatal else ''}{KINDS[self.kind][0]}: {self.count}", *self.examples]
        if self.count > len(self.examples) > 0:
            lines.append(f"... and {self.count - len(self.examples)} more")
        return "\n    ".join(lines)


def count_problems(mistakes):
    """Return a list of `Finding`, in the order of `KINDS`, for pairs (kind, example or "")."""
    counts, examples = Counter(), defaultdict(list)
    for kind, example in mistakes:
        counts[kind] += 1
        if example and counts[kind] <= MAX_EXAMPLES:
            examples[kind].append(example)
    kinds = [kind for kind in KINDS if counts[kind]]
    return [Finding(kind, counts[kind], tuple(examples[kind]), KINDS[kind][1]) for kind in kinds]


def check_problems(problems):
    """Findings of what a reader collected: a list of `UserError`, some with a `kind`."""
    return count_problems((getattr(error, "error_type", "broken"), str(error)) for error in problems)


def count_classes(records, metadata):
    """{class name: number of boxes}, unknown ids left out."""
    counts = Counter(a.get("category_id") for record in records for a in record["annotations"])
    return {name: counts[label] for label, name in enumerate(metadata.get("thing_classes") or ())}


def check_records(records, metadata):
    """What is to be said about records: the checks that open no image.

    Args:
        records: list of records.
        metadata: dict or `Metadata` with `thing_classes` and, for keypoints, `keypoint_names`.

    Returns:
        list of `Finding`; the fatal ones are those that training stops at.
    """
    return count_problems(_record_mistakes(records, metadata))


def _record_mistakes(records, metadata):
    counts = count_classes(records, metadata)
    if not any(counts.values()):
        yield "no_boxes" if records else "no_images", ""
    for name, count in counts.items():
        if not count:
            yield "unused_class", name
    seen = set()
    for record in records:
        name = record["file_name"]
        if record["image_id"] in seen:
            yield "same_image_id", f"{name} has the id {record['image_id']}"
        seen.add(record["image_id"])
        if not record["annotations"]:
            yield "no_annotations", name
        for annotation in record["annotations"]:
            for kind, what in iterate_annotation_problems(annotation, record, metadata):
                yield kind, f"{name}: an annotation {what}"


def check_annotation(annotation, where, num_classes):
    """Raise a `DataError` for an annotation of `where` that `find_annotation_problem` rejects."""
    mistake = find_annotation_problem(annotation, num_classes)
    if mistake:
        raise DataError(mistake[0], f"an annotation of {where} {mistake[1]}")


def find_annotation_problem(annotation, num_classes):
    """Return why an annotation cannot be used at all: (kind, end of a sentence), or None."""
    for key in ("bbox", "bbox_mode", "category_id"):
        if key not in annotation:
            return "broken", f"has no {key}"
    label, mode = annotation["category_id"], annotation["bbox_mode"]
    if not (is_whole(label) and 0 <= label < num_classes):
        ids = f"the dataset's {num_classes} classes have the ids 0 to {num_classes - 1}"
        return "unknown_class", f"has category_id {label!r}, but {ids}"
    if not is_box(annotation["bbox"]):
        return "bad_box", f"has the box {annotation['bbox']!r}, not four finite numbers"
    if mode not in tuple(BoxMode):
        return "bad_box", f"has the bbox_mode {mode!r}, not one of {', '.join(map(str, BoxMode))}"
    return None


def iterate_annotation_problems(annotation, record, metadata):
    """Yield (kind, end of a sentence) for all that is wrong with an annotation of a record."""
    mistake = find_annotation_problem(annotation, len(metadata.get("thing_classes") or ()))
    if mistake:
        yield mistake
        return
    height, width = record["height"], record["width"]
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    kinds = [kind for kind, is_so in classify_boxes(*box, width, height).items() if is_so]
    if kinds:
        yield kinds[0], f"has the box {annotation['bbox']}"
    segmentation, keypoints = annotation.get("segmentation"), annotation.get("keypoints")
    mistake = segmentation and find_segmentation_problem(segmentation, height, width)
    if mistake:
        yield mistake
    mistake = keypoints and find_keypoint_problem(keypoints, len(metadata.get("keypoint_names") or ()))
    if mistake:
        yield mistake
    elif keypoints:
        x, y, visibility = np.reshape(keypoints, (-1, 3)).T
        outside = (visibility > 0) & classify_boxes(x, y, x, y, width, height)["clipped_box"]
        for i in np.flatnonzero(outside)[:1]:
            yield "outside_keypoint", f"has the keypoint ({x[i]}, {y[i]}) in an image of {width}x{height}"


def classify_boxes(x0, y0, x1, y1, width, height):
    """{kind: whether a box is of it}, the first of them counts; numbers, or arrays of one length."""
    return {
        "empty_box": (x1 <= x0) | (y1 <= y0),
        "outside_box": (x0 >= width) | (y0 >= height) | (x1 <= 0) | (y1 <= 0),
        # Half a pixel over the edge is rounding, not a mistake.
        "clipped_box": (x0 < -0.5) | (y0 < -0.5) | (x1 > width + 0.5) | (y1 > height + 0.5),
        "tiny_box": (x1 - x0 < TINY) | (y1 - y0 < TINY),
    }


def find_keypoint_problem(keypoints, number):
    """Return what is wrong with `[x, y, v, ...]`, as `find_annotation_problem`; a `number` of 0 is any."""
    if not isinstance(keypoints, list | tuple) or not are_numbers(keypoints):
        return "wrong_keypoints", f"has keypoints that are not finite numbers: {str(keypoints)[:80]}"
    if len(keypoints) % 3 or (number and len(keypoints) != 3 * number):
        wanted = f"3 x {number}, the number of names" if number else "three for each"
        return "wrong_keypoints", f"has {len(keypoints)} numbers as keypoints, not {wanted}"
    if not {0, 1, 2}.issuperset(keypoints[2::3]):
        return "wrong_keypoints", f"has a keypoint whose visibility is not 0, 1 or 2: {keypoints[2::3]}"
    return None


def is_whole(value):
    """Return whether a value is an integer, of Python or NumPy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def find_image_problem(image, id_key="image_id"):
    """Return what is wrong with a record, or an entry of COCO's `images`: the end of a sentence, or None."""
    for key in (id_key, "file_name", "height", "width"):
        if key not in image:
            return f"has no {key}"
    if not (is_whole(image[id_key]) or isinstance(image[id_key], str)):
        return f"has an {id_key} that is neither a number nor a string"
    for key in ("height", "width"):
        if not is_whole(image[key]) or image[key] < 1:
            return f"has the {key} {image[key]!r}, not a number of pixels"
    if is_too_large(image["height"], image["width"]):
        return f"is {image['width']} x {image['height']}, more pixels than an image may have"
    if not isinstance(image["file_name"], str):
        return f"has the file_name {image['file_name']!r}, not a string"
    return None


def find_coco_annotation_problem(annotation, image_ids, num_keypoints):
    """Return what is wrong with an entry of COCO's `annotations`: as `find_annotation_problem`.

    Args:
        annotation: the entry, a dict.
        image_ids: the ids of the images.
        num_keypoints: {category id: number of keypoints its annotations have, or 0 for any}.
    """
    # Runs a million times: no text is made and no key looked up twice before something is wrong.
    image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
    keypoints, area = annotation.get("keypoints"), annotation.get("area")
    if type(image_id) not in (int, str) or image_id not in image_ids:
        mistake = "unknown_image", f"belongs to image {image_id}, which is not there"
    elif type(category_id) is not int or category_id not in num_keypoints:
        categories = f"the file's categories are {list(num_keypoints)}"
        mistake = "unknown_class", f"has category_id {category_id}, but {categories}"
    elif not is_box(annotation.get("bbox")):
        what = f"has bbox {str(annotation.get('bbox'))[:80]}, which is not four finite numbers x, y, w, h"
        mistake = "bad_box", what
    elif annotation.get("iscrowd") not in (None, 0, 1):
        mistake = "broken", f"has iscrowd {annotation['iscrowd']!r}, not 0 or 1"
    elif area is not None and (type(area) not in (int, float) or not -1e300 < area < 1e300):
        mistake = "broken", f"has the area {area!r}, not a number"
    else:
        return find_keypoint_problem(keypoints, num_keypoints[category_id]) if keypoints else None
    missing = [key for key in ("image_id", "category_id", "bbox") if key not in annotation]
    return ("broken", f"has no {missing[0]}") if missing else mistake
