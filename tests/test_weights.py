"""Pretrained weights: plaintrain.weights."""

import collections
import os
import pickle
import urllib.error

import numpy as np
import pytest
import torch
import torchvision

from plaintrain import weight_detectron2
from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.config import get_cfg
from plaintrain.modeling import build_model
from plaintrain.modeling.build import num_classes_key
from plaintrain.utils.errors import UserError
from plaintrain.weights import load_weights, locate_weights, read_state_dict, read_weights

torch.set_num_threads(1)

_SMALL_RCNN = [
    "MODEL.DEVICE", "cpu",
    "MODEL.RESNETS.DEPTH", 18,
    "MODEL.RESNETS.NORM", "BN",
    "MODEL.FPN.OUT_CHANNELS", 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 16,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 3,
    "MODEL.BACKBONE.FREEZE_AT", 0,
]  # fmt: skip
_SMALL_RETINANET = [
    "MODEL.DEVICE", "cpu",
    "MODEL.META_ARCHITECTURE", "RetinaNet",
    "MODEL.BACKBONE.NAME", "build_tiny_backbone",
    "MODEL.BACKBONE.FREEZE_AT", 0,
    "MODEL.TINY.CHANNELS", [8, 8],
    "MODEL.TINY.OUT_CHANNELS", 32,
    "MODEL.ANCHOR_GENERATOR.SIZES", [[32]],
]  # fmt: skip


def make_model(keys):
    cfg = get_cfg()
    cfg.merge_from_list(keys)
    return build_model(cfg)


def make_rcnn(num_classes=3, more=()):
    return make_model([*_SMALL_RCNN, "MODEL.ROI_HEADS.NUM_CLASSES", num_classes, *more])


def make_retinanet(num_classes=3):
    return make_model([*_SMALL_RETINANET, "MODEL.RETINANET.NUM_CLASSES", num_classes])


def randomize(state):
    """The same names and shapes, every floating-point value random and positive."""
    return {
        name: torch.rand(value.shape) + 0.5 if value.is_floating_point() else value
        for name, value in state.items()
    }


@pytest.fixture(scope="module")
def imagenet():
    """The state dict of a torchvision ResNet-18 with random values."""
    torch.manual_seed(0)
    return randomize(torchvision.models.resnet18(weights=None).state_dict())


@pytest.fixture
def no_download(monkeypatch):
    """Reaching for the network fails the test."""

    def refuse(url, *args, **kwargs):
        pytest.fail(f"tried to download {url}")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


@pytest.fixture
def hub(tmp_path, no_download):
    """torch.hub's folder of checkpoints, empty, in a temporary TORCH_HOME."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def assert_body_equals(model, imagenet, ignore=()):
    """The body of a model holds a ResNet's weights, statistics included."""
    body = model.backbone.body.state_dict()
    assert set(body) == {name for name in imagenet if not name.startswith("fc.")}
    for name, value in body.items():
        if not name.endswith(ignore):
            assert value.equal(imagenet[name]), name


def warnings_of(log):
    return "\n".join(record.getMessage() for record in log.records if record.levelname == "WARNING")


# ---- local files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model": s, "iteration": 7}, lambda s: {"state_dict": s}]
)
def test_a_local_file_is_loaded_whole(tmp_path, log, wrap):
    state = randomize(make_rcnn().state_dict())
    torch.save(wrap(state), tmp_path / "w.pth")
    model = make_rcnn()
    load_weights(model, str(tmp_path / "w.pth"))
    for name, value in model.state_dict().items():
        assert value.equal(state[name]), name
    assert f"loaded {len(state)} of the model's {len(state)} tensors" in log.text
    assert not warnings_of(log)


def test_a_path_may_start_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.pth").write_bytes(b"")
    assert locate_weights("~/w.pth") == (str(tmp_path / "w.pth"), None)


def test_names_of_a_model_saved_inside_a_wrapper_are_understood(tmp_path):
    state = randomize(make_retinanet().state_dict())
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "w.pth")
    model = make_retinanet()
    load_weights(model, str(tmp_path / "w.pth"))
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())


def test_a_missing_file_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"MODEL.WEIGHTS.*missing\.pth"):
        locate_weights(str(tmp_path / "missing.pth"))
    with pytest.raises(UserError, match=r"MODEL.WEIGHTS"):
        locate_weights(str(tmp_path))


