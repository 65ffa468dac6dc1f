"""Mixed precision: plaintrain.precision, and what every detector makes of it."""

import math

import pytest
import torch
from model_helpers import ARCHITECTURES, build, make_sample, randomize_predictions, two_samples, two_squares
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator

from plaintrain.checkpoint import DetectionCheckpointer
from plaintrain.config import get_cfg
from plaintrain.precision import build_amp, build_autocast, build_grad_scaler, check_finite
from plaintrain.solver import build_gradient_clipper, build_optimizer
from plaintrain.utils.errors import UserError
from plaintrain.utils.events import EventStorage

# ---- autocast --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_autocast_computes_in_the_precision_each_time_it_is_entered(precision):
    layer, autocast = nn.Linear(2, 2), build_autocast(True, precision, "cpu")
    for _ in range(2):
        with autocast:
            assert layer(torch.ones(1, 2)).dtype == getattr(torch, precision)
        assert layer(torch.ones(1, 2)).dtype == torch.float32


def test_weights_that_change_between_two_forward_passes_are_cast_anew():
    layer, autocast = nn.Linear(1, 1), build_autocast(True, "bfloat16", "cpu")
    for value in (1.0, 2.0):
        nn.init.constant_(layer.weight, value)
        nn.init.zeros_(layer.bias)
        with autocast:
            assert layer(torch.ones(1, 1)).item() == value


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_disabled_autocast_does_nothing(precision):
    with build_autocast(False, precision, "cpu"):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize("enabled", [False, True])
def test_another_precision_is_refused_with_those_there_are(enabled):
    words = "SOLVER.AMP.PRECISION is 'float32', but must be one of float16, bfloat16"
    with pytest.raises(UserError, match=words):
        build_autocast(enabled, "float32", "cpu")


def test_bfloat16_on_a_gpu_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(UserError, match="SOLVER.AMP.PRECISION is bfloat16, which this GPU .* use float16"):
        build_autocast(True, "bfloat16", "cuda")
    build_autocast(False, "bfloat16", "cuda")
    build_autocast(True, "bfloat16", "cpu")


@pytest.mark.parametrize(
    ("enabled", "precision", "casts_to", "scales"),
    [
        (False, "float16", torch.float32, False),
        (False, "bfloat16", torch.float32, False),
        (True, "float16", torch.float16, True),
        (True, "bfloat16", torch.bfloat16, False),
    ],
)
def test_the_config_decides_over_autocast_and_the_scaler(enabled, precision, casts_to, scales):
    cfg, layer = get_cfg(), nn.Linear(2, 2)
    cfg.merge_from_list(["SOLVER.AMP.ENABLED", enabled, "SOLVER.AMP.PRECISION", precision])
    autocast, scaler = build_amp(cfg, layer)
    with autocast:
        assert layer(torch.ones(1, 2)).dtype == casts_to
    assert scaler.is_enabled() == scales == build_grad_scaler(enabled, precision, "cpu").is_enabled()
    loss = torch.ones(())
    assert (scaler.scale(loss) is loss) == (not scales)


# ---- detectors -------------------------------------------------------------------------------


def make_detector(name):
    """A detector whose scores and boxes differ widely, and two samples for it."""
    torch.manual_seed(0)
    model = build(*ARCHITECTURES[name])
    randomize_predictions(model, 0.1)
    return model, two_squares() if name == "ssd" else two_samples()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_losses_in_mixed_precision_are_near_those_of_float32(name, precision):
    model, samples = make_detector(name)
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
    for parameter in model.parameters():
        assert parameter.grad is None or (
            parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
        )


HEADS = {
    "faster_rcnn": {"rpn.head", "roi_heads.box_predictor"},
    "proposals": {"rpn.head"},
    "retinanet": {"head"},
    "fcos": {"head"},
    "ssd": {"head"},
}
HEADS["mask_keypoint_rcnn"] = HEADS["faster_rcnn"] | {
    "roi_heads.mask_predictor",
    "roi_heads.keypoint_predictor",
}


