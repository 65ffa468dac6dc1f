"""Draw instances on images: boxes, class names, scores, masks and keypoints.

`instances` is a dict of `boxes` (`[N, 4]`, XYXY, pixels) and `labels` (`[N]`, 0 to K-1), and optionally
`scores` (`[N]`), `masks` (`[N, H, W]`), `keypoints` (`[N, Kp, 3]`, drawn where the last is above 0) and
`crowds` (bool `[N]`).
"""

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import pil_to_tensor, resize_image, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_keypoints, draw_segmentation_masks, make_grid

from plaintrain.data.detection_utils import annotations_to_target
from plaintrain.utils.errors import UserError
from plaintrain.utils.text import escape_controls
from plaintrain.visualization.colors import Color, Legend, get_class_colors

Instances = dict[str, Tensor]
# Pairs of keypoint indices, from 0, that are connected.
Edges = Sequence[tuple[int, ...]]
# Pillow's default font has ASCII letters only.
_FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "arial.ttf")
_MASK_ALPHA = 0.4
# Margin of the images on a sheet, pixels.
_GAP = 8


def get_record_instances(record: Mapping[str, Any]) -> Instances:
    """Return the annotations of a record as `instances`, with masks or keypoints if any has them."""
    annotations = record["annotations"]
    size = (record["height"], record["width"])
    try:
        instances = annotations_to_target(annotations, size)
    except UserError as e:
        raise UserError(f"an annotation of {record['file_name']}: {e}") from e
    instances["crowds"] = torch.tensor([bool(a.get("iscrowd")) for a in annotations], dtype=torch.bool)
    if annotations and all(a.get("score") is not None for a in annotations):
        instances["scores"] = torch.tensor([a["score"] for a in annotations], dtype=torch.float32)
    return instances


def get_skeleton(metadata: Any) -> Edges:
    """Return the skeleton of Detectron2's `keypoint_connection_rules` or of COCO's `skeleton` (from 1)."""
    names = list(metadata.get("keypoint_names") or ())
    rules = metadata.get("keypoint_connection_rules")
    if rules:
        pairs = [tuple(names.index(name) for name in rule[:2]) for rule in rules if {*rule[:2]} <= {*names}]
    else:
        pairs = [(a - 1, b - 1) for a, b in metadata.get("skeleton") or ()]
    return tuple(pair for pair in pairs if min(pair) >= 0 and max(pair) < len(names))


def filter_instances(instances: Instances, keep: Any) -> Instances:
    """Return the instances that `keep`, a bool mask `[N]` or indices, selects."""
    return {name: value[keep] for name, value in instances.items()}


def _fit_size(image, longer_side):
    height, width = image.shape[-2:]
    return [max(1, round(side * longer_side / max(height, width))) for side in (height, width)]


def scale_longer_side(image: Tensor, instances: Instances, longer_side: int) -> tuple[Tensor, Instances]:
    """Resize an image, uint8 `[3, H, W]`, and its instances to a longer side in pixels."""
    size = _fit_size(image, longer_side)
    height, width = image.shape[-2:]
    scale = torch.tensor([size[1] / width, size[0] / height])
    scaled = {**instances, "boxes": instances["boxes"].float() * scale.repeat(2)}
    if "keypoints" in instances:
        scaled["keypoints"] = instances["keypoints"].float() * torch.cat([scale, torch.ones(1)])
    if "masks" in instances:
        masks = resize_image(instances["masks"].byte(), size, interpolation=InterpolationMode.NEAREST_EXACT)
        scaled["masks"] = masks.bool()
    return resize_image(image, size), scaled


def draw_instances(
    image: Tensor,
    instances: Instances,
    class_names: Sequence[str],
    skeleton: Edges = (),
    captions: Sequence[str] | None = None,
    colors: Sequence[Color] | None = None,
) -> Tensor:
    """Draw boxes, masks, keypoints and labels on a copy of an image, uint8 `[3, H, W]`, RGB.

    By default, captions are class and score ("" omits one), and each class has a color.
    """
    instances = {name: value.detach().cpu() for name, value in instances.items()}
    labels = instances["labels"].tolist()
    if not labels:
        return image.clone()
    if colors is None:
        by_class = get_class_colors(max(len(class_names), max(labels) + 1))
        colors = [by_class[label] for label in labels]
    captions = format_captions(instances, class_names) if captions is None else captions
    # Small instances are drawn over large ones.
    boxes = _convert_to_pixels(instances["boxes"], *image.shape[-2:])
    order = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).argsort(descending=True, stable=True)
    boxes = boxes[order]
    instances = filter_instances(instances, order)
    colors, captions = ([values[i] for i in order.tolist()] for values in (colors, captions))
    if "masks" in instances:
        masks = instances["masks"].bool()
        covered = torch.zeros_like(masks[0])
        for i in reversed(range(len(masks))):
            # torchvision paints black where masks overlap.
            masks[i] &= ~covered
            covered |= masks[i]
        image = draw_segmentation_masks(image, masks, alpha=_MASK_ALPHA, colors=colors)
    width = max(1, round(max(image.shape[-2:]) / 320))
    image = draw_bounding_boxes(image, boxes, colors=colors, width=width)
    for i, points in enumerate(instances.get("keypoints", ())):
        is_visible = points[None, :, 2] > 0
        style = {"colors": colors[i], "radius": width + 2, "width": width, "visibility": is_visible}
        image = draw_keypoints(image, points[None, :, :2].nan_to_num(), list(skeleton), **style)
    return _draw_labels(image, boxes.tolist(), captions, colors)


