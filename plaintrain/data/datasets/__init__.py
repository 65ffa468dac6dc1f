"""Dataset formats and the datasets that are built in."""
# ruff: noqa: F401

from plaintrain.data.datasets.coco import register_coco_instances
from plaintrain.data.datasets.lvis import register_lvis_instances
