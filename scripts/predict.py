#!/usr/bin/env python
"""Predict the objects in images with a trained model; write annotated images and a COCO JSON.

python scripts/predict.py output/quickstart photo.jpg images/ "more/*.png" --output predictions
python scripts/predict.py output/quickstart/model_best.pth images/ --score-threshold 0.7
python scripts/predict.py --config-file configs/torchvision/fasterrcnn_resnet50_fpn.yaml images/
python scripts/predict.py --config-file my.yaml images/ MODEL.WEIGHTS model_final.pth MODEL.DEVICE cpu

RUN is a run's folder (its OUTPUT_DIR, which may come from another machine; the dataset is not needed) or a
checkpoint; omit it with --config-file. IMAGEs are files, folders (searched recursively) and glob patterns.
KEY VALUE pairs override the config.

DIR gets an annotated copy of each image, in the same subfolders, and predictions.json: COCO's images,
categories and annotations with `score`. It has all detections of the model (MODEL.*.SCORE_THRESH_TEST), not
only those above --score-threshold, and can be loaded as a dataset with FORMAT coco. The files of an earlier
run in DIR are moved to DIR/old-1, old-2 and so on.

Unreadable images are skipped with a message; the exit code is then 1.
"""

from plaintrain.utils.arguments import add_renamed_argument, build_parser

if __name__ == "__main__":
    # Parse before the slow imports, so that --help and errors are instant.
    parser = build_parser(__doc__, "YAML config, instead of RUN")
    parser.add_argument(
        "words", nargs="*", metavar="RUN | IMAGE | KEY VALUE", help="run, images, config overrides"
    )
    parser.add_argument("--output", default="predictions", metavar="DIR", help="default: predictions")
    threshold = {"type": float, "default": 0.5, "help": "minimum score to draw (default: 0.5)"}
    add_renamed_argument(parser, "--score-threshold", "--threshold", **threshold)
    only_json = {"action": "store_true", "help": "write predictions.json only"}
    add_renamed_argument(parser, "--no-images", "--no-pictures", **only_json)
    parser.add_argument("--batch-size", type=int, default=1, help="images of the same size (default: 1)")
    args = parser.parse_intermixed_args()

import glob
import itertools
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from plaintrain.config.defaults import split_overrides
from plaintrain.data.datasets.write import get_relative_names, write_coco
from plaintrain.data.image_files import list_images
from plaintrain.data.images import read_image
from plaintrain.engine import launch, load_cfg
from plaintrain.predict import Predictor
from plaintrain.structures import BoxMode, encode_masks
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import is_below, read_valid, writing
from plaintrain.utils.logger import build_progress_bar, setup_logger
from plaintrain.visualization.drawing import draw_instances, filter_instances, scale_longer_side
from plaintrain.visualization.images import IMAGE_FORMATS, save_image

# Smaller images are enlarged to this longer side in pixels, so that captions are legible.
_MIN_SIDE = 320
_PREDICTIONS = "predictions.json"


def find_images(inputs: Sequence[str]) -> list[str]:
    """Return the image files of paths, folders and glob patterns, in order and without duplicates."""
    paths: list[str] = []
    for name in map(os.path.expanduser, inputs):
        if os.path.isdir(name):
            paths += list_images(name)
        elif os.path.isfile(name):
            paths.append(name)
        else:
            matches = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
            if not matches:
                raise UserError(f"{name}: no image, folder or pattern matches")
            paths += matches
    return list(dict.fromkeys(map(os.path.abspath, paths)))


