"""MODEL.COMPILE and MODEL.CHANNELS_LAST, of every architecture."""

import copy
import logging
from unittest import mock

import pytest
import torch
from model_helpers import ARCHITECTURES, MASK, SMALL_HEAD, TINY, build, make_sample, two_squares
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from plaintrain.modeling.backbones import fold_frozen_norms
from plaintrain.modeling.build import compile_submodules

LAST = ("MODEL.CHANNELS_LAST", True)


@pytest.fixture(autouse=True)
def fresh_compiler():
    # pytest collects what the tracer says at its lowest level, which takes most of the time.
    logging.getLogger("torch.__trace").setLevel(logging.WARNING)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.suppress_errors = False


def assert_alike(model, plain, samples):
    """Two models of the same weights have the same losses, gradients and detections."""
    losses = []
    for network in (model.train(), plain.train()):
        torch.manual_seed(0)
        losses.append(network(samples))
        sum(losses[-1].values()).backward()
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=name)
    with torch.inference_mode():
        results = model.eval()(samples), plain.eval()(samples)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_channels_last_gives_the_same_and_reaches_all_layers(name):
    plain, model = build(*ARCHITECTURES[name]), build(*ARCHITECTURES[name], *LAST)
    wide = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    seen = []
    for layer in wide:
        assert not layer.weight.is_contiguous()
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert_alike(model, plain, two_squares())
    assert len(seen) > 8 and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def make_backend():
    """A backend that leaves graphs as they are; each is a call of it."""
    return mock.Mock(side_effect=lambda graph, inputs: graph.forward)


@pytest.mark.parametrize(("name", "most"), [("faster_rcnn", 6), ("mask_keypoint_rcnn", 10), ("retinanet", 4)])
@pytest.mark.long
def test_a_compiled_model_gives_the_same_under_the_same_names(name, most, caplog):
    plain, model, backend = build(*ARCHITECTURES[name]), build(*ARCHITECTURES[name]), make_backend()
    compile_submodules(model, backend)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert_alike(model, plain, two_squares())
    # Backbone and head at least, in training and in evaluation.
    assert backend.call_count >= most
    assert "recompile_limit" not in caplog.text
    with torch.no_grad():
        copied = copy.deepcopy(model)
        before = backend.call_count
        assert len(copied.eval()(two_squares())) == 2 and backend.call_count == before


def test_other_sizes_do_not_compile_again():
    model, backend, graphs = build(*ARCHITECTURES["proposals"]), make_backend(), []
    compile_submodules(model, backend)
    for height, width in ((64, 96), (96, 64), (128, 160), (160, 96), (96, 224)):
        boxes = [[3, 4, 40, 50], [30, 10, 60, 60]]
        sum(model([make_sample(height, width, boxes, [0, 2], seed=i) for i in (1, 2)]).values()).backward()
        graphs.append(backend.call_count)
    assert 0 < graphs[0] == graphs[-1] == 1


@pytest.mark.parametrize("name", ["a part", "all"])
def test_what_cannot_be_compiled_is_logged_and_works(name, caplog):
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        raise RuntimeError("no C compiler")

    model = build(*ARCHITECTURES["proposals"])
    if name == "a part":
        compile_submodules(model, fail)
    else:
        # A platform that torch cannot compile on.
        with mock.patch("torch.compile", fail):
            compile_submodules(model)
    for _ in range(2):
        assert len(model(two_squares())) == 2
    assert "no C compiler" in caplog.text
    # The backbone, and the RPN's head in evaluation only; once each.
    assert len(calls) == 1


def test_the_config_decides_over_compiling():
    with mock.patch("torch.compile") as compiled:
        build(*TINY, *SMALL_HEAD)
        assert not compiled.called
        build(*TINY, *SMALL_HEAD, *MASK, "MODEL.COMPILE", True)
    # Backbone, RPN's head, box head and predictor, mask head and predictor.
    assert compiled.call_count == 6


def test_folded_norms_are_compiled_with_what_they_hold_at_each_step():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), FrozenBatchNorm2d(4), nn.ReLU())
    module, backend, image = copy.deepcopy(plain), make_backend(), torch.randn(2, 3, 8, 8)
    fold_frozen_norms(module)
    module.compile(backend=backend, dynamic=True)
    for value in (0.5, 2.0):
        for both in (plain, module):
            both[1].load_state_dict({name: torch.full((4,), value) for name in plain[1].state_dict()})
        for training in (True, False):
            found = module.train(training)(image)
            torch.testing.assert_close(found, plain(image), rtol=1e-4, atol=1e-5)
    assert backend.call_count == 2


@pytest.mark.long
def test_a_compiler_that_fails_in_the_backward_pass_is_logged(caplog):
    from torch._inductor import compile_fx

    if not hasattr(compile_fx, "compile_fx_backward"):
        pytest.skip("this torch compiles the backward pass elsewhere")
    model = nn.ModuleDict({"backbone": nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())})
    compile_submodules(model)
    with mock.patch.object(compile_fx, "compile_fx_backward", side_effect=OSError("no room")):
        model["backbone"](torch.randn(2, 3, 9, 9)).sum().backward()
    assert model["backbone"][0].weight.grad.any() and "no room" in caplog.text


@pytest.mark.long
def test_inductor_compiles_for_real(caplog):
    plain, model = build(*TINY, *SMALL_HEAD), build(*TINY, *SMALL_HEAD, "MODEL.COMPILE", True)
    assert_alike(model, plain, two_squares())
    assert "WON'T CONVERT" not in caplog.text
