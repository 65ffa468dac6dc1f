"""scripts/visualize_data.py and scripts/visualize_results.py, run as a user would."""

import functools
import json
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageShow
from script_helpers import assert_refused, script_output
from torchvision.transforms.v2.functional import resize_image

from plaintrain.analysis.errors import OUTCOMES
from plaintrain.data.datasets.shapes import CLASSES, load_shapes
from plaintrain.data.images import read_image
from plaintrain.structures import BoxMode
from plaintrain.visualization.colors import PALETTE

CONFIG = """
DATASETS:
  DECLARE:
    seen_train: {FORMAT: shapes, SPLIT: train, NUM: 9, HEIGHT: 64, WIDTH: 96}
    seen_val: {FORMAT: shapes, SPLIT: val, NUM: 6, HEIGHT: 64, WIDTH: 96}
  TRAIN: [seen_train]
  TEST: [seen_val]
INPUT: {MIN_SIZE_TRAIN: [48], AUGMENTATIONS: []}
MODEL: {MASK_ON: True}
"""
COLORS = [OUTCOMES[n][0] for n in ("missed", "localization", "classification", "duplicate", "background")]
RED, ORANGE, PURPLE, BLUE, PINK = COLORS
# Without a display.
ENV = {"DISPLAY": None, "WAYLAND_DISPLAY": None}


@pytest.fixture
def call(tmp_path):
    """Function that runs a script in `tmp_path`, where seen.yaml is, and returns its output."""
    (tmp_path / "seen.yaml").write_text(CONFIG)
    return functools.partial(script_output, folder=tmp_path, cwd=tmp_path, env=ENV)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def count(image, color):
    """How many pixels of an image, uint8 `[3, H, W]`, are near a colour."""
    far = (image.int() - torch.tensor(color)[:, None, None]).abs()
    return int((far < 30).all(dim=0).sum())


def test_annotations_are_drawn_as_files_on_a_sheet_and_in_a_window(call, tmp_path):
    options = ("--config-file", "seen.yaml", "seen_val", "--max-images", 4, "--output", "one")
    output = call("visualize_data.py", *options, "--grid", "all.png")
    assert "wrote 4 images to one" in output and "wrote 4 images to all.png" in output
    assert names_in(tmp_path / "one") == [f"000{i + 1}_{i}.jpg" for i in range(4)]
    for i, record in enumerate(load_shapes("val", 6, 64, 96)[0][:4]):
        drawn = read_image(str(tmp_path / "one" / f"000{i + 1}_{i}.jpg"))
        assert drawn.shape == (3, 320, 480)
        for label in {a["category_id"] for a in record["annotations"]}:
            assert count(drawn, PALETTE[label]) > 200
    assert Image.open(tmp_path / "all.png").size[0] == 4 * 480
    window = {"env": {"DISPLAY": ":0"}, "faults": print_what_is_shown}
    output = call("visualize_data.py", "shapes_val", "--max-images", 2, **window)
    assert re.search(r"shown \(960, \d+\) shapes_val\n", output), output


def test_images_are_chosen_by_id_and_class_and_shuffled_by_a_seed(call, tmp_path):
    seen = ("seen_train", "--config-file", "seen.yaml")
    call("visualize_data.py", *seen, "--image-id", 7, "--image-id", 3, "--output", "few")
    assert names_in(tmp_path / "few") == ["0001_2.jpg", "0002_6.jpg"]
    call("visualize_data.py", *seen, "--class", "circle", "--output", "circles", "--max-images", 3)
    records = load_shapes("train", 9, 64, 96)[0]
    wanted = [i for i, r in enumerate(records) if any(a["category_id"] == 0 for a in r["annotations"])][:3]
    assert names_in(tmp_path / "circles") == [f"{n:04d}_{i}.jpg" for n, i in enumerate(wanted, start=1)]
    assert wanted != [0, 1, 2]
    for seed in (1, 1, 2):
        options = ("--max-images", 3, "--output", f"seed{seed}", "--seed", seed)
        call("visualize_data.py", *seen, "--shuffle", *options)
    assert len(names_in(tmp_path / "seed1")) == 3
    assert names_in(tmp_path / "seed1") != names_in(tmp_path / "seed2")


