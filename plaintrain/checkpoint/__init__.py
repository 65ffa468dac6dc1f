"""Checkpoints, and weights from other sources."""

from plaintrain.checkpoint.checkpointer import DetectionCheckpointer, PeriodicCheckpointer
from plaintrain.checkpoint.training_checkpointer import build_checkpointer, load_for_evaluation

__all__ = ["DetectionCheckpointer", "PeriodicCheckpointer", "build_checkpointer", "load_for_evaluation"]