@pytest.mark.parametrize("name", ["w.pth", "w.pkl"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut off", b"\x80\x04]"])
def test_a_damaged_file_is_a_clear_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_state_dict(str(tmp_path / name))


@pytest.mark.parametrize("content", [[1, 2], "text", torch.ones(2)])
def test_a_file_without_a_state_dict_is_a_clear_error(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth"):
        read_state_dict(str(tmp_path / "w.pth"))


# ---- ImageNet backbones ------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_an_imagenet_resnet_goes_into_the_backbone(tmp_path, imagenet, norm, log):
    torch.save(imagenet, tmp_path / "resnet18.pth")
    model = make_rcnn(more=["MODEL.RESNETS.NORM", norm])
    head = model.roi_heads.box_predictor.cls_score.weight.clone()
    load_weights(model, str(tmp_path / "resnet18.pth"))
    if norm == "FrozenBN":
        imagenet = {k: v for k, v in imagenet.items() if not k.endswith("num_batches_tracked")}
    assert_body_equals(model, imagenet)
    assert model.roi_heads.box_predictor.cls_score.weight.equal(head)
    assert "not used      backbone.body.fc.weight" in log.text
    assert "missing there rpn.head.conv.0.0.weight" in log.text


def test_an_imagenet_mobilenet_goes_into_the_backbone(tmp_path):
    state = randomize(torchvision.models.mobilenet_v3_large(weights=None).state_dict())
    torch.save(state, tmp_path / "mobilenet.pth")
    model = make_rcnn(
        more=[
            "MODEL.BACKBONE.NAME", "build_mobilenet_v3_large_fpn_backbone",
            "MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64]],
        ]
    )  # fmt: skip
    load_weights(model, str(tmp_path / "mobilenet.pth"))
    body = model.backbone.body.state_dict()
    assert set(body) == {name.removeprefix("features.") for name in state if name.startswith("features.")}
    for name, value in body.items():
        assert value.equal(state["features." + name]), name


# ---- names of older torchvision versions -------------------------------------------------------


def test_weights_of_a_faster_rcnn_of_an_older_torchvision_load_whole(tmp_path, log):
    state = randomize(make_rcnn().state_dict())
    old = {name.replace("rpn.head.conv.0.0.", "rpn.head.conv."): value for name, value in state.items()}
    assert "rpn.head.conv.weight" in old and "rpn.head.conv.bias" in old
    torch.save(old, tmp_path / "old.pth")
    model = make_rcnn()
    load_weights(model, str(tmp_path / "old.pth"))
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert not warnings_of(log)


def test_weights_of_a_retinanet_of_an_older_torchvision_load_whole(tmp_path, log):
    state = randomize(make_retinanet().state_dict())
    old = {}
    for name, value in state.items():
        for head in ("classification_head", "regression_head"):
            for i in range(4):
                # Convolutions and ReLUs alternated.
                name = name.replace(f"head.{head}.conv.{i}.0.", f"head.{head}.conv.{2 * i}!.")
        old[name.replace("!", "")] = value
    assert {f"head.regression_head.conv.{i}.weight" for i in (0, 2, 4, 6)} <= set(old)
    torch.save(old, tmp_path / "old.pth")
    model = make_retinanet()
    load_weights(model, str(tmp_path / "old.pth"))
    for name, value in model.state_dict().items():
        assert value.equal(state[name]), name
    assert not warnings_of(log)


# ---- other heads and other models --------------------------------------------------------------


def test_a_head_for_another_number_of_classes_is_skipped_with_a_table(tmp_path, log):
    state = randomize(make_rcnn(num_classes=3).state_dict())
    torch.save(state, tmp_path / "three.pth")
    model = make_rcnn(num_classes=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_weights(model, str(tmp_path / "three.pth"))
    differing = {
        f"roi_heads.box_predictor.{p}.{q}" for p in ("cls_score", "bbox_pred") for q in ("weight", "bias")
    }
    for name, value in model.state_dict().items():
        assert value.equal(before[name] if name in differing else state[name]), name
    table = warnings_of(log)
    assert f"loaded {len(state) - 4} of the model's {len(state)}" in table
    assert "roi_heads.box_predictor.cls_score.weight: [4, 16] there, [3, 16] here" in table
    assert "roi_heads.box_predictor.bbox_pred.bias: [16] there, [12] here" in table
    assert table.count("other shape") == 4


def test_weights_of_which_nothing_fits_are_an_error(tmp_path):
    torch.save({"encoder.layer.weight": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"none of the 1 tensors.*other\.pth.*encoder\.layer\.weight"):
        load_weights(make_retinanet(), str(tmp_path / "other.pth"))
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match=r"empty\.pth"):
        load_weights(make_retinanet(), str(tmp_path / "empty.pth"))


def test_weights_of_which_only_counters_fit_are_an_error(tmp_path, imagenet):
    torch.save({"bn1.num_batches_tracked": imagenet["bn1.num_batches_tracked"]}, tmp_path / "counter.pth")
    with pytest.raises(UserError, match=r"counter\.pth"):
        load_weights(make_rcnn(), str(tmp_path / "counter.pth"))


# ---- torchvision:// and http:// ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchvision://resnet5/IMAGENET1K_V1", ["no model 'resnet5'", "nearest is resnet50"]),
        ("torchvision://resnet18/IMAGENET1K_V9", ["IMAGENET1K_V1", "'IMAGENET1K_V9'"]),
        ("torchvision://resnet18", ["IMAGENET1K_V1"]),
    ],
)
def test_a_name_that_torchvision_does_not_know_is_a_clear_error(name, words):
    with pytest.raises(UserError) as error:
        locate_weights(name)
    assert name in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_torchvision_weights_come_from_torch_hubs_cache(hub, imagenet):
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    assert locate_weights("torchvision://resnet18/IMAGENET1K_V1") == (None, url)
    torch.save(imagenet, hub / os.path.basename(url))
    model = make_rcnn()
    load_weights(model, "torchvision://resnet18/IMAGENET1K_V1")
    assert_body_equals(model, imagenet)


def test_detection_weights_of_torchvision_are_known_by_name():
    url = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.url
    assert locate_weights("torchvision://fasterrcnn_resnet50_fpn/COCO_V1") == (None, url)


def test_a_cached_file_that_would_run_code_is_refused_and_does_not_run(hub, tmp_path):
    path = hub / os.path.basename(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url)
    torch.save({"conv1.weight": Bomb(tmp_path / "ran")}, path)
    with pytest.raises(UserError, match="cannot read"):
        load_weights(make_retinanet(), "torchvision://resnet18/IMAGENET1K_V1")
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


def test_addresses_that_end_alike_do_not_share_a_cached_file(hub, imagenet, monkeypatch):
    other = {name: value + 1 for name, value in imagenet.items()}
    content = {"https://example.invalid/a/mine.pth": imagenet, "http://example.invalid/b/mine.pth?x=1": other}
    calls = []

    def download(url, path, hash_prefix=None):
        calls.append(url)
        torch.save(content[url], path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        for url, weights in content.items():
            model = make_rcnn()
            load_weights(model, url)
            assert_body_equals(model, weights)
    assert calls == list(content)


def test_what_is_not_cached_is_downloaded_once_and_checked(hub, imagenet, monkeypatch):
    calls = []

    def download(url, path, hash_prefix=None, **kwargs):
        calls.append((url, hash_prefix))
        torch.save(imagenet, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        load_weights(make_rcnn(), "torchvision://resnet18/IMAGENET1K_V1")
    # torchvision's file names end in the start of their SHA-256.
    assert calls == [(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url, "f37072fd")]


def test_digits_in_the_name_of_somebody_elses_file_are_no_checksum(hub, imagenet, monkeypatch):
    prefixes = []

    def download(url, path, hash_prefix=None):
        prefixes.append(hash_prefix)
        torch.save(imagenet, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    load_weights(make_rcnn(), "https://example.invalid/run-20240131.pth")
    assert prefixes == [None]


def test_a_download_that_fails_is_a_clear_error(hub, monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(UserError, match=r"https://example\.invalid/w\.pth.*no route to host"):
        load_weights(make_retinanet(), "https://example.invalid/w.pth")


# ---- Detectron2's files ------------------------------------------------------------------------


def to_detectron2(name):
    """torchvision's name of a ResNet's parameter -> Detectron2's."""
    parts = name.split(".")
    if parts[0] in ("conv1", "bn1"):
        return "stem.conv1." + ("norm." if parts[0] == "bn1" else "") + parts[-1]
    stage, block = f"res{int(parts[0][-1]) + 1}", parts[1]
    if parts[2] == "downsample":
        return f"{stage}.{block}.shortcut." + ("norm." if parts[3] == "1" else "") + parts[-1]
    number = parts[2][-1]
    return f"{stage}.{block}.conv{number}." + ("norm." if parts[2].startswith("bn") else "") + parts[-1]


def to_caffe2(name):
    """torchvision's name of a ResNet's parameter -> Caffe2's (as in the MSRA models)."""
    parts = name.split(".")
    is_norm = parts[-2].startswith("bn") or parts[-3:-1] == ["downsample", "1"]
    ending = {"weight": "_bn_s", "bias": "_bn_b"}[parts[-1]] if is_norm else "_w"
    if parts[0] in ("conv1", "bn1"):
        return ("res_conv1" if is_norm else "conv1") + ending
    branch = "1" if parts[2] == "downsample" else "2" + "abc"[int(parts[2][-1]) - 1]
    return f"res{int(parts[0][-1]) + 1}_{parts[1]}_branch{branch}{ending}"


def test_the_two_translations_of_this_test_give_the_published_names():
    expected = {
        "conv1.weight": ("stem.conv1.weight", "conv1_w"),
        "bn1.weight": ("stem.conv1.norm.weight", "res_conv1_bn_s"),
        "layer1.0.downsample.0.weight": ("res2.0.shortcut.weight", "res2_0_branch1_w"),
        "layer1.0.downsample.1.bias": ("res2.0.shortcut.norm.bias", "res2_0_branch1_bn_b"),
        "layer4.2.conv3.weight": ("res5.2.conv3.weight", "res5_2_branch2c_w"),
        "layer3.5.bn2.weight": ("res4.5.conv2.norm.weight", "res4_5_branch2b_bn_s"),
    }
    assert {name: (to_detectron2(name), to_caffe2(name)) for name in expected} == expected


def detectron2_pickle(imagenet, style, protocol):
    """Bytes of a ResNet's weights as Detectron2 or Caffe2 stores them."""
    body = {name: value for name, value in imagenet.items() if not name.startswith("fc.")}
    if style == "detectron2":
        model = {to_detectron2(name): value.numpy() for name, value in body.items()}
        content = {
            "model": {**model, "fc.bias": np.ones(10)},
            "__author__": "me",
            "matching_heuristics": True,
        }
    else:
        keep = {k: v for k, v in body.items() if k.endswith(("weight", "bias"))}
        blobs = {to_caffe2(name): value.numpy() for name, value in keep.items()}
        content = {
            "blobs": {**blobs, "pred_w": np.ones((10, 5), np.float32), "lr": np.float32(0.1)},
            "cfg": "text",
        }
    return pickle.dumps(content, protocol=protocol)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("style", ["detectron2", "caffe2"])
def test_detectron2_weights_come_from_the_mirror_folder(
    tmp_path, monkeypatch, imagenet, no_download, style, protocol
):
    name = "ImageNetPretrained/mine/R-18.pkl"
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_bytes(detectron2_pickle(imagenet, style, protocol))
    monkeypatch.setenv("PLAINTRAIN_WEIGHTS", str(tmp_path))
    assert locate_weights("detectron2://" + name) == (str(path), None)
    model = make_rcnn()
    load_weights(model, "detectron2://" + name)
    # Caffe2's frozen norms have no statistics: the model keeps its own.
    ignore = ("running_mean", "running_var") if style == "caffe2" else ()
    assert_body_equals(model, imagenet, ignore)
    if ignore:
        assert model.backbone.body.bn1.running_mean.eq(0).all()
        assert model.backbone.body.bn1.running_var.eq(1).all()


def test_an_fpn_of_detectron2_is_understood(tmp_path):
    names = {
        "backbone.bottom_up.res3.0.conv1.weight": "backbone.body.layer2.0.conv1.weight",
        "backbone.bottom_up.stem.conv1.norm.running_mean": "backbone.body.bn1.running_mean",
        "backbone.fpn_lateral2.weight": "backbone.fpn.inner_blocks.0.0.weight",
        "backbone.fpn_lateral5.bias": "backbone.fpn.inner_blocks.3.0.bias",
        "backbone.fpn_output4.weight": "backbone.fpn.layer_blocks.2.0.weight",
    }
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({name: np.ones(1) for name in names}))
    assert set(read_weights(str(tmp_path / "model.pkl"))) == set(names.values())
    assert set(names.values()) <= set(make_rcnn().state_dict())


def test_detectron2_weights_that_are_not_mirrored_have_an_address_and_a_cache_name_of_their_own(
    tmp_path, monkeypatch, hub
):
    monkeypatch.setenv("PLAINTRAIN_WEIGHTS", str(tmp_path))
    _, url = locate_weights("detectron2://a/1/model_final.pkl")
    assert url == "https://dl.fbaipublicfiles.com/detectron2/a/1/model_final.pkl"
    monkeypatch.delenv("PLAINTRAIN_WEIGHTS")
    assert locate_weights("detectron2://a/1/model_final.pkl") == (None, url)
    got = []

    def download(url, path, **kwargs):
        got.append(path)
        with open(path, "wb") as f:
            pickle.dump({"stem.conv1.weight": np.ones((64, 3, 7, 7), np.float32)}, f)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for name in ("a/1/model_final.pkl", "a/2/model_final.pkl", "a/1/model_final.pkl"):
        load_weights(make_rcnn(), "detectron2://" + name)
    assert len(got) == len(set(got)) == 2


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("where", ["top", "value", "key of a dict", "ordered"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, protocol, where):
    bomb = Bomb(tmp_path / "ran")
    content = {
        "top": bomb,
        "value": {"model": {"stem.conv1.weight": np.ones(2), "x": bomb}},
        "key of a dict": {"model": {"stem.conv1.weight": np.ones(2)}, "cfg": [{"a": bomb}]},
        "ordered": collections.OrderedDict(x=bomb),
    }[where]
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(UserError, match=r"w\.pkl.*refused"):
        read_state_dict(str(path))
    assert not (tmp_path / "ran").exists()
    pickle.loads(path.read_bytes())  # noqa: S301 - its own bytes
    assert (tmp_path / "ran").exists()


def test_arrays_that_are_no_numbers_are_a_clear_error_or_left_out(tmp_path):
    content = {
        "stem.conv1.weight": np.ones((64, 3, 7, 7), np.float32),
        "names": np.array(["a", "b"]),
        "objects": np.array([{}, None], dtype=object),
    }
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
    try:
        found = read_state_dict(str(tmp_path / "w.pkl"))
    except UserError as e:
        assert "w.pkl" in str(e)
    else:
        assert {name: value.shape for name, value in found.items()} == {"stem.conv1.weight": (64, 3, 7, 7)}


# ---- detectors for COCO's classes --------------------------------------------------------------

COCO = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
COCO_80 = [name for name in COCO[1:] if name != "N/A"]
# Neither in COCO's order nor next to each other; "dog" stands after the first hole.
NAMES = ["dog", "person", "toothbrush"]
_TINY = [
    *["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.NAME", "build_tiny_backbone", "MODEL.BACKBONE.FREEZE_AT", 0],
    *[
        "MODEL.TINY.CHANNELS",
        [8, 8],
        "MODEL.TINY.OUT_CHANNELS",
        32,
        "MODEL.ANCHOR_GENERATOR.SIZES",
        [[16, 32]],
    ],
    *["MODEL.ROI_BOX_HEAD.FC_DIM", 8, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8],
    *["MODEL.SSD.STEPS", [], "MODEL.SSD.SCALES", [0.3, 0.6], "MODEL.SSD.ASPECT_RATIOS", [[2, 3]]],
    *["INPUT.FIXED_SIZE", (64, 64)],
]
_SSD = ["MODEL.META_ARCHITECTURE", "SSD"]
_FCOS = ["MODEL.META_ARCHITECTURE", "FCOS", "MODEL.ANCHOR_GENERATOR.SIZES", [[32]]]
_FCOS += ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]]]
_LOGITS = "head.classification_head.cls_logits"
_BOXES = "roi_heads.box_predictor"
# architecture -> (keys, {layer: rows per class and anchor}, anchors a location, background).
COCO_HEADS = {
    "rcnn": (
        ["MODEL.MASK_ON", True],
        {f"{_BOXES}.cls_score": 1, f"{_BOXES}.bbox_pred": 4, "roi_heads.mask_predictor.mask_fcn_logits": 1},
        1,
        True,
    ),
    "retinanet": (["MODEL.META_ARCHITECTURE", "RetinaNet"], {_LOGITS: 1}, 6, False),
    "fcos": (_FCOS, {_LOGITS: 1}, 1, False),
    "ssd": (_SSD, {"head.classification_head.module_list.0": 1}, 6, True),
    "ssdlite": (
        [*_SSD, "MODEL.SSD.HEAD_NAME", "SSDLiteHead"],
        {"head.classification_head.module_list.0.1": 1},
        6,
        True,
    ),
}


def make_tiny(keys, num_classes):
    cfg = get_cfg()
    cfg.merge_from_list([*_TINY, *keys])
    cfg.merge_from_list([num_classes_key(cfg), num_classes])
    return build_model(cfg)


@pytest.mark.parametrize("architecture", COCO_HEADS)
def test_heads_of_torchvisions_91_classes_are_reduced_by_name(tmp_path, log, architecture):
    keys, layers, anchors, background = COCO_HEADS[architecture]
    state = randomize(make_tiny(keys, 90 if background else 91).state_dict())
    torch.save(state, tmp_path / "coco.pth")
    model = make_tiny(keys, len(NAMES))
    load_weights(model, str(tmp_path / "coco.pth"), NAMES)
    rows = [0] * background + [COCO.index(name) for name in NAMES]
    for name, value in model.state_dict().items():
        per_class = layers.get(name.rpartition(".")[0])
        if per_class is None:
            assert value.equal(state[name]), name
            continue
        assert len(state[name]) == anchors * 91 * per_class
        for a in range(anchors):
            for k, row in enumerate(rows):
                here, there = ((a * n + i) * per_class for n, i in ((len(rows), k), (91, row)))
                assert value[here : here + per_class].equal(state[name][there : there + per_class]), name
    assert not warnings_of(log)
    assert "of the 91 classes of the weights the dataset's 3 are kept" in log.text


@pytest.mark.parametrize("class_names", [["dog", "unicorn", "person"], ["dog", "N/A", "person"], None])
def test_a_head_is_left_out_if_a_class_is_not_among_cocos(tmp_path, log, class_names):
    keys, layers, *_ = COCO_HEADS["rcnn"]
    state = randomize(make_tiny(keys, 90).state_dict())
    torch.save(state, tmp_path / "coco.pth")
    model = make_tiny(keys, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_weights(model, str(tmp_path / "coco.pth"), class_names)
    for name, value in model.state_dict().items():
        left_out = name.rpartition(".")[0] in layers
        assert value.equal(before[name] if left_out else state[name]), name
    assert warnings_of(log).count("other shape") == 6


def test_a_head_for_other_classes_is_not_reduced(tmp_path, log):
    # Rows of 80 classes under torchvision's names could be any 80 classes.
    torch.save(randomize(make_tiny([], 80).state_dict()), tmp_path / "eighty.pth")
    load_weights(make_tiny([], 3), str(tmp_path / "eighty.pth"), NAMES)
    assert warnings_of(log).count("other shape") == 4


@pytest.mark.parametrize("architecture", ["rcnn", "retinanet"])
@pytest.mark.parametrize("names", [NAMES, COCO_80, COCO_80[::-1]], ids=["three", "all", "reversed"])
@pytest.mark.parametrize("ending", [".pkl", ".pth"])
def test_heads_of_detectron2s_80_classes_are_taken_by_name(tmp_path, log, architecture, names, ending):
    keys = [*_SMALL_RCNN]
    if architecture == "retinanet":
        keys += ["MODEL.META_ARCHITECTURE", "RetinaNet"]
        keys += ["MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"]
    whole, model = ([*keys, "MODEL.ROI_HEADS.NUM_CLASSES", n] for n in (80, len(names)))
    whole, model = (make_model([*k, "MODEL.RETINANET.NUM_CLASSES", k[-1]]) for k in (whole, model))
    state = randomize(whole.state_dict())
    there = weight_detectron2.to_detectron2(state)
    path = tmp_path / f"model_final{ending}"
    if ending == ".pkl":
        arrays = {name: value.numpy() for name, value in there.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "me"}))
    else:
        torch.save({"model": there, "optimizer": {"state": {}}, "iteration": 7}, path)
    load_weights(model, str(path), names)
    rows = torch.tensor([COCO_80.index(name) for name in names])
    layer = _LOGITS if architecture == "retinanet" else f"{_BOXES}.cls_score"
    value, before = model.state_dict()[f"{layer}.weight"], state[f"{layer}.weight"]
    if architecture == "retinanet":
        assert value.unflatten(0, (3, -1)).equal(before.unflatten(0, (3, -1))[:, rows])
    else:
        assert value[0].equal(before[0]) and value[1:].equal(before[1:][rows])
        boxes = model.state_dict()[f"{_BOXES}.bbox_pred.bias"].view(-1, 4)
        assert boxes[1:].equal(state[f"{_BOXES}.bbox_pred.bias"].view(-1, 4)[1:][rows])
        assert not boxes[0].any()
    assert model.state_dict()["backbone.body.conv1.weight"].equal(state["backbone.body.conv1.weight"])
    assert not warnings_of(log)


def test_the_checkpointer_hands_the_class_names_on(tmp_path):
    state = randomize(make_tiny([], 90).state_dict())
    torch.save(state, tmp_path / "coco.pth")
    model = make_tiny([], 1)
    checkpointer = DetectionCheckpointer(model, str(tmp_path / "run"))
    checkpointer.resume_or_load(str(tmp_path / "coco.pth"), resume=False, class_names=["dog"])
    found = model.state_dict()[f"{_BOXES}.cls_score.bias"]
    assert found.equal(state[f"{_BOXES}.cls_score.bias"][[0, COCO.index("dog")]])


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_torchvisions_first_detectors_want_no_eps(hub, log, eps):
    keys = [*_SMALL_RCNN, "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RESNETS.NORM_EPS", eps]
    model = make_model([*keys, "MODEL.ROI_HEADS.NUM_CLASSES", 3])
    url = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.url
    torch.save(model.state_dict(), hub / os.path.basename(url))
    load_weights(model, "torchvision://fasterrcnn_resnet50_fpn/COCO_V1")
    assert ("MODEL.RESNETS.NORM_EPS 0" in warnings_of(log)) == (eps > 0)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_other_weights_say_nothing_about_eps(tmp_path, log, norm):
    model = make_rcnn(more=["MODEL.RESNETS.NORM", norm])
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    load_weights(model, str(tmp_path / "mine.pth"))
    assert not warnings_of(log)


@pytest.mark.parametrize(
    "model",
    [
        "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn",
        "fasterrcnn_mobilenet_v3_large_320_fpn", "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2",
        "keypointrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2",
        "fcos_resnet50_fpn", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large",
    ],
)  # fmt: skip
def test_every_detector_of_torchvision_has_an_address(model):
    path, url = locate_weights(f"torchvision://{model}/COCO_V1")
    assert path is None and url.startswith("https://download.pytorch.org/models/")


def test_names_that_are_no_text_are_left_out(tmp_path):
    torch.save({0: torch.ones(1), "a": torch.ones(1)}, tmp_path / "w.pth")
    assert list(read_state_dict(str(tmp_path / "w.pth"))) == ["a"]


@pytest.mark.parametrize(("classes", "warns"), [(["a", "b"], False), (["b", "c"], True), (None, False)])
def test_weights_of_other_classes_are_warned_about(tmp_path, log, classes, warns):
    model = torch.nn.Linear(3, 2)
    torch.save({"model": model.state_dict(), "class_names": ["a", "b"]}, tmp_path / "w.pth")
    load_weights(model, str(tmp_path / "w.pth"), classes)
    assert ("was trained for the classes ['a', 'b'], here they are ['b', 'c']" in log.text) == warns
    with pytest.raises(UserError, match="the same in another order"):
        load_weights(model, str(tmp_path / "w.pth"), ["b", "a"])
