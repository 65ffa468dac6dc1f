"""plaintrain.data.mapper: from a record and its file to a sample."""

import ast
import copy
import itertools
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask
from torchvision import tv_tensors

from plaintrain.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_train_loader,
    mapper,
)
from plaintrain.data.crops import RandomCrop
from plaintrain.data.folder import image_header
from plaintrain.data.keypoints import keypoint_flip_indices
from plaintrain.data.mapper import read_image
from plaintrain.data.shapes import load_shapes, render
from plaintrain.data.transforms import RandomHorizontalFlip, RandomVerticalFlip, RandomZoomOut, Resize
from plaintrain.data.tta import build_tta_mapper
from plaintrain.structures import BoxMode
from plaintrain.utils.errors import UserError

RED = [255, 0, 0]


def _record(path, height, width, *annotations):
    """annotations: (box, label) or (box, label, iscrowd), boxes x, y, w, h."""
    keys = ("bbox", "category_id", "iscrowd")
    annotations = [dict(zip(keys, (*a, 0)[:3], strict=True), bbox_mode=BoxMode.XYWH_ABS) for a in annotations]
    record = {"file_name": str(path), "image_id": 17, "height": height, "width": width}
    return {**record, "annotations": annotations}


@pytest.fixture
def picture(tmp_path, write_image):
    """Path of a 40x30 image of random pixels."""
    write_image(tmp_path / "picture.png", 40, 30)
    return tmp_path / "picture.png"


# ---- reading


def _grey(value):
    return Image.new("L", (4, 3), value), [value] * 3


