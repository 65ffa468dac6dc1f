"""plaintrain.data.transforms.copy_paste: instances of another image, pasted over this one.

tests/properties/test_transform_properties.py checks that masks and boxes end at what covers them.
"""

import numpy as np
import pytest
import torch
from detection_helpers import make_annotation, make_record
from hostile_helpers import rejected
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from plaintrain.data.dataset_mapper import DatasetMapper
from plaintrain.data.transforms.copy_paste import SimpleCopyPaste
from plaintrain.data.transforms.geometric import RandomHorizontalFlip, Resize, ScaleJitter
from plaintrain.utils.errors import UserError

ALL = SimpleCopyPaste(p=1.0, blending=False)


def _rng(seed=0):
    return np.random.default_rng(seed)


def _tensors(colour, size, *rectangles, first_label=0):
    """An image of one colour, whose rectangles (x0, y0, x1, y1) are instances with two keypoints each."""
    masks = torch.zeros(len(rectangles), *size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, rectangles, strict=True):
        mask[y0:y1, x0:x1] = 1
    boxes = torch.tensor(rectangles, dtype=torch.float32).reshape(-1, 4)
    points = boxes.reshape(-1, 2, 2) + torch.tensor([[0.5, 0.5], [-0.5, -0.5]])
    return {
        "image": tv_tensors.Image(torch.full((3, *size), colour, dtype=torch.uint8)),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        "labels": torch.arange(len(rectangles)) + first_label,
        "masks": tv_tensors.Mask(masks),
        "keypoints": tv_tensors.KeyPoints(points, canvas_size=size),
        "visibility": torch.tensor([[2, 1]] * len(rectangles), dtype=torch.int64).reshape(-1, 2),
    }


def test_pasted_instances_keep_their_targets_and_are_scaled():
    below = _tensors(10, (30, 40), (2, 3, 12, 13))
    other = _tensors(200, (30, 40), (20, 5, 35, 25), first_label=5)
    result = ALL(below, _rng(), other)
    for name in ("labels", "boxes", "masks", "keypoints", "visibility"):
        assert torch.equal(result[name], torch.cat([below[name], other[name]]))
    assert ALL(below, _rng(), _tensors(200, (30, 40))) is below
    below = _tensors(10, (30, 40))
    result = ALL(below, _rng(), _tensors(200, (60, 20), (5, 20, 15, 40), first_label=3))
    assert (result["boxes"].tolist(), result["labels"].tolist()) == ([[10, 10, 30, 20]], [3])
    assert result["keypoints"].tolist() == [[[11, 10.25], [29, 19.75]]]
    # An instance of which scaling leaves no pixel is not pasted.
    below = _tensors(10, (3, 4), (0, 0, 2, 2))
    other = _tensors(200, (300, 400), (101, 101, 103, 103), (200, 100, 400, 300), first_label=5)
    assert ALL(below, _rng(), other)["labels"].tolist() == [0, 6]


def test_covered_instances_shrink_and_only_their_covered_keypoints_are_hidden():
    # The first is covered whole, the second by half, the third not at all.
    below = _tensors(10, (30, 40), (22, 7, 30, 15), (10, 10, 30, 20), (2, 22, 12, 29))
    below["boxes"][2] += torch.tensor([0.3, 0.3, -0.3, -0.3])
    below["visibility"][1] = torch.tensor([2, 2])
    other = _tensors(200, (30, 40), (20, 5, 35, 25), first_label=5)
    result = ALL(below, _rng(), other)
    assert result["labels"].tolist() == [1, 2, 5]
    assert result["boxes"][0].tolist() == [10, 10, 20, 20]
    # A box that is not touched is not drawn anew.
    assert result["boxes"][1].tolist() == pytest.approx([2.3, 22.3, 11.7, 28.7])
    assert result["visibility"].tolist() == [[2, 1], [2, 1], [2, 1]]
    assert torch.equal(result["keypoints"][:2], below["keypoints"][1:])
    below = _tensors(10, (30, 40), (10, 10, 38, 20))
    other = _tensors(200, (30, 40), (20, 5, 35, 25))
    for visibility in ([0, 1], [2, 0]):
        below["visibility"][0] = torch.tensor(visibility)
        assert ALL(below, _rng(), other)["visibility"][0].tolist() == visibility
    # Points on the image's right and lower edge belong to its last pixels.
    corner = _tensors(10, (30, 40), (0, 0, 40, 30))
    corner["keypoints"][0] = torch.tensor([[40.0, 30.0], [39.5, 0.0]])
    corner["visibility"][0] = torch.tensor([2, 2])
    result = ALL(corner, _rng(), _tensors(200, (30, 40), (30, 20, 40, 30)))
    assert result["visibility"][0].tolist() == [1, 2]


