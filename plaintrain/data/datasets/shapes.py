"""The built-in synthetic set: circles, squares and triangles on textured noise, drawn on demand.

No files: an image's name holds all that it is drawn from, so it is the same on every machine.
"""

from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

from plaintrain.data.image_files import is_too_large
from plaintrain.structures import BoxMode, make_record
from plaintrain.utils.errors import UserError

SCHEME = "shapes://"
CLASSES = ["circle", "square", "triangle"]
# Where the vertical and the horizontal line through the centre meet the outline: whatever the
# rotation, each is one point, and it moves smoothly.
KEYPOINTS = ["top", "right", "bottom", "left"]
_NUM_VERTICES = {"circle": 40, "square": 4, "triangle": 3}
_SPLITS = {"train": 0, "val": 1, "test": 2}
_MAX_IOU = 0.3
_MIN_CONTRAST = 50
_MAX_IMAGES = 10_000_000
# Shapes are turned by up to this much, in radians, to either side of lying on an edge.
_MAX_TURN = np.pi / 18


def load_shapes(split="train", num=2000, height=128, width=128, seed=0):
    """Describe a split of synthetic images.

    An image holds 1 to 5 shapes, turned by up to 10 degrees. The longer side of a shape's box is
    10 to 50% of the image's shorter side. The later shape is in front; boxes overlap by an IoU of
    at most 0.3, and no shape covers more than half of an earlier one's box.

    Args:
        split: train, val or test; splits share no image.
        num: number of images.
        height, width: size of the images in pixels, at least 16.

    Returns:
        (records, metadata): annotations carry boxes, polygons and the 4 keypoints of `KEYPOINTS`.
    """
    if split not in _SPLITS:
        raise UserError(f"shapes has the splits {', '.join(_SPLITS)}, not {split!r}")
    if min(height, width) < 16 or is_too_large(height, width) or not 1 <= num <= _MAX_IMAGES or seed < 0:
        raise UserError(
            "shapes needs HEIGHT and WIDTH >= 16 and of no more pixels than Pillow takes, NUM from 1 to "
            f"{_MAX_IMAGES:,} and SEED >= 0, not {height}, {width}, {num} and {seed}"
        )
    records = []
    for index in range(num):
        shapes = _place(_generator(seed, split, index), height, width)
        name = f"{SCHEME}{split}/{index}?seed={seed}&height={height}&width={width}"
        annotations = [_annotation(shapes, i) for i in range(len(shapes))]
        records.append(make_record(name, index + 1, height, width, annotations))
    metadata = {
        "thing_classes": list(CLASSES),
        "keypoint_names": list(KEYPOINTS),
        "keypoint_flip_map": [("left", "right")],
        # A ring, as COCO writes it.
        "skeleton": [[1, 2], [2, 3], [3, 4], [4, 1]],
    }
    return records, metadata


def is_drawn(file_name):
    """Whether a record's `file_name` is that of an image of this set, which has no file."""
    return file_name.startswith(SCHEME)


