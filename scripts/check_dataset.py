#!/usr/bin/env python
"""Check datasets for errors in annotations and images before training.

python scripts/check_dataset.py shapes_val
python scripts/check_dataset.py bccd_train bccd_val --config-file configs/BCCD/Base-BCCD.yaml
python scripts/check_dataset.py my_train --config-file my.yaml --fix DIR

Decodes every image, with the config's INPUT.PIXEL_RANGE. --fix writes a cleaned copy to DIR (DIR/NAME for
several datasets), annotations.json, which refers to the original images, and changes.txt, a list of all
changes. Annotations that cannot be fixed without guessing are dropped. Exit code (of the original dataset): 0
if training would work, 1 if not (FATAL findings, or an unreadable file), 2 for a wrong command line.
"""

import functools
import math
import os
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import yaml

from plaintrain.analysis.command import load_tool_cfg
from plaintrain.data import DatasetCatalog, validation
from plaintrain.data.datasets import write
from plaintrain.data.datasets.builtin import read_dataset
from plaintrain.data.datasets.shapes import is_drawn
from plaintrain.data.image_files import read_image_header
from plaintrain.data.images import get_pixel_range, inspect_image
from plaintrain.data.validation import MAX_EXAMPLES, PROBLEM_TYPES, Finding
from plaintrain.engine.launch import launch
from plaintrain.evaluation.predictions import write_json
from plaintrain.structures import BoxMode, find_segmentation_problem
from plaintrain.utils.arguments import add_renamed_argument, build_parser
from plaintrain.utils.errors import UserError
from plaintrain.utils.logger import build_progress_bar

# Annotations with these problems are dropped; others only lose the invalid field.
_DROPPED = {"broken", "unknown_class", "bad_box", "normalized_box", "empty_box", "outside_box"}
_INVALID_FIELDS = (
    ("wrong_area", "area", "wrong areas replaced by that of the mask or the box"),
    ("bad_rle", "segmentation", "malformed run-length encodings dropped, their boxes kept"),
    ("wrong_keypoints", "keypoints", "invalid keypoints dropped, their boxes kept"),
)


def _fix_records(records, images, metadata):
    """Fix images and annotations; return the records, and {change: the images or objects it was made in}.

    Annotations of an image that was resized by one factor are scaled, those of the stored pixels of an image
    with an EXIF orientation rotated; other images with a wrong size are excluded. The objects of a file that
    is listed several times are merged. A copy with another name is dropped if the objects of one of the two
    are a subset of the other's. `images` are the results of `inspect_image`.
    """
    num_classes = len(metadata["thing_classes"])
    suspects = defaultdict(set)
    for problem_type, annotation, _ in validation.iterate_record_contradictions(records, num_classes):
        suspects[id(annotation)].add(problem_type)
    kept = []
    same_pixels = defaultdict(list)
    changes = defaultdict(list)
    for original, image in zip(records, images, strict=True):
        record = _fix_image(original, image, metadata, suspects, changes)
        if record is None:
            continue
        others = same_pixels[image["pixels"]]
        if not any(_merge(record, other, changes) for other in others):
            if others:
                text = "images with equal pixels but different objects, both kept: choose one by hand"
                changes[text].append(f"{record['file_name']} and {others[0]['file_name']}")
            others.append(record)
            kept.append(record)
    for problem_type, _, text in validation.iterate_record_contradictions(kept, num_classes):
        changes[f"kept, choose by hand: {PROBLEM_TYPES[problem_type][0]}"].append(text)
    return kept, changes


