"""Test-time augmentation: the views of data.tta, and the detector on them of modeling.tta."""

import contextlib

import pytest
import torch
from model_helpers import ARCHITECTURES, TINY, K, build, make_cfg, make_overrides, randomize_predictions
from torch import nn
from torchvision.ops import batched_nms

from plaintrain.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_test_loader
from plaintrain.data.datasets.shapes import load_shapes
from plaintrain.data.tta import build_tta_mapper
from plaintrain.engine.preflight import check_before_training
from plaintrain.modeling.tta import DetectorWithTTA, build_tta
from plaintrain.utils.errors import UserError

AUG = ("TEST.AUG.ENABLED", True)
# Left and right change places, the nose stays.
ORDER = (1, 0, 2)
MASKS = ARCHITECTURES["mask_keypoint_rcnn"]
# IoU 0.6 with the box of 10 x 10.
BOX, NEAR = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 6.0]


@pytest.fixture
def cfg(cfg):
    cfg.TEST.AUG.ENABLED = True
    return cfg


@pytest.fixture
def shapes():
    """Two images of the shapes set: the first wide, the second upright."""
    (wide,), metadata = load_shapes("val", num=1, height=60, width=90)
    (upright,), _ = load_shapes("test", num=1, height=80, width=50)
    records = [wide, {**upright, "image_id": 2}]
    DatasetCatalog.register("few_shapes", lambda: records)
    MetadataCatalog.get("few_shapes").set(**metadata)
    return records


class Listed(nn.Module):
    """Returns for its first call the first of some lists of detections, and so on."""

    def __init__(self, *results):
        super().__init__()
        self.results, self.calls = results, []
        self.eval()

    def forward(self, samples):
        self.calls.append(samples)
        return self.results[len(self.calls) - 1]


def detection(boxes, scores, labels=None, **more):
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    labels = torch.zeros(len(boxes), dtype=torch.int64) if labels is None else torch.tensor(labels)
    return {"boxes": boxes, "scores": torch.tensor(scores, dtype=torch.float32), "labels": labels, **more}


def sample_of(*flipped, size=(20, 30), view=(40, 60), order=ORDER, image_id=0):
    """A sample of black views, mirrored or not; `size` is the original's."""
    image = torch.zeros(3, *view, dtype=torch.uint8)
    views = [{"image": image, "flipped": f, "keypoint_flip_indices": order if f else None} for f in flipped]
    names = {"image_id": image_id, "file_name": "", "height": size[0], "width": size[1]}
    return {**names, "views": views}


def run(model, samples):
    with torch.no_grad():
        return model(samples)


@pytest.mark.parametrize("fixed_size", [(0, 0), (30, 45)])
def test_views_are_what_the_plain_mapper_makes_and_its_mirror_images(cfg, shapes, fixed_size):
    cfg.INPUT.FIXED_SIZE = fixed_size
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = (0, 40, 64), 75
    # The shape of 30 x 45 whose shorter side is 64 has a longer one of 96, which MAX_SIZE bounds.
    fixed = [(30, 45), (40, 60), (50, 75)]
    mapper = build_tta_mapper(cfg, "few_shapes")
    for record in shapes:
        sample = mapper(record)
        assert set(sample) == {"image_id", "file_name", "height", "width", "views"}
        assert (sample["image_id"], sample["file_name"]) == (record["image_id"], record["file_name"])
        assert (sample["height"], sample["width"]) == (record["height"], record["width"])
        plain, mirrored = sample["views"][::2], sample["views"][1::2]
        assert len(plain) == len(mirrored) == 3
        for i, (view, mirror) in enumerate(zip(plain, mirrored, strict=True)):
            cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = cfg.TEST.AUG.MIN_SIZES[i], 75
            cfg.INPUT.FIXED_SIZE = fixed[i] if fixed_size != (0, 0) else fixed_size
            expected = DatasetMapper(cfg, is_train=False)(record)["image"]
            assert view["image"].equal(expected) and mirror["image"].equal(expected.flip(-1))
            assert (view["flipped"], mirror["flipped"]) == (False, True)
            for image in (view["image"], mirror["image"]):
                assert type(image) is torch.Tensor and image.dtype == torch.uint8 and image.is_contiguous()


def test_views_are_mirrored_if_asked_for_with_the_keypoint_order_of_the_dataset(cfg, shapes):
    cfg.TEST.AUG.MIN_SIZES, cfg.MODEL.KEYPOINT_ON = (40,), True
    views = build_tta_mapper(cfg, "few_shapes")(shapes[0])["views"]
    assert [view["keypoint_flip_indices"] for view in views] == [None, (0, 3, 2, 1)]
    for cfg.TEST.AUG.FLIP, cfg.MODEL.KEYPOINT_ON in ((False, True), (True, False)):
        views = build_tta_mapper(cfg, "few_shapes")(shapes[0])["views"]
        assert [view["flipped"] for view in views] == [False, True][: 1 + cfg.TEST.AUG.FLIP]
        assert all(view["keypoint_flip_indices"] is None for view in views)


