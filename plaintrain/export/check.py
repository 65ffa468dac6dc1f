"""How far an exported detector is from the model that it was made from, on real images."""

import contextlib
import os

import torch

from plaintrain.data.dataset_mapper import DatasetMapper
from plaintrain.data.image_files import image_record, list_images
from plaintrain.data.records import get_detection_dataset_dicts
from plaintrain.evaluation.background import unpasted_masks
from plaintrain.export.export import need
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
    """The first images of a folder, or else of DATASETS.TEST, resized as in evaluation.

    Args:
        cfg: the config.
        number: of them, at most.
        folder: of image files.

    Returns:
        list of (name, uint8 `[3, H, W]`).

    Raises:
        UserError: there are none.
    """
    if folder:
        records = [image_record(path, path) for path in list_images(folder)[:number]]
    elif cfg.DATASETS.TEST:
        found = get_detection_dataset_dicts(cfg.DATASETS.TEST[0], filter_empty=False)
        records = [found[i] for i in range(min(number, len(found)))]
    else:
        raise UserError("DATASETS.TEST is empty: give --images FOLDER, or --check 0 to check nothing")
    mapper = DatasetMapper(cfg, is_train=False)
    return [(os.path.basename(record["file_name"]), mapper(record)["image"]) for record in records]


def expected_of(model, image):
    """What a model finds in an image, in the image's own pixels, as the first of a batch in a file's form.

    Args:
        model: the detector, on the CPU, in evaluation mode.
        image: uint8 `[3, H, W]`.
    """
    heads, maps = getattr(model, "roi_heads", None), []
    hook = contextlib.nullcontext()
    if getattr(heads, "keypoint_predictor", None) is not None:
        hook = heads.keypoint_predictor.register_forward_hook(
            lambda module, args, output: maps.append(output)
        )
    with hook, unpasted_masks(model), torch.no_grad():
        found = model([{"image": image, "height": image.shape[1], "width": image.shape[2]}])[0]
    expected = {key: found[key] for key in ("boxes", "scores", "labels")}
    if "masks" in found:
        expected["masks"] = found["masks"].probabilities[:, 0]
    if maps:
        expected["keypoint_maps"] = maps[0]
    return expected


def match(found, expected):
    """Which of the detections `found` is each of `expected`: the nearest of the same label, within a pixel.

    Returns:
        list of pairs of indices, and the indices of either that have no partner.
    """
    far = (found["boxes"][:, None] - expected["boxes"]).abs().amax(dim=2)
    far = far.masked_fill(found["labels"][:, None] != expected["labels"], float("inf"))
    pairs, free = [], set(range(len(far)))
    for j, column in enumerate(far.T):
        i = min(free, key=column.tolist().__getitem__, default=None)
        if i is not None and column[i] <= _SAME:
            pairs.append((i, j))
            free.remove(i)
    return pairs, sorted(free), sorted(set(range(far.shape[1])) - {j for _, j in pairs})


def differences(found, expected, limit):
    """The largest differences between two lots of detections of an image.

    Args:
        found, expected: {boxes `[N, 4]`, scores `[N]`, labels `[N]`, ...}.
        limit: the score from which on there are detections. One that only one of the two has differs by
            how far its score is above it.

    Returns:
        {"detections": number of `expected`, "boxes": pixels, "scores": 0..1, "masks": ..., ...}
    """
    pairs, only_found, only_expected = match(found, expected)
    rows = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    result = {"detections": len(expected["scores"])}
    for key in _VALUES:
        if key in expected:
            off = (found[key][rows[:, 0]] - expected[key][rows[:, 1]]).abs()
            result[key] = off.max().item() if off.numel() else 0.0
    alone = torch.cat([found["scores"][only_found], expected["scores"][only_expected]]) - limit
    result["scores"] = max([result["scores"], *alone.tolist()])
    return result


def check_exported(run, model, images, limit):
    """`differences` between a file and its model, of each image.

    Args:
        run: what `open_exported` returns.
        model: the detector, on the CPU, in evaluation mode.
        images: list of (name, uint8 `[3, H, W]`).
        limit: the model's score threshold.

    Returns:
        list of dicts, with the image's name as "image".
    """
    rows = []
    for name, image in images:
        expected, outputs = expected_of(model, image), run(image[None])
        number = int(outputs["num_detections"][0])
        found = {key: value[0, :number] for key, value in outputs.items() if key != "num_detections"}
        # What comes after so many is cut off.
        is_full = number > 0 and number == outputs["scores"].shape[1]
        least = found["scores"].min().item() if is_full else limit
        rows.append({"image": name, **differences(found, expected, max(limit, least))})
    return rows
