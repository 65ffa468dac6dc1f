"""Checkpoints, and weights from other sources."""

from plaintrain.checkpoint.checkpointer import DetectionCheckpointer
from plaintrain.checkpoint.periodic import PeriodicCheckpointer

__all__ = ["DetectionCheckpointer", "PeriodicCheckpointer"]
