"""Reading images: files of any common kind, and those of the shapes set, as RGB tensors."""

import logging
from threading import Lock

import numpy as np
import torch
from PIL import Image, ImageOps

from plaintrain.data import shapes
from plaintrain.data.folder import BROKEN_IMAGE, image_header, open_image
from plaintrain.utils.errors import UserError
from plaintrain.utils.reading import reason

logger = logging.getLogger(__name__)


def read_image(file_name):
    """Read an image file, or draw an image of the shapes set.

    Applies the EXIF orientation; greyscale, palette, CMYK and 16-bit images become RGB.

    Returns:
        uint8 tensor `[3, H, W]`, RGB.

    Raises:
        UserError: the file is missing, cut off or not an image.
    """
    if shapes.is_drawn(file_name):
        return torch.from_numpy(shapes.render(file_name)).permute(2, 0, 1)
    try:
        with open_image(file_name) as image:
            # In place, and no conversion of what is RGB: each would copy the image.
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except FileNotFoundError as e:
        raise UserError(f"the image file {file_name} does not exist") from e
    except BROKEN_IMAGE as e:
        raise UserError(f"cannot read the image file {file_name}: {reason(e)}") from e


def to_rgb(image):
    """Pillow's image of any mode, as it lies, as a uint8 tensor `[3, H, W]`, RGB."""
    if image.mode.startswith("I"):
        # 16 bits, which Pillow may hold in 32: keep the upper 8, as a plain cast would clip.
        deep = np.asarray(image)
        image = Image.fromarray((deep >> 8 if deep.max() > 255 else deep).astype(np.uint8))
    array = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)


class ImageCache:
    """Reads images as `read_image` does, and keeps the first that fit; for the threads of a process.

    None gives way to another: in passes over all images, what came last comes last again.
    """

    def __init__(self, limit):
        """limit: bytes of decoded images to keep."""
        self._limit, self._used, self._images, self._lock = limit, 0, {}, Lock()
        self._is_full = False

    def __call__(self, file_name):
        image = self._images.get(file_name)
        if image is None:
            image = read_image(file_name)
            if not self._keep(file_name, image):
                return image
        # What is kept stays as it is, whatever an augmentation does to what it gets.
        return image.clone()

    def _keep(self, file_name, image):
        with self._lock:
            if file_name in self._images:
                return True
            if self._used + image.nbytes <= self._limit:
                self._used += image.nbytes
                self._images[file_name] = image
                return True
            if not self._is_full:
                self._is_full, held = True, len(self._images)
                logger.info(
                    f"DATALOADER.CACHE_BYTES {self._limit} holds {held} images: others are read each time"
                )
            return False


def check_image_size(record, image):
    """Refuse an image whose size differs from its record's `height` and `width`."""
    height, width = image.shape[-2:]
    if (record["height"], record["width"]) != (height, width):
        hint = ""
        if (record["width"], record["height"]) == (height, width) and _is_turned(record["file_name"]):
            hint = "; its EXIF orientation turns it, so the annotations were made on the unturned image"
        raise UserError(
            f"the image {record['file_name']} is {width}x{height}, but its annotation says "
            f"{record['width']}x{record['height']}{hint}"
        )


def _is_turned(file_name):
    """Whether an image file's EXIF orientation exchanges its sides."""
    return not shapes.is_drawn(file_name) and image_header(file_name)[2] >= 5
