#!/usr/bin/env python
"""Convert a dataset of any format to COCO JSON or to YOLO text files.

python scripts/convert_dataset.py shapes_val --to coco --output DIR
python scripts/convert_dataset.py bccd_train --val bccd_val --to yolo --output DIR \\
    --config-file configs/BCCD/Base-BCCD.yaml

NAME is a built-in dataset, or one that DATASETS.DECLARE of the config declares. COCO: writes
DIR/annotations.json; `file_name` is relative to the common folder of the images, which is printed. YOLO:
writes DIR/data.yaml, labels/ and images/ with symbolic links. Generated images (the shapes datasets) are
written.
"""

import logging
import os
import shutil
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from plaintrain.analysis.command import load_tool_cfg
from plaintrain.data import DatasetCatalog, MetadataCatalog
from plaintrain.data.catalog import get_common_class_names
from plaintrain.data.datasets.shapes import is_drawn, render
from plaintrain.data.datasets.write import get_category_ids, get_relative_names, make_folder, write_coco
from plaintrain.data.datasets.yolo import get_label_file
from plaintrain.engine.launch import launch
from plaintrain.structures import BoxMode
from plaintrain.utils.arguments import build_parser
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import atomic_write
from plaintrain.utils.logger import build_progress_bar, setup_logger

logger = logging.getLogger("plaintrain")

# Annotations that YOLO's format cannot hold: description and replacement.
LOSSES = {
    "crowd": "crowd regions, skipped as in Ultralytics",
    "outside": "boxes without area inside their image, skipped",
    "clipped": "objects beyond the image border, clipped to it",
    "rle": "RLE masks, written as boxes",
    "polygons": "masks of several polygons, written as one polygon joined by zero-width lines",
    "keypoints": "objects with keypoints, written without them",
    "difficult": "objects marked difficult, written without the mark",
    "score": "objects with a score, written without it",
    "mixed": "label files with boxes and polygons, which Ultralytics misreads (--boxes writes boxes only)",
}


def get_image_names(records: list[dict[str, Any]]) -> list[str]:
    """Return a unique relative path per record: the file's, from the common folder of all."""
    files = [record["file_name"] for record in records if not is_drawn(record["file_name"])]
    name_of = dict(zip(files, get_relative_names(files)[1], strict=True))
    names = [name_of.get(record["file_name"], f"{record['image_id']}.png") for record in records]
    if len(set(names)) != len(names):
        raise UserError("two records have the same image file")
    return names


def place_image(record: dict[str, Any], target: str, copy: bool) -> None:
    """Write, copy or link the image of a record to `target`."""
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if is_drawn(record["file_name"]):
            Image.fromarray(render(record["file_name"])).save(target)
        elif copy:
            shutil.copyfile(record["file_name"], target)
        else:
            os.symlink(os.path.abspath(record["file_name"]), target)
    except OSError as e:
        hint = "" if copy else "; --copy-images copies instead of linking"
        raise UserError(f"cannot write {target} from {record['file_name']}: {e.strerror or e}{hint}") from e


def write_coco_dataset(
    records: list[dict[str, Any]], metadata: dict[str, Any], output: str, copy: bool
) -> None:
    """Write `annotations.json`, and the images if they are copied or generated."""
    files = []
    written = set()
    for record, name in zip(
        build_progress_bar(records, desc="images"), get_image_names(records), strict=True
    ):
        file = record["file_name"]
        if copy or is_drawn(file):
            file = os.path.join(output, "images", name)
            place_image(record, file, copy)
            written = {output}
        files.append(file)
    root, names = get_relative_names(files, *written)
    path = os.path.join(output, "annotations.json")
    write_coco(path, records, metadata, names)
    logger.info(f"{path}: {_format_size(records)}; load it with FORMAT coco, IMAGE_ROOT {root}")


