"""Compare the config of a resumed run with that of its checkpoint."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from plaintrain.checkpoint.files import DamagedCheckpointError, read_last_checkpoint
from plaintrain.config.yaml import diff_configs, flatten, parse_yaml
from plaintrain.utils.class_lists import check_trained_classes
from plaintrain.utils.errors import UserError
from plaintrain.utils.text import truncate_text

logger = logging.getLogger(__name__)

# Keys that may change with the folder or the machine.
_DATALOADER = ("DATALOADER.NUM_WORKERS", "DATALOADER.WORKER_TYPE", "DATALOADER.CACHE_BYTES")
_ENVIRONMENT = ("OUTPUT_DIR", "VERSION", "MODEL.DEVICE", *_DATALOADER)
# Under other values, saved states would be misinterpreted even if their shapes match.
_FIXED = ("MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME", "SOLVER.OPTIMIZER")
# With SOLVER.MAX_EPOCHS, these change which epoch an iteration belongs to.
_EPOCH_LENGTH = ("SOLVER.IMS_PER_BATCH", "SOLVER.REFERENCE_WORLD_SIZE", "SOLVER.REFERENCE_IMS_PER_BATCH")


def check_changes(
    folder: str, config: str, class_names: list[str], model: nn.Module, data_hashes: Sequence[list[Any]] = ()
) -> None:
    """Compare a run with the checkpoint to resume from; log each change and its effect.

    `config` is YAML; the model may be on the device "meta"; `data_hashes` are `catalog.compute_hashes`.
    """
    try:
        path, saved = read_last_checkpoint(folder, mmap=True)
    except DamagedCheckpointError:
        # Resuming raises it.
        return
    if saved is None:
        return
    check_trained_classes(path, saved.get("class_names"), class_names, strict=True)
    _compare_data(path, saved.get("data_hashes"), data_hashes)
    current = flatten(parse_yaml(config, "the config"))
    num_done = saved.get("iteration", -1) + 1
    max_iter = current.get("SOLVER.MAX_ITER", num_done)
    if num_done > max_iter:
        raise UserError(
            f"SOLVER.MAX_ITER (or MAX_EPOCHS) must be at least the {num_done} iterations of {path}, got "
            f"{max_iter}; to continue from an earlier checkpoint, delete the later ones"
        )
    if not isinstance(saved.get("config"), str):
        return
    # An extra state need not be a tensor.
    shapes = {name: getattr(value, "shape", None) for name, value in model.state_dict().items()}
    is_same_model = shapes == {name: getattr(value, "shape", None) for name, value in saved["model"].items()}
    in_epochs = current.get("SOLVER.MAX_EPOCHS", 0) > 0
    lines = []
    rejected = []
    for key, *values in diff_configs(saved["config"], config):
        before, now = (truncate_text(str(value), 40) for value in values)
        effect = _describe_effect(key, is_same_model, in_epochs)
        lines.append(f"  {key}: {before} -> {now} ({effect})")
        if effect == "rejected":
            rejected.append(f"{key} must be {before} as in the resumed run, got {now}")
    if lines:
        logger.warning("\n".join([f"the config differs from that of {path}:", *lines]))
    if rejected:
        raise UserError(
            f"{rejected[0]}; it cannot change within a run: set it back, or start a new run from the weights "
            "(MODEL.WEIGHTS, without --resume)"
        )


def _compare_data(path: str, before: Any, now: Sequence[list[Any]]) -> None:
    """Reject other images than those of the checkpoint; log changed annotations."""
    # Older checkpoints have no hashes, and the sampler rejects another number of images.
    if not before or sum(dataset[0] for dataset in before) != sum(dataset[0] for dataset in now):
        return
    if [dataset[1] for dataset in before] != [dataset[1] for dataset in now]:
        raise UserError(
            f"the images of DATASETS.TRAIN must be those of {path}, got other names, sizes or another order; "
            "a run cannot continue with other data: set it back, or start a new run from its weights"
        )
    if before != list(now):
        logger.warning(
            f"the annotations of DATASETS.TRAIN differ from those of {path}; they are used from now on, and "
            "the result is not that of an uninterrupted run"
        )


def _describe_effect(key: str, is_same_model: bool, in_epochs: bool) -> str:
    if key in _ENVIRONMENT:
        return "environment"
    if key == "MODEL.WEIGHTS":
        return "none: the checkpoint's weights are used"
    is_other_model = key.startswith("MODEL.") and not is_same_model
    if key in _FIXED or is_other_model or (key in _EPOCH_LENGTH and in_epochs):
        return "rejected"
    return "from now on"
