"""Drawn images as files, on a contact sheet, and in a window."""

import os
import sys

from PIL import ImageShow
from torchvision.transforms.v2.functional import to_pil_image

from plaintrain.utils.errors import UserError
from plaintrain.utils.files import atomic_write
from plaintrain.utils.logger import build_progress_bar
from plaintrain.visualization.drawing import draw_sheet

# Endings of what can be written.
IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# Entries that the legend of a sheet has room for.
_MOST_ENTRIES = 24


def _get_format(path):
    format_ = IMAGE_FORMATS.get(os.path.splitext(path)[1].lower())
    if format_ is None:
        raise UserError(f"the picture {path!r} must end in one of {', '.join(IMAGE_FORMATS)}")
    return format_


def save_image(path, image):
    """Write an image, uint8 `[3, H, W]`, whole or not at all, to a file that ends in one of `PICTURES`."""
    format_ = _get_format(path)
    with atomic_write(path, "wb") as f:
        to_pil_image(image).save(f, format=format_, quality=92)


def check_image_arguments(args):
    """Reject what `add_image_arguments` took and cannot be done, before anything is drawn."""
    for name in ("num", "columns", "size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.grid:
        _get_format(args.grid)
    args.show = args.show or not (args.output or args.grid)
    has_display = sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY")
    if args.show and not (has_display or os.environ.get("WAYLAND_DISPLAY")):
        raise UserError("there is no display to show pictures on: use --output DIR or --grid FILE")


def write_images(pictures, args, title, legend, width=1):
    """Write pictures one by one, and write and show them on a sheet, as the arguments say.

    Args:
        pictures: iterable of (file name of the image, caption, drawn image).
        args: those of `add_image_arguments`.
        title: of the window.
        legend: {text: colour}, which may grow while the pictures are drawn.
        width: number of images side by side in a picture.

    Returns:
        the number of pictures.
    """
    count, images, captions = 0, [], []
    for file_name, caption, image in build_progress_bar(pictures, desc="pictures", total=args.num):
        count += 1
        stem = os.path.splitext(os.path.basename(file_name.split("?")[0]))[0]
        if args.output:
            save_image(os.path.join(args.output, f"{count:04d}_{stem}.jpg"), image)
        if args.grid or args.show:
            images.append(image)
            captions.append(stem + caption)
    if count and args.output:
        print(f"wrote {count} pictures to {args.output}")
    if images:
        columns = min(max(1, args.columns // width), count)
        legend = legend if len(legend) <= _MOST_ENTRIES else None
        sheet = draw_sheet(images, captions, columns, columns * width * max(args.size, 320), legend)
        if args.grid:
            save_image(args.grid, sheet)
            print(f"wrote {count} pictures to {args.grid}")
        if args.show and not ImageShow.show(to_pil_image(sheet), title):
            raise UserError("no program shows pictures here: use --output DIR or --grid FILE")
    return count
