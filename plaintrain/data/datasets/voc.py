"""Reader of Pascal VOC XML.

Layout: `Annotations/*.xml`, `ImageSets/Main/<split>.txt`, `JPEGImages/*`.
Format: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf
"""

import contextlib
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from plaintrain.data.catalog import select_classes
from plaintrain.data.datasets.coco import LoadedDataset
from plaintrain.data.image_files import is_too_large, read_image_header
from plaintrain.structures import BoxMode, make_record
from plaintrain.utils.errors import DataError, UserError, collect_errors, get_first_line
from plaintrain.utils.files import MAX_BYTES, check_file, read_text

VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
]  # fmt: skip
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp")


def load_voc(
    root: str, split: str, classes: Sequence[str] | None = None, problems: list[UserError] | None = None
) -> LoadedDataset:
    """Read one split of a dataset in VOC's layout.

    Boxes are 1-based pixels including the last row and column, so the corners are `xmin - 1, ymin - 1,
    xmax, ymax`. Empty boxes are kept, for the loader to drop and count. Without `classes`, the classes
    are the sorted names in `Annotations` of all splits; see `load_coco_json` for `problems`.
    """
    names = _read_split(root, split)
    folder, image_folder = (os.path.join(root, name) for name in ("Annotations", "JPEGImages"))
    images = _list_image_files(image_folder)
    # A class without objects may be a typo.
    selected = select_classes(_read_class_names(folder, problems), classes, folder, allow_missing=True)
    labels = {name: label for label, name in enumerate(selected)}
    records = []
    for line in names:
        # Per-class lists have a second column (1, 0, -1); names may contain spaces.
        name = line if line in images else line.split()[0]
        with collect_errors(problems):
            if name not in images:
                message = f"the image {name} of split {split} is missing in {image_folder}"
                raise DataError("unreadable", message)
            xml_file = os.path.join(folder, name + ".xml")
            records.append(_create_record(xml_file, images[name], labels, problems))
    return records, {"thing_classes": selected}


def _read_split(root, split):
    path = os.path.join(root, "ImageSets", "Main", f"{split}.txt")
    try:
        names = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    except UserError as e:
        folder = os.path.dirname(path)
        known = sorted(os.path.splitext(p)[0] for p in os.listdir(folder)) if os.path.isdir(folder) else []
        hint = f"; known splits: {', '.join(known)}" if known else ""
        raise UserError(f"cannot read the split list {path}{hint}") from e
    if not names:
        raise UserError(f"the split list {path} is empty")
    return names


def _list_folder(folder):
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}, which a VOC dataset requires")
    return sorted(os.listdir(folder))


def _list_image_files(folder):
    files = {}
    for name in _list_folder(folder):
        stem, ext = os.path.splitext(name)
        if ext in _EXTENSIONS:
            files.setdefault(stem, []).append(os.path.join(folder, name))
    return files


def _choose_file(files, root, xml_file):
    """Return the image of an annotation; of several with the same stem, the one in `<filename>`."""
    if len(files) == 1:
        return files[0]
    # Some tools write a path, possibly a Windows one.
    file_name = re.split(r"[/\\]", root.findtext("filename", "").strip())[-1]
    for file in files:
        if os.path.basename(file) == file_name:
            return file
    images = " and ".join(files)
    message = f"{images} could both be the image of {xml_file}, whose <filename> is {file_name!r}"
    raise DataError("ambiguous", message)


def _parse(xml_file):
    try:
        check_file(xml_file, max_bytes=32 * MAX_BYTES)
        text = Path(xml_file).read_bytes()
    except OSError as e:
        raise UserError(f"cannot read the annotation file {xml_file}: {get_first_line(e)}") from e
    if b"<!DOCTYPE" in text:
        # Entities can expand to more text than fits in memory.
        raise UserError(f"the annotation file {xml_file} must not have a DOCTYPE")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, LookupError, ValueError) as e:
        raise UserError(f"the annotation file {xml_file} is not XML: {e}") from e


def _read_class_names(folder, problems):
    names = set()
    for file in _list_folder(folder):
        if file.endswith(".xml"):
            # `_create_record` reports the same error.
            with collect_errors(None if problems is None else []):
                root = _parse(os.path.join(folder, file))
                names |= {_read_text(obj, "name", file) for obj in root.iter("object")}
    if not names:
        raise UserError(f"the annotations in {folder} have no objects")
    return sorted(names)


def _read_text(element, tag, source):
    text = element.findtext(tag)
    if text is None or not text.strip():
        raise UserError(f"{source}: <{element.tag}> has no <{tag}>")
    return text.strip()


def _read_number(element, tag, source):
    text = _read_text(element, tag, source)
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise UserError(f"{source}: <{tag}> must be a finite number, got {text!r}")


def _create_record(xml_file, image_files, labels, problems):
    root = _parse(xml_file)
    image_file = _choose_file(image_files, root, xml_file)
    size = root.find("size")
    if size is not None and size.findtext("width") not in (None, "0"):
        width, height = (int(_read_number(size, tag, xml_file)) for tag in ("width", "height"))
        if min(width, height) < 1 or is_too_large(height, width):
            raise UserError(f"{xml_file}: <size> must be that of an image, got {width} x {height}")
    else:
        height, width, _ = read_image_header(image_file)
    annotations = []
    for obj in root.iter("object"):
        with collect_errors(problems):
            class_name = _read_text(obj, "name", xml_file)
            if class_name in labels:
                annotations.append(_create_annotation(obj, labels[class_name], xml_file))
    image_id = os.path.splitext(os.path.basename(xml_file))[0]
    return make_record(image_file, image_id, height, width, annotations)


def _create_annotation(obj, label, xml_file):
    box = obj.find("bndbox")
    if box is None:
        raise UserError(f"{xml_file}: an <object> has no <bndbox>")
    x0, y0, x1, y1 = (_read_number(box, tag, xml_file) for tag in ("xmin", "ymin", "xmax", "ymax"))
    if x1 > x0 and y1 > y0:
        x0 -= 1
        y0 -= 1
    return {
        "bbox": [x0, y0, x1, y1],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": label,
        "iscrowd": 0,
        "difficult": int(obj.findtext("difficult", "0").strip() == "1"),
    }
