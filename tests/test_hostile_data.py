"""Datasets and images made to fill the memory or to lead elsewhere, and broken ones: one clear error each."""

import json
import struct
import zlib

import numpy as np
import pytest
from hostile_helpers import refused
from PIL import Image

from plaintrain.config import get_cfg
from plaintrain.data import DatasetMapper
from plaintrain.data.builtin import declare_dataset, read_dataset
from plaintrain.data.coco import load_coco_json, load_coco_results
from plaintrain.data.folder import image_header, load_images
from plaintrain.data.images import read_image
from plaintrain.data.records import get_detection_dataset_dicts
from plaintrain.data.voc import load_voc
from plaintrain.data.yolo import load_yolo
from plaintrain.evaluation.predictions import read_predictions
from plaintrain.structures import segmentation_mistake

# ---- COCO


def _coco(files):
    return lambda: load_coco_json(str(files.json), str(files.images))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 1_000_000,
        '{"images":' * 100_000,
        '{"images": [' + "9" * 100_000 + "]}",
        "\ufeff[]",
        '{"images": "abc", "annotations": [], "categories": []}',
        '{"images": {}, "annotations": {}, "categories": {}}',
        '{"images": [[1]], "annotations": [], "categories": []}',
        "NaN",
        '"\\ud800"',
        "",
        "\0",
        "{'images': []}",
    ],
)
def test_json_that_is_no_coco_is_refused(tiny_coco, text):
    tiny_coco.json.write_text(text)
    refused(tiny_coco.json, by=_coco(tiny_coco))
    refused(tiny_coco.json, by=lambda: load_coco_results(str(tiny_coco.json), "", str(tiny_coco.json)))


def test_json_in_another_encoding_is_refused_and_a_byte_order_mark_is_not(tiny_coco):
    text = tiny_coco.json.read_text()
    tiny_coco.json.write_text(text, encoding="utf-16")
    refused(tiny_coco.json, by=_coco(tiny_coco))
    tiny_coco.json.write_bytes(text.encode("utf-8-sig"))
    assert len(_coco(tiny_coco)()[0]) == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("bbox", [float("nan")] * 4), ("bbox", [0, 0, float("inf"), 1]), ("bbox", [1e308, 0, 1e308, 1])),
        *(("bbox", [10**400, 0, 1, 1]), ("bbox", "1234"), ("bbox", {"a": 1}), ("bbox", [[1], 2, 3, 4])),
        *(("area", float("nan")), ("area", 10**400), ("area", "1"), ("area", [1])),
        *(("category_id", [7]), ("category_id", 10**400), ("category_id", True), ("image_id", {"a": 1})),
        *(("iscrowd", [0]), ("iscrowd", 2), ("keypoints", [float("nan"), 1, 2]), ("keypoints", "abc")),
    ],
)
def test_numbers_that_are_none_are_refused_in_an_annotation(tiny_coco, key, value):
    tiny_coco.content["annotations"][0][key] = value
    tiny_coco.save()
    refused(tiny_coco.json, "annotation 100", by=_coco(tiny_coco))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("width", 10**12), ("height", 10**400), ("width", 60_000), ("width", 40.0), ("width", "40")),
        *(("width", -1), ("width", True), ("width", None), ("id", [1]), ("id", 2), ("id", 1.5)),
        *(("file_name", "../a.png"), ("file_name", "more/../../a.png"), ("file_name", "/etc/passwd")),
        *(("file_name", ["a"]), ("file_name", "x/" * 50_000 + "../" * 50_001)),
    ],
)
def test_absurd_sizes_names_and_ids_are_refused_in_an_image(tiny_coco, key, value):
    tiny_coco.content["images"][0].update({"height": 60_000} if value == 60_000 else {}, **{key: value})
    tiny_coco.save()
    refused(tiny_coco.json, by=_coco(tiny_coco))


