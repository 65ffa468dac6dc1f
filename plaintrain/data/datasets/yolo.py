"""Reader of YOLO text files in Ultralytics' layout.

A `data.yaml` lists the images of each split and the classes. `labels/a/b.txt` has one line for each
object in `images/a/b.jpg`: `class cx cy w h` or `class x y x y x y ...` (a polygon), normalized by the
image size.
Format: https://docs.ultralytics.com/datasets/detect/ and https://docs.ultralytics.com/datasets/segment/
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from plaintrain.config.yaml import parse_yaml
from plaintrain.data.catalog import select_classes
from plaintrain.data.datasets.coco import LoadedDataset
from plaintrain.data.image_files import build_image_record, find_name, list_images
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import DataError, UserError, collect_errors, raise_or_append
from plaintrain.utils.files import MAX_BYTES, is_below, read_text

logger = logging.getLogger(__name__)

_NULLS = ("", "~", "null", "Null", "NULL")
# Rounding may put a coordinate outside 0 to 1 by this much, as in Ultralytics.
_TOLERANCE = 0.01


def load_yolo(
    data_file: str,
    split: str,
    classes: Sequence[str] | None = None,
    dataset_root: str = "",
    problems: list[UserError] | None = None,
) -> LoadedDataset:
    """Read one split (train, val or test) of a dataset in Ultralytics' layout.

    The image id is the file's stem, an int if all stems are numbers, or the path if stems are not unique.
    Image sizes are read from the files, after EXIF rotation. An image without a label file has no objects.
    A relative `path` in `data_file` may start at the file's folder or at `dataset_root`. See
    `read_coco_json` for `classes` and `problems`.
    """
    # YAML would turn the class names yes, 010 and null into True, 8 and None.
    data = parse_yaml(read_text(data_file, max_bytes=MAX_BYTES), data_file, as_text=True)
    data = {key: value for key, value in data.items() if value not in _NULLS}
    # Lines with keypoints would be read as polygons.
    if "kpt_shape" in data:
        raise UserError(f"{data_file} has a kpt_shape; keypoints are supported in COCO JSON only")
    names = _get_class_names(data, data_file)
    selected = select_classes(names, classes, data_file)
    labels = [selected.index(name) if name in selected else None for name in names]
    root = _find_root(data, data_file, dataset_root)
    files = _drop_shared_labels(_list_image_files(data, data_file, split, root), problems)
    records = []
    for file, image_id in zip(files, _create_image_ids(files, root), strict=True):
        record = build_image_record(file, image_id, problems)
        if record:
            record["annotations"] = _read_labels(record, labels, problems)
            records.append(record)
    if records and not any(record["annotations"] for record in records):
        first = records[0]["file_name"]
        text = f"the label file of {first} would be {get_label_file(first)}"
        logger.warning(f"no image of {data_file} has objects; {text}")
    return records, {"thing_classes": selected}


def _get_class_names(data, data_file):
    names = data.get("names")
    num_classes = str(data.get("nc", "")).removesuffix(".0")
    if names is None and num_classes.isdecimal() and 0 < len(num_classes.lstrip("0")) < 6:
        return [f"class_{i}" for i in range(int(num_classes))]
    if isinstance(names, dict):
        ids = [str(class_id) for class_id in range(len(names))]
        if names.keys() != set(ids):
            raise UserError(
                f"ids of names in {data_file} must be 0 to {len(ids) - 1}, got [{', '.join(names)}]"
            )
        names = [names[class_id] for class_id in ids]
    if not names or not isinstance(names, list) or not all(name and isinstance(name, str) for name in names):
        raise UserError(f"names in {data_file} must be a list of class names, got {names!r}")
    if num_classes not in ("", str(len(names))):
        raise UserError(f"{data_file} has nc: {num_classes}, but {len(names)} names")
    if len(set(names)) != len(names):
        raise UserError(f"names in {data_file} must be distinct, got {names}")
    return names


def _find_root(data, data_file, dataset_root):
    folder = os.path.dirname(os.path.abspath(data_file))
    path = os.path.expanduser(str(data.get("path") or "."))
    for start in (folder, dataset_root):
        if os.path.isdir(os.path.join(start, path)):
            return os.path.normpath(os.path.join(start, path))
    raise UserError(f"the path in {data_file} is {path}, but there is no such folder; correct or remove it")


def _list_image_files(data, data_file, split, root):
    value = data.get(split)
    if not value:
        splits = [key for key in ("train", "val", "test") if data.get(key)]
        hint = f"; it has {', '.join(splits)}" if splits else ""
        raise UserError(f"{data_file} has no split {split!r}{hint}")
    files = []
    for entry in map(str, value if isinstance(value, list) else [value]):
        in_root = is_below(root, entry) and os.path.exists(os.path.join(root, entry))
        if entry.startswith("../") and not in_root:
            # Roboflow writes ../train/images for a folder next to the file.
            entry = entry[3:]
        path = _join_below(root, root, entry, data_file)
        if path.endswith(".txt"):
            lines = (line.strip() for line in read_text(path).splitlines())
            files += [_join_below(root, os.path.dirname(path), line, path) for line in lines if line]
        else:
            files += list_images(path)
    return files


def _join_below(root, folder, name, source):
    path = os.path.normpath(os.path.join(folder, find_name(folder, name)))
    if not is_below(root, path):
        raise UserError(
            f"{source} contains {path}, which is outside the dataset's folder {root}; set the path in the "
            "data.yaml to a folder that holds all images"
        )
    return path


def _drop_shared_labels(files, problems):
    """Drop files, such as an image and its mask, that have the same label file."""
    groups = {}
    for file in dict.fromkeys(files):
        groups.setdefault(get_label_file(file), []).append(file)
    kept = []
    for path, group in groups.items():
        if len(group) > 1 and os.path.lexists(path):
            message = f"{' and '.join(group)} have the same label file {path}; remove or rename all but one"
            raise_or_append(problems, DataError("ambiguous", message))
        else:
            kept += group
    return kept


def _create_image_ids(files, root):
    stems = [Path(file).stem for file in files]
    # An int64 holds 18 digits.
    if all(stem.isascii() and stem.isdigit() and len(stem) < 19 for stem in stems):
        stems = [int(stem) for stem in stems]
    if len(set(stems)) == len(stems):
        return stems
    return [Path(os.path.relpath(file, root)).as_posix() for file in files]


def get_label_file(image_file: str) -> str:
    """Return the label file of an image: `labels` instead of the last folder `images`, suffix `.txt`."""
    path = str(Path(image_file).with_suffix(".txt"))
    return f"{os.sep}labels{os.sep}".join(path.rsplit(f"{os.sep}images{os.sep}", 1))


def _read_labels(record, labels, problems):
    path = get_label_file(record["file_name"])
    if not os.path.lexists(path):
        path = path.removesuffix(".txt") + ".TXT"
    annotations = []
    if os.path.lexists(path):
        with collect_errors(problems):
            for i, line in enumerate(read_text(path).splitlines(), 1):
                with collect_errors(problems):
                    annotations.append(_parse_line(line.split(), record, labels, f"{path}, line {i}"))
    return list(filter(None, annotations))


def _parse_line(words, record, labels, source):
    """Return the annotation of a line; None for an empty line or a class that is not selected."""
    if not words:
        return None
    try:
        class_id, *values = map(float, words)
    except ValueError as e:
        message = f"{source} must hold numbers only, separated by spaces, got {' '.join(words)[:80]}"
        raise DataError("broken", message) from e
    if class_id not in range(len(labels)):
        raise DataError("unknown_class", f"{source}: class {words[0]} is not one of 0 to {len(labels) - 1}")
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise DataError(
            "bad_polygon" if len(values) < 6 else "broken",
            f"{source} has {len(values)} numbers after the class, not 4 (cx cy w h) or 3 or more pairs x y",
        )
    for value in values:
        if not -_TOLERANCE <= value <= 1 + _TOLERANCE:
            raise DataError("bad_box", f"{source}: normalized coordinates must be 0 to 1, got {value:g}")
    label = labels[int(class_id)]
    return None if label is None else _create_annotation(values, label, record["width"], record["height"])


def _create_annotation(values, label, width, height):
    annotation = {"bbox": None, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, "iscrowd": 0}
    if len(values) == 4:
        x, y, w, h = values
        corners = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
    else:
        xs = [x * width for x in values[::2]]
        ys = [y * height for y in values[1::2]]
        corners = [min(xs), min(ys), max(xs), max(ys)]
        annotation["segmentation"] = [[v for point in zip(xs, ys, strict=True) for v in point]]
    return annotation | {"bbox": corners}