def tensors(value):
    """All tensors in dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [tensor for item in items for tensor in tensors(item)]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("is_train", [False, True])
def test_what_comes_out_of_every_head_is_float32(name, is_train):
    model, samples = make_detector(name)
    model.train(is_train)
    inside, outside = {}, {}

    def note(head):
        def hook(module, inputs, outputs):
            outside.setdefault(head, set()).update(tensor.dtype for tensor in tensors(outputs))

        return hook

    for head in HEADS[name]:
        model.get_submodule(head).register_forward_hook(note(head))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: inside.update({output.dtype: 1}))
    with torch.no_grad(), build_autocast(True, "bfloat16", "cpu"):
        model(samples)
    assert outside == {head: {torch.float32} for head in HEADS[name]}
    assert set(inside) == {torch.bfloat16}


# One box for each place and class, and none of them left out.
ALL_BOXES = (
    "MODEL.ANCHOR_GENERATOR.SIZES", [[32]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]],
    "MODEL.RPN.NMS_THRESH", 1.0,
    "TEST.DETECTIONS_PER_IMAGE", 10_000,
)  # fmt: skip
NO_NMS = {
    "faster_rcnn": ("MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.0, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    "proposals": (),
    "retinanet": ("MODEL.RETINANET.NMS_THRESH_TEST", 1.0, "MODEL.RETINANET.TOPK_CANDIDATES_TEST", 10_000),
    "fcos": ("MODEL.FCOS.NMS_THRESH_TEST", 1.0, "MODEL.FCOS.TOPK_CANDIDATES_TEST", 10_000),
    "ssd": (
        "MODEL.SSD.NMS_THRESH_TEST", 1.0,
        "MODEL.SSD.TOPK_CANDIDATES_TEST", 10_000,
        "INPUT.FIXED_SIZE", (32, 768),
        "MODEL.TINY.NUM_LEVELS", 1,
        "MODEL.SSD.ASPECT_RATIOS", [[2]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_NMS)
def test_boxes_in_bfloat16_are_those_of_float32_to_a_pixel(name):
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


def test_masks_and_keypoints_in_bfloat16_are_near_those_of_float32():
    model, samples = make_detector("mask_keypoint_rcnn")
    model.eval()
    # The same boxes for both: only the heads are compared.
    found = {}
    for enabled in (False, True):
        with torch.no_grad(), build_autocast(enabled, "bfloat16", "cpu"):
            found[enabled] = model(samples)
    for low, exact in zip(found[True], found[False], strict=True):
        assert low["masks"].dtype == torch.bool and low["keypoints"].dtype == torch.float32
        near = [(a, b) for a in range(20) for b in range(20) if _same(low, a, exact, b)]
        assert len(near) > 10
        agree = [(low["masks"][a] == exact["masks"][b]).float().mean().item() for a, b in near]
        assert sum(agree) / len(agree) > 0.97


def _same(low, a, exact, b):
    same_label = low["labels"][a] == exact["labels"][b]
    return same_label and (low["boxes"][a] - exact["boxes"][b]).abs().max() < 0.5


@pytest.mark.parametrize("name", ["faster_rcnn", "proposals", "retinanet", "fcos", "ssd"])
@pytest.mark.parametrize("training", [False, True])
def test_anchors_are_the_same_in_every_precision(name, training):
    size = (64, 768)
    model = build(*ARCHITECTURES[name], "INPUT.FIXED_SIZE", size if name == "ssd" else ())
    model.train(training)
    seen = []
    for module in model.modules():
        if isinstance(module, AnchorGenerator | DefaultBoxGenerator):
            module.register_forward_hook(lambda module, inputs, anchors: seen.append(anchors))
    for precision in ("float16", "bfloat16", None):
        with build_autocast(precision is not None, precision or "float16", "cpu"):
            model([make_sample(*size, [[600, 4, 640, 50]], [0])])
    assert len(seen) == 3
    for anchors in seen:
        assert anchors[0].dtype == torch.float32 and anchors[0].equal(seen[-1][0])
    assert seen[-1][0].max() > 700


# ---- the scaler ------------------------------------------------------------------------------


def training(precision="float16", **solver):
    """(layer with a weight of 1, optimizer, scaler, function that takes a step with a gradient)."""
    cfg, layer = get_cfg(), nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    settings = {
        "BASE_LR": 0.1,
        "WEIGHT_DECAY": 0.0,
        "AMP.ENABLED": True,
        "AMP.PRECISION": precision,
        **solver,
    }
    for key, value in settings.items():
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
        return norm["grad_norm"].item()

    return layer, optimizer, scaler, step


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_step_with_infinite_gradients_is_left_out_and_the_scale_halved(optimizer):
    layer, _, scaler, step = training(OPTIMIZER=optimizer)
    assert scaler.get_scale() == 2.0**16
    step(1.0)
    before = layer.weight.item()
    for times in (1, 2):
        assert not math.isfinite(step(float("inf")))
        assert layer.weight.item() == before and scaler.get_scale() == 2.0 ** (16 - times)
    step(1.0)
    assert layer.weight.item() < before and scaler.get_scale() == 2.0**14


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
@pytest.mark.parametrize("left_out", [0, 1, 3])
def test_steps_that_are_left_out_at_the_start_change_nothing_later(settings, left_out, monkeypatch):
    """Fused SGD makes its buffers in the first step of all, and that one often overflows."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(1e30))
    layer, optimizer, _, step = training(**settings)
    plain, plain_optimizer, _, plain_step = training("bfloat16", **settings)
    if "MOMENTUM_SCHEDULE" in settings:
        for group in (*optimizer.param_groups, *plain_optimizer.param_groups):
            group["momentum"] = 0.5
    for _ in range(left_out):
        step(float("inf"))
    for gradient in (1.0, -0.5, 2.0):
        step(gradient)
        plain_step(gradient)
        assert layer.weight.item() == pytest.approx(plain.weight.item(), abs=1e-6)


