"""Synthetic dataset: circles, squares and triangles on textured noise, rendered on demand.

There are no files: the `file_name` of an image holds the parameters from which it is rendered.
"""

from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

from plaintrain.data.datasets.coco import LoadedDataset
from plaintrain.data.image_files import is_too_large
from plaintrain.structures import BoxMode, make_record
from plaintrain.utils.errors import UserError

SCHEME = "shapes://"
CLASSES = ["circle", "square", "triangle"]
# They are the outline's intersections with the vertical and the horizontal line through the centre.
KEYPOINTS = ["top", "right", "bottom", "left"]
_NUM_VERTICES = {"circle": 40, "square": 4, "triangle": 3}
_SPLITS = {"train": 0, "val": 1, "test": 2}
_MAX_IOU = 0.3
_MIN_CONTRAST = 50
_MAX_IMAGES = 10_000_000
# In radians.
_MAX_TURN = np.pi / 18


def load_shapes(
    split: str = "train", num: int = 2000, height: int = 128, width: int = 128, seed: int = 0
) -> LoadedDataset:
    """Create the records, with boxes, polygons and keypoints, and the metadata of `num` images.

    An image has 1 to 5 shapes, rotated by up to 10 degrees. The longer side of a shape's box is
    10 to 50% of the image's shorter side. Later shapes are in front; boxes overlap by an IoU of
    at most 0.3, and no shape covers more than half of an earlier one's box.
    """
    if split not in _SPLITS:
        raise UserError(f"SPLIT of shapes must be one of {', '.join(_SPLITS)}, got {split!r}")
    if min(height, width) < 16 or is_too_large(height, width) or not 1 <= num <= _MAX_IMAGES or seed < 0:
        raise UserError(
            "shapes requires HEIGHT and WIDTH >= 16, no more pixels than Pillow accepts, NUM from 1 to "
            f"{_MAX_IMAGES:,} and SEED >= 0, got {height}, {width}, {num} and {seed}"
        )
    records = []
    for index in range(num):
        shapes = _draw_shapes(_create_generator(seed, split, index), height, width)
        name = f"{SCHEME}{split}/{index}?seed={seed}&height={height}&width={width}"
        annotations = [_create_annotation(shapes, i) for i in range(len(shapes))]
        records.append(make_record(name, index + 1, height, width, annotations))
    metadata = {
        "thing_classes": list(CLASSES),
        "keypoint_names": list(KEYPOINTS),
        "keypoint_flip_map": [("left", "right")],
        "skeleton": [[1, 2], [2, 3], [3, 4], [4, 1]],
    }
    return records, metadata


def is_drawn(file_name: str) -> bool:
    """Return whether `file_name` is that of a synthetic image."""
    return file_name.startswith(SCHEME)


def render(file_name: str) -> np.ndarray:
    """Render the image of a record of `load_shapes`: uint8 `[H, W, 3]`, RGB."""
    try:
        url = urlsplit(file_name)
        query = {key: int(value[0]) for key, value in parse_qs(url.query).items()}
        height = query["height"]
        width = query["width"]
        if min(height, width) < 16:
            raise ValueError("too small")
        rng = _create_generator(query["seed"], url.netloc, int(url.path.lstrip("/")))
    except (ValueError, KeyError) as e:
        raise UserError(f"{file_name!r} is not an image of the shapes dataset") from e
    shapes = _draw_shapes(rng, height, width)
    base = rng.uniform(40, 215, size=3)
    coarse = np.clip(base + rng.uniform(-30, 30, size=(5, 5, 3)), 0, 255).astype(np.uint8)
    background = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image = np.array(background, dtype=np.float32)
    for shape in shapes:
        colour = base
        while np.linalg.norm(colour - base) < _MIN_CONTRAST:
            colour = rng.uniform(0, 255, size=3)
        _fill_polygon(image, shape["polygon"], colour)
    image += rng.standard_normal((height, width, 1), dtype=np.float32) * 12
    image += rng.standard_normal((height, width, 3), dtype=np.float32) * 6
    return np.clip(image, 0, 255).astype(np.uint8)


def _create_generator(seed, split, index):
    return np.random.default_rng((seed, _SPLITS[split], index))


