"""List image files, open them and read their sizes."""

import contextlib
import errno
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import ExifTags, Image

from plaintrain.structures import make_record
from plaintrain.utils.errors import DataError, UserError, collect_errors, get_first_line
from plaintrain.utils.files import check_file, is_below

_KNOWN = ".jpg .jpeg .jpe .jfif .png .webp .avif .bmp .dib .tif .tiff .gif .jp2 .j2k .mpo .ppm .pgm .pbm .tga"
IMAGE_EXTENSIONS = tuple(_KNOWN.split())

# Errors that Pillow raises for broken pixels or EXIF data.
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError)


def is_visible(name: str) -> bool:
    """Return whether a file or folder holds data, unlike `.DS_Store`, `._a.jpg` and `__MACOSX`."""
    return not name.startswith(".") and name != "__MACOSX"


def find_name(folder: str, name: str) -> str:
    """Return the name on the disk of a file below a folder; `name` may have `\\` or be URL-encoded."""
    if "\\" in name or "%" in name:
        slashed = name.replace("\\", "/")
        names = (n for n in (name, slashed, unquote(slashed)) if is_below(folder, n))
        return next((n for n in names if os.path.exists(os.path.join(folder, n))), name)
    return name


def list_images(folder: str) -> list[str]:
    """Return the sorted paths of the visible image files in a folder and its subfolders."""
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}, where images were expected")
    paths: list[str] = []
    visited = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = filter(is_visible, folders)
        real = os.path.realpath(parent)
        if real in visited:
            raise UserError(f"the folder {real} is reached twice, also as {parent}: a link leads there")
        visited.add(real)
        images = (name for name in filter(is_visible, names) if name.lower().endswith(IMAGE_EXTENSIONS))
        paths += [os.path.join(parent, name) for name in images]
    if not paths:
        raise UserError(f"there is no image in {folder}; known extensions: {_KNOWN}")
    return sorted(paths)


@contextlib.contextmanager
def open_image(file_name: str) -> Iterator[Image.Image]:
    """Open an image; raise a `DataError` if it cannot be read, here or within the block."""
    try:
        check_file(file_name)
        with Image.open(file_name) as image:
            if image.format == "EPS":
                # Pillow would let Ghostscript execute the file.
                raise OSError(errno.EINVAL, "it is a PostScript program, whatever its extension")
            yield image
    except UserError:
        raise
    except FileNotFoundError as e:
        raise DataError("unreadable", f"the image file {file_name} does not exist") from e
    except _PILLOW_ERRORS as e:
        reason = get_first_line(e)
        if isinstance(e, Image.DecompressionBombError):
            reason = f"it has more pixels than {describe_pixel_limit()}"
        message = f"cannot read the image file {file_name}: {reason}"
        raise DataError("unreadable", message) from e


def describe_pixel_limit() -> str:
    """Return the largest number of pixels of an image, and its key."""
    return f"{2 * (Image.MAX_IMAGE_PIXELS or 0):,}, twice PIL.Image.MAX_IMAGE_PIXELS; tile such images"


def is_too_large(height: int, width: int) -> bool:
    """Return whether Pillow rejects an image of this size as a decompression bomb."""
    return Image.MAX_IMAGE_PIXELS is not None and height * width > 2 * Image.MAX_IMAGE_PIXELS


def read_image_header(file_name: str) -> tuple[int, int, int]:
    """Return (height, width, EXIF orientation) of an image file, the size after applying the orientation."""
    with open_image(file_name) as image:
        width, height = image.size
        # PngImageFile.getexif would first decode the whole image.
        orientation = int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    return (width, height, orientation) if orientation >= 5 else (height, width, orientation)


def build_image_record(
    file_name: str, image_id: int | str, problems: list[UserError] | None = None
) -> dict[str, Any] | None:
    """Build a record without annotations; return None if the error was added to `problems`."""
    with collect_errors(problems):
        height, width, _ = read_image_header(file_name)
        return make_record(file_name, image_id, height, width)
    return None


def load_images(
    root: str, classes: Sequence[str] | None = None, problems: list[UserError] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """List the images in a folder, recursively; image ids are the paths relative to it."""
    paths = list_images(root)
    records = [build_image_record(path, Path(path).relative_to(root).as_posix(), problems) for path in paths]
    return list(filter(None, records)), {"thing_classes": list(classes)} if classes else {}
