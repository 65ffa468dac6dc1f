"""plaintrain/predict.py and scripts/predict.py: a run's folder, an image in, detections out."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.config import get_cfg, split_overrides
from plaintrain.data import build_detection_test_loader
from plaintrain.data.coco import load_coco_json
from plaintrain.data.images import read_image
from plaintrain.data.shapes import load_shapes
from plaintrain.ema import ModelEMA
from plaintrain.modeling import build_model, build_tta
from plaintrain.predict import Predictor, to_tensor
from plaintrain.utils.errors import UserError
from plaintrain.weight_classes import COCO_NAMES

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "predict.py"
NAMES = ["ring", "block", "wedge"]
SIDE = 64
# A Mask and Keypoint R-CNN that takes milliseconds.
TINY = """
MODEL:
  DEVICE: cpu
  BACKBONE: {NAME: build_tiny_backbone, FREEZE_AT: 0}
  TINY: {CHANNELS: [8, 16], OUT_CHANNELS: 16, NORM: BN}
  ANCHOR_GENERATOR: {SIZES: [[16, 32]]}
  RPN: {PRE_NMS_TOPK_TEST: 50, POST_NMS_TOPK_TEST: 20}
  ROI_HEADS: {SCORE_THRESH_TEST: 0.0, NUM_CLASSES: 3}
  ROI_BOX_HEAD: {FC_DIM: 16}
  MASK_ON: True
  ROI_MASK_HEAD: {NUM_CONV: 1, CONV_DIM: 8}
  KEYPOINT_ON: True
  ROI_KEYPOINT_HEAD: {CONV_DIMS: [8], NUM_KEYPOINTS: 4}
INPUT: {MIN_SIZE_TEST: 96}
DATASETS:
  DECLARE:
    predict_gone: {FORMAT: coco, JSON: /no/such.json, IMAGE_ROOT: /no}
  TRAIN: [predict_gone]
  TEST: [predict_gone]
