"""Which keypoint takes whose place when an image is mirrored."""

import re

from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog
from plaintrain.utils.errors import UserError, suggest_similar

_OTHER = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
_OTHER |= {right: left for left, right in _OTHER.items()}
# COCO's 17 keypoints of a person: the pairs that a line joins, numbers from 1, as its files have them.
COCO_SKELETON = (
    *((16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7), (6, 8), (7, 9), (8, 10)),
    *((9, 11), (2, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7)),
)


def compute_hflip_indices(names, flip_map=None):
    """Return the order of the keypoints after a horizontal flip, a tuple of 0 to Kp-1.

    `flip_map` holds pairs of names (left, right) that change places; None pairs the names that differ only by
    left and right.
    """
    names = list(names)
    if flip_map is None:
        others = (re.sub("|".join(_OTHER), lambda m: _OTHER[m.group()], name) for name in names)
        flip_map = [(a, b) for a, b in zip(names, others, strict=True) if b in names and a < b]
    order = list(range(len(names)))
    for pair in flip_map:
        for name in pair:
            if name not in names:
                hint = f"; the nearest is {suggest_similar(name, names)!r}" if names else ""
                raise UserError(f"keypoint_flip_map has an unknown keypoint {name!r}{hint}")
            if order[names.index(name)] != names.index(name):
                raise UserError(f"keypoint_flip_map has the keypoint {name!r} in two pairs")
        a, b = map(names.index, pair)
        order[a], order[b] = b, a
    return tuple(order)


def get_keypoint_metadata(categories):
    """Return the metadata on keypoints that the dicts with any agree on; {} if they name different ones."""
    known = [category for category in categories if category.get("keypoint_names")]
    if not known or any(category["keypoint_names"] != known[0]["keypoint_names"] for category in known):
        return {}
    keys = ("keypoint_names", "keypoint_flip_map", "skeleton")
    return {key: known[0][key] for key in keys if known[0].get(key)}


def create_keypoint_hflip_indices(datasets, number=0):
    """Return `keypoint_flip_indices` of the keypoints that all of these datasets, given by name, have.

    Loads a dataset if its keypoints come from its files. A `number` of keypoints of 0 is any.
    """
    found = []
    for dataset in datasets:
        metadata = MetadataCatalog.get(dataset)
        if metadata.get("keypoint_names") is None:
            DatasetCatalog.get(dataset)
        names = list(metadata.get("keypoint_names") or ())
        if not names:
            raise UserError(
                f"MODEL.KEYPOINT_ON is set, but the dataset {dataset} names no keypoints: call "
                f'MetadataCatalog.get("{dataset}").set(keypoint_names=[...])'
            )
        found.append((names, compute_hflip_indices(names, metadata.get("keypoint_flip_map"))))
        if found[-1] != found[0]:
            raise UserError(
                f"the datasets {datasets[0]} and {dataset} have different keypoints or "
                f"keypoint_flip_map: {found[0][0]} and {names}"
            )
    if number not in (0, len(found[0][0])):
        raise UserError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {number}, but {', '.join(datasets)} has "
            f"{len(found[0][0])} keypoints"
        )
    return found[0][1]
