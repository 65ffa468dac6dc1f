"""Quick checks of a training: --overfit on a few images, --dry-run for two iterations."""

import contextlib
import logging
import math
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from plaintrain.config import CfgNode, set_value
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


def _register_like(other: str, name: str, records: Sequence[dict[str, Any]]) -> None:
    """Register records as a dataset with the metadata of another one."""
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
    metadata = {k: v for k, v in vars(MetadataCatalog.get(other)).items() if k not in ("name", "declaration")}
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(**metadata)


def overfit_on(cfg: CfgNode, num_images: int) -> None:
    """Use the first training images as training and test set, in place."""
    if not cfg.DATASETS.TRAIN:
        raise UserError("--overfit needs DATASETS.TRAIN; name at least one dataset")
    records = get_training_records(cfg)
    if not 1 <= num_images <= len(records):
        raise UserError(f"--overfit must be from 1 to {len(records)} (training images), got {num_images}")
    # Ids may not be unique across datasets.
    selected = [{**records[i], "image_id": i} for i in range(num_images)]
    name = f"overfit_{num_images}"
    _register_like(cfg.DATASETS.TRAIN[0], name, selected)
    set_value(cfg, "DATASETS.TRAIN", (name,))
    set_value(cfg, "DATASETS.TEST", (name,))
    logger.info(f"--overfit: training and evaluation on the same {num_images} images")


def shorten_to_dry_run(cfg: CfgNode) -> None:
    """Shorten a run to two iterations and an evaluation of a few images, in OUTPUT_DIR/dry-run."""
    for key, value in _DRY_RUN.items():
        set_value(cfg, key, value)
    if cfg.TEST.VAL_LOSS_PERIOD:
        set_value(cfg, "TEST.VAL_LOSS_PERIOD", 1)
    max_images = max(8, 2 * cfg.TEST.IMS_PER_BATCH * comm.get_world_size())
    for name in cfg.DATASETS.TEST:
        records = DatasetCatalog.get(name)
        _register_like(name, name, [records[i] for i in range(min(max_images, len(records)))])
    if cfg.SOLVER.MAX_EPOCHS:
        # An epoch is shorter now if the training set is also a test set.
        set_value(cfg, "SOLVER.MAX_ITER", min(2, count_iters_per_epoch(cfg)))
        set_value(cfg, "SOLVER.MAX_EPOCHS", 1)
    set_value(cfg, "OUTPUT_DIR", os.path.join(cfg.OUTPUT_DIR, "dry-run"))
    if comm.get_local_rank() == 0:
        # A failed dry run leaves its folder.
        shutil.rmtree(cfg.OUTPUT_DIR, ignore_errors=True)
    comm.synchronize()


def finish_dry_run(args: Namespace, cfg: CfgNode, results: dict[str, Any], do_train: Callable) -> None:
    """Check with --dry-run that a resumed run has the same results, then delete its folder.

    Args:
        args: the command line; does nothing unless `args.dry_run`.
        cfg: a config that `shorten_to_dry_run` changed.
        results: {dataset: {task: {metric: value}}} of the run.
        do_train: function `(cfg, model, resume)` that returns such results.
    """
    if not args.dry_run:
        return
    before = flatten_results(results)
    after = flatten_results(do_train(cfg, create_ddp_model(build_model(cfg)), resume=True))
    for name in before | after:
        old = before.get(name, math.nan)
        new = after.get(name, math.nan)
        if not np.isclose(old, new, rtol=0, atol=0.1, equal_nan=True):
            raise UserError(f"the resumed model has different results: {name} was {old:.4g} and is {new:.4g}")
    comm.synchronize()
    if comm.get_local_rank() == 0:
        shutil.rmtree(cfg.OUTPUT_DIR, ignore_errors=True)
        with contextlib.suppress(OSError):
            # Deletes OUTPUT_DIR only if it is empty.
            os.rmdir(os.path.dirname(cfg.OUTPUT_DIR))
    verdict = (
        f"ready: {cfg.SOLVER.MAX_ITER} iterations, {'evaluation, ' if results else ''}saving and resuming "
        "succeeded; all files were deleted. Run the same command without --dry-run"
    )
    logger.info(verdict)
    if getattr(args, "quiet", False) and comm.is_main_process():
        print(verdict)
