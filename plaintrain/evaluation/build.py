"""`build_evaluator`: how a dataset is scored."""

from plaintrain.data.catalog import MetadataCatalog
from plaintrain.evaluation.coco import COCOEvaluator
from plaintrain.evaluation.voc import PascalVOCDetectionEvaluator


def build_evaluator(cfg, dataset_name, output_folder=None):
    """Build the evaluator that the model and the dataset's metadata ask for.

    The `evaluator_type` pascal_voc gives VOC's metric, anything else COCO's, and a ProposalNetwork is always
    scored by the recall of its boxes. Without an `output_folder` no files are written.
    """
    proposals = cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"
    if MetadataCatalog.get(dataset_name).get("evaluator_type") == "pascal_voc" and not proposals:
        return PascalVOCDetectionEvaluator(dataset_name, output_dir=output_folder)
    return COCOEvaluator(
        dataset_name,
        tasks=("box_proposals",) if proposals else None,
        output_dir=output_folder,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )
