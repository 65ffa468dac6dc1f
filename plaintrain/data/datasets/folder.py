"""Reader of image folders: records without annotations, for prediction."""

from collections.abc import Sequence
from pathlib import Path

from plaintrain.data.datasets.coco import LoadedDataset
from plaintrain.data.image_files import build_image_record, list_images
from plaintrain.utils.errors import UserError


def load_images(
    root: str, classes: Sequence[str] | None = None, problems: list[UserError] | None = None
) -> LoadedDataset:
    """List the images in a folder, recursively; image ids are the paths relative to it."""
    paths = list_images(root)
    records = [build_image_record(path, Path(path).relative_to(root).as_posix(), problems) for path in paths]
    return list(filter(None, records)), {"thing_classes": list(classes)} if classes else {}
