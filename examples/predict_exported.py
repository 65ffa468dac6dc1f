#!/usr/bin/env python
"""Detect objects with a model exported by scripts/export_model.py, without plaintrain.

python examples/predict_exported.py model.onnx photo.jpg more/*.jpg --output predictions

Prints class, score and box (in pixels of the image) of each detection; --output also draws them. Needs numpy,
Pillow and, for .onnx, onnxruntime or, for .pt2, torch and torchvision.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

_COLORS = [(230, 25, 75), (0, 130, 200), (60, 180, 75), (245, 130, 48), (145, 30, 180), (0, 140, 140)]
Model = Callable[[np.ndarray], dict[str, np.ndarray]]


def load(path: str) -> tuple[Model, dict[str, Any]]:
    """Load a model; return (function of uint8 images `[B, 3, H, W]`, metadata)."""
    if path.endswith(".pt2"):
        import torch
        import torchvision  # noqa: F401 - the model calls its operators

        extra = {"plaintrain": ""}
        module = torch.export.load(path, extra_files=extra).module()
        return lambda images: {
            name: value.numpy(force=True) for name, value in module(torch.from_numpy(images)).items()
        }, json.loads(extra["plaintrain"])
    import onnxruntime

    available = onnxruntime.get_available_providers()
    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
    session = onnxruntime.InferenceSession(path, providers=providers)
    names = [output.name for output in session.get_outputs()]
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["plaintrain"])
    return lambda images: dict(zip(names, session.run(None, {"images": images}), strict=True)), metadata


def read(path: str | Path, pixel_range: Sequence[float]) -> Image.Image:
    """Read an image as 8-bit RGB, with the conversion of the training.

    `pixel_range` (low, high) is mapped to 0 and 255; empty is the range of the image type.
    """
    source = Image.open(path)
    ranges = {"I;16": (0, 4095 if "I;12" in str(source.tile) else 65535), "F": (0, 1)}
    image = ImageOps.exif_transpose(source)
    is_wide = image.mode[0] in "IF"
    if not (is_wide or pixel_range):
        return image.convert("RGB")
    pixels = np.asarray(image if is_wide else image.convert("RGB")).astype(np.float64)
    low, high = pixel_range or ranges.get(image.mode[:4], (0, 0))
    fits = low - 1e-6 <= pixels.min() and pixels.max() <= high + 1e-6 and low < high
    if not fits or not (is_wide or high <= 255):
        values = f"pixels from {pixels.min():g} to {pixels.max():g} of the type {image.mode}"
        sys.exit(f"{path} has {values}, which do not fit the model's pixel_range {list(pixel_range)}")
    scaled = np.clip((pixels - low) / (high - low), 0, 1) * (256 - 1e-3)
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def compute_input_size(height: int, width: int, metadata: dict[str, Any]) -> tuple[int, int]:
    """Return the (height, width) to which the model expects an image to be resized."""
    if metadata["fixed_size"]:
        return tuple(metadata["fixed_size"])
    if not metadata["min_size"]:
        return height, width
    scale = min(metadata["min_size"] / min(height, width), metadata["max_size"] / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def predict(model: Model, metadata: dict[str, Any], image: Image.Image) -> dict[str, np.ndarray]:
    """Return the detections of an image, {boxes, scores, labels, ...}, in its pixels, best first."""
    height, width = compute_input_size(image.height, image.width, metadata)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    outputs = model(np.ascontiguousarray(pixels.transpose(2, 0, 1))[None])
    num_detections = int(outputs.pop("num_detections")[0])
    detections = {name: value[0, :num_detections] for name, value in outputs.items()}
    scale = np.array([image.width / width, image.height / height] * 2, dtype=np.float32)
    return detections | {"boxes": detections["boxes"] * scale}


def compute_keypoints(heatmaps: np.ndarray, box: Sequence[float]) -> list[tuple[float, float]]:
    """Return the maximum, (x, y), of each heatmap `[Kp, M, M]` resized to its box."""
    sides = np.maximum(np.subtract(box[2:], box[:2]), 1)
    width, height = (int(side) for side in np.ceil(sides))
    points = []
    for heatmap in heatmaps:
        resized = np.asarray(Image.fromarray(heatmap).resize((width, height), Image.Resampling.BICUBIC))
        y, x = divmod(int(resized.argmax()), width)
        points.append(((x + 0.5) * sides[0] / width + box[0], (y + 0.5) * sides[1] / height + box[1]))
    return points


def paste(probabilities: np.ndarray, box: np.ndarray, size: tuple[int, int], aligned: bool) -> Image.Image:
    """Paste a mask, `[M, M]` in 0..1, into its box; return an image of `size` (width, height).

    Masks that are not `aligned` extend beyond their boxes, as in torchvision.
    """
    if not aligned:
        probabilities = np.pad(probabilities, 1)
        center = (box[:2] + box[2:]) / 2
        half = (box[2:] - box[:2]) / 2
        half *= len(probabilities) / (len(probabilities) - 2)
        box = np.trunc(np.concatenate([center - half, center + half])) + [0, 0, 1, 1]
    cells = np.arange(len(probabilities))
    weights = []
    for num_pixels, low, high in zip(size, box[:2], box[2:], strict=True):
        # Bilinear interpolation between the centers of cells; 0 outside the box.
        position = (np.arange(num_pixels) + 0.5 - low) / (high - low) * len(cells) - 0.5
        weights.append(np.maximum(1 - np.abs(position[:, None] - cells), 0))
    pasted = weights[1] @ probabilities @ weights[0].T
    return Image.fromarray((pasted >= 0.5).astype(np.uint8) * 110)


def draw(
    image: Image.Image, detections: dict[str, np.ndarray], get_name: Callable[[int], str], aligned: bool
) -> Image.Image:
    """Draw detections on a copy of the image; `aligned` as for `paste`."""
    image = image.copy()
    colors = [_COLORS[int(label) % len(_COLORS)] for label in detections["labels"]]
    for mask, box, color in zip(detections.get("masks", ()), detections["boxes"], colors, strict=False):
        image.paste(color, mask=paste(mask, box, image.size, aligned))
    canvas = ImageDraw.Draw(image)
    for i, color in enumerate(colors):
        box = detections["boxes"][i].tolist()
        canvas.rectangle(box, outline=color, width=max(1, max(image.size) // 300))
        if "keypoint_maps" in detections:
            for x, y in compute_keypoints(detections["keypoint_maps"][i], box):
                canvas.ellipse((x - 2, y - 2, x + 2, y + 2), fill=color, outline="white")
        text = f"{get_name(detections['labels'][i])} {detections['scores'][i]:.2f}"
        corner = (box[0], max(box[1] - 12, 0))
        canvas.rectangle(canvas.textbbox(corner, text), fill=color)
        canvas.text(corner, text, fill="white")
    return image


def main(args: argparse.Namespace) -> int:
    """Predict all images."""
    model, metadata = load(args.model)
    class_names = metadata["class_names"]

    def get_name(label: int) -> str:
        return class_names[label] if class_names else f"class {label}"

    for path in args.images:
        image = read(path, metadata.get("pixel_range", ()))
        detections = predict(model, metadata, image)
        kept = detections["scores"] >= args.score_threshold
        detections = {name: value[kept] for name, value in detections.items()}
        print(f"{path}: {kept.sum()} objects")
        for label, score, box in zip(*(detections[k] for k in ("labels", "scores", "boxes")), strict=True):
            print(f"  {get_name(label)} {score:.3f} " + " ".join(f"{side:.1f}" for side in box))
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            file = args.output / f"{Path(path).stem}.png"
            draw(image, detections, get_name, metadata.get("masks_aligned", False)).save(file)
            print(f"  saved {file}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=".onnx or .pt2")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--score-threshold", type=float, default=0.5, help="minimum score (default: 0.5)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="save images with detections here")
    sys.exit(main(parser.parse_args()))