def _draw_shapes(rng, height, width):
    """Draw up to 5 shapes, {label, polygon `[V, 2]`, box `[4]`}, by rejection sampling."""
    shapes = []
    for _ in range(rng.integers(1, 6)):
        for _ in range(20):
            shape = _draw_shape(rng, height, width)
            if all(_is_allowed(shape["box"], other["box"]) for other in shapes):
                shapes.append(shape)
                break
    return shapes


def _draw_shape(rng, height, width):
    label = int(rng.integers(len(CLASSES)))
    num_vertices = _NUM_VERTICES[CLASSES[label]]
    # The angle of the first vertex when the shape rests on an edge.
    upright = {"circle": 0.0, "square": np.pi / 4, "triangle": -np.pi / 2}[CLASSES[label]]
    turn = upright + rng.uniform(-_MAX_TURN, _MAX_TURN)
    angles = turn + np.arange(num_vertices) * (2 * np.pi / num_vertices)
    polygon = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    extent = polygon.max(axis=0) - polygon.min(axis=0)
    polygon *= rng.uniform(0.1, 0.5) * min(height, width) / extent.max()
    polygon -= polygon.min(axis=0)
    polygon += rng.uniform(0, 1, size=2) * (np.array([width, height]) - polygon.max(axis=0))
    box = np.concatenate([polygon.min(axis=0), polygon.max(axis=0)])
    return {"label": label, "polygon": polygon, "box": box}


def _is_allowed(box, earlier):
    """Return whether a box overlaps an earlier one by IoU <= 0.3 and covers at most half of it."""
    sides = np.minimum(box[2:], earlier[2:]) - np.maximum(box[:2], earlier[:2])
    if sides.min() <= 0:
        return True
    overlap = sides.prod()
    area = (box[2:] - box[:2]).prod()
    earlier_area = (earlier[2:] - earlier[:2]).prod()
    iou = overlap / (area + earlier_area - overlap)
    return iou <= _MAX_IOU and overlap <= earlier_area / 2


def _contains(polygon, x, y):
    """Return whether points are inside a convex polygon with clockwise vertices (y pointing down)."""
    shape = (-1, *(1,) * np.ndim(x))
    x0, y0 = (polygon[:, i].reshape(shape) for i in (0, 1))
    dx, dy = (np.roll(polygon[:, i], -1).reshape(shape) - polygon[:, i].reshape(shape) for i in (0, 1))
    return (dx * (y - y0) >= dy * (x - x0)).all(axis=0)


def _fill_polygon(image, polygon, colour):
    height, width = image.shape[:2]
    x0, y0 = np.floor(polygon.min(axis=0)).astype(int)
    x1, y1 = np.minimum(np.ceil(polygon.max(axis=0)).astype(int), [width, height])
    y, x = np.mgrid[y0:y1, x0:x1] + 0.5
    image[y0:y1, x0:x1][_contains(polygon, x, y)] = colour


def _compute_keypoints(polygon):
    """Return the points of the outline above, right of, below and left of the centre."""
    centre = polygon.mean(axis=0)
    start = polygon - centre
    end = np.roll(start, -1, axis=0)
    points = []
    for along, across, sign in ((1, 0, -1), (0, 1, 1), (1, 0, 1), (0, 1, -1)):
        cut = (start[:, across] <= 0) != (end[:, across] <= 0)
        a = start[cut]
        b = end[cut]
        fraction = a[:, across] / (a[:, across] - b[:, across])
        distances = a[:, along] + fraction * (b[:, along] - a[:, along])
        point = centre.copy()
        point[along] += sign * (distances * sign).max()
        points.append(point)
    return points


def _create_annotation(shapes, index):
    shape = shapes[index]
    keypoints = []
    for x, y in _compute_keypoints(shape["polygon"]):
        hidden = any(_contains(other["polygon"], x, y) for other in shapes[index + 1 :])
        keypoints += [float(x), float(y), 1 if hidden else 2]
    x, y = shape["polygon"].T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    return {
        "bbox": shape["box"].tolist(),
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": shape["label"],
        "iscrowd": 0,
        "segmentation": [shape["polygon"].flatten().tolist()],
        "keypoints": keypoints,
        "area": float(area),
    }
