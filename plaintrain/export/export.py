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
import torch.nn.functional as F

from plaintrain.data.dataset_mapper import DatasetMapper
from plaintrain.data.image_files import build_image_record, list_images
from plaintrain.data.records import get_detection_dataset_dicts
from plaintrain.evaluation.evaluator import unpasted_masks
from plaintrain.export.graph import DetectionGraph
from plaintrain.modeling.tta import get_detection_settings
from plaintrain.utils.errors import UserError, get_first_line, require
from plaintrain.utils.logger import silenced

# Where the files hold what `describe` says.
ABOUT = "plaintrain"
FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
_SIDES = {0: "batch", 2: "height", 3: "width"}
# A box that is further off, in pixels, is another one.
_SAME = 1.0
# What a file gives of each detection, and the name of its difference.
_VALUES = ("boxes", "scores", "masks", "keypoint_maps")


def describe(cfg, class_names, weights):
    """Return what a file says about itself, a dict that JSON holds; unknown `class_names` are None."""
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
    """Return whether the model takes images of INPUT.FIXED_SIZE only."""
    return cfg.MODEL.META_ARCHITECTURE == "SSD"


@contextlib.contextmanager
def _quietly():
    """Silence exporters, which warn of what nobody who exports can change."""
    with silenced(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trace(model, size, fixed=False):
    """Trace the inference of a detector on the CPU, in evaluation mode: an `ExportedProgram`.

    It takes any number of images, of any size unless `fixed`; `size` is that of the images to trace with,
    (height, width), at least 2 x 32 pixels.
    """
    dynamic, images = torch.export.Dim.DYNAMIC, torch.zeros(2, 3, *size, dtype=torch.uint8)
    sides = {} if fixed else {2: dynamic, 3: dynamic}
    try:
        with torch.no_grad(), _quietly():
            shapes = ({0: dynamic, **sides},)
            return torch.export.export(DetectionGraph(model), (images,), dynamic_shapes=shapes, strict=False)
    except Exception as e:  # The tracer has dozens of them.
        raise UserError(f"torch.export cannot follow a {type(model).__name__}: {get_first_line(e)}") from e


def write_torch(program, path, about):
    """Write an `ExportedProgram` as .pt2, with `about` as the extra file of the name `ABOUT`."""
    with _quietly():
        torch.export.save(program, path, extra_files={ABOUT: json.dumps(about)})


def write_onnx(program, path, about):
    """Write an `ExportedProgram` as ONNX, with `about` as JSON in its metadata."""
    onnx = require("onnx", "ONNX", "export")
    require("onnxscript", "ONNX", "export")
    names = list(program.module()(torch.zeros(2, *program.example_inputs[0][0].shape[1:], dtype=torch.uint8)))
    try:
        with _quietly():
            written = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=["images"], output_names=names
            )
    except Exception as e:  # As above.
        raise UserError(f"the model cannot be written as ONNX: {get_first_line(e)}") from e
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


def open_exported(path):
    """Return a function from uint8 `[B, 3, H, W]` to the dict of tensors that a file gives, .onnx or .pt2."""
    if path.endswith(".pt2"):
        return torch.export.load(path).module()
    onnxruntime = require("onnxruntime", "ONNX", "export")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images):
        found = session.run(None, {"images": images.numpy()})
        return dict(zip(names, map(torch.from_numpy, found), strict=True))

    return run


def check_images(cfg, number, folder=""):
    """Return [(name, uint8 `[3, H, W]`), ...]: the first images of a folder, or else of DATASETS.TEST, as
    evaluation resizes them.

    Raises:
        UserError: there are none.
    """
    if folder:
        records = [build_image_record(path, path) for path in list_images(folder)[:number]]
    elif cfg.DATASETS.TEST:
        dataset = get_detection_dataset_dicts(cfg.DATASETS.TEST[0], filter_empty=False)
        records = [dataset[i] for i in range(min(number, len(dataset)))]
    else:
        raise UserError("DATASETS.TEST is empty: give --images FOLDER, or --check 0 to check nothing")
    mapper = DatasetMapper(cfg, is_train=False)
    return [(os.path.basename(record["file_name"]), mapper(record)["image"]) for record in records]


def compute_expected_detections(model, image):
    """Return a model's detections in an image uint8 `[3, H, W]`, in its pixels, as a file has them."""
    maps, hook = [], contextlib.nullcontext()
    if getattr(getattr(model, "roi_heads", None), "keypoint_predictor", None) is not None:
        hook = model.roi_heads.keypoint_predictor.register_forward_hook(lambda *args: maps.append(args[-1]))
    with hook, unpasted_masks(model), torch.no_grad():
        (expected,) = model([{"image": image, "height": image.shape[1], "width": image.shape[2]}])
    if "masks" in expected:
        expected["masks"] = expected["masks"].probabilities[:, 0]
    return expected | ({"keypoint_maps": maps[0]} if maps else {})


def compare_detections(found, expected, limit):
    """Return the largest differences between two lists of detections of an image.

    The partner of a detection is the nearest of its label, within a pixel.

    Args:
        found, expected: {boxes `[N, 4]`, scores `[N]`, labels `[N]`, ...}.
        limit: the score from which on there are detections. One that only one of the two has differs by
            how far its score is above it.

    Returns:
        {"detections": number of `expected`, "boxes": pixels, "scores": 0..1, "masks": ..., ...}
    """
    far = (found["boxes"][:, None] - expected["boxes"]).abs().amax(dim=2)
    # Of boxes that are the same, the one with the same score.
    far = far + (found["scores"][:, None] - expected["scores"]).abs()
    far = far.masked_fill(found["labels"][:, None] != expected["labels"], float("inf"))
    # With a row and a column of nobody.
    distance, partner = F.pad(far, (0, 1, 0, 1), value=float("inf")).min(dim=0)
    has_partner = distance[:-1] <= _SAME
    partner = partner[:-1][has_partner]
    is_alone = torch.ones(len(far), dtype=torch.bool).scatter(0, partner, False)
    result = {"detections": len(expected["scores"])}
    for key in _VALUES:
        if key in expected:
            off = (found[key][partner] - expected[key][has_partner]).abs()
            result[key] = off.max().item() if off.numel() else 0.0
    alone = torch.cat([found["scores"][is_alone], expected["scores"][~has_partner]]) - limit
    result["scores"] = max([result["scores"], *alone.tolist()])
    return result


def check_exported(run, model, images):
    """Return the `differences` between a file, opened by `open_exported`, and its model, on the CPU, of each
    image, (name, uint8 `[3, H, W]`), with its name as "image".
    """
    rows, limit = [], get_detection_settings(model).score_thresh
    for name, image in images:
        expected, outputs = compute_expected_detections(model, image), run(image[None])
        number = int(outputs["num_detections"][0])
        found = {key: value[0, :number] for key, value in outputs.items() if key != "num_detections"}
        # What comes after so many is cut off.
        is_full = number > 0 and number == outputs["scores"].shape[1]
        least = found["scores"].min().item() if is_full else limit
        rows.append({"image": name, **compare_detections(found, expected, max(limit, least))})
    return rows
