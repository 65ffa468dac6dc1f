"""Resolve the config, the dataset and the predictions from the command line of a tool."""

from argparse import Namespace

from plaintrain.analysis.run_folder import find_predictions, list_test_sets, read_config
from plaintrain.config import CfgNode, get_cfg
from plaintrain.data.datasets.builtin import declare_datasets
from plaintrain.utils.errors import UserError


def load_tool_cfg(args: Namespace, problems: dict[str, UserError] | None = None) -> CfgNode:
    """Load the config of a run folder or a file (`run`, `config_file`, `opts`); declare its datasets.

    With `problems`, errors in declarations are collected by name instead of raised.
    """
    cfg = read_config(args.run) if getattr(args, "run", "") else get_cfg()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    declare_datasets(cfg, problems)
    return cfg


def choose_predictions(args: Namespace, cfg: CfgNode) -> None:
    """Set missing arguments: `dataset` to the first test set, `predictions` to the run's last ones."""
    if not (args.run or args.predictions):
        raise UserError("give RUN, a run folder, or --predictions FILE")
    names = list_test_sets(args.run) if args.run else list(cfg.DATASETS.TEST)
    if not (args.dataset or names):
        raise UserError("DATASETS.TEST is empty; give the dataset of the predictions with --dataset")
    args.dataset = args.dataset or names[0]
    args.predictions = args.predictions or find_predictions(args.run, args.dataset)
