"""Validate the records of a dataset and the entries of COCO files, without opening images."""

import numbers
import os
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plaintrain.data.catalog import Metadata
from plaintrain.data.consistency import TINY, classify_boxes, iterate_contradictions
from plaintrain.data.image_files import describe_pixel_limit, is_too_large
from plaintrain.data.keypoints import find_unpaired_keypoints
from plaintrain.data.serialized import build_annotation_table
from plaintrain.structures import BOX_MODES, BoxMode, are_numbers, find_segmentation_problem, is_box
from plaintrain.utils.errors import DataError, UserError

MetadataLike = Mapping[str, Any] | Metadata
Problem = tuple[str, str]  # (key of `PROBLEM_TYPES`, end of a sentence)

MAX_EXAMPLES = 10
_LEAST_SPREAD = 64  # values in any channel: 14 bits read as 16 have fewer

# type -> (description, whether it is fatal: training stops).
PROBLEM_TYPES = {
    "unreadable_dataset": ("datasets that cannot be read", True),
    "no_images": ("datasets without an image", True),
    "no_boxes": ("datasets without a valid box, so that there is nothing to learn", True),
    "broken_image": ("incomplete or malformed image entries", True),
    "unreadable": ("images that are missing or cannot be read", True),
    "pixel_range": ("images whose pixels do not fit INPUT.PIXEL_RANGE, or the range of their type", True),
    "ambiguous": ("images whose annotations may belong to another image", True),
    "wrong_size": ("images whose size differs from their record", True),
    "same_image_id": ("images with a duplicate id (stop evaluation)", True),
    "broken": ("incomplete or malformed annotations", True),
    "unknown_image": ("annotations of an unknown image", True),
    "unknown_class": ("annotations with an unknown class id", True),
    "bad_box": ("boxes that are not four finite numbers", True),
    "wrong_keypoints": ("annotations with malformed keypoints or a wrong number of them", True),
    "bad_polygon": ("polygons that are malformed or have under 3 points (stop training with masks)", True),
    "bad_rle": ("run-length encodings that do not fit their image (stop training with masks)", True),
    "normalized_box": ("boxes normalized to 0..1, which must be multiplied by the size of the image", True),
    "empty_box": ("boxes without area, which training drops", False),
    "outside_box": ("boxes outside their image, which training drops", False),
    "clipped_box": ("boxes more than half a pixel outside their image, which training clips", False),
    "tiny_box": (f"boxes with a side shorter than {TINY} pixels", False),
    "duplicate_object": ("objects annotated twice: same class, boxes less than a pixel apart", False),
    "wrong_area": ("areas that contradict the box and the mask; COCO's metrics use them", False),
    "outside_keypoint": ("annotations with a labelled keypoint outside the image", False),
    "unpaired_keypoint": ("left and right keypoints that a flip does not swap", False),
    "duplicate_id": ("annotations with a duplicate id", False),
    "no_annotations": ("images without annotations", False),
    "unused_class": ("classes without a box", False),
    "turned": ("images that their EXIF orientation rotates", False),
    "near_constant": (f"images with fewer than {_LEAST_SPREAD} values: is INPUT.PIXEL_RANGE right?", False),
    "listed_twice": ("images that are listed more than once", False),
    "duplicate": ("images with the same pixels as another image of the dataset", False),
    "leak": ("images with the same pixels as an image of another dataset", False),
}


@dataclass(frozen=True)
class Finding:
    """All problems of one type (of `PROBLEM_TYPES`), with up to `MAX_EXAMPLES` examples."""

    type: str
    count: int
    examples: tuple[str, ...]
    fatal: bool

    def __str__(self) -> str:
        description = PROBLEM_TYPES[self.type][0]
        lines = [f"{'FATAL: ' if self.fatal else ''}{description}: {self.count}", *self.examples]
        if self.count > len(self.examples) > 0:
            lines.append(f"... and {self.count - len(self.examples)} more")
        return "\n    ".join(lines)


def count_problems(problems: Iterable[Problem]) -> list[Finding]:
    """Count pairs (problem type, example or "") in the order of `PROBLEM_TYPES`."""
    counts: Counter[str] = Counter()
    examples = defaultdict(list)
    for problem_type, example in problems:
        counts[problem_type] += 1
        if example and counts[problem_type] <= MAX_EXAMPLES:
            examples[problem_type].append(example)
    types = [key for key in PROBLEM_TYPES if counts[key]]
    return [Finding(key, counts[key], tuple(examples[key]), PROBLEM_TYPES[key][1]) for key in types]


def check_problems(problems: Iterable[UserError]) -> list[Finding]:
    """Return the findings of the errors that a reader of a dataset collected."""
    return count_problems((getattr(error, "error_type", "broken"), str(error)) for error in problems)


