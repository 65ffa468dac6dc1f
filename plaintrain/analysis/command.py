"""The config, the dataset and the predictions that the command line of a tool names."""

from plaintrain.analysis.run_folder import find_predictions, list_test_sets, read_config
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
    names = list_test_sets(args.run) if args.run else list(cfg.DATASETS.TEST)
    if not (args.dataset or names):
        raise UserError("which dataset are the predictions of? Name it with --dataset")
    args.dataset = args.dataset or names[0]
    args.predictions = args.predictions or find_predictions(args.run, args.dataset)
