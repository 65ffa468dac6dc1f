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

import math
import os
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Sequence

from plaintrain.analysis.run_folder import (
    Metrics,
    RunState,
    check_run,
    estimate_seconds_left,
    format_duration,
    get_run_names,
    get_run_state,
    read_metrics,
    split_result,
)
from plaintrain.utils.arguments import build_parser
from plaintrain.utils.errors import UserError
from plaintrain.visualization.curves import group_panels, select_metrics, smooth

_EXTENSIONS = (".png", ".svg", ".pdf")
# Move the cursor to the top left and clear the screen.
_CLEAR = "\x1b[H\x1b[J"
# Levels of a sparkline, from low to high.
_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = " .:-=+*#"
_NAME_WIDTH = 24


def plot(args: Namespace) -> None:
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


def format_state(name: str, metrics: Metrics, state: RunState) -> str:
    """Return one line on a run: its state, iteration and remaining time."""
    done = f"iteration {state.iteration + 1} of {state.max_iter}" if state.max_iter else "no iterations"
    seconds = estimate_seconds_left(metrics, state) if state.name == "running" else None
    eta = f", {format_duration(seconds)} left" if seconds is not None else ""
    return f"{name}: {state.name}, {done}{eta}"


def format_curves(
    metrics: Metrics, patterns: Sequence[str], smoothing: float, width: int, levels: str
) -> list[str]:
    """Return a line of `width` characters per metric: name, last value, sparkline, minimum and maximum."""
    names = select_metrics(metrics, patterns)
    if not patterns:
        results = [name for name in metrics if (split_result(name) or ("",))[-1] == "AP"]
        default = ["total_loss", "val/total_loss", *results, "lr", "time", "data_time"]
        names = [name for name in default if name in metrics]
    lines = []
    for name in names:
        values = smooth(metrics[name][1], smoothing)
        finite = [v for v in values if math.isfinite(v)] or [math.nan]
        label = name if len(name) < _NAME_WIDTH else "~" + name[-(_NAME_WIDTH - 2) :]
        curve = format_sparkline(values, max(8, width - _NAME_WIDTH - 37), levels)
        limits = f"{min(finite):.4g} to {max(finite):.4g}"
        lines.append(f"{label:<{_NAME_WIDTH}}{values[-1]:>10.4g}  {curve} {limits}")
    return lines


def format_sparkline(values: Sequence[float], width: int, levels: str) -> str:
    """Return a curve as characters of `levels`, with gaps for NaN."""
    finite = [v for v in values if math.isfinite(v)]
    low = min(finite, default=0.0)
    high = max(finite, default=0.0)
    num_columns = min(width, len(values))
    text = ""
    for column in range(num_columns):
        start, end = (i * len(values) // num_columns for i in (column, column + 1))
        chosen = [v for v in values[start:end] if math.isfinite(v)]
        height = (sum(chosen) / len(chosen) - low) / (high - low) if chosen and high > low else 0.0
        text += levels[round(height * (len(levels) - 1))] if chosen else " "
    return text.ljust(width)


def format_runs(args: Namespace, width: int, levels: str) -> tuple[str, bool]:
    """Return (text on all runs, whether one is running)."""
    lines = []
    is_running = False
    for name, folder in zip(get_run_names(args.runs), args.runs, strict=True):
        metrics = read_metrics(folder)
        state = get_run_state(folder, metrics)
        is_running = is_running or state.name == "running"
        curves = format_curves(metrics, args.metrics, args.smooth, width, levels)
        lines += [format_state(name, metrics, state)[:width], *curves, ""]
    return "\n".join(lines), is_running


def watch(args: Namespace) -> None:
    """Print the curves as text until no run is training; without a terminal, only when they change."""
    is_terminal = sys.stdout.isatty()
    has_blocks = is_terminal and "utf" in (sys.stdout.encoding or "").lower()
    levels = _BLOCKS if has_blocks else _ASCII
    shown = None
    while True:
        width = shutil.get_terminal_size().columns - 1 if is_terminal else 100
        text, is_running = format_runs(args, width, levels)
        if text != shown:
            print(f"{_CLEAR}{text}" if is_terminal else text, flush=True)
        shown = text
        if not is_running:
            print("no run is training")
            return
        time.sleep(args.interval)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
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


def main(args: Namespace) -> int:
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
