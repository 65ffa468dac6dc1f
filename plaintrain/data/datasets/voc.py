"""Reader of Pascal VOC XML.

Layout: `Annotations/*.xml`, `ImageSets/Main/<split>.txt`, `JPEGImages/*`.
Format: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf
"""

import contextlib
import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from plaintrain.data.catalog import select_classes
from plaintrain.data.datasets.coco import LoadedDataset
from plaintrain.data.image_files import (
    IMAGE_EXTENSIONS,
    describe_pixel_limit,
    is_too_large,
    is_visible,
    read_image_header,
)
from plaintrain.structures import BoxMode, make_record
from plaintrain.utils.errors import DataError, UserError, collect_errors, get_first_line
from plaintrain.utils.files import MAX_BYTES, check_file, read_text

VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
]  # fmt: skip
# .NET declares UTF-16 in files that are UTF-8.
_DECLARED_ENCODING = re.compile(rb"""<\?xml[^>]*?encoding=["'](?!utf-16)([\w.:-]+)""", re.IGNORECASE)


def load_voc(
    root: str, split: str, classes: Sequence[str] | None = None, problems: list[UserError] | None = None
) -> LoadedDataset:
    """Read one split of a dataset in VOC's layout.

    Boxes are 1-based pixels including the last row and column, so the corners are `xmin - 1, ymin - 1,
    xmax, ymax`. Boxes with xmax below xmin are kept, for the loader to drop and count. Without `classes`, the
    classes are the sorted names in `Annotations` of all splits; see `read_coco_json` for `problems`.
    """
    names = _read_split(root, split)
    folder, image_folder = (os.path.join(root, name) for name in ("Annotations", "JPEGImages"))
    images = _list_files(image_folder, IMAGE_EXTENSIONS)
    xml_files = _list_files(folder, (".xml",))
    # A class without objects may be a typo.
    selected = select_classes(_read_class_names(xml_files, problems), classes, folder, allow_missing=True)
    labels = {name: label for label, name in enumerate(selected)}
    records = []
    for line in names:
        # Per-class lists have a second column (1, 0, -1); names may contain spaces.
        word = Path(line).stem if line.lower().endswith(IMAGE_EXTENSIONS) else line.split()[0]
        name = line if line in images else word
        with collect_errors(problems):
            if name not in images:
                raise DataError("unreadable", f"the image {name} of {split} is missing in {image_folder}")
            xml_file = xml_files.get(name, [os.path.join(folder, name + ".xml")])[0]
            records.append(_create_record(xml_file, images[name], labels, problems))
    return records, {"thing_classes": selected}


def _read_split(root, split):
    path = os.path.join(root, "ImageSets", "Main", f"{split}.txt")
    try:
        names = [line.strip() for line in read_text(path, "split list").split("\n") if line.strip()]
    except UserError as e:
        known = ", ".join(sorted(file.stem for file in Path(path).parent.glob("[!.]*.txt")))
        raise UserError(f"{e}; known splits: {known}" if known else e) from e
    if not names:
        raise UserError(f"the split list {path} is empty")
    return names


def _list_files(folder, extensions):
    """Return {stem: paths} of the visible files in a folder."""
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}, which a VOC dataset requires")
    files = {}
    for name in filter(is_visible, sorted(os.listdir(folder))):
        stem, ext = os.path.splitext(name)
        if ext.lower() in extensions:
            files.setdefault(stem, []).append(os.path.join(folder, name))
    return files


def _choose_file(files, root, xml_file):
    """Return the image of an annotation; of several with the same stem, the one in `<filename>`."""
    # Some tools write a path, possibly a Windows one.
    file_name = re.split(r"[/\\]", root.findtext("filename", "").strip())[-1]
    matches = [file for file in files if os.path.basename(file) == file_name]
    if matches or len(files) == 1:
        return (matches or files)[0]
    images = " and ".join(files)
    message = f"{images} could both be the image of {xml_file}, whose <filename> is {file_name!r}"
    raise DataError("ambiguous", message)


def _parse(xml_file):
    try:
        check_file(xml_file, max_bytes=32 * MAX_BYTES)
        data = Path(xml_file).read_bytes()
    except OSError as e:
        raise UserError(f"cannot read the annotation file {xml_file}: {get_first_line(e)}") from e
    encoding = json.detect_encoding(data)
    # ElementTree itself reads no multi-byte encodings, such as GBK.
    if encoding == "utf-8" and (declared := _DECLARED_ENCODING.match(data)):
        encoding = declared[1].decode()
    try:
        text = re.sub(r"<!DOCTYPE[^<>[]*>", "", data.decode(encoding), count=1).lstrip()
        if "<!DOCTYPE" not in text:
            return ElementTree.fromstring(text)
    except (ElementTree.ParseError, LookupError, ValueError) as e:
        raise UserError(f"the annotation file {xml_file} is not XML: {get_first_line(e)}") from e
    # Entities can expand to more text than fits in memory.
    raise UserError(f"the annotation file {xml_file} must not have a DOCTYPE with definitions; remove it")


def _read_class_names(xml_files, problems):
    names = set()
    for files in xml_files.values():
        # `_create_record` reports the same error.
        with collect_errors(None if problems is None else []):
            root = _parse(files[0])
            names |= {_read_text(obj, "name", files[0]) for obj in root.iter("object")}
    if not names:
        raise UserError(f"the {len(xml_files)} annotation files have no objects")
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
    if {root.findtext(f"size/{tag}", "").strip() for tag in ("width", "height")} & {"", "0", "0.0"}:
        height, width, _ = read_image_header(image_file)
    else:
        width, height = (int(_read_number(root, f"size/{tag}", xml_file)) for tag in ("width", "height"))
        if min(width, height) < 1 or is_too_large(height, width):
            limit = describe_pixel_limit()
            raise UserError(f"{xml_file}: <size> is {width} x {height}, empty or more pixels than {limit}")
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
    if x1 >= x0 and y1 >= y0:
        # In files that count from 0, the first pixel is 0.
        x0, y0 = (start - 1 if start else start for start in (x0, y0))
        x1, y1 = (max(end, start + 1) for start, end in ((x0, x1), (y0, y1)))
    return {
        "bbox": [x0, y0, x1, y1],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": label,
        "iscrowd": 0,
        "difficult": int(obj.findtext("difficult", "").strip().lower() in ("1", "true")),
    }
