"""Pretrained weights: plaintrain.checkpoint.pretrained."""

import functools
import os
import pickle
import socket
import threading
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from model_helpers import ARCHITECTURES, RESNET18, RETINANET18, SMALL_HEAD, build
from torchvision.models import detection

from plaintrain.checkpoint import DetectionCheckpointer, pretrained
from plaintrain.checkpoint.detectron2 import convert_from_detectron2, convert_to_detectron2
from plaintrain.checkpoint.pretrained import download_weights, load_weights, locate_weights, read_state_dict
from plaintrain.utils.errors import UserError
from plaintrain.utils.text import escape_controls

RESNET = (*RESNET18, *SMALL_HEAD)
TINY_RCNN, RETINANET = ARCHITECTURES["faster_rcnn"], ARCHITECTURES["retinanet"]
SSD = (*ARCHITECTURES["ssd"], "MODEL.TINY.NUM_LEVELS", 1, "MODEL.SSD.ASPECT_RATIOS", [[2, 3]])
SSDLITE = (*SSD, "MODEL.SSD.HEAD_NAME", "SSDLiteHead")


def make_model(*keys, num_classes=3):
    """A small R-CNN on ResNet-18, or what the keys say."""
    names = ("ROI_HEADS", "RETINANET", "FCOS", "SSD")
    numbers = [part for name in names for part in (f"MODEL.{name}.NUM_CLASSES", num_classes)]
    return build(*(keys or RESNET), *numbers)


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
def cache(tmp_path, monkeypatch):
    """The folder of torch.hub's cache, empty; downloads fail after a short stall."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(pretrained, "_TIMEOUT", 0.1)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def downloads(cache, monkeypatch):
    """[(address, file in the cache, hash prefix)] of what is downloaded: no tensors."""
    calls = []
    monkeypatch.setattr(pretrained, "_is_cached", os.path.isfile)
    monkeypatch.setattr(pretrained, "_download", lambda *a: calls.append(a) or open(a[1], "wb").close())
    return calls


assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


def assert_body_holds(model, imagenet):
    """The body of a model holds a ResNet's weights, statistics included."""
    body = dict(model.backbone.body.state_dict())
    assert_same(body, {name: imagenet[name] for name in body})


def warnings_of(log):
    return "\n".join(record.getMessage() for record in log.records if record.levelname == "WARNING")


@pytest.mark.parametrize(
    ("keys", "wrap"),
    [
        ([], lambda state: state),
        (TINY_RCNN, lambda state: {"model": state, "iteration": 7}),
        (TINY_RCNN, lambda state: {"state_dict": state}),
        (RETINANET, lambda state: {f"module.{name}": value for name, value in state.items()}),
        (RETINANET, lambda state: {f"_orig_mod.model.{name}": value for name, value in state.items()}),
    ],
    ids=["bare", "model", "state_dict", "wrapped", "compiled"],
)
def test_complete_file_loads_all_tensors(tmp_path, monkeypatch, log, keys, wrap):
    model = make_model(*keys)
    state = randomize(model.state_dict())
    torch.save(wrap(state), tmp_path / "w.pth")
    monkeypatch.setenv("HOME", str(tmp_path))
    load_weights(model, "~/w.pth")
    assert_same(dict(model.state_dict()), state)
    assert f"loaded {len(state)} of the model's {len(state)} tensors" in log.text
    assert not warnings_of(log)


def test_entries_other_than_tensors_are_skipped(tmp_path):
    torch.save({0: torch.ones(1), "a": torch.ones(1), "b": "text"}, tmp_path / "w.pth")
    assert list(read_state_dict(str(tmp_path / "w.pth"))) == ["a"]
    arrays = {"a": np.ones(3, np.float32), "b": np.array(["x"]), "c": np.array([{}, None], dtype=object)}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(arrays))
    assert list(read_state_dict(str(tmp_path / "w.pkl"))) == ["a"]


COUNTER = {"backbone.body.bn1.num_batches_tracked": torch.tensor(3)}
NAN = "backbone.body.conv1.weight"
OTHER = {"encoder.weight": torch.ones(3)}