def count_classes(records: Iterable[dict[str, Any]], metadata: MetadataLike) -> dict[str, int]:
    """Return {class name: number of boxes}; unknown ids are skipped."""
    counts = Counter(a.get("category_id") for record in records for a in record["annotations"])
    return {name: counts[label] for label, name in enumerate(metadata.get("thing_classes") or ())}


def check_records(records: Sequence[dict[str, Any]], metadata: MetadataLike) -> list[Finding]:
    """Check records with metadata of `thing_classes` and, for keypoints, `keypoint_names`."""
    return count_problems(_iterate_record_problems(records, metadata))


def _iterate_record_problems(records, metadata):
    counts = count_classes(records, metadata)
    num_classes = len(metadata.get("thing_classes") or ())
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
            for problem_type, text in iterate_annotation_problems(annotation, record, metadata):
                yield problem_type, f"{name}: an annotation {text}"
    flip_map = metadata.get("keypoint_flip_map")
    for keypoint in find_unpaired_keypoints(metadata.get("keypoint_names") or (), flip_map):
        yield "unpaired_keypoint", f"{keypoint}: list it in the dataset's KEYPOINT_FLIP_MAP"
    yield from (problem[::2] for problem in iterate_record_contradictions(records, num_classes))


def iterate_record_contradictions(records: Iterable[dict[str, Any]], num_classes: int) -> Iterator[tuple]:
    """Yield the result of `iterate_contradictions` for those annotations that are valid by themselves."""
    valid = [
        {**r, "annotations": [a for a in r["annotations"] if not find_annotation_problem(a, num_classes)]}
        for r in records
    ]
    try:
        return iterate_contradictions(valid, build_annotation_table(valid))
    except RecursionError:
        # A segmentation that is nested too deeply has been reported as malformed.
        return iter(())


def check_images(
    records: Iterable[dict[str, Any]], images: Iterable[dict[str, Any]], dataset: str, earlier: dict[str, str]
) -> list[Finding]:
    """Check the images of records, results of `inspect_image`; add them to `earlier`, {pixels: image}."""
    return count_problems(_iterate_image_problems(records, images, dataset, earlier))


def _iterate_image_problems(records, images, dataset, earlier):
    first = {}
    files = set()
    for record, image in zip(records, images, strict=True):
        name = record["file_name"]
        if "error" in image:
            yield image["kind"], image["error"]
            continue
        height, width = image["size"]
        if (height, width) != (record["height"], record["width"]):
            expected = f"{record['width']}x{record['height']}"
            yield "wrong_size", f"{name}: is {width}x{height}, its record says {expected}"
        if image["turned"]:
            yield "turned", name
        if image["spread"] < _LEAST_SPREAD:
            yield "near_constant", f"{name}: {image['spread'] + 1} values"
        other = first.setdefault(image["pixels"], name)
        if os.path.realpath(name) in files:
            yield "listed_twice", name
        elif other != name:
            yield "duplicate", f"{name} equals {other}"
        elif image["pixels"] in earlier:
            yield "leak", f"{name} equals {earlier[image['pixels']]}"
        files.add(os.path.realpath(name))
    for pixels, name in first.items():
        earlier.setdefault(pixels, f"{name} of {dataset}")


def check_annotation(annotation: dict[str, Any], source: str, num_classes: int) -> None:
    problem = find_annotation_problem(annotation, num_classes)
    if problem:
        raise DataError(problem[0], f"an annotation of {source} {problem[1]}")


def find_annotation_problem(annotation: dict[str, Any], num_classes: int) -> Problem | None:
    """Return why an annotation without its image is invalid, or None."""
    for key in ("bbox", "bbox_mode", "category_id"):
        if key not in annotation:
            return "broken", f"has no {key}"
    label = annotation["category_id"]
    if not (is_whole(label) and 0 <= label < num_classes):
        ids = f"the dataset's {num_classes} classes have the ids 0 to {num_classes - 1}"
        return "unknown_class", f"has category_id {label!r}, but {ids}"
    if (mode := annotation["bbox_mode"]) not in BOX_MODES:
        return "bad_box", f"has the bbox_mode {mode!r}, not one of {BOX_MODES}"
    if not is_box(annotation["bbox"]):
        return "bad_box", f"has the box {annotation['bbox']!r}, not four finite numbers"
    area = annotation.get("area")
    if area is not None and (isinstance(area, bool) or not are_numbers([area])):
        return "broken", f"has the area {area!r}, not a finite number"
    return None


