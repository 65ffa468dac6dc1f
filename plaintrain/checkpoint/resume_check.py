"""Compare the config of a run that is resumed with that of its checkpoint."""

import logging

from plaintrain.checkpoint.files import DamagedCheckpointError, read_last_checkpoint
from plaintrain.config.yaml import diff_configs, flatten, parse_yaml
from plaintrain.utils.class_lists import check_trained_classes
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)

# Keys that are not of the run itself: a moved folder, another machine.
_WORKERS = ("DATALOADER.NUM_WORKERS", "DATALOADER.WORKER_TYPE", "DATALOADER.CACHE_BYTES")
_OF_THE_MACHINE = ("OUTPUT_DIR", "VERSION", "MODEL.DEVICE", *_WORKERS)
# Whatever else fits, its state means something else.
_FIXED = ("MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME", "SOLVER.OPTIMIZER")
# The counts of a run in epochs would mean other iterations than those that are done.
_COUNTED = ("SOLVER.IMS_PER_BATCH", "SOLVER.REFERENCE_WORLD_SIZE", "SOLVER.REFERENCE_IMS_PER_BATCH")


def check_changes(folder, config, class_names, model):
    """Compare a run with the checkpoint that it is resumed from; log what differs, and what that does.

    Args:
        folder, class_names: OUTPUT_DIR, and the classes of DATASETS.TRAIN.
        config, model: those of now: YAML, and a module that may be on the device "meta".
    """
    try:
        path, saved = read_last_checkpoint(folder, mmap=True)
    except DamagedCheckpointError:
        # Resuming says so.
        return
    if not path:
        return
    check_trained_classes(path, saved.get("class_names"), class_names, strict=True)
    if not isinstance(saved.get("config"), str):
        return
    changes = diff_configs(saved["config"], config)
    is_same_model = _shapes(model.state_dict()) == _shapes(saved["model"])
    in_epochs = flatten(parse_yaml(config, "the config")).get("SOLVER.MAX_EPOCHS", 0) > 0
    lines, rejected = [], []
    for key, before, now in changes:
        effect = _effect(key, is_same_model, in_epochs)
        lines.append(f"  {key}: {_short(before)} -> {_short(now)} ({effect})")
        if effect == "rejected":
            rejected.append(f"{key} was {_short(before)} in the run that is resumed and is {_short(now)} now")
    if lines:
        logger.warning("\n".join([f"the config differs from that of {path}:", *lines]))
    if rejected:
        raise UserError(
            f"{rejected[0]}: it cannot change within a run; set it back, or start a new run from the weights "
            "(MODEL.WEIGHTS, without --resume)"
        )


def _shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _effect(key, is_same_model, in_epochs):
    if key in _OF_THE_MACHINE:
        return "here"
    if key == "MODEL.WEIGHTS":
        return "none: the checkpoint's weights are taken"
    is_other_model = key.startswith("MODEL.") and not is_same_model
    if key in _FIXED or is_other_model or (key in _COUNTED and in_epochs):
        return "rejected"
    return "from here on"


def _short(value):
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
