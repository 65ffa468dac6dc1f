"""Save drawn images as files, on a contact sheet, and show them in a window."""

import os
import sys
from argparse import Namespace
from collections.abc import Iterable

from PIL import ImageShow
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from plaintrain.utils.errors import UserError
from plaintrain.utils.files import atomic_write
from plaintrain.utils.logger import build_progress_bar
from plaintrain.utils.text import make_file_name
from plaintrain.visualization.colors import Legend
from plaintrain.visualization.drawing import draw_sheet

IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_MAX_LEGEND_ENTRIES = 24


def _get_format(path):
    format_ = IMAGE_FORMATS.get(os.path.splitext(path)[1].lower())
    if format_ is None:
        raise UserError(f"the image {path!r} must end in one of {', '.join(IMAGE_FORMATS)}")
    return format_


def save_image(path: str, image: Tensor) -> None:
    """Write an image, uint8 `[3, H, W]`, atomically in the format of the file's extension."""
    format_ = _get_format(path)
    with atomic_write(path, "wb") as f:
        to_pil_image(image).save(f, format=format_, quality=92)


def check_image_arguments(args: Namespace) -> None:
    """Check the values of `add_image_arguments`."""
    for flag in ("max_images", "columns", "size"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    if args.grid:
        _get_format(args.grid)
    args.show = args.show or not (args.output or args.grid)
    has_display = sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY")
    if args.show and not (has_display or os.environ.get("WAYLAND_DISPLAY")):
        raise UserError("there is no display to show images on; use --output DIR or --grid FILE")


def write_images(
    drawings: Iterable[tuple[str, str, Tensor]], args: Namespace, title: str, legend: Legend, width: int = 1
) -> int:
    """Write images to --output, --grid and --show, and return how many there are.

    Args:
        drawings: (file name, caption, uint8 `[3, H, W]`) of each image; may add to the legend.
        width: columns of the sheet that an image takes.
    """
    count = 0
    images = []
    captions = []
    for file_name, caption, image in build_progress_bar(drawings, desc="images", total=args.max_images):
        count += 1
        stem = make_file_name(os.path.splitext(os.path.basename(file_name.split("?")[0]))[0])
        if args.output:
            save_image(os.path.join(args.output, f"{count:04d}_{stem}.jpg"), image)
        if args.grid or args.show:
            images.append(image)
            captions.append(stem + caption)
    if count and args.output:
        print(f"wrote {count} images to {args.output}")
    if images:
        columns = min(max(1, args.columns // width), count)
        shown_legend = legend if len(legend) <= _MAX_LEGEND_ENTRIES else None
        sheet = draw_sheet(images, captions, columns, columns * width * max(args.size, 320), shown_legend)
        if args.grid:
            save_image(args.grid, sheet)
            print(f"wrote {count} images to {args.grid}")
        if args.show and not ImageShow.show(to_pil_image(sheet), title):
            raise UserError("no program can show images here; use --output DIR or --grid FILE")
    return count
