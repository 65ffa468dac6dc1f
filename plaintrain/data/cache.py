"""What was read of large COCO files, kept in a folder for the next start."""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import time
import zipfile

import numpy as np
from PIL import Image

from plaintrain import structures
from plaintrain.data import keypoints, serialized, validation
from plaintrain.data.serialized import SerializedRecords
from plaintrain.utils.files import check_file, reason

logger = logging.getLogger(__name__)

# A smaller file is parsed faster than it would be worth.
_LEAST_BYTES = 2**22
# The oldest files make room for new ones.
_MAX_BYTES = 8 * 2**30
_MAX_DAYS = 90
_ENDING = ".coco.npz"
# What may be wrong with a damaged file.
_DAMAGED = (OSError, ValueError, TypeError, LookupError, EOFError, RuntimeError, zipfile.BadZipFile)


def cache_folder():
    """`$PLAINTRAIN_CACHE`, or `plaintrain` in the user's cache folder; None if the variable is empty."""
    folder = os.environ.get("PLAINTRAIN_CACHE")
    if folder is None:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "plaintrain")
    return os.path.expanduser(folder) or None


def cached_records(load, json_file, image_root, classes=None):
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
    if path and (cached := _read(path)):
        logger.info(f"{json_file} is read from the cache, {path}")
        return cached
    records, metadata = load(json_file, image_root, classes)
    records = SerializedRecords(records)
    # Not what has been changed meanwhile.
    if path and records.annotations and path == _path(load, json_file, image_root, classes):
        _write(path, records, metadata)
    return records, metadata


def _path(load, json_file, image_root, classes):
    """Where the cache holds the records of a file, or None if it is not to hold them."""
    if not cache_folder():
        return None
    try:
        check_file(json_file)
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
    return os.path.join(cache_folder(), digest.hexdigest() + _ENDING)


def _read(path):
    """(records, metadata) of a file of the cache, or None."""
    if not os.path.exists(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        metadata = json.loads(arrays.pop("metadata").tobytes())
        # JSON would have made texts of the ids.
        labels = {id_: label for label, id_ in enumerate(metadata.pop("ids"))}
        records = SerializedRecords.from_arrays(arrays)
        with contextlib.suppress(OSError):
            os.utime(path)
    except _DAMAGED as e:
        logger.warning(f"{path} in the cache cannot be read: {reason(e)}")
        return None
    return records, metadata | {"thing_dataset_id_to_contiguous_id": labels}


def _write(path, records, metadata):
    """Write a file of the cache, whole or not at all; what prevents it is logged."""
    metadata = dict(metadata)
    metadata["ids"] = list(metadata.pop("thing_dataset_id_to_contiguous_id"))
    text = np.frombuffer(json.dumps(metadata).encode(), dtype=np.uint8)
    # Processes that start at once, on any machine, write the same, each its own; the last one's stays.
    folder, temporary = os.path.dirname(path), f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        # In a folder that users share all may read what `tempfile` would keep for one.
        with open(temporary, "xb") as f:
            np.savez(f, metadata=text, **records.to_arrays())
        os.replace(temporary, path)
        _make_room(folder)
    except OSError as e:
        logger.info(f"the cache {folder} cannot be written ({reason(e)}): each start reads the JSON")
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _make_room(folder):
    """Remove what nobody asked for in `_MAX_DAYS`, and the oldest files beyond `_MAX_BYTES`."""
    now, size = time.time(), 0
    files = [(f.stat(), f.path) for f in os.scandir(folder) if f.name.endswith((_ENDING, ".tmp"))]
    for stat, path in sorted(files, key=lambda file: file[0].st_mtime, reverse=True):
        size += stat.st_size
        days = 1 if path.endswith(".tmp") else _MAX_DAYS
        if size > _MAX_BYTES or now - stat.st_mtime > days * 86400:
            os.unlink(path)
