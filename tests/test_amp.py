"""Mixed precision: plaintrain.solver.amp, and what every detector makes of it."""

import copy

import pytest
import torch
from model_helpers import ARCHITECTURES, build, make_sample, randomize_predictions, two_samples, two_squares
from torch import nn
from torch.utils._pytree import tree_leaves
from torchvision.models.detection.image_list import ImageList

from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.config import get_cfg
from plaintrain.modeling.anchors import CachedAnchorGenerator
from plaintrain.modeling.detector import keep_float32
from plaintrain.solver import build_gradient_clipper, build_optimizer
from plaintrain.solver.amp import build_amp, build_autocast
from plaintrain.utils.errors import UserError


@pytest.mark.parametrize(
    ("enabled", "precision", "casts_to", "scales"),
    [
        (False, "float16", torch.float32, False),
        (True, "float16", torch.float16, True),
        (True, "bfloat16", torch.bfloat16, False),
    ],
)
def test_build_amp_follows_the_config(enabled, precision, casts_to, scales):
    cfg, layer = get_cfg(), nn.Linear(1, 1)
    cfg.merge_from_list(["SOLVER.AMP.ENABLED", enabled, "SOLVER.AMP.PRECISION", precision])
    autocast, scaler = amp = build_amp(cfg, layer)
    for value in (1.0, 2.0):
        # Weights that change between two forward passes are cast again.
        nn.init.constant_(layer.weight, value)
        nn.init.zeros_(layer.bias)
        with autocast:
            output = layer(torch.ones(1, 1))
        assert output.dtype == casts_to and output.item() == value
        assert layer(torch.ones(1, 1)).dtype == torch.float32
    loss = torch.ones(())
    assert scaler.is_enabled() == scales and (scaler.scale(loss) is loss) == (not scales)
    assert amp.scalars() == ({"amp_scale": 2.0**16} if scales else {})


def test_build_autocast_rejects_unsupported_precisions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(UserError, match="SOLVER.AMP.PRECISION is bfloat16, which this GPU .* use float16"):
        build_autocast(True, "bfloat16", "cuda")
    build_autocast(False, "bfloat16", "cuda")
    build_autocast(True, "bfloat16", "cpu")


def make_detector(name):
    """A detector whose scores and boxes differ widely, and two samples for it."""
    torch.manual_seed(0)
    model = build(*ARCHITECTURES[name])
    randomize_predictions(model, 0.1)
    return model, two_squares() if name == "ssd" else two_samples()


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "proposals"])
def test_losses_in_mixed_precision_are_near_those_of_float32(name):
    model, samples = make_detector(name)
    precision = "bfloat16" if name in ("mask_keypoint_rcnn", "fcos") else "float16"
    found = {}
    for enabled in (False, True):
        # The same proposals and anchors are drawn.
        torch.manual_seed(1)
        with build_autocast(enabled, precision, "cpu"):
            found[enabled] = model(samples)
    assert found[True].keys() == found[False].keys()
    for loss, value in found[True].items():
        assert value.dtype == torch.float32 and value.isfinite()
        assert value.item() == pytest.approx(found[False][loss].item(), rel=0.03), loss
    sum(found[True].values()).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


