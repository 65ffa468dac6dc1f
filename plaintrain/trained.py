"""A trained detector from a run's folder, or from a config and weights."""

import os

from plaintrain.config import check_cfg, get_cfg, get_value, set_value
from plaintrain.data.builtin import declare_datasets
from plaintrain.data.catalog import class_names
from plaintrain.modeling.build import build_model, num_classes_key
from plaintrain.preflight import settle_num_classes
from plaintrain.utils.checkpoint_files import resume_candidates
from plaintrain.utils.errors import UserError
from plaintrain.weights import load_weights, read_class_names


def read_config(run="", config_file="", overrides=()):
    """The config of a run's folder or of a file, with its number of classes, for work on one CPU process.

    Args:
        run: a run's folder (OUTPUT_DIR), or "". MODEL.WEIGHTS is the model that it ended with, or else its
            newest checkpoint, or "" where there is none, unless `overrides` name another.
        config_file: a YAML config, or "".
        overrides: KEY, value, KEY, value, ...

    Raises:
        UserError: neither or both are given, a folder without config.yaml, or a mistake in the config.
    """
    if bool(run) == bool(config_file):
        raise UserError(f"give a run's folder or --config-file FILE, not {'both' if run else 'neither'}")
    cfg = get_cfg()
    if run:
        config_file = os.path.join(run, "config.yaml")
        if not os.path.isfile(config_file):
            raise UserError(f"{run} is no run's folder: there is no {config_file}")
    cfg.merge_from_file(config_file)
    if run:
        set_value(cfg, "MODEL.WEIGHTS", next(iter(_weights_of(run)), ""))
    cfg.merge_from_list(list(overrides))
    # Neither changes what is found; both are in the way of who looks into the model.
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.COMPILE", False, "MODEL.CHANNELS_LAST", False])
    cfg.freeze()
    check_cfg(cfg)
    declare_datasets(cfg)
    keypoints = cfg.MODEL.KEYPOINT_ON and not cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if keypoints or not get_value(cfg, num_classes_key(cfg)):
        settle_num_classes(cfg, eval_only=True)
    return cfg


def _weights_of(run):
    final = os.path.join(run, "model_final.pth")
    return [final] if os.path.isfile(final) else resume_candidates(run)


def load_trained(cfg):
    """(the detector in evaluation mode, the names of its classes or None) of MODEL.WEIGHTS.

    Raises:
        UserError: there are no weights, or they do not fit.
    """
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        raise UserError("there are no trained weights: give MODEL.WEIGHTS FILE, or the folder of a run")
    names = read_class_names(weights)
    if names is None and (cfg.DATASETS.TEST or cfg.DATASETS.TRAIN):
        names = _dataset_classes((*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)[0])
    if names and len(names) != get_value(cfg, num_classes_key(cfg)):
        names = None
    model = build_model(cfg).eval()
    averaged = cfg.MODEL.EMA.ENABLED and cfg.MODEL.EMA.EVALUATE == "averaged"
    load_weights(model, weights, names, averaged=averaged)
    return model, names


def _dataset_classes(name):
    try:
        return class_names(name)
    except UserError:
        # Its files are not on this machine.
        return None