def test_an_image_name_may_be_absolute_or_wander_below_the_images_folder(tiny_coco):
    for image, name in zip(
        tiny_coco.content["images"], (f"{tiny_coco.images}/wide.png", "more/../wide.png"), strict=False
    ):
        image["file_name"] = name
    tiny_coco.save()
    assert len(_coco(tiny_coco)()[0]) == 3
    records, _ = load_coco_json(str(tiny_coco.json), "/")
    assert records[2]["file_name"] == str(tiny_coco.images / "wide.png")


@pytest.mark.parametrize("depth", [100, 500, 900, 940, 960, 970, 980, 990])
def test_deep_nesting_in_an_annotation_is_refused_at_any_depth(tiny_coco, depth):
    text = tiny_coco.json.read_text().replace("[[20, 10,", "[" * depth + "20" + "]" * depth + ", [[20, 10,")
    tiny_coco.json.write_text(text)
    declare_dataset(
        "deep", {"FORMAT": "coco", "JSON": str(tiny_coco.json), "IMAGE_ROOT": str(tiny_coco.images)}
    )
    refused("deep" if depth > 600 else "", by=lambda: get_detection_dataset_dicts("deep", need_masks=True))


def test_a_segmentation_that_would_fill_the_memory_is_refused():
    for segmentation in (
        [[0, 0, 2e9, 0, 2e9, 2e9]],
        [[0, 0, 1e300, 0, -1e300, 5]],
        {"size": [10**6, 10**6], "counts": [10**12]},
        {"size": [30, 40], "counts": "0" * 20 + "o" * 40 + "0"},
        {"size": [30, 40], "counts": "\ud800"},
        {"size": [30, 40], "counts": "PPPPPPPPPPPPPPPPPPPPPPPPPPP0" * 8},
        {"size": [30, 40], "counts": ""},
        {"size": [30, 40], "counts": [2**64, -(2**64) + 1200]},
    ):
        assert segmentation_mistake(segmentation, 30, 40)
    assert segmentation_mistake([[-30, 0, 90, 0, 5, 60]], 30, 40) is None


def test_broken_predictions_are_refused(tiny_coco, tmp_path):
    declare_dataset(
        "pets", {"FORMAT": "coco", "JSON": str(tiny_coco.json), "IMAGE_ROOT": str(tiny_coco.images)}
    )
    good = {"image_id": 11, "category_id": 7, "bbox": [1, 1, 5, 5], "score": 0.5}
    path = tmp_path / "found.json"
    for change in (
        *({"score": float("nan")}, {"score": 10**400}, {"bbox": [float("inf")] * 4}, {"image_id": [11]}),
        *({"bbox": "abcd"}, {"segmentation": {"size": [30, 40], "counts": "o" * 50}}, {"category_id": None}),
        *({"segmentation": [[0, 0, 2e9, 0, 2e9, 2e9]]}, {"keypoints": {"a": 1}}, {"keypoints": [1, 2]}),
    ):
        path.write_text(json.dumps([{**good, **change}]))
        refused(path, "detection 0", by=lambda: list(read_predictions(str(path), "pets")))
    for size in ([10**6, 10**6], [-30, -40], [0, 0], [10**30, 1], [True, 1200], "ab", [30, 40, 1]):
        rle = {"size": size, "counts": [10**12 if size == [10**6, 10**6] else 1200]}
        path.write_text(json.dumps([{"image_id": 11, "category_id": 7, "score": 0.5, "segmentation": rle}]))
        refused(path, "detection 0", by=lambda: list(read_predictions(str(path), "pets")))
    for text in ("[" * 500_000, "null", "[[1]]", '"a"', "", "[{}]"):
        path.write_text(text)
        refused(path, by=lambda: list(read_predictions(str(path), "pets")))


# ---- VOC


_LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10 if i else "ha"}">' for i in range(12))
XML = {
    "laughs": f"<!DOCTYPE a [{_LAUGHS}]><annotation><object><name>&l11;</name></object></annotation>",
    "external": '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>',
    "remote": '<!DOCTYPE a SYSTEM "http://localhost:1/a.dtd"><annotation/>',
    "undeclared": "<annotation>&x;</annotation>",
    "cut": "<annotation><object><name>ant",
    "binary": "\0\1\2",
    "empty": "",
    "encoding": '<?xml version="1.0" encoding="nonsense"?><annotation/>',
    "python": "!!python/object",
    "width": "<annotation><size><width>1e300</width><height>30</height></size></annotation>",
    "nan": "<annotation><size><width>nan</width><height>30</height></size></annotation>",
    "huge": "<annotation><size><width>99999</width><height>99999</height></size></annotation>",
    "negative": "<annotation><size><width>-4</width><height>30</height></size></annotation>",
    "half": "<annotation><size><width>0.5</width><height>30</height></size></annotation>",
    "box": "<annotation><object><name>ant</name><bndbox>1 2 3 4</bndbox></object></annotation>",
    "nobox": "<annotation><object><name>ant</name></object></annotation>",
    "noname": "<annotation><object><bndbox/></object></annotation>",
}
_BOX = (
    "<annotation><object><name>ant</name><bndbox><xmin>{}</xmin><ymin>1</ymin><xmax>3</xmax><ymax>4</ymax>"
    "</bndbox></object></annotation>"
)
XML |= {
    f"xmin {value[:9]}": _BOX.format(value) for value in ("inf", "1e999", "x" * 100_000, "", "0x10", "1,5")
}


@pytest.mark.parametrize("kind", XML)
def test_hostile_and_broken_xml_is_refused(tiny_voc, kind):
    (tiny_voc.root / "Annotations/a.xml").write_text(XML[kind])
    refused("a.xml", by=lambda: load_voc(str(tiny_voc.root), "train"))


def test_entities_in_another_encoding_do_not_fill_the_memory(tiny_voc):
    (tiny_voc.root / "Annotations/a.xml").write_text(XML["laughs"], encoding="utf-16")
    refused("a.xml", by=lambda: load_voc(str(tiny_voc.root), "train"))


def test_xml_of_many_bytes_is_not_read_and_deep_xml_is(tiny_voc):
    path = tiny_voc.root / "Annotations/a.xml"
    path.write_text("<annotation>" + "<object>" * 200_000 + "</object>" * 200_000 + "</annotation>")
    refused("a.xml", by=lambda: load_voc(str(tiny_voc.root), "train"))
    with path.open("wb") as f:
        f.truncate(10 << 30)
    refused("a.xml", "bytes", by=lambda: load_voc(str(tiny_voc.root), "train"))


@pytest.mark.parametrize(
    "line", ["../../../etc/passwd", "/etc/passwd", "a\0b", "x" * 100_000, "\ufeff\ufeffa", "."]
)
def test_a_split_list_that_names_no_image_of_the_dataset_is_refused(tiny_voc, line):
    (tiny_voc.root / "ImageSets/Main/train.txt").write_text(line)
    refused("train", by=lambda: load_voc(str(tiny_voc.root), "train"))


# ---- YOLO


@pytest.fixture
def tiny_yolo(tmp_path, write_image):
    """A folder with a data.yaml, an image and its labels."""
    root = tmp_path / "yolo"
    write_image(root / "images/train/a.png", 40, 20)
    (root / "labels/train").mkdir(parents=True)
    (root / "labels/train/a.txt").write_text("1 0.5 0.5 0.25 0.5\n")
    (root / "data.yaml").write_text("train: images/train\nnames: [ant, bee]\n")
    return root


