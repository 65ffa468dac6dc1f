"""YOLO's text files, in Ultralytics' layout -> records.

A `data.yaml` names the images of each split and the classes; the labels of `images/a/b.jpg` are in
`labels/a/b.txt`, a line an object: `class cx cy w h` or `class x y x y x y ...` (a polygon), in
shares of the image's width and height.
Format: https://docs.ultralytics.com/datasets/detect/ and https://docs.ultralytics.com/datasets/segment/
"""

import logging
import os
from pathlib import Path

from plaintrain.config.yaml import parse_yaml
from plaintrain.data.catalog import select_classes
from plaintrain.data.image_files import build_image_record, list_images
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import DataError, UserError, collect_errors, raise_or_append
from plaintrain.utils.files import MAX_BYTES, is_below, read_text

logger = logging.getLogger(__name__)

# Of a file that gives their number instead of their names.
_MAX_CLASSES = 100_000
# How far outside 0 to 1 a coordinate may be, for rounding; Ultralytics' own limit.
_TOLERANCE = 0.01


def load_yolo(data_file, split, classes=None, dataset_root="", problems=None):
    """Read one split of a dataset in Ultralytics' layout.

    An image's id is its file name without ending, a number if all are numbers; its path where that
    is not unique. Its size comes from the file, its EXIF orientation applied. An image without a
    label file has no objects. A polygon's box is what encloses it. Images that differ in their ending
    alone, and so share labels, are an error.

    Args:
        data_file: path of the `data.yaml`.
        split: train, val or test: a key of that file. Its value is a folder, a text file that lists
            images, or a list of these.
        classes, problems: see `load_coco_json`.
        dataset_root: where a relative `path` of the file may start, if not at the file's folder.

    Returns:
        (records, metadata): metadata holds `thing_classes`.
    """
    data = parse_yaml(read_text(data_file, max_bytes=MAX_BYTES), data_file)
    # Its lines would pass for polygons.
    if "kpt_shape" in data:
        raise UserError(f"{data_file} has a kpt_shape: keypoints are read from COCO JSON only")
    names = _class_names(data, data_file)
    chosen = select_classes(names, classes, data_file)
    labels = [chosen.index(name) if name in chosen else None for name in names]
    root = _root(data, data_file, dataset_root)
    files = _without_shared_labels(_image_files(data, data_file, split, root), problems)
    records = []
    for file, image_id in zip(files, _image_ids(files, root), strict=True):
        record = build_image_record(file, image_id, problems)
        if record:
            record["annotations"] = _read_labels(record, labels, problems)
            records.append(record)
    if records and not any(os.path.isfile(get_label_file(record["file_name"])) for record in records):
        first = records[0]["file_name"]
        logger.warning(
            f"no image of {data_file} has labels; those of {first} would be {get_label_file(first)}"
        )
    return records, {"thing_classes": chosen}


def _class_names(data, data_file):
    names, number = data.get("names"), data.get("nc")
    if names is None and type(number) is int and 0 < number <= _MAX_CLASSES:
        return [f"class_{i}" for i in range(number)]
    if isinstance(names, dict):
        by_id = {str(class_id): name for class_id, name in names.items()}
        ids = [str(class_id) for class_id in range(len(names))]
        if by_id.keys() != set(ids):
            raise UserError(f"the ids in names of {data_file} must be 0 to {len(ids) - 1}, not {list(names)}")
        names = [by_id[class_id] for class_id in ids]
    if not isinstance(names, list) or not names:
        raise UserError(f"{data_file} needs names, a list of the classes, not {names!r}")
    if number is not None and number != len(names):
        raise UserError(f"{data_file} says nc: {number}, but has {len(names)} names")
    names = [str(name) for name in names]
    if len(set(names)) != len(names):
        raise UserError(f"{data_file} names a class twice: {names}")
    return names


def _root(data, data_file, dataset_root):
    """The folder that the paths of the splits start from."""
    folder = os.path.dirname(os.path.abspath(data_file))
    path = os.path.expanduser(str(data.get("path") or "."))
    for start in (folder, dataset_root):
        if os.path.isdir(os.path.join(start, path)):
            return os.path.normpath(os.path.join(start, path))
    raise UserError(f"the path in {data_file} is {path}, and there is no such folder")


