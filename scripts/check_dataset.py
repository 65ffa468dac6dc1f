#!/usr/bin/env python
"""Check datasets for errors in annotations and images before training.

python scripts/check_dataset.py shapes_val
python scripts/check_dataset.py bccd_train bccd_val --config-file configs/BCCD/Base-BCCD.yaml
python scripts/check_dataset.py my_train --config-file my.yaml --fix DIR

Decodes every image, with the config's INPUT.PIXEL_RANGE. --fix writes a cleaned copy as DIR/annotations.json
(DIR/NAME/annotations.json for several datasets), which refers to the original images; the original is never
changed. Annotations that cannot be fixed without guessing are dropped and listed.

Exit code (of the original dataset): 0 if training would work, 1 if not (findings marked FATAL, or an
unreadable annotation file), 2 for a wrong command line.
"""

import functools
import hashlib
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from plaintrain.analysis.command import load_tool_cfg
from plaintrain.data import DatasetCatalog
from plaintrain.data.datasets.builtin import read_dataset
from plaintrain.data.datasets.shapes import is_drawn
from plaintrain.data.datasets.write import get_relative_names, make_folder, write_coco
from plaintrain.data.fixes import fix_records
from plaintrain.data.image_files import read_image_header
from plaintrain.data.images import get_pixel_range, read_image
from plaintrain.data.validation import (
    LEAST_SPREAD,
    MAX_EXAMPLES,
    PROBLEM_TYPES,
    Finding,
    Problem,
    check_problems,
    check_records,
    count_classes,
    count_problems,
)
from plaintrain.engine.launch import launch
from plaintrain.evaluation.predictions import write_json
from plaintrain.utils.arguments import add_renamed_argument, build_parser
from plaintrain.utils.errors import UserError
from plaintrain.utils.logger import build_progress_bar


def inspect_image(record: dict[str, Any], pixel_range: Sequence[float]) -> dict[str, Any]:
    """Return {error, kind} or {size: (height, width), turned, pixels: a hash, spread} of an image file."""
    try:
        image = read_image(record["file_name"], pixel_range)
        turned = not is_drawn(record["file_name"]) and read_image_header(record["file_name"])[2] > 1
    except UserError as e:
        return {"error": str(e), "kind": getattr(e, "error_type", "unreadable")}
    size = tuple(image.shape[-2:])
    pixels = hashlib.blake2b(image.contiguous().numpy().data, digest_size=16, key=repr(size).encode())
    spread = int((image.amax((1, 2)).int() - image.amin((1, 2)).int()).max())
    return {"size": size, "turned": turned, "pixels": pixels.hexdigest(), "spread": spread}


def iterate_problems(
    dataset: str, records: list[dict[str, Any]], images: list[dict[str, Any]], earlier: dict[str, str]
) -> Iterator[Problem]:
    """Yield (problem type, example) for inspected images; `earlier` is {pixels: image} of other datasets."""
    first: dict[str, str] = {}
    files = set()
    for record, image in zip(records, images, strict=True):
        name = record["file_name"]
        if "error" in image:
            yield image["kind"], image["error"]
            continue
        height, width = image["size"]
        if (height, width) != (record["height"], record["width"]):
            expected = f"{record['width']}x{record['height']}"
            yield "wrong_size", f"{name}: is {width}x{height}, its record says {expected}"
        if image["turned"]:
            yield "turned", name
        if image["spread"] < LEAST_SPREAD:
            yield "near_constant", f"{name}: {image['spread'] + 1} values"
        other = first.setdefault(image["pixels"], name)
        if os.path.realpath(name) in files:
            yield "listed_twice", name
        elif other != name:
            yield "duplicate", f"{name} equals {other}"
        elif image["pixels"] in earlier:
            yield "leak", f"{name} equals {earlier[image['pixels']]}"
        files.add(os.path.realpath(name))
    for pixels, name in first.items():
        earlier.setdefault(pixels, f"{name} of {dataset}")


