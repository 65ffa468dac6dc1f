"""Cache the parsed records of large COCO files on disk."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from plaintrain import structures
from plaintrain.data import keypoints, serialized, validation
from plaintrain.data.serialized import SerializedRecords
from plaintrain.utils.errors import UserError, get_first_line
from plaintrain.utils.files import atomic_write

logger = logging.getLogger(__name__)

# Smaller files are parsed too quickly for a cache to pay off.
_MIN_BYTES = 2**22


def get_cache_folder() -> str:
    """Return `$PLAINTRAIN_CACHE`, default `plaintrain` in the user's cache; "" disables the cache."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "plaintrain")
    return os.path.expanduser(os.environ.get("PLAINTRAIN_CACHE", default))


def load_cached_records(
    load: Callable[..., tuple], json_file: str, image_root: str, classes: Sequence[str] | None = None
) -> tuple[SerializedRecords, dict[str, Any]]:
    """Return the records and metadata of a COCO file, from the cache if it holds the current content.

    The key is the SHA-256 of the file (half a second for COCO) and of the reader's code; size and time miss
    some edits. Cache files are arrays with checksums; loading them runs no code. Without a usable cache,
    `load` (`read_coco_json`) is called with the other arguments.
    """
    path = _get_path(load, json_file, image_root, classes)
    if path and os.path.exists(path):
        try:
            cached = _read(path)
            logger.info(f"read {json_file} from the cache {path}")
            return cached
        # zipfile and NumPy raise many types of errors on a damaged file.
        except Exception as e:
            logger.warning(f"cannot read the cache file {path}: {get_first_line(e)}")
    records, metadata = load(json_file, image_root, classes)
    records = SerializedRecords(records)
    # The file must not have changed while it was read.
    if path and records.annotations and path == _get_path(load, json_file, image_root, classes):
        _write(path, records, metadata)
    return records, metadata


def _get_path(load, json_file, image_root, classes):
    """Return the path of the cache file, or None if the records are not to be cached."""
    if not get_cache_folder():
        return None
    try:
        if os.path.getsize(json_file) < _MIN_BYTES:
            return None
        with open(json_file, "rb") as f:
            digest = hashlib.file_digest(f, "sha256")
        sources = (module.__file__ for module in (keypoints, structures, serialized, validation))
        for source in (load.__code__.co_filename, __file__, *sources):
            with open(source, "rb") as f:
                digest.update(f.read())
    except OSError:
        return None
    arguments = [str(image_root), list(classes or ()), Image.MAX_IMAGE_PIXELS]
    digest.update(json.dumps(arguments).encode())
    return os.path.join(get_cache_folder(), digest.hexdigest() + ".coco.npz")


def _read(path):
    with np.load(path, allow_pickle=False) as archive:
        arrays = dict(archive)
    metadata = json.loads(arrays.pop("metadata").tobytes())
    # The ids are a list because JSON turns integer keys into strings.
    labels = {id_: label for label, id_ in enumerate(metadata.pop("ids"))}
    records = SerializedRecords.from_arrays(arrays)
    return records, metadata | {"thing_dataset_id_to_contiguous_id": labels}


def _write(path, records, metadata):
    metadata = dict(metadata)
    metadata["ids"] = list(metadata.pop("thing_dataset_id_to_contiguous_id"))
    text = np.frombuffer(json.dumps(metadata).encode(), dtype=np.uint8)
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with atomic_write(path, "wb") as f:
            np.savez(f, metadata=text, **records.to_arrays())
    except (OSError, UserError) as e:
        logger.info(f"cannot write the cache ({get_first_line(e)}); the next start parses the JSON again")