def _fix_image(record, image, metadata, suspects, changes):
    """Return the record with the size of its image and fixed annotations, or None to exclude it."""
    if "error" in image:
        changes[f"excluded: {PROBLEM_TYPES[image['kind']][0]}"].append(image["error"])
        return None
    old = record["height"], record["width"]
    new = tuple(image["size"])
    orientation = read_image_header(record["file_name"])[2] if image["turned"] else 1
    turned = orientation >= 5 and write.is_scaled(record, old[::-1], new)
    turned &= old != new and (old[::-1] == new or not write.is_scaled(record, old, new))
    upright = old[::-1] if turned else old
    resized = max(abs(new[0] - upright[0]), abs(new[1] - upright[1])) > 1
    sizes = f"{record['file_name']}: {new[1]}x{new[0]}, its record says {old[1]}x{old[0]}"
    if upright[::-1] == new != upright or (resized and not write.is_scaled(record, upright, new)):
        changes["excluded: rotated or cropped images, whose annotations have another shape"].append(sizes)
        return None
    if not resized:
        if new != upright:
            changes["image sizes corrected by a pixel"].append(sizes)
        old = new[::-1] if turned else new
    record = {**record, "height": old[0], "width": old[1]}
    annotations = before = _fix_annotations(record, metadata, suspects, changes)
    if turned:
        changes["annotations of stored pixels rotated as the EXIF orientation says"].append(sizes)
        annotations = [write.rotate_annotation(a, old, orientation) for a in annotations]
        old = old[::-1]
    elif 1 < orientation < 5 or (orientation > 1 and old[0] == old[1]):
        text = "kept, check by hand: EXIF orientations of which the size does not tell if they were applied"
        changes[text].append(record["file_name"])
    if resized:
        changes["images resized after annotation, their annotations scaled"].append(sizes)
        annotations = [write.scale_annotation(a, old, new) for a in annotations]
    if turned or resized:
        boxes = zip(*([_get_identity(a)[2] for a in both] for both in (before, annotations)), strict=True)
        changes["boxes scaled or rotated"] += [f"{record['file_name']}: {old} -> {new}" for old, new in boxes]
    return {**record, "height": new[0], "width": new[1], "annotations": annotations}


def _fix_annotations(record, metadata, suspects, changes):
    """Return the annotations without invalid fields, and without those to drop."""
    names = dict(enumerate(map(str, metadata["thing_classes"])))
    kept = {}
    for index, original in enumerate(record["annotations"], 1):
        types = {key for key, _ in validation.iterate_annotation_problems(original, record, metadata)}
        types |= suspects[id(original)]
        text = f"{record['file_name']}: object {index}, "
        text += f"{names.get(original.get('category_id'), 'unknown')} {original.get('bbox')}"
        dropped = [key for key in PROBLEM_TYPES if key in types & _DROPPED]
        if dropped:
            changes[f"annotations dropped: {PROBLEM_TYPES[dropped[0]][0].split(',')[0]}"].append(text)
            continue
        annotation, changed = _fix_annotation(original, types, record)
        if annotation["bbox"] is not original["bbox"]:
            text += f" -> {annotation['bbox']}"
        identity = str([_get_identity(annotation), *map(annotation.get, ("segmentation", "keypoints"))])
        if identity in kept:
            changed = ["exact duplicates of objects dropped"]
        kept.setdefault(identity, annotation)
        for change in changed:
            changes[change].append(text)
    return list(kept.values())


def _fix_annotation(annotation, problems, record):
    """Return the annotation without its invalid fields, and the changes."""
    changed = []
    annotation = dict(annotation)
    if "clipped_box" in problems:
        x0, y0, x1, y1 = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        clipped = [max(x0, 0), max(y0, 0), min(x1, record["width"]), min(y1, record["height"])]
        annotation |= {"bbox": clipped, "bbox_mode": BoxMode.XYXY_ABS}
        changed.append("boxes clipped to their image")
    for problem, key, text in _INVALID_FIELDS:
        if problem in problems:
            del annotation[key]
            changed.append(text)
    if "bad_polygon" in problems:
        size = record["height"], record["width"]
        polygons = [p for p in annotation.pop("segmentation") if not find_segmentation_problem([p], *size)]
        if polygons:
            annotation["segmentation"] = polygons
        changed.append("invalid polygons dropped, their boxes kept")
    return annotation, changed


def _merge(record, other, changes):
    """Merge a record into another with equal pixels and objects; return False if the objects differ."""
    is_listed_twice = os.path.realpath(record["file_name"]) == os.path.realpath(other["file_name"])
    objects, more = ({_get_identity(a): a for a in r["annotations"]} for r in (other, record))
    if not (is_listed_twice or objects.keys() <= more.keys() or more.keys() <= objects.keys()):
        return False
    for identity, annotation in more.items():
        if identity in objects:
            # One record may have the boxes, the other their masks.
            objects[identity].update({**annotation, **objects[identity]})
        else:
            other["annotations"].append(annotation)
            changes["objects added to another entry or copy"].append(f"{other['file_name']}: {identity[2]}")
    text = "copies of images dropped, whose objects are equal or a subset"
    if is_listed_twice:
        text = "repeated entries of a file dropped, their objects merged"
    changes[text].append(" and ".join(dict.fromkeys([record["file_name"], other["file_name"]])))
    return True


def _get_identity(annotation):
    """Return class, crowd and rounded box, which are equal if an object is annotated twice."""
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    rounded = tuple(round(side, 2) for side in box)
    return annotation["category_id"], int(annotation.get("iscrowd") or 0), rounded