def format_captions(instances: Instances, class_names: Sequence[str]) -> list[str]:
    """Return the class of each instance, with its score and "(crowd)" if they apply."""
    labels = instances["labels"].tolist()
    texts = [class_names[label] if label < len(class_names) else f"class {label}" for label in labels]
    if "scores" in instances:
        texts = [f"{t} {score:.2f}" for t, score in zip(texts, instances["scores"].tolist(), strict=True)]
    crowds = instances["crowds"].tolist() if "crowds" in instances else [False] * len(texts)
    return [f"{text} (crowd)" if crowd else text for text, crowd in zip(texts, crowds, strict=True)]


def _convert_to_pixels(boxes, height, width):
    """Return the first and the last pixel of each box, inside the image."""
    boxes = boxes.float().nan_to_num().round()
    boxes[:, 2:] -= 1
    first, last = clip_boxes_to_image(boxes, (height - 1, width - 1)).split(2, dim=1)
    return torch.cat([first, torch.maximum(first, last)], dim=1).long()


@functools.lru_cache(maxsize=256)
def _load_font(letters, size):
    """Return an installed font that has the letters, otherwise Pillow's default font."""
    fonts = [] if "".join(letters).isascii() else _FONTS
    for name in fonts:
        with contextlib.suppress(OSError):
            font = ImageFont.truetype(name, size)
            missing = bytes(font.getmask("\uffff"))
            if all(bytes(font.getmask(letter)) != missing for letter in letters):
                return font
    return ImageFont.load_default(size)


def shorten(text: str, size: int, max_width: int) -> tuple[str, Any, float]:
    """Return (text cut to `max_width` pixels, font of `size` pixels, width of the text)."""
    # Finding the width of a very long text takes time.
    text = escape_controls(text[:200])
    font = _load_font(frozenset(text) - {" "}, size)
    shown = text
    length = len(text)
    while length > 0 and font.getlength(shown) > max_width:
        length -= 1
        shown = text[:length] + "..."
    return shown, font, font.getlength(shown)


def _draw_labels(image, boxes, captions, colors):
    """Write each caption at a corner of its box, where it overlaps the other captions least."""
    height, width = image.shape[-2:]
    size = max(10, round((height * width) ** 0.5 / 42))
    text_height = round(1.3 * size)
    used = []
    canvas = to_pil_image(image)
    draw = ImageDraw.Draw(canvas)
    for (x0, y0, x1, y1), caption, color in zip(boxes, captions, colors, strict=True):
        if not caption:
            continue
        text, font, length = shorten(caption, size, width - 4)
        text_width = round(length) + max(4, size // 3)
        lefts = [min(max(x, 0), max(width - text_width, 0)) for x in (x0, x1 + 1 - text_width)]
        tops = [y0 - text_height, y0, y1 + 1, y1 + 1 - text_height]
        tops = [y for y in tops if 0 <= y <= height - text_height]
        candidates = [(x, y, x + text_width - 1, y + text_height - 1) for y in tops or [0] for x in lefts]
        rectangle = min(candidates, key=lambda c: sum(_compute_overlap(c, other) for other in used))
        used.append(rectangle)
        draw.rectangle(rectangle, fill=color)
        is_light = np.dot(color, (0.299, 0.587, 0.114)) > 140
        center = (rectangle[0] + text_width / 2, rectangle[1] + text_height / 2)
        draw.text(center, text, fill="black" if is_light else "white", font=font, anchor="mm")
    return pil_to_tensor(canvas)


def _compute_overlap(a, b):
    return max(0, min(a[2], b[2]) + 1 - max(a[0], b[0])) * max(0, min(a[3], b[3]) + 1 - max(a[1], b[1]))


def draw_sheet(
    images: Sequence[Tensor], captions: Sequence[str], columns: int, width: int, legend: Legend | None = None
) -> Tensor:
    """Draw images, uint8 `[3, h, w]`, in a grid of `width` pixels, with captions and below a legend."""
    cell_width = (width - _GAP) // columns - _GAP
    size = max(11, width // 110)
    images = [resize_image(image, _fit_size(image, cell_width)) for image in images]
    height = max(image.shape[1] for image in images)
    line_height = round(1.7 * size)
    cells = []
    for image, caption in zip(images, captions, strict=True):
        canvas = Image.new("RGB", (cell_width, height + line_height), "white")
        canvas.paste(to_pil_image(image), ((cell_width - image.shape[2]) // 2, height - image.shape[1]))
        text, font, _ = shorten(caption, size, cell_width)
        center = (cell_width / 2, height + line_height / 2)
        ImageDraw.Draw(canvas).text(center, text, fill="black", font=font, anchor="mm")
        cells.append(pil_to_tensor(canvas))
    sheet = make_grid(torch.stack(cells), nrow=columns, padding=_GAP, pad_value=255)
    return torch.cat([_draw_legend(legend, sheet.shape[2], size), sheet], dim=1) if legend else sheet


def _draw_legend(legend, width, size):
    line_height = round(1.7 * size)
    entry_width = 3 * size + round(max(shorten(text, size, width)[2] for text in legend))
    columns = max(1, (width - _GAP) // entry_width)
    canvas = Image.new("RGB", (width, _GAP + line_height * math.ceil(len(legend) / columns)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (text, color) in enumerate(legend.items()):
        x = _GAP + i % columns * entry_width
        y = _GAP + i // columns * line_height
        text, font, _ = shorten(text, size, width - 4 * size)
        draw.rectangle((x, y, x + size, y + size), fill=color)
        draw.text((x + 1.5 * size, y + size / 2), text, fill="black", font=font, anchor="lm")
    return pil_to_tensor(canvas)
