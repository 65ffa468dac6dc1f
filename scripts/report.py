#!/usr/bin/env python
"""Write an HTML report on a run, or a comparison of several runs.

python scripts/report.py output/quickstart
python scripts/report.py output/a output/b --output compared.html

The same as `python -m plaintrain.report`. Training writes a report at its end (OUTPUT.REPORT).
"""

from plaintrain.report.__main__ import main

if __name__ == "__main__":
    main()