def test_the_loaders_samples_are_drawn_as_a_model_gets_them(call, tmp_path):
    common = ("--config-file", "seen.yaml", "--source", "dataloader", "--size", 1)
    unchanged = (*common, "--max-images", 2, "INPUT.RANDOM_FLIP", "none")
    call("visualize_data.py", *unchanged, "--output", "plain")
    names = names_in(tmp_path / "plain")
    assert {Image.open(tmp_path / "plain" / name).size for name in names} == {(72, 48)} and len(names) == 2
    # The same samples again, one of which now has what another image had.
    call("visualize_data.py", *unchanged, "--output", "pasted", "INPUT.AUGMENTATIONS", "['SimpleCopyPaste']")
    assert names_in(tmp_path / "pasted") == names
    pairs = [[read_image(str(tmp_path / folder / name)) for folder in ("plain", "pasted")] for name in names]
    assert not all(torch.equal(*pair) for pair in pairs)
    # More samples than images: the loader goes on.
    call("visualize_data.py", *common, "--max-images", 11, "--output", "one", "--image-id", 4)
    assert names_in(tmp_path / "one") == [f"{n:04d}_3.jpg" for n in range(1, 12)]


def to_result(record, annotation, score=0.9, label=None, shift=0):
    x, y, right, bottom = annotation["bbox"]
    assert annotation["bbox_mode"] == BoxMode.XYXY_ABS
    label = annotation["category_id"] if label is None else label
    box = [x + shift * (right - x), y, right - x, bottom - y]
    return {"image_id": record["image_id"], "category_id": label + 1, "bbox": box, "score": score}


@pytest.fixture
def run(tmp_path):
    """A run's folder with predictions for seen_val that have two errors of a kind in three images."""
    records = load_shapes("val", 6, 64, 96)[0]
    found = [to_result(r, a) for r in records for a in r["annotations"]]
    full = [i for i, r in enumerate(records) if len(r["annotations"]) >= 2]
    lost, second, third = full[:3]
    # Of one image two objects are missed; in another one is poorly placed, one of the wrong class.
    missed = [to_result(records[lost], a) for a in records[lost]["annotations"][:2]]
    a, b = records[second]["annotations"][:2]
    wrong = [to_result(records[second], a, shift=0.5)]
    wrong.append(to_result(records[second], b, label=(b["category_id"] + 1) % 3))
    right = [to_result(records[second], x) for x in (a, b)]
    found = [d for d in found if d not in missed and d not in right] + wrong
    # In a third one object is found twice, and there is something on the background, which 0.95 hides.
    c = records[third]["annotations"][0]
    corner = {"image_id": records[third]["image_id"], "category_id": 1, "bbox": [0, 0, 2, 2], "score": 0.6}
    found += [to_result(records[third], c, score=0.8), corner]
    folder = tmp_path / "run" / "inference" / "seen_val"
    folder.mkdir(parents=True)
    (folder / "coco_instances_results.json").write_text(json.dumps(found))
    (tmp_path / "run" / "config.yaml").write_text(CONFIG)
    return SimpleNamespace(names=[f"{i}" for i in (lost, second, third)], label=b["category_id"])


def table(out):
    return {kind: int(number) for kind, number in re.findall(r"^  (\w+)(?::[^\d]*)?\s+(\d+)$", out, re.M)}