def write_fixed(
    folder: str,
    records: list[dict[str, Any]],
    images: list[dict[str, Any]],
    metadata: dict[str, Any],
    problems: list[UserError],
) -> None:
    """Write the cleaned copy of a dataset and print the changes."""
    if any(is_drawn(record["file_name"]) for record in records):
        print("  no cleaned copy: the images are generated, not read from files")
        return
    records, changes = fix_records(records, images, metadata)
    for error in problems:
        problem_type = getattr(error, "error_type", "broken")
        action = "renumbered" if problem_type == "duplicate_id" else "dropped"
        changes[f"{action} while reading: {PROBLEM_TYPES[problem_type][0]}"].append("")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "annotations.json")
    root, names = get_relative_names(record["file_name"] for record in records)
    write_coco(path, records, metadata, names)
    print(f"  cleaned copy: {path} (FORMAT coco, IMAGE_ROOT {root}), {len(records)} images")
    for text, lines in changes.items():
        print(f"    {text}: {len(lines)}")
        for line in list(filter(None, lines))[:MAX_EXAMPLES]:
            print(f"        {line}")
    if not changes:
        print("    no changes")


def print_findings(
    name: str, records: list[dict[str, Any]], metadata: dict[str, Any], findings: list[Finding]
) -> None:
    """Print the class counts and the findings of a dataset."""
    num_boxes = sum(len(record["annotations"]) for record in records)
    print(f"{name}: {len(records)} images, {num_boxes} boxes")
    counts = count_classes(records, metadata)
    width = max(map(len, counts), default=0)
    for class_name, count in counts.items():
        print(f"    {class_name:<{width}}  {count:>8}")
    for finding in findings:
        print("  " + str(finding).replace("\n", "\n  "))
    if not findings:
        print("  no problems")


def main(args: Namespace) -> int:
    """Check each dataset, write the cleaned copies, and return the exit code."""
    findings = {}
    earlier: dict[str, str] = {}
    for name in args.names:
        problems: list[UserError] = []
        records, metadata = read_dataset(name, problems)
        with ThreadPoolExecutor(args.workers) as pool:
            inspected = pool.map(functools.partial(inspect_image, pixel_range=args.pixel_range), records)
            images = list(build_progress_bar(inspected, desc="images", total=len(records)))
        findings[name] = check_problems(problems) + check_records(records, metadata)
        findings[name] += count_problems(iterate_problems(name, records, images, earlier))
        print_findings(name, records, metadata, findings[name])
        if args.fix:
            folder = args.fix if len(args.names) == 1 else os.path.join(args.fix, name)
            write_fixed(folder, records, images, metadata, problems)
    if args.output:
        plain = {
            name: [
                {"kind": f.type, "count": f.count, "examples": f.examples, "fatal": f.fatal}
                | {"text": PROBLEM_TYPES[f.type][0]}
                for f in dataset_findings
            ]
            for name, dataset_findings in findings.items()
        }
        write_json(args.output, plain, indent=1)
    fatal = [name for name in findings if any(finding.fatal for finding in findings[name])]
    verdict = f"training would stop at the FATAL findings of {', '.join(fatal)}"
    print(f"{verdict if fatal else 'training would work'}{' (on the original)' if args.fix else ''}")
    return 1 if fatal else 0


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line, and check the names and the folder."""
    parser = build_parser(__doc__, "YAML config with DATASETS.DECLARE")
    parser.add_argument("names", nargs="+", metavar="NAME", help="built-in or declared datasets")
    parser.add_argument("--fix", metavar="DIR", help="write a cleaned copy to a new or empty folder")
    add_renamed_argument(parser, "--output", "--json", metavar="FILE", help="also write the findings as JSON")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="threads (default: CPU cores)"
    )
    args = parser.parse_args(argv)
    try:
        args.pixel_range = get_pixel_range(load_tool_cfg(args))
        for name in args.names:
            if name not in DatasetCatalog:
                DatasetCatalog.get(name)
        if args.fix:
            make_folder(args.fix)
    except UserError as e:
        parser.error(str(e))
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if len(set(args.names)) != len(args.names):
        parser.error("each NAME must be given once")
    return args


if __name__ == "__main__":
    arguments = parse_args()
    sys.exit(launch(main, args=(arguments,)))