DATALOADER: {NUM_WORKERS: 0}
TEST: {DETECTIONS_PER_IMAGE: 8, AUG: {MIN_SIZES: [64, 96]}}
SEED: 3
"""
# The same with a dataset that is there.
HERE = ["DATASETS.TEST", ("shapes_val",), "DATASETS.TRAIN", ("shapes_val",)]
IMAGE = load_shapes("val", 8, SIDE, SIDE + 16)[0][5]["file_name"]


def config(*opts):
    cfg = get_cfg()
    cfg.merge_from_other_cfg(get_cfg()._load_cfg_from_yaml_str(TINY))
    cfg.merge_from_list(list(opts))
    return cfg


def save(folder, name, seed, cfg=None, about=None):
    """A checkpoint of random weights, and the folder's config.yaml."""
    torch.manual_seed(seed)
    cfg = cfg or config()
    model = build_model(cfg)
    about = {"class_names": NAMES, "config": cfg.dump()} if about is None else about
    DetectionCheckpointer(model, str(folder), about=about).save(name, iteration=seed)
    (folder / "config.yaml").write_text(cfg.dump())
    return model.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with two checkpoints, whose dataset is not there."""
    folder = tmp_path_factory.mktemp("run")
    save(folder, "model_0000001", 1)
    save(folder, "model_final", 2)
    return folder


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("views", [False, True])
def test_it_finds_what_the_evaluation_finds(run, views):
    opts = [*HERE, "TEST.AUG.ENABLED", views]
    predictor = Predictor(run, opts=opts)
    cfg = config(*opts)
    torch.manual_seed(2)
    model = build_model(cfg).eval()
    records = load_shapes("val", 3, SIDE, SIDE + 16)[0]
    loader = build_detection_test_loader(cfg, "shapes_val", dataset=records)
    with torch.no_grad():
        wanted = [build_tta(cfg, model).eval()(samples)[0] for samples in loader]
    found = [predictor(record["file_name"]) for record in records]
    assert len(found[0]["boxes"]) == 8 and all(map(same, found, wanted))
    assert found[0]["masks"].shape == (8, SIDE, SIDE + 16) and found[0]["keypoints"].shape == (8, 4, 3)


def test_the_dataset_need_not_be_there(run, tmp_path):
    shutil.copytree(run, tmp_path / "copied")
    predictor = Predictor(tmp_path / "copied")
    assert predictor.class_names == NAMES and predictor.skeleton == ()
    assert set(predictor(IMAGE)) == {"boxes", "scores", "labels", "masks", "keypoints"}
    assert Predictor(run, opts=["DATASETS.TEST", ("shapes_val",)]).skeleton == (
        (0, 1),
        (1, 2),
        (2, 3),
        (3, 0),
    )


def test_an_image_may_come_in_any_form_and_in_a_batch(run, tmp_path):
    predictor, tensor = Predictor(run), read_image(IMAGE)
    array = tensor.permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "a.png")
    wanted = predictor(IMAGE)
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), array, tensor):
        assert same(predictor(image), wanted)
    assert same(predictor(array[:, ::-1]), predictor(array[:, ::-1].copy()))
    twice = predictor.batch([array, tensor])
    assert torch.allclose(twice[1]["boxes"], wanted["boxes"], atol=1e-3) and predictor.batch([]) == []


def test_the_range_of_pixels_is_that_of_the_config(run, tmp_path):
    deep = np.random.default_rng(0).integers(0, 4096, (SIDE, SIDE), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    wanted = Predictor(run)((deep >> 4).astype(np.uint8))
    predictor = Predictor(run, opts=["INPUT.PIXEL_RANGE", "[0, 4095]"])
    for image in (tmp_path / "deep.png", Image.fromarray(deep), Image.open(tmp_path / "deep.png")):
        assert same(predictor(image), wanted)
    assert not same(Predictor(run)(tmp_path / "deep.png"), wanted)


def test_every_kind_of_image_becomes_rgb_as_a_dataset_reads_it(tmp_path):
    grey = Image.fromarray(np.arange(240, dtype=np.uint8).reshape(12, 20))
    deep = Image.fromarray((np.arange(240, dtype=np.uint16) * 200).reshape(12, 20))
    turned = Image.Exif()
    turned[0x112] = 6
    for name, image, options in (
        ("grey.png", grey, {}),
        ("deep.png", deep, {}),
        ("alpha.png", grey.convert("RGBA"), {}),
        ("turned.png", grey.convert("RGB"), {"exif": turned}),
    ):
        image.save(tmp_path / name, **options)
        wanted = read_image(str(tmp_path / name))
        with Image.open(tmp_path / name) as opened:
            assert torch.equal(to_tensor(opened), wanted), name
        assert wanted.shape == ((3, 20, 12) if name == "turned.png" else (3, 12, 20))
    assert torch.equal(to_tensor(np.asarray(grey)), read_image(str(tmp_path / "grey.png")))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("nowhere.jpg", "nowhere.jpg does not exist"),
        (np.zeros((4, 4, 3)), r"not a ndarray float64 of the shape \[4, 4, 3\]"),
        (np.zeros((4, 4, 4), dtype=np.uint8), r"shape \[4, 4, 4\]"),
        (torch.zeros(3, 4, 4), "not a Tensor torch.float32"),
        (7, "not a int"),
    ],
)
def test_what_is_no_image_is_refused(image, said):
    with pytest.raises(UserError, match=said):
        to_tensor(image)


def test_the_last_checkpoint_that_can_be_read_is_taken(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    assert Predictor(folder).weights == str(folder / "model_final.pth")
    assert Predictor(folder, "model_0000001.pth").weights == str(folder / "model_0000001.pth")
    other = ["MODEL.WEIGHTS", str(run / "model_0000001.pth")]
    assert Predictor(folder, opts=other).weights == other[1]
    (folder / "model_final.pth").write_bytes(b"cut off")
    assert Predictor(folder).weights == str(folder / "model_0000001.pth")
    os.rename(folder / "model_0000001.pth", folder / "model_best.pth")
    os.unlink(folder / "model_final.pth")
    assert Predictor(folder).weights == str(folder / "model_best.pth")
    (folder / "model_best.pth").unlink()
    with pytest.raises(UserError, match="run holds no checkpoint: its training has not saved one"):
        Predictor(folder)


def test_a_checkpoint_alone_holds_its_config_and_names(run, tmp_path):
    shutil.copy(run / "model_final.pth", tmp_path / "mine.pth")
    predictor = Predictor(tmp_path / "mine.pth")
    assert predictor.class_names == NAMES and same(predictor(IMAGE), Predictor(run)(IMAGE))
    torch.save({"model": predictor.model.state_dict()}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match="bare.pth holds no config"):
        Predictor(tmp_path / "bare.pth")
    named = Predictor(predictor.cfg, str(tmp_path / "bare.pth"))
    assert named.class_names == ["class 0", "class 1", "class 2"]


def test_averaged_weights_are_taken_as_in_an_evaluation(tmp_path):
    cfg = config("MODEL.EMA.ENABLED", True)
    torch.manual_seed(0)
    model = build_model(cfg)
    ema = ModelEMA(model)
    ema.update()
    bias = model.roi_heads.box_predictor.cls_score.bias
    with torch.no_grad():
        bias += 1
    about = {"class_names": NAMES}
    DetectionCheckpointer(model, str(tmp_path), about=about, ema=ema).save("model_0000000", iteration=0)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    for evaluate, added in (("averaged", 0), ("raw", 1)):
        taken = Predictor(tmp_path, opts=["MODEL.EMA.EVALUATE", evaluate]).model
        assert torch.equal(taken.roi_heads.box_predictor.cls_score.bias, bias - 1 + added)


def test_amp_is_honoured(run):
    exact, mixed = (Predictor(run, opts=["TEST.AMP", amp])(IMAGE)["scores"] for amp in (False, True))
    assert not torch.equal(exact, mixed) and torch.allclose(exact, mixed.float(), atol=0.05)


def test_weights_without_names_for_80_classes_are_cocos(tmp_path):
    cfg = config("MODEL.ROI_HEADS.NUM_CLASSES", 80, "MODEL.KEYPOINT_ON", False)
    torch.save(build_model(cfg).state_dict(), tmp_path / "published.pth")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0
    predictor = Predictor(cfg, str(tmp_path / "published.pth"))
    assert predictor.class_names == COCO_NAMES and predictor.cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0
    keypoints = ["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 17]
    cfg = config("MODEL.ROI_HEADS.NUM_CLASSES", 1, *keypoints)
    torch.save(build_model(cfg).state_dict(), tmp_path / "published.pth")
    predictor = Predictor(cfg, str(tmp_path / "published.pth"))
    assert predictor.class_names == ["person"] and (15, 13) in predictor.skeleton


def test_what_does_not_fit_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="NUM_CLASSES is 5, but .*model_final.pth was trained for 3: ring"):
        Predictor(run, opts=["MODEL.ROI_HEADS.NUM_CLASSES", 5])
    with pytest.raises(UserError, match="is missing .* of the model's parameters.*another architecture"):
        Predictor(run, opts=["MODEL.ROI_BOX_HEAD.FC_DIM", 17])
    with pytest.raises(UserError, match="'.*nowhere' does not exist: expected the OUTPUT_DIR"):
        Predictor(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no config.yaml: expected the OUTPUT_DIR"):
        Predictor(tmp_path)
    with pytest.raises(UserError, match="MODEL.WEIGHTS is empty"):
        Predictor(config())
    with pytest.raises(UserError, match="which keypoints then change places.*set TEST.AUG.FLIP False"):
        Predictor(run, opts=["TEST.AUG.ENABLED", True])
    assert len(Predictor(run, opts=["TEST.AUG.ENABLED", True, "TEST.AUG.FLIP", False])(IMAGE)["boxes"]) == 8


def test_names_and_overrides_are_told_apart():
    words = ["TEST", "IMG.JPG", "a b", "TEST.AMP", "True", "SEED", "3"]
    assert split_overrides(words) == (words[:3], words[3:])
    assert split_overrides(words[:3]) == (words[:3], []) and split_overrides([]) == ([], [])
    # A key that is misspelled is one all the same.
    assert split_overrides(["a", "MODEL.WEIGTHS", "b"]) == (["a"], ["MODEL.WEIGTHS", "b"])


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs the script in this process, in `tmp_path`: its exit code, stdout and stderr."""

    def call(*args, code=0):
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in (SCRIPT, *args)])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        out, err = capsys.readouterr()
        assert (done.value.code or 0) == code, out + err
        return SimpleNamespace(out=out, err=err)

    return call


