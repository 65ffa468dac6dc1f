"""Detectors as files that need no plaintrain: torch.export programs and ONNX, and how far they are off.

A file takes `images`, uint8 `[B, 3, H, W]` in RGB, all of one size, resized already, and gives what
`plaintrain.export.graph.DetectionGraph` gives. Normalising, padding and NMS are inside.
"""

import contextlib
import json
import logging
import os
import warnings

import torch

from plaintrain.export.graph import DetectionGraph
from plaintrain.utils.errors import UserError, first_line, require
from plaintrain.utils.logger import silenced

# Where the files hold what `describe` says.
ABOUT = "plaintrain"
FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
_SIDES = {0: "batch", 2: "height", 3: "width"}


def describe(cfg, class_names, weights):
    """What a file says about itself, a dict that JSON holds.

    Args:
        cfg: the config, settled.
        class_names: of the labels, in order, or None where nobody knows.
        weights: name of the file of weights.
    """
    fixed = list(cfg.INPUT.FIXED_SIZE) if is_fixed(cfg) else None
    return {
        "architecture": cfg.MODEL.META_ARCHITECTURE,
        "weights": os.path.basename(weights),
        "class_names": class_names,
        "input": "uint8 [batch, 3, height, width], RGB, resized, not normalised",
        "dynamic": ["batch"] if fixed else ["batch", "height", "width"],
        # How an image is to be resized before: to exactly this, or its sides.
        "fixed_size": fixed or (list(cfg.INPUT.FIXED_SIZE) if min(cfg.INPUT.FIXED_SIZE) > 0 else None),
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        # The values of an image's file that become 0 and 255; empty: by its type.
        "pixel_range": list(cfg.INPUT.PIXEL_RANGE),
        "normalised_inside": {
            "format": cfg.INPUT.FORMAT, "mean": cfg.MODEL.PIXEL_MEAN, "std": cfg.MODEL.PIXEL_STD,
        },
        "boxes": "x0, y0, x1, y1 in pixels of the image given",
        "has_masks": bool(cfg.MODEL.MASK_ON and cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"),
        # Whether masks fill their boxes exactly, or as torchvision pastes them.
        "masks_aligned": cfg.MODEL.ROI_MASK_HEAD.ALIGNED,
        "has_keypoints": bool(cfg.MODEL.KEYPOINT_ON and cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"),
    }  # fmt: skip


def is_fixed(cfg):
    """Whether the model takes images of INPUT.FIXED_SIZE only."""
    return cfg.MODEL.META_ARCHITECTURE == "SSD"


def need(module):
    """A module that ONNX needs, or a `UserError` that says how to install it."""
    return require(module, "ONNX", "export")


@contextlib.contextmanager
def _quietly():
    """Exporters warn of what nobody who exports can change."""
    with silenced(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trace(model, size, fixed=False):
    """The model's inference as an `ExportedProgram`, for any number of images, of any size unless `fixed`.

    Args:
        model: a detector on the CPU, in evaluation mode.
        size: (height, width) of an image to trace with, at least 2 x 32 pixels.
        fixed: height and width stay these.

    Raises:
        UserError: torch.export cannot follow the model.
    """
    dynamic, images = torch.export.Dim.DYNAMIC, torch.zeros(2, 3, *size, dtype=torch.uint8)
    sides = {} if fixed else {2: dynamic, 3: dynamic}
    try:
        with torch.no_grad(), _quietly():
            shapes = ({0: dynamic, **sides},)
            return torch.export.export(DetectionGraph(model), (images,), dynamic_shapes=shapes, strict=False)
    except Exception as e:  # The tracer has dozens of them.
        raise UserError(f"torch.export cannot follow a {type(model).__name__}: {first_line(e)}") from e


def write_torch(program, path, about):
    """Write an `ExportedProgram` as .pt2, with `about` as the extra file of the name `ABOUT`."""
    with _quietly():
        torch.export.save(program, path, extra_files={ABOUT: json.dumps(about)})


def write_onnx(program, path, about):
    """Write an `ExportedProgram` as ONNX, with `about` as JSON in its metadata.

    Raises:
        UserError: onnx or onnxscript are missing, or the program has an operator that ONNX has not.
    """
    onnx = need("onnx")
    need("onnxscript")
    names = list(program.module()(torch.zeros(2, *program.example_inputs[0][0].shape[1:], dtype=torch.uint8)))
    try:
        with _quietly():
            written = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=["images"], output_names=names
            )
    except Exception as e:  # As above.
        raise UserError(f"the model cannot be written as ONNX: {first_line(e)}") from e
    model = written.model_proto
    del model.graph.value_info[:]
    _name_sides(model.graph.input, _SIDES)
    _name_sides(model.graph.output, {0: "batch", 1: "detections"})
    model.metadata_props.add(key=ABOUT, value=json.dumps(about))
    onnx.save(model, path)


def _name_sides(values, names):
    """Give the sides that vary, which ONNX has formulas for, names."""
    for value in values:
        for i, side in enumerate(value.type.tensor_type.shape.dim):
            if side.dim_param and i in names:
                side.dim_param = names[i]