@pytest.mark.parametrize("kind", ["value", "norm", "full_model"])
def test_gradients_are_clipped_in_their_own_scale(kind):
    clip = {
        "CLIP_GRADIENTS.ENABLED": True,
        "CLIP_GRADIENTS.CLIP_TYPE": kind,
        "CLIP_GRADIENTS.CLIP_VALUE": 2.0,
    }
    layer, _, scaler, step = training(MOMENTUM=0.0, **clip)
    assert step(0.5) == pytest.approx(0.5)
    assert layer.weight.item() == pytest.approx(1 - 0.1 * 0.5)
    assert step(30.0) == pytest.approx(30.0)
    assert layer.weight.item() == pytest.approx(1 - 0.1 * 0.5 - 0.1 * 2.0)
    assert scaler.get_scale() == 2.0**16


def test_float16_training_on_the_cpu_learns():
    model, samples = make_detector("retinanet")
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.AMP.ENABLED", True, "SOLVER.BASE_LR", 0.002])
    optimizer, (autocast, scaler) = build_optimizer(cfg, model), build_amp(cfg, model)
    totals = []
    for _ in range(12):
        optimizer.zero_grad()
        with autocast:
            losses = sum(model(samples).values())
        scaler.scale(losses).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        totals.append(losses.item())
    assert all(map(math.isfinite, totals)) and totals[-1] < 0.9 * totals[0]


# ---- the scaler in a checkpoint --------------------------------------------------------------


def checkpointer(folder, layer, optimizer, scaler):
    return DetectionCheckpointer(layer, str(folder), optimizer=optimizer, scaler=scaler)