def _write_fixed(name, folder, records, images, metadata, problems):
    """Write the cleaned copy of a dataset and print the changes."""
    if any(is_drawn(record["file_name"]) for record in records):
        print("  no cleaned copy: the images are generated, not read from files")
        return
    records, changes = _fix_records(records, images, metadata)
    for error in problems:
        problem_type = getattr(error, "error_type", "broken")
        action = "renumbered" if problem_type == "duplicate_id" else "dropped"
        changes[f"{action} while reading: {PROBLEM_TYPES[problem_type][0]}"].append(str(error))
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "annotations.json")
    root, names = write.get_relative_names(record["file_name"] for record in records)
    write.write_coco(path, records, metadata, names)
    with open(os.path.join(folder, "changes.txt"), "w", encoding="utf-8") as f:
        f.writelines(f"{text}: {line}\n" for text, lines in changes.items() for line in lines)
    print(f"  cleaned copy: {path}, {len(records)} images; changes.txt beside it lists all changes")
    spec = {"FORMAT": "coco", "JSON": os.path.abspath(path), "IMAGE_ROOT": root}
    spec |= {"CLASSES": list(metadata["thing_classes"]), "EVALUATOR": metadata.get("evaluator_type", "coco")}
    if metadata.get("keypoint_flip_map") is not None:
        spec["KEYPOINT_FLIP_MAP"] = [list(pair) for pair in metadata["keypoint_flip_map"]]
    line = yaml.safe_dump({f"{name}_fixed": spec}, default_flow_style=True, width=math.inf, sort_keys=False)
    print(f"  paste under DATASETS.DECLARE:\n    {line.strip()[1:-1]}")
    for text, lines in changes.items():
        print("\n        ".join([f"    {text}: {len(lines)}", *lines[:MAX_EXAMPLES]]))
    if not changes:
        print("    no changes")


def _print_findings(name, records, metadata, findings):
    """Print the class counts and the findings of a dataset."""
    print(f"{name}: {len(records)} images, {sum(len(r['annotations']) for r in records)} boxes")
    counts = validation.count_classes(records, metadata)
    width = max(map(len, counts), default=0)
    for class_name, count in counts.items():
        print(f"    {class_name:<{width}}  {count:>8}")
    for finding in findings:
        print("  " + str(finding).replace("\n", "\n  "))
    if not findings:
        print("  no problems")


def check_dataset(name: str, args: Namespace, earlier: dict[str, str]) -> list[Finding]:
    """Print and return the findings, and write the cleaned copy; `earlier` is that of `check_images`."""
    if name in args.problems:
        raise args.problems[name]
    problems: list[UserError] = []
    records, metadata = read_dataset(name, problems)
    with ThreadPoolExecutor(args.workers) as pool:
        inspected = pool.map(functools.partial(inspect_image, pixel_range=args.pixel_range), records)
        images = list(build_progress_bar(inspected, desc="images", total=len(records)))
    findings = validation.check_problems(problems) + validation.check_records(records, metadata)
    findings += validation.check_images(records, images, name, earlier)
    _print_findings(name, records, metadata, findings)
    if args.fix:
        folder = args.fix if len(args.names) == 1 else os.path.join(args.fix, name)
        _write_fixed(name, folder, records, images, metadata, problems)
    return findings


def main(args: Namespace) -> int:
    """Check each dataset, also after one that cannot be read, and return the exit code."""
    findings = {}
    earlier: dict[str, str] = {}
    for name in args.names:
        try:
            findings[name] = check_dataset(name, args, earlier)
        except UserError as e:
            print(f"{name}: error: {e}")
            findings[name] = validation.count_problems([("unreadable_dataset", str(e))])
    if args.output:
        plain = {
            name: [{**vars(f), "kind": f.type, "text": PROBLEM_TYPES[f.type][0]} for f in of_dataset]
            for name, of_dataset in findings.items()
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
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: all)")
    args = parser.parse_args(argv)
    try:
        args.problems = {}
        args.pixel_range = get_pixel_range(load_tool_cfg(args, args.problems))
        for name in args.names:
            if name not in DatasetCatalog and name not in args.problems:
                DatasetCatalog.get(name)
        if args.fix:
            write.make_folder(args.fix)
    except UserError as e:
        parser.error(str(e))
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if len(set(args.names)) != len(args.names):
        parser.error("each NAME must be given once")
    return args


if __name__ == "__main__":
    sys.exit(launch(main, args=(parse_args(),)))
