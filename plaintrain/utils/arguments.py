"""The command lines of the scripts; they need no torch, so that a question is answered at once."""

import argparse


class _Overrides(argparse.Action):
    """KEY VALUE pairs; argparse would swallow a flag among them without a word."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if value.startswith("--"):
                parser.error(f"{value} stands after the overrides {values[0]} ...; put flags first")
        setattr(namespace, self.dest, values)


def build_parser(epilog, config_help=""):
    """Build a parser that knows --debug, and --config-file if that has a help."""
    parser = argparse.ArgumentParser(epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(config_file="", opts=[])
    if config_help:
        parser.add_argument("--config-file", default="", metavar="FILE", help=config_help)
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    return parser


def default_argument_parser(epilog=None):
    """The parser of the training scripts; its result goes to `default_setup` and `launch`."""
    parser = build_parser(epilog, "YAML config")
    parser.add_argument(
        "--resume", action="store_true", help="go on from, or evaluate, the last checkpoint in OUTPUT_DIR"
    )
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate MODEL.WEIGHTS (or, with --resume, the last checkpoint)",
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine")
    parser.add_argument("--num-machines", type=int, default=1, help="machines of the job")
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    parser.add_argument(
        "--dist-url", default="auto", help="tcp://HOST:PORT of machine 0; needed on several machines"
    )
    parser.add_argument(
        "--overfit",
        type=int,
        default=0,
        metavar="N",
        help="train and evaluate on the same first N training images; a model that can learn does so",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="two iterations, an evaluation of a few images, a save and a load; says ready and keeps "
        "nothing, or says what is wrong and leaves OUTPUT_DIR/dry-run",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="only warnings and errors on the console; log.txt has the rest"
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        action=_Overrides,
        metavar="KEY VALUE",
        help="config overrides, after all flags, for example SOLVER.BASE_LR 0.01 OUTPUT_DIR out",
    )
    return parser


def add_image_arguments(parser):
    """What the scripts that draw have in common; see `plaintrain.visualization.images`."""
    parser.add_argument("--num", type=int, default=16, help="pictures to make at most (default 16)")
    parser.add_argument("--output", metavar="DIR", help="write one file for each picture into this folder")
    parser.add_argument("--grid", metavar="FILE", help="write all pictures on one sheet: .jpg, .png or .webp")
    parser.add_argument("--show", action="store_true", help="show the sheet in a window (the default)")
    parser.add_argument("--columns", type=int, default=4, help="pictures side by side on the sheet")
    parser.add_argument(
        "--size", type=int, default=480, help="smaller images are enlarged to this longer side, in pixels"
    )
    parser.add_argument(
        "--class", action="append", dest="classes", metavar="NAME", help="this class only; may be given again"
    )


def build_run_parser(epilog):
    """Build a parser of `[RUN_FOLDER] [KEY VALUE ...]` among flags; see `parse_run_arguments`."""
    parser = build_parser(epilog, "YAML config, without RUN_FOLDER")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RUN_FOLDER | KEY VALUE",
        help="the folder of a run (OUTPUT_DIR), then config overrides, as MODEL.WEIGHTS model_best.pth",
    )
    return parser


def parse_run_arguments(parser):
    """Parse with a `build_run_parser`; returns the namespace with `run`, a folder or "", and `opts`."""
    args = parser.parse_intermixed_args()
    args.run = args.words[0] if len(args.words) % 2 else ""
    args.opts = args.words[len(args.words) % 2 :]
    if bool(args.run) == bool(args.config_file):
        given = "both" if args.run else "neither"
        parser.error(f"give a run's folder or --config-file FILE, not {given}")
    return args
