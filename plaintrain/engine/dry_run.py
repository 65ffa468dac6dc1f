"""The first hour of a project: training on a few images, and a run of two iterations."""

import contextlib
import logging
import math
import os
import shutil

import numpy as np

from plaintrain.config import set_value
from plaintrain.data.build import count_iters_per_epoch, get_training_records
from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog
from plaintrain.engine.launch import create_ddp_model
from plaintrain.evaluation.evaluator import flatten_results
from plaintrain.modeling.build import build_model
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

logger = logging.getLogger(__name__)

_DRY_RUN = {
    "LOG_PERIOD": 1,
    "OUTPUT.REPORT": False,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.MAX_TIME": 0.0,
    "SOLVER.STEPS": (),
    "SOLVER.CHECKPOINT_PERIOD": 0,
    "TEST.EVAL_PERIOD": 0,
    "TEST.EVAL_START": 0,
    "TEST.EXPECTED_RESULTS": [],
}


def _register(name, records, like):
    """Register records as a dataset with the metadata of another."""
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
    metadata = {k: v for k, v in vars(MetadataCatalog.get(like)).items() if k not in ("name", "declaration")}
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(**metadata)


def overfit_on(cfg, num_images):
    """Make the first images that can be trained on both the training and the test set, in place."""
    if not cfg.DATASETS.TRAIN:
        raise UserError("--overfit takes its images from DATASETS.TRAIN, which is empty")
    usable = get_training_records(cfg)
    if not 1 <= num_images <= len(usable):
        raise UserError(f"--overfit is {num_images}, but must be from 1 to the {len(usable)} training images")
    # Several datasets may use the same ids.
    records = [{**usable[i], "image_id": i} for i in range(num_images)]
    name = f"overfit_{num_images}"
    _register(name, records, cfg.DATASETS.TRAIN[0])
    set_value(cfg, "DATASETS.TRAIN", (name,))
    set_value(cfg, "DATASETS.TEST", (name,))
    logger.info(f"--overfit: trained and evaluated on the same {num_images} images")


def shorten_to_dry_run(cfg):
    """Make a run one of two iterations and an evaluation of a few images, in OUTPUT_DIR/dry-run."""
    for key, value in _DRY_RUN.items():
        set_value(cfg, key, value)
    if cfg.TEST.VAL_LOSS_PERIOD:
        set_value(cfg, "TEST.VAL_LOSS_PERIOD", 1)
    few = max(8, 2 * cfg.TEST.IMS_PER_BATCH * comm.get_world_size())
    for name in cfg.DATASETS.TEST:
        records = DatasetCatalog.get(name)
        _register(name, [records[i] for i in range(min(few, len(records)))], name)
    if cfg.SOLVER.MAX_EPOCHS:
        # A test set that is trained on too is shorter now.
        set_value(cfg, "SOLVER.MAX_ITER", min(2, count_iters_per_epoch(cfg)))
        set_value(cfg, "SOLVER.MAX_EPOCHS", 1)
    set_value(cfg, "OUTPUT_DIR", os.path.join(cfg.OUTPUT_DIR, "dry-run"))
    if comm.get_local_rank() == 0:
        # What one that failed has left.
        shutil.rmtree(cfg.OUTPUT_DIR, ignore_errors=True)
    comm.synchronize()


def finish_dry_run(args, cfg, results, do_train):
    """With --dry-run, resume from the checkpoint with a new model, compare the results, and say "ready".

    Args:
        args: the command line; nothing is done without its `dry_run`.
        cfg: what `shorten_to_dry_run` made.
        results: {dataset: {task: {metric: number}}} of the run.
        do_train: function `(cfg, model, resume)` that returns such results.
    """
    if not args.dry_run:
        return
    before = flatten_results(results)
    after = flatten_results(do_train(cfg, create_ddp_model(build_model(cfg)), resume=True))
    for name in before | after:
        a = before.get(name, math.nan)
        b = after.get(name, math.nan)
        if not np.isclose(a, b, rtol=0, atol=0.1, equal_nan=True):
            raise UserError(f"the checkpoint read back is another model: {name} was {a:.4g} and is {b:.4g}")
    comm.synchronize()
    if comm.get_local_rank() == 0:
        shutil.rmtree(cfg.OUTPUT_DIR, ignore_errors=True)
        with contextlib.suppress(OSError):
            # Empty only if it was made for this.
            os.rmdir(os.path.dirname(cfg.OUTPUT_DIR))
    logger.info(
        f"ready: {cfg.SOLVER.MAX_ITER} iterations, {'an evaluation, ' if results else ''}a save and a load "
        "went well; nothing was kept. The whole run is the same command without --dry-run"
    )
