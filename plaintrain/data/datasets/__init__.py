"""Dataset formats and the datasets that are built in."""

from plaintrain.data.datasets.coco import register_coco_instances
from plaintrain.data.datasets.lvis import register_lvis_instances

__all__ = ["register_coco_instances", "register_lvis_instances"]
