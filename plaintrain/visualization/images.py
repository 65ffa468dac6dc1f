"""Letters on pictures, without a font file; pictures as files and in a window."""

import functools
import io
import os
import sys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageShow

from plaintrain.utils.errors import UserError
from plaintrain.utils.files import atomic_write, make_parent

# With more letters than Pillow's own font, which has those of English only.
_FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "arial.ttf")
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# Endings of what can be written.
PICTURES = tuple(_FORMATS)


@functools.lru_cache(maxsize=64)
def _default_font(size):
    return ImageFont.load_default(size)


@functools.lru_cache(maxsize=64)
def _font_for(letters, size):
    """A font that has all of these letters if this machine has one, otherwise Pillow's own."""
    for name in _FONTS:
        try:
            font = ImageFont.truetype(name, size)
        except OSError:
            continue
        missing = bytes(font.getmask("\uffff"))
        if all(bytes(font.getmask(letter)) != missing for letter in letters):
            return font
    return _default_font(size)


def font_of(text, size):
    """A font of `size` pixels with the letters of a text, as far as this machine has one."""
    return _default_font(size) if text.isascii() else _font_for(frozenset(text) - {" "}, size)


def draw_on(image, draw):
    """The image after `draw(ImageDraw)` has drawn on it."""
    picture = to_pillow(image)
    draw(ImageDraw.Draw(picture))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def shortened(text, size, room):
    """(text, width in pixels), cut so that it is no wider than `room`."""
    font, kept = font_of(text, size), len(text)
    full = text
    while kept > 0 and font.getlength(text) > room:
        kept -= 1
        text = full[:kept] + "..."
    return text, font.getlength(text)


def draw_labels(image, boxes, captions, colors):
    """Write each caption at its box, on a ground of its colour, where it hides least of the others."""
    height, width = image.shape[-2:]
    size = max(10, round((height * width) ** 0.5 / 42))
    tall = round(1.3 * size)
    texts, taken = [], []
    for (x0, y0, x1, y1), caption in zip(boxes, captions, strict=True):
        text, length = shortened(caption, size, width - 4)
        wide = round(length) + max(4, size // 3)
        tops = (y0 - tall, y0, y1 + 1, y1 + 1 - tall)
        corners = [(x, y) for y in tops for x in (x0, x1 + 1 - wide)]
        corners = [(min(max(x, 0), max(width - wide, 0)), y) for x, y in corners if 0 <= y <= height - tall]
        places = [(x, y, x + wide, y + tall) for x, y in corners or [(0, 0)]]
        places = [min(places, key=lambda place: sum(_overlap(place, other) for other in taken))]
        taken += places if text else []
        texts.append((text, *places))

    def draw(canvas):
        for (text, place), color in zip(texts, colors, strict=True):
            if text:
                canvas.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=color)
                middle = (place[0] + (place[2] - place[0]) / 2, place[1] + tall / 2)
                canvas.text(middle, text, fill=ink_on(color), font=font_of(text, size), anchor="mm")

    return draw_on(image, draw)


def _overlap(a, b):
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def ink_on(color):
    """Black or white, which of them is read better on a colour."""
    return (0, 0, 0) if 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140 else (255, 255, 255)


def check_picture_name(path):
    """Refuse a file name whose ending is of no kind of picture that can be written."""
    if os.path.splitext(path)[1].lower() not in _FORMATS:
        raise UserError(f"the picture {path!r} must end in one of {', '.join(PICTURES)}")


def save_picture(path, image, quality=92):
    """Write a picture, whole or not at all; its folder is made.

    Args:
        path: ends in .png, .jpg, .jpeg or .webp.
        image: uint8 `[3, H, W]`, RGB.
        quality: of a JPEG or WebP, to 100.

    Raises:
        UserError: another ending, or a file that cannot be written.
    """
    check_picture_name(path)
    buffer = io.BytesIO()
    kind = _FORMATS[os.path.splitext(path)[1].lower()]
    to_pillow(image).save(buffer, format=kind, quality=quality)
    make_parent(path)
    with atomic_write(path, "wb") as f:
        f.write(buffer.getvalue())


def to_pillow(image):
    """A uint8 tensor `[3, H, W]` as Pillow's image."""
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))


def check_display():
    """Refuse to open windows where nobody could see them."""
    is_x11 = sys.platform not in ("win32", "darwin")
    if is_x11 and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise UserError("there is no display to show pictures on: use --output DIR or --grid FILE")


def show_picture(image, title=None):
    """Open a picture in the viewer of this machine.

    Raises:
        UserError: there is no display, or no viewer.
    """
    check_display()
    if not ImageShow.show(to_pillow(image), title):
        raise UserError("no program shows pictures here: use --output DIR or --grid FILE")


def check_picture_arguments(args):
    """Refuse what `add_picture_arguments` took and cannot be done, before anything is drawn."""
    for name in ("num", "columns", "size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.grid:
        check_picture_name(args.grid)
    args.show = args.show or not (args.output or args.grid)
    if args.show:
        check_display()
