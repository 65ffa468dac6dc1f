"""Pascal VOC XML -> records.

Layout: `Annotations/*.xml`, `ImageSets/Main/<split>.txt`, `JPEGImages/*`. Of several images with
the name of an annotation, its `<filename>` says which is meant.
Format: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf
"""

import contextlib
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from plaintrain.data.catalog import select_classes
from plaintrain.data.image_files import is_too_large, read_image_header
from plaintrain.structures import BoxMode, make_record
from plaintrain.utils.errors import DataError, UserError, collect_errors
from plaintrain.utils.files import MAX_BYTES, check_file, describe_os_error, read_text

# fmt: off
VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
]
# fmt: on
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp")


def load_voc(root, split, classes=None, problems=None):
    """Read one split of a dataset in VOC's layout.

    Boxes are 1-based pixels that include their last row and column, so `xmin - 1, ymin - 1,
    xmax, ymax` are the corners. Where xmax is not above xmin, or ymax above ymin, the box is
    kept as empty, for the loader to drop and count. `difficult` is kept as a flag.

    Args:
        root: folder that holds `Annotations`, `ImageSets/Main` and `JPEGImages`.
        split: name of a list in `ImageSets/Main`, without `.txt`.
        classes: see `load_coco_json`; empty for every name in `Annotations`, of all splits, sorted.
        problems: see `load_coco_json`.

    Returns:
        (records, metadata): metadata holds `thing_classes`.
    """
    names = _read_split(root, split)
    folder, image_folder = (os.path.join(root, name) for name in ("Annotations", "JPEGImages"))
    images = _image_files(image_folder)
    # A class that no object has may be a typo.
    chosen = select_classes(_all_classes(folder, problems), classes, folder, allow_missing=True)
    labels = {name: label for label, name in enumerate(chosen)}
    records = []
    for line in names:
        # Per-class lists hold a second column (1, 0, -1); a name may hold spaces.
        name = line if line in images else line.split()[0]
        with collect_errors(problems):
            if name not in images:
                missing = f"the image {name} of split {split} is missing in {image_folder}"
                raise DataError("unreadable", missing)
            xml_file = os.path.join(folder, name + ".xml")
            records.append(_record(xml_file, images[name], labels, problems))
    return records, {"thing_classes": chosen}


def _read_split(root, split):
    path = os.path.join(root, "ImageSets", "Main", f"{split}.txt")
    try:
        names = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    except UserError as e:
        folder = os.path.dirname(path)
        known = sorted(os.path.splitext(p)[0] for p in os.listdir(folder)) if os.path.isdir(folder) else []
        hint = f"; splits there: {', '.join(known)}" if known else ""
        raise UserError(f"cannot read the split list {path}{hint}") from e
    if not names:
        raise UserError(f"the split list {path} is empty")
    return names


def _list_folder(folder):
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}, which a VOC dataset needs")
    return sorted(os.listdir(folder))


def _image_files(folder):
    files = {}
    for name in _list_folder(folder):
        stem, ext = os.path.splitext(name)
        if ext in _EXTENSIONS:
            files.setdefault(stem, []).append(os.path.join(folder, name))
    return files


def _choose_file(files, root, xml_file):
    """The image of an annotation: the only file of its name, or that of several which `<filename>` names."""
    if len(files) == 1:
        return files[0]
    # Some tools write a path, also one of Windows.
    named = re.split(r"[/\\]", root.findtext("filename", "").strip())[-1]
    chosen = [file for file in files if os.path.basename(file) == named]
    if not chosen:
        images = " and ".join(files)
        text = f"{images} could both be the image of {xml_file}, whose <filename> is {named!r}"
        raise DataError("ambiguous", text)
    return chosen[0]


def _parse(xml_file):
    try:
        check_file(xml_file, max_bytes=32 * MAX_BYTES)
        text = Path(xml_file).read_bytes()
    except OSError as e:
        raise UserError(f"cannot read the annotation file {xml_file}: {describe_os_error(e)}") from e
    if b"<!DOCTYPE" in text:
        # Its entities could stand for more text than there is memory.
        raise UserError(f"the annotation file {xml_file} has a DOCTYPE, which no VOC annotation has")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, LookupError, ValueError) as e:
        raise UserError(f"the annotation file {xml_file} is not XML: {e}") from e


def _all_classes(folder, problems):
    names = set()
    for file in _list_folder(folder):
        if file.endswith(".xml"):
            # With `problems` the records' own reading notes it.
            with collect_errors(None if problems is None else []):
                root = _parse(os.path.join(folder, file))
                names |= {_text(obj, "name", file) for obj in root.iter("object")}
    if not names:
        raise UserError(f"no object is annotated in {folder}")
    return sorted(names)


def _text(element, tag, where):
    text = element.findtext(tag)
    if text is None or not text.strip():
        raise UserError(f"{where}: <{element.tag}> has no <{tag}>")
    return text.strip()


def _number(element, tag, where):
    text = _text(element, tag, where)
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise UserError(f"{where}: <{tag}> is {text!r}, not a number")


def _record(xml_file, image_files, labels, problems):
    root = _parse(xml_file)
    image_file = _choose_file(image_files, root, xml_file)
    size = root.find("size")
    if size is not None and size.findtext("width") not in (None, "0"):
        width, height = (int(_number(size, tag, xml_file)) for tag in ("width", "height"))
        if min(width, height) < 1 or is_too_large(height, width):
            raise UserError(f"{xml_file}: <size> is {width} x {height}, not that of an image")
    else:
        height, width, _ = read_image_header(image_file)
    annotations = []
    for obj in root.iter("object"):
        with collect_errors(problems):
            class_name = _text(obj, "name", xml_file)
            if class_name in labels:
                annotations.append(_annotation(obj, labels[class_name], xml_file))
    image_id = os.path.splitext(os.path.basename(xml_file))[0]
    return make_record(image_file, image_id, height, width, annotations)


def _annotation(obj, label, xml_file):
    box = obj.find("bndbox")
    if box is None:
        raise UserError(f"{xml_file}: an <object> has no <bndbox>")
    x0, y0, x1, y1 = (_number(box, tag, xml_file) for tag in ("xmin", "ymin", "xmax", "ymax"))
    if x1 > x0 and y1 > y0:
        x0, y0 = x0 - 1, y0 - 1
    return {
        "bbox": [x0, y0, x1, y1],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": label,
        "iscrowd": 0,
        "difficult": int(obj.findtext("difficult", "0").strip() == "1"),
    }
