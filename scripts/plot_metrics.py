#!/usr/bin/env python
"""Draw the curves of one or several runs: losses, learning rate, AP, time.

python scripts/plot_metrics.py output/quickstart
python scripts/plot_metrics.py output/a output/b --output compared.svg --smooth 0.8
python scripts/plot_metrics.py output/quickstart --metrics 'loss_*' '*/AP'
python scripts/plot_metrics.py output/quickstart --watch

The curves come from metrics.json, also of a run that goes on. With --watch they are drawn as text in the
terminal, with the last values and the time that is left, again and again until no run goes on any more or
Ctrl-C; nothing is written then, and matplotlib is not needed.
"""

import os
import shutil
import sys
import time

from plaintrain.analysis.run_folder import check_run, get_run_names, get_run_state, read_metrics
from plaintrain.utils.arguments import build_parser
from plaintrain.utils.errors import UserError
from plaintrain.visualization.curves import format_curves, format_state, group_panels

_SAVED_AS = (".png", ".svg", ".pdf")
# Moves the cursor to the upper left and erases what is below.
_CLEAR = "\x1b[H\x1b[J"


def draw(args):
    """Write the plots to a file."""
    # --watch needs neither matplotlib nor NumPy.
    from plaintrain.visualization.plots import draw_curves, require_matplotlib, save_figure

    require_matplotlib()
    runs = dict(zip(get_run_names(args.runs), map(read_metrics, args.runs), strict=True))
    panels = group_panels(runs, args.metrics)
    if not panels:
        known = sorted({name for series in runs.values() for name in series})
        some = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        wanted = f"no metric matches {' '.join(args.metrics)}; there are: {some}" if known else ""
        raise UserError(wanted or f"{', '.join(args.runs)} has no metrics.json with values: nothing to draw")
    path = args.output or os.path.join(args.runs[0], "curves.png")
    save_figure(draw_curves(panels, args.smooth), path)
    print(f"{len(panels)} pictures of {', '.join(runs)} are in {path}")


def text(args, width, plain):
    """(what is to be shown now, whether a run goes on)."""
    lines, goes_on = [], False
    for name, folder in zip(get_run_names(args.runs), args.runs, strict=True):
        metrics = read_metrics(folder)
        state = get_run_state(folder, metrics)
        goes_on = goes_on or state.name == "running"
        curves = format_curves(metrics, args.metrics, args.smooth, width, plain)
        lines += [format_state(name, metrics, state)[:width], *curves, ""]
    return "\n".join(lines), goes_on


def watch(args):
    """Show the curves as text until no run goes on; elsewhere than on a terminal, whatever is new."""
    terminal, shown = sys.stdout.isatty(), None
    plain = not terminal or "utf" not in (sys.stdout.encoding or "").lower()
    while True:
        now, goes_on = text(args, shutil.get_terminal_size().columns - 1 if terminal else 100, plain)
        if now != shown:
            print(f"{_CLEAR}{now}" if terminal else now, flush=True)
        shown = now
        if not goes_on:
            print("no run goes on")
            return
        time.sleep(args.interval)


def parse_args(argv=None):
    """The command line; mistakes in it exit with code 2."""
    parser = build_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs (OUTPUT_DIR)")
    parser.add_argument("--output", metavar="FILE", help=".png, .svg or .pdf; default: RUN/curves.png")
    parser.add_argument(
        "--metrics", nargs="+", default=[], metavar="GLOB", help="which; default: the usual ones"
    )
    parser.add_argument("--smooth", type=float, default=0.0, help="0 (as logged) to 0.999; default: 0")
    parser.add_argument("--watch", action="store_true", help="draw in the terminal, again and again")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between two looks of --watch")
    args = parser.parse_args(argv)
    try:
        for folder in args.runs:
            check_run(folder)
    except UserError as e:
        parser.error(str(e))
    if not 0 <= args.smooth < 1 or not args.interval > 0:
        parser.error("--smooth is from 0 to below 1, and --interval above 0")
    if args.output and not args.output.lower().endswith(_SAVED_AS):
        parser.error(f"--output {args.output}: the name must end in {', '.join(_SAVED_AS)}")
    if args.output and args.watch:
        parser.error("--watch writes nothing: leave out --output")
    return args


def main(args):
    """Draw or watch; the exit code."""
    try:
        watch(args) if args.watch else draw(args)
    except UserError as e:
        if args.debug:
            raise
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0 if args.watch else 130
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