def test_each_instance_is_pasted_with_probability_p_by_itself():
    below = _tensors(10, (30, 40))
    other = _tensors(200, (30, 40), (0, 0, 10, 10), (10, 10, 20, 20), (20, 20, 30, 30))
    for p, low, high in ((0.5, 80, 120), (0.1, 8, 36)):
        paste = SimpleCopyPaste(p, False)
        drawn = [paste(below, _rng(seed), other)["labels"].tolist() for seed in range(200)]
        for label in range(3):
            assert low <= sum(label in labels for labels in drawn) <= high
        assert len({tuple(labels) for labels in drawn}) == 8 or p != 0.5


def test_blending_softens_only_the_edges_of_the_image():
    below = _tensors(10, (40, 60), (2, 3, 12, 13))
    other = _tensors(210, (40, 60), (20, 10, 40, 30), first_label=5)
    soft, hard = SimpleCopyPaste(1.0)(below, _rng(), other), ALL(below, _rng(), other)
    for name in hard:
        if name != "image":
            assert torch.equal(soft[name], hard[name])
    row = soft["image"][0, 20].int()
    assert soft["image"].dtype == torch.uint8
    assert (row[:18] == 10).all() and (row[22:38] == 210).all() and (row[42:] == 10).all()
    assert (row[18:23].diff() > 0).all()
    for rectangle in ((51, 31, 60, 40), (30, 20, 31, 21)):
        other = _tensors(210, (40, 60), rectangle)
        share = F.gaussian_blur(other["masks"].float(), [5, 5], [2.0, 2.0])
        image = SimpleCopyPaste(1.0)(below, _rng(), other)["image"]
        assert (image - (10 + 200 * share)).abs().max() <= 0.51


@pytest.fixture
def records(tmp_path):
    """Five 40x30 images of one colour with an instance each; the first has none."""
    records = []
    for i in range(5):
        Image.new("RGB", (40, 30), (40 * i,) * 3).save(tmp_path / f"{i}.png")
        x0, y0, x1, y1 = 2 + 6 * i, 4, 7 + 6 * i, 20
        instance = make_annotation([x0, y0, x1, y1], i, segmentation=[[x0, y0, x1, y0, x1, y1, x0, y1]])
        record = make_record(i, *([instance] if i else []))
        records.append({**record, "file_name": str(tmp_path / f"{i}.png"), "height": 30, "width": 40})
    return records


def _mapper(records, *steps):
    return DatasetMapper(augmentations=list(steps), use_masks=True, records=records)


def test_mapper_draws_and_augments_partners_with_the_generator_of_the_sample(records):
    mapper, seen = _mapper(records, ALL), []
    for seed in range(60):
        one, other = (mapper(records[2], _rng(seed)) for _ in range(2))
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["target"]["masks"], other["target"]["masks"])
        seen.append(tuple(one["target"]["labels"].tolist()))
    # The image itself and the empty one add nothing.
    assert set(seen) == {(2,), (2, 1), (2, 3), (2, 4)}
    assert 10 < seen.count((2,)) < 38
    # Two steps paste from two.
    twice = _mapper(records, ALL, ALL)
    counts = {len(twice(records[1], _rng(seed))["target"]["labels"]) for seed in range(20)}
    assert {2, 3} <= counts
    # A partner goes through the augmentations before the paste, and draws for itself.
    mapper = _mapper(records[3:4], RandomHorizontalFlip(1.0), ALL, Resize((60, 80)))
    target = mapper(records[1], _rng())["target"]
    assert target["labels"].tolist() == [1, 3]
    # x 20 to 25 is mirrored to 15 to 20, as 8 to 13 is to 27 to 32, then all is doubled.
    assert target["boxes"].tolist() == [[54, 8, 64, 40], [30, 8, 40, 40]]
    mapper, sizes = _mapper(records[3:4], ScaleJitter((30, 40), (0.5, 1.0)), ALL), []
    for seed in range(20):
        sample = mapper(records[1], _rng(seed))
        height, target = sample["image"].shape[1], sample["target"]
        box = target["boxes"][target["labels"] == 3][0]
        # Scaled by its own factor, and then to the size of this image.
        assert (box[3] - box[1]).item() == pytest.approx(16 * height / 30, abs=1.5)
        sizes.append(height)
    assert len(set(sizes)) > 5


def test_copy_paste_without_masks_or_records_is_rejected_before_training(records, cfg):
    with pytest.raises(UserError, match=r"SimpleCopyPaste needs masks; set MODEL\.MASK_ON"):
        DatasetMapper(augmentations=[ALL], records=records)
    with pytest.raises(UserError, match="SimpleCopyPaste needs records"):
        DatasetMapper(augmentations=[ALL], use_masks=True)
    cfg.INPUT.AUGMENTATIONS = ["SimpleCopyPaste"]
    rejected("SimpleCopyPaste needs masks", by=lambda: DatasetMapper(cfg, records=records))
    cfg.MODEL.MASK_ON = True
    DatasetMapper(cfg, records=records)
    DatasetMapper(cfg, is_train=False)
