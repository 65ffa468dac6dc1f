"""Images with instances drawn on them: boxes, names, scores, masks and keypoints.

`instances` is what a model returns for an image: a dict of `boxes` (`[N, 4]`, XYXY, in the image's pixels)
and `labels` (`[N]`, 0 to K-1), and where there are any `scores` (`[N]`), `masks` (`[N, H, W]`), `keypoints`
(`[N, Kp, 3]`, x, y, and a number that is above 0 where the point is to be drawn) and `crowds` (bool `[N]`).
A colour is a tuple of red, green and blue, 0 to 255.
"""

import contextlib
import functools
import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import pil_to_tensor, resize_image, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_keypoints, draw_segmentation_masks, make_grid

from plaintrain.structures import BoxMode, encode_segmentation
from plaintrain.utils.errors import UserError
from plaintrain.visualization.colors import get_class_colors

# With more letters than Pillow's own font, which has those of English only.
_FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "arial.ttf")
_MASK_ALPHA = 0.4
# Of a contact sheet, pixels.
_GAP = 8


def get_record_instances(record):
    """Return the annotations of a record as `instances`; masks or keypoints if any has one."""
    annotations, size = record["annotations"], (record["height"], record["width"])
    try:
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        instances = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64),
            "crowds": torch.tensor([bool(a.get("iscrowd")) for a in annotations], dtype=torch.bool),
        }
        if any(a.get("segmentation") for a in annotations):
            instances["masks"] = torch.stack([_decode_mask(a.get("segmentation"), size) for a in annotations])
    except UserError as e:
        raise UserError(f"an annotation of {record['file_name']}: {e}") from e
    if annotations and all(a.get("score") is not None for a in annotations):
        instances["scores"] = torch.tensor([a["score"] for a in annotations], dtype=torch.float32)
    length = max((len(a.get("keypoints") or ()) for a in annotations), default=0)
    if length:
        points = [a.get("keypoints") or [0] * length for a in annotations]
        instances["keypoints"] = torch.tensor(points, dtype=torch.float32).reshape(len(points), -1, 3)
    return instances


def _decode_mask(segmentation, size):
    if not segmentation:
        return torch.zeros(size, dtype=torch.bool)
    return torch.from_numpy(coco_mask.decode(encode_segmentation(segmentation, *size))).bool()


def get_skeleton(metadata):
    """Return the pairs of keypoints, indices from 0, that a line joins; () where the dataset names none.

    They come from Detectron2's `keypoint_connection_rules`, (name, name, colour), or COCO's `skeleton`.
    """
    names = list(metadata.get("keypoint_names") or ())
    rules = metadata.get("keypoint_connection_rules")
    if rules:
        pairs = [tuple(names.index(name) for name in rule[:2]) for rule in rules if {*rule[:2]} <= {*names}]
    else:
        pairs = [(a - 1, b - 1) for a, b in metadata.get("skeleton") or ()]
    return tuple(pair for pair in pairs if min(pair) >= 0 and max(pair) < len(names))


def filter_instances(instances, keep):
    """Return the instances that `keep`, bool `[N]` or indices, says."""
    return {name: value[keep] for name, value in instances.items()}


def _fitted_size(image, longer_side):
    height, width = image.shape[-2:]
    return [max(1, round(side * longer_side / max(height, width))) for side in (height, width)]


def scale_longer_side(image, instances, longer_side):
    """Resize an image, uint8 `[3, H, W]`, with its instances, so that lines and text drawn then are sharp."""
    size, (height, width) = _fitted_size(image, longer_side), image.shape[-2:]
    scale = torch.tensor([size[1] / width, size[0] / height])
    scaled = {**instances, "boxes": instances["boxes"].float() * scale.repeat(2)}
    if "keypoints" in instances:
        scaled["keypoints"] = instances["keypoints"].float() * torch.cat([scale, torch.ones(1)])
    if "masks" in instances:
        masks, mode = instances["masks"].byte(), InterpolationMode.NEAREST_EXACT
        scaled["masks"] = resize_image(masks, size, interpolation=mode).bool()
    return resize_image(image, size), scaled