BAD_KEYS = [
    ("TEST.AUG.MIN_SIZES", (), r"TEST\.AUG\.MIN_SIZES must be 1 or more numbers .* got \(\)"),
    ("TEST.AUG.MIN_SIZES", (40, -1), r"TEST\.AUG\.MIN_SIZES must .* got \(40, -1\)"),
    ("TEST.AUG.MAX_SIZE", 0, r"TEST\.AUG\.MAX_SIZE must be at least 1 .*got 0"),
    ("INPUT.FIXED_SIZE", (40, 0), r"INPUT.FIXED_SIZE must be .*, got \(40, 0\)"),
    ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 5, "NUM_KEYPOINTS is 5, but few_shapes has 4 keypoints"),
]


def test_bad_keys_are_rejected_also_before_training(cfg, shapes):
    cfg.merge_from_list(make_overrides(*TINY))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("few_shapes",)
    cfg.MODEL.KEYPOINT_ON = True
    for key, value, message in BAD_KEYS:
        wrong = cfg.clone()
        wrong.merge_from_list([key, value])
        with pytest.raises(UserError, match=message):
            build_tta_mapper(wrong, "few_shapes")
    cfg.MODEL.KEYPOINT_ON, cfg.TEST.AUG.MIN_SIZES = False, ()
    with pytest.raises(UserError, match=BAD_KEYS[0][2]):
        check_before_training(cfg, resume=False, eval_only=False)
    cfg.TEST.AUG.ENABLED = False
    check_before_training(cfg, resume=False, eval_only=False)


def plain_and_merged(*overrides, autocast=False):
    """What a model finds in the shapes in the plain test, and with one view of the same size."""
    overrides = (
        *overrides, *AUG, "TEST.AUG.FLIP", False, "TEST.AUG.MAX_SIZE", 70,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0,
        "INPUT.MIN_SIZE_TEST", 48, "INPUT.MAX_SIZE_TEST", 70,
    )  # fmt: skip
    cfg = make_cfg(*overrides)
    cfg.TEST.AUG.MIN_SIZES = (min(cfg.INPUT.FIXED_SIZE) or 48,)
    model = build(*overrides)
    randomize_predictions(model)
    wrapped = build_tta(cfg, model.eval())
    mapper = DatasetMapper(cfg, is_train=False)
    (plain,) = build_detection_test_loader(cfg, "few_shapes", mapper=mapper, sampler=range(2))
    (views,) = build_detection_test_loader(cfg, "few_shapes", sampler=range(2))
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        return run(model, plain), run(wrapped, views), wrapped


def assert_same(found, expected, at_least=20):
    assert len(found) == len(expected) == 2
    for ours, plain in zip(found, expected, strict=True):
        assert set(ours) == set(plain) and len(plain["scores"]) >= at_least
        assert plain["scores"].unique().numel() >= at_least and ours["labels"].equal(plain["labels"])
        for key in set(plain) & {"boxes", "scores", "keypoints"}:
            assert ours[key].dtype == torch.float32
            torch.testing.assert_close(ours[key], plain[key], rtol=0, atol=1e-4)
        if "masks" in plain:
            assert ours["masks"].shape == plain["masks"].shape and ours["masks"].dtype == torch.bool
            assert (ours["masks"] == plain["masks"]).float().mean() > 0.9999
            assert plain["masks"].flatten(1).any(dim=1).sum() >= at_least


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_view_of_the_plain_size_gives_the_plain_detections(shapes, name, autocast):
    expected, found, _ = plain_and_merged(*ARCHITECTURES[name], autocast=autocast)
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("retinanet", ("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator")),
        ("proposals", ("MODEL.TINY.NUM_LEVELS", 2, "MODEL.RPN.POST_NMS_TOPK_TEST", 150)),
    ],
)
def test_where_the_detectors_own_nms_is_another_one_view_gives_what_nms_by_class_leaves(shapes, name, keys):
    expected, found, wrapped = plain_and_merged(*ARCHITECTURES[name], *keys)
    left = []
    for plain in expected:
        keep = batched_nms(plain["boxes"], plain["scores"], plain["labels"], wrapped.nms_thresh)
        assert 20 < len(keep) < len(plain["scores"])
        left.append({key: value[keep] for key, value in plain.items()})
    assert_same(found, left)


