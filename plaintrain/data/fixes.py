"""Fix the records of a dataset where the fix is unambiguous; exclude and report the rest."""

import os
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from plaintrain.data.validation import PROBLEM_TYPES, MetadataLike, iterate_annotation_problems
from plaintrain.structures import BoxMode, encode_segmentation, find_segmentation_problem

# Annotations with these problems are dropped; others only lose the invalid field.
_DROPPED = {"broken", "unknown_class", "bad_box", "empty_box", "outside_box"}


def fix_records(
    records: Iterable[dict[str, Any]], images: Iterable[dict[str, Any]], metadata: MetadataLike
) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Fix images and annotations; return the records, and {change: its locations, "" where it has none}.

    Images that cannot be read or do not fit INPUT.PIXEL_RANGE are excluded. Annotations of an image that was
    resized by one factor for both sides are scaled; other images with a wrong size are excluded. The objects
    of a file that is listed several times are merged. A copy with another name is dropped if the objects of
    one of the two are a subset of the other's.

    `images` has for each record `{"error": message, "kind": problem type}`, or `{"size": (height, width),
    "pixels": hash}` after applying the EXIF orientation.
    """
    kept: list[dict[str, Any]] = []
    same_pixels: dict[str, list[dict[str, Any]]] = defaultdict(list)
    changes: dict[str, list[str]] = defaultdict(list)
    for original, image in zip(records, images, strict=True):
        record = _fix_image(original, image, metadata, changes)
        if record is None:
            continue
        others = same_pixels[image["pixels"]]
        if not any(_merge(record, other, changes) for other in others):
            if others:
                text = "images with equal pixels but different objects, both kept: choose one by hand"
                changes[text].append(f"{record['file_name']} and {others[0]['file_name']}")
            others.append(record)
            kept.append(record)
    return kept, changes


def _fix_image(record, image, metadata, changes):
    """Return the record with the size of its image and fixed annotations, or None to exclude it."""
    if "error" in image:
        changes[f"excluded: {PROBLEM_TYPES[image['kind']][0]}"].append(image["error"])
        return None
    old = record["height"], record["width"]
    new = tuple(image["size"])
    resized = max(abs(new[0] - old[0]), abs(new[1] - old[1])) > 1
    sizes = f"{record['file_name']}: {new[1]}x{new[0]}, its record says {old[1]}x{old[0]}"
    if old[::-1] == new != old or (resized and not _is_scaled(record, old, new)):
        changes["excluded: rotated or cropped images, whose annotations have another shape"].append(sizes)
        return None
    if not resized:
        if new != old:
            changes["image sizes corrected by a pixel"].append(sizes)
        record = {**record, "height": new[0], "width": new[1]}
    fixed = (_fix_annotation(a, record, metadata, changes) for a in record["annotations"])
    annotations = [annotation for annotation in fixed if annotation]
    if resized:
        changes["images resized after annotation, their annotations scaled"].append(sizes)
        annotations = [_scale_annotation(a, old, new) for a in annotations]
    return {**record, "height": new[0], "width": new[1], "annotations": annotations}


def _is_scaled(record, old, new):
    """Return whether the size `new` is `old` times one factor for both sides."""
    for annotation in record["annotations"]:
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, dict) and segmentation.get("size") in (list(new), new):
            # The annotations were made on the resized image.
            return False
    # Rounding changes each side by up to a pixel.
    tolerance = sum(1 / min(sides) for sides in zip(old, new, strict=True))
    return abs(new[0] * old[1] / (old[0] * new[1]) - 1) < tolerance


def _fix_annotation(annotation, record, metadata, changes):
    """Return the annotation without its invalid fields, or None to drop it."""
    problems = {problem_type for problem_type, _ in iterate_annotation_problems(annotation, record, metadata)}
    for problem_type in problems & _DROPPED:
        changes[f"annotations dropped: {PROBLEM_TYPES[problem_type][0].split(',')[0]}"].append("")
        return None
    annotation = dict(annotation)
    if "clipped_box" in problems:
        x0, y0, x1, y1 = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        clipped = [max(x0, 0), max(y0, 0), min(x1, record["width"]), min(y1, record["height"])]
        annotation |= {"bbox": clipped, "bbox_mode": BoxMode.XYXY_ABS}
        changes["boxes clipped to their image"].append("")
    if "bad_rle" in problems:
        del annotation["segmentation"]
        changes["malformed run-length encodings dropped, their boxes kept"].append("")
    if "bad_polygon" in problems:
        size = record["height"], record["width"]
        polygons = [p for p in annotation.pop("segmentation") if not find_segmentation_problem([p], *size)]
        if polygons:
            annotation["segmentation"] = polygons
        changes["invalid polygons dropped, their boxes kept"].append("")
    if "wrong_keypoints" in problems:
        del annotation["keypoints"]
        changes["invalid keypoints dropped, their boxes kept"].append("")
    return annotation


def _scale_annotation(annotation, old, new):
    """Scale a valid annotation from the image size `old`, (height, width), to `new`."""
    x = new[1] / old[1]
    y = new[0] / old[0]
    annotation = {**annotation, "bbox": _multiply(annotation["bbox"], (x, y))}
    if annotation.get("area") is not None:
        annotation["area"] *= x * y
    if annotation.get("keypoints"):
        annotation["keypoints"] = _multiply(annotation["keypoints"], (x, y, 1))
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        mask = Image.fromarray(coco_mask.decode(encode_segmentation(segmentation, *old)))
        mask = np.asarray(mask.resize(new[::-1], Image.Resampling.NEAREST))
        annotation["segmentation"] = coco_mask.encode(np.asfortranarray(mask))
    elif segmentation:
        annotation["segmentation"] = [_multiply(polygon, (x, y)) for polygon in segmentation]
    return annotation


def _multiply(values, factors):
    return [value * factors[i % len(factors)] for i, value in enumerate(values)]


def _merge(record, other, changes):
    """Merge a record into another with equal pixels and objects; return False if the objects differ."""
    is_listed_twice = os.path.realpath(record["file_name"]) == os.path.realpath(other["file_name"])
    objects, more = ({_get_identity(a): a for a in r["annotations"]} for r in (other, record))
    if not (is_listed_twice or objects.keys() <= more.keys() or more.keys() <= objects.keys()):
        return False
    for identity, annotation in more.items():
        if identity in objects:
            # One record may have the boxes, the other their masks.
            objects[identity].update({**annotation, **objects[identity]})
        else:
            other["annotations"].append(annotation)
    text = "copies of images dropped, whose objects are equal or a subset"
    if is_listed_twice:
        text = "repeated entries of a file dropped, their objects merged"
    changes[text].append(" and ".join(dict.fromkeys([record["file_name"], other["file_name"]])))
    return True


def _get_identity(annotation):
    """Return class, crowd and rounded box, which are equal if an object is annotated twice."""
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    rounded = tuple(round(side, 2) for side in box)
    return annotation["category_id"], int(annotation.get("iscrowd") or 0), rounded