LABELS = [
    *(b"0 nan 0.5 0.5 0.5", b"0 inf 0.5 0.5 0.5", b"0 1e999 0.5 0.5 0.5", b"nan 0.5 0.5 0.5 0.5"),
    *(b"-1 0.5 0.5 0.5 0.5", b"1e30 0.5 0.5 0.5 0.5", b"0.5 0.5 0.5 0.5 0.5", b"0 0.5", b"a b c d e"),
    *(b"0 " + b"0.5 " * 200_001, b"0" * 1_000_000, b"\xff\xfe\x00", b"\0" * 100, b"0 0,5 0,5 0,5 0,5"),
    *(b"0 0.5 0.5 " + b"9" * 100_000 + b" 1", bytes(range(256)), "0 0.5\u20280.5 0.5".encode()),
]


@pytest.mark.parametrize("number", range(len(LABELS)))
def test_hostile_and_broken_labels_are_refused(tiny_yolo, number):
    path = tiny_yolo / "labels/train/a.txt"
    path.write_bytes(LABELS[number])
    refused(path, by=lambda: load_yolo(str(tiny_yolo / "data.yaml"), "train"))


@pytest.mark.parametrize(
    "text",
    [
        *("train: ../../etc\nnames: [a]", "train: /etc\nnames: [a]", "train: list.txt\nnames: [a]"),
        *(
            "train: images/../../yolo2\nnames: [a]",
            "train: images\nnc: 1000000000",
            "train: images\nnc: .nan",
        ),
        *(
            'train: "a\\0b"\nnames: [a]',
            'path: "a\\0b"\ntrain: images\nnames: [a]',
            "train: images\nnames: {1: a}",
        ),
        *("train: images\nnames: {{a: b}: c}", "train: [[[]]]\nnames: [a]", "train: {a: b}\nnames: [a]"),
        *(
            'train: "a\\0b.txt"\nnames: [a]',
            "train: images\nnames: [a, a]",
            "train: images\nnames: " + "x" * 9999,
        ),
        *("train: images/train\nnames: [ant]", "names: [a]", "- a", "train: images.txt\nnames: [a]"),
    ],
)
def test_a_hostile_or_broken_data_yaml_is_refused(tiny_yolo, text):
    (tiny_yolo / "data.yaml").write_text(text)
    (tiny_yolo / "list.txt").write_text("images/train/a.png\n../../../../../../etc/passwd\n")
    (tiny_yolo / "images.txt").mkdir()
    refused(by=lambda: load_yolo(str(tiny_yolo / "data.yaml"), "train"))


def test_images_elsewhere_are_read_where_the_path_says_so(tiny_yolo):
    (tiny_yolo / "lists").mkdir()
    (tiny_yolo / "lists/data.yaml").write_text("path: ..\ntrain: lists/train.txt\nnames: [ant, bee]\n")
    (tiny_yolo / "lists/train.txt").write_text(f"../images/train/a.png\n{tiny_yolo}/images/train/a.png\n")
    assert len(load_yolo(str(tiny_yolo / "lists/data.yaml"), "train")[0]) == 2


@pytest.mark.parametrize("name", ["9" * 200 + ".png", "\u0661.png", "-1.png"])
def test_odd_image_names_are_ids(tiny_yolo, name):
    (tiny_yolo / "images/train/a.png").rename(tiny_yolo / "images/train" / name)
    records, _ = load_yolo(str(tiny_yolo / "data.yaml"), "train")
    assert records[0]["image_id"] == name.removesuffix(".png")


def test_names_of_thousands_of_digits_in_a_list_are_refused(tiny_yolo):
    (tiny_yolo / "data.yaml").write_text("train: list.txt\nnames: [ant, bee]\n")
    (tiny_yolo / "list.txt").write_text("9" * 5000 + ".png\n")
    refused(by=lambda: load_yolo(str(tiny_yolo / "data.yaml"), "train"))


# ---- images


def _png(width, height, data=b"", extra=()):
    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


def _saved(tmp_path, kind, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "source", kind, **options)
    return (tmp_path / "source").read_bytes()


