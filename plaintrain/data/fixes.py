"""Fix the records of a dataset as far as nothing has to be guessed; exclude and report the rest."""

import os
from collections import defaultdict

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from plaintrain.data.validation import KINDS, iterate_annotation_problems
from plaintrain.structures import BoxMode, encode_segmentation, find_segmentation_problem

# Annotations with such a finding are dropped; others lose only the broken part.
_DROPPED = {"broken", "unknown_class", "bad_box", "empty_box", "outside_box"}


def fix_records(records, images, metadata):
    """Fix what is wrong with images and annotations.

    Images that cannot be read or do not fit INPUT.PIXEL_RANGE are excluded. Annotations of an image that was
    resized, by one factor for both sides, are scaled with it; an image of any other size than its record's is
    excluded. The objects of a file that is listed several times are merged; a copy under another name is
    dropped if its objects are among those of the other, or the other way round.

    Args:
        records: list of records.
        images: for each record `{"error": message, "kind": kind}`, or `{"size": (height, width), "pixels":
            a hash}`, the EXIF orientation applied.
        metadata: see `check_records`.

    Returns:
        (records, {what was changed: a line each time, which says where, or ""}).
    """
    kept, of_pixels, changes = [], {}, defaultdict(list)
    for record, image in zip(records, images, strict=True):
        record = _fix_image(record, image, metadata, changes)
        if record is None:
            continue
        same = of_pixels.setdefault(image["pixels"], [])
        if not any(_merge(record, other, changes) for other in same):
            if same:
                text = "images with the pixels of another one but other objects, both kept: choose by hand"
                changes[text].append(f"{record['file_name']} and {same[0]['file_name']}")
            same.append(record)
            kept.append(record)
    return kept, changes


def _fix_image(record, image, metadata, changes):
    """The record with its image's size and annotations that fit it, or None."""
    name = record["file_name"]
    if "error" in image:
        changes[f"excluded: {KINDS[image['kind']][0]}"].append(image["error"])
        return None
    old, new = (record["height"], record["width"]), tuple(image["size"])
    resized = max(abs(new[0] - old[0]), abs(new[1] - old[1])) > 1
    sizes = f"{name}: {new[1]}x{new[0]}, its record says {old[1]}x{old[0]}"
    if old[::-1] == new != old or (resized and not _is_scaled(record, old, new)):
        changes["excluded: images of another shape than their annotations, turned or cropped"].append(sizes)
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
    """Whether an image of the size `new` is one of the size `old`, resized by one factor for both sides."""
    for annotation in record["annotations"]:
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, dict) and segmentation.get("size") in (list(new), new):
            # The annotations were made on the resized image.
            return False
    # Each side may be off by a pixel of the smaller image, from rounding.
    tolerance = sum(1 / min(sides) for sides in zip(old, new, strict=True))
    return abs(new[0] * old[1] / (old[0] * new[1]) - 1) < tolerance


def _fix_annotation(annotation, record, metadata, changes):
    """The annotation without what is broken in it, or None."""
    problems = {kind for kind, _ in iterate_annotation_problems(annotation, record, metadata)}
    for kind in problems & _DROPPED:
        changes[f"annotations dropped: {KINDS[kind][0].split(',')[0]}"].append("")
        return None
    annotation = dict(annotation)
    if "clipped_box" in problems:
        x0, y0, x1, y1 = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        inside = [max(x0, 0), max(y0, 0), min(x1, record["width"]), min(y1, record["height"])]
        annotation |= {"bbox": inside, "bbox_mode": BoxMode.XYXY_ABS}
        changes["boxes clipped to their image"].append("")
    if "bad_rle" in problems:
        del annotation["segmentation"]
        changes["malformed run-length encodings dropped, their boxes kept"].append("")
    if "bad_polygon" in problems:
        size = record["height"], record["width"]
        polygons = [p for p in annotation.pop("segmentation") if not find_segmentation_problem([p], *size)]
        annotation |= {"segmentation": polygons} if polygons else {}
        changes["annotations lost broken polygons, their boxes kept"].append("")
    if "wrong_keypoints" in problems:
        del annotation["keypoints"]
        changes["wrong keypoints dropped, their boxes kept"].append("")
    return annotation


def _scale_annotation(annotation, old, new):
    """A valid annotation of an image of the size `old`, (height, width), on that image resized to `new`."""
    x, y = new[1] / old[1], new[0] / old[0]
    annotation = {**annotation, "bbox": _times(annotation["bbox"], (x, y))}
    if annotation.get("area") is not None:
        annotation["area"] *= x * y
    if annotation.get("keypoints"):
        annotation["keypoints"] = _times(annotation["keypoints"], (x, y, 1))
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        mask = Image.fromarray(coco_mask.decode(encode_segmentation(segmentation, *old)))
        mask = np.asarray(mask.resize(new[::-1], Image.Resampling.NEAREST))
        annotation["segmentation"] = coco_mask.encode(np.asfortranarray(mask))
    elif segmentation:
        annotation["segmentation"] = [_times(polygon, (x, y)) for polygon in segmentation]
    return annotation


def _times(values, factors):
    return [value * factors[i % len(factors)] for i, value in enumerate(values)]


def _merge(record, other, changes):
    """Add the objects of a record to those of another with the same pixels; whether that is what is meant."""
    listed_twice = os.path.realpath(record["file_name"]) == os.path.realpath(other["file_name"])
    objects, more = ({_key(a): a for a in r["annotations"]} for r in (other, record))
    if not (listed_twice or objects.keys() <= more.keys() or more.keys() <= objects.keys()):
        return False
    for key, annotation in more.items():
        if key in objects:
            # One listing may hold boxes, the other their masks.
            objects[key].update({**annotation, **objects[key]})
        else:
            other["annotations"].append(annotation)
    text = "copies of images dropped whose objects are the same, or part of the other's"
    if listed_twice:
        text = "listings of a file that was listed before, their objects merged"
    changes[text].append(" and ".join(dict.fromkeys([record["file_name"], other["file_name"]])))
    return True


def _key(annotation):
    """What is the same for an object that is annotated twice: class, crowd and box."""
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    rounded = tuple(round(side, 2) for side in box)
    return annotation["category_id"], int(annotation.get("iscrowd") or 0), rounded