@pytest.fixture
def images(tmp_path, write_image):
    """A folder with images of the same name in two folders, and other kinds."""
    folder = tmp_path / "images"
    for seed, name in enumerate(("a/one.png", "b/one.png", "b/two.JPG", "c.gif")):
        write_image(folder / name, SIDE, SIDE - 16 * (seed % 2), seed)
    return folder


def test_images_folders_and_patterns_become_pictures_and_a_coco_json(call, run, images):
    inputs = [images / "b", images / "a" / "one.png", str(images / "**" / "*.gif"), images / "b" / "two.JPG"]
    done = call(run, *inputs, "--output", "found", "--threshold", 0, "--batch-size", 2)
    found = images.parent / "found"
    pictures = {path.relative_to(found).as_posix() for path in found.rglob("*.*")}
    assert pictures == {"a/one.png", "b/one.png", "b/two.JPG", "c.gif.jpg", "predictions.json"}
    # Small ones are enlarged, so that they can be read.
    assert {Image.open(found / name).size for name in ("a/one.png", "c.gif.jpg")} == {(320, 320), (320, 240)}
    assert "32 objects with a score of at least 0 in 4 images" in done.out
    content = json.loads((found / "predictions.json").read_text())
    assert [c["name"] for c in content["categories"]] == NAMES
    assert [i["file_name"] for i in content["images"]] == ["b/one.png", "b/two.JPG", "a/one.png", "c.gif"]
    records, _ = load_coco_json(str(found / "predictions.json"), str(images))
    predictor = Predictor(run)
    for record in records:
        wanted = predictor(record["file_name"])
        assert [a["score"] for a in record["annotations"]] == pytest.approx(
            wanted["scores"].tolist(), abs=1e-5
        )
        assert {len(a["keypoints"]) for a in record["annotations"]} == {12}
        assert all(a["segmentation"]["size"] == [record["height"], SIDE] for a in record["annotations"])


