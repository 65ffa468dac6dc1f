#!/usr/bin/env python
"""Convert a dataset of any format to COCO JSON or to YOLO's text files.

python scripts/convert_dataset.py shapes_val --to coco --output DIR
python scripts/convert_dataset.py bccd_train --val bccd_val --to yolo --output DIR \\
    --config-file configs/BCCD/Base-BCCD.yaml

NAME is a built-in dataset, or one that DATASETS.DECLARE of the config declares. COCO: writes
DIR/annotations.json; images are referred to by their path from a folder that holds them all, which is
said. YOLO: writes DIR/data.yaml, labels/ and images/, which holds links. Images of the shapes set are
drawn and written.
"""

import logging
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

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

# What YOLO's labels cannot say, and what is written instead.
LOST = {
    "crowd": "crowd regions, left out as Ultralytics does",
    "outside": "boxes without area inside their image, left out",
    "clipped": "objects that reach beyond their image, clipped to it",
    "rle": "masks given as run-length encoding, written as boxes",
    "parts": "masks of several polygons, written as one outline joined by lines without width",
    "keypoints": "objects with keypoints, which are left out",
    "difficult": "objects marked difficult, which is left out",
    "score": "objects with a score, which is left out",
    "mixed": "label files with boxes and polygons, which Ultralytics misreads (--boxes writes boxes only)",
}


def image_names(records):
    """For each record a path below one folder, no two the same: the files' own, from where they part."""
    files = [record["file_name"] for record in records if not is_drawn(record["file_name"])]
    name_of = dict(zip(files, get_relative_names(files)[1], strict=True))
    names = [name_of.get(record["file_name"], f"{record['image_id']}.png") for record in records]
    if len(set(names)) != len(names):
        raise UserError("two records have the same image file: each may be there once only")
    return names


def put_image(record, target, copy):
    """Write, copy or link a record's image at `target`."""
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
        raise UserError(f"cannot put {record['file_name']} at {target}: {e.strerror or e}{hint}") from e


def to_coco(records, metadata, output, copy):
    """Write `annotations.json`, and the images that are to be copied or drawn."""
    files, written = [], set()
    for record, name in zip(build_progress_bar(records, desc="images"), image_names(records), strict=True):
        file = record["file_name"]
        if copy or is_drawn(file):
            file = os.path.join(output, "images", name)
            put_image(record, file, copy)
            written = {output}
        files.append(file)
    root, names = get_relative_names(files, *written)
    path = os.path.join(output, "annotations.json")
    write_coco(path, records, metadata, names)
    logger.info(f"{path}: {_size(records)}; read it with FORMAT coco, IMAGE_ROOT {root}")


def to_yolo(splits, metadata, output, args):
    """Write the images and labels of every split, and `data.yaml` last."""
    lost = Counter()
    ids = get_category_ids(metadata)
    if ids != list(range(1, len(ids) + 1)):
        logger.info(f"category ids {ids} become 0 to {len(ids) - 1}")
    data = {}
    for split, records in splits.items():
        data[split] = f"images/{split}"
        for record, name in zip(build_progress_bar(records, desc=split), image_names(records), strict=True):
            target = os.path.join(output, "images", split, name)
            path = get_label_file(target)
            if os.path.exists(path):
                raise UserError(f"{record['file_name']} and another image would share the labels {path}")
            put_image(record, target, args.copy_images)
            lines = [line for a in record["annotations"] if (line := label_line(a, record, args.boxes, lost))]
            lost["mixed"] += len({line.count(" ") == 4 for line in lines}) > 1
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        logger.info(f"{split}: {_size(records)}")
    data["names"] = dict(enumerate(metadata["thing_classes"]))
    with atomic_write(os.path.join(output, "data.yaml")) as f:
        yaml.safe_dump(data, f, sort_keys=False, allow_unicode=True)
    for kind, text in LOST.items():
        if lost[kind]:
            logger.warning(f"{text}: {lost[kind]}")
    if "val" not in splits:
        logger.info("data.yaml has no val, which Ultralytics needs to train: --val NAME adds one")


def label_line(annotation, record, boxes, lost):
    """`class cx cy w h`, or `class x y x y ...` for polygons, as shares of the image's size; or None."""
    if annotation.get("iscrowd"):
        lost["crowd"] += 1
        return None
    width, height = record["width"], record["height"]
    x0, y0, x1, y1 = box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    inside = [max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)]
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        lost["outside"] += 1
        return None
    for key in ("keypoints", "difficult", "score"):
        lost[key] += bool(annotation.get(key))
    segmentation = None if boxes else annotation.get("segmentation")
    lost["rle"] += isinstance(segmentation, dict)
    if isinstance(segmentation, list | tuple) and segmentation:
        lost["parts"] += len(segmentation) > 1
        shares = [
            c / size
            for point in _outline(segmentation)
            for c, size in zip(point, (width, height), strict=True)
        ]
        inside = [min(max(share, 0), 1) for share in shares]
        lost["clipped"] += inside != shares
        shares = inside
    else:
        lost["clipped"] += inside != box
        x0, y0, x1, y1 = inside
        shares = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
    # Ten digits: a thousandth of a pixel is 1e-8 of the largest images.
    return " ".join([str(annotation["category_id"]), *(f"{share:.10g}" for share in shares)])


def _outline(polygons):
    """The points (x, y) of one polygon around all parts."""
    parts = [list(zip(p[::2], p[1::2], strict=True)) for p in polygons]
    # Each further part: from the first point to its first point, around it, and the same way back.
    start = parts[0][0]
    outline = parts[0] + [point for part in parts[1:] for point in (start, *part, part[0])]
    return outline + [start] * (len(parts) > 1)


def _size(records):
    return f"{len(records)} images, {sum(len(r['annotations']) for r in records)} annotations"


def main(args):
    """Convert what the command line says."""
    setup_logger()
    load_tool_cfg(args)
    names = {"train": args.name, "val": args.val, "test": args.test}
    names = {split: name for split, name in names.items() if name}
    get_common_class_names(list(names.values()))
    splits = {split: list(DatasetCatalog.get(name)) for split, name in names.items()}
    metadata = vars(MetadataCatalog.get(args.name))
    make_folder(args.output)
    if args.to == "coco":
        to_coco(splits["train"], metadata, args.output, args.copy_images)
    else:
        to_yolo(splits, metadata, args.output, args)


def parse_args(argv=None):
    """The command line."""
    parser = build_parser(__doc__, "YAML config that declares NAME")
    parser.add_argument("name", metavar="NAME", help="dataset to convert")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    parser.add_argument("--to", required=True, choices=("coco", "yolo"))
    parser.add_argument("--output", required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument("--copy-images", action="store_true", help="copy the images too")
    parser.add_argument("--boxes", action="store_true", help="YOLO: boxes only, no polygons")
    parser.add_argument("--val", metavar="NAME", help="YOLO: another dataset, as split val")
    parser.add_argument("--test", metavar="NAME", help="YOLO: another dataset, as split test")
    args = parser.parse_intermixed_args(argv)
    if args.to == "coco" and (args.val or args.test or args.boxes):
        parser.error("--val, --test and --boxes belong to --to yolo; convert to COCO one dataset at a time")
    return args


if __name__ == "__main__":
    arguments = parse_args()
    sys.exit(launch(main, args=(arguments,)))