def read_batches(
    paths: Sequence[str], size: int, pixel_range: Sequence[float], problems: list[str]
) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield lists of at most `size` (path, image) of the same shape; unreadable images go to `problems`."""
    batch: list[tuple[str, Tensor]] = []
    for path in build_progress_bar(paths, desc="images"):
        try:
            image = read_image(path, pixel_range)
        except UserError as e:
            problems.append(str(e))
            continue
        if batch and (len(batch) == size or image.shape != batch[0][1].shape):
            yield batch
            batch = []
        batch.append((path, image))
    if batch:
        yield batch


def to_record(path: str, image: Tensor, detections: dict[str, Tensor], image_id: int) -> dict[str, Any]:
    """Return the detections in an image as a record whose annotations have scores."""
    height, width = image.shape[-2:]
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, "iscrowd": 0, "score": score}
        for box, label, score in zip(
            *(detections[key].tolist() for key in ("boxes", "labels", "scores")), strict=True
        )
    ]
    if "masks" in detections:
        for annotation, counts in zip(annotations, encode_masks(detections["masks"]), strict=True):
            annotation["segmentation"] = {"size": [height, width], "counts": counts}
    if "keypoints" in detections:
        # The third value is the visibility in COCO's annotations, and the score only in its results.
        points = detections["keypoints"].clone()
        points[..., 2] = 2
        for annotation, keypoints in zip(annotations, points.flatten(1).tolist(), strict=True):
            annotation["keypoints"] = keypoints
    record = {"file_name": path, "image_id": image_id, "height": height, "width": width}
    return {**record, "annotations": annotations}


def get_drawn_names(names: Sequence[str]) -> list[str]:
    """Return the file name of each drawn image."""
    return [name if os.path.splitext(name)[1].lower() in IMAGE_FORMATS else name + ".jpg" for name in names]


def move_old_predictions(folder: str, inputs: Sequence[str]) -> None:
    """Move the files of an earlier run, which its predictions.json lists, to the next free `old-N`."""
    example = {"images": [{"file_name": ""}]}
    content = read_valid(os.path.join(folder, _PREDICTIONS), example)
    images = [image["file_name"] for image in content.get("images", ()) if "file_name" in image]
    names = [name for name in [_PREDICTIONS, *get_drawn_names(images)] if is_below(folder, name)]
    old = [name for name in names if os.path.isfile(os.path.join(folder, name))]
    if set(inputs) & {os.path.abspath(os.path.join(folder, name)) for name in old}:
        raise UserError(f"--output {folder} holds an earlier run's files, among them IMAGEs; choose another")
    if not old:
        return
    targets = (os.path.join(folder, f"old-{i}") for i in itertools.count(1))
    target = next(path for path in targets if not os.path.lexists(path))
    for name in old:
        os.makedirs(os.path.dirname(os.path.join(target, name)), exist_ok=True)
        shutil.move(os.path.join(folder, name), os.path.join(target, name))
    print(f"{folder} contained earlier predictions; moved them to {target}")


def setup(args: Namespace) -> tuple[Predictor, list[str]]:
    """Check the command line and return (predictor, paths of the images)."""
    names, overrides = split_overrides(args.words)
    run, inputs = ("", names) if args.config_file else (names[0] if names else "", names[1:])
    if not args.config_file and not run:
        raise UserError("no model; give a run's folder, a checkpoint, or --config-file FILE")
    if not inputs:
        raise UserError(f"no images; give images, folders or patterns{f' after {run}' if run else ''}")
    if not 0 <= args.score_threshold <= 1:
        raise UserError(f"--score-threshold must be 0 to 1, got {args.score_threshold:g}")
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {args.batch_size}")
    paths = find_images(inputs)
    drawn = get_drawn_names(get_relative_names(paths)[1])
    outputs = {os.path.realpath(os.path.join(args.output, name)) for name in drawn}
    overwritten = [path for path in paths if os.path.realpath(path) in outputs]
    if overwritten and not args.no_images:
        raise UserError(f"--output {args.output} would overwrite {overwritten[0]}; choose another folder")
    with writing(args.output):
        os.makedirs(args.output, exist_ok=True)
    setup_logger()
    predictor = Predictor(run or load_cfg(args), opts=overrides)
    with writing(args.output):
        move_old_predictions(args.output, paths)
    return predictor, paths


def main(args: Namespace, predictor: Predictor, paths: Sequence[str]) -> int:
    """Predict, write and return the exit code."""
    folder, names = get_relative_names(paths)
    name_of = dict(zip(paths, names, strict=True))
    records: list[dict[str, Any]] = []
    problems: list[str] = []
    num_drawn = 0
    target = os.path.join(args.output, _PREDICTIONS)
    try:
        for batch in read_batches(paths, args.batch_size, predictor.pixel_range, problems):
            outputs = predictor.batch([image for _, image in batch])
            for (path, image), detections in zip(batch, outputs, strict=True):
                records.append(to_record(path, image, detections, len(records) + 1))
                shown = filter_instances(detections, detections["scores"] >= args.score_threshold)
                num_drawn += len(shown["boxes"])
                if not args.no_images:
                    if max(image.shape) < _MIN_SIDE:
                        image, shown = scale_longer_side(image, shown, _MIN_SIDE)
                    drawn = draw_instances(image, shown, predictor.class_names, predictor.skeleton)
                    save_image(os.path.join(args.output, *get_drawn_names([name_of[path]])), drawn)
    finally:
        # Also after Ctrl-C, so that it lists the images that are drawn.
        metadata = {"thing_classes": predictor.class_names}
        write_coco(target, records, metadata, [name_of[record["file_name"]] for record in records])
    print(f"{num_drawn} detections at score threshold {args.score_threshold:g} in {len(records)} images")
    print(f"wrote {target} (FORMAT coco, IMAGE_ROOT {folder})")
    if not args.no_images:
        print(f"wrote {len(records)} images to {args.output}")
    for problem in problems:
        print(f"skipped: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        predictor, paths = setup(args)
    except UserError as e:
        parser.error(str(e))
    sys.exit(launch(main, args=(args, predictor, paths)))
