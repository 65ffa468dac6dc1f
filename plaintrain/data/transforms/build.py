"""Build the augmentations of INPUT.*."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from plaintrain.config import CfgNode, check_cfg
from plaintrain.data.transforms import copy_paste, crops, geometric, photometric
from plaintrain.data.transforms.arguments import CheckedArguments
from plaintrain.utils.errors import UserError, suggest_similar

# The names that INPUT.AUGMENTATIONS accepts.
AUGMENTATIONS = {
    name: value
    for module in (copy_paste, crops, geometric, photometric)
    for name, value in vars(module).items()
    if "__dataclass_fields__" in getattr(value, "__dict__", ()) and issubclass(value, CheckedArguments)
}
_FROM_DATASET = "keypoint_flip_indices"


def build_augmentation(
    cfg: CfgNode, is_train: bool, keypoint_flip_indices: Sequence[int] | None = None
) -> list[Callable[..., Any]]:
    """Build the augmentations of INPUT.*: AUGMENTATIONS, CROP, resize and flip; only resize in evaluation."""
    check_cfg(cfg)
    options = cfg.INPUT
    if not is_train:
        return _build_resize("TEST", options, (options.MIN_SIZE_TEST,), "choice")
    augmentations = [_build_entry(entry, keypoint_flip_indices) for entry in options.AUGMENTATIONS]
    if options.CROP.ENABLED:
        augmentations.append(_create("INPUT.CROP", crops.RandomCrop, options.CROP.TYPE, options.CROP.SIZE))
    augmentations += _build_resize("TRAIN", options, options.MIN_SIZE_TRAIN, options.MIN_SIZE_TRAIN_SAMPLING)
    if options.RANDOM_FLIP == "horizontal":
        augmentations.append(geometric.RandomHorizontalFlip(keypoint_flip_indices=keypoint_flip_indices))
    elif options.RANDOM_FLIP == "vertical":
        augmentations.append(geometric.RandomVerticalFlip())
    return augmentations


def _create(key, augmentation, *arguments, **options):
    try:
        return augmentation(*arguments, **options)
    except UserError as e:
        raise UserError(f"{key}: {e}") from e


def _build_resize(phase, options, short_edges, sampling):
    if tuple(options.FIXED_SIZE) != (0, 0):
        return [_create("INPUT.FIXED_SIZE", geometric.Resize, options.FIXED_SIZE)]
    if tuple(short_edges) == (0,):
        return []
    keys = f"INPUT.MIN_SIZE_{phase} and INPUT.MAX_SIZE_{phase}"
    max_size = options[f"MAX_SIZE_{phase}"]
    return [_create(keys, geometric.ResizeShortestEdge, tuple(short_edges), max_size, sampling)]


def _build_entry(entry, keypoint_flip_indices):
    """Build an augmentation from its name or from {name: {argument: value}}."""
    entry = {entry: None} if isinstance(entry, str) else entry
    ((name, arguments),) = entry.items()
    if name not in AUGMENTATIONS:
        near = suggest_similar(name, AUGMENTATIONS, cutoff=0.6)
        hint = f"did you mean {near}?" if near else f"known: {', '.join(AUGMENTATIONS)}"
        raise UserError(f"INPUT.AUGMENTATIONS has an unknown augmentation {name!r}; {hint}")
    order = {_FROM_DATASET: keypoint_flip_indices} if name == "RandomHorizontalFlip" else {}
    try:
        return _create(f"INPUT.AUGMENTATIONS: {name}", AUGMENTATIONS[name], **(arguments or {}), **order)
    except TypeError as e:
        parameters = inspect.signature(AUGMENTATIONS[name]).parameters
        known = ", ".join(parameter for parameter in parameters if parameter != _FROM_DATASET)
        raise UserError(f"INPUT.AUGMENTATIONS: {e}; the arguments are {known}") from e
