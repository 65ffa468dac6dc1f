"""Dataset formats and the datasets that are built in."""

from plaintrain.data.datasets.coco import register_coco_instances

__all__ = ["register_coco_instances"]
