"""A folder of images -> records without annotations, for prediction."""

from pathlib import Path

from plaintrain.data.image_files import build_image_record, list_images


def load_images(root, classes=None, problems=None):
    """Describe every image in a folder and below it; image ids are the paths from `root` on.

    Args:
        root: the folder.
        classes: the names of a model's classes, or None.
        problems: see `load_coco_json`.
    """
    paths = list_images(root)
    records = [build_image_record(path, Path(path).relative_to(root).as_posix(), problems) for path in paths]
    return list(filter(None, records)), {"thing_classes": list(classes)} if classes else {}
