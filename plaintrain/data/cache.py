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

from plaintrain.data import columns
from plaintrain.data.columns import RecordColumns, to_columns
from plaintrain.data.datasets import coco_mistakes
from plaintrain.data.serialized import SerializedRecords
from plaintrain.utils.files import check_file, check_stored, reason

logger = logging.getLogger(__name__)

# A smaller file is parsed faster than it would be worth.
_LEAST_BYTES = 2**22
# The cache's own limits: the oldest files make room, and what nobody asked for in so long goes.
_MAX_BYTES = 8 * 2**30
_MAX_DAYS = 90
_ENDING = ".coco.npz"
# What may be wrong with a file of the cache, whoever wrote it.
_DAMAGED = (OSError, ValueError, TypeError, AttributeError, LookupError, EOFError, zipfile.BadZipFile)
_DAMAGED += (MemoryError, RuntimeError)


def cache_folder():
    """`$PLAINTRAIN_CACHE`, or `plaintrain` in the user's cache folder; None if the variable is empty."""
    folder = os.environ.get("PLAINTRAIN_CACHE")
    if folder is None:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "plaintrain")
    return os.path.expanduser(folder) or None


def cached_records(load, json_file, image_root, classes=None):
    """Records of a COCO file, from the cache where what it holds now has been read before.

    The cache knows a file by all of its content (SHA-256, half a second for COCO's): a copy that keeps its
    time, or an edit within the clock's tick, would deceive size and time. The classes and the reader's own
    code are in the key too. Its files are zip archives of plain arrays, with checksums, that run no code.

    Args:
        load: `load_coco_json`.
        json_file, image_root, classes: its arguments.

    Returns:
        (`SerializedRecords`, metadata); numbers of boxes and polygons are floats.

    Raises:
        UserError: see `load`. A cache that cannot be used raises nothing.
    """
    key = _key(load, json_file, classes)
    path = key and os.path.join(cache_folder(), key + _ENDING)
    if path and (found := _read(path, image_root)):
        logger.info(f"{json_file} is read from the cache, {path}")
        return found
    records, metadata = load(json_file, image_root, classes)
    try:
        arrays = to_columns(records, image_root)
        packed = SerializedRecords(RecordColumns(arrays, image_root))
    except (ValueError, OverflowError):
        # A path with .. in it, or a huge number.
        return SerializedRecords(records), metadata
    # Not what has been changed meanwhile.
    if path and key == _key(load, json_file, classes):
        _write(path, arrays, metadata)
    return packed, metadata


def _key(load, json_file, classes):
    """The name of what the cache holds of a file, or None if it is to hold nothing."""
    if not cache_folder():
        return None
    try:
        check_file(json_file)
        if os.path.getsize(json_file) < _LEAST_BYTES:
            return None
        with open(json_file, "rb") as f:
            digest = hashlib.file_digest(f, "sha256")
        for code in (load.__code__.co_filename, coco_mistakes.__file__, columns.__file__, __file__):
            with open(code, "rb") as f:
                digest.update(f.read())
    except OSError:
        return None
    digest.update(json.dumps([list(classes or ()), Image.MAX_IMAGE_PIXELS]).encode())
    return digest.hexdigest()


def _read(path, image_root):
    """(records, metadata) of a file of the cache, or None; a damaged one is removed."""
    if not os.path.exists(path):
        return None
    try:
        check_stored(path)
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        metadata = json.loads(arrays.pop("metadata").tobytes())
        # JSON would have made texts of the ids.
        labels = {id_: label for label, id_ in enumerate(metadata.pop("ids"))}
        records = SerializedRecords(RecordColumns(arrays, image_root))
        if arrays["labels"].min(initial=0) < 0 or arrays["labels"].max(initial=-1) >= len(labels):
            raise ValueError("it has labels that are none of its classes")
        with contextlib.suppress(OSError):
            os.utime(path)
    except PermissionError as e:
        logger.info(f"{path} in the cache cannot be read: {reason(e)}")
        return None
    except _DAMAGED as e:
        logger.warning(f"{path} in the cache is damaged and not used: {reason(e)}")
        with contextlib.suppress(OSError):
            os.unlink(path)
        return None
    return records, metadata | {"thing_dataset_id_to_contiguous_id": labels}


def _write(path, arrays, metadata):
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
            np.savez(f, metadata=text, **arrays)
        os.replace(temporary, path)
        # Another rank may remove the same.
        with contextlib.suppress(OSError):
            _make_room(folder)
    except OSError as e:
        logger.info(
            f"the cache {folder} cannot be written ({reason(e)}): the next start reads the JSON again"
        )
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _make_room(folder):
    """Remove what is old, and the oldest files beyond `_MAX_BYTES`."""
    now, size = time.time(), 0
    files = [f for f in os.scandir(folder) if f.name.endswith((_ENDING, ".tmp")) and f.is_file()]
    for file in sorted(files, key=lambda f: f.stat().st_mtime, reverse=True):
        size += file.stat().st_size
        days = 1 if file.name.endswith(".tmp") else _MAX_DAYS
        if size > _MAX_BYTES or now - file.stat().st_mtime > days * 86400:
            with contextlib.suppress(OSError):
                os.unlink(file.path)
