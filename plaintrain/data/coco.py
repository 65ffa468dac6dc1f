"""Alias of `plaintrain.data.datasets.coco`, where Detectron2 had it before."""

from plaintrain.data.datasets.coco import register_coco_instances  # noqa: F401
