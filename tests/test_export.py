"""Exported detectors find what the model finds; the scripts as a user runs them."""

import functools
import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from model_helpers import ARCHITECTURES, RETINA, TINY, build, make_cfg, make_sample, randomize_predictions
from PIL import Image
from processes import ROOT
from script_helpers import assert_refused, script_output
from torchvision.utils import save_image

from plaintrain.data.images import read_image
from plaintrain.export import export
from plaintrain.export.export import (
    check_exported,
    compare_detections,
    describe,
    is_fixed,
    open_exported,
    trace,
    write_onnx,
    write_torch,
)
from plaintrain.export.graph import DetectionGraph
from plaintrain.modeling.tta import get_detection_settings
from plaintrain.structures import BoxMasks
from plaintrain.utils.errors import UserError

PREDICT = ROOT / "examples" / "predict_exported.py"
CLASSES = ["ant", "bee", "cow"]
LEVELS = ("MODEL.TINY.NUM_LEVELS", 2, "MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32]])
ANCHORS = ("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator")
ALIGNED = (*ANCHORS, "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2")
FEW = ("TEST.DETECTIONS_PER_IMAGE", 10, "MODEL.RPN.POST_NMS_TOPK_TEST", 100)
KINDS = {
    **ARCHITECTURES,
    "mask_keypoint_rcnn": (*ARCHITECTURES["mask_keypoint_rcnn"], *LEVELS, *FEW),
    "rcnn of detectron2": (*ARCHITECTURES["faster_rcnn"], *LEVELS, *ALIGNED, "INPUT.FORMAT", "BGR"),
    "retinanet of detectron2": (*TINY, *RETINA, *ANCHORS),
}


def make(name):
    """(cfg, model) whose scores and boxes differ widely."""
    model = build(*KINDS[name]).eval()
    randomize_predictions(model)
    return make_cfg(*KINDS[name]), model


def pictures(number=2, height=64, width=64):
    return [(str(i), make_sample(height, width, seed=i)["image"]) for i in range(number)]


def assert_small(apart):
    assert all(value < 1e-3 for key, value in apart.items() if key not in ("image", "detections")), apart


def assert_same(cfg, model, run, images):
    for row in check_exported(run, model, images):
        assert row["detections"] > 0
        assert ("masks" in row) == ("keypoint_maps" in row) == cfg.MODEL.MASK_ON
        assert_small(row)


@pytest.mark.parametrize("name", KINDS)
def test_the_graph_finds_what_the_model_finds(name):
    cfg, model = make(name)
    images = pictures(3, *((64, 64) if is_fixed(cfg) else (70, 100)))
    with torch.no_grad():
        assert_same(cfg, model, DetectionGraph(model), images)
        outputs = DetectionGraph(model)(torch.stack([image for _, image in images]))
        one = DetectionGraph(model)(images[1][1][None])
    # An image's place in a batch changes nothing.
    number = int(one.pop("num_detections"))
    second = {key: outputs[key][1, :number] for key in one}
    alone = {key: value[0, :number] for key, value in one.items()}
    assert_small(compare_detections(second, alone, get_detection_settings(model).score_thresh))
    assert (one["labels"][0, number:] == -1).all() and not one["boxes"][0, number:].any()


@pytest.fixture
def example(monkeypatch):
    """examples/predict_exported.py as a module."""
    monkeypatch.syspath_prepend(PREDICT.parent)
    return importlib.import_module(PREDICT.stem)


@pytest.mark.parametrize("aligned", [True, False])
def test_the_example_pastes_masks_as_the_model_does(example, aligned):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(20, 1, 28, 28, generator=generator)
    boxes = (torch.rand(20, 2, 2, generator=generator) * 70 - 5).sort(dim=1).values.flatten(1)
    expected = BoxMasks(probabilities, boxes, 48, 64, aligned).paste()
    pairs = zip(probabilities[:, 0].numpy(), boxes.numpy(), strict=True)
    found = [np.asarray(example.paste(mask, box, (64, 48), aligned)) > 0 for mask, box in pairs]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.int32])
