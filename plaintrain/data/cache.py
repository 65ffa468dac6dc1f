"""What was read of large COCO files, kept in a folder for the next start."""

import hashlib
import json
import logging
import os

import numpy as np
from PIL import Image

from plaintrain import structures
from plaintrain.data import keypoints, serialized, validation
from plaintrain.data.serialized import SerializedRecords
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import atomic_write, describe_os_error

logger = logging.getLogger(__name__)

# A smaller file is parsed faster than it would be worth.
_LEAST_BYTES = 2**22


def get_cache_folder():
    """`$PLAINTRAIN_CACHE`, which may be "", or `plaintrain` in the user's cache folder."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "plaintrain")
    return os.path.expanduser(os.environ.get("PLAINTRAIN_CACHE", default))


def load_cached_records(load, json_file, image_root, classes=None):
    """Records of a COCO file, from the cache where what it holds now has been read before.

    The cache knows a file by all of its content (SHA-256, half a second for COCO's): a copy that keeps its
    time, or an edit within the clock's tick, would deceive size and time. The reader's own code is in the
    key too. Its files are zip archives of plain arrays, with checksums, that run no code.

    Args:
        load: `load_coco_json`.
        json_file, image_root, classes: its arguments.

    Returns:
        (`SerializedRecords`, metadata). A cache that cannot be used is logged, and the file is read.
    """
    path = _path(load, json_file, image_root, classes)
    if path and os.path.exists(path):
        try:
            cached = _read(path)
            logger.info(f"{json_file} is read from the cache, {path}")
            return cached
        # zipfile and NumPy raise whatever comes up in a damaged file.
        except Exception as e:
            logger.warning(f"{path} in the cache cannot be read: {describe_os_error(e)}")
    records, metadata = load(json_file, image_root, classes)
    records = SerializedRecords(records)
    # Not what has been changed meanwhile.
    if path and records.annotations and path == _path(load, json_file, image_root, classes):
        _write(path, records, metadata)
    return records, metadata


def _path(load, json_file, image_root, classes):
    """Where the cache holds the records of a file, or None if it is not to hold them."""
    if not get_cache_folder():
        return None
    try:
        if os.path.getsize(json_file) < _LEAST_BYTES:
            return None
        with open(json_file, "rb") as f:
            digest = hashlib.file_digest(f, "sha256")
        codes = (module.__file__ for module in (keypoints, structures, serialized, validation))
        for code in (load.__code__.co_filename, __file__, *codes):
            with open(code, "rb") as f:
                digest.update(f.read())
    except OSError:
        return None
    arguments = [str(image_root), list(classes or ()), Image.MAX_IMAGE_PIXELS]
    digest.update(json.dumps(arguments).encode())
    return os.path.join(get_cache_folder(), digest.hexdigest() + ".coco.npz")


def _read(path):
    """(records, metadata) of a file of the cache."""
    with np.load(path, allow_pickle=False) as archive:
        arrays = dict(archive)
    metadata = json.loads(arrays.pop("metadata").tobytes())
    # JSON would have made texts of the ids.
    labels = {id_: label for label, id_ in enumerate(metadata.pop("ids"))}
    records = SerializedRecords.from_arrays(arrays)
    return records, metadata | {"thing_dataset_id_to_contiguous_id": labels}


def _write(path, records, metadata):
    """Write a file of the cache, whole or not at all; what prevents it is logged."""
    metadata = dict(metadata)
    metadata["ids"] = list(metadata.pop("thing_dataset_id_to_contiguous_id"))
    text = np.frombuffer(json.dumps(metadata).encode(), dtype=np.uint8)
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with atomic_write(path, "wb") as f:
            np.savez(f, metadata=text, **records.to_arrays())
    except (OSError, UserError) as e:
        logger.info(f"the cache cannot be written ({describe_os_error(e)}): each start reads the JSON")
