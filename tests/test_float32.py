"""What stays in float32 under autocast: plaintrain.modeling.float32."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

from plaintrain.modeling.detectron2 import DefaultAnchorGenerator
from plaintrain.modeling.float32 import keep_float32


def test_outputs_become_float32_in_dicts_lists_and_tuples_at_any_depth():
    head, low = nn.Identity(), torch.tensor([1.5], dtype=torch.bfloat16)
    keep_float32(heads=[head])
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


GENERATORS = {
    "torchvision": lambda: AnchorGenerator([[32, 300]], [[0.5, 1.0]]),
    "detectron2": lambda: DefaultAnchorGenerator([[32, 300]], [[0.5, 1.0]], [8], 0.5),
    "ssd": lambda: DefaultBoxGenerator([[2, 3]], scales=[0.1, 0.3], clip=False),
}
# As many places to the right as make coordinates above 256.
IMAGES = ImageList(torch.zeros(1, 3, 16, 800), [(16, 800)])


def make_anchors(generator, dtype):
    (anchors,) = generator(IMAGES, [torch.zeros(1, 4, 2, 100, dtype=dtype)])
    return anchors


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("torchvision", torch.bfloat16), ("detectron2", torch.float16), ("ssd", torch.bfloat16)],
)
def test_anchors_of_features_in_low_precision_are_those_of_float32(name, dtype):
    generator = GENERATORS[name]()
    keep_float32(anchors=[generator])
    exact = make_anchors(GENERATORS[name](), torch.float32)
    anchors = make_anchors(generator, dtype)
    assert exact.max() > 700
    assert anchors.dtype == torch.float32 and anchors.equal(exact)


def test_a_copied_model_keeps_float32():
    """As the averaged weights do."""
    generator, head = GENERATORS["torchvision"](), nn.Linear(1, 1)
    keep_float32(heads=[head], anchors=[generator])
    generator, head = copy.deepcopy([generator, head])
    assert make_anchors(generator, torch.bfloat16).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(torch.ones(1, 1)).sum()
    assert loss.dtype == torch.float32
    loss.backward()
    assert head.weight.grad.item() == 1