def test_the_example_converts_pixels_as_the_training_does(example, tmp_path, dtype):
    path, values = str(tmp_path / "a.tif"), np.arange(1200).reshape(30, 40)
    values = {np.uint8: values % 256, np.float32: values / 1200, np.int32: values - 500}.get(dtype, values)
    Image.fromarray(values.astype(dtype)).save(path)
    for pixel_range in ((), (0, 4095), (-500, 3500), (0, 255)):
        try:
            wanted = read_image(path, pixel_range)
        except UserError:
            with pytest.raises(SystemExit, match="do not fit the model's pixel_range"):
                example.read(path, pixel_range)
        else:
            found = np.asarray(example.read(path, pixel_range)).transpose(2, 0, 1)
            np.testing.assert_array_equal(found, wanted)


def test_differences_are_those_of_the_same_objects():
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    expected = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([0, 1])}
    # Ties come in any order.
    swapped = {key: value.flip(0) for key, value in expected.items()}
    swapped["boxes"] = swapped["boxes"] + 0.25
    assert compare_detections(swapped, expected, 0.5) == {"detections": 2, "boxes": 0.25, "scores": 0.0}
    # One that only one of them has counts by its score, and so does one of another class.
    first = {key: value[:1] for key, value in expected.items()}
    for found, wanted in ((first, expected), (expected, first)):
        assert compare_detections(found, wanted, 0.5)["scores"] == pytest.approx(0.3)
    other = expected | {"labels": torch.tensor([0, 2])}
    assert compare_detections(other, expected, 0.5)["scores"] == pytest.approx(0.3)
    none = {key: value[:0] for key, value in expected.items()}
    assert compare_detections(none, none, 0.5) == {"detections": 0, "boxes": 0.0, "scores": 0.0}


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_every_architecture_is_exported(name, example, tmp_path):
    cfg, model = make(name)
    program = trace(model, (64, 64) if is_fixed(cfg) else (96, 160), is_fixed(cfg))
    about = describe(cfg, CLASSES, "model_final.pth")
    write_torch(program, str(tmp_path / "a.pt2"), about)
    write_onnx(program, str(tmp_path / "a.onnx"), about)
    sizes = [(64, 64)] if is_fixed(cfg) else [(64, 64), (70, 130), (200, 90)]
    for file in ("a.pt2", "a.onnx"):
        run = open_exported(str(tmp_path / file))
        for size in sizes:
            assert_same(cfg, model, run, pictures(2, *size))
        batch = torch.stack([image for _, image in pictures(3, *sizes[-1])])
        outputs = run(batch)
        assert len(outputs["num_detections"]) == 3
        alone, said = example.load(str(tmp_path / file))
        assert said["class_names"] == CLASSES and said["dynamic"] == about["dynamic"]
        np.testing.assert_array_equal(alone(batch.numpy())["scores"], outputs["scores"].detach())
        # An image in which nothing is found.
        assert len(run(torch.zeros(1, 3, *sizes[0], dtype=torch.uint8))["boxes"]) == 1


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of a run of a small SSD, and two images."""
    folder = tmp_path_factory.mktemp("run")
    cfg, model = make("ssd")
    declared = {"FORMAT": "shapes", "SPLIT": "val", "NUM": 3, "HEIGHT": 64, "WIDTH": 64}
    cfg.DATASETS.DECLARE.few_val = type(cfg)(declared, new_allowed=True)
    cfg.merge_from_list(["DATASETS.TEST", ("few_val",), "MODEL.SSD.SCORE_THRESH_TEST", 0.05])
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict(), "class_names": CLASSES}, folder / "model_final.pth")
    for name, image in pictures():
        save_image(image / 255, folder / f"{name}.png")
    return folder


def hide(package):
    """Let nothing import a package."""
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        sys.modules[name] = None


def test_a_run_is_exported_checked_and_used_without_plaintrain(run_folder, tmp_path):
    pytest.importorskip("onnxruntime")
    options = ["--check", 2, "MODEL.SSD.SCORE_THRESH_TEST", 0.1]
    output = script_output("export_model.py", run_folder, *options, folder=tmp_path)
    assert "largest" in output and re.search(r"model\.onnx: SSD, 0\.\d MB, dynamic batch\n", output)
    image = run_folder / "1.png"
    command = [PREDICT, run_folder / "model.onnx", image, "--score-threshold", "0", "--output", tmp_path]
    output = script_output(*command, folder=tmp_path, faults=functools.partial(hide, "plaintrain"))
    _, model = make("ssd")
    model.score_thresh = 0.1
    with torch.no_grad():
        found = model([{"image": dict(pictures())["1"], "height": 64, "width": 64}])[0]
    lines = output[output.index(str(image)) :].splitlines()
    assert lines[0] == f"{image}: {len(found['scores'])} objects"
    name, *numbers = lines[1].split()
    assert name == CLASSES[found["labels"][0]]
    expected = [found["scores"][0].item(), *found["boxes"][0].tolist()]
    assert [float(number) for number in numbers] == pytest.approx(expected, abs=0.06)
    assert (tmp_path / "1.png").stat().st_size > 1000


def test_a_file_that_is_off_is_kept_apart(run_folder, tmp_path):
    file = tmp_path / "off.pt2"
    args = [run_folder, "--output", file, "--images", run_folder, "--check", 1]
    words = f"differs from the model in boxes by 0.01, more than --tolerance 0.001; it is kept as {file}"
    assert_refused("export_model.py", args, words, tmp_path, codes=[1], faults=export_a_little_off)
    assert {path.name for path in tmp_path.glob("*.pt2*")} == {"off.pt2.failed"}
    assert (tmp_path / "off.pt2.failed").read_text() == "a program"


def export_a_little_off():
    """Stand in for what takes long."""
    _, model = make("ssd")
    model.score_thresh = 0.05

    def run(images):
        return {k: v + 0.01 * (k == "boxes") for k, v in DetectionGraph(model)(images).items()}

    export.trace = lambda *args: "a program"
    export.write_torch = lambda program, path, about: Path(path).write_text(program)
    export.open_exported = lambda path: run


@pytest.mark.parametrize(
    "args, message",
    [
        (["--output", "a.onnx"], "give a run's folder or --config-file FILE, got neither"),
        (["FOLDER", "--output", "a.pt2", "--format", "onnx"], "must end in .onnx"),
        (["FOLDER", "--output", "nowhere/a.onnx"], "there is no folder nowhere"),
        (["FOLDER", "TEST.AUG.ENABLED", "True"], "TEST.AUG.ENABLED must be False for an export"),
        (["FOLDER", "DATASETS.TEST", "()"], "DATASETS.TEST is empty; give --images FOLDER"),
    ],
)
def test_wrong_inputs_end_with_one_sentence(run_folder, tmp_path, args, message):
    args = [run_folder if arg == "FOLDER" else arg for arg in args]
    assert_refused("export_model.py", args, message, tmp_path)


@pytest.mark.parametrize("module", ["onnx", "onnxruntime"])
def test_a_missing_extra_is_said_before_the_work_begins(run_folder, tmp_path, module):
    words = f'ONNX needs {module}: pip install "plaintrain[export]"'
    faults = functools.partial(hide, module)
    assert_refused("export_model.py", [run_folder], words, tmp_path, codes=[1], faults=faults)


@pytest.mark.long
def test_what_cannot_be_traced_is_refused():
    _, model = make("ssd")
    model.backbone.forward = lambda x: x[: int(x.sum())]
    with pytest.raises(ValueError, match="torch.export cannot trace SSD: "):
        trace(model, (64, 64), True)
