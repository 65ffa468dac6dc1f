"""plaintrain/predict.py and scripts/predict.py: a run's folder, an image in, detections out."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from model_helpers import ARCHITECTURES, make_cfg
from PIL import Image
from processes import run_script
from script_helpers import assert_refused, script_output

from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.checkpoint.torchvision import COCO_NAMES
from plaintrain.config.defaults import split_overrides
from plaintrain.data import build_detection_test_loader
from plaintrain.data.datasets.coco import read_coco_json
from plaintrain.data.datasets.shapes import load_shapes
from plaintrain.data.images import read_image
from plaintrain.modeling import build_model, build_tta
from plaintrain.predict import Predictor, to_tensor
from plaintrain.solver.ema import ModelEMA
from plaintrain.utils.errors import UserError
from plaintrain.visualization.drawing import scale_longer_side

NAMES = ["ring", "block", "wedge"]
SIDE = 64
# The same with a dataset that is there.
HERE = ["DATASETS.TEST", ("shapes_val",), "DATASETS.TRAIN", ("shapes_val",)]
IMAGE = load_shapes("val", 8, SIDE, SIDE + 16)[0][5]["file_name"]


def config(*opts):
    """A Mask and Keypoint R-CNN that takes milliseconds, and a dataset that is not there."""
    few = ["TEST.DETECTIONS_PER_IMAGE", 8, "MODEL.RPN.POST_NMS_TOPK_TEST", 20, "DATALOADER.NUM_WORKERS", 0]
    few += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    few += ["INPUT.MIN_SIZE_TEST", 96, "TEST.AUG.MIN_SIZES", [64, 96]]
    cfg = make_cfg(*ARCHITECTURES["mask_keypoint_rcnn"], *few)
    gone = {"gone": {"FORMAT": "coco", "JSON": "/no/such.json", "IMAGE_ROOT": "/no"}}
    cfg.merge_from_other_cfg({"DATASETS": {"DECLARE": gone, "TRAIN": ("gone",), "TEST": ("gone",)}})
    cfg.merge_from_list(list(opts))
    return cfg


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with two checkpoints of random weights."""
    folder, cfg = tmp_path_factory.mktemp("run"), config()
    metadata = {"class_names": NAMES, "config": cfg.dump()}
    for seed, name in ((1, "model_0000001"), (2, "model_final")):
        torch.manual_seed(seed)
        DetectionCheckpointer(build_model(cfg), str(folder), metadata=metadata).save(name, iteration=seed)
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("views", [False, True])
def test_predictor_has_the_detections_of_an_evaluation(run, views):
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
    assert predictor.skeleton == ((0, 1), (1, 2), (2, 3), (3, 0))


def test_predictor_accepts_images_of_any_type_and_pixel_range(run, tmp_path):
    predictor, tensor = Predictor(run), read_image(IMAGE)
    array = tensor.permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "a.png")
    wanted = predictor(IMAGE)
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), array, tensor):
        assert same(predictor(image), wanted)
    assert same(predictor(array[:, ::-1]), predictor(array[:, ::-1].copy()))
    twice = predictor.batch([array, tensor])
    assert torch.allclose(twice[1]["boxes"], wanted["boxes"], atol=1e-3) and predictor.batch([]) == []
    # The range of pixels is that of the config.
    deep = np.random.default_rng(0).integers(0, 4096, (SIDE, SIDE), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    wanted = predictor((deep >> 4).astype(np.uint8))
    assert not same(predictor(tmp_path / "deep.png"), wanted)
    predictor = Predictor(run, opts=["INPUT.PIXEL_RANGE", "[0, 4095]"])
    for image in (tmp_path / "deep.png", Image.fromarray(deep), Image.open(tmp_path / "deep.png")):
        assert same(predictor(image), wanted)
    exact, mixed = (Predictor(run, opts=["TEST.AMP", amp])(IMAGE)["scores"] for amp in (False, True))
    assert not torch.equal(exact, mixed) and torch.allclose(exact, mixed.float(), atol=0.05)


def test_to_tensor_reads_images_as_a_dataset_and_rejects_other_types(tmp_path):
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
    for image, words in (
        ("nowhere.jpg", "nowhere.jpg does not exist"),
        (np.zeros((4, 4, 3)), r"got Tensor torch.float64 \[3, 4, 4\]"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), r"got Tensor torch.uint8 \[2, 4, 4\]"),
        (4, "got int"),
    ):
        with pytest.raises(UserError, match=words):
            to_tensor(image)


