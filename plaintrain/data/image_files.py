"""List image files, open them and read their sizes."""

import contextlib
import errno
import os
import struct
from collections.abc import Iterator
from typing import Any

from PIL import ExifTags, Image

from plaintrain.structures import make_record
from plaintrain.utils.errors import DataError, UserError, collect_errors, get_first_line
from plaintrain.utils.files import check_file

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")

# Errors that Pillow raises for broken pixels or EXIF data.
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError)


def list_images(folder: str) -> list[str]:
    """Return the sorted paths of the image files in a folder and its subfolders."""
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}, where images were expected")
    paths: list[str] = []
    visited = set()
    for parent, _, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            raise UserError(f"the folder {real} is reached twice, also as {parent}: a link leads there")
        visited.add(real)
        paths += [os.path.join(parent, name) for name in names if name.lower().endswith(_EXTENSIONS)]
    if not paths:
        raise UserError(f"there is no image in {folder}; known extensions: {' '.join(_EXTENSIONS)}")
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
        message = f"cannot read the image file {file_name}: {get_first_line(e)}"
        raise DataError("unreadable", message) from e


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