def write_yolo_dataset(
    splits: dict[str, list[dict[str, Any]]], metadata: dict[str, Any], output: str, args: Namespace
) -> None:
    """Write the images and labels of every split, and `data.yaml` last."""
    losses: Counter[str] = Counter()
    ids = get_category_ids(metadata)
    if ids != list(range(1, len(ids) + 1)):
        logger.info(f"category ids {ids} become 0 to {len(ids) - 1}")
    data: dict[str, Any] = {}
    for split, records in splits.items():
        data[split] = f"images/{split}"
        for record, name in zip(
            build_progress_bar(records, desc=split), get_image_names(records), strict=True
        ):
            target = os.path.join(output, "images", split, name)
            path = get_label_file(target)
            if os.path.exists(path):
                raise UserError(f"{record['file_name']} and another image have the same label file {path}")
            place_image(record, target, args.copy_images)
            lines = [
                line for a in record["annotations"] if (line := format_label(a, record, args.boxes, losses))
            ]
            losses["mixed"] += len({line.count(" ") == 4 for line in lines}) > 1
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        logger.info(f"{split}: {_format_size(records)}")
    data["names"] = dict(enumerate(metadata["thing_classes"]))
    with atomic_write(os.path.join(output, "data.yaml")) as f:
        yaml.safe_dump(data, f, sort_keys=False, allow_unicode=True)
    for key, description in LOSSES.items():
        if losses[key]:
            logger.warning(f"{description}: {losses[key]}")
    if "val" not in splits:
        logger.info("data.yaml has no val split, which Ultralytics needs to train; --val NAME adds one")


def format_label(
    annotation: dict[str, Any], record: dict[str, Any], boxes: bool, losses: Counter[str]
) -> str | None:
    """Return `class cx cy w h` or `class x y x y ...`, relative to the image size; None if skipped."""
    if annotation.get("iscrowd"):
        losses["crowd"] += 1
        return None
    width = record["width"]
    height = record["height"]
    x0, y0, x1, y1 = box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    clipped = [max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)]
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        losses["outside"] += 1
        return None
    for key in ("keypoints", "difficult", "score"):
        losses[key] += bool(annotation.get(key))
    segmentation = None if boxes else annotation.get("segmentation")
    losses["rle"] += isinstance(segmentation, dict)
    if isinstance(segmentation, list | tuple) and segmentation:
        losses["polygons"] += len(segmentation) > 1
        unclipped = [
            c / size
            for point in _join_polygons(segmentation)
            for c, size in zip(point, (width, height), strict=True)
        ]
        values = [min(max(value, 0), 1) for value in unclipped]
        losses["clipped"] += values != unclipped
    else:
        losses["clipped"] += clipped != box
        x0, y0, x1, y1 = clipped
        values = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
    # Ten digits keep a thousandth of a pixel of the largest images.
    return " ".join([str(annotation["category_id"]), *(f"{value:.10g}" for value in values)])


def _join_polygons(polygons):
    """Return the points (x, y) of one polygon around all polygons."""
    first, *others = [list(zip(p[::2], p[1::2], strict=True)) for p in polygons]
    # From the start to each other polygon, around it, and the same way back.
    outline = first + [point for other in others for point in (first[0], *other, other[0])]
    return [*outline, first[0]] if others else outline


def _format_size(records):
    return f"{len(records)} images, {sum(len(r['annotations']) for r in records)} annotations"


def main(args: Namespace) -> None:
    """Convert the dataset."""
    setup_logger()
    load_tool_cfg(args)
    names = {"train": args.name, "val": args.val, "test": args.test}
    names = {split: name for split, name in names.items() if name}
    get_common_class_names(list(names.values()))
    splits = {split: list(DatasetCatalog.get(name)) for split, name in names.items()}
    metadata = vars(MetadataCatalog.get(args.name))
    make_folder(args.output)
    if args.to == "coco":
        write_coco_dataset(splits["train"], metadata, args.output, args.copy_images)
    else:
        write_yolo_dataset(splits, metadata, args.output, args)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = build_parser(__doc__, "YAML config that declares NAME")
    parser.add_argument("name", metavar="NAME", help="dataset to convert")
    parser.add_argument("words", nargs="*", metavar="KEY VALUE", help="config overrides")
    parser.add_argument("--to", required=True, choices=("coco", "yolo"))
    parser.add_argument("--output", required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument("--copy-images", action="store_true", help="copy the images too")
    parser.add_argument("--boxes", action="store_true", help="YOLO: boxes only, no polygons")
    parser.add_argument("--val", metavar="NAME", help="YOLO: another dataset, as split val")
    parser.add_argument("--test", metavar="NAME", help="YOLO: another dataset, as split test")
    args = parser.parse_intermixed_args(argv)
    args.opts = args.words
    if args.to == "coco" and (args.val or args.test or args.boxes):
        parser.error("--val, --test and --boxes need --to yolo; COCO takes one dataset at a time")
    return args


if __name__ == "__main__":
    arguments = parse_args()
    sys.exit(launch(main, args=(arguments,)))
