"""Box formats, segmentations as RLE, masks in the frame of their boxes: plaintrain.structures."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hostile_helpers import rejected
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes

from plaintrain.data.catalog import DatasetCatalog
from plaintrain.data.dataset_mapper import DatasetMapper
from plaintrain.evaluation.coco import COCOEvaluator
from plaintrain.structures import (
    BoxMasks,
    BoxMode,
    encode_masks,
    encode_segmentation,
    find_segmentation_problem,
    sample_masks,
)


def test_convert_accepts_detectron2s_values_and_returns_a_new_list():
    box = [1, 2, 3, 4]
    assert BoxMode.convert(box, 1, 0) == [1, 2, 4, 6]
    assert BoxMode.convert(box, 0, 0) is not box and box == [1, 2, 3, 4]
    rejected("four finite numbers, got [1, 2, 3]", by=lambda: BoxMode.convert([1, 2, 3], 1, 0))
    assert BoxMode.convert((1, 2, 3, 4), 0, 1) == (1, 2, 2, 2)
    for mode in ("XYXY", BoxMode.XYXY_REL, BoxMode.XYWHA_ABS, None):
        rejected(repr(mode), "XYXY_ABS", "XYWH_ABS", by=lambda m=mode: BoxMode.convert([*box, 5], m, 0))
    for boxes in (np.array([[1, 2, 3, 4]], np.uint8), torch.tensor([[1.0, 2, 3, 4]]).half()):
        wide = BoxMode.convert(boxes, 1, 0)
        assert type(wide) is type(boxes) and wide.dtype == boxes.dtype and wide.tolist() == [[1, 2, 4, 6]]
        assert BoxMode.convert(wide, 0, 1).tolist() == boxes.tolist() == [[1, 2, 3, 4]]
        assert BoxMode.convert(boxes, 0, 0) is not boxes and BoxMode.convert(boxes[:0], 1, 0).shape == (0, 4)


SQUARE = [2, 1, 6, 1, 6, 4, 2, 4]


def test_segmentations_may_hold_tuples_and_polygons_are_their_union_cut_off_at_the_image():
    # Rows 1 to 3, columns 2 to 5, of an image of 8 x 10.
    mask = np.zeros((8, 10), dtype=np.uint8)
    mask[1:4, 2:6] = 1
    for segmentation in ([tuple(SQUARE)], {"size": (8, 10), "counts": (17, 3, 5, 3, 5, 3, 5, 3, 36)}):
        before = repr(segmentation)
        rle = encode_segmentation(segmentation, 8, 10)
        assert rle["size"] == [8, 10] and type(rle["counts"]) is bytes
        assert np.array_equal(coco_mask.decode(rle), mask)
        assert repr(segmentation) == before
    mask[2:7, 4:9] = 1
    rle = encode_segmentation([SQUARE, [4, 2, 9, 2, 9, 7, 4, 7]], 8, 10)
    assert np.array_equal(coco_mask.decode(rle), mask)
    rle = encode_segmentation([[-5, -5, 6, -5, 6, 4, -5, 4]], 8, 10)
    assert coco_mask.decode(rle).sum() == 6 * 4 and coco_mask.decode(rle)[:4, :6].all()


def _rle(counts, size=(8, 10)):
    return {"size": list(size), "counts": counts}


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ([[1, 2, 3, 4]], ["polygon", "3 finite points", "[1, 2, 3, 4]"]),
        # A list of numbers where a list of polygons belongs.
        (SQUARE, ["polygon", "2"]),
        ([[1, 2, 3, math.nan, 5, 6]], ["finite", "nan"]),
        ([[0, 0, 1e300, 0, -1e300, 5]], ["far outside"]),
        (None, ["no segmentation"]),
        ({"counts": [80]}, ["neither polygons nor an RLE", "counts"]),
        (_rle([80], (10, 8)), ["[10, 8]", "[8, 10]"]),
        *((_rle(counts), ["counts", "8 x 10"]) for counts in ([10, 20], [100, -20], [], [40, "40"], 80)),
        (_rle([2**64, -(2**64) + 80]), ["counts", "8 x 10"]),
        # Strings that are cut off, of which pycocotools would read on past the end, or are no runs.
        *((_rle(counts), ["counts", "8 x 10"]) for counts in ("1", b"\x01", "", "h", "0 0", "\ud800")),
        # A run of too many letters.
        (_rle("0" * 20 + "o" * 40 + "0"), ["counts", "8 x 10"]),
    ],
)
def test_malformed_segmentations_are_rejected(segmentation, words):
    rejected(*words, by=lambda: encode_segmentation(segmentation, 8, 10))


def test_runs_of_compressed_masks_add_up_and_truncation_is_detected():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 5), (40, 60), (9, 90)):
        mask = np.asfortranarray(rng.random((height, width)) < rng.random(), dtype=np.uint8)
        mask[:, width // 2 :] = height % 2
        rle = coco_mask.encode(mask)
        assert find_segmentation_problem(rle, height, width) is None
        for wrong in (rle["counts"][:-1], rle["counts"] + b"1", rle["counts"] + b"\xff"):
            assert find_segmentation_problem({**rle, "counts": wrong}, height, width)[0] == "bad_rle"


@pytest.mark.parametrize(
    "box",
    [
        [10.3, 5.7, 40.2, 30.9],
        # Over each edge, over all of them, tiny, and as small as a detection may be.
        [-20.5, 5, 10, 30],
        [10, -20.5, 30, 9],
        [10, 30, 20, 77.7],
        [-10, -10, 80, 70],
        [20, 20, 20.01, 20.01],
        [63.9, 47.9, 64, 48],
        [0, 0, 64, 48],
    ],
)
def test_pasted_masks_are_detectron2s_or_torchvisions(box):
    masks = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([box, [30.0, 20, 50, 40]])
    theirs = paste_masks_in_image(masks, boxes, (48, 64))[:, 0] > 0.5
    exact = paste_as_detectron2(masks, boxes, 48, 64)
    assert (exact - 0.5).abs().min() > 1e-6
    for aligned, expected in ((True, exact >= 0.5), (False, theirs)):
        found = BoxMasks(masks, boxes, 48, 64, aligned)
        assert found.paste().dtype == torch.bool and found.paste().equal(expected)
        assert expected[1].any() and found.encode() == encode_masks(expected)


def paste_as_detectron2(masks, boxes, height, width):
    """A grid from -1 to 1 over each box, zeros around the mask."""
    x0, y0, x1, y1 = boxes.double()[:, :, None].unbind(1)
    x = 2 * (torch.arange(width) + 0.5 - x0) / (x1 - x0) - 1
    y = 2 * (torch.arange(height) + 0.5 - y0) / (y1 - y0) - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
    return F.grid_sample(masks.double(), grid, align_corners=False)[:, 0]


@pytest.mark.parametrize(
    ("size", "aligned"), [((48, 64), True), ((31, 200), False), ((200, 3), True), ((1, 1), False)]
)
def test_masks_are_encoded_as_if_they_were_pasted(size, aligned):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(-0.3, 1.3, (60, 2, 2)) * size[::-1], axis=1).reshape(60, 4)
    # Full height, full width, whole image: runs that go on in the next column, and from the first pixel.
    corners[:3] = [[3, -9, 40, 400], [-9, 2, 400, 9], [-400, -400, 800, 800]]
    probabilities = rng.uniform(0, 1, (60, 1, 14, 14)) + rng.uniform(-0.5, 0.5, (60, 1, 1, 1))
    probabilities = torch.from_numpy(probabilities)
    probabilities[2] = 1
    # Certain masks in boxes of whole and half pixels, where probabilities of exactly 0.5 are frequent.
    probabilities[30:], corners[30:] = probabilities[30:].round().clamp(0, 1), (corners[30:] * 2).round() / 2
    masks = BoxMasks(probabilities.float(), torch.from_numpy(corners).float(), *size, aligned)
    expected = masks.paste()
    found = masks.encode()
    assert found == encode_masks(expected)
    decoded = coco_mask.decode([{"size": size, "counts": counts} for counts in found])
    assert (decoded.transpose(2, 0, 1) == expected.numpy()).all() and expected[2].all()


def test_masks_move_to_another_device_with_their_boxes():
    masks = BoxMasks(torch.ones(2, 1, 4, 4), torch.rand(2, 4), 5, 6, aligned=False).to("meta")
    assert masks.probabilities.is_meta and masks.boxes.is_meta and masks.device.type == "meta"
    assert not masks.aligned and not masks.is_cuda and masks.shape == (2, 5, 6)
    masks = BoxMasks(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), 48, 64)
    assert (
        masks.paste().shape == masks.shape == (0, 48, 64)
        and masks.encode() == encode_masks(masks.paste()) == []
    )


def test_targets_pasted_back_equal_the_sampled_masks():
    rng = np.random.default_rng(0)
    # Ellipses of a width of 12 pixels.
    centres, radii = rng.uniform(14, 26, (50, 2)), np.stack([np.full(50, 6), rng.uniform(4, 6, 50)], axis=1)
    y, x = np.mgrid[:40, :40] + 0.5
    (cx, cy), (rx, ry) = (values.T[:, :, None, None] for values in (centres, radii))
    masks = torch.from_numpy(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1)
    boxes = torch.from_numpy(np.concatenate([centres - radii, centres + radii], axis=1)).float()
    found = BoxMasks(sample_masks(masks, boxes, torch.arange(50), 28)[:, None], boxes, 40, 40).paste()
    iou = (found & masks).sum(dim=(1, 2)) / (found | masks).sum(dim=(1, 2))
    assert iou.min() >= 0.99, iou
    # Targets that are not aligned are torchvision's.
    masks = torch.from_numpy(np.random.default_rng(0).random((3, 40, 50)) < 0.3).to(torch.uint8)
    boxes, index = torch.tensor([[3.2, 4, 20.7, 30], [0, 0, 50, 40]]), torch.tensor([2, 0])
    found = sample_masks(masks, boxes, index, 28, aligned=False)
    assert found.equal(project_masks_on_boxes(masks, boxes, index, 28))
    assert not found.equal(sample_masks(masks, boxes, index, 28))


def test_perfect_mask_head_has_the_masks_of_real_objects(data_root):
    evaluator = COCOEvaluator("coco_2017_val", ("segm",))
    mapper = DatasetMapper(use_masks=True, augmentations=[])
    for record in DatasetCatalog.get("coco_2017_val"):
        target = mapper(record)["target"]
        num_objects = len(target["boxes"])
        masks = sample_masks(target["masks"], target["boxes"], torch.arange(num_objects), 28)[:, None]
        masks = BoxMasks(masks, target["boxes"], record["height"], record["width"])
        evaluator.process([record], [{**target, "scores": torch.ones(num_objects), "masks": masks}])
    results = evaluator.evaluate()["segm"]
    assert results["AP"] >= 95 and results["APs"] >= 95, results
