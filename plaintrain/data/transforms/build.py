"""The augmentations that a config names."""

import inspect
from collections.abc import Mapping

from plaintrain.config import check_cfg
from plaintrain.data.transforms import copy_paste, crops, geometric, photometric
from plaintrain.data.transforms.arguments import CheckedArguments
from plaintrain.utils.errors import UserError, suggest_similar

# What INPUT.AUGMENTATIONS may name: the augmentations of these modules.
AUGMENTATIONS = {
    name: value
    for module in (copy_paste, crops, geometric, photometric)
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, CheckedArguments) and value is not CheckedArguments
}
_FROM_DATASET = "keypoint_flip_indices"


def build_augmentation(cfg, is_train, keypoint_flip_indices=None):
    """The augmentations that INPUT.* names: in training those of the list, crop, resize, flip.

    Args:
        cfg: the config.
        is_train: False leaves only the resize.
        keypoint_flip_indices: what a horizontal flip does to the order of keypoints.
    """
    check_cfg(cfg)
    options = cfg.INPUT
    if not is_train:
        return _resize("TEST", options, (options.MIN_SIZE_TEST,), "choice")
    augmentations = [_from_entry(entry, keypoint_flip_indices) for entry in options.AUGMENTATIONS]
    if options.CROP.ENABLED:
        augmentations.append(_checked("INPUT.CROP", crops.RandomCrop, options.CROP.TYPE, options.CROP.SIZE))
    augmentations += _resize("TRAIN", options, options.MIN_SIZE_TRAIN, options.MIN_SIZE_TRAIN_SAMPLING)
    if options.RANDOM_FLIP == "horizontal":
        augmentations.append(geometric.RandomHorizontalFlip(keypoint_flip_indices=keypoint_flip_indices))
    elif options.RANDOM_FLIP == "vertical":
        augmentations.append(geometric.RandomVerticalFlip())
    return augmentations


def _checked(key, augmentation, *arguments, **options):
    try:
        return augmentation(*arguments, **options)
    except UserError as e:
        raise UserError(f"{key}: {e}") from e


def _resize(phase, options, short_edges, sampling):
    if tuple(options.FIXED_SIZE) != (0, 0):
        return [_checked("INPUT.FIXED_SIZE", geometric.Resize, options.FIXED_SIZE)]
    if tuple(short_edges) == (0,):
        return []
    keys = f"INPUT.MIN_SIZE_{phase} and INPUT.MAX_SIZE_{phase}"
    longest = options[f"MAX_SIZE_{phase}"]
    return [_checked(keys, geometric.ResizeShortestEdge, tuple(short_edges), longest, sampling)]


def _from_entry(entry, keypoint_flip_indices):
    """An augmentation from its name, or from {name: {argument: value}}."""
    name, arguments = entry, None
    if isinstance(entry, Mapping) and len(entry) == 1:
        ((name, arguments),) = entry.items()
    arguments = arguments or {}
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise UserError(
            f"INPUT.AUGMENTATIONS has the entry {entry!r}, but an entry is a name or a mapping of one "
            "name to its arguments, {name: {argument: value}}"
        )
    if name not in AUGMENTATIONS:
        near = suggest_similar(name, AUGMENTATIONS, cutoff=0.6)
        hint = f"did you mean {near}?" if near else f"known: {', '.join(AUGMENTATIONS)}"
        raise UserError(f"INPUT.AUGMENTATIONS has an unknown augmentation {name!r}; {hint}")
    order = {_FROM_DATASET: keypoint_flip_indices} if name == "RandomHorizontalFlip" else {}
    try:
        return _checked(f"INPUT.AUGMENTATIONS: {name}", AUGMENTATIONS[name], **arguments, **order)
    except TypeError as e:
        parameters = inspect.signature(AUGMENTATIONS[name]).parameters
        known = ", ".join(parameter for parameter in parameters if parameter != _FROM_DATASET)
        raise UserError(f"INPUT.AUGMENTATIONS: {e}; the arguments are {known}") from e
