"""Pictures of images with what is in them: boxes, names, scores, masks and keypoints.

`instances` is what a model returns for an image: a dict of `boxes` (`[N, 4]`, XYXY, in the image's pixels)
and `labels` (`[N]`, 0 to K-1), and where there are any `scores` (`[N]`), `masks` (`[N, H, W]`), `keypoints`
(`[N, Kp, 3]`, x, y, and a number that is above 0 where the point is to be drawn) and `crowds` (bool `[N]`).
A colour is a tuple of red, green and blue, 0 to 255.
"""

import colorsys

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize_image
from torchvision.utils import draw_bounding_boxes, draw_keypoints, draw_segmentation_masks

from plaintrain.structures import BoxMode, segmentation_to_rle
from plaintrain.utils.errors import UserError
from plaintrain.visualization.images import draw_labels, draw_on, font_of, shortened

# Told apart at a glance, also by most of those who see red and green alike.
PALETTE = (
    *((31, 119, 255), (255, 127, 14), (0, 178, 89), (230, 25, 75), (160, 80, 230), (0, 200, 210)),
    *((250, 200, 20), (240, 90, 200), (140, 100, 60), (128, 190, 40), (90, 110, 140), (255, 150, 130)),
)
_PAPER, _INK = (255, 255, 255), (30, 30, 30)
_MASK_ALPHA = 0.4
# Of a contact sheet, pixels.
_GAP = 8


def class_colors(number):
    """So many colours, tuples: the `PALETTE` as far as it goes, then a spread of hues and of lightness."""
    # Steps of the golden ratio: neighbours differ most, however many there are.
    spread = [
        colorsys.hls_to_rgb((0.08 + 0.618034 * i) % 1, (0.5, 0.38, 0.65)[i % 3], (0.9, 0.6)[i // 3 % 2])
        for i in range(number - len(PALETTE))
    ]
    return [*PALETTE[:number], *(tuple(round(255 * part) for part in color) for color in spread)]


def record_instances(record):
    """The annotations of a record as `instances`, crowds too; masks, and keypoints, if any of them has one.

    Raises:
        UserError: names the image, and what is wrong with an annotation.
    """
    annotations, size = record["annotations"], (record["height"], record["width"])
    try:
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        found = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64),
            "crowds": torch.tensor([bool(a.get("iscrowd")) for a in annotations], dtype=torch.bool),
        }
        if any(a.get("segmentation") for a in annotations):
            found["masks"] = torch.from_numpy(np.stack([_mask(a, size) for a in annotations]))
    except UserError as e:
        raise UserError(f"an annotation of {record['file_name']}: {e}") from e
    if annotations and all(a.get("score") is not None for a in annotations):
        found["scores"] = torch.tensor([a["score"] for a in annotations], dtype=torch.float32)
    number = max((len(a.get("keypoints") or ()) for a in annotations), default=0)
    if number:
        rows = [list(a.get("keypoints") or ()) for a in annotations]
        rows = [row + [0] * (number - len(row)) for row in rows]
        found["keypoints"] = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), -1, 3)
    return found


def _mask(annotation, size):
    if not annotation.get("segmentation"):
        return np.zeros(size, dtype=bool)
    return coco_mask.decode(segmentation_to_rle(annotation["segmentation"], *size)).astype(bool)


def skeleton_of(metadata):
    """The pairs of keypoints, numbers from 0, that a line joins; () where the dataset names none.

    Args:
        metadata: dict or `Metadata` with `keypoint_connection_rules`, (name, name, colour) as
            Detectron2's, or `skeleton`, COCO's pairs of numbers from 1.
    """
    names = list(metadata.get("keypoint_names") or ())
    rules = metadata.get("keypoint_connection_rules")
    if rules:
        pairs = [tuple(names.index(name) for name in rule[:2]) for rule in rules if {*rule[:2]} <= {*names}]
    else:
        pairs = [(a - 1, b - 1) for a, b in metadata.get("skeleton") or ()]
    return tuple(pair for pair in pairs if min(pair) >= 0 and max(pair) < len(names))


