"""A folder of images -> records without annotations, for prediction."""

from pathlib import Path

from plaintrain.data.image_files import image_record, list_images


def load_images(root, classes=None, problems=None):
    """Describe every image in a folder and below it.

    Args:
        root: the folder.
        classes: the names of a model's classes, or None.
        problems: None, or a list that takes unreadable images instead of an error.

    Returns:
        (records, metadata): image ids are the paths from `root` on.
    """
    records = []
    for path in list_images(root):
        record = image_record(path, Path(path).relative_to(root).as_posix(), problems)
        if record:
            records.append(record)
    return records, {"thing_classes": list(classes)} if classes else {}