def test_detections_of_all_views_compete_within_their_class_and_image():
    first = detection([BOX, BOX], [0.5, 0.7], [0, 1])
    second = detection([NEAR, NEAR, [50, 0, 60, 10]], [0.6, 0.4, 0.3], [0, 2, 0])
    sample = sample_of(False, False, size=(100, 100))
    (found,) = DetectorWithTTA(Listed([first], [second]), 0.5, 100)([sample])
    torch.testing.assert_close(found["scores"], torch.tensor([0.7, 0.6, 0.4, 0.3]))
    assert found["labels"].tolist() == [1, 0, 2, 0]
    assert found["boxes"].tolist() == [BOX, NEAR, NEAR, [50, 0, 60, 10]]
    # At a higher threshold the box of 0.5 does not overlap enough.
    (found,) = DetectorWithTTA(Listed([first], [second]), 0.7, 100)([sample])
    torch.testing.assert_close(found["scores"], torch.tensor([0.7, 0.6, 0.5, 0.4, 0.3]))
    # The best are kept, and each image keeps its own.
    boxes = [[20 * i, 0, 20 * i + 10, 10] for i in range(3)]
    first = [detection(boxes, [0.1, 0.9, 0.5]), detection(boxes[:1], [0.2])]
    second = [detection(boxes[:1], [0.8]), detection(boxes[1:], [0.3, 0.1])]
    samples = [sample_of(False, False), sample_of(False, False, view=(30, 10), image_id=1)]
    listed = Listed(first, second)
    one, two = DetectorWithTTA(listed, 0.5, 2)(samples)
    torch.testing.assert_close(one["scores"], torch.tensor([0.9, 0.8]))
    torch.testing.assert_close(two["scores"], torch.tensor([0.3, 0.2]))
    assert one["boxes"].tolist() == [boxes[1], boxes[0]] and two["boxes"].tolist() == [boxes[1], boxes[0]]
    # One view of all images at a time.
    assert [[s["image_id"] for s in call] for call in listed.calls] == [[0, 1], [0, 1]]
    assert [s["image"].shape[1:] for s in listed.calls[0]] == [(40, 60), (30, 10)]


def test_keypoints_and_masks_of_any_detector_are_those_of_the_view_that_is_left():
    points = torch.tensor([[[1.0, 2, 0.1], [9, 3, 0.2], [4, 5, 0.3]]])
    mask = torch.zeros(1, 20, 30, dtype=torch.bool)
    mask[:, 2:4, :7] = True
    first = detection([[20, 0, 30, 10]], [0.5], keypoints=points + 1, masks=~mask)
    second = detection([BOX], [0.6], keypoints=points, masks=mask)
    (found,) = DetectorWithTTA(Listed([first], [second]), 0.5, 9)([sample_of(False, True)])
    assert found["boxes"].tolist() == [[20, 0, 30, 10]]
    expected = torch.tensor([[[21.0, 3, 0.2], [29, 2, 0.1], [26, 5, 0.3]]])
    torch.testing.assert_close(found["keypoints"], expected)
    assert found["masks"].sum() == 14 and found["masks"][0, 2:4, 23:].all()


def mask_rcnn(*views):
    """A Mask R-CNN of listed detections, and in each view one hand-set mask for all."""
    listed, (_, masks) = Listed(*([found] for found, _ in views)), zip(*views, strict=True)
    model = build(*MASKS).eval()
    model.asked = []

    def predict_masks(features, boxes, labels):
        model.asked.append((boxes[0].tolist(), labels[0].tolist()))
        return [masks[len(model.asked) - 1].expand(len(labels[0]), 1, 28, 28)]

    # A module would become a part of the model.
    model.forward, model.roi_heads.predict_masks = listed.forward, predict_masks
    return model


