"""What differs between a run and its continuation: shown as a table, and refused where it cannot be."""

import logging

from plaintrain.checkpoint.files import DamagedCheckpointError, read_last
from plaintrain.config.yaml import config_changes, flatten, parse_yaml
from plaintrain.utils.class_lists import check_trained_classes
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)

# Keys that are not of the run itself: a moved folder, another machine.
_WORKERS = ("DATALOADER.NUM_WORKERS", "DATALOADER.WORKER_TYPE", "DATALOADER.CACHE_BYTES")
_OF_THE_PLACE = ("OUTPUT_DIR", "VERSION", "MODEL.DEVICE", *_WORKERS)
_NO_EFFECT = {"MODEL.WEIGHTS": "none: the checkpoint's weights are taken"}
# Whatever else fits, its state means something else.
_REFUSED = ("MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME", "SOLVER.OPTIMIZER")
# The counts of a run in epochs would mean other iterations than those that are done.
_COUNTED = ("SOLVER.IMS_PER_BATCH", "SOLVER.REFERENCE_WORLD_SIZE", "SOLVER.REFERENCE_IMS_PER_BATCH")


def check_changes(folder, config, class_names, model):
    """Compare a run with the checkpoint that it is resumed from; log what differs, and what that does.

    Args:
        folder: OUTPUT_DIR.
        config: the config now, as text.
        class_names: those of DATASETS.TRAIN.
        model: the model now; may be on the device "meta".

    Raises:
        UserError: names a key, or the classes, that cannot change within a run.
    """
    try:
        path, saved = read_last(folder, mmap=True)
    except DamagedCheckpointError:
        # Resuming says so.
        return
    if not path:
        return
    check_trained_classes(path, saved.get("class_names"), class_names, strict=True)
    if not isinstance(saved.get("config"), str):
        return
    changes = config_changes(saved["config"], config)
    fits = _shapes(model.state_dict()) == _shapes(saved["model"])
    now = flatten(parse_yaml(config, "the config"))
    refused = [change for change in changes if _is_refused(change[0], now, fits)]
    if changes:
        rows = [(key, _short(was), _short(is_), _effect(key, refused)) for key, was, is_ in changes]
        logger.warning(f"the config differs from that of {path}:\n{_table(rows)}")
    if refused:
        key, was, is_ = refused[0]
        raise UserError(
            f"{key} was {_short(was)} in the run that is resumed and is {_short(is_)} now: it cannot change "
            "within a run; set it back, or start a new run from the weights (MODEL.WEIGHTS, without --resume)"
        )


def _shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _is_refused(key, config, model_fits):
    if key in _OF_THE_PLACE or key in _NO_EFFECT:
        return False
    in_epochs = config.get("SOLVER.MAX_EPOCHS", 0) > 0
    other_model = key.startswith("MODEL.") and not model_fits
    return key in _REFUSED or other_model or (key in _COUNTED and in_epochs)


def _effect(key, refused):
    if key in [refused_key for refused_key, _, _ in refused]:
        return "refused"
    if key in _OF_THE_PLACE:
        return "here"
    return _NO_EFFECT.get(key, "from here on")


def _short(value):
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _table(rows):
    header = ("key", "before", "now", "effect")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(4)]
    lines = ["  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)