def test_a_resumed_run_goes_on_with_the_scale_it_had(tmp_path):
    layer, optimizer, scaler, step = training()
    step(float("inf"))
    step(1.0)
    checkpointer(tmp_path, layer, optimizer, scaler).save("model_0000001", iteration=1)
    other, other_optimizer, other_scaler, other_step = training()
    checkpointer(tmp_path, other, other_optimizer, other_scaler).resume_or_load("", resume=True)
    assert other_scaler.get_scale() == scaler.get_scale() == 2.0**15
    assert other_scaler.state_dict() == scaler.state_dict()
    # The next growth too comes when it would have come.
    for run in (step, other_step):
        run(0.5)
    assert other_scaler.state_dict() == scaler.state_dict() and other.weight.equal(layer.weight)


@pytest.mark.parametrize(("before", "after"), [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_the_precision_may_change_when_a_run_is_resumed(tmp_path, before, after):
    layer, optimizer, scaler, step = training(before)
    step(1.0)
    checkpointer(tmp_path, layer, optimizer, scaler).save("model_0000000", iteration=0)
    other, optimizer, scaler, step = training(after)
    checkpointer(tmp_path, other, optimizer, scaler).resume_or_load("", resume=True)
    assert other.weight.equal(layer.weight)
    assert scaler.get_scale() == (2.0**16 if after == "float16" else 1.0)
    step(1.0)
    assert other.weight.item() == pytest.approx(0.9 - 0.1 * 1.9)


# ---- what is finite --------------------------------------------------------------------------


def scaler_at(scale):
    """A scaler for float16 with this scale; None: a disabled one."""
    scaler = build_grad_scaler(scale is not None, "float16", "cpu")
    if scaler.is_enabled():
        scaler.scale(torch.ones(()))
        scaler._scale.fill_(scale)
    return scaler


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_infinite_norm_stops_the_run_only_without_a_scaler(value):
    for scale in (None, 2.0**16):
        storage = EventStorage(7)
        storage.put_scalars(total_loss=torch.tensor(1.0), grad_norm=torch.tensor(value))
        if scale is None:
            with pytest.raises(FloatingPointError, match=r"grad_norm became NaN .* iteration 7.*: a\.jpg"):
                check_finite(storage, scaler_at(None), lambda iteration: ["a.jpg"])
        else:
            check_finite(storage, scaler_at(scale))
            # Nor does it come back later.
            check_finite(storage, scaler_at(None))


@pytest.mark.parametrize("scale", [None, 2.0**16])
def test_an_infinite_loss_stops_the_run_with_and_without_a_scaler(scale):
    storage = EventStorage()
    storage.put_scalars(grad_norm=float("inf"))
    storage.step()
    storage.put_scalars(loss_cls=torch.tensor(float("nan")), grad_norm=float("nan"))
    with pytest.raises(FloatingPointError) as error:
        check_finite(storage, scaler_at(scale), lambda iteration: [f"{iteration}.jpg"])
    if scale is not None:
        assert "iteration 1;" in str(error.value) and "1.jpg" in str(error.value)
        assert str(error.value).startswith("loss_cls became")


def test_the_scale_is_stored_where_there_is_one():
    storage = EventStorage(3)
    check_finite(storage, scaler_at(None))
    assert storage.latest() == {}
    check_finite(storage, scaler_at(2.0**9))
    assert storage.latest() == {"amp_scale": (512.0, 3)}
    assert storage.smoothing_hints() == {"amp_scale": False}


def test_a_scale_that_helps_no_more_stops_the_run():
    check_finite(EventStorage(), scaler_at(2.0**-14))
    with pytest.raises(
        FloatingPointError, match=r"float16 even at a loss scale of 3\.1e-05.*BASE_LR.*bfloat16"
    ):
        check_finite(EventStorage(), scaler_at(2.0**-15))


def test_gradients_that_overflow_for_ever_stop_the_run_in_the_end():
    _, _, scaler, step = training()
    storage = EventStorage()
    for iteration in range(40):
        storage.put_scalars(total_loss=1.0, grad_norm=step(float("inf")))
        storage.step()
        if iteration == 29:
            check_finite(storage, scaler)
    with pytest.raises(FloatingPointError, match="gradients overflow in float16"):
        check_finite(storage, scaler)
