"""Datasets, augmentation and loaders."""
# ruff: noqa: F401

from plaintrain.data.build import (
    build_detection_test_loader,
    build_detection_train_loader,
    build_detection_val_loader,
)
from plaintrain.data.catalog import DatasetCatalog, MetadataCatalog
from plaintrain.data.dataset_mapper import DatasetMapper
from plaintrain.data.datasets.builtin import declare_datasets
from plaintrain.data.datasets.coco import register_coco_instances
from plaintrain.data.records import get_detection_dataset_dicts