def test_predictor_loads_the_last_readable_checkpoint_or_a_single_file(run, tmp_path):
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
    with pytest.raises(UserError, match="run holds no checkpoint; its training has not saved one"):
        Predictor(folder)
    # A checkpoint alone holds its config and names.
    shutil.copy(run / "model_final.pth", tmp_path / "mine.pth")
    predictor = Predictor(tmp_path / "mine.pth")
    # The dataset is not there.
    assert predictor.class_names == NAMES and predictor.skeleton == ()
    assert same(predictor(IMAGE), Predictor(run)(IMAGE))
    torch.save({"model": predictor.model.state_dict()}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match="bare.pth holds no config"):
        Predictor(tmp_path / "bare.pth")
    named = Predictor(predictor.cfg, str(tmp_path / "bare.pth"))
    assert named.class_names == ["class 0", "class 1", "class 2"]


def test_averaged_weights_are_used_as_in_an_evaluation(tmp_path):
    cfg = config("MODEL.EMA.ENABLED", True)
    torch.manual_seed(0)
    model = build_model(cfg)
    ema = ModelEMA(model)
    ema.update(model)
    bias = model.roi_heads.box_predictor.cls_score.bias
    with torch.no_grad():
        bias += 1
    metadata = {"class_names": NAMES}
    DetectionCheckpointer(model, str(tmp_path), metadata=metadata, ema=ema).save("model_0000000", iteration=0)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    for evaluate, added in (("averaged", 0), ("raw", 1)):
        taken = Predictor(tmp_path, opts=["MODEL.EMA.EVALUATE", evaluate]).model
        assert torch.equal(taken.roi_heads.box_predictor.cls_score.bias, bias - 1 + added)


