"""Image files: finding them, opening them, their size."""

import contextlib
import errno
import os
import struct

from PIL import ExifTags, Image

from plaintrain.structures import make_record
from plaintrain.utils.errors import DataError, UserError, collect_errors
from plaintrain.utils.files import check_file, describe_os_error

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")

# What Pillow raises for a file that is broken, in its pixels or its EXIF data.
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError)


def list_images(folder):
    """Paths of the image files in a folder and the folders below it, sorted."""
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}, where images were expected")
    found, seen = [], set()
    for parent, _, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            raise UserError(f"the folder {real} is reached twice, also as {parent}: a link leads there")
        seen.add(real)
        found += [os.path.join(parent, name) for name in names if name.lower().endswith(_EXTENSIONS)]
    if not found:
        raise UserError(f"there is no image in {folder}; known endings: {' '.join(_EXTENSIONS)}")
    return sorted(found)


@contextlib.contextmanager
def open_image(file_name):
    """`PIL.Image.open`, with a `DataError` for what cannot be read, before or within the block."""
    try:
        check_file(file_name)
        with Image.open(file_name) as image:
            if image.format == "EPS":
                # Pillow would have Ghostscript run what the file says.
                raise OSError(errno.EINVAL, "it is PostScript, a program, whatever its name ends in")
            yield image
    except UserError:
        raise
    except FileNotFoundError as e:
        raise DataError("unreadable", f"the image file {file_name} does not exist") from e
    except _BROKEN as e:
        raise DataError(
            "unreadable", f"cannot read the image file {file_name}: {describe_os_error(e)}"
        ) from e


def is_too_large(height, width):
    """Whether Pillow would refuse to decode an image of this size, as a decompression bomb."""
    return Image.MAX_IMAGE_PIXELS is not None and height * width > 2 * Image.MAX_IMAGE_PIXELS


def read_image_header(file_name):
    """(height, width, EXIF orientation) of an image file, the size as that orientation turns it."""
    with open_image(file_name) as image:
        width, height = image.size
        # The PNG class' own method would decode the whole image first.
        orientation = int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    return (width, height, orientation) if orientation >= 5 else (height, width, orientation)


def build_image_record(file_name, image_id, problems=None):
    """A record without annotations, its size from the file; None if `refuse` noted a problem instead."""
    with collect_errors(problems):
        height, width, _ = read_image_header(file_name)
        return make_record(file_name, image_id, height, width)