def test_errors_are_counted_and_drawn_in_their_colours(call, run, tmp_path):
    common = ("visualize_results.py", "run", "--grid", "all.jpg")
    # The default is the threshold with the highest F1, as in analyze_errors.py.
    assert "scores >= 0.900; correct: IoU >= 0.5 of boxes" in call(*common)
    output = call(*common, "--output", "drawn", "--score-threshold", 0.5)
    counts = {"missed": 2, "classification": 1, "localization": 1, "both": 0, "duplicate": 1, "background": 1}
    assert table(output) == counts
    files = {p.stem.split("_")[1]: p for p in (tmp_path / "drawn").iterdir()}
    assert sorted(files) == sorted(run.names)
    assert "wrote 3 images to drawn" in output and "wrote 3 images to all.jpg" in output
    lost, second, third = (files[name] for name in run.names)
    assert Image.open(lost).size == (2 * 480 + 4, 320)
    records = load_shapes("val", 6, 64, 96)[0]
    for path, seen in ((lost, {RED}), (second, {ORANGE, PURPLE}), (third, {BLUE, PINK})):
        record = records[int(path.stem.split("_")[1])]
        bare, drawn = resize_image(read_image(record["file_name"]), [320, 480]), read_image(str(path))
        colors = {color for color in COLORS if count(drawn, color) - 2 * count(bare, color) > 60}
        assert seen == colors, path


def test_error_types_classes_thresholds_and_files_choose_what_counts(call, run, tmp_path):
    results = functools.partial(call, "visualize_results.py", "run")
    types = ("--error-type", "classification", "--error-type", "duplicate")
    results(*types, "--output", "types", "--score-threshold", 0.5)
    names = {name.split("_")[1] for name in names_in(tmp_path / "types")}
    assert names == {f"{name}.jpg" for name in run.names[1:]}
    output = results("--score-threshold", 0.85, "--iou-threshold", 0.1, "--grid", "a.jpg")
    assert [table(output)[kind] for kind in ("duplicate", "background", "localization")] == [0, 0, 0]
    output = results("--class", CLASSES[run.label], "--error-type", "classification", "--grid", "a.jpg")
    assert table(output)["classification"] == 1
    output = results("--score-threshold", 1, "--error-type", "duplicate", "--grid", "b.jpg")
    assert "no image has such an error" in output and not (tmp_path / "b.jpg").exists()
    path = "run/inference/seen_val/coco_instances_results.json"
    common = ("--config-file", "seen.yaml", "--predictions", path, "--grid", "a.jpg")
    assert table(call("visualize_results.py", *common))["missed"] == 2
    assert "seen_train, 9 images" in call("visualize_results.py", *common, "--dataset", "seen_train")


# Image 3 has no circle.
NOWHERE = "--config-file seen.yaml --class circle --image-id 3 --output none"


@pytest.mark.parametrize(
    ("script", "args", "words"),
    [
        ("data", "shapes_val", "there is no display to show images on; use --output DIR or --grid FILE"),
        ("data", "--grid a.jpg", "no dataset; give NAME"),
        ("data", "shapes_val --grid a.gif", "must end in one of .png"),
        ("data", "shapes_val --grid a.jpg --max-images 0", "--max-images must be at least 1, got 0"),
        ("data", "shapes_val --grid a.jpg --class circel", "the nearest is 'circle'"),
        ("data", "shapes_val --grid a.jpg --image-id x", "x: no such image among 200; the first"),
        ("data", NOWHERE, "error: no image of seen_train matches --class and --image-id"),
        ("data", f"{NOWHERE} --source dataloader", "error: no image of seen_train matches --class"),
        ("results", "run --iou-threshold 0 --grid a.jpg", "--iou-threshold must be above 0"),
        ("results", "run --task segm --grid a.jpg", "require masks in the predictions"),
    ],
)
def test_scripts_answer_mistakes_in_a_sentence(run, tmp_path, script, args, words):
    (tmp_path / "seen.yaml").write_text(CONFIG)
    assert_refused(f"visualize_{script}.py", args.split(), words, tmp_path, env=ENV)


def print_what_is_shown():
    """Stand in for a window."""
    ImageShow.show = lambda image, title: print("shown", image.size, title) or True