@pytest.mark.parametrize(("classes", "keypoints", "names"), [(80, 0, COCO_NAMES), (1, 17, ["person"])])
def test_published_weights_have_the_names_of_coco(tmp_path, classes, keypoints, names):
    opts = ["MODEL.KEYPOINT_ON", keypoints > 0, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", keypoints]
    cfg = config("MODEL.ROI_HEADS.NUM_CLASSES", classes, *opts)
    torch.save(build_model(cfg).state_dict(), tmp_path / "published.pth")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0
    predictor = Predictor(cfg, str(tmp_path / "published.pth"))
    found = predictor.cfg.MODEL.ROI_HEADS.NUM_CLASSES
    assert predictor.class_names == names and found == classes
    assert ((15, 13) in predictor.skeleton) == (keypoints > 0)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0


@pytest.mark.parametrize(
    ("place", "opts", "words"),
    [
        ("run", ["MODEL.ROI_HEADS.NUM_CLASSES", 5], "CLASSES must be 3 for .*final.pth .ring, .*, got 5"),
        ("run", ["MODEL.ROI_BOX_HEAD.FC_DIM", 17], "is missing .* of the model's parameters.*architecture"),
        ("run", ["TEST.AUG.ENABLED", True], "left and right keypoints.*; set TEST.AUG.FLIP False"),
        ("nowhere", [], "'.*nowhere' does not exist; expected a run folder"),
        (".", [], "has no config.yaml; expected a run folder"),
        (config(), [], "MODEL.WEIGHTS is empty"),
    ],
)
def test_predictor_rejects_weights_and_options(run, tmp_path, monkeypatch, place, opts, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        Predictor(run if place == "run" else place, opts=opts)


def test_split_overrides_tells_names_from_keys():
    words = ["TEST", "IMG.JPG", "a b", "TEST.AMP", "True", "SEED", "3"]
    assert split_overrides(words) == (words[:3], words[3:]) and split_overrides([]) == ([], [])
    # A key that is misspelled is one all the same.
    assert split_overrides(["a", "MODEL.WEIGTHS", "b"]) == (["a"], ["MODEL.WEIGTHS", "b"])


@pytest.fixture
def images(tmp_path, write_image):
    """A folder with images of the same name in two folders, and other kinds."""
    folder = tmp_path / "images"
    for seed, name in enumerate(("a/one.png", "b/one.png", "b/two.JPG", "c.gif")):
        write_image(folder / name, SIDE, SIDE - 16 * (seed % 2), seed)
    return folder


def test_script_draws_images_of_folders_and_patterns_and_writes_a_coco_json(run, images, tmp_path):
    inputs = [images / "b", images / "a" / "one.png", str(images / "**" / "*.gif"), images / "b" / "two.JPG"]
    found = tmp_path / "found"
    options = ["--output", found, "--score-threshold", 0, "--batch-size", 2]
    output = script_output("predict.py", run, *inputs, *options, folder=tmp_path)
    written = {path.relative_to(found).as_posix() for path in found.rglob("*.*")}
    assert written == {"a/one.png", "b/one.png", "b/two.JPG", "c.gif.jpg", "predictions.json"}
    # Small ones are enlarged, so that they can be read.
    assert {Image.open(found / name).size for name in ("a/one.png", "c.gif.jpg")} == {(320, 320), (320, 240)}
    assert "32 detections at score threshold 0 in 4 images" in output
    content = json.loads((found / "predictions.json").read_text())
    assert [c["name"] for c in content["categories"]] == NAMES
    assert [i["file_name"] for i in content["images"]] == ["b/one.png", "b/two.JPG", "a/one.png", "c.gif"]
    records, _ = read_coco_json(str(found / "predictions.json"), str(images))
    predictor = Predictor(run)
    for record in records:
        scores = predictor(record["file_name"])["scores"].tolist()
        assert [a["score"] for a in record["annotations"]] == pytest.approx(scores, abs=1e-5)
        assert {len(a["keypoints"]) for a in record["annotations"]} == {12}
        assert all(a["segmentation"]["size"] == [record["height"], SIDE] for a in record["annotations"])


def test_script_draws_detections_above_the_threshold_and_skips_bad_images(run, images, tmp_path):
    (images / "a" / "bad.jpg").write_text("no image")
    weights = ["MODEL.WEIGHTS", run / "model_final.pth"]
    command = ["predict.py", "--config-file", run / "config.yaml", images / "a"]
    for threshold in (0, 1):
        output = ["--output", tmp_path / str(threshold), "--score-threshold", threshold]
        done = run_script(*command, *output, *weights, folder=tmp_path)
        assert done.code == 1 and "Traceback" not in done.output
        assert "skipped: cannot read the image file" in done.output and "bad.jpg" in done.output
        assert sorted(os.listdir(tmp_path / str(threshold))) == ["one.png", "predictions.json"]
    everything, nothing = (read_image(str(tmp_path / name / "one.png")) for name in "01")
    assert not torch.equal(everything, nothing)
    plain = images / "a" / "one.png"
    enlarged, _ = scale_longer_side(read_image(str(plain)), {"boxes": torch.zeros(0, 4)}, 320)
    assert torch.equal(nothing, enlarged)
    assert len(json.loads((tmp_path / "1" / "predictions.json").read_text())["annotations"]) == 8
    more = ["--output", tmp_path / "no", "--no-images"]
    script_output(*command[:-1], plain, *more, *weights, folder=tmp_path)
    assert os.listdir(tmp_path / "no") == ["predictions.json"]
    # The files of two runs are not mixed.
    (tmp_path / "0" / "mine.txt").touch()
    script_output(*command[:-1], images / "b", "--output", tmp_path / "0", *weights, folder=tmp_path)
    assert sorted(os.listdir(tmp_path / "0")) == [
        "mine.txt",
        "old-1",
        "one.png",
        "predictions.json",
        "two.JPG",
    ]
    assert sorted(os.listdir(tmp_path / "0" / "old-1")) == ["one.png", "predictions.json"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["RUN"], "no images; give images, folders or patterns"),
        (["RUN", "*.bmp"], "*.bmp: no image, folder or pattern matches"),
        (["RUN", "empty"], "there is no image in"),
        (["RUN", "images", "MODEL.WEIGTHS", "b"], "unknown key MODEL.WEIGTHS"),
        (["RUN", "images", "--score-threshold", 2], "--score-threshold must be 0 to 1, got 2"),
        (["RUN", "images/a", "--output", "images/a"], "would overwrite"),
        (["--config-file", "RUN/config.yaml", "images", "MODEL.WEIGHTS", "x.pth"], "there is no such file"),
        (["SEED", 3], "no model; give a run's folder"),
    ],
)
def test_script_reports_mistakes_in_one_sentence(run, images, tmp_path, args, words):
    (tmp_path / "empty").mkdir()
    args = [str(arg).replace("RUN", str(run)) for arg in args]
    assert_refused("predict.py", args, words, tmp_path, codes=[2])
