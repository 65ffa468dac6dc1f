"""Setup and launch of a run."""

from plaintrain.engine.launch import create_ddp_model, launch
from plaintrain.engine.setup import (
    build_writers,
    default_setup,
    default_writers,
    load_cfg,
    reject_loop_options,
    require_default,
)
from plaintrain.utils.arguments import default_argument_parser

__all__ = [
    "build_writers", "create_ddp_model", "default_argument_parser", "default_setup", "default_writers",
    "launch", "load_cfg", "reject_loop_options", "require_default",
]  # fmt: skip
