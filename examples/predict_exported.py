#!/usr/bin/env python
"""Find objects in images with a file of scripts/export_model.py; plaintrain is not needed.

python examples/predict_exported.py model.onnx photo.jpg more/*.jpg --output found

A .onnx needs numpy, Pillow and onnxruntime; a .pt2 needs torch and torchvision in place of the last. Prints
each object's class, score and box in the image's pixels, and with --output draws them.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

_COLOURS = [(230, 25, 75), (0, 130, 200), (60, 180, 75), (245, 130, 48), (145, 30, 180), (0, 140, 140)]


def load(path):
    """(function from uint8 `[B, 3, H, W]` to a dict of arrays, what the file says about itself)."""
    if path.endswith(".pt2"):
        import torch
        import torchvision  # noqa: F401 - the program calls its operators

        extra = {"plaintrain": ""}
        module = torch.export.load(path, extra_files=extra).module()
        return lambda images: {
            name: value.numpy(force=True) for name, value in module(torch.from_numpy(images)).items()
        }, json.loads(extra["plaintrain"])
    import onnxruntime

    wanted, there = ("CUDAExecutionProvider", "CPUExecutionProvider"), onnxruntime.get_available_providers()
    session = onnxruntime.InferenceSession(path, providers=[name for name in wanted if name in there])
    names = [output.name for output in session.get_outputs()]
    about = json.loads(session.get_modelmeta().custom_metadata_map["plaintrain"])
    return lambda images: dict(zip(names, session.run(None, {"images": images}), strict=True)), about


def read(path, pixel_range):
    """The image as RGB of 8 bits, its values converted as for the training.

    Args:
        path: the file.
        pixel_range: (low, high), the values that become 0 and 255; empty takes the range of the image's type.
    """
    image = Image.open(path)
    of_type = {"I;16": (0, 4095 if "I;12" in str(image.tile) else 65535), "F": (0, 1)}
    image = ImageOps.exif_transpose(image)
    is_wide = image.mode[0] in "IF"
    if not (is_wide or pixel_range):
        return image.convert("RGB")
    pixels = np.asarray(image if is_wide else image.convert("RGB")).astype(np.float64)
    low, high = pixel_range or of_type.get(image.mode[:4], (0, 0))
    fits = low - 1e-6 <= pixels.min() and pixels.max() <= high + 1e-6 and low < high
    if not fits or not (is_wide or high <= 255):
        found = f"pixels from {pixels.min():g} to {pixels.max():g} of the type {image.mode}"
        sys.exit(f"{path} has {found}, which do not fit the model's pixel_range {list(pixel_range)}")
    scaled = np.clip((pixels - low) / (high - low), 0, 1) * (256 - 1e-3)
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def resized_size(height, width, about):
    """The (height, width) in which the model is to see an image."""
    if about["fixed_size"]:
        return tuple(about["fixed_size"])
    if not about["min_size"]:
        return height, width
    scale = min(about["min_size"] / min(height, width), about["max_size"] / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def predict(run, about, image):
    """What is found in a Pillow image: {boxes, scores, labels, ...}, in its own pixels, the best first."""
    height, width = resized_size(image.height, image.width, about)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    outputs = run(np.ascontiguousarray(pixels.transpose(2, 0, 1))[None])
    number = int(outputs.pop("num_detections")[0])
    found = {name: value[0, :number] for name, value in outputs.items()}
    scale = np.array([image.width / width, image.height / height] * 2, dtype=np.float32)
    return found | {"boxes": found["boxes"] * scale}


def keypoints_of(maps, box):
    """The highest point, (x, y), of each heatmap `[Kp, M, M]` once it has the size of its box."""
    sides = np.maximum(np.subtract(box[2:], box[:2]), 1)
    width, height = (int(side) for side in np.ceil(sides))
    points = []
    for heatmap in maps:
        grown = np.asarray(Image.fromarray(heatmap).resize((width, height), Image.Resampling.BICUBIC))
        y, x = divmod(int(grown.argmax()), width)
        points.append(((x + 0.5) * sides[0] / width + box[0], (y + 0.5) * sides[1] / height + box[1]))
    return points


def paste(probabilities, box, size, aligned):
    """The mask of a box as a Pillow image of the size (width, height), from `[M, M]` in 0..1.

    Where masks are not `aligned` they reach beyond their boxes, as torchvision pastes them.
    """
    if not aligned:
        probabilities = np.pad(probabilities, 1)
        centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
        half *= len(probabilities) / (len(probabilities) - 2)
        box = np.trunc(np.concatenate([centre - half, centre + half])) + [0, 0, 1, 1]
    cells, weights = np.arange(len(probabilities)), []
    for pixels, low, high in zip(size, box[:2], box[2:], strict=True):
        # Between the centres of two cells linear, around the box 0.
        place = (np.arange(pixels) + 0.5 - low) / (high - low) * len(cells) - 0.5
        weights.append(np.maximum(1 - np.abs(place[:, None] - cells), 0))
    inside = weights[1] @ probabilities @ weights[0].T
    return Image.fromarray((inside >= 0.5).astype(np.uint8) * 110)


def draw(image, found, name_of, rows, aligned):
    """A copy of the image with the detections of these rows in it; `aligned` as for `paste`."""
    image = image.copy()
    colours = [_COLOURS[int(label) % len(_COLOURS)] for label in found["labels"]]
    for i in rows if "masks" in found else ():
        image.paste(colours[i], mask=paste(found["masks"][i], found["boxes"][i], image.size, aligned))
    canvas = ImageDraw.Draw(image)
    for i in rows:
        box = found["boxes"][i].tolist()
        canvas.rectangle(box, outline=colours[i], width=max(1, max(image.size) // 300))
        for x, y in keypoints_of(found["keypoint_maps"][i], box) if "keypoint_maps" in found else ():
            canvas.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colours[i], outline="white")
        text, corner = (
            f"{name_of(found['labels'][i])} {found['scores'][i]:.2f}",
            (box[0], max(box[1] - 12, 0)),
        )
        canvas.rectangle(canvas.textbbox(corner, text), fill=colours[i])
        canvas.text(corner, text, fill="white")
    return image


def main(args):
    """Predict all images."""
    run, about = load(args.model)
    classes = about["class_names"]

    def name_of(label):
        return classes[label] if classes else f"class {label}"

    for path in args.images:
        image = read(path, about.get("pixel_range", ()))
        found = predict(run, about, image)
        rows = np.flatnonzero(found["scores"] >= args.threshold).tolist()
        print(f"{path}: {len(rows)} objects")
        for i in rows:
            box = " ".join(f"{side:.1f}" for side in found["boxes"][i])
            print(f"  {name_of(found['labels'][i])} {found['scores'][i]:.3f} {box}")
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            file = args.output / f"{Path(path).stem}.png"
            draw(image, found, name_of, rows, about.get("masks_aligned", False)).save(file)
            print(f"  drawn in {file}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=".onnx or .pt2")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score, default 0.5")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="draw what is found here")
    sys.exit(main(parser.parse_args()))