def _image_files(data, data_file, split, root):
    value = data.get(split)
    if not value:
        there = [key for key in ("train", "val", "test") if data.get(key)]
        hint = f"; it has {', '.join(there)}" if there else ""
        raise UserError(f"{data_file} has no split {split!r}{hint}")
    files = []
    for entry in map(str, value if isinstance(value, list) else [value]):
        in_root = is_below(root, entry) and os.path.exists(os.path.join(root, entry))
        if entry.startswith("../") and not in_root:
            # Roboflow writes ../train/images for a folder beside the file.
            entry = entry[3:]
        path = _join_below(root, root, entry, data_file)
        if path.endswith(".txt"):
            lines = (line.strip() for line in read_text(path).splitlines())
            files += [_join_below(root, os.path.dirname(path), line, path) for line in lines if line]
        else:
            files += list_images(path)
    return files


def _join_below(root, folder, name, source):
    path = os.path.normpath(os.path.join(folder, name))
    if not is_below(root, path):
        raise UserError(
            f"{source} names {path}, which is outside the dataset's folder {root}; let the path in the "
            "data.yaml be a folder that holds all images"
        )
    return path


def _without_shared_labels(files, problems):
    """The files but those, such as an image and its mask, that would have one label file in common."""
    sharing = {}
    for file in dict.fromkeys(files):
        sharing.setdefault(get_label_file(file), []).append(file)
    kept = []
    for path, group in sharing.items():
        if len(group) > 1 and os.path.lexists(path):
            what = f"{' and '.join(group)} share the labels {path}: remove or rename all but one"
            raise_or_append(problems, DataError("ambiguous", what))
        else:
            kept += group
    return kept


def _image_ids(files, root):
    stems = [Path(file).stem for file in files]
    # No more digits than 64 bits hold.
    if all(stem.isascii() and stem.isdigit() and len(stem) < 19 for stem in stems):
        stems = [int(stem) for stem in stems]
    if len(set(stems)) == len(stems):
        return stems
    return [Path(os.path.relpath(file, root)).as_posix() for file in files]


def get_label_file(image_file):
    """The label file of an image: the last folder `images` becomes `labels`, the ending `.txt`."""
    path = str(Path(image_file).with_suffix(".txt"))
    return f"{os.sep}labels{os.sep}".join(path.rsplit(f"{os.sep}images{os.sep}", 1))


def _read_labels(record, labels, problems):
    path, annotations = get_label_file(record["file_name"]), []
    if os.path.lexists(path):
        with collect_errors(problems):
            for number, line in enumerate(read_text(path).splitlines(), 1):
                with collect_errors(problems):
                    annotations.append(_annotation(line.split(), record, labels, f"{path}, line {number}"))
    return list(filter(None, annotations))


def _annotation(words, record, labels, where):
    """The annotation of a line; None for an empty line or a class that is left out."""
    if not words:
        return None
    try:
        number, *values = map(float, words)
    except ValueError as e:
        raise DataError("broken", f"{where} holds something that is no number: {' '.join(words)[:80]}") from e
    if number not in range(len(labels)):
        raise DataError(
            "unknown_class", f"{where} has the class {words[0]}, but the classes are 0 to {len(labels) - 1}"
        )
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise DataError(
            "bad_polygon" if len(values) < 6 else "broken",
            f"{where} has {len(values)} numbers after the class, not 4 (cx cy w h) or 3 or more pairs x y",
        )
    for value in values:
        if not -_TOLERANCE <= value <= 1 + _TOLERANCE:
            what = "which is not a share of the image's size, 0 to 1"
            raise DataError("bad_box", f"{where} has the coordinate {value:g}, {what}")
    label = labels[int(number)]
    return None if label is None else _in_pixels(values, label, record["width"], record["height"])


def _in_pixels(values, label, width, height):
    annotation = {"bbox": None, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, "iscrowd": 0}
    if len(values) == 4:
        x, y, w, h = values
        corners = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
    else:
        xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
        corners = [min(xs), min(ys), max(xs), max(ys)]
        annotation["segmentation"] = [[v for point in zip(xs, ys, strict=True) for v in point]]
    return annotation | {"bbox": corners}