IMAGES = {
    "bomb": lambda _: _png(60_000, 60_000, bytes(1000)),
    "wide bomb": lambda _: _png(2**31 - 1, 1, bytes(1000)),
    "text bomb": lambda _: _png(4, 4, bytes(52), [(b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20)))]),
    "short": lambda _: _png(4000, 4000, bytes(1000)),
    "no pixels": lambda _: _png(0, 0),
    "empty": lambda _: b"",
    "text": lambda _: b"this is no image\n" * 100,
    "html": lambda _: b"<!DOCTYPE html><html><body>404</body></html>",
    "svg": lambda _: b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>',
    "cut jpeg": lambda folder: _saved(folder, "JPEG")[:800],
    "cut png": lambda folder: _saved(folder, "PNG")[:900],
    "cut webp": lambda folder: _saved(folder, "WEBP")[:300],
    "cut tiff": lambda folder: _saved(folder, "TIFF")[:900],
    "header": lambda folder: _saved(folder, "JPEG")[:2],
    "bytes": lambda _: bytes(range(256)) * 20,
}


@pytest.mark.parametrize("kind", IMAGES)
def test_bombs_and_broken_images_are_refused(tmp_path, kind):
    path = tmp_path / "images/a.jpg"
    path.parent.mkdir()
    path.write_bytes(IMAGES[kind](tmp_path))
    refused(path, by=lambda: read_image(str(path)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "MPO"])
def test_an_image_of_another_kind_than_its_name_says_is_read(tmp_path, kind):
    path = tmp_path / "a.jpg"
    path.write_bytes(_saved(tmp_path, kind))
    assert image_header(str(path))[:2] == (30, 40)
    assert read_image(str(path)).shape == (3, 30, 40)


def test_a_shapes_set_of_absurd_size_is_refused():
    for key, value in (("HEIGHT", 10**6), ("NUM", 10**12), ("WIDTH", 10**30)):
        declare_dataset(
            f"big {key}", {"FORMAT": "shapes", "SPLIT": "train", "NUM": 4, "WIDTH": 10**4, key: value}
        )
        refused("shapes needs", by=lambda key=key: get_detection_dataset_dicts(f"big {key}"))


def test_an_image_larger_than_its_record_says_is_refused(tiny_coco):
    (tiny_coco.images / "wide.png").write_bytes(_png(41, 30, bytes(124 * 30)))
    records, _ = _coco(tiny_coco)()
    mapper = DatasetMapper(get_cfg(), is_train=False)
    refused("wide.png", "41x30", by=lambda: mapper(records[2]))


def test_one_broken_image_is_listed_and_the_rest_is_read(tmp_path, write_image):
    for name in "ab":
        write_image(tmp_path / f"images/{name}.png", 20, 20)
    (tmp_path / "images/c.png").write_bytes(_png(60_000, 60_000))
    declare_dataset("found", {"FORMAT": "images", "ROOT": str(tmp_path / "images")})
    problems = []
    records, _ = read_dataset("found", problems)
    assert [len(records), len(problems)] == [2, 1]
    refused("c.png", by=lambda: read_dataset("found"))


def test_links_that_go_round_do_not_make_an_endless_list(tmp_path, write_image):
    write_image(tmp_path / "images/a.png", 20, 20)
    for name in "xyz":
        (tmp_path / "images" / name).symlink_to(tmp_path / "images")
    refused(tmp_path / "images", "link", by=lambda: load_images(str(tmp_path / "images")))
    (tmp_path / "data.yaml").write_text("train: images\nnames: [a]\n")
    refused(tmp_path / "images", "link", by=lambda: load_yolo(str(tmp_path / "data.yaml"), "train"))


def test_a_folder_of_links_to_elsewhere_is_read(tmp_path, write_image):
    write_image(tmp_path / "elsewhere/sub/a.png", 20, 20)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/link").symlink_to(tmp_path / "elsewhere")
    records, _ = load_images(str(tmp_path / "images"))
    assert [record["image_id"] for record in records] == ["link/sub/a.png"]
