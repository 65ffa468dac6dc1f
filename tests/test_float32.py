"""What stays in float32 under autocast: plaintrain.modeling.float32."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

from plaintrain.modeling.detectron2 import DefaultAnchorGenerator
from plaintrain.modeling.float32 import keep_float32

LOW = [torch.float16, torch.bfloat16]


class Returns(nn.Module):
    """Returns what it was given."""

    def forward(self, value):
        return value


# ---- heads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW)
def test_outputs_become_float32_in_dicts_lists_and_tuples_at_any_depth(dtype):
    head, low = Returns(), torch.tensor([1.5], dtype=dtype)
    keep_float32(heads=[head])
    given = {"a": low, "b": [low, (low, {"c": low})], "d": ()}
    found = head(given)
    assert type(found["b"]) is list and type(found["b"][1]) is tuple and found["d"] == ()
    for tensor in (head(low), found["a"], found["b"][0], found["b"][1][0], found["b"][1][1]["c"]):
        assert tensor.dtype == torch.float32 and tensor.item() == 1.5
    # What the module itself holds stays as it is.
    assert given["a"] is low and low.dtype == dtype


def test_other_types_and_other_modules_are_left_as_they_are():
    heads = [Returns(), Returns()]
    keep_float32(heads=heads[:1])
    for dtype in (torch.float32, torch.float64, torch.int64):
        value = torch.ones(2, dtype=dtype)
        assert heads[0](value) is value and heads[0]({"a": [value]})["a"][0] is value
    low = torch.ones(1, dtype=torch.bfloat16)
    assert heads[0](low).dtype == torch.float32 and heads[1](low) is low


# ---- anchors ---------------------------------------------------------------------------------

GENERATORS = {
    "torchvision": lambda: AnchorGenerator([[32, 300]], [[0.5, 1.0]]),
    "detectron2": lambda: DefaultAnchorGenerator([[32, 300]], [[0.5, 1.0]], [8], 0.5),
    "ssd": lambda: DefaultBoxGenerator([[2, 3]], scales=[0.1, 0.3], clip=False),
}
# As many places to the right as make coordinates above 256.
IMAGES = ImageList(torch.zeros(1, 3, 16, 800), [(16, 800)])


def anchors(generator, dtype):
    (found,) = generator(IMAGES, [torch.zeros(1, 4, 2, 100, dtype=dtype)])
    return found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("torchvision", torch.bfloat16), ("detectron2", torch.float16), ("ssd", torch.bfloat16)],
)
def test_anchors_of_features_in_low_precision_are_those_of_float32(name, dtype):
    generator = GENERATORS[name]()
    keep_float32(anchors=[generator])
    exact = anchors(GENERATORS[name](), torch.float32)
    found = anchors(generator, dtype)
    assert exact.max() > 700
    assert found.dtype == torch.float32 and found.equal(exact)
    # Nor is anything left behind for features in full precision.
    assert anchors(generator, torch.float32).equal(exact)


class Shapes(nn.Module):
    """Keeps the features it was given."""

    def forward(self, images, features):
        self.features = features
        return []


def test_anchor_generators_see_the_shapes_of_all_levels_and_take_no_memory():
    generator = Shapes()
    keep_float32(anchors=[generator])
    features = [torch.zeros(2, 256, 50, 60, dtype=torch.bfloat16), torch.zeros(2, 256, 25, 30)]
    generator(IMAGES, features)
    low, full = generator.features
    assert low.shape == features[0].shape and low.dtype == torch.float32
    assert low.device == features[0].device and low.untyped_storage().nbytes() <= 16
    assert full is features[1]


def test_a_copied_model_keeps_it():
    """As the averaged weights do."""
    generator, head = GENERATORS["torchvision"](), nn.Linear(1, 1)
    keep_float32(heads=[head], anchors=[generator])
    generator, head = copy.deepcopy([generator, head])
    assert anchors(generator, torch.bfloat16).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(torch.ones(1, 1)).sum()
    assert loss.dtype == torch.float32
    loss.backward()
    assert head.weight.grad.item() == 1
