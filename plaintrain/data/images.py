"""Read images of any format as RGB tensors."""

import hashlib
import logging
import math
from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin
from torch import Tensor

from plaintrain.config import CfgNode, check_cfg
from plaintrain.data.datasets import shapes
from plaintrain.data.image_files import open_image, read_image_header
from plaintrain.utils.errors import DataError, UserError

logger = logging.getLogger(__name__)

# The pixel type of a file by Pillow's raw mode, where the mode of the image is a wider type.
_STORED = {
    "I;16": np.uint16, "I;16B": np.uint16, "I;16L": np.uint16, "I;16N": np.uint16,
    "I;16S": np.int16, "I;16BS": np.int16, "I;32N": np.uint32, "L;8S": np.int8,
}  # fmt: skip
# The values that become 0 and 255 if INPUT.PIXEL_RANGE is []; other types have no default.
_DEFAULT_RANGES = {"uint16": (0, 65535), "float32": (0, 1)}


def get_pixel_range(cfg: CfgNode) -> tuple[float, ...]:
    """Return INPUT.PIXEL_RANGE: (low, high), or () for the default range of each image's type."""
    check_cfg(cfg)
    return tuple(cfg.INPUT.PIXEL_RANGE)


def read_image(file_name: str, pixel_range: Sequence[float] = ()) -> Tensor:
    """Read the first frame of an image file, or draw an image of the shapes dataset; see `convert_to_rgb`."""
    if shapes.is_drawn(file_name):
        return torch.from_numpy(shapes.render(file_name)).permute(2, 0, 1)
    with open_image(file_name) as image:
        return convert_to_rgb(image, pixel_range, f"the image file {file_name}")


def convert_to_rgb(image: Image.Image, pixel_range: Sequence[float] = (), name: str = "the image") -> Tensor:
    """Convert a Pillow image of any mode to a uint8 tensor `[3, H, W]`, RGB; apply the EXIF orientation.

    `pixel_range` is (low, high), the values that become 0 and 255; () takes the range of the pixel type: 0 to
    255 for 8 bits, 0 to 65535 for unsigned 16 bits, 0 to 1 for floats. `name` is for errors.
    """
    # The raw mode and format are lost once the pixels are read.
    raw_mode = _get_raw_mode(image)
    file_format = image.format
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF" or raw_mode == "L;8S":
        array = np.asarray(image)
        # Pillow scales a PPM to 16 bits, by the largest value that the file declares.
        stored = np.uint16 if file_format == "PPM" and image.mode == "I" else _STORED.get(raw_mode)
        array = array.astype(stored or array.dtype.newbyteorder("="))
        default = (0, 4095) if raw_mode == "I;12" else _DEFAULT_RANGES.get(array.dtype.name)
        image = Image.fromarray(_convert_to_uint8(array, pixel_range, default, name))
        pixel_range = ()
    # Converting RGB to RGB would copy the image.
    array = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    if pixel_range:
        # Pillow keeps only the upper 8 bits of 16-bit colours.
        if ";16" in raw_mode or pixel_range[0] < 0 or pixel_range[1] > 255:
            bits = "16-bit colours, of which 8 bits are read" if ";16" in raw_mode else "8-bit pixels"
            text = f"{name} has {bits}, but INPUT.PIXEL_RANGE is {list(pixel_range)}"
            raise DataError("pixel_range", f"{text}; convert it to the type of the others, or set []")
        array = _convert_to_uint8(array, pixel_range, None, name)
    return torch.from_numpy(array).permute(2, 0, 1)


def _get_raw_mode(image):
    """Return Pillow's raw mode of a file, for example "I;16B", or ""."""
    if image.mode == "L" and getattr(image, "tag_v2", {}).get(TiffImagePlugin.SAMPLEFORMAT) == (2,):
        # Pillow has no name for signed 8 bits and reads them as unsigned.
        return "L;8S"
    args = image.tile[0][3] if getattr(image, "tile", None) else ""
    return args if isinstance(args, str) else str(args[0]) if args else ""