def render(file_name):
    """Draw the image that a record of `load_shapes` names, uint8 `[H, W, 3]`, RGB."""
    try:
        url = urlsplit(file_name)
        query = {key: int(value[0]) for key, value in parse_qs(url.query).items()}
        height, width = query["height"], query["width"]
        if min(height, width) < 16:
            raise ValueError("too small")
        rng = _generator(query["seed"], url.netloc, int(url.path.lstrip("/")))
    except (ValueError, KeyError) as e:
        raise UserError(f"{file_name!r} does not name an image of the shapes set") from e
    shapes = _place(rng, height, width)
    base = rng.uniform(40, 215, size=3)
    coarse = np.clip(base + rng.uniform(-30, 30, size=(5, 5, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image = np.asarray(image, dtype=np.float32).copy()
    for shape in shapes:
        _paint(image, shape["polygon"], _contrasting(rng, base))
    image += rng.standard_normal((height, width, 1), dtype=np.float32) * 12
    image += rng.standard_normal((height, width, 3), dtype=np.float32) * 6
    return np.clip(image, 0, 255).astype(np.uint8)


def _generator(seed, split, index):
    return np.random.default_rng((seed, _SPLITS[split], index))


def _place(rng, height, width):
    """1 to 5 shapes, each {kind, polygon [V, 2], box [4]}, those that found room."""
    shapes = []
    for _ in range(rng.integers(1, 6)):
        for _ in range(20):
            shape = _draw_shape(rng, height, width)
            if all(_room(shape["box"], other["box"]) for other in shapes):
                shapes.append(shape)
                break
    return shapes


def _draw_shape(rng, height, width):
    kind = int(rng.integers(len(CLASSES)))
    vertices = _NUM_VERTICES[CLASSES[kind]]
    # Where the first corner is when the shape lies on an edge.
    upright = {"circle": 0.0, "square": np.pi / 4, "triangle": -np.pi / 2}[CLASSES[kind]]
    turn = upright + rng.uniform(-_MAX_TURN, _MAX_TURN)
    angles = turn + np.arange(vertices) * (2 * np.pi / vertices)
    polygon = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    extent = polygon.max(axis=0) - polygon.min(axis=0)
    polygon *= rng.uniform(0.1, 0.5) * min(height, width) / extent.max()
    polygon -= polygon.min(axis=0)
    polygon += rng.uniform(0, 1, size=2) * (np.array([width, height]) - polygon.max(axis=0))
    box = np.concatenate([polygon.min(axis=0), polygon.max(axis=0)])
    return {"kind": kind, "polygon": polygon, "box": box}


def _room(box, earlier):
    """Whether a box overlaps an earlier one by IoU <= 0.3 and leaves at least half of it free."""
    sides = np.minimum(box[2:], earlier[2:]) - np.maximum(box[:2], earlier[:2])
    if sides.min() <= 0:
        return True
    overlap = sides.prod()
    area, earlier_area = (box[2:] - box[:2]).prod(), (earlier[2:] - earlier[:2]).prod()
    iou = overlap / (area + earlier_area - overlap)
    return iou <= _MAX_IOU and overlap <= earlier_area / 2


def _inside(polygon, x, y):
    """Whether points lie in a convex polygon whose vertices run clockwise on the screen."""
    shape = (-1, *(1,) * np.ndim(x))
    x0, y0 = (polygon[:, i].reshape(shape) for i in (0, 1))
    dx, dy = (np.roll(polygon[:, i], -1).reshape(shape) - polygon[:, i].reshape(shape) for i in (0, 1))
    return (dx * (y - y0) >= dy * (x - x0)).all(axis=0)


def _paint(image, polygon, colour):
    height, width = image.shape[:2]
    x0, y0 = np.floor(polygon.min(axis=0)).astype(int)
    x1, y1 = np.minimum(np.ceil(polygon.max(axis=0)).astype(int), [width, height])
    y, x = np.mgrid[y0:y1, x0:x1] + 0.5
    image[y0:y1, x0:x1][_inside(polygon, x, y)] = colour


def _contrasting(rng, background):
    while True:
        colour = rng.uniform(0, 255, size=3)
        if np.linalg.norm(colour - background) >= _MIN_CONTRAST:
            return colour


def _crossings(polygon):
    """top, right, bottom, left: the outline above, right of, below and left of the centre."""
    centre = polygon.mean(axis=0)
    start = polygon - centre
    end = np.roll(start, -1, axis=0)
    points = []
    for along, across, sign in ((1, 0, -1), (0, 1, 1), (1, 0, 1), (0, 1, -1)):
        cut = (start[:, across] <= 0) != (end[:, across] <= 0)
        a, b = start[cut], end[cut]
        share = a[:, across] / (a[:, across] - b[:, across])
        reached = a[:, along] + share * (b[:, along] - a[:, along])
        point = centre.copy()
        point[along] += sign * (reached * sign).max()
        points.append(point)
    return points


def _annotation(shapes, index):
    shape = shapes[index]
    keypoints = []
    for x, y in _crossings(shape["polygon"]):
        hidden = any(_inside(other["polygon"], x, y) for other in shapes[index + 1 :])
        keypoints += [float(x), float(y), 1 if hidden else 2]
    x, y = shape["polygon"].T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    return {
        "bbox": shape["box"].tolist(),
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": shape["kind"],
        "iscrowd": 0,
        "segmentation": [shape["polygon"].flatten().tolist()],
        "keypoints": keypoints,
        "area": float(area),
    }