def iterate_annotation_problems(
    annotation: dict[str, Any], record: dict[str, Any], metadata: MetadataLike
) -> Iterator[Problem]:
    """Yield the problems of an annotation of a record."""
    problem = find_annotation_problem(annotation, len(metadata.get("thing_classes") or ()))
    if problem:
        yield problem
        return
    height = record["height"]
    width = record["width"]
    x0, y0, x1, y1 = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    flags = classify_boxes(x0, y0, x1, y1, width, height)
    box_problems = [problem_type for problem_type, is_true in flags.items() if is_true]
    if box_problems:
        yield box_problems[0], f"has the box {annotation['bbox']}"
    segmentation = annotation.get("segmentation")
    problem = segmentation and find_segmentation_problem(segmentation, height, width)
    if problem:
        yield problem
    keypoints = annotation.get("keypoints")
    problem = keypoints and find_keypoint_problem(keypoints, len(metadata.get("keypoint_names") or ()))
    if problem:
        yield problem
    elif keypoints:
        x, y, visibility = np.reshape(keypoints, (-1, 3)).T
        outside = (visibility > 0) & classify_boxes(x, y, x, y, width, height)["clipped_box"]
        for i in np.flatnonzero(outside)[:1]:
            yield "outside_keypoint", f"has the keypoint ({x[i]}, {y[i]}) in an image of {width}x{height}"


def find_keypoint_problem(keypoints: Any, num_keypoints: int) -> Problem | None:
    """Return why `[x, y, v, ...]` is invalid, or None; `num_keypoints` of 0 allows any number."""
    if not isinstance(keypoints, list | tuple) or not are_numbers(keypoints):
        return "wrong_keypoints", f"has keypoints that are not finite numbers: {str(keypoints)[:80]}"
    if len(keypoints) % 3 or (num_keypoints and len(keypoints) != 3 * num_keypoints):
        expected = f"3 x {num_keypoints}, the number of names" if num_keypoints else "three for each"
        return "wrong_keypoints", f"has {len(keypoints)} numbers as keypoints, not {expected}"
    if not {0, 1, 2}.issuperset(keypoints[2::3]):
        return "wrong_keypoints", f"has a keypoint whose visibility is not 0, 1 or 2: {keypoints[2::3]}"
    return None


def is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def find_image_problem(image: dict[str, Any], id_key: str = "image_id") -> str | None:
    """Return why a record, or an entry of COCO's `images`, is invalid: the end of a sentence, or None."""
    for key in (id_key, "file_name", "height", "width"):
        if key not in image:
            return f"has no {key}"
    if not (is_whole(image[id_key]) or isinstance(image[id_key], str)):
        return f"has an {id_key} that is neither a number nor a string"
    for key in ("height", "width"):
        if not is_whole(image[key]) or image[key] < 1:
            return f"has the {key} {image[key]!r}, not a number of pixels"
    if is_too_large(image["height"], image["width"]):
        return f"is {image['width']} x {image['height']}, more pixels than {describe_pixel_limit()}"
    if not isinstance(image["file_name"], str):
        return f"has the file_name {image['file_name']!r}, not a string"
    return None


def find_coco_annotation_problem(
    annotation: dict[str, Any], image_ids: Container, num_keypoints: Mapping[int, int]
) -> Problem | None:
    """Return why an entry of COCO's `annotations` is invalid, or None.

    `num_keypoints` is {category id: number of keypoints of its annotations, 0 for any}.
    """
    # This runs a million times: no message is formatted and no key read twice for a valid entry.
    image_id = annotation.get("image_id")
    category_id = annotation.get("category_id")
    area = annotation.get("area")
    if type(image_id) not in (int, str) or image_id not in image_ids:
        problem = (
            "unknown_image",
            f"belongs to image {image_id} ({type(image_id).__name__}), which is missing",
        )
    elif type(category_id) is not int or category_id not in num_keypoints:
        text = f"has category_id {category_id!r}, but the file's categories are {list(num_keypoints)}"
        problem = "unknown_class", text
    elif not is_box(annotation.get("bbox")):
        bbox = str(annotation.get("bbox"))[:80]
        problem = "bad_box", f"has bbox {bbox}, which is not four finite numbers x, y, w, h"
    elif annotation.get("iscrowd") not in (None, 0, 1):
        problem = "broken", f"has iscrowd {annotation['iscrowd']!r}, not 0 or 1"
    elif area is not None and (type(area) not in (int, float) or not -1e300 < area < 1e300):
        problem = "broken", f"has the area {area!r}, not a number"
    else:
        keypoints = annotation.get("keypoints")
        return find_keypoint_problem(keypoints, num_keypoints[category_id]) if keypoints else None
    missing = [key for key in ("image_id", "category_id", "bbox") if key not in annotation]
    return ("broken", f"has no {missing[0]}") if missing else problem