def select(instances, keep):
    """The instances that `keep`, bool `[N]` or indices, says."""
    return {name: value[keep] for name, value in instances.items()}


def _fitted_size(image, longer_side):
    """(height, width) of an image once its longer side has so many pixels."""
    height, width = image.shape[-2:]
    return [max(1, round(side * longer_side / max(height, width))) for side in (height, width)]


def scale_to(image, instances, longer_side):
    """(image, instances) brought to a size, so that lines and letters drawn then are sharp.

    Args:
        image: uint8 `[3, H, W]`.
        longer_side: pixels.
    """
    height, width = image.shape[-2:]
    size = _fitted_size(image, longer_side)
    scale = torch.tensor([size[1] / width, size[0] / height])
    scaled = {**instances, "boxes": instances["boxes"].float() * scale.repeat(2)}
    if "keypoints" in instances:
        scaled["keypoints"] = instances["keypoints"].float() * torch.cat([scale, torch.ones(1)])
    if "masks" in instances:
        masks, mode = instances["masks"].byte(), InterpolationMode.NEAREST_EXACT
        scaled["masks"] = resize_image(masks, size, interpolation=mode).bool()
    return resize_image(image, size), scaled


def draw_instances(image, instances, class_names, skeleton=(), captions=None, colors=None):
    """An image with its instances: boxes, masks, keypoints, and a label each, which stays inside.

    Args:
        image: uint8 `[3, H, W]`, RGB; not changed.
        instances: see the module; on any device.
        class_names: by label.
        skeleton: see `skeleton_of`.
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
        of_class = class_colors(max(len(class_names), max(labels) + 1))
        colors = [of_class[label] for label in labels]
    captions = default_captions(instances, class_names) if captions is None else captions
    # What is small lies upon what is large.
    boxes = _in_pixels(instances["boxes"], *image.shape[-2:])
    order = ((boxes[:, 2:] - boxes[:, :2]).prod(dim=1)).argsort(descending=True, stable=True)
    boxes, instances = boxes[order], select(instances, order)
    colors, captions = ([given[i] for i in order.tolist()] for given in (colors, captions))
    line = _line_width(image)
    if "masks" in instances:
        crowds = instances.get("crowds", torch.zeros(len(boxes), dtype=torch.bool))
        image = _draw_masks(image, instances["masks"].bool(), crowds, colors)
    image = draw_bounding_boxes(image, boxes, colors=colors, width=line)
    for color in dict.fromkeys(colors) if instances.get("keypoints", boxes[:0]).numel() else ():
        points = instances["keypoints"][[i for i, other in enumerate(colors) if other == color]]
        shape = {"radius": line + 2, "width": line, "visibility": points[..., 2] > 0}
        image = draw_keypoints(image, points[..., :2].nan_to_num(), list(skeleton), color, **shape)
    return draw_labels(image, boxes.tolist(), captions, colors)


def default_captions(instances, class_names):
    """The class, the score where there is one, and whether it is a crowd, of each instance."""
    labels = instances["labels"].tolist()
    texts = [class_names[label] if label < len(class_names) else f"class {label}" for label in labels]
    if "scores" in instances:
        texts = [f"{t} {score:.2f}" for t, score in zip(texts, instances["scores"].tolist(), strict=True)]
    crowds = instances["crowds"].tolist() if "crowds" in instances else [False] * len(texts)
    return [f"{text} (crowd)" if crowd else text for text, crowd in zip(texts, crowds, strict=True)]


def _in_pixels(boxes, height, width):
    """The first and the last pixel of each box, within the image."""
    boxes = boxes.float().nan_to_num()
    low, high = torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])
    limit = torch.tensor([width - 1.0, height - 1.0])
    low = torch.minimum(low.round().clamp(min=0), limit)
    high = torch.minimum((high.round() - 1).clamp(min=0), limit)
    return torch.cat([low, torch.maximum(low, high)], dim=1).long()


def _line_width(image):
    return max(1, round(max(image.shape[-2:]) / 320))


def _draw_masks(image, masks, crowds, colors):
    """Fill each mask and draw its edge; a crowd's is hatched."""
    line, (height, width) = _line_width(image), image.shape[-2:]
    stripe = torch.arange(height)[:, None] + torch.arange(width)
    hatch = stripe // max(2, 2 * line) % 2 == 0
    filled, edges = torch.zeros_like(masks), torch.zeros_like(masks)
    taken = torch.zeros(height, width, dtype=torch.bool)
    for i in reversed(range(len(masks))):
        # torchvision paints black where masks overlap.
        edges[i] = _edge(masks[i], line) & ~taken
        filled[i] = (masks[i] & hatch if crowds[i] else masks[i]) & ~taken
        taken |= masks[i]
    image = draw_segmentation_masks(image, filled, alpha=_MASK_ALPHA, colors=colors)
    return draw_segmentation_masks(image, edges, alpha=0.9, colors=colors)


