"""Reader of LVIS JSON: COCO JSON with the categories that were verified in each image."""

from functools import partial
from typing import Any

from plaintrain.data.catalog import register_dataset
from plaintrain.data.datasets import coco

_KEYS = ("neg_category_ids", "not_exhaustive_category_ids")


def load_lvis_json(json_file: str, image_root: str) -> coco.LoadedDataset:
    """Read records, with the verified categories, and metadata, with `class_frequencies` (r, c or f).

    Images without a `file_name` have the one of their `coco_url`, such as val2017/000000000139.jpg.
    """
    content = coco.read_content(json_file)
    images = {}
    for image in content["images"]:
        if "file_name" not in image and isinstance(image.get("coco_url"), str):
            image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])
        images[image.get("id")] = image
    records, metadata = coco.convert_content(content, json_file, image_root, None)
    for record in records:
        record |= {key: images[record["image_id"]].get(key) or [] for key in _KEYS}
    frequencies = {category["name"]: category.get("frequency") for category in content["categories"]}
    metadata["class_frequencies"] = [frequencies[name] for name in metadata["thing_classes"]]
    return records, metadata


def register_lvis_instances(name: str, metadata: dict[str, Any], json_file: str, image_root: str) -> None:
    """Register an LVIS dataset, as in Detectron2."""
    paths = {"json_file": json_file, "image_root": image_root}
    register_dataset(name, partial(load_lvis_json, **paths), evaluator_type="lvis", **paths, **metadata)
