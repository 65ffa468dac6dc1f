"""Transforms move image, boxes, masks and keypoints together, whatever their sizes and places.

Pixels say where they come from, and labels to whom a target belongs.
"""

import copy

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from plaintrain.data.transforms import build as augmentations
from plaintrain.data.transforms import copy_paste
from plaintrain.data.transforms import tensors as moving

# What the third channel holds where there is image, and where there is canvas.
IMAGE, CANVAS = 7, 99
# The number of keypoints, and an order after a flip.
FLIPS = {3: (0, 2, 1), 2: (1, 0), 5: (1, 0, 2, 4, 3), 1: (0,), 0: ()}


@st.composite
def tensors(draw, masks=None, keypoints=None, angles=False):
    """The tensors of an image, whose `labels` number the instances.

    Pixel (y, x) has the colours y, x and `IMAGE`. Masks fill their boxes, or only the first row and
    column of them if `angles`. Without masks the sides of boxes are in eighths of a pixel, which
    float32 adds without an error.
    """
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    with_masks = draw(st.booleans()) if masks is None else masks
    with_points = draw(st.sampled_from([True, True, False])) if keypoints is None else keypoints
    step = 1 if with_masks else 8
    boxes = draw(st.lists(_boxes(height, width, step), min_size=draw(st.sampled_from([2, 0])), max_size=5))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([y, x, torch.full_like(x, IMAGE)]).to(torch.uint8)
    size = (height, width)
    rows = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) / step
    found = {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(rows, format="XYXY", canvas_size=size),
        "labels": torch.arange(len(boxes)),
    }
    if with_masks:
        masks = _filled(rows, height, width)
        if angles:
            masks[:, 1:, 1:] &= 1 - masks[:, :-1, :-1]
        found["masks"] = tv_tensors.Mask(masks)
    if with_points:
        number = draw(st.sampled_from(list(FLIPS)))
        points = draw(_points(len(boxes), number, height, width))
        numbers = torch.tensor(points, dtype=torch.float32).reshape(len(boxes), number, 3)
        found["keypoints"] = tv_tensors.KeyPoints(numbers[..., :2] / 8, canvas_size=size)
        found["visibility"] = numbers[..., 2].long()
    return found


def _boxes(height, width, step):
    def side(length):
        pairs = st.tuples(st.integers(0, length * step), st.integers(0, length * step))
        return pairs.filter(lambda pair: pair[0] != pair[1]).map(sorted)

    return st.tuples(side(width), side(height)).map(lambda s: [s[0][0], s[1][0], s[0][1], s[1][1]])


def _points(rows, number, height, width):
    # Within a pixel, not on the edge of two.
    point = st.tuples(
        st.integers(0, width - 1).map(lambda x: 8 * x + 3),
        st.integers(0, height - 1).map(lambda y: 8 * y + 5),
        st.integers(0, 2),
    )
    return st.lists(point, min_size=rows * number, max_size=rows * number)


def _filled(boxes, height, width):
    """uint8 `[N, height, width]`: 1 where a pixel's centre is inside of a box."""
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    left, top, right, bottom = boxes[:, :, None].unbind(1)
    rows, columns = (top < y) & (y < bottom), (left < x) & (x < right)
    return (rows[:, :, None] & columns[:, None, :]).to(torch.uint8)


def filled(found):
    """The pixels whose centres are in each box."""
    return _filled(plain(found["boxes"]), *found["image"].shape[-2:])


def around(masks):
    """The boxes around masks."""
    return masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])


def plain(value):
    return value.as_subclass(torch.Tensor)


