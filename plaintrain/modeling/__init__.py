"""Detectors and backbones."""

from plaintrain.modeling.build import build_model

__all__ = ["build_model"]