def _palette():
    image = Image.new("P", (4, 3), 1)
    image.putpalette([0, 0, 0, *RED])
    return image, RED


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("grey.png", *_grey(100)),
        ("palette.png", *_palette()),
        ("palette.gif", *_palette()),
        ("cmyk.tif", Image.new("CMYK", (4, 3), (0, 255, 255, 0)), RED),
        ("rgba.png", Image.new("RGBA", (4, 3), (255, 0, 0, 255)), RED),
        ("grey_alpha.png", Image.new("LA", (4, 3), (100, 255)), [100] * 3),
        ("bits.png", Image.new("1", (4, 3), 1), [255] * 3),
    ],
)
def test_any_kind_of_image_becomes_rgb(tmp_path, name, image, expected):
    image.save(tmp_path / name)
    tensor = read_image(str(tmp_path / name))
    assert tensor.shape == (3, 3, 4)
    assert tensor.dtype == torch.uint8
    assert (tensor == torch.tensor(expected, dtype=torch.uint8).reshape(3, 1, 1)).all()


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_a_16_bit_image_keeps_its_upper_bits(tmp_path, name):
    values = np.array([[0, 255, 256, 25700], [32768, 51400, 65279, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    expected = torch.tensor([[0, 0, 1, 100], [128, 200, 254, 255]], dtype=torch.uint8)
    assert torch.equal(read_image(str(tmp_path / name)), expected.expand(3, 2, 4))


# What an image of each type holds, and the ranges that its dataset may declare.
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
        ("bits16.png", (0, 65535), STEPS * 1040 // 256),
        ("floats.tif", (), STEPS * 256 // 63),
        ("floats.tif", (-1, 2), (63 + STEPS) * 256 // 189),
        ("ints.tif", (-20_000, 43_000), STEPS * 256 // 63),
    ],
)
def test_pixels_of_more_than_8_bits_are_scaled_by_type_or_declared_range(
    tmp_path, name, pixel_range, expected
):
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
def test_pixels_that_do_not_fit_are_rejected_with_file_type_and_values(
    tmp_path, name, values, pixel_range, words
):
    Image.fromarray(values).save(tmp_path / name)
    with pytest.raises(UserError) as error:
        read_image(str(tmp_path / name), pixel_range)
    assert words in str(error.value) and name in str(error.value)
    # A worker hands it over.
    assert pickle.loads(pickle.dumps(error.value)).kind == "pixel_range"  # noqa: S301


def _tiff(bits, sample_format, pixels):
    """An 8x8 TIFF, of a type that Pillow reads and does not write."""
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: len(pixels)}
    tags[339] = sample_format
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (
        struct.pack("<4sI", b"II*\0", 8 + len(pixels)) + pixels + struct.pack("<H", 10) + entries + bytes(4)
    )


@pytest.mark.parametrize(
    ("bits", "sample_format", "values", "pixel_range"),
    [
        (16, 2, STEPS.astype("<i2") - 30, (-30, 33)),
        (8, 2, STEPS.astype("i1") - 30, (-30, 33)),
        (32, 1, STEPS.astype("<u4") + 3 * 10**9, (3e9, 3e9 + 63)),
    ],
)
def test_numbers_with_a_sign_or_of_32_bits_do_not_wrap_around(
    tmp_path, bits, sample_format, values, pixel_range
):
    (tmp_path / "a.tif").write_bytes(_tiff(bits, sample_format, values.tobytes()))
    np.testing.assert_array_equal(
        read_image(str(tmp_path / "a.tif"), pixel_range)[0], STEPS * 256 // 63 - STEPS // 63
    )
    with pytest.raises(UserError, match=f"int{bits} pixels from .* a type without a default range"):
        read_image(str(tmp_path / "a.tif"))


def test_the_range_of_the_config_counts_wherever_images_are_read(tmp_path, cfg):
    Image.fromarray(DEEP["bits12.png"]).save(tmp_path / "a.png")
    record = _record(tmp_path / "a.png", 8, 8)
    cfg.INPUT.PIXEL_RANGE, cfg.INPUT.MIN_SIZE_TEST = [0, 4095], 0
    expected = torch.from_numpy(STEPS * 65 // 16).to(torch.uint8).expand(3, -1, -1)
    assert torch.equal(DatasetMapper(cfg, augmentations=[])(record)["image"], expected)
    assert torch.equal(DatasetMapper(cfg, is_train=False)(record)["image"], expected)
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = (0,), False
    assert torch.equal(build_tta_mapper(cfg, "")(record)["views"][0]["image"], expected)
    for value in ([5], [1, 0], [0, float("nan")], ["0", "1"]):
        cfg.INPUT.PIXEL_RANGE = value
        with pytest.raises(
            UserError, match=r"INPUT\.PIXEL_RANGE must be \[\] or two numbers \[low, high\], got"
        ):
            DatasetMapper(cfg)
    # The readers that have no test of their own here pass a range on, too.
    root = Path(__file__).resolve().parent.parent
    for path in [*(root / "plaintrain").rglob("*.py"), *(root / "scripts").glob("*.py")]:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        readers = [n for n in calls if getattr(n.func, "id", "") in ("read_image", "to_rgb", "to_tensor")]
        assert all(len(n.args) > 1 for n in readers), path


def test_skipping_unreadable_images_skips_none_that_does_not_fit(tmp_path, cfg):
    for i, values in enumerate((STEPS.astype(np.uint8), DEEP["ints.tif"])):
        Image.fromarray(values).save(tmp_path / f"{i}.tif")
    records = [_record(tmp_path / f"{i}.tif", 8, 8) for i in range(2)]
    cfg.DATALOADER.SKIP_UNREADABLE = True
    with pytest.raises(UserError, match=r"1\.tif has int32 pixels"):
        list(itertools.islice(build_detection_train_loader(cfg, dataset=records), 2))


def test_an_rgb_image_is_read_as_it_is(picture):
    tensor = read_image(str(picture))
    np.testing.assert_array_equal(tensor.permute(1, 2, 0).numpy(), np.array(Image.open(picture)))


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: np.swapaxes(a, 0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.swapaxes(np.rot90(a, 2), 0, 1)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_the_exif_orientation_is_applied(picture, orientation, turned):
    pixels = np.array(Image.open(picture))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(picture, exif=exif)
    np.testing.assert_array_equal(read_image(str(picture)).permute(1, 2, 0).numpy(), turned(pixels))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.png does not exist"):
        read_image(str(tmp_path / "none.png"))


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg"])
def test_a_truncated_file_is_named(tmp_path, write_image, name):
    write_image(tmp_path / name, 64, 64)
    whole = (tmp_path / name).read_bytes()
    for share in (0.1, 0.5, 0.9):
        (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match=f"cannot read the image file .*{name}"):
            read_image(str(tmp_path / name))


@pytest.mark.parametrize(
    "content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + b"\0" * 40]
)
def test_what_is_no_image_is_named(tmp_path, content):
    (tmp_path / "text.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the image file .*text\.jpg"):
        read_image(str(tmp_path / "text.jpg"))


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(UserError, match="cannot read the image file"):
        read_image(str(tmp_path))


# ---- size


def _size_error(record):
    with pytest.raises(UserError) as error:
        DatasetMapper(augmentations=[])(record)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("value", ["x", (1, 2), struct.error("unpack")])
def test_broken_exif_data_is_named(tmp_path, write_image, monkeypatch, value):
    def getexif(image):
        if isinstance(value, Exception):
            raise value
        return {ExifTags.Base.Orientation: value}

    write_image(tmp_path / "a.png", 8, 6)
    monkeypatch.setattr(Image.Image, "getexif", getexif)
    with pytest.raises(UserError, match=r"cannot read the image file .*a\.png"):
        image_header(str(tmp_path / "a.png"))


def test_an_image_of_another_size_than_its_record_is_refused_with_both_sizes(picture):
    for is_train in (True, False):
        with pytest.raises(UserError, match=r"picture\.png is 40x30, but its annotation says 41x30$"):
            DatasetMapper(is_train=is_train, augmentations=[])(_record(picture, 30, 41))


def test_a_size_that_only_the_exif_orientation_turns_is_explained(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(picture).save(picture, exif=exif)
    message = _size_error(_record(picture, 30, 40))
    assert "is 30x40" in message
    assert "says 40x30" in message
    assert "EXIF" in message
    assert DatasetMapper(augmentations=[])(_record(picture, 40, 30))["image"].shape == (3, 40, 30)


def test_exif_is_not_blamed_where_there_is_none(picture):
    message = _size_error(_record(picture, 40, 30))
    assert "is 40x30" in message
    assert "says 30x40" in message
    assert "its EXIF orientation turns it" not in message


# ---- samples


def test_a_training_sample_has_the_contracts_keys_and_types(picture):
    sample = DatasetMapper(augmentations=[])(
        _record(picture, 30, 40, ([4, 5, 10, 8], 2), ([0, 0, 40, 30], 0))
    )
    assert set(sample) == {"image", "target", "image_id", "file_name", "height", "width"}
    assert set(sample["target"]) == {"boxes", "labels"}
    image, boxes, labels = sample["image"], sample["target"]["boxes"], sample["target"]["labels"]
    assert [type(t) for t in (image, boxes, labels)] == [torch.Tensor] * 3
    assert (image.dtype, boxes.dtype, labels.dtype) == (torch.uint8, torch.float32, torch.int64)
    assert image.is_contiguous()
    assert torch.equal(image, read_image(str(picture)))
    assert boxes.tolist() == [[4, 5, 14, 13], [0, 0, 40, 30]]
    assert labels.tolist() == [2, 0]
    assert (sample["image_id"], sample["height"], sample["width"]) == (17, 30, 40)
    assert sample["file_name"] == str(picture)


def test_an_evaluation_sample_has_no_target_and_the_original_size(picture, cfg):
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 15, 100
    record = _record(picture, 30, 40, ([4, 5, 10, 8], 2))
    sample = DatasetMapper(cfg, is_train=False)(record)
    assert set(sample) == {"image", "image_id", "file_name", "height", "width"}
    assert sample["image"].shape == (3, 15, 20)
    assert (sample["height"], sample["width"]) == (30, 40)
    cfg.INPUT.MIN_SIZE_TEST = 0
    assert torch.equal(DatasetMapper(cfg, is_train=False)(record)["image"], read_image(str(picture)))


def test_boxes_follow_the_augmentations(picture):
    record = _record(picture, 30, 40, ([4, 5, 10, 8], 2))
    steps = [Resize((60, 80)), RandomHorizontalFlip(1.0)]
    sample = DatasetMapper(augmentations=steps)(record)
    assert sample["image"].shape == (3, 60, 80)
    assert sample["target"]["boxes"].tolist() == [[52, 10, 72, 26]]
    assert (sample["height"], sample["width"]) == (30, 40)


def test_crowds_are_left_out(picture):
    record = _record(picture, 30, 40, ([0, 0, 20, 20], 1, 1), ([4, 5, 10, 8], 2), ([5, 5, 9, 9], 0, 1))
    target = DatasetMapper(augmentations=[])(record)["target"]
    assert target["labels"].tolist() == [2]
    assert target["boxes"].tolist() == [[4, 5, 14, 13]]


def test_boxes_are_clipped_and_those_without_area_dropped_with_their_labels(picture):
    boxes = [[5, 5, 0, 9], [-5, -6, 15, 16], [5, 5, 9, -2], [50, 5, 9, 9], [30, 20, 50, 50]]
    record = _record(picture, 30, 40, *((box, label) for label, box in enumerate(boxes)))
    target = DatasetMapper(augmentations=[])(record)["target"]
    assert target["labels"].tolist() == [1, 4]
    assert target["boxes"].tolist() == [[0, 0, 10, 10], [30, 20, 40, 30]]


@pytest.mark.parametrize("annotations", [[], [([0, 0, 9, 9], 0, 1)], [([0, 0, 0, 0], 0)]])
def test_an_empty_target_keeps_its_shapes_and_types(picture, annotations, cfg):
    target = DatasetMapper(cfg)(_record(picture, 30, 40, *annotations), np.random.default_rng(0))["target"]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert (target["boxes"].dtype, target["labels"].dtype) == (torch.float32, torch.int64)


def test_boxes_that_a_crop_cuts_away_are_dropped_with_their_labels(picture):
    record = _record(picture, 30, 40, ([0, 0, 8, 8], 0), ([16, 11, 8, 8], 1), ([32, 22, 8, 8], 2))
    mapper = DatasetMapper(augmentations=[RandomCrop("absolute", (20, 30))])
    seen = set()
    for seed in range(30):
        target = mapper(record, np.random.default_rng(seed))["target"]
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
        assert len(target["boxes"]) == len(target["labels"])
        # The middle box is whole in every window; the outer ones can be recognised by their place.
        middle = target["boxes"][target["labels"] == 1][0]
        assert (middle[2:] - middle[:2]).tolist() == [8, 8]
        for box, label in zip(target["boxes"], target["labels"], strict=True):
            assert (box[0] - middle[0]).sign().item() == label.item() - 1
        seen.add(tuple(target["labels"].tolist()))
    assert {(0, 1), (1, 2)} <= seen


def test_the_generator_decides_and_the_record_stays_as_it_was(picture, cfg):
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.SIZE = [0.3, 0.3]
    record = _record(picture, 30, 40, ([4, 5, 20, 18], 2))
    before, mapper = copy.deepcopy(record), DatasetMapper(cfg)
    images = []
    for seed in range(5):
        one, other = (mapper(record, np.random.default_rng(seed)) for _ in range(2))
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["target"]["boxes"], other["target"]["boxes"])
        images.append(one["image"].numpy().tobytes())
    assert len(set(images)) > 1
    assert record == before


def test_own_augmentations_take_the_place_of_the_configs(picture):
    def darken(tensors, rng):
        return {**tensors, "image": tv_tensors.Image(tensors["image"] // 2)}

    sample = DatasetMapper(augmentations=[darken])(_record(picture, 30, 40))
    assert torch.equal(sample["image"], read_image(str(picture)) // 2)
    assert type(sample["image"]) is torch.Tensor


def test_shapes_are_drawn_instead_of_read():
    record = load_shapes("val", 1, 40, 60)[0][0]
    sample = DatasetMapper(augmentations=[])(record)
    np.testing.assert_array_equal(sample["image"].permute(1, 2, 0).numpy(), render(record["file_name"]))
    np.testing.assert_allclose(
        sample["target"]["boxes"], [a["bbox"] for a in record["annotations"]], rtol=1e-5
    )


# ---- masks and keypoints


SQUARE = [4, 5, 14, 5, 14, 13, 4, 13]


def _annotated(record, index, **more):
    record["annotations"][index].update(more)
    return record


def _rle(*rectangles, height=30, width=40):
    """(uncompressed, compressed, compressed as JSON holds it) of a union of x0, y0, x1, y1."""
    mask = np.zeros((height, width), dtype=np.uint8, order="F")
    for x0, y0, x1, y1 in rectangles:
        mask[y0:y1, x0:x1] = 1
    flat = np.concatenate([[0], mask.flatten(order="F"), [0]])
    counts = np.diff([0, *np.flatnonzero(np.diff(flat)), mask.size]).tolist()
    compressed = coco_mask.encode(mask)
    size = [height, width]
    text = {"size": size, "counts": compressed["counts"].decode()}
    return torch.from_numpy(mask), [{"size": size, "counts": counts}, compressed, text]


def test_a_target_with_masks_and_keypoints_has_the_contracts_keys_and_types(picture):
    record = _record(picture, 30, 40, ([4, 5, 10, 8], 2), ([0, 0, 9, 9], 1, 1), ([20, 10, 10, 10], 0))
    _annotated(record, 0, segmentation=[SQUARE], keypoints=[5, 6, 2, 13.5, 12, 1, 0, 0, 0])
    _annotated(record, 2, segmentation=[[20, 10, 30, 10, 30, 20, 20, 20]])
    target = DatasetMapper(augmentations=[], use_masks=True, num_keypoints=3)(record)["target"]
    assert set(target) == {"boxes", "labels", "masks", "keypoints"}
    assert all(type(value) is torch.Tensor for value in target.values())
    assert (target["masks"].dtype, target["masks"].shape) == (torch.uint8, (2, 30, 40))
    assert target["masks"].is_contiguous()
    assert (target["keypoints"].dtype, target["keypoints"].shape) == (torch.float32, (2, 3, 3))
    expected, _ = _rle((4, 5, 14, 13))
    assert torch.equal(target["masks"][0], expected)
    assert target["masks"][1].sum() == 100
    assert target["labels"].tolist() == [2, 0]
    # Points keep their place; an instance without any has them all unlabelled.
    assert target["keypoints"].tolist() == [[[5, 6, 2], [13.5, 12, 1], [0, 0, 0]], [[0, 0, 0]] * 3]


def test_without_masks_and_keypoints_they_are_not_looked_at(picture, monkeypatch):
    record = _record(picture, 30, 40, ([4, 5, 10, 8], 2))
    _annotated(record, 0, segmentation="nonsense", keypoints=[1])
    monkeypatch.delattr(mapper.coco_mask, "decode")
    assert set(DatasetMapper(augmentations=[])(record)["target"]) == {"boxes", "labels"}
    both = DatasetMapper(is_train=False, augmentations=[], use_masks=True, num_keypoints=3)
    assert "target" not in both(record)


def test_polygons_of_several_parts_are_one_mask(picture):
    record = _record(picture, 30, 40, ([4, 5, 20, 8], 2))
    _annotated(record, 0, segmentation=[SQUARE, [18, 5, 24, 5, 24, 13, 18, 13]])
    masks = DatasetMapper(augmentations=[], use_masks=True)(record)["target"]["masks"]
    assert torch.equal(masks[0], _rle((4, 5, 14, 13), (18, 5, 24, 13))[0])


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_every_kind_of_rle_is_read_with_holes_and_parts(picture, kind):
    mask, kinds = _rle((4, 5, 14, 7), (4, 11, 14, 13), (4, 5, 6, 13), (12, 5, 14, 13), (30, 0, 40, 30))
    record = _record(picture, 30, 40, ([4, 0, 36, 30], 2), ([4, 5, 10, 8], 1))
    _annotated(record, 0, segmentation=kinds[kind])
    _annotated(record, 1, segmentation=[SQUARE])
    masks = DatasetMapper(augmentations=[], use_masks=True)(record)["target"]["masks"]
    assert torch.equal(masks[0], mask)
    assert mask[9, 9] == 0
    assert masks[1, 9, 9] == 1


def test_masks_and_keypoints_follow_the_augmentations(picture):
    record = _record(picture, 30, 40, ([4, 5, 10, 8], 2))
    _annotated(record, 0, segmentation=[SQUARE], keypoints=[5, 6, 2, 13, 12, 1])
    steps = [Resize((60, 80)), RandomHorizontalFlip(1.0, (1, 0)), RandomVerticalFlip(1.0)]
    target = DatasetMapper(augmentations=steps, use_masks=True, num_keypoints=2)(record)["target"]
    assert target["boxes"].tolist() == [[52, 34, 72, 50]]
    assert torch.equal(target["masks"][0], _rle((52, 34, 72, 50), height=60, width=80)[0])
    assert target["keypoints"].tolist() == [[[54, 36, 1], [70, 48, 2]]]


def test_keypoints_outside_the_image_are_unlabelled_for_good(picture):
    record = _record(picture, 30, 40, ([0, 0, 40, 30], 2))
    _annotated(record, 0, keypoints=[-1, 6, 2, 40, 30, 1, 5, 30.5, 2, 7, 8, 0, 0, 0, 2])
    for steps in ([], [RandomZoomOut(p=1.0, side_range=(2, 2))]):
        keypoints = DatasetMapper(augmentations=steps, num_keypoints=5)(record, np.random.default_rng(0))
        keypoints = keypoints["target"]["keypoints"][0]
        assert keypoints[:, 2].tolist() == [0, 1, 0, 0, 2]
        assert (keypoints[keypoints[:, 2] == 0] == 0).all()
    assert keypoints[1, :2].tolist() == (keypoints[4, :2] + torch.tensor([40, 30])).tolist()


def test_an_augmentation_of_ones_own_that_moves_keypoints_out_makes_them_unlabelled(picture):
    def move(tensors, rng):
        points = tv_tensors.wrap(tensors["keypoints"] + 30, like=tensors["keypoints"])
        return {**tensors, "keypoints": points}

    record = _annotated(_record(picture, 30, 40, ([0, 0, 9, 9], 2)), 0, keypoints=[5, 0, 2, 5, 1, 2])
    keypoints = DatasetMapper(augmentations=[move], num_keypoints=2)(record)["target"]["keypoints"]
    assert keypoints.tolist() == [[[35, 30, 2], [0, 0, 0]]]


def test_an_instance_vanishes_with_its_mask_and_keypoints(picture):
    record = _record(picture, 30, 40, ([0, 0, 8, 8], 0), ([30, 20, 10, 10], 1), ([9, 9, 3, 3], 2))
    for i, (x, y, w, h) in enumerate(([0, 0, 8, 8], [30, 20, 10, 10], [9.1, 9.1, 0.1, 0.1])):
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        _annotated(record, i, segmentation=[polygon], keypoints=[x + 1, y + 1, 2])
    whole = DatasetMapper(augmentations=[], use_masks=True, num_keypoints=1)(record)["target"]
    # The third's polygon covers no pixel.
    assert whole["labels"].tolist() == [0, 1]
    crop = RandomCrop("absolute", (12, 12))
    seen = set()
    for seed in range(40):
        cut = DatasetMapper(augmentations=[crop], use_masks=True, num_keypoints=1)
        target = cut(record, np.random.default_rng(seed))["target"]
        assert len({len(value) for value in target.values()}) == 1
        assert target["masks"].flatten(1).any(dim=1).all()
        seen.add(tuple(target["labels"].tolist()))
    assert {(), (0,), (1,)} <= seen


@pytest.mark.parametrize("annotations", [[], [([0, 0, 9, 9], 0, 1)]])
def test_an_empty_target_has_empty_masks_and_keypoints(picture, annotations):
    steps = [Resize((20, 25)), RandomHorizontalFlip(1.0, (0, 1, 2, 3))]
    record = _record(picture, 30, 40, *annotations)
    target = DatasetMapper(augmentations=steps, use_masks=True, num_keypoints=4)(record)["target"]
    shapes = {name: tuple(value.shape) for name, value in target.items()}
    assert shapes == {"boxes": (0, 4), "labels": (0,), "masks": (0, 20, 25), "keypoints": (0, 4, 3)}
    assert (target["masks"].dtype, target["keypoints"].dtype) == (torch.uint8, torch.float32)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "has no segmentation"),
        ({"segmentation": []}, "has no segmentation"),
        ({"segmentation": [[1, 2, 3, 4]]}, "3 finite points or more"),
        ({"segmentation": {"size": [40, 30], "counts": [1200]}}, r"\[40, 30\]"),
        ({"segmentation": {"size": [30, 40], "counts": "h"}}, "counts do not add up to 30 x 40"),
        ({"segmentation": [SQUARE], "keypoints": [1, 2, 2]}, "3 numbers of keypoints, but 2 keypoints"),
    ],
)
def test_an_annotation_without_what_is_needed_is_named(picture, more, words):
    record = _record(picture, 30, 40, ([4, 5, 10, 8], 2), ([4, 5, 10, 8], 2))
    _annotated(record, 0, segmentation=[SQUARE])
    _annotated(record, 1, **more)
    with pytest.raises(UserError, match=words) as error:
        DatasetMapper(augmentations=[], use_masks=True, num_keypoints=2)(record)
    assert "picture.png" in str(error.value)
    assert "\n" not in str(error.value)


# ---- from the config


def _keypoint_dataset(cfg, name, names, **metadata):
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(thing_classes=["a"], keypoint_names=names, **metadata)
    cfg.MODEL.KEYPOINT_ON = True
    cfg.DATASETS.TRAIN = (*cfg.DATASETS.TRAIN, name)


def test_the_config_says_what_targets_hold_and_the_dataset_how_they_flip(picture, cfg):
    _keypoint_dataset(cfg, "points", ["nose", "left_ear", "right_ear"])
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.AUGMENTATIONS = [{"RandomHorizontalFlip": {"p": 1.0}}]
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (0,), "none"
    record = _record(picture, 30, 40, ([4, 5, 10, 8], 2))
    _annotated(record, 0, segmentation=[SQUARE], keypoints=[5, 6, 2, 8, 7, 1, 9, 9, 2])
    target = DatasetMapper(cfg)(record)["target"]
    assert target["keypoints"].tolist() == [[[35, 6, 2], [31, 9, 2], [32, 7, 1]]]
    assert target["masks"].sum() == 80
    assert set(DatasetMapper(cfg, use_masks=False, num_keypoints=0)(record)["target"]) == {"boxes", "labels"}
    # What is used with the augmentations of evaluation has the same targets.
    assert set(DatasetMapper(cfg, augmentations=[])(record)["target"]) == set(target)


def test_keypoints_of_the_metadata_may_come_from_the_files(picture, cfg):
    def load():
        MetadataCatalog.get("points").set(keypoint_names=["left", "right"])
        return []

    DatasetCatalog.register("points", load)
    cfg.MODEL.KEYPOINT_ON, cfg.DATASETS.TRAIN = True, ("points",)
    assert DatasetMapper(cfg).augmentations[-1] == RandomHorizontalFlip(0.5, (1, 0))


def test_datasets_must_agree_on_their_keypoints(cfg):
    _keypoint_dataset(cfg, "one", ["left", "right"])
    _keypoint_dataset(cfg, "two", ["left", "right"], keypoint_flip_map=[("left", "right")])
    assert DatasetMapper(cfg).num_keypoints == 2
    _keypoint_dataset(cfg, "three", ["right", "left"])
    with pytest.raises(UserError, match="one and three have different keypoints"):
        DatasetMapper(cfg)
    cfg.DATASETS.TRAIN = ("one", "two")
    MetadataCatalog.get("two").set(keypoint_flip_map=[])
    with pytest.raises(UserError, match="one and two have different keypoints"):
        DatasetMapper(cfg)


def test_a_number_of_keypoints_that_contradicts_the_dataset_is_refused(cfg):
    _keypoint_dataset(cfg, "points", ["left", "right"])
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 17
    with pytest.raises(UserError, match="NUM_KEYPOINTS is 17, but points has 2"):
        DatasetMapper(cfg)
    DatasetMapper(cfg, is_train=False)
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 2
    assert DatasetMapper(cfg).num_keypoints == 2


def test_keypoints_that_nobody_names_are_refused(cfg):
    cfg.MODEL.KEYPOINT_ON = True
    with pytest.raises(UserError, match=r"DATASETS\.TRAIN names no dataset"):
        DatasetMapper(cfg)
    _keypoint_dataset(cfg, "points", None)
    with pytest.raises(UserError, match="the dataset points names no keypoints"):
        DatasetMapper(cfg)


@pytest.mark.parametrize(
    ("names", "flip_map", "expected"),
    [
        (["nose", "left_eye", "right_eye"], [("left_eye", "right_eye")], (0, 2, 1)),
        (["nose", "left_eye", "right_eye"], [["right_eye", "left_eye"]], (0, 2, 1)),
        (["nose", "left_eye", "right_eye"], None, (0, 2, 1)),
        (["nose", "left_eye", "right_eye"], [], (0, 1, 2)),
        (["top", "right", "bottom", "left"], None, (0, 3, 2, 1)),
        (["Right hand", "Left hand", "left", "tail"], None, (1, 0, 2, 3)),
        (["LEFT_EYE", "RIGHT_EYE"], None, (1, 0)),
        ([], None, ()),
    ],
)
def test_flip_indices_exchange_pairs(names, flip_map, expected):
    order = keypoint_flip_indices(names, flip_map)
    assert order == expected
    assert [order[i] for i in order] == list(range(len(names)))


@pytest.mark.parametrize(
    ("flip_map", "words"),
    [
        ([("left_eye", "right_ey")], "unknown keypoint 'right_ey'; the nearest is 'right_eye'"),
        ([("left_eye", "right_eye"), ("nose", "left_eye")], "'left_eye' in two pairs"),
    ],
)
def test_bad_pairs_are_named(flip_map, words):
    with pytest.raises(UserError, match=words):
        keypoint_flip_indices(["nose", "left_eye", "right_eye"], flip_map)


def test_real_masks_fill_their_boxes(data_root, cfg):
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (200,), 400
    cfg.MODEL.MASK_ON = True
    mapper = DatasetMapper(cfg)
    for position, record in enumerate(DatasetCatalog.get("coco_2017_val")[:6]):
        target = mapper(record, np.random.default_rng(position))["target"]
        assert len(target["boxes"]) == len(target["masks"]) > 0
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            y, x = torch.nonzero(mask, as_tuple=True)
            tight = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1])
            assert (tight - box).abs().max() <= 4


def test_real_coco_images_become_samples(data_root, cfg):
    mapper = DatasetMapper(cfg)
    for position, record in enumerate(DatasetCatalog.get("coco_2017_val")[:6]):
        sample = mapper(record, np.random.default_rng(position))
        height, width = sample["image"].shape[1:]
        assert min(height, width) <= 40
        assert len(sample["target"]["boxes"]) == sum(not a["iscrowd"] for a in record["annotations"])
        assert (sample["target"]["boxes"][:, 2:] <= torch.tensor([width, height])).all()