@pytest.mark.parametrize(
    # The content is bytes, or an object for torch.save; None: a folder.
    ("name", "content", "words"),
    [
        ("w.pth", None, r"MODEL.WEIGHTS is .*w\.pth.* no such file"),
        ("w.pth", b"", r"cannot read .*w\.pth"),
        ("w.pkl", b"not weights", r"cannot read .*w\.pkl"),
        ("w.pth", b"PK\x03\x04 cut off", r"cannot read .*w\.pth"),
        ("w.pkl", b"\x80\x04]", r"cannot read .*w\.pkl"),
        ("w.pth", [1, 2], r"w\.pth must hold a dict of weights, got list"),
        ("w.pth", {}, r"none of the 0 tensors in .*w\.pth"),
        ("w.pth", OTHER, r"none of the 1 tensors.*w\.pth.*encoder\.weight"),
        ("w.pth", COUNTER, r"none of the 1 tensors"),
        (
            "w.pth",
            b"<html>Not found</html>",
            r"cannot read .*w\.pth: it is damaged, or not a file of torch\.save",
        ),
        ("w.pth", b"Not found", r"cannot read .*w\.pth: it is damaged, or not"),
        ("w.pth", {"a.weight": torch.eye(2).to_sparse()}, r"w\.pth: a\.weight must be a dense tensor"),
        ("w.pth", {"a.bias": torch.tensor(1.0)}, r"w\.pth: a\.bias must not be empty"),
        ("w.pth", {"a": torch.zeros(1).expand(2**45)}, r"w\.pth: a must have the size of its data"),
        ("w.pth", {NAN: torch.full((64, 3, 7, 7), torch.nan)}, r"w\.pth must hold finite weights, got NaN"),
    ],
)
def test_files_without_weights_of_the_model_are_rejected(tmp_path, name, content, words):
    if content is None:
        (tmp_path / name).mkdir()
    elif isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match=words):
        load_weights(make_model(), str(tmp_path / name))


