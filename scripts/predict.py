#!/usr/bin/env python
"""Find objects in images with a trained model: annotated pictures and a COCO JSON.

python scripts/predict.py output/quickstart photo.jpg images/ "more/*.png" --output found
python scripts/predict.py output/quickstart/model_best.pth images/ --output found --threshold 0.7
python scripts/predict.py --config-file configs/torchvision/fasterrcnn_resnet50_fpn.yaml images/
python scripts/predict.py --config-file my.yaml images/ MODEL.WEIGHTS model_final.pth MODEL.DEVICE cpu

The first name is a run's folder (its OUTPUT_DIR, which may come from another machine; the dataset need not
be there), or a checkpoint; with --config-file there is none. Then come images, folders, which are searched
to the bottom, and patterns. KEY VALUE pairs at the end change the config.

DIR gets a picture of each image, in folders as theirs, and predictions.json: COCO's images, categories and
annotations, each with its `score`, with all that the model finds (MODEL.*.SCORE_THRESH_TEST), not only what
is above --threshold. It is read again as a dataset with FORMAT coco.

An image that cannot be read is named and left out; the exit code is then 1.
"""

from plaintrain.utils.arguments import build_parser

if __name__ == "__main__":
    # --help and a wrong flag are answered before the imports that take seconds.
    parser = build_parser(__doc__, "YAML config, in place of a run")
    parser.add_argument(
        "words", nargs="*", metavar="RUN | IMAGE | KEY VALUE", help="the run, images, and config overrides"
    )
    parser.add_argument("--output", default="predictions", metavar="DIR", help="default: predictions")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="lowest score that is drawn (default 0.5)"
    )
    parser.add_argument("--no-pictures", action="store_true", help="write predictions.json only")
    parser.add_argument("--batch-size", type=int, default=1, help="images of one size at a time (default 1)")
    args = parser.parse_intermixed_args()

import glob
import os
import sys

from plaintrain.config.defaults import split_overrides
from plaintrain.data.datasets.write import get_relative_names, write_coco
from plaintrain.data.image_files import list_images
from plaintrain.data.images import read_image
from plaintrain.engine import launch, load_cfg
from plaintrain.predict import Predictor
from plaintrain.structures import BoxMode, encode_masks
from plaintrain.utils.errors import UserError
from plaintrain.utils.files import writing
from plaintrain.utils.logger import build_progress_bar, setup_logger
from plaintrain.visualization.drawing import draw_instances, filter_instances, scale_longer_side
from plaintrain.visualization.images import IMAGE_FORMATS, save_image

# Pictures of smaller images are enlarged to this longer side, in pixels, so that they can be read.
_LEAST = 320


def find_images(inputs):
    """Return the image files that paths, folders and patterns name, each once, in their order."""
    paths = []
    for name in map(os.path.expanduser, inputs):
        if os.path.isdir(name):
            paths += list_images(name)
        elif os.path.isfile(name):
            paths.append(name)
        else:
            matches = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
            if not matches:
                raise UserError(f"{name}: there is no such image, folder or pattern that an image fits")
            paths += matches
    return list(dict.fromkeys(map(os.path.abspath, paths)))


def read_batches(paths, size, pixel_range, problems):
    """[(path, image)] of the images that can be read, at most `size` of one shape at a time."""
    batch = []
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


def to_record(path, image, detections, image_id):
    """Return the detections in an image as a record, its annotations with scores."""
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
        # COCO's annotations say whether a keypoint is seen; only its results have scores there.
        points = detections["keypoints"].clone()
        points[..., 2] = 2
        for annotation, row in zip(annotations, points.flatten(1).tolist(), strict=True):
            annotation["keypoints"] = row
    record = {"file_name": path, "image_id": image_id, "height": height, "width": width}
    return {**record, "annotations": annotations}


def picture_names(paths):
    """Of each image the name of its picture: its own, from the folder on that holds all of them."""
    names = get_relative_names(paths)[1]
    return [name if os.path.splitext(name)[1].lower() in IMAGE_FORMATS else name + ".jpg" for name in names]


def setup(args):
    """(predictor, paths of the images), after the checks of the command line."""
    names, overrides = split_overrides(args.words)
    run, inputs = ("", names) if args.config_file else (names[0] if names else "", names[1:])
    if not args.config_file and not run:
        raise UserError("name a run's folder or a checkpoint, or give --config-file FILE")
    if not inputs:
        raise UserError(f"name the images, folders or patterns to look at{f', after {run}' if run else ''}")
    if not 0 <= args.threshold <= 1 or args.batch_size < 1:
        raise UserError("--threshold must be from 0 to 1, and --batch-size at least 1")
    paths = find_images(inputs)
    pictures = {os.path.realpath(os.path.join(args.output, name)) for name in picture_names(paths)}
    hidden = [] if args.no_pictures else [path for path in paths if os.path.realpath(path) in pictures]
    if hidden:
        raise UserError(f"--output {args.output} would overwrite {hidden[0]}: choose another folder")
    with writing(args.output):
        os.makedirs(args.output, exist_ok=True)
    setup_logger()
    return Predictor(run or load_cfg(args), opts=overrides), paths


def main(args, predictor, paths):
    """Predict and write; the exit code."""
    names = dict(zip(paths, picture_names(paths), strict=True))
    records, problems, num_drawn = [], [], 0
    for batch in read_batches(paths, args.batch_size, predictor.pixel_range, problems):
        outputs = predictor.batch([image for _, image in batch])
        for (path, image), detections in zip(batch, outputs, strict=True):
            records.append(to_record(path, image, detections, len(records) + 1))
            shown = filter_instances(detections, detections["scores"] >= args.threshold)
            num_drawn += len(shown["boxes"])
            if not args.no_pictures:
                if max(image.shape) < _LEAST:
                    image, shown = scale_longer_side(image, shown, _LEAST)
                picture = draw_instances(image, shown, predictor.class_names, predictor.skeleton)
                save_image(os.path.join(args.output, names[path]), picture)
    metadata = {"thing_classes": predictor.class_names}
    target = os.path.join(args.output, "predictions.json")
    folder, relative = get_relative_names(record["file_name"] for record in records)
    write_coco(target, records, metadata, relative)
    print(f"{num_drawn} objects with a score of at least {args.threshold:g} in {len(records)} images")
    print(f"wrote {target} (FORMAT coco, IMAGE_ROOT {folder})")
    if not args.no_pictures:
        print(f"wrote {len(records)} pictures to {args.output}")
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        predictor, paths = setup(args)
    except UserError as e:
        parser.error(str(e))
    sys.exit(launch(main, args=(args, predictor, paths)))
