#!/usr/bin/env python
"""Evaluate trained weights, or score a file of predictions without a model.

python scripts/test_net.py --config-file configs/quickstart.yaml \\
    MODEL.WEIGHTS output/quickstart/model_final.pth
python scripts/test_net.py --config-file configs/quickstart.yaml --resume
python scripts/test_net.py --config-file configs/quickstart.yaml --predictions FILE.json

Evaluates MODEL.WEIGHTS, or with --resume the last checkpoint of OUTPUT_DIR. --predictions takes a JSON in
COCO's results format with the image and category ids of the one dataset in DATASETS.TEST; images and weights
are not needed. --eval-only is implied; --overfit and --dry-run are rejected.

Writes results.json and the predictions, coco_instances_results.json (not for ProposalNetwork), to
OUTPUT_DIR/inference/DATASET. It changes no other file of a run in OUTPUT_DIR but appends to log.txt.
"""

import logging
import os

from plaintrain.utils.arguments import default_argument_parser

if __name__ == "__main__":
    # Parse before the slow imports, so that --help and errors are instant.
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument("--predictions", default="", metavar="FILE", help="score this file, without a model")
    args = parser.parse_args()

from argparse import Namespace
from typing import Any

from plaintrain.checkpoint import load_for_evaluation
from plaintrain.config import CfgNode
from plaintrain.engine import default_setup, launch, load_cfg
from plaintrain.engine.testing import do_test
from plaintrain.evaluation import build_evaluator, read_detections, report_results, verify_results
from plaintrain.evaluation.predictions import PREDICTIONS_FILE
from plaintrain.modeling import build_model
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

logger = logging.getLogger("plaintrain")


def score_predictions(cfg: CfgNode, path: str) -> dict[str, Any]:
    """Score a file of predictions; returns the same as `do_test`."""
    (dataset_name,) = cfg.DATASETS.TEST
    folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    # Do not overwrite the file that is read.
    is_output = os.path.realpath(path) == os.path.realpath(os.path.join(folder, PREDICTIONS_FILE))
    evaluator = build_evaluator(cfg, dataset_name, None if is_output else folder)
    detections = read_detections(path, dataset_name)
    results = evaluator.score(detections) if comm.is_main_process() else {}
    report_results(dataset_name, results, folder)
    return {dataset_name: results}


def check_arguments(cfg: CfgNode, args: Namespace) -> None:
    """Reject command lines without exactly one source of predictions."""
    if args.overfit is not None or args.dry_run:
        raise UserError("--overfit and --dry-run are only for training")
    names = ", ".join(cfg.DATASETS.TEST)
    if not names:
        raise UserError("DATASETS.TEST is empty; set it, for example DATASETS.TEST \"('NAME',)\"")
    sources = {
        "--predictions": bool(args.predictions),
        "--resume": args.resume,
        "MODEL.WEIGHTS": "MODEL.WEIGHTS" in args.opts[::2],
    }
    if sum(sources.values()) > 1:
        listed = " and ".join(name for name in sources if sources[name])
        raise UserError(f"only one of {listed} can be evaluated; remove the others")
    if args.predictions and (cfg.TEST.AMP or cfg.TEST.AUG.ENABLED):
        raise UserError("TEST.AMP and TEST.AUG.ENABLED must be False with --predictions, which runs no model")
    if args.predictions and not os.path.isfile(args.predictions):
        raise UserError(f"--predictions {args.predictions}: there is no such file")
    if args.predictions and len(cfg.DATASETS.TEST) > 1:
        raise UserError(
            f"--predictions needs one dataset, but DATASETS.TEST has {len(cfg.DATASETS.TEST)}: {names}; "
            f"select one, for example DATASETS.TEST \"('{cfg.DATASETS.TEST[0]}',)\""
        )
    if not (args.predictions or args.resume or cfg.MODEL.WEIGHTS):
        raise UserError(
            "nothing to evaluate; give MODEL.WEIGHTS FILE, --resume (the last checkpoint of OUTPUT_DIR), or "
            "--predictions FILE"
        )


def main(args: Namespace) -> dict[str, Any]:
    """Evaluate in one process."""
    # With eval_only, default_setup keeps the files of a run in OUTPUT_DIR.
    args.eval_only = True
    cfg = load_cfg(args)
    cfg.freeze()
    check_arguments(cfg, args)
    default_setup(cfg, args)
    if args.predictions:
        results = score_predictions(cfg, args.predictions)
    else:
        model = build_model(cfg)
        load_for_evaluation(cfg, model, resume=args.resume)
        results = do_test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg.TEST.EXPECTED_RESULTS, next(iter(results.values())))
    return results


if __name__ == "__main__":
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