@pytest.mark.parametrize("protocol", [None, 0, 2, 4])
@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"model": {"conv1.weight": bomb}}])
def test_pickle_that_would_run_code_is_rejected_and_does_not_run(tmp_path, protocol, wrap):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    content = wrap(Bomb())
    path = tmp_path / ("w.pth" if protocol is None else "w.pkl")
    if protocol is None:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    words = "" if protocol is None else ".*could run code"
    with pytest.raises(UserError, match=f"cannot read .*{path.name}{words}"):
        read_state_dict(str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_imagenet_resnet_loads_into_the_backbone(tmp_path, imagenet, norm, log):
    torch.save(imagenet, tmp_path / "resnet18.pth")
    model = make_model(*RESNET, "MODEL.RESNETS.NORM", norm)
    head = model.roi_heads.box_predictor.cls_score.weight.clone()
    load_weights(model, str(tmp_path / "resnet18.pth"))
    assert_body_holds(model, imagenet)
    assert model.roi_heads.box_predictor.cls_score.weight.equal(head)
    assert "unused      backbone.body.fc.weight" in log.text
    assert "missing     rpn.head.conv.0.0.weight" in log.text


def test_head_for_another_number_of_classes_is_skipped_with_a_table(tmp_path, log):
    state = randomize(make_model(*TINY_RCNN).state_dict())
    torch.save(state, tmp_path / "three.pth")
    model = make_model(*TINY_RCNN, num_classes=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_weights(model, str(tmp_path / "three.pth"))
    expected = {name: before[name] if "box_predictor" in name else state[name] for name in state}
    assert_same(dict(model.state_dict()), expected)
    table = warnings_of(log)
    assert f"loaded {len(state) - 4} of the model's {len(state)}" in table
    assert "roi_heads.box_predictor.cls_score.weight: [4, 32], the model has [3, 32]" in table
    assert "roi_heads.box_predictor.bbox_pred.bias: [16], the model has [12]" in table
    assert table.count("other shape") == 4


@pytest.mark.parametrize(("classes", "warns"), [(["a", "b"], False), (["b", "c"], True), (None, False)])
def test_weights_of_other_classes_are_warned_about(tmp_path, log, classes, warns):
    model = torch.nn.Linear(3, 2)
    torch.save({"model": model.state_dict(), "class_names": ["a", "b"]}, tmp_path / "w.pth")
    load_weights(model, str(tmp_path / "w.pth"), classes)
    assert ("was trained for the classes ['a', 'b'], here they are ['b', 'c']" in log.text) == warns
    with pytest.raises(UserError, match="the same in another order"):
        load_weights(model, str(tmp_path / "w.pth"), ["b", "a"])


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_first_detectors_of_torchvision_need_eps_0(downloads, tmp_path, log, eps):
    model = make_model(*RESNET, "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RESNETS.NORM_EPS", eps)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    load_weights(model, str(tmp_path / "mine.pth"))
    assert not warnings_of(log)
    path = download_weights("torchvision://fasterrcnn_resnet50_fpn/COCO_V1")
    os.replace(tmp_path / "mine.pth", path)
    load_weights(model, "torchvision://fasterrcnn_resnet50_fpn/COCO_V1")
    assert ("MODEL.RESNETS.NORM_EPS must be 0" in warnings_of(log)) == (eps > 0)


def test_locate_weights_knows_every_detector_of_torchvision_and_rejects_other_names():
    for builder in torchvision.models.list_models(module=detection):
        url = locate_weights(f"torchvision://{builder}/COCO_V1")
        assert url == torchvision.models.get_model_weights(builder).COCO_V1.url
    for name, words in {
        "torchvision://resnet5/IMAGENET1K_V1": ["no model 'resnet5'", "did you mean resnet50"],
        "torchvision://resnet18/IMAGENET1K_V9": ["IMAGENET1K_V1", "'IMAGENET1K_V9'"],
        "torchvision://resnet18": ["IMAGENET1K_V1"],
    }.items():
        with pytest.raises(UserError) as error:
            locate_weights(name)
        assert all(word in str(error.value) for word in [name, *words])


def test_weights_are_downloaded_once_and_torchvisions_are_verified(downloads, tmp_path, monkeypatch):
    monkeypatch.setenv("PLAINTRAIN_WEIGHTS", str(tmp_path))
    names = [
        "torchvision://resnet18/IMAGENET1K_V1",
        "https://example.invalid/a/mine-20240131.pth",
        "http://example.invalid/b/mine-20240131.pth?x=1",
        "detectron2://a/1/model_final.pkl",
        "detectron2://a/2/model_final.pkl",
    ]
    paths = [download_weights(name) for name in names + names]
    assert paths[:5] == paths[5:] and len(set(paths)) == 5
    detectron2 = "https://dl.fbaipublicfiles.com/detectron2/a"
    assert [url for url, *_ in downloads] == [
        torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url,
        *names[1:3],
        f"{detectron2}/1/model_final.pkl",
        f"{detectron2}/2/model_final.pkl",
    ]
    # torchvision's file names end in the start of their SHA-256; digits in other names are no checksum.
    assert [prefix for *_, prefix in downloads] == ["f37072fd", "", "", "", ""]
    assert paths[0] == os.path.join(torch.hub.get_dir(), "checkpoints", "resnet18-f37072fd.pth")
    assert [path for _, path, _ in downloads] == paths[:5]
    (tmp_path / "a" / "1").mkdir(parents=True)
    (tmp_path / "a" / "1" / "model_final.pkl").touch()
    assert download_weights(names[3]) == str(tmp_path / "a/1/model_final.pkl")


WEIGHTS = pickle.dumps({"a": np.ones(99)})
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n%s\r\n\r\n"
COMPLETE = OK % (b"Content-Length: %d" % len(WEIGHTS)) + WEIGHTS
MOVED = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: %s\r\n\r\n"


def serve(*pieces):
    """Start a server that sends bytes, with pauses of some seconds, and return a URL."""
    server = socket.create_server(("127.0.0.1", 0))

    def answer():
        while True:
            with server.accept()[0] as connection:
                connection.recv(9999)
                for piece in pieces:
                    time.sleep(piece) if isinstance(piece, float) else connection.sendall(piece)

    threading.Thread(target=answer, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}/w.pkl"


@pytest.mark.parametrize(
    # What a server sends, or another URL.
    ("answer", "words"),
    [
        ([COMPLETE[:200], 0.2], "timed out"),
        ([COMPLETE[:-9]], f"after {len(WEIGHTS) - 9} of {len(WEIGHTS)} bytes"),
        ([OK % b"Content-Length: 6", b"<html>"], "text/html, 6 bytes) holds no weights"),
        ([OK % b"Transfer-Encoding: chunked", b"zz\r\n"], "IncompleteRead"),
        ([MOVED % b"/w.pkl"], "infinite loop"),
        ([MOVED % b"file:///etc/passwd"], "not allowed"),
        ([b"SSH-2.0\r\n"], "BadStatusLine: SSH-2.0"),
        ("HTTP://[::1/\ud800.pkl", "Invalid IPv6 URL"),
        ("https://download.pytorch.org/", "Is a directory"),
    ],
)
def test_failed_download_leaves_no_file_and_explains_how_to_use_a_local_one(cache, answer, words):
    url = answer if isinstance(answer, str) else serve(*answer)
    with pytest.raises(UserError, match=r"cannot download the weights .*set MODEL\.WEIGHTS to") as error:
        download_weights(url)
    assert escape_controls(url) in str(error.value) and words in str(error.value)
    assert os.listdir(cache) == []


def test_download_may_be_slow_replaces_an_unreadable_file_and_checks_the_hash(cache, log, monkeypatch):
    url = serve(COMPLETE[:50], 0.07, COMPLETE[50:90], 0.07, COMPLETE[90:])
    path = download_weights(url)
    os.truncate(path, 100)
    assert download_weights(url) == path and list(read_state_dict(path)) == ["a"]
    assert "deleting it and downloading it again" in log.text
    with pytest.raises(OSError, match="SHA-256 must begin with 01234567"):
        pretrained._download(url, path, "01234567")
    monkeypatch.setattr(pretrained, "build_progress_bar", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        download_weights(url + "?2")
    assert os.listdir(cache) == [os.path.basename(path)]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_backbone_of_detectron2_loads_from_a_pickle_of_any_protocol(tmp_path, imagenet, protocol):
    body = {f"backbone.body.{k}": v for k, v in imagenet.items() if not k.startswith("fc.")}
    there = convert_to_detectron2(body)
    arrays = {name.removeprefix("backbone.bottom_up."): value.numpy() for name, value in there.items()}
    content = {"model": {**arrays, "fc.bias": np.ones(10)}, "__author__": "me", "matching_heuristics": True}
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    model = make_model()
    load_weights(model, str(tmp_path / "R-18.pkl"))
    assert_body_holds(model, imagenet)


def test_backbone_of_caffe2_loads_from_blobs(tmp_path):
    names = {
        "conv1_w": "conv1.weight",
        "res_conv1_bn_s": "bn1.weight",
        "res2_0_branch1_w": "layer1.0.downsample.0.weight",
        "res2_0_branch1_bn_b": "layer1.0.downsample.1.bias",
        "res5_2_branch2c_w": "layer4.2.conv3.weight",
        "res4_5_branch2b_bn_s": "layer3.5.bn2.weight",
    }
    blobs = {name: np.ones(1, np.float32) for name in names}
    content = {"blobs": {**blobs, "pred_w": np.ones(5, np.float32), "lr": np.float32(0.1)}, "cfg": "text"}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content, protocol=2))
    expected = [f"backbone.body.{name}" for name in names.values()]
    converted = convert_from_detectron2(read_state_dict(str(tmp_path / "R-50.pkl")))
    assert list(converted) == [*expected, "pred_w"]


COCO = detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
COCO_80 = [name for name in COCO[1:] if name != "N/A"]
# Neither in COCO's order nor next to each other; "dog" is after the first hole.
NAMES = ["dog", "person", "toothbrush"]
LOGITS = "head.classification_head.cls_logits"
BOXES = "roi_heads.box_predictor"
# architecture -> (keys, {layer: rows per class and anchor}, anchors a location, background).
COCO_HEADS = {
    "rcnn": (
        [*TINY_RCNN, "MODEL.MASK_ON", True],
        {f"{BOXES}.cls_score": 1, f"{BOXES}.bbox_pred": 4, "roi_heads.mask_predictor.mask_fcn_logits": 1},
        1,
        True,
    ),
    "retinanet": (RETINANET, {LOGITS: 1}, 6, False),
    "fcos": (ARCHITECTURES["fcos"], {LOGITS: 1}, 1, False),
    "ssd": (SSD, {"head.classification_head.module_list.0": 1}, 6, True),
    "ssdlite": (SSDLITE, {"head.classification_head.module_list.0.1": 1}, 6, True),
}


def assert_holds_rows(model, state, layers, anchors, rows):
    """Check that layers with rows for each class hold some of them, and all others what was saved."""
    for name, value in model.state_dict().items():
        expected, per_class = state[name], layers.get(name.rpartition(".")[0])
        if per_class is not None:
            expected = expected.unflatten(0, (anchors, -1, per_class))[:, rows].flatten(0, 2)
        assert value.equal(expected), name


@pytest.mark.parametrize("architecture", COCO_HEADS)
def test_heads_of_torchvisions_91_classes_are_reduced_by_name(tmp_path, log, architecture):
    keys, layers, anchors, background = COCO_HEADS[architecture]
    state = randomize(make_model(*keys, num_classes=90 if background else 91).state_dict())
    torch.save(state, tmp_path / "coco.pth")
    model = make_model(*keys)
    # As a training does it.
    checkpointer = DetectionCheckpointer(model, str(tmp_path / "run"), metadata={"class_names": NAMES})
    checkpointer.resume_or_load(str(tmp_path / "coco.pth"), resume=False)
    rows = [0] * background + [COCO.index(name) for name in NAMES]
    assert_holds_rows(model, state, layers, anchors, rows)
    assert not warnings_of(log)
    assert "kept the dataset's 3 of the 91 classes of the weights" in log.text


@pytest.mark.parametrize(
    ("num_there", "class_names"),
    # Rows of 80 classes under torchvision's names could be any 80 classes.
    [(90, ["dog", "unicorn", "person"]), (90, ["dog", "N/A", "person"]), (90, None), (80, NAMES)],
)
def test_head_is_skipped_if_its_classes_may_not_be_cocos(tmp_path, log, num_there, class_names):
    keys, layers, *_ = COCO_HEADS["rcnn"]
    state = randomize(make_model(*keys, num_classes=num_there).state_dict())
    torch.save(state, tmp_path / "coco.pth")
    model = make_model(*keys)
    load_weights(model, str(tmp_path / "coco.pth"), class_names)
    assert all(
        f"other shape {layer}.{name}:" in warnings_of(log) for layer in layers for name in ("weight", "bias")
    )
    assert warnings_of(log).count("other shape") == 6


@pytest.mark.parametrize("names", [NAMES, COCO_80[::-1]], ids=["three", "reversed"])
@pytest.mark.parametrize(
    ("keys", "layers", "anchors"),
    [(RESNET, {f"{BOXES}.cls_score": 1, f"{BOXES}.bbox_pred": 4}, 1), (RETINANET18, {LOGITS: 1}, 9)],
    ids=["rcnn", "retinanet"],
)
def test_heads_of_detectron2s_80_classes_are_reduced_by_name(tmp_path, log, names, keys, layers, anchors):
    state = randomize(make_model(*keys, num_classes=80).state_dict())
    there = convert_to_detectron2(state)
    torch.save({"model": there, "optimizer": {"state": {}}, "iteration": 7}, tmp_path / "d2.pth")
    model = make_model(*keys, num_classes=len(names))
    load_weights(model, str(tmp_path / "d2.pth"), names)
    rows = [COCO_80.index(name) for name in names]
    if keys is RESNET:
        rows = [0, *(row + 1 for row in rows)]
        # Detectron2 has no box of the background.
        for name in ("weight", "bias"):
            state[f"{BOXES}.bbox_pred.{name}"][:4] = 0
    assert_holds_rows(model, state, layers, anchors, rows)
    assert not warnings_of(log)
