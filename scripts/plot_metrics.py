#!/usr/bin/env python
"""Plot the metrics of one or several runs: losses, learning rate, AP, times.

python scripts/plot_metrics.py output/quickstart
python scripts/plot_metrics.py output/a output/b --output compared.svg --smooth 0.8
python scripts/plot_metrics.py output/quickstart --metrics 'loss_*' '*/AP'
python scripts/plot_metrics.py output/quickstart --watch

Reads metrics.json, also of a run that is still training. --watch draws text curves in the terminal, with the
last values and the remaining time, until no run is training or Ctrl-C; it writes no file and needs no
matplotlib.
"""

import os
import shutil
import sys
import time

from plaintrain.analysis.run_folder import check_run, get_run_names, get_run_state, read_metrics
from plaintrain.utils.arguments import build_parser
from plaintrain.utils.errors import UserError
from plaintrain.visualization.curves import format_curves, format_state, group_panels

_EXTENSIONS = (".png", ".svg", ".pdf")
# Move the cursor to the top left and clear the screen.
_CLEAR = "\x1b[H\x1b[J"


def plot(args):
    """Write the plots to a file."""
    # --watch must work without matplotlib and NumPy.
    from plaintrain.visualization.plots import draw_curves, require_matplotlib, save_figure

    require_matplotlib()
    runs = dict(zip(get_run_names(args.runs), map(read_metrics, args.runs), strict=True))
    panels = group_panels(runs, args.metrics)
    if not panels:
        known = sorted({name for series in runs.values() for name in series})
        if not known:
            raise UserError(f"{', '.join(args.runs)} has no metrics.json with values")
        listed = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        raise UserError(f"no metric matches {' '.join(args.metrics)}; there are: {listed}")
    path = args.output or os.path.join(args.runs[0], "curves.png")
    save_figure(draw_curves(panels, args.smooth), path)
    print(f"wrote {len(panels)} plots of {', '.join(runs)} to {path}")


def format_runs(args, width, plain):
    """Return (text on all runs, whether one is running)."""
    lines = []
    is_running = False
    for name, folder in zip(get_run_names(args.runs), args.runs, strict=True):
        metrics = read_metrics(folder)
        state = get_run_state(folder, metrics)
        is_running = is_running or state.name == "running"
        curves = format_curves(metrics, args.metrics, args.smooth, width, plain)
        lines += [format_state(name, metrics, state)[:width], *curves, ""]
    return "\n".join(lines), is_running


def watch(args):
    """Print the curves as text until no run is training; without a terminal, only when they change."""
    is_terminal = sys.stdout.isatty()
    plain = not is_terminal or "utf" not in (sys.stdout.encoding or "").lower()
    shown = None
    while True:
        width = shutil.get_terminal_size().columns - 1 if is_terminal else 100
        text, is_running = format_runs(args, width, plain)
        if text != shown:
            print(f"{_CLEAR}{text}" if is_terminal else text, flush=True)
        shown = text
        if not is_running:
            print("no run is training")
            return
        time.sleep(args.interval)


def parse_args(argv=None):
    """Parse and check the command line."""
    parser = build_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs (OUTPUT_DIR)")
    parser.add_argument("--output", metavar="FILE", help=".png, .svg or .pdf (default: RUN/curves.png)")
    parser.add_argument(
        "--metrics", nargs="+", default=[], metavar="GLOB", help="metrics to plot (default: the main ones)"
    )
    parser.add_argument("--smooth", type=float, default=0.0, help="EMA decay, 0 to below 1 (default: 0)")
    parser.add_argument("--watch", action="store_true", help="update text curves in the terminal")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between updates of --watch")
    args = parser.parse_args(argv)
    try:
        for folder in args.runs:
            check_run(folder)
    except UserError as e:
        parser.error(str(e))
    if not 0 <= args.smooth < 1:
        parser.error(f"--smooth must be at least 0 and below 1, got {args.smooth}")
    if not args.interval > 0:
        parser.error(f"--interval must be above 0, got {args.interval}")
    if args.output and not args.output.lower().endswith(_EXTENSIONS):
        parser.error(f"--output must end in {', '.join(_EXTENSIONS)}, got {args.output}")
    if args.output and args.watch:
        parser.error("--watch writes no file; remove --output")
    return args


def main(args):
    """Plot or watch, and return the exit code."""
    try:
        watch(args) if args.watch else plot(args)
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