HEADS = {
    "faster_rcnn": ["rpn.head", "roi_heads.box_predictor"],
    "mask_keypoint_rcnn": ["roi_heads.mask_predictor", "roi_heads.keypoint_predictor"],
    "proposals": ["rpn.head"],
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_head_outputs_are_float32_in_training_and_evaluation(name):
    model, samples = make_detector(name)
    for is_train in (True, False):
        inside, outside = set(), set()
        for head in HEADS.get(name, ["head"]):
            model.get_submodule(head).register_forward_hook(
                lambda _, inputs, outputs, seen=outside: seen.update(v.dtype for v in tree_leaves(outputs))
            )
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(lambda _, inputs, output, seen=inside: seen.add(output.dtype))
        with torch.no_grad(), build_autocast(True, "bfloat16", "cpu"):
            model.train(is_train)(samples)
        assert outside == {torch.float32} and inside == {torch.bfloat16}


# One box for each place and class, and none of them left out.
ALL_BOXES = (
    "MODEL.ANCHOR_GENERATOR.SIZES", [[32]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]],
    "MODEL.RPN.NMS_THRESH", 1.0,
    "TEST.DETECTIONS_PER_IMAGE", 10_000,
)  # fmt: skip
NO_NMS = {
    "faster_rcnn": ("MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.0, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    "retinanet": ("MODEL.RETINANET.NMS_THRESH_TEST", 1.0, "MODEL.RETINANET.TOPK_CANDIDATES_TEST", 10_000),
    "fcos": ("MODEL.FCOS.NMS_THRESH_TEST", 1.0, "MODEL.FCOS.TOPK_CANDIDATES_TEST", 10_000),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_NMS)
def test_boxes_in_bfloat16_are_within_a_pixel_of_float32(name):
    """Beyond 512, bfloat16 itself knows only every fourth pixel."""
    model = build(*ARCHITECTURES[name], *ALL_BOXES, *NO_NMS[name]).eval()
    randomize_predictions(model, 0.1)
    found = {}
    for enabled in (False, True):
        with torch.no_grad(), build_autocast(enabled, "bfloat16", "cpu"):
            (found[enabled],) = model([make_sample(32, 768)])
    assert {value.dtype for value in found[True].values()} == {torch.float32, torch.int64}
    checked = 0
    for label in found[True]["labels"].unique():
        low, exact = (found[key]["boxes"][found[key]["labels"] == label] for key in (True, False))
        low = low[(low[:, 0] > 512) & (low[:, 2] < 767)]
        apart = torch.cdist(low, exact, p=float("inf")).amin(dim=1)
        assert apart.max() < 1
        checked += len(apart)
    assert checked > 100


def test_keep_float32_converts_dicts_lists_and_tuples_at_any_depth_also_of_a_copy():
    head, low = nn.Identity(), torch.tensor([1.5], dtype=torch.bfloat16)
    keep_float32(head)
    nested = {"a": low, "b": [low, (low, {"c": low})], "d": ()}
    output = head(nested)
    assert type(output["b"]) is list and type(output["b"][1]) is tuple and output["d"] == ()
    for tensor in (head(low), output["a"], output["b"][0], output["b"][1][0], output["b"][1][1]["c"]):
        assert tensor.dtype == torch.float32 and tensor.item() == 1.5
    # What the module itself holds, and tensors of other types, stay as they are.
    assert nested["a"] is low
    for dtype in (torch.float32, torch.float64, torch.int64):
        value = torch.ones(2, dtype=dtype)
        assert head(value) is value and head({"a": [value]})["a"][0] is value
    # A copied model keeps float32, as the averaged weights do.
    head = nn.Linear(1, 1)
    keep_float32(head)
    generator, head = CachedAnchorGenerator([[32]], [[1.0]]), copy.deepcopy(head)
    features = torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16)
    assert generator(ImageList(torch.zeros(1, 3, 32, 32), [(32, 32)]), [features])[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(torch.ones(1, 1)).sum()
    assert loss.dtype == torch.float32
    loss.backward()
    assert head.weight.grad.item() == 1


def training(precision="float16", **solver):
    """(layer with a weight of 1, optimizer, scaler, function that takes a step with a gradient)."""
    cfg, layer = get_cfg(), nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    settings = {"BASE_LR": 0.1, "WEIGHT_DECAY": 0.0, "AMP.ENABLED": True, "AMP.PRECISION": precision}
    for key, value in (settings | solver).items():
        cfg.merge_from_list([f"SOLVER.{key}", value])
    optimizer, (_, scaler) = build_optimizer(cfg, layer), build_amp(cfg, layer)
    clip_gradients = build_gradient_clipper(cfg, layer)

    def step(gradient):
        """One step of the training loop with a loss of this slope; what the clipper returns."""
        optimizer.zero_grad()
        scaler.scale((layer.weight * gradient).sum()).backward()
        scaler.unscale_(optimizer)
        norm = clip_gradients()
        scaler.step(optimizer)
        scaler.update()
        return norm.item()

    return layer, optimizer, scaler, step


@pytest.mark.parametrize(
    "settings",
    [
        {"MOMENTUM": 0.9},
        {"MOMENTUM": 0.9, "NESTEROV": True},
        {"MOMENTUM": 0.0},
        {"MOMENTUM": 0.0, "MOMENTUM_SCHEDULE": [[0, 0.5]]},
        {"OPTIMIZER": "AdamW"},
    ],
)
def test_steps_skipped_at_the_start_change_nothing_later(settings, monkeypatch):
    """Fused SGD makes its buffers in the first step of all, and that one often overflows."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(1e30))
    layer, optimizer, _, step = training(**settings)
    plain, plain_optimizer, _, plain_step = training("bfloat16", **settings)
    if "MOMENTUM_SCHEDULE" in settings:
        for group in (*optimizer.param_groups, *plain_optimizer.param_groups):
            group["momentum"] = 0.5
    for _ in range(2):
        step(float("inf"))
    for gradient in (1.0, -0.5, 2.0):
        step(gradient)
        plain_step(gradient)
        assert layer.weight.item() == pytest.approx(plain.weight.item(), abs=1e-6)


@pytest.mark.parametrize(("before", "after"), [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_precision_may_change_on_resume(tmp_path, before, after):
    layer, optimizer, scaler, step = training(before)
    step(1.0)
    checkpointer = DetectionCheckpointer(layer, str(tmp_path), optimizer=optimizer, scaler=scaler)
    checkpointer.save("model_0000000", iteration=0)
    other, optimizer, scaler, step = training(after)
    checkpointer = DetectionCheckpointer(other, str(tmp_path), optimizer=optimizer, scaler=scaler)
    checkpointer.resume_or_load("", resume=True)
    assert other.weight.equal(layer.weight)
    assert scaler.get_scale() == (2.0**16 if after == "float16" else 1.0)
    step(1.0)
    assert other.weight.item() == pytest.approx(0.9 - 0.1 * 1.9)