def test_masks_are_the_mean_of_the_views_probabilities_where_the_merged_boxes_lie():
    sure, unsure = torch.full((28, 28), 0.9), torch.full((28, 28), 0.3)
    # Left: 0.9 and 0.3, together above a half; right: 0.6 and 0.3, below it.
    sure[:, 14:] = 0.6
    found = detection([[4, 2, 18, 16]], [0.9])
    (found,) = DetectorWithTTA(mask_rcnn((found, sure), (found, unsure)), 0.5, 9)([sample_of(False, False)])
    (mask,) = found["masks"]
    assert mask.shape == (20, 30) and mask.dtype == torch.bool
    assert mask[3:15, 5:10].all() and not mask[:, 12:].any() and not mask[:, :3].any()
    # Masks are asked for where the merged boxes lie in each view, and mirrored back.
    left = torch.zeros(28, 28)
    left[:, :14] = 1
    one, other = detection([[1, 2, 15, 16]], [0.9], [2]), detection([[1, 2, 15, 16]], [0.8], [1])
    model = mask_rcnn((one, left), (other, left.flip(-1)))
    sample = sample_of(False, True)
    sample["views"][1]["image"] = torch.zeros(3, 10, 45, dtype=torch.uint8)
    (found,) = DetectorWithTTA(model, 0.5, 9)([sample])
    assert found["boxes"].tolist() == [[1, 2, 15, 16], [15, 2, 29, 16]]
    (plain, labels), (mirrored, again) = model.asked
    assert labels == again == [2, 1]
    assert plain == [[2, 4, 30, 32], [30, 4, 58, 32]] and mirrored == [[22.5, 1, 43.5, 8], [1.5, 1, 22.5, 8]]
    for mask, x0 in zip(found["masks"], (1, 15), strict=True):
        assert mask[3:15, x0 + 1 : x0 + 6].all()
        assert not mask[:, x0 + 8 :].any() and not mask[:, : x0 - 1].any()


def test_masks_are_not_made_twice_and_the_branch_comes_back():
    model = build(*MASKS, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0).eval()
    calls, pool = [], model.roi_heads.mask_roi_pool
    model.roi_heads.mask_head.register_forward_hook(lambda *_: calls.append(1))
    sample = sample_of(False, True, False, order=(0, 3, 2, 1))
    assert "masks" in run(DetectorWithTTA(model, 0.5, 9), [sample])[0]
    assert len(calls) == 3 and model.roi_heads.mask_roi_pool is pool
    model.roi_heads.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(DetectorWithTTA(model, 0.5, 9), [sample])
    assert model.roi_heads.mask_roi_pool is pool and model.roi_heads.has_mask()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_images_without_detections(name):
    overrides = [*ARCHITECTURES[name], *AUG, "MODEL.RPN.SCORE_THRESH", 1.0]
    for node in ("ROI_HEADS", "RETINANET", "FCOS", "SSD"):
        overrides += [f"MODEL.{node}.SCORE_THRESH_TEST", 1.0]
    model = build_tta(make_cfg(*overrides), build(*overrides).eval())
    view = (64, 64) if name == "ssd" else (48, 64)
    samples = [sample_of(False, True, view=view, order=(0, 3, 2, 1)) for _ in range(2)]
    for found in run(model, samples):
        parts = {"masks": (0, 20, 30), "keypoints": (0, 4, 3)} if name == "mask_keypoint_rcnn" else {}
        shapes = {"boxes": (0, 4), "scores": (0,), "labels": (0,), **parts}
        assert {key: tuple(value.shape) for key, value in found.items()} == shapes


@pytest.mark.parametrize("name", ["faster_rcnn", "proposals", "retinanet", "fcos", "ssd"])
def test_threshold_and_number_are_the_architectures(name):
    threshold, number = f"MODEL.{name.upper()}.NMS_THRESH_TEST", "TEST.DETECTIONS_PER_IMAGE"
    if name == "faster_rcnn":
        threshold = "MODEL.ROI_HEADS.NMS_THRESH_TEST"
    elif name == "proposals":
        threshold, number = "MODEL.RPN.NMS_THRESH", "MODEL.RPN.POST_NMS_TOPK_TEST"
    keys = (*ARCHITECTURES[name], *AUG, threshold, 0.123, number, 17)
    cfg, model = make_cfg(*keys), build(*keys).eval()
    # Without GPUs, DataParallel only wraps.
    wrapped = build_tta(cfg, nn.DataParallel(model))
    assert (wrapped.nms_thresh, wrapped.detections_per_image, wrapped.model) == (0.123, 17, model)
    assert not wrapped.training
    cfg.TEST.AUG.ENABLED = False
    assert build_tta(cfg, model) is model


def test_what_the_detector_cannot_merge_is_refused(shapes):
    model = DetectorWithTTA(Listed([detection([BOX], [0.6], keypoints=torch.zeros(1, K, 3))]), 0.5, 9)
    plain = DatasetMapper(augmentations=[], is_train=False)(shapes[0])
    for sample in (plain, {**plain, "views": []}):
        with pytest.raises(UserError, match=r"image 1 has no views; .*TEST.AUG.ENABLED"):
            model([sample])
    with pytest.raises(UserError, match="keypoint_flip_indices"):
        model([sample_of(True, order=None)])
    with pytest.raises(RuntimeError, match=r"for evaluation only; call eval\(\)"):
        DetectorWithTTA(Listed().train(), 0.5, 9)([sample_of(False)])
