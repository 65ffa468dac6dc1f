"""Boxes, segmentations and keypoints of a record, and the sample that the mapper makes of it."""

import os
import tempfile

import numpy as np
import torch
from detection_helpers import make_annotation
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from test_transform_properties import filled, plain, tensors

from plaintrain.data import dataset_mapper, keypoints
from plaintrain.data.transforms.geometric import RandomHorizontalFlip
from plaintrain.structures import BOX_MODES, BoxMode, encode_segmentation, make_record
from plaintrain.utils.errors import UserError

NUMBERS = st.floats(-(2**20), 2**20, width=32)
MODES = st.sampled_from(BOX_MODES)


@given(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), MODES, MODES)
def test_box_modes_invert(box, mode, other):
    """There and back; a width is the difference of two sides."""
    converted = BoxMode.convert(box, mode, other)
    assert all(type(value) is float for value in converted)
    back = BoxMode.convert(converted, other, mode)
    assert np.allclose(back, box, rtol=0, atol=1e-9)
    if mode == other:
        assert converted == box
    x0, y0, x1, y1 = BoxMode.convert(box, mode, BoxMode.XYXY_ABS)
    x, y, width, height = BoxMode.convert(box, mode, BoxMode.XYWH_ABS)
    assert (x, y) == (x0, y0)
    assert np.allclose([x1 - x0, y1 - y0], [width, height], rtol=0, atol=1e-9)


NO_NUMBERS = st.sampled_from([float("inf"), float("-inf"), float("nan"), "1", None])
FINITE = st.floats(-9, 9)
ROWS = st.lists(FINITE, min_size=3, max_size=5) | st.lists(FINITE | NO_NUMBERS, min_size=4, max_size=4)


@given(ROWS, MODES)
def test_a_box_that_is_none_is_rejected(box, mode):
    right = len(box) == 4 and all(isinstance(v, float) and np.isfinite(v) for v in box)
    try:
        BoxMode.convert(box, mode, BoxMode.XYXY_ABS)
    except UserError:
        assert not right
    else:
        assert right


SIDES = st.sampled_from(["", "left_", "right_", "Left", "Right", "LEFT ", "RIGHT "])
KEYPOINTS = st.lists(
    st.tuples(SIDES, st.sampled_from(["eye", "ear", "nose", "left"])).map("".join), unique=True, max_size=8
)
_OTHER = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
_OTHER |= {right: left for left, right in _OTHER.items()}


def _mirrored(name):
    """The name with every left and right exchanged."""
    for side in _OTHER:
        name = name.replace(side, f"<{side}>")
    for side, other in _OTHER.items():
        name = name.replace(f"<{side}>", other)
    return name


@settings(max_examples=300)
@given(KEYPOINTS)
def test_left_and_right_change_places(names):
    """An involution, that pairs each name with its mirrored one where there is one."""
    order = keypoints.compute_hflip_indices(names)
    assert sorted(order) == list(range(len(names)))
    assert [order[i] for i in order] == list(range(len(names)))
    for name, i in zip(names, order, strict=True):
        assert names[i] == (_mirrored(name) if _mirrored(name) in names else name)
    pairs = [(names[i], names[k]) for i, k in enumerate(order) if i < k]
    assert keypoints.compute_hflip_indices(names, pairs) == order


@st.composite
def masks(draw):
    """bool `[height, width]`, of any pixels."""
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    pixels = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    return np.array(pixels).reshape(height, width)


def _runs(mask):
    """COCO's uncompressed counts: runs down the columns, of zeros first."""
    flat = [False, *mask.T.ravel().tolist()]
    ends = [i for i in range(1, len(flat)) if flat[i] != flat[i - 1]]
    return np.diff([1, *ends, len(flat)]).tolist()


@given(masks())
def test_a_segmentation_keeps_its_pixels(mask):
    """As counts, and compressed, as text and as bytes."""
    size = list(mask.shape)
    compressed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    for counts in (_runs(mask), compressed, compressed.decode()):
        rle = encode_segmentation({"size": size, "counts": counts}, *size)
        assert np.array_equal(coco_mask.decode(rle), mask)


@given(tensors(masks=True, keypoints=True), st.data())
def test_a_sample_holds_what_the_record_says(found, data):
    """In either box mode, with crowds left out; mirrored twice it is the same sample."""
    crowds = [data.draw(st.booleans()) for _ in found["labels"]]
    number = found["keypoints"].shape[1]
    with tempfile.TemporaryDirectory() as folder:
        record = _record(folder, found, crowds, data.draw(MODES))
        make = _mapper(number, [])
        sample, again = make(record), make(record)
        flip = RandomHorizontalFlip(1.0, tuple(range(number))[::-1])
        mirrored = _mapper(number, [flip, flip])(record)
    rows = [i for i, crowd in enumerate(crowds) if not crowd]
    target = sample["target"]
    assert torch.equal(sample["image"], plain(found["image"]))
    assert (sample["height"], sample["width"]) == sample["image"].shape[-2:]
    assert torch.equal(target["boxes"], plain(found["boxes"])[rows])
    assert torch.equal(target["labels"], found["labels"][rows])
    assert torch.equal(target["masks"], filled(found)[rows])
    assert ("keypoints" in target) == (number > 0)
    if number:
        assert target["keypoints"].shape == (len(rows), number, 3)
        seen = found["visibility"][rows]
        assert torch.equal(target["keypoints"][..., 2].long(), seen)
        assert torch.equal(
            target["keypoints"][..., :2], plain(found["keypoints"])[rows] * (seen > 0)[..., None]
        )
    for other in (again, mirrored):
        assert torch.equal(other["image"], sample["image"])
        assert all(torch.equal(other["target"][name], value) for name, value in target.items())


def _mapper(number, steps):
    return dataset_mapper.DatasetMapper(augmentations=steps, use_masks=True, num_keypoints=number)


def _record(folder, found, crowds, mode):
    path = os.path.join(folder, "image.png")
    Image.fromarray(plain(found["image"]).permute(1, 2, 0).numpy()).save(path)
    height, width = found["image"].shape[-2:]
    annotations = []
    for i, crowd in enumerate(crowds):
        x0, y0, x1, y1 = plain(found["boxes"])[i].tolist()
        points = torch.cat([plain(found["keypoints"])[i], found["visibility"][i, :, None]], dim=1)
        box = BoxMode.convert([x0, y0, x1, y1], BoxMode.XYXY_ABS, mode)
        entries = {"segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]], "keypoints": points.flatten().tolist()}
        annotations.append(make_annotation(box, i, bbox_mode=mode, iscrowd=int(crowd), **entries))
    return make_record(path, 1, height, width, annotations)
