"""Configs: keys with defaults, YAML files, overrides."""

from plaintrain.config.config import CfgNode, check_cfg, get_cfg, get_value, set_value

__all__ = ["CfgNode", "check_cfg", "get_cfg", "get_value", "set_value"]