def test_a_config_and_weights_will_do_too_and_only_what_is_wanted_is_drawn(call, run, images):
    command = ["--config-file", run / "config.yaml", images / "a", "--output", "found"]
    call(*command, "--no-pictures", "MODEL.WEIGHTS", run / "model_final.pth")
    assert os.listdir("found") == ["predictions.json"]
    call(*command, "--threshold", 1, "MODEL.WEIGHTS", run / "model_final.pth")
    drawn = read_image("found/one.png")
    call(run, images / "a", "--output", "more", "--threshold", 0)
    assert not torch.equal(drawn, read_image("more/one.png"))
    assert len(json.loads(Path("found/predictions.json").read_text())["annotations"]) == 8


def test_an_image_that_cannot_be_read_is_named_and_left_out(call, run, images):
    (images / "a" / "bad.jpg").write_text("no image")
    done = call(run, images / "a", "--output", "found", code=1)
    assert "left out: cannot read the image file" in done.err and "bad.jpg" in done.err
    assert sorted(os.listdir("found")) == ["one.png", "predictions.json"]


def test_mistakes_in_the_command_line_are_answered_in_a_sentence(call, run, images, tmp_path):
    (tmp_path / "empty").mkdir()
    for args, said in (
        ([run], "name the images, folders or patterns to look at"),
        ([tmp_path / "nowhere", images], "nowhere' does not exist: expected the OUTPUT_DIR"),
        ([run, "*.bmp"], "*.bmp: there is no such image, folder or pattern"),
        ([run, tmp_path / "empty"], "there is no image in"),
        ([run, images, "MODEL.WEIGTHS", "b"], "unknown key MODEL.WEIGTHS"),
        ([run, images, "--threshold", 2], "--threshold must be from 0 to 1"),
        ([run, images / "a", "--output", images / "a"], "would overwrite"),
        (["--config-file", run / "config.yaml", images], "MODEL.WEIGHTS is empty"),
        (["--config-file", run / "config.yaml", images, "MODEL.WEIGHTS", "x.pth"], "there is no such file"),
        (["SEED", 3], "name a run's folder"),
    ):
        done = call(*args, code=2)
        assert said in done.err and "Traceback" not in done.err, done.err
