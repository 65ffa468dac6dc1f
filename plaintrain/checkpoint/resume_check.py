"""Compare the config of a resumed run with that of its checkpoint."""

import logging
from typing import Any

from torch import nn

from plaintrain.checkpoint.files import DamagedCheckpointError, read_last_checkpoint
from plaintrain.config.yaml import diff_configs, flatten, parse_yaml
from plaintrain.utils.class_lists import check_trained_classes
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)

# Keys that may change with the folder or the machine.
_DATALOADER = ("DATALOADER.NUM_WORKERS", "DATALOADER.WORKER_TYPE", "DATALOADER.CACHE_BYTES")
_ENVIRONMENT = ("OUTPUT_DIR", "VERSION", "MODEL.DEVICE", *_DATALOADER)
# Under other values, saved states would be misinterpreted even if their shapes match.
_FIXED = ("MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME", "SOLVER.OPTIMIZER")
# With SOLVER.MAX_EPOCHS, these change which epoch an iteration belongs to.
_EPOCH_LENGTH = ("SOLVER.IMS_PER_BATCH", "SOLVER.REFERENCE_WORLD_SIZE", "SOLVER.REFERENCE_IMS_PER_BATCH")


def check_changes(folder: str, config: str, class_names: list[str], model: nn.Module) -> None:
    """Compare a run with the checkpoint to resume from; log each change and its effect.

    `config` is YAML; the model may be on the device "meta".
    """
    try:
        path, saved = read_last_checkpoint(folder, mmap=True)
    except DamagedCheckpointError:
        # Resuming raises it.
        return
    if saved is None:
        return
    check_trained_classes(path, saved.get("class_names"), class_names, strict=True)
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
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    is_same_model = shapes == {name: tensor.shape for name, tensor in saved["model"].items()}
    in_epochs = current.get("SOLVER.MAX_EPOCHS", 0) > 0
    lines = []
    rejected = []
    for key, before, now in diff_configs(saved["config"], config):
        effect = _describe_effect(key, is_same_model, in_epochs)
        lines.append(f"  {key}: {_shorten(before)} -> {_shorten(now)} ({effect})")
        if effect == "rejected":
            rejected.append(f"{key} must be {_shorten(before)} as in the resumed run, got {_shorten(now)}")
    if lines:
        logger.warning("\n".join([f"the config differs from that of {path}:", *lines]))
    if rejected:
        raise UserError(
            f"{rejected[0]}; it cannot change within a run: set it back, or start a new run from the weights "
            "(MODEL.WEIGHTS, without --resume)"
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


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
