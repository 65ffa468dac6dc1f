#!/usr/bin/env python
"""Make one HTML file that shows a run, or compares several.

python scripts/report.py output/quickstart
python scripts/report.py output/a output/b --output compared.html

It is `python -m plaintrain.report`, which a training starts at its end (OUTPUT.REPORT).
"""

from plaintrain.report.__main__ import main

if __name__ == "__main__":
    main()
