"""Export detectors to torch.export programs and ONNX, and compare the files with their model.

A file is a `DetectionGraph`: normalization, padding and NMS are inside, resizing is not.
"""

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram

from plaintrain.config import CfgNode
from plaintrain.evaluation.evaluator import unpasted_masks
from plaintrain.export.graph import DetectionGraph, Detector
from plaintrain.modeling.tta import get_detection_settings
from plaintrain.utils.errors import UserError, get_first_line, require
from plaintrain.utils.logger import silenced

# Key of the metadata in the files.
_METADATA_KEY = "plaintrain"
FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
# Detections match within this distance in pixels.
_MAX_DISTANCE = 1.0


def describe(cfg: CfgNode, class_names: list[str] | None, weights: str) -> dict[str, Any]:
    """Return the metadata of a file, which JSON can hold."""
    fixed = list(cfg.INPUT.FIXED_SIZE) if is_fixed(cfg) else None
    return {
        "architecture": cfg.MODEL.META_ARCHITECTURE,
        "weights": os.path.basename(weights),
        "class_names": class_names,
        "input": "uint8 [batch, 3, height, width], RGB, resized, not normalised",
        "dynamic": ["batch"] if fixed else ["batch", "height", "width"],
        # Resize images to exactly this size, or else as min_size and max_size.
        "fixed_size": fixed or (list(cfg.INPUT.FIXED_SIZE) if min(cfg.INPUT.FIXED_SIZE) > 0 else None),
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        # The pixel values that become 0 and 255; empty for the range of the image's dtype.
        "pixel_range": list(cfg.INPUT.PIXEL_RANGE),
        "normalised_inside": {
            "format": cfg.INPUT.FORMAT, "mean": cfg.MODEL.PIXEL_MEAN, "std": cfg.MODEL.PIXEL_STD,
        },
        "boxes": "x0, y0, x1, y1 in pixels of the image given",
        "has_masks": bool(cfg.MODEL.MASK_ON and cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"),
        # See `plaintrain.structures.BoxMasks`.
        "masks_aligned": cfg.MODEL.ROI_MASK_HEAD.ALIGNED,
        "has_keypoints": bool(cfg.MODEL.KEYPOINT_ON and cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"),
    }  # fmt: skip


def is_fixed(cfg: CfgNode) -> bool:
    """Return whether the model accepts INPUT.FIXED_SIZE only."""
    return cfg.MODEL.META_ARCHITECTURE == "SSD"


@contextlib.contextmanager
def _silence_exporters():
    """Silence warnings that a user cannot act on."""
    with silenced(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trace(model: Detector, size: tuple[int, int], fixed: bool = False) -> ExportedProgram:
    """Trace the inference of a detector, on the CPU and in evaluation mode.

    The batch size is dynamic, and unless `fixed` the image size. `size` is the (height, width) of the example
    images, at least 64.
    """
    images = torch.zeros(2, 3, *size, dtype=torch.uint8)
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {0: dynamic} if fixed else {0: dynamic, 2: dynamic, 3: dynamic}
    try:
        with torch.no_grad(), _silence_exporters():
            graph = DetectionGraph(model)
            return torch.export.export(graph, (images,), dynamic_shapes=(shapes,), strict=False)
    except Exception as e:  # torch.export raises dozens of types.
        raise UserError(f"torch.export cannot trace {type(model).__name__}: {get_first_line(e)}") from e


def write_torch(program: ExportedProgram, path: str, metadata: dict[str, Any]) -> None:
    """Write a .pt2 file, with the metadata as an extra file."""
    with _silence_exporters():
        torch.export.save(program, path, extra_files={_METADATA_KEY: json.dumps(metadata)})


def write_onnx(program: ExportedProgram, path: str, metadata: dict[str, Any]) -> None:
    """Write an ONNX file, with the metadata in `metadata_props`."""
    onnx = require("onnx", "ONNX", "export")
    require("onnxscript", "ONNX", "export")
    names = list(program.module()(torch.zeros(2, *program.example_inputs[0][0].shape[1:], dtype=torch.uint8)))
    try:
        with _silence_exporters():
            exported = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=["images"], output_names=names
            )
    except Exception as e:  # So does torch.onnx.export.
        raise UserError(f"the model cannot be written as ONNX: {get_first_line(e)}") from e
    model = exported.model_proto  # type: ignore[union-attr]
    del model.graph.value_info[:]
    _name_dims(model.graph.input, {0: "batch", 2: "height", 3: "width"})
    _name_dims(model.graph.output, {0: "batch", 1: "detections"})
    model.metadata_props.add(key=_METADATA_KEY, value=json.dumps(metadata))
    onnx.save(model, path)


def _name_dims(values, names):
    """Replace the exporter's expressions for dynamic dimensions by names."""
    for value in values:
        for i, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param and i in names:
                dim.dim_param = names[i]


def open_exported(path: str) -> Callable[[Tensor], dict[str, Tensor]]:
    """Return the `DetectionGraph.forward` of an .onnx or .pt2 file."""
    if path.endswith(".pt2"):
        return torch.export.load(path).module()
    onnxruntime = require("onnxruntime", "ONNX", "export")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images):
        outputs = session.run(None, {"images": images.numpy()})
        return dict(zip(names, map(torch.from_numpy, outputs), strict=True))

    return run


def compute_expected_detections(model: Detector, image: Tensor) -> dict[str, Any]:
    """Return a model's detections in an image uint8 `[3, H, W]`, in the format of a file."""
    maps: list[Tensor] = []
    predictor = getattr(getattr(model, "roi_heads", None), "keypoint_predictor", None)
    hook = predictor.register_forward_hook(lambda *args: maps.append(args[-1])) if predictor else None
    with hook or contextlib.nullcontext(), unpasted_masks(model), torch.no_grad():
        (expected,) = model([{"image": image, "height": image.shape[1], "width": image.shape[2]}])
    if "masks" in expected:
        expected["masks"] = expected["masks"].probabilities[:, 0]
    return expected | ({"keypoint_maps": maps[0]} if maps else {})


def compare_detections(
    detections: dict[str, Any], expected: dict[str, Any], score_threshold: float
) -> dict[str, float]:
    """Return the largest differences of two sets of detections, and the number of `expected`.

    A detection without a match of its label differs by how far its score is above the threshold.
    """
    distances = (detections["boxes"][:, None] - expected["boxes"]).abs().amax(dim=2)
    # Scores decide between equal boxes.
    distances = distances + (detections["scores"][:, None] - expected["scores"]).abs()
    distances = distances.masked_fill(detections["labels"][:, None] != expected["labels"], float("inf"))
    # Padding by a row and a column allows for no detections.
    distance, idxs = F.pad(distances, (0, 1, 0, 1), value=float("inf")).min(dim=0)
    is_matched = distance[:-1] <= _MAX_DISTANCE
    idxs = idxs[:-1][is_matched]
    is_extra = torch.ones(len(distances), dtype=torch.bool).scatter(0, idxs, False)
    result: dict[str, float] = {"detections": len(expected["scores"])}
    for key in ("boxes", "scores", "masks", "keypoint_maps"):
        if key in expected:
            differences = (detections[key][idxs] - expected[key][is_matched]).abs()
            result[key] = differences.max().item() if differences.numel() else 0.0
    unmatched = torch.cat([detections["scores"][is_extra], expected["scores"][~is_matched]])
    result["scores"] = max([result["scores"], *(unmatched - score_threshold).tolist()])
    return result


def check_exported(
    run: Callable[[Tensor], dict[str, Tensor]], model: Detector, images: Iterable[tuple[str, Tensor]]
) -> list[dict[str, Any]]:
    """Return `compare_detections` of a file, as of `open_exported`, and its model for each (name, image)."""
    results = []
    for name, image in images:
        expected = compute_expected_detections(model, image)
        outputs = run(image[None])
        num_detections = int(outputs.pop("num_detections")[0])
        detections = {key: value[0, :num_detections] for key, value in outputs.items()}
        threshold = get_detection_settings(model).score_thresh
        # A full list of detections ends at its lowest score.
        if 0 < num_detections == outputs["scores"].shape[1]:
            threshold = max(threshold, detections["scores"].min().item())
        results.append({"image": name, **compare_detections(detections, expected, threshold)})
    return results
