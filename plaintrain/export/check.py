"""How far an exported detector is from the model that it was made from, on real images."""

import contextlib
import os

import torch
import torch.nn.functional as F

from plaintrain.data.dataset_mapper import DatasetMapper
from plaintrain.data.image_files import image_record, list_images
from plaintrain.data.records import get_detection_dataset_dicts
from plaintrain.evaluation.background import unpasted_masks
from plaintrain.export.export import need
from plaintrain.modeling.tta import detection_settings
from plaintrain.utils.errors import UserError

# A box that is further off, in pixels, is another one.
_SAME = 1.0
# What a file gives of each detection, and the name of its difference.
_VALUES = ("boxes", "scores", "masks", "keypoint_maps")


def open_exported(path):
    """A function from uint8 `[B, 3, H, W]` to the dict of tensors that a file gives, .onnx or .pt2.

    Raises:
        UserError: onnxruntime is missing.
    """
    if path.endswith(".pt2"):
        return torch.export.load(path).module()
    session = need("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
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
        records = [image_record(path, path) for path in list_images(folder)[:number]]
    elif cfg.DATASETS.TEST:
        dataset = get_detection_dataset_dicts(cfg.DATASETS.TEST[0], filter_empty=False)
        records = [dataset[i] for i in range(min(number, len(dataset)))]
    else:
        raise UserError("DATASETS.TEST is empty: give --images FOLDER, or --check 0 to check nothing")
    mapper = DatasetMapper(cfg, is_train=False)
    return [(os.path.basename(record["file_name"]), mapper(record)["image"]) for record in records]


def expected_of(model, image):
    """Return a model's detections in an image uint8 `[3, H, W]`, in its pixels, as a file has them."""
    maps, hook = [], contextlib.nullcontext()
    if getattr(getattr(model, "roi_heads", None), "keypoint_predictor", None) is not None:
        hook = model.roi_heads.keypoint_predictor.register_forward_hook(lambda *args: maps.append(args[-1]))
    with hook, unpasted_masks(model), torch.no_grad():
        (expected,) = model([{"image": image, "height": image.shape[1], "width": image.shape[2]}])
    if "masks" in expected:
        expected["masks"] = expected["masks"].probabilities[:, 0]
    return expected | ({"keypoint_maps": maps[0]} if maps else {})


def differences(found, expected, limit):
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
    """Return the `differences` between a file and its model of each image, with its name as "image".

    Args:
        run: what `open_exported` returns.
        model: the detector, on the CPU, in evaluation mode.
        images: list of (name, uint8 `[3, H, W]`).
    """
    rows, limit = [], detection_settings(model).score_thresh
    for name, image in images:
        expected, outputs = expected_of(model, image), run(image[None])
        number = int(outputs["num_detections"][0])
        found = {key: value[0, :number] for key, value in outputs.items() if key != "num_detections"}
        # What comes after so many is cut off.
        is_full = number > 0 and number == outputs["scores"].shape[1]
        least = found["scores"].min().item() if is_full else limit
        rows.append({"image": name, **differences(found, expected, max(limit, least))})
    return rows
