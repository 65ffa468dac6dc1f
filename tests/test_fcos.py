"""FCOS's initial outputs: modeling.fcos. Its losses and detections are compared in test_dense_step.py."""

import pytest
import torch
from model_helpers import FCOS, TINY, K, build, make_sample


def test_every_location_of_a_fresh_model_has_the_prior_probability_and_a_box():
    model = build(*TINY, *FCOS, "MODEL.FCOS.PRIOR_PROB", 0.2).eval()
    assert model.head.classification_head.cls_logits.bias.sigmoid().tolist() == pytest.approx([0.2] * K)
    with torch.no_grad():
        images, _ = model.transform([make_sample(64, 64)["image"]])
        outputs = model.head(list(model.backbone(images.tensors).values()))
    # What passes the ReLU of the box outputs is the same everywhere, and above 0.
    assert outputs["bbox_regression"].min() > 0.1