def draw_instances(image, instances, class_names, skeleton=(), captions=None, colors=None):
    """Draw boxes, masks, keypoints and labels on a copy of an image.

    Args:
        image: uint8 `[3, H, W]`, RGB.
        instances: see the module; on any device.
        class_names: by label.
        skeleton: see `get_skeleton`.
        captions: a text for each instance, "" for none; default the class and the score.
        colors: one for each instance; default one for each class.

    Returns:
        uint8 `[3, H, W]`.
    """
    instances = {name: value.detach().cpu() for name, value in instances.items()}
    labels = instances["labels"].tolist()
    if not labels:
        return image.clone()
    if colors is None:
        by_class = get_class_colors(max(len(class_names), max(labels) + 1))
        colors = [by_class[label] for label in labels]
    captions = format_captions(instances, class_names) if captions is None else captions
    # What is small lies upon what is large.
    boxes = _to_pixels(instances["boxes"], *image.shape[-2:])
    order = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).argsort(descending=True, stable=True)
    boxes, instances = boxes[order], filter_instances(instances, order)
    colors, captions = ([values[i] for i in order.tolist()] for values in (colors, captions))
    if "masks" in instances:
        masks = instances["masks"].bool()
        taken = torch.zeros_like(masks[0])
        for i in reversed(range(len(masks))):
            # torchvision paints black where masks overlap.
            masks[i] &= ~taken
            taken |= masks[i]
        image = draw_segmentation_masks(image, masks, alpha=_MASK_ALPHA, colors=colors)
    line = max(1, round(max(image.shape[-2:]) / 320))
    image = draw_bounding_boxes(image, boxes, colors=colors, width=line)
    for i, points in enumerate(instances.get("keypoints", ())):
        style = {"colors": colors[i], "radius": line + 2, "width": line, "visibility": points[None, :, 2] > 0}
        image = draw_keypoints(image, points[None, :, :2].nan_to_num(), list(skeleton), **style)
    return _draw_labels(image, boxes.tolist(), captions, colors)


def format_captions(instances, class_names):
    """Return the class, the score where there is one, and whether it is a crowd, of each instance."""
    labels = instances["labels"].tolist()
    texts = [class_names[label] if label < len(class_names) else f"class {label}" for label in labels]
    if "scores" in instances:
        texts = [f"{t} {score:.2f}" for t, score in zip(texts, instances["scores"].tolist(), strict=True)]
    crowds = instances["crowds"].tolist() if "crowds" in instances else [False] * len(texts)
    return [f"{text} (crowd)" if crowd else text for text, crowd in zip(texts, crowds, strict=True)]


def _to_pixels(boxes, height, width):
    """Return the first and the last pixel of each box, within the image."""
    boxes, limit = boxes.float().nan_to_num().round(), torch.tensor([width - 1.0, height - 1.0])
    low = torch.minimum(boxes[:, :2].clamp(min=0), limit)
    high = torch.minimum(boxes[:, 2:] - 1, limit)
    return torch.cat([low, torch.maximum(low, high)], dim=1).long()


@functools.lru_cache(maxsize=256)
def _load_font(letters, size):
    """Return a font that has some letters if this machine has one, otherwise Pillow's own."""
    for name in () if "".join(letters).isascii() else _FONTS:
        with contextlib.suppress(OSError):
            font = ImageFont.truetype(name, size)
            missing = bytes(font.getmask("\uffff"))
            if all(bytes(font.getmask(letter)) != missing for letter in letters):
                return font
    return ImageFont.load_default(size)


