"""plaintrain.data.dataset_mapper, images and keypoints: from a record and its file to a sample.

tests/properties/test_target_properties.py has what holds for every record.
"""

import ast
import copy
import pickle
import struct
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hostile_helpers import rejected
from PIL import ExifTags, Image, ImageOps
from torchvision import tv_tensors

from plaintrain.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_train_loader,
    dataset_mapper,
)
from plaintrain.data.dataset_mapper import read_image
from plaintrain.data.datasets.shapes import load_shapes, render
from plaintrain.data.image_files import read_image_header
from plaintrain.data.keypoints import compute_hflip_indices, find_unpaired_keypoints
from plaintrain.data.transforms.geometric import RandomHorizontalFlip, RandomZoomOut, Resize
from plaintrain.data.tta import build_tta_mapper
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import UserError

RED = [255, 0, 0]
BOX, SQUARE = [4, 5, 10, 8], [4, 5, 14, 5, 14, 13, 4, 13]


def _record(path, height, width, *annotations):
    size = {"height": height, "width": width}
    return {"file_name": str(path), "image_id": 17, **size, "annotations": list(annotations)}


def _object(box, label=0, **more):
    return {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": label, "iscrowd": 0, **more}


@pytest.fixture
def picture(tmp_path, write_image):
    """Path of a 40x30 image of random pixels."""
    write_image(tmp_path / "picture.png", 40, 30)
    return tmp_path / "picture.png"


def _turn(path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(path).save(path, exif=exif)


def test_read_image_converts_to_rgb(tmp_path):
    for name, image, expected in (
        ("grey.png", Image.new("L", (4, 3), 100), [100] * 3),
        ("palette.png", Image.new("RGB", (4, 3), (255, 0, 0)).convert("P"), RED),
        ("palette.gif", Image.new("RGB", (4, 3), (255, 0, 0)).convert("P"), RED),
        ("cmyk.tif", Image.new("CMYK", (4, 3), (0, 255, 255, 0)), RED),
        ("rgba.png", Image.new("RGBA", (4, 3), (255, 0, 0, 255)), RED),
        ("grey_alpha.png", Image.new("LA", (4, 3), (100, 255)), [100] * 3),
        ("bits.png", Image.new("1", (4, 3), 1), [255] * 3),
    ):
        image.save(tmp_path / name)
        tensor = read_image(str(tmp_path / name))
        assert (tensor.shape, tensor.dtype) == ((3, 3, 4), torch.uint8)
        assert (tensor == torch.tensor(expected, dtype=torch.uint8).reshape(3, 1, 1)).all(), name


# Pixels of more than 8 bits, and the ranges that a dataset may declare.
STEPS = np.arange(64).reshape(8, 8)
DEEP = {
    "bits12.png": (STEPS * 65).astype(np.uint16),
    "bits16.png": (STEPS * 1040).astype(np.uint16),
    "floats.tif": (STEPS / 63).astype(np.float32),
    "ints.tif": (STEPS * 1000 - 20_000).astype(np.int32),
}


@pytest.mark.parametrize(
    ("name", "pixel_range", "expected"),
    [
        ("bits12.png", (), STEPS * 65 // 256),
        ("bits12.png", (0, 4095), STEPS * 65 // 16),
        ("bits16.png", (), STEPS * 1040 // 256),
        ("floats.tif", (), STEPS * 256 // 63),
        ("floats.tif", (-1, 2), (63 + STEPS) * 256 // 189),
        ("ints.tif", (-20_000, 43_000), STEPS * 256 // 63),
    ],
)
def test_read_image_scales_deep_pixels_by_type_or_declared_range(tmp_path, name, pixel_range, expected):
    # Each half alone becomes what it is in the whole image: no image's own maximum counts.
    for values, wanted in ((DEEP[name], expected), (DEEP[name][:4], expected[:4])):
        Image.fromarray(values).save(tmp_path / name)
        image = read_image(str(tmp_path / name), pixel_range)
        assert image.dtype == torch.uint8
        np.testing.assert_array_equal(image, np.broadcast_to(wanted.clip(max=255), (3, *wanted.shape)))


@pytest.mark.parametrize(
    ("name", "values", "pixel_range", "words"),
    [
        ("ints.tif", DEEP["ints.tif"], (), "int32 pixels from -20000 to 43000, a type without a default"),
        ("ints.tif", DEEP["ints.tif"], (0, 43_000), "-20000 to 43000, outside INPUT.PIXEL_RANGE [0, 43000]"),
        ("a.png", DEEP["bits16.png"], (0, 4095), "uint16 pixels from 0 to 65520, outside INPUT.PIXEL_RANGE"),
        ("a.tif", DEEP["floats.tif"] * 255, (), "float32 pixels from 0 to 255, outside its type's 0 to 1"),
        ("a.tif", DEEP["floats.tif"] * np.float32("nan"), (0, 9), "float32 pixels that are NaN or infinite"),
        ("a.png", STEPS.astype(np.uint8), (0, 4095), "8-bit pixels, but INPUT.PIXEL_RANGE is [0, 4095]"),
        ("a.png", STEPS.astype(np.uint8), (0, 1), "uint8 pixels from 0 to 63, outside INPUT.PIXEL_RANGE"),
    ],
)
def test_read_image_rejects_pixels_outside_the_range(tmp_path, name, values, pixel_range, words):
    Image.fromarray(values).save(tmp_path / name)
    with pytest.raises(UserError) as error:
        read_image(str(tmp_path / name), pixel_range)
    assert words in str(error.value) and name in str(error.value)
    # A worker hands it over.
    assert pickle.loads(pickle.dumps(error.value)).error_type == "pixel_range"  # noqa: S301


def _tiff(bits, sample_format, pixels):
    """Return an 8x8 TIFF, of a type that Pillow reads and does not write."""
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: len(pixels)}
    tags[339] = sample_format
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = struct.pack("<4sI", b"II*\0", 8 + len(pixels))
    return header + pixels + struct.pack("<H", 10) + entries + bytes(4)


def test_read_image_does_not_wrap_signed_or_32_bit_pixels_around(tmp_path):
    types = ((16, 2, "<i2", -30), (8, 2, "i1", -30), (32, 1, "<u4", 3 * 10**9))
    for bits, sample_format, dtype, low in types:
        values = (STEPS + low).astype(dtype)
        (tmp_path / "a.tif").write_bytes(_tiff(bits, sample_format, values.tobytes()))
        image = read_image(str(tmp_path / "a.tif"), (low, low + 63))
        np.testing.assert_array_equal(image[0], STEPS * 256 // 63 - STEPS // 63)
        words = f"int{bits} pixels from ", " a type without a default range"
        rejected(*words, by=lambda: read_image(str(tmp_path / "a.tif")))


def test_pixel_range_of_the_config_is_used_wherever_images_are_read(tmp_path, cfg):
    Image.fromarray(DEEP["bits12.png"]).save(tmp_path / "a.png")
    record = _record(tmp_path / "a.png", 8, 8)
    cfg.INPUT.PIXEL_RANGE, cfg.INPUT.MIN_SIZE_TEST = [0, 4095], 0
    expected = torch.from_numpy(STEPS * 65 // 16).to(torch.uint8).expand(3, -1, -1)
    assert torch.equal(DatasetMapper(cfg, augmentations=[])(record)["image"], expected)
    assert torch.equal(DatasetMapper(cfg, is_train=False)(record)["image"], expected)
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = (0,), False
    assert torch.equal(build_tta_mapper(cfg, "")(record)["views"][0]["image"], expected)
    # Pixels outside the range are not skipped as unreadable.
    Image.fromarray(DEEP["ints.tif"]).save(tmp_path / "a.tif")
    cfg.DATALOADER.SKIP_UNREADABLE, cfg.INPUT.PIXEL_RANGE = True, []
    loader = build_detection_train_loader(cfg, dataset=[_record(tmp_path / "a.tif", 8, 8)])
    rejected("a.tif has int32 pixels", by=lambda: next(iter(loader)))
    for value in ([5], [1, 0], [0, float("nan")], ["0", "1"]):
        cfg.INPUT.PIXEL_RANGE = value
        rejected("PIXEL_RANGE must be [] or two numbers [low, high], got", by=lambda: DatasetMapper(cfg))
    # The other readers pass a range on, too.
    root = Path(__file__).resolve().parent.parent
    for path in [*(root / "plaintrain").rglob("*.py"), *(root / "scripts").glob("*.py")]:
        if "read_image(" in (text := path.read_text()) or "convert_to_rgb(" in text:
            calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
            readers = [n for n in calls if getattr(n.func, "id", "") in ("read_image", "convert_to_rgb")]
            assert all(len(n.args) > 1 for n in readers), path


def test_read_image_and_image_header_apply_the_exif_orientation(picture):
    for orientation in range(1, 9):
        _turn(picture, orientation)
        expected = np.array(ImageOps.exif_transpose(Image.open(picture)))
        np.testing.assert_array_equal(read_image(str(picture)).permute(1, 2, 0).numpy(), expected)
        assert read_image_header(str(picture))[:2] == expected.shape[:2]
    for exif in (mock.Mock(side_effect=struct.error("unpack")), lambda _: {ExifTags.Base.Orientation: "x"}):
        with mock.patch.object(Image.Image, "getexif", exif):
            rejected("cannot read the image file ", "picture.png", by=lambda: read_image_header(str(picture)))


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_read_image_names_files_that_are_truncated_missing_or_no_image(tmp_path, write_image, name):
    path = tmp_path / name
    rejected(f"{name} does not exist", by=lambda: read_image(str(path)))
    write_image(path, 64, 64)
    whole = path.read_bytes()
    cut = whole[: len(whole) // 10], whole[: -len(whole) // 10]
    for content in (b"", b"no image", b"\x89PNG\r\n\x1a\n", *cut):
        path.write_bytes(content)
        rejected("cannot read the image file ", name, by=lambda: read_image(str(path)))


def test_mapper_rejects_an_image_of_another_size_than_its_record(picture):
    mapper = DatasetMapper(augmentations=[])
    for record, says in ((_record(picture, 30, 41), "41x30"), (_record(picture, 40, 30), "30x40")):
        for either in (mapper, DatasetMapper(is_train=False, augmentations=[])):
            with pytest.raises(UserError, match=rf"picture\.png is 40x30, but its annotation says {says}$"):
                either(record)
    # A size that only the EXIF orientation turns is explained.
    _turn(picture, 6)
    rejected("is 30x40", "says 40x30", "EXIF", by=lambda: mapper(_record(picture, 30, 40)))
    assert mapper(_record(picture, 40, 30))["image"].shape == (3, 40, 30)


def test_training_sample_has_the_keys_and_types_of_the_contract(picture):
    one = _object(BOX, 2, segmentation=[SQUARE], keypoints=[5, 6, 2, 13.5, 12, 1, 0, 0, 0])
    other = _object([0, 0, 40, 30], segmentation=[[20, 10, 30, 10, 30, 20, 20, 20]])
    record = _record(picture, 30, 40, one, _object([0, 0, 20, 20], 1, iscrowd=1), other)
    before = copy.deepcopy(record)
    steps = [Resize((60, 80)), RandomHorizontalFlip(1.0, (0, 1, 2))]
    mapper = DatasetMapper(augmentations=steps, use_masks=True, num_keypoints=3)
    sample = mapper(record)
    assert record == before
    assert set(sample) == {"image", "target", "image_id", "file_name", "height", "width"}
    assert (sample["image_id"], sample["height"], sample["width"]) == (17, 30, 40)
    assert sample["file_name"] == str(picture)
    image, target = sample["image"], sample["target"]
    types = {"boxes": torch.float32, "labels": torch.int64, "masks": torch.uint8, "keypoints": torch.float32}
    assert {name: value.dtype for name, value in target.items()} == types
    assert {type(value) for value in (image, *target.values())} == {torch.Tensor}
    assert image.dtype == torch.uint8 and image.shape == (3, 60, 80)
    assert image.is_contiguous() and target["masks"].is_contiguous()
    # The crowd is skipped.
    assert target["labels"].tolist() == [2, 0]
    # An instance without any has them all unlabelled.
    assert target["keypoints"].tolist() == [[[70, 12, 2], [53, 24, 1], [0, 0, 0]], [[0, 0, 0]] * 3]
    # An empty target keeps its shapes and types.
    for annotations in ([], [_object([0, 0, 9, 9], iscrowd=1)]):
        empty = mapper(_record(picture, 30, 40, *annotations))["target"]
        shapes = {name: tuple(value.shape) for name, value in empty.items()}
        assert shapes == {"boxes": (0, 4), "labels": (0,), "masks": (0, 60, 80), "keypoints": (0, 3, 3)}
        assert {name: value.dtype for name, value in empty.items()} == types


def test_evaluation_sample_has_no_target_and_the_original_size(picture, cfg, monkeypatch):
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 15, 100
    record = _record(picture, 30, 40, _object(BOX, 2))
    sample = DatasetMapper(cfg, is_train=False)(record)
    assert set(sample) == {"image", "image_id", "file_name", "height", "width"}
    assert sample["image"].shape == (3, 15, 20)
    assert (sample["height"], sample["width"]) == (30, 40)
    cfg.INPUT.MIN_SIZE_TEST = 0
    assert torch.equal(DatasetMapper(cfg, is_train=False)(record)["image"], read_image(str(picture)))
    # Shapes are rendered instead of read.
    record = load_shapes("val", 1, 40, 60)[0][0]
    sample = DatasetMapper(augmentations=[])(record)
    np.testing.assert_array_equal(sample["image"].permute(1, 2, 0).numpy(), render(record["file_name"]))
    # Masks and keypoints are not decoded unless they are needed.
    record = _record(picture, 30, 40, _object(BOX, segmentation="nonsense", keypoints=[1]))
    monkeypatch.delattr(dataset_mapper.coco_mask, "decode")
    assert set(DatasetMapper(augmentations=[])(record)["target"]) == {"boxes", "labels"}
    both = DatasetMapper(is_train=False, augmentations=[], use_masks=True, num_keypoints=3)
    assert "target" not in both(record)


def test_boxes_are_clipped_and_instances_without_area_dropped(picture):
    boxes = [[5, 5, 0, 9], [-5, -6, 15, 16], [5, 5, 9, -2], [50, 5, 9, 9], [30, 20, 50, 50]]
    record = _record(picture, 30, 40, *(_object(box, label) for label, box in enumerate(boxes)))
    target = DatasetMapper(augmentations=[])(record)["target"]
    assert target["labels"].tolist() == [1, 4]
    assert target["boxes"].tolist() == [[0, 0, 10, 10], [30, 20, 40, 30]]
    objects = []
    for i, (x, y, side) in enumerate(((0, 0, 8), (30, 20, 10), (9.1, 9.1, 0.1))):
        polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
        objects.append(_object([x, y, 10, 10], i, segmentation=[polygon], keypoints=[x + 1, y + 1, 2]))
    record = _record(picture, 30, 40, *objects)
    target = DatasetMapper(augmentations=[], use_masks=True, num_keypoints=1)(record)["target"]
    # The third's polygon covers no pixel.
    assert target["labels"].tolist() == [0, 1]
    assert {len(value) for value in target.values()} == {2}


def test_augmentation_may_be_any_function_and_unlabels_keypoints_outside(picture):
    def move(tensors, rng):
        points = tv_tensors.wrap(tensors["keypoints"] + 30, like=tensors["keypoints"])
        return {**tensors, "image": tv_tensors.Image(tensors["image"] // 2), "keypoints": points}

    record = _record(picture, 30, 40, _object([0, 0, 9, 9], keypoints=[5, 0, 2, 5, 1, 2]))
    sample = DatasetMapper(augmentations=[move], num_keypoints=2)(record)
    assert torch.equal(sample["image"], read_image(str(picture)) // 2)
    assert type(sample["image"]) is torch.Tensor
    # A keypoint that it moves out of the image is unlabelled.
    assert sample["target"]["keypoints"].tolist() == [[[35, 30, 2], [0, 0, 0]]]
    keypoints = [-1, 6, 2, 40, 30, 1, 5, 30.5, 2, 7, 8, 0, 0, 0, 2]
    record = _record(picture, 30, 40, _object([0, 0, 40, 30], keypoints=keypoints))
    for steps in ([], [RandomZoomOut(p=1.0, side_range=(2, 2))]):
        keypoints = DatasetMapper(augmentations=steps, num_keypoints=5)(record, np.random.default_rng(0))
        keypoints = keypoints["target"]["keypoints"][0]
        assert keypoints[:, 2].tolist() == [0, 1, 0, 0, 2]
        assert (keypoints[keypoints[:, 2] == 0] == 0).all()
    assert keypoints[1, :2].tolist() == (keypoints[4, :2] + torch.tensor([40, 30])).tolist()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "has no segmentation"),
        ({"segmentation": []}, "has no segmentation"),
        ({"segmentation": [[1, 2, 3, 4]]}, "3 finite points or more"),
        ({"segmentation": {"size": [40, 30], "counts": [1200]}}, "[40, 30]"),
        ({"segmentation": {"size": [30, 40], "counts": "h"}}, "counts do not add up to 30 x 40"),
        ({"segmentation": [SQUARE], "keypoints": [1, 2, 2]}, "keypoints must have 3 x 2 numbers, got 3"),
    ],
)
def test_annotation_without_the_needed_keys_is_named(picture, more, words):
    record = _record(picture, 30, 40, _object(BOX, segmentation=[SQUARE]), _object(BOX, **more))
    mapper = DatasetMapper(augmentations=[], use_masks=True, num_keypoints=2)
    rejected("picture.png", words, by=lambda: mapper(record))


def _keypoint_dataset(cfg, name, names, **metadata):
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(thing_classes=["a"], keypoint_names=names, **metadata)
    cfg.MODEL.KEYPOINT_ON = True
    cfg.DATASETS.TRAIN = (*cfg.DATASETS.TRAIN, name)


def test_config_decides_the_targets_and_the_dataset_how_they_flip(picture, cfg):
    _keypoint_dataset(cfg, "points", ["nose", "left_ear", "right_ear"])
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.AUGMENTATIONS = [{"RandomHorizontalFlip": {"p": 1.0}}]
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (0,), "none"
    instance = _object(BOX, segmentation=[SQUARE], keypoints=[5, 6, 2, 8, 7, 1, 9, 9, 2])
    record = _record(picture, 30, 40, instance)
    target = DatasetMapper(cfg)(record)["target"]
    assert target["keypoints"].tolist() == [[[35, 6, 2], [31, 9, 2], [32, 7, 1]]]
    assert target["masks"].sum() == 80
    assert set(DatasetMapper(cfg, use_masks=False, num_keypoints=0)(record)["target"]) == {"boxes", "labels"}
    # What is used with the augmentations of evaluation has the same targets.
    assert set(DatasetMapper(cfg, augmentations=[])(record)["target"]) == set(target)

    # The loader may name them.
    def load():
        MetadataCatalog.get("late").set(keypoint_names=["left", "right"])
        return []

    DatasetCatalog.register("late", load)
    cfg.DATASETS.TRAIN, cfg.INPUT.RANDOM_FLIP = ("late",), "horizontal"
    assert DatasetMapper(cfg).augmentations[-1] == RandomHorizontalFlip(0.5, (1, 0))


def test_keypoints_that_are_unnamed_or_differ_are_rejected(cfg):
    cfg.MODEL.KEYPOINT_ON = True
    rejected("DATASETS.TRAIN names no dataset", by=lambda: DatasetMapper(cfg))
    _keypoint_dataset(cfg, "one", ["left", "right"])
    _keypoint_dataset(cfg, "two", ["left", "right"], keypoint_flip_map=[("left", "right")])
    assert DatasetMapper(cfg).num_keypoints == 2
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 17
    rejected("NUM_KEYPOINTS is 17, but one, two has 2", by=lambda: DatasetMapper(cfg))
    DatasetMapper(cfg, is_train=False)
    MetadataCatalog.get("two").set(keypoint_flip_map=[])
    rejected("one and two have different keypoints", by=lambda: DatasetMapper(cfg))
    cfg.DATASETS.TRAIN = ("one",)
    _keypoint_dataset(cfg, "three", ["right", "left"])
    rejected("one and three have different keypoints", by=lambda: DatasetMapper(cfg))
    cfg.DATASETS.TRAIN = ()
    _keypoint_dataset(cfg, "points", None)
    rejected("the dataset points names no keypoints", by=lambda: DatasetMapper(cfg))
    names, pair = ["nose", "left_eye", "right_eye"], ["left_eye", "right_eye"]
    words = "unknown keypoint 'right_ey'; the nearest is 'right_eye'"
    rejected(words, by=lambda: compute_hflip_indices(names, [("left_eye", "right_ey")]))
    for sides in ("l_eye r_eye", "eyeL eyeR", "LEye REye", "Left-eye right-Eye"):
        assert compute_hflip_indices(sides.split()) == (1, 0) and not find_unpaired_keypoints(sides.split())
    unpaired = ["lhip", "rhip", "left_ear", "upright", "links", "rechts"]
    assert find_unpaired_keypoints(unpaired) == unpaired[:3] and not find_unpaired_keypoints(unpaired, [])
    twice = [pair, ("nose", "left_eye")]
    rejected("'left_eye' in two pairs", by=lambda: compute_hflip_indices(names, twice))
