"""Configs: keys with defaults, YAML files, overrides."""

from plaintrain.config.config import CfgNode, get_value, set_value
from plaintrain.config.defaults import get_cfg
from plaintrain.config.schema import check_cfg

__all__ = ["CfgNode", "check_cfg", "get_cfg", "get_value", "set_value"]