def shorten(text, size, room):
    """Return (text, font of `size` pixels, width), cut so that the text is no wider than `room` pixels."""
    font, full, kept = _load_font(frozenset(text) - {" "}, size), text, len(text)
    while kept > 0 and font.getlength(text) > room:
        kept -= 1
        text = full[:kept] + "..."
    return text, font, font.getlength(text)


def _draw_labels(image, boxes, captions, colors):
    """Write each caption at its box, on a ground of its colour, where it hides least of the others."""
    height, width = image.shape[-2:]
    size = max(10, round((height * width) ** 0.5 / 42))
    tall, taken, canvas = round(1.3 * size), [], to_pil_image(image)
    draw = ImageDraw.Draw(canvas)
    for (x0, y0, x1, y1), caption, color in zip(boxes, captions, colors, strict=True):
        if not caption:
            continue
        text, font, length = shorten(caption, size, width - 4)
        wide = round(length) + max(4, size // 3)
        lefts = [min(max(x, 0), max(width - wide, 0)) for x in (x0, x1 + 1 - wide)]
        tops = [y for y in (y0 - tall, y0, y1 + 1, y1 + 1 - tall) if 0 <= y <= height - tall]
        places = [(x, y, x + wide - 1, y + tall - 1) for y in tops or [0] for x in lefts]
        place = min(places, key=lambda place: sum(_overlap(place, other) for other in taken))
        taken.append(place)
        draw.rectangle(place, fill=color)
        is_light = np.dot(color, (0.299, 0.587, 0.114)) > 140
        middle = (place[0] + wide / 2, place[1] + tall / 2)
        draw.text(middle, text, fill="black" if is_light else "white", font=font, anchor="mm")
    return pil_to_tensor(canvas)


def _overlap(a, b):
    return max(0, min(a[2], b[2]) + 1 - max(a[0], b[0])) * max(0, min(a[3], b[3]) + 1 - max(a[1], b[1]))


def draw_sheet(images, captions, columns, width, legend=None):
    """Lay out images on one sheet, uint8 `[3, H, W]`, each as large as its column, with its caption below.

    Args:
        images: uint8 `[3, h, w]` each.
        captions: a text for each.
        columns: images side by side.
        width: of the sheet, pixels.
        legend: {text: colour} to explain at the top, or None.
    """
    cell, size = (width - _GAP) // columns - _GAP, max(11, width // 110)
    images = [resize_image(image, _fitted_size(image, cell)) for image in images]
    tall, line, cells = max(image.shape[1] for image in images), round(1.7 * size), []
    for image, caption in zip(images, captions, strict=True):
        canvas = Image.new("RGB", (cell, tall + line), "white")
        canvas.paste(to_pil_image(image), ((cell - image.shape[2]) // 2, tall - image.shape[1]))
        text, font, _ = shorten(caption, size, cell)
        ImageDraw.Draw(canvas).text((cell / 2, tall + line / 2), text, fill="black", font=font, anchor="mm")
        cells.append(pil_to_tensor(canvas))
    sheet = make_grid(torch.stack(cells), nrow=columns, padding=_GAP, pad_value=255)
    return torch.cat([_draw_legend(legend, sheet.shape[2], size), sheet], dim=1) if legend else sheet


def _draw_legend(legend, width, size):
    """Draw {text: colour} as a strip of paper with letters of `size` pixels."""
    line, entry = round(1.7 * size), 3 * size + round(max(shorten(t, size, width)[2] for t in legend))
    columns = max(1, (width - _GAP) // entry)
    canvas = Image.new("RGB", (width, _GAP + line * math.ceil(len(legend) / columns)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (text, color) in enumerate(legend.items()):
        x, y = _GAP + i % columns * entry, _GAP + i // columns * line
        text, font, _ = shorten(text, size, width - 4 * size)
        draw.rectangle((x, y, x + size, y + size), fill=color)
        draw.text((x + 1.5 * size, y + size / 2), text, fill="black", font=font, anchor="lm")
    return pil_to_tensor(canvas)
