#!/usr/bin/env python
"""Evaluate trained weights, or score a file of predictions without a model.

python scripts/test_net.py --config-file configs/quickstart.yaml \\
    MODEL.WEIGHTS output/quickstart/model_final.pth
python scripts/test_net.py --config-file configs/quickstart.yaml --resume
python scripts/test_net.py --config-file configs/quickstart.yaml --predictions FILE.json

MODEL.WEIGHTS names the weights; --resume takes the last checkpoint of OUTPUT_DIR instead. --predictions
takes a JSON in COCO's results format with the image and category ids of the one dataset in DATASETS.TEST;
images and weights are not needed. Of the flags that training scripts have too, --eval-only changes nothing
here, where nothing else is done, and --overfit and --dry-run are refused.

Each dataset of DATASETS.TEST gets a folder OUTPUT_DIR/inference/DATASET with its scores, results.json, and
with the predictions, coco_instances_results.json (but for a ProposalNetwork's). Of a run in OUTPUT_DIR
nothing else is changed but log.txt, which goes on.

"""

import logging
import os

from plaintrain.utils.arguments import default_argument_parser

if __name__ == "__main__":
    # --help and a wrong flag are answered before the imports that take seconds.
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument(
        "--predictions", default="", metavar="FILE", help="score this file of predictions, without a model"
    )
    args = parser.parse_args()

from plaintrain.checkpoint import load_for_evaluation
from plaintrain.engine import default_setup, launch, load_cfg
from plaintrain.engine.testing import do_test
from plaintrain.evaluation import build_evaluator, read_detections, report_results, verify_results
from plaintrain.evaluation.predictions import PREDICTIONS_FILE
from plaintrain.modeling import build_model
from plaintrain.utils import comm
from plaintrain.utils.errors import UserError

logger = logging.getLogger("plaintrain")


def score_predictions(cfg, path):
    """Score a file of predictions for the dataset of DATASETS.TEST; as `do_test`."""
    (dataset_name,) = cfg.DATASETS.TEST
    folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    # The file that is read is not written anew.
    is_there = os.path.realpath(path) == os.path.realpath(os.path.join(folder, PREDICTIONS_FILE))
    evaluator = build_evaluator(cfg, dataset_name, None if is_there else folder)
    detections = read_detections(path, dataset_name)
    results = evaluator.score(detections) if comm.is_main_process() else {}
    report_results(dataset_name, results, folder)
    return {dataset_name: results}


def check(cfg, args):
    """Refuse a command line that leaves open what is to be evaluated."""
    if args.overfit or args.dry_run:
        raise UserError("--overfit and --dry-run are for training, and this script only evaluates")
    names = ", ".join(cfg.DATASETS.TEST)
    if not names:
        raise UserError("DATASETS.TEST is empty: name at least one dataset, as DATASETS.TEST \"('NAME',)\"")
    given = {
        "--predictions": bool(args.predictions),
        "--resume": args.resume,
        "MODEL.WEIGHTS": "MODEL.WEIGHTS" in args.opts[::2],
    }
    if sum(given.values()) > 1:
        both = " and ".join(name for name in given if given[name])
        raise UserError(f"{both} are given, but only one can be evaluated; leave out the others")
    if args.predictions and (cfg.TEST.AMP or cfg.TEST.AUG.ENABLED):
        raise UserError("--predictions runs no model: TEST.AMP and TEST.AUG.ENABLED must be False with it")
    if args.predictions and not os.path.isfile(args.predictions):
        raise UserError(f"--predictions {args.predictions}: there is no such file")
    if args.predictions and len(cfg.DATASETS.TEST) > 1:
        raise UserError(
            f"--predictions is of one dataset, but DATASETS.TEST names {len(cfg.DATASETS.TEST)}: {names}; "
            f"choose one, as DATASETS.TEST \"('{cfg.DATASETS.TEST[0]}',)\""
        )
    if not (args.predictions or args.resume or cfg.MODEL.WEIGHTS):
        raise UserError(
            "there is nothing to evaluate: give MODEL.WEIGHTS FILE, --resume for the last checkpoint of "
            "OUTPUT_DIR, or --predictions FILE"
        )


def main(args):
    """One process' work."""
    # The files of a run in OUTPUT_DIR stay where they are.
    args.eval_only = True
    cfg = load_cfg(args)
    cfg.freeze()
    check(cfg, args)
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
