"""Alias of `plaintrain.utils.env`, where Detectron2 has the environment report."""

from plaintrain.utils.env import collect_env_info

__all__ = ["collect_env_info"]
