"""Detectors and backbones."""

from plaintrain.modeling.build import build_model
from plaintrain.modeling.tta import build_tta

__all__ = ["build_model", "build_tta"]
