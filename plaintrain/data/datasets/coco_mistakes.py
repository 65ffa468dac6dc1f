"""What can be wrong with the entries of a COCO JSON."""

import math
import os

from plaintrain.data.image_files import is_too_large
from plaintrain.structures import are_numbers
from plaintrain.utils.errors import DataError

_NUMBERS = {int, float}


def image_mistake(image, known_ids, json_file):
    """What is wrong with an entry of `images`, a sentence; or None.

    Args:
        image: the entry, a dict.
        known_ids: the ids of the images before it.
        json_file: the file, for the sentence.
    """
    where = f"image {image.get('id', image)} in {json_file}"
    for key in ("id", "file_name", "height", "width"):
        if key not in image:
            return f"{where} has no {key}"
    if type(image["id"]) not in (int, str):
        return f"{where} has an id that is neither a number nor a string"
    for key in ("height", "width"):
        if type(image[key]) is not int or image[key] < 1:
            return f"{where} has the {key} {image[key]!r}, not a number of pixels"
    if is_too_large(image["height"], image["width"]):
        return f"{where} is {image['width']} x {image['height']}, more pixels than an image may have"
    if not isinstance(image["file_name"], str):
        return f"{where} has the file_name {image['file_name']!r}"
    if image["id"] in known_ids:
        return f"{json_file} has two images with the id {image['id']}"
    return None


def without_contradictions(images, json_file, problems):
    """The entries of `images` but those that share an id and differ in file or size.

    Nobody knows which of them an annotation of that id belongs to.

    Args:
        images: the entries, dicts.
        json_file: the file, for `problems`.
        problems: list that takes an error for each such id.
    """
    by_id, contradicted = {}, set()
    for image in images:
        if "id" in image:
            name = os.path.normpath(str(image.get("file_name")))
            by_id.setdefault(repr(image["id"]), set()).add(
                (name, str(image.get("height")), str(image.get("width")))
            )
    for image_id, files in by_id.items():
        if len(files) > 1:
            found = " and ".join(f"{name} ({width}x{height})" for name, height, width in sorted(files))
            problems.append(DataError("ambiguous", f"the id {image_id} in {json_file} is that of {found}"))
            contradicted.add(image_id)
    return [image for image in images if repr(image.get("id")) not in contradicted]


def note_repeated_ids(annotations, json_file, problems):
    """Add an error to `problems` for each annotation with the id of one before it."""
    seen = set()
    for number in (str(a["id"]) for a in annotations if "id" in a):
        if number in seen:
            problems.append(DataError("duplicate_id", f"two annotations in {json_file} have the id {number}"))
        seen.add(number)


def annotation_mistake(annotation, image_ids, num_keypoints):
    """What is wrong with an entry of `annotations`: (kind, end of a sentence), or None.

    Args:
        annotation: the entry, a dict.
        image_ids: the ids of the images.
        num_keypoints: {category id: number of keypoints its annotations have, or None for any}.
    """
    # Runs a million times: no text is made and no key looked up twice before something is wrong.
    image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
    box, keypoints = annotation.get("bbox"), annotation.get("keypoints")
    if type(image_id) not in (int, str) or image_id not in image_ids:
        what = f"belongs to image {image_id}, which is not there"
        return _missing(annotation, "image_id") or ("unknown_image", what)
    if type(category_id) is not int or category_id not in num_keypoints:
        what = f"has category_id {category_id}, but the file's categories are {list(num_keypoints)}"
        return _missing(annotation, "category_id") or ("unknown_class", what)
    try:
        x, y, w, h = box
        finite = math.isfinite(x + y + w + h)
    except (TypeError, ValueError, OverflowError):
        finite = False
    if not finite:
        what = f"has bbox {str(box)[:80]}, which is not four finite numbers x, y, w, h"
        return _missing(annotation, "bbox") or ("bad_box", what)
    if annotation.get("iscrowd") not in (None, 0, 1):
        return "broken", f"has iscrowd {annotation['iscrowd']!r}, not 0 or 1"
    area = annotation.get("area")
    if area is not None and (type(area) not in _NUMBERS or not -1e300 < area < 1e300):
        return "broken", f"has the area {area!r}, not a number"
    return keypoint_mistake(keypoints, num_keypoints[category_id]) if keypoints else None


def _missing(annotation, key):
    return None if key in annotation else ("broken", f"has no {key}")


def keypoint_mistake(keypoints, number):
    """What is wrong with `[x, y, v, ...]`: (kind, end of a sentence), or None.

    Args:
        keypoints: the list.
        number: of keypoints it must hold, or None for any.
    """
    if not isinstance(keypoints, list | tuple) or not are_numbers(keypoints):
        return "wrong_keypoints", f"has keypoints that are not finite numbers: {str(keypoints)[:80]}"
    if len(keypoints) % 3 or (number and len(keypoints) != 3 * number):
        wanted = f"3 x {number}, the number of names" if number else "three for each"
        return "wrong_keypoints", f"has {len(keypoints)} numbers as keypoints, not {wanted}"
    if not {0, 1, 2}.issuperset(keypoints[2::3]):
        return "wrong_keypoints", f"has a keypoint whose visibility is not 0, 1 or 2: {keypoints[2::3]}"
    return None
