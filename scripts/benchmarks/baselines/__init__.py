"""What plaintrain is measured against: a file for each, imported by the benchmarks that measure it."""

import argparse


def parse_start_args():
    """The command line of a start: a COCO file, the folder of its images, and the sizes of the problem."""
    parser = argparse.ArgumentParser()
    parser.add_argument("json")
    parser.add_argument("root")
    for option in ("--size", "--batch", "--depth"):
        parser.add_argument(option, type=int, required=True)
    return parser.parse_args()
