"""Augmentation of images, boxes, masks and keypoints; `T` of Detectron2."""

from plaintrain.data.transforms.augmentation import *  # noqa: F403
from plaintrain.data.transforms.crops import RandomCrop  # noqa: F401
from plaintrain.data.transforms.geometric import Resize  # noqa: F401
from plaintrain.data.transforms.geometric import _ResizeShortestEdge as ResizeShortestEdge  # noqa: F401
