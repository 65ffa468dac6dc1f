"""Reading images: files of any common kind, and those of the shapes set, as RGB tensors."""

import logging
import math
from threading import Lock

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

from plaintrain.data.datasets import shapes
from plaintrain.data.image_files import open_image, read_image_header
from plaintrain.structures import are_numbers
from plaintrain.utils.errors import DataError, UserError

logger = logging.getLogger(__name__)

# The type of the pixels that a file holds, by Pillow's raw mode, where the image's own mode is a wider one.
_STORED = {
    "I;16": np.uint16, "I;16B": np.uint16, "I;16L": np.uint16, "I;16N": np.uint16,
    "I;16S": np.int16, "I;16BS": np.int16, "I;32N": np.uint32, "L;8S": np.int8,
}  # fmt: skip
# The range of values that becomes 0 to 255 where INPUT.PIXEL_RANGE is []; other types have none.
_DEFAULT_RANGES = {"uint16": (0, 65535), "float32": (0, 1)}


def get_pixel_range(cfg):
    """INPUT.PIXEL_RANGE as a tuple: (low, high), or () for the range of each image's type."""
    values = tuple(cfg.INPUT.PIXEL_RANGE)
    if values and not (len(values) == 2 and are_numbers(values) and values[0] < values[1]):
        raise UserError(f"INPUT.PIXEL_RANGE must be [] or two numbers [low, high], got {list(values)}")
    return values


def read_image(file_name, pixel_range=()):
    """Read an image file, or draw an image of the shapes set.

    Applies the EXIF orientation. Greyscale, palette, CMYK and images with more than 8 bits become RGB; of
    several frames the first is read.

    Args:
        pixel_range: see `to_rgb`.

    Returns:
        uint8 tensor `[3, H, W]`, RGB.
    """
    if shapes.is_drawn(file_name):
        return torch.from_numpy(shapes.render(file_name)).permute(2, 0, 1)
    with open_image(file_name) as image:
        return convert_to_rgb(image, pixel_range, f"the image file {file_name}")


def convert_to_rgb(image, pixel_range=(), name="the image"):
    """Convert a Pillow image of any mode, its EXIF orientation applied.

    The conversion is linear and depends on the type of the pixels and on `pixel_range` alone, never on the
    values in this image.

    Args:
        image: the Pillow image; it is not changed.
        pixel_range: (low, high), the values that become 0 and 255, in every image; () takes the range of the
            image's type: 0 to 255 for 8 bits, 0 to 65535 for 16 bits without sign, 0 to 1 for floats.
        name: what errors call the image.

    Returns:
        uint8 tensor `[3, H, W]`, RGB.
    """
    # Known only until the pixels are read.
    raw_mode, file_format = _raw_mode(image), image.format
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF" or raw_mode == "L;8S":
        array = np.asarray(image)
        # Pillow scales a PPM to 16 bits, by the largest value that the file declares.
        stored = np.uint16 if file_format == "PPM" and image.mode == "I" else _STORED.get(raw_mode)
        array = array.astype(stored or array.dtype.newbyteorder("="))
        default = (0, 4095) if raw_mode == "I;12" else _DEFAULT_RANGES.get(array.dtype.name)
        image, pixel_range = Image.fromarray(_to_8_bits(array, pixel_range, default, name)), ()
    # No conversion of what is RGB, which would copy the image.
    array = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    if pixel_range:
        # Pillow keeps the upper 8 bits of colours of 16.
        if ";16" in raw_mode or pixel_range[0] < 0 or pixel_range[1] > 255:
            bits = "16-bit colours, of which 8 bits are read" if ";16" in raw_mode else "8-bit pixels"
            found = f"{name} has {bits}, but INPUT.PIXEL_RANGE is {list(pixel_range)}"
            raise DataError("pixel_range", f"{found}; convert it to the type of the others, or set []")
        array = _to_8_bits(array, pixel_range, None, name)
    return torch.from_numpy(array).permute(2, 0, 1)


def _raw_mode(image):
    """Pillow's name of what an image's file holds, as "I;16B", or ""; before the pixels are read."""
    if image.mode == "L" and getattr(image, "tag_v2", {}).get(TiffImagePlugin.SAMPLEFORMAT) == (2,):
        # Pillow has no name for 8 bits with a sign, and reads them without.
        return "L;8S"
    args = image.tile[0][3] if getattr(image, "tile", None) else ""
    return args if isinstance(args, str) else str(args[0]) if args else ""


def _to_8_bits(array, pixel_range, default, name):
    """Map a range linearly to 0 to 255, as torchvision's `to_dtype`: all 256 steps are equally wide."""
    least, most = array.min().item(), array.max().item()
    found = f"{name} has {array.dtype.name} pixels from {least:.10g} to {most:.10g}"
    hint = "set INPUT.PIXEL_RANGE [low, high] to the range of the dataset"
    if not math.isfinite(least + most):
        raise DataError("pixel_range", f"{name} has {array.dtype.name} pixels that are NaN or infinite")
    if not (pixel_range or default):
        raise DataError("pixel_range", f"{found}, a type without a default range; {hint}")
    low, high = pixel_range or default
    # What a float is over the edge by rounding is not outside.
    slack = (high - low) * 1e-6 if array.dtype.kind == "f" else 0
    if least < low - slack or most > high + slack:
        limits = f"INPUT.PIXEL_RANGE {list(pixel_range)}" if pixel_range else f"its type's {low} to {high}"
        raise DataError("pixel_range", f"{found}, outside {limits}; {hint}")
    # float32 has no room for all whole numbers of 32 bits.
    values = array.astype(np.float64 if array.dtype.kind in "iu" and array.itemsize > 2 else np.float32)
    return (((values - low) / (high - low)).clip(0, 1) * (256 - 1e-3)).astype(np.uint8)


class ImageCache:
    """Reads images as `read_image` does, and keeps the first that fit into `limit` bytes, for threads.

    None gives way to another: in passes over all images, what came last comes last again.
    """

    def __init__(self, limit):
        self._limit, self._used, self._images, self._lock = limit, 0, {}, Lock()
        self._is_full = False

    def __call__(self, file_name, pixel_range=()):
        key = file_name, tuple(pixel_range)
        if key not in self._images:
            image = read_image(file_name, pixel_range)
            with self._lock:
                if key not in self._images:
                    if self._used + image.nbytes > self._limit:
                        self._report_full()
                        return image
                    self._used += image.nbytes
                    self._images[key] = image
        # What is kept stays as it is, whatever an augmentation does to what it gets.
        return self._images[key].clone()

    def _report_full(self):
        if not self._is_full:
            self._is_full, held = True, len(self._images)
            logger.info(
                f"DATALOADER.CACHE_BYTES {self._limit} holds {held} images: others are read each time"
            )


def check_image_size(record, image):
    """Refuse an image whose size differs from its record's `height` and `width`."""
    height, width = image.shape[-2:]
    if (record["height"], record["width"]) == (height, width):
        return
    file_name, hint = record["file_name"], ""
    is_swapped = (record["width"], record["height"]) == (height, width) and not shapes.is_drawn(file_name)
    if is_swapped and read_image_header(file_name)[2] >= 5:
        hint = "; its EXIF orientation turns it, so the annotations were made on the unturned image"
    raise UserError(
        f"the image {file_name} is {width}x{height}, but its annotation says "
        f"{record['width']}x{record['height']}{hint}"
    )