def _edge(mask, line):
    """The pixels of a mask that are at most `line` from its outline."""
    edge = torch.zeros_like(mask)
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    if len(rows):
        # Only where it is: most masks are small.
        window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        outside = F.pad((~mask[window])[None].float(), [line] * 4, value=1.0)
        edge[window] = mask[window] & (F.max_pool2d(outside, 2 * line + 1, stride=1)[0] > 0)
    return edge


def contact_sheet(images, captions=None, columns=4, width=1600, legend=None):
    """Images of any sizes on one sheet, each as large as its column and with its caption below.

    Args:
        images: uint8 `[3, h, w]` each.
        captions: a text for each, or None.
        columns: images side by side.
        width: of the sheet, pixels.
        legend: {text: colour} to explain at the top, or None.

    Returns:
        uint8 `[3, H, width]`.
    """
    columns = max(1, min(columns, len(images)))
    cell, size = (width - _GAP) // columns - _GAP, max(11, width // 110)
    band = round(1.6 * size) if captions else 0
    images = [resize_image(image, _fitted_size(image, cell)) for image in images]
    rows = [list(range(i, min(i + columns, len(images)))) for i in range(0, len(images), columns)]
    parts = [legend_strip(legend, width, size)] if legend else []
    for row in rows:
        tall = max(images[i].shape[1] for i in row)
        strip = _paper(tall + band + _GAP, width)
        for column, i in enumerate(row):
            high, wide = images[i].shape[1:]
            left = _GAP + column * (cell + _GAP) + (cell - wide) // 2
            strip[:, tall - high : tall, left : left + wide] = images[i]
        middles = [_GAP + column * (cell + _GAP) + cell / 2 for column in range(len(row))]
        texts = [captions[i] for i in row] if captions else []
        parts.append(_with_texts(strip, list(zip(middles, texts, strict=False)), tall + band / 2, size, cell))
    return torch.cat([_paper(_GAP, width), *parts], dim=1)


def _paper(height, width):
    return torch.tensor(_PAPER, dtype=torch.uint8)[:, None, None].repeat(1, height, width)


def _with_texts(strip, texts, y, size, room):
    """A strip of a sheet with the texts [(middle, text)] at a height."""

    def draw(canvas):
        for x, text in texts:
            text = shortened(text, size, room)[0]
            canvas.text((x, y), text, fill=_INK, font=font_of(text, size), anchor="mm")

    return draw_on(strip, draw) if texts else strip


def legend_strip(entries, width, size):
    """What colours mean, as a strip of paper.

    Args:
        entries: {text: colour}.
        width: of the strip, pixels.
        size: of the letters, pixels.

    Returns:
        uint8 `[3, h, width]`.
    """
    x, y, places = _GAP, 0, []
    for text, color in entries.items():
        text, length = shortened(text, size, width - 4 * size)
        wide = round(length) + 3 * size
        if x + wide > width and x > _GAP:
            x, y = _GAP, y + round(1.7 * size)
        places.append((x, y, text, color))
        x += wide

    def draw(canvas):
        for x, y, text, color in places:
            canvas.rectangle((x, y, x + size, y + size), fill=color)
            canvas.text(
                (x + 1.5 * size, y + size / 2), text, fill=_INK, font=font_of(text, size), anchor="lm"
            )

    return draw_on(_paper(y + round(1.7 * size), width), draw)
