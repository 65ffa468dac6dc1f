"""Choice of the evaluator of a dataset."""

from plaintrain.config import CfgNode
from plaintrain.data.catalog import MetadataCatalog
from plaintrain.evaluation.coco import COCOEvaluator
from plaintrain.evaluation.detections import InstanceEvaluator
from plaintrain.evaluation.lvis_evaluation import LVISEvaluator
from plaintrain.evaluation.voc import PascalVOCDetectionEvaluator


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> InstanceEvaluator:
    """Build the evaluator of `evaluator_type` (else COCO), or of recall for a ProposalNetwork."""
    proposals = cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type == "pascal_voc" and not proposals:
        return PascalVOCDetectionEvaluator(dataset_name, output_dir=output_folder)
    if evaluator_type == "lvis" and not proposals:
        return LVISEvaluator(dataset_name, output_dir=output_folder)
    return COCOEvaluator(
        dataset_name,
        tasks=("box_proposals",) if proposals else None,
        output_dir=output_folder,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )
