"""Command line arguments of the scripts; without torch, so that --help and mistakes are answered at once."""

import argparse
from typing import Any


class _OverridesAction(argparse.Action):
    """Config overrides; without it, argparse would silently take a flag among them as a value."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if value.startswith("--"):
                parser.error(f"flags must come before the overrides, got {value} after {values[0]} ...")
        setattr(namespace, self.dest, values)


def _import(name: str) -> None:
    """Import the user's code at once, since some scripts read datasets before they call `launch`."""
    from plaintrain.utils.user_code import import_user_code

    try:
        import_user_code([name])
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def build_parser(epilog: str | None, config_help: str = "") -> argparse.ArgumentParser:
    """Build a parser with --debug and --import, and with --config-file if `config_help` is not empty."""
    parser = argparse.ArgumentParser(epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(config_file="", opts=[])
    if config_help:
        parser.add_argument("--config-file", default="", metavar="FILE", help=config_help)
    options: dict[str, Any] = {"type": _import, "default": argparse.SUPPRESS, "metavar": "FILE.py"}
    parser.add_argument("--import", help="import your datasets; also PACKAGE.MODULE; repeatable", **options)
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    return parser


def add_renamed_argument(parser: argparse.ArgumentParser, flag: str, *old_flags: str, **options: Any) -> None:
    """Add a flag that also accepts its old names, which --help does not show."""
    dest = parser.add_argument(flag, **options).dest
    hidden = {"dest": dest, "help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    for old_flag in old_flags:
        parser.add_argument(old_flag, **options | hidden)


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Build the parser of the training scripts; `default_setup` and `launch` take its result."""
    parser = build_parser(epilog, "YAML config")
    add = parser.add_argument
    add("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, or with --resume the checkpoint")
    add("--num-gpus", type=int, default=1, help="processes per machine")
    add("--num-machines", type=int, default=1, help="machines of the job")
    add("--machine-rank", type=int, default=0, help="rank of this machine, from 0")
    add("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0; required for several machines")
    add("--overfit", type=int, metavar="N", help="train and evaluate on the first N images")
    add(
        "--dry-run",
        action="store_true",
        help="train two iterations, evaluate a few images, save and load a checkpoint; OUTPUT_DIR/dry-run is "
        "only kept if that fails",
    )
    add("--quiet", action="store_true", help="show only warnings and errors; log.txt is complete")
    add(
        "opts",
        nargs=argparse.REMAINDER,
        action=_OverridesAction,
        metavar="KEY VALUE",
        help="config overrides, after all flags, for example SOLVER.BASE_LR 0.01 OUTPUT_DIR out",
    )
    return parser


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that all scripts that draw images have."""
    add = parser.add_argument
    add_renamed_argument(parser, "--max-images", "--num", type=int, default=16, help="limit (default: 16)")
    add("--output", metavar="DIR", help="write one file per image into this folder")
    add("--grid", metavar="FILE", help="write all images as one grid: .jpg, .png or .webp")
    add("--show", action="store_true", help="show the grid in a window (the default)")
    add("--columns", type=int, default=4, help="columns of the grid")
    add("--size", type=int, default=480, help="enlarge smaller images to this longer side, in pixels")
    add("--class", action="append", dest="classes", metavar="NAME", help="only this class; repeatable")


def build_run_parser(epilog: str | None) -> argparse.ArgumentParser:
    """Build a parser of `[RUN_FOLDER] [KEY VALUE ...]` among flags, for `parse_run_arguments`."""
    parser = build_parser(epilog, "YAML config, instead of RUN_FOLDER")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RUN_FOLDER | KEY VALUE",
        help="OUTPUT_DIR of a run, then config overrides, for example MODEL.WEIGHTS model_best.pth",
    )
    return parser


def parse_run_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line with a `build_run_parser`; adds `run` (a folder or "") and `opts`."""
    args = parser.parse_intermixed_args()
    args.run = args.words[0] if len(args.words) % 2 else ""
    args.opts = args.words[len(args.words) % 2 :]
    if bool(args.run) == bool(args.config_file):
        parser.error(f"give a run's folder or --config-file FILE, got {'both' if args.run else 'neither'}")
    return args
