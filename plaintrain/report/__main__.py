"""Write an HTML report on a run, or a comparison of several runs.

python scripts/report.py output/quickstart
python scripts/report.py output/a output/b --output compared.html

The file is self-contained: it loads nothing from the network or from other files. Runs may still be training.
A section whose images or predictions are missing says so. Training writes OUTPUT_DIR/report.html at its end
(OUTPUT.REPORT), as does `python -m plaintrain.report OUTPUT_DIR`.
"""

import os
import sys

from plaintrain.utils.arguments import build_parser


def main() -> None:
    """Run the command line."""
    parser = build_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs (OUTPUT_DIR)")
    parser.add_argument("--output", metavar="FILE", help="HTML file (default: report.html in the first RUN)")
    args = parser.parse_args()
    # Parse before the slow imports, so that --help and errors are instant.
    from plaintrain.report.build import build_report
    from plaintrain.utils.errors import UserError

    output = args.output or os.path.join(args.runs[0], "report.html")
    try:
        build_report(args.runs, output)
    except UserError as e:
        if args.debug:
            raise
        sys.exit(f"error: {e}")
    print(f"wrote the report on {', '.join(args.runs)} to {output} ({os.path.getsize(output) / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
