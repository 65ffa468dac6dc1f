#!/usr/bin/env python
"""Say what is wrong with datasets, in plain words, before training does.

python scripts/check_dataset.py shapes_val
python scripts/check_dataset.py bccd_train bccd_val --config-file configs/BCCD/Base-BCCD.yaml
python scripts/check_dataset.py my_train --config-file my.yaml --fix DIR

Opens every image, its pixels converted as INPUT.PIXEL_RANGE of the config says. --fix writes a cleaned copy
as DIR/annotations.json (DIR/NAME/annotations.json for several datasets), which refers to the original images;
the original is never changed. What cannot be fixed without guessing is excluded and named.

Exit code, of the original: 0 training would work, 1 it would not (findings marked FATAL, or a file that
cannot be read at all), 2 a mistake in the command line.
"""

import functools
import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor

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
    check_problems,
    check_records,
    count_classes,
    count_problems,
)
from plaintrain.engine.launch import launch
from plaintrain.evaluation.predictions import write_json
from plaintrain.utils.arguments import build_parser
from plaintrain.utils.errors import UserError
from plaintrain.utils.logger import build_progress_bar


def look_at(record, pixel_range):
    """What an image file is: {error, kind} or {size: (height, width), turned, pixels: a hash, spread}."""
    try:
        image = read_image(record["file_name"], pixel_range)
        turned = not is_drawn(record["file_name"]) and read_image_header(record["file_name"])[2] > 1
    except UserError as e:
        return {"error": str(e), "kind": getattr(e, "error_type", "unreadable")}
    size = tuple(image.shape[-2:])
    pixels = hashlib.blake2b(image.contiguous().numpy(), digest_size=16, key=repr(size).encode())
    spread = int((image.amax((1, 2)).int() - image.amin((1, 2)).int()).max())
    return {"size": size, "turned": turned, "pixels": pixels.hexdigest(), "spread": spread}


def image_mistakes(dataset, records, looks, earlier):
    """Yield (kind, example) for images of a dataset; `earlier` holds {pixels: image} of those before."""
    first, files = {}, set()
    for record, look in zip(records, looks, strict=True):
        name = record["file_name"]
        if "error" in look:
            yield look["kind"], look["error"]
            continue
        height, width = look["size"]
        if (height, width) != (record["height"], record["width"]):
            said = f"{record['width']}x{record['height']}"
            yield "wrong_size", f"{name}: is {width}x{height}, its record says {said}"
        if look["turned"]:
            yield "turned", name
        if look["spread"] < LEAST_SPREAD:
            yield "near_constant", f"{name}: {look['spread'] + 1} values"
        other = first.setdefault(look["pixels"], name)
        if os.path.realpath(name) in files:
            yield "listed_twice", name
        elif other != name:
            yield "duplicate", f"{name} is as {other}"
        elif look["pixels"] in earlier:
            yield "leak", f"{name} is as {earlier[look['pixels']]}"
        files.add(os.path.realpath(name))
    for pixels, name in first.items():
        earlier.setdefault(pixels, f"{name} of {dataset}")


def write_fixed(folder, records, looks, metadata, problems):
    """Write the cleaned copy of a dataset and say what was changed."""
    if any(is_drawn(record["file_name"]) for record in records):
        print("  no cleaned copy: its images are drawn, not read from files")
        return
    records, changes = fix_records(records, looks, metadata)
    for error in problems:
        kind = getattr(error, "error_type", "broken")
        what = "renumbered" if kind == "duplicate_id" else "dropped"
        changes[f"{what} while reading: {PROBLEM_TYPES[kind][0]}"].append("")
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
        print("    nothing had to be changed")


def report(name, records, metadata, findings):
    """Print what was found in one dataset."""
    boxes = sum(len(record["annotations"]) for record in records)
    print(f"{name}: {len(records)} images, {boxes} boxes")
    counts = count_classes(records, metadata)
    width = max(map(len, counts), default=0)
    for class_name, count in counts.items():
        print(f"    {class_name:<{width}}  {count:>8}")
    for finding in findings:
        print("  " + str(finding).replace("\n", "\n  "))
    if not findings:
        print("  nothing is wrong with it")


def main(args):
    """Check, say it, and mend if asked to; the exit code."""
    found, earlier = {}, {}
    for name in args.names:
        problems = []
        records, metadata = read_dataset(name, problems)
        # Decoding and hashing run beside each other.
        with ThreadPoolExecutor(args.workers) as pool:
            looks = pool.map(functools.partial(look_at, pixel_range=args.pixel_range), records)
            looks = list(build_progress_bar(looks, desc="images", total=len(records)))
        found[name] = check_problems(problems) + check_records(records, metadata)
        found[name] += count_problems(image_mistakes(name, records, looks, earlier))
        report(name, records, metadata, found[name])
        if args.fix:
            folder = args.fix if len(args.names) == 1 else os.path.join(args.fix, name)
            write_fixed(folder, records, looks, metadata, problems)
    if args.json:
        plain = {
            name: [
                {"kind": f.type, "count": f.count, "examples": f.examples, "fatal": f.fatal}
                | {"text": PROBLEM_TYPES[f.type][0]}
                for f in findings
            ]
            for name, findings in found.items()
        }
        write_json(args.json, plain, indent=1)
    fatal = [name for name, findings in found.items() if any(finding.fatal for finding in findings)]
    verdict = (
        f"training would stop at the FATAL findings of {', '.join(fatal)}" if fatal else "training would work"
    )
    print(f"{verdict}{' (on the original)' if args.fix else ''}")
    return 1 if fatal else 0


def parse_args(argv=None):
    """The command line, its names and folder checked: mistakes in them exit with code 2."""
    parser = build_parser(__doc__, "YAML config with DATASETS.DECLARE")
    parser.add_argument("names", nargs="+", metavar="NAME", help="built-in or declared datasets")
    parser.add_argument("--fix", metavar="DIR", help="write a cleaned copy into this new or empty folder")
    parser.add_argument("--json", metavar="FILE", help="write the findings to this file too")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="images read at a time")
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
    if args.workers < 1 or len(set(args.names)) != len(args.names):
        parser.error("--workers is at least 1, and each NAME is given once")
    return args


if __name__ == "__main__":
    arguments = parse_args()
    sys.exit(launch(main, args=(arguments,)))