def _convert_to_uint8(array, pixel_range, default, name):
    """Map a range linearly to 256 equally wide steps, as torchvision's `to_dtype`."""
    lowest = array.min().item()
    highest = array.max().item()
    text = f"{name} has {array.dtype.name} pixels from {lowest:.10g} to {highest:.10g}"
    hint = "set INPUT.PIXEL_RANGE [low, high] to the range of the dataset"
    if not math.isfinite(lowest + highest):
        raise DataError("pixel_range", f"{name} has {array.dtype.name} pixels that are NaN or infinite")
    if not (pixel_range or default):
        raise DataError("pixel_range", f"{text}, a type without a default range; {hint}")
    low, high = pixel_range or default
    # Floats may exceed the range by a rounding error.
    tolerance = (high - low) * 1e-6 if array.dtype.kind == "f" else 0
    if lowest < low - tolerance or highest > high + tolerance:
        limits = f"INPUT.PIXEL_RANGE {list(pixel_range)}" if pixel_range else f"its type's {low} to {high}"
        raise DataError("pixel_range", f"{text}, outside {limits}; {hint}")
    # float32 cannot represent all 32-bit integers.
    values = array.astype(np.float64 if array.dtype.kind in "iu" and array.itemsize > 2 else np.float32)
    return (((values - low) / (high - low)).clip(0, 1) * (256 - 1e-3)).astype(np.uint8)


class ImageCache:
    """Thread-safe `read_image` that keeps the first images that fit into `max_bytes`.

    Nothing is evicted: LRU would evict each image before the next epoch reads it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._images: dict[tuple, Tensor] = {}
        self._lock = Lock()
        self._is_full = False

    def __call__(self, file_name: str, pixel_range: Sequence[float] = ()) -> Tensor:
        key = file_name, tuple(pixel_range)
        if key not in self._images:
            image = read_image(file_name, pixel_range)
            with self._lock:
                if key not in self._images:
                    if self._num_bytes + image.nbytes > self._max_bytes:
                        if not self._is_full:
                            text = f"holds {len(self._images)} images, not all"
                            logger.info(f"DATALOADER.CACHE_BYTES {self._max_bytes} {text}")
                        self._is_full = True
                        return image
                    self._num_bytes += image.nbytes
                    self._images[key] = image
        # An augmentation may change the image in place.
        return self._images[key].clone()


def check_image_size(record: dict[str, Any], image: Tensor) -> None:
    """Reject an image whose size differs from its record's `height` and `width`."""
    height, width = image.shape[-2:]
    if (record["height"], record["width"]) == (height, width):
        return
    file_name = record["file_name"]
    hint = ""
    is_swapped = (record["width"], record["height"]) == (height, width) and not shapes.is_drawn(file_name)
    if is_swapped and read_image_header(file_name)[2] >= 5:
        hint = "; its EXIF orientation rotates it, but the annotations were made without the rotation"
    size = f"{record['width']}x{record['height']}"
    raise UserError(f"the image {file_name} is {width}x{height}, but its annotation says {size}{hint}")


def inspect_image(record: dict[str, Any], pixel_range: Sequence[float]) -> dict[str, Any]:
    """Decode the image of a record, and return what `validation.check_images` needs to know of it.

    Either `error` and `kind`, a problem type; or `size`, (height, width); `turned`, whether the EXIF
    orientation rotates it; `pixels`, a hash; and `spread`, the largest range of values in a channel.
    """
    try:
        image = read_image(record["file_name"], pixel_range)
        turned = not shapes.is_drawn(record["file_name"]) and read_image_header(record["file_name"])[2] > 1
    except UserError as e:
        return {"error": str(e), "kind": getattr(e, "error_type", "unreadable")}
    size = tuple(image.shape[-2:])
    pixels = hashlib.blake2b(image.contiguous().numpy().data, digest_size=16, key=repr(size).encode())
    spread = int((image.amax((1, 2)).int() - image.amin((1, 2)).int()).max())
    return {"size": size, "turned": turned, "pixels": pixels.hexdigest(), "spread": spread}
