"""Baselines of the benchmarks, one module each."""

import argparse


def parse_start_args() -> argparse.Namespace:
    """Parse the command line of a start-up run: COCO file, image folder and sizes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("json")
    parser.add_argument("root")
    for option in ("--size", "--batch", "--depth"):
        parser.add_argument(option, type=int, required=True)
    return parser.parse_args()
