"""Make one HTML file that shows a run, or compares several.

python scripts/report.py output/quickstart
python scripts/report.py output/a output/b --output compared.html

The file needs no network and no other file: it can be sent by mail. It also shows a run that goes on. What
depends on images or on predictions that are missing is skipped, and it says why. A training makes
RUN/report.html at its end (OUTPUT.REPORT), as `python -m plaintrain.report RUN` does.
"""

import os
import sys

from plaintrain.utils.arguments import build_parser


def main():
    """Make the file."""
    parser = build_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs (OUTPUT_DIR)")
    parser.add_argument("--output", metavar="FILE", help="default: report.html in the first RUN")
    args = parser.parse_args()
    # --help and a wrong flag are answered before the imports that take seconds.
    from plaintrain.report.build import build_report
    from plaintrain.utils.errors import UserError

    output = args.output or os.path.join(args.runs[0], "report.html")
    try:
        build_report(args.runs, output)
    except UserError as e:
        if args.debug:
            raise
        sys.exit(f"error: {e}")
    print(f"the report of {', '.join(args.runs)} is in {output} ({os.path.getsize(output) / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
