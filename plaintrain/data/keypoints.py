"""Keypoint metadata: the order after a horizontal flip, the skeleton of COCO."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog
from plaintrain.utils.errors import UserError, suggest_similar

logger = logging.getLogger(__name__)

_OPPOSITES = {"left": "right", "right": "left", "l": "r", "r": "l"}
# Also single letters: l_eye, L-Eye, LEye, eye_l, eyeL; not lip, and not LHIP, which could be a word.
_SIDES = r"(?i:left|right)|(?!^.$)(?<![A-Za-z])[LlRr](?=[^A-Za-z]|[A-Z][a-z]|$)|(?<=[a-z])[LR](?![A-Za-z])"
# Edges between COCO's 17 person keypoints, 1-based as in COCO's files.
COCO_SKELETON = (
    *((16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7), (6, 8), (7, 9), (8, 10)),
    *((9, 11), (2, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7)),
)


def compute_hflip_indices(names: Iterable[str], flip_map: Iterable | None = None) -> tuple[int, ...]:
    """Return the order of the keypoints after a horizontal flip, a permutation of 0 to Kp-1.

    `flip_map` holds pairs of names to swap; None pairs names that differ only by left and right, or l and r.
    """
    names = list(names)
    if flip_map is None:
        by_lower = {name.lower(): name for name in names}
        others = {name: by_lower.get(_mirror_name(name), name) for name in names}
        flip_map = [(a, b) for a, b in others.items() if a < b and others[b] == a]
    order = list(range(len(names)))
    for pair in flip_map:
        for name in pair:
            if name not in names:
                hint = f"; the nearest is {suggest_similar(name, names)!r}" if names else ""
                raise UserError(f"keypoint_flip_map has an unknown keypoint {name!r}{hint}")
            if order[names.index(name)] != names.index(name):
                raise UserError(f"keypoint_flip_map has the keypoint {name!r} in two pairs")
        left, right = map(names.index, pair)
        order[left] = right
        order[right] = left
    return tuple(order)


def _mirror_name(name, sides=_SIDES):
    """Return the name in lower case, with left and right swapped."""
    return re.sub(sides, lambda match: _OPPOSITES[match.group().lower()], name).lower()


def find_unpaired_keypoints(names: Sequence[str], flip_map: Iterable | None = None) -> list[str]:
    """Return the keypoints that seem to be left or right, but have no pair; none with a `flip_map`."""
    if flip_map is not None:
        return []
    lower = {name.lower() for name in names}
    unpaired = []
    for i, name in enumerate(names):
        # lshoulder, LHIP; lip and rip may be words.
        others = {_mirror_name(name, sides) for sides in ("^[LlRr]", "[LlRr]$")} - {name.lower()}
        has_side = _mirror_name(name) != name.lower() and not re.search("upright|bright", name.lower())
        if compute_hflip_indices(names)[i] == i and (has_side or others & lower):
            unpaired.append(name)
    return unpaired


def get_keypoint_metadata(categories: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the keypoint metadata of the categories that have keypoints; {} if their names differ."""
    known = [category for category in categories if category.get("keypoint_names")]
    if not known or any(category["keypoint_names"] != known[0]["keypoint_names"] for category in known):
        return {}
    keys = ("keypoint_names", "keypoint_flip_map", "skeleton")
    return {key: known[0][key] for key in keys if known[0].get(key)}


def create_keypoint_hflip_indices(dataset_names: Sequence[str], num_keypoints: int = 0) -> tuple[int, ...]:
    """Return `keypoint_flip_indices` of datasets with the same `num_keypoints` keypoints (0 for any)."""
    keypoints: list[tuple[list[str], tuple[int, ...]]] = []
    for dataset in dataset_names:
        metadata = MetadataCatalog.get(dataset)
        if metadata.get("keypoint_names") is None:
            DatasetCatalog.get(dataset)
        names = list(metadata.get("keypoint_names") or ())
        if not names:
            reason = f"MODEL.KEYPOINT_ON is True, but the dataset {dataset} names no keypoints"
            raise UserError(f'{reason}; call MetadataCatalog.get("{dataset}").set(keypoint_names=[...])')
        if unpaired := find_unpaired_keypoints(names, metadata.get("keypoint_flip_map")):
            logger.warning(
                f"{dataset}: a flip does not swap the keypoints {', '.join(unpaired)}; list left and right "
                "in KEYPOINT_FLIP_MAP (in code keypoint_flip_map), or set it to []"
            )
        keypoints.append((names, compute_hflip_indices(names, metadata.get("keypoint_flip_map"))))
        if keypoints[-1] != keypoints[0]:
            raise UserError(
                f"the datasets {dataset_names[0]} and {dataset} have different keypoints or "
                f"keypoint_flip_map: {keypoints[0][0]} and {names}"
            )
    names, order = keypoints[0]
    if num_keypoints not in (0, len(names)):
        datasets = ", ".join(dataset_names)
        key = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
        raise UserError(f"{key} is {num_keypoints}, but {datasets} has {len(names)} keypoints")
    return order


def shift_keypoints(keypoints: Sequence[float], offset: float) -> list[float]:
    """Add `offset` to x and y of `[x, y, v, ...]` where v > 0; 0.5 makes COCO's pixel indices continuous."""
    shifted = list(keypoints)
    for i in range(0, len(shifted), 3):
        if shifted[i + 2] > 0:
            shifted[i] += offset
            shifted[i + 1] += offset
    return shifted
