"""Evaluators and the loop that feeds them."""
# ruff: noqa: F401

from plaintrain.evaluation.build import build_evaluator
from plaintrain.evaluation.coco import COCOEvaluator
from plaintrain.evaluation.evaluator import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
    flatten_results,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from plaintrain.evaluation.lvis_evaluation import LVISEvaluator
from plaintrain.evaluation.predictions import read_detections, report_results
from plaintrain.evaluation.val_loss import compute_validation_losses
from plaintrain.evaluation.voc import PascalVOCDetectionEvaluator
