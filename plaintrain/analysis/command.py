"""The config, the dataset and the predictions that the command line of a tool names."""

import os

from plaintrain.analysis.run_folder import predictions_path, read_config, test_sets
from plaintrain.config import get_cfg
from plaintrain.data.datasets.builtin import declare_datasets
from plaintrain.utils.errors import UserError


def load_tool_cfg(args):
    """Return the config of a run's folder or a file (`run`, `config_file`, `opts`); declares its datasets."""
    cfg = read_config(args.run) if getattr(args, "run", "") else get_cfg()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    declare_datasets(cfg)
    return cfg


def choose_predictions(args, cfg):
    """Set `args.dataset`, if it is not given to the first test set, and `args.predictions`, to the last ones.

    Raises:
        UserError: the command line and the run name no dataset, or there are no predictions for it.
    """
    if not (args.run or args.predictions):
        raise UserError("give RUN, a run's folder, or --predictions FILE")
    names = test_sets(args.run) if args.run else list(cfg.DATASETS.TEST)
    if args.run and not args.predictions:
        names = [name for name in names if predictions_path(args.run, name)]
        if not names:
            command = f"scripts/test_net.py --config-file {os.path.join(args.run, 'config.yaml')} --resume"
            raise UserError(f"{args.run} holds no predictions: {command} makes them")
    if not (args.dataset or names):
        raise UserError("which dataset are the predictions of? Name it with --dataset")
    args.dataset = args.dataset or names[0]
    args.predictions = args.predictions or predictions_path(args.run, args.dataset)
    if not args.predictions:
        known = f"there are no predictions for {args.dataset}; there are those for {', '.join(names)}"
        raise UserError(f"{known}: give --predictions FILE")
