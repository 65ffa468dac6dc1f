"""Evaluators and the loop that feeds them."""

from plaintrain.evaluation.coco import COCOEvaluator
from plaintrain.evaluation.loop import (
    DatasetEvaluator,
    DatasetEvaluators,
    flatten_results,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from plaintrain.evaluation.voc import PascalVOCDetectionEvaluator

__all__ = [
    "COCOEvaluator",
    "DatasetEvaluator",
    "DatasetEvaluators",
    "PascalVOCDetectionEvaluator",
    "flatten_results",
    "inference_on_dataset",
    "print_csv_format",
    "verify_results",
]