def same(a, b):
    """Whether two dicts of tensors hold the same, bit for bit."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(plain(a[name]), plain(b[name])) for name in a
    )


def flip_order(found):
    """The order of the keypoints after a flip, or None without keypoints."""
    return FLIPS[found["keypoints"].shape[1]] if "keypoints" in found else None


def check_claims(found, slack=0.0):
    """Sizes are the image's, rows are in step, boxes lie inside the image and masks hold 0 and 1.

    Args:
        slack: pixels by which a box or keypoint may lie outside: scaling rounds, and the mapper clips
            only what comes out in the end.
    """
    image, boxes, labels = found["image"], found["boxes"], found["labels"]
    height, width = size = tuple(image.shape[-2:])
    assert image.dtype == torch.uint8
    assert image.shape == (3, *size)
    assert boxes.canvas_size == size
    assert boxes.shape == (len(labels), 4)
    assert boxes.dtype == torch.float32
    limit = torch.tensor([width, height]) + slack
    assert (plain(boxes) >= 0).all()
    assert (plain(boxes) <= limit.repeat(2)).all()
    assert (plain(boxes)[:, :2] <= plain(boxes)[:, 2:]).all()
    if "masks" in found:
        assert found["masks"].shape == (len(labels), *size)
        assert set(plain(found["masks"]).unique().tolist()) <= {0, 1}
    if "keypoints" in found:
        assert found["keypoints"].canvas_size == size
        assert found["keypoints"].shape == (*found["visibility"].shape, 2)
        assert len(found["visibility"]) == len(labels)
        points = plain(found["keypoints"])[found["visibility"] > 0]
        assert ((points >= 0) & (points <= limit)).all()


def _two(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


def _named(name, **arguments):
    return st.tuples(st.just(name), st.fixed_dictionaries(arguments))


def _crops():
    share = st.floats(0.05, 1)
    return st.one_of(
        _named(
            "RandomCrop",
            crop_type=st.sampled_from(["relative", "relative_range"]),
            crop_size=st.tuples(share, share),
        ),
        _named("RandomCrop", crop_type=st.just("absolute"), crop_size=_two(1, 30)),
        _named("RandomCrop", crop_type=st.just("absolute_range"), crop_size=_two(1, 30).map(sorted)),
    )


def lossless():
    """(name, arguments) of an augmentation that moves whole pixels, for sure."""
    fill = st.just(CANVAS)
    return st.one_of(
        _named("RandomHorizontalFlip", p=st.just(1.0)),
        _named("RandomHorizontalFlip", p=st.just(1.0)),
        _named("RandomVerticalFlip", p=st.just(1.0)),
        _crops(),
        _named("FixedSizeCrop", size=_two(1, 30), fill=fill),
        _named("RandomIoUCrop", trials=st.just(5)),
        _named("RandomZoomOut", p=st.just(1.0), fill=fill, side_range=st.just((1.0, 2.0))),
    )


def chosen():
    """(name, arguments) of any augmentation of one image.

    None resizes to a single pixel, for which PyTorch has no uint8 kernel.
    """
    return st.one_of(
        lossless(),
        _named("RandomHorizontalFlip", p=st.just(0.5)),
        _named("RandomVerticalFlip", p=st.just(0.5)),
        _named("RandomPhotometricDistort", p=st.sampled_from([0.5, 1.0])),
        _named("RandomErasing", p=st.just(0.8), value=st.sampled_from([0, "random", (1, 2, 3)])),
        _named("Resize", size=_two(3, 30)),
        _named("RandomShortestSize", min_size=_two(3, 30), max_size=st.none() | st.integers(3, 60)),
        _named("ResizeShortestEdge", short_edge_length=_two(3, 30), max_size=st.integers(3, 60)),
        _named(
            "ResizeShortestEdge",
            short_edge_length=_two(3, 30).map(sorted),
            max_size=st.integers(3, 60),
            sample_style=st.just("range"),
        ),
        _named("ScaleJitter", target_size=_two(8, 30), scale_range=st.just((0.3, 1.5))),
    )


SEEDS = st.integers(0, 2**32)


def _augmented(before, names, rng, slack=0.0):
    after = before
    for name, arguments in names:
        order = {"keypoint_flip_indices": flip_order(before)} if name == "RandomHorizontalFlip" else {}
        after = augmentations.AUGMENTATIONS[name](**arguments, **order)(after, rng)
        check_claims(after, slack)
    return after


@settings(max_examples=200)
@given(tensors(angles=True), st.lists(lossless(), min_size=1, max_size=4), SEEDS)
def test_pixels_take_their_targets_along(before, names, seed):
    """After flips, crops and padding each pixel is in the same masks, boxes and keypoints as before."""
    after = _augmented(before, names, np.random.default_rng(seed))
    flips = [name for name, _ in names].count("RandomHorizontalFlip")
    is_image = plain(after["image"])[2] == IMAGE
    source = tuple(plain(after["image"])[:2, is_image].long())
    _check_areas(before, after, is_image, source)
    _check_keypoints(before, after, is_image, flip_order(before) if flips % 2 else None)
    if "RandomIoUCrop" not in dict(names):
        assert not _areas(before)[_gone(before, after)][(slice(None), *source)].any()


def _gone(before, after):
    return sorted(set(before["labels"].tolist()) - set(after["labels"].tolist()))


def _areas(found):
    """The pixels of each instance: of its mask, or without masks in its box."""
    return plain(found["masks"]) if "masks" in found else filled(found)


def _check_areas(before, after, is_image, source):
    old, new = _areas(before)[after["labels"]], _areas(after)
    assert torch.equal(new[:, is_image], old[(slice(None), *source)])
    assert not new[:, ~is_image].any()
    boxes = plain(after["boxes"])
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    if "masks" in after:
        assert torch.equal(boxes, around(new))


def _check_keypoints(before, after, is_image, order):
    if "keypoints" not in before:
        return
    rows = after["labels"]
    points, seen = plain(before["keypoints"])[rows].floor(), before["visibility"][rows]
    if order is not None:
        points, seen = points[:, list(order)], seen[:, list(order)]
    x, y = plain(after["keypoints"]).floor().long().unbind(-1)
    image = plain(after["image"]).long()
    present = {tuple(place) for place in image[:2, is_image].T.tolist()}
    for place in (after["visibility"] > 0).nonzero().tolist():
        i, k = place
        assert image[:, y[i, k], x[i, k]].tolist() == [*points[i, k].long().tolist()[::-1], IMAGE]
        assert after["visibility"][i, k] == seen[i, k]
    for i, k in ((after["visibility"] == 0) & (seen > 0)).nonzero().tolist():
        assert tuple(points[i, k].long().tolist()[::-1]) not in present


@given(tensors(), st.integers(1, 40), st.integers(1, 40))
def test_targets_scale_with_the_image(before, height, width):
    """A box is scaled exactly, and lies within half a pixel of its mask."""
    # PyTorch has no uint8 kernel for a single pixel.
    assume(height * width > 1)
    after = moving.resize(before, (height, width))
    assert tuple(after["image"].shape[-2:]) == (height, width)
    check_claims(after, slack=1e-3)
    old_height, old_width = before["image"].shape[-2:]
    factor = torch.tensor([width / old_width, height / old_height], dtype=torch.float64)
    assert torch.equal(after["labels"], before["labels"])
    expected = plain(before["boxes"]).double() * factor.repeat(2)
    assert torch.allclose(plain(after["boxes"]).double(), expected, atol=1e-3)
    if "masks" in before:
        there = plain(after["masks"]).flatten(1).any(dim=1).bool()
        difference = around(plain(after["masks"])[there]) - plain(after["boxes"])[there]
        assert (difference.abs() <= 0.51).all()
        # A mask vanishes only between the centres of pixels.
        assert ((expected[~there, 2:] - expected[~there, :2]).amin(dim=1) <= 1.001).all()
    if "keypoints" in before:
        assert torch.allclose(
            plain(after["keypoints"]).double(), plain(before["keypoints"]).double() * factor, atol=1e-3
        )
        assert torch.equal(after["visibility"], before["visibility"])


def _global_state():
    """Return a hash of the states of the global generators, which pytest compares in no time."""
    _, keys, position, *_ = np.random.get_state()
    return hash((keys.tobytes(), position, torch.get_rng_state().numpy().tobytes()))


@settings(max_examples=150)
@given(tensors(), st.lists(chosen(), min_size=1, max_size=4), SEEDS)
def test_the_generator_alone_decides(before, names, seed):
    """The same generator makes the same sample, of the sizes it claims; what was given stays as it was."""
    given = copy.deepcopy(before)
    results = []
    for _ in range(2):
        rng = np.random.default_rng(seed)
        state = _global_state()
        after = _augmented(before, names, rng, slack=1e-3)
        assert _global_state() == state
        labels = after["labels"].tolist()
        assert labels == sorted(set(labels) & set(given["labels"].tolist()))
        results.append((after, rng.bit_generator.state))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert same(before, given)
    if "RandomIoUCrop" not in dict(names):
        # An image without targets changes in the same way.
        alone, rng = {"image": before["image"]}, np.random.default_rng(seed)
        for name, arguments in names:
            alone = augmentations.AUGMENTATIONS[name](**arguments)(alone, rng)
        assert same(alone, {"image": results[0][0]["image"]})


@given(tensors(masks=True), tensors(masks=True), st.booleans(), SEEDS)
def test_what_is_pasted_covers_what_lies_below(below, other, blending, seed):
    """Masks share no pixel with what was pasted over them, and boxes lie around masks."""
    if ("keypoints" in below) != ("keypoints" in other) or flip_order(below) != flip_order(other):
        return
    # PyTorch has no uint8 kernel for a single pixel.
    assume(max(below["image"].shape[-2:]) > 1)
    other["labels"] = other["labels"] + 100
    other["image"][2] = CANVAS
    given = copy.deepcopy((below, other))
    after = copy_paste.SimpleCopyPaste(0.7, blending)(below, np.random.default_rng(seed), other)
    check_claims(after, slack=1e-3)
    pasted = after["labels"] >= 100
    cover = plain(after["masks"])[pasted].any(dim=0).bool()
    rows = after["labels"][~pasted]
    assert set(rows.tolist()) <= set(below["labels"].tolist())
    assert torch.equal(plain(after["masks"])[~pasted], plain(below["masks"])[rows] * ~cover)
    assert not (plain(below["masks"])[_gone(below, after)] * ~cover).any()
    assert ((around(plain(after["masks"])) - plain(after["boxes"])).abs() <= 0.51).all()
    if not blending:
        assert torch.equal(plain(after["image"])[2] == CANVAS, cover)
        assert torch.equal(plain(after["image"])[:, ~cover], plain(below["image"])[:, ~cover])
    assert all(map(same, given, (below, other)))
