"""SSD's images and heads: modeling.ssd. Its losses and detections are compared in test_dense_step.py."""

import torch
from model_helpers import SSD, TINY, build, make_sample, norm_types, randomize_predictions
from torch import nn


def test_images_are_not_padded_and_need_not_be_square():
    model = build(*TINY, *SSD, "INPUT.FIXED_SIZE", (40, 72), "MODEL.SSD.SCORE_THRESH_TEST", 0.0).eval()
    randomize_predictions(model)
    batch, _ = model.transform([make_sample(40, 72)["image"]])
    assert batch.tensors.shape == (1, 3, 40, 72)
    with torch.no_grad():
        (found,) = model([make_sample(40, 72, original=(80, 720))])
    assert 80 >= found["boxes"][:, 3].max() > 72 and 720 >= found["boxes"][:, 2].max() > 400


def test_the_lite_head_has_the_norm_of_the_tiny_backbone():
    keys = (*TINY, *SSD, "MODEL.SSD.HEAD_NAME", "SSDLiteHead")
    for norm, kind in (("GN", nn.GroupNorm), ("BN", nn.BatchNorm2d)):
        assert norm_types(build(*keys, "MODEL.TINY.NORM", norm).head) == {kind}
